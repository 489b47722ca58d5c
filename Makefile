# Everything runs from a machine that has Python 3.11+ and pip; environments are made when missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

SGLANG := .venv-sglang
LMDEPLOY := .venv-lmdeploy

.PHONY: demo test lint conformance setup-sglang test-sglang setup-lmdeploy test-lmdeploy clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cli,plot,transformers,conformance,dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/entropyprune run --backend transformers --model ep_core/demo/model \
	  --image ep_core/demo/pictures/sample_00.png --prompt "what number is written?" \
	  --policy "layer=2,keep=0.25,method=set-entropy" --max-new-tokens 8 \
	  --compare --overlay demo-overlay.png

test: lint
	$(BIN)/pytest
	$(MAKE) conformance
	$(MAKE) test-sglang
	$(MAKE) test-lmdeploy

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

conformance: $(VENV)/.installed
	$(BIN)/python -m ep_conformance --backend transformers

# the real SGLang engine, on the CPU
setup-sglang: $(SGLANG)/.installed

$(SGLANG)/.installed: pyproject.toml $(wildcard tests/sglang/*.sh tests/sglang/*.txt)
	rm -rf $(SGLANG)
	PYTHON=$(PYTHON) tests/sglang/setup.sh $(SGLANG)
	touch $@

test-sglang: setup-sglang
	$(SGLANG)/bin/pytest tests/sglang
	$(SGLANG)/bin/python -m ep_conformance --backend sglang

# the real LMDeploy engine, on the CPU; no backend of ours yet
setup-lmdeploy: $(LMDEPLOY)/.installed

$(LMDEPLOY)/.installed: pyproject.toml $(wildcard tests/lmdeploy/*.sh tests/lmdeploy/*.txt)
	rm -rf $(LMDEPLOY)
	PYTHON=$(PYTHON) tests/lmdeploy/setup.sh $(LMDEPLOY)
	touch $@

test-lmdeploy: setup-lmdeploy
	$(LMDEPLOY)/bin/pytest tests/lmdeploy

clean:
	rm -rf $(VENV) $(SGLANG) $(LMDEPLOY) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# Everything runs from a machine that has Python 3.11+ and pip; .venv is made when missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint conformance clean

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

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

conformance: $(VENV)/.installed
	$(BIN)/python -m ep_conformance --backend transformers

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

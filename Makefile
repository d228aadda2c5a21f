# make demo       from nothing to a scored slide, on synthetic tissue; make demo CPU=1 installs no
#                 CUDA libraries, for machines without an NVIDIA GPU
# make lint       style of the code (ruff)
# make test       the quick tests, minutes; make test PYTEST="-k lora" for some of them
# make test-slow  tests of more than 5 seconds each, without those of more than 3 minutes
# make test-all   every test, an hour or more
# make test-gpu   those that need an NVIDIA GPU, which all the others do not see
PYTHON  ?= python3
VENV    ?= .venv
BIN      = $(VENV)/bin
CPU     ?=
PYTEST  ?=
WORKERS ?= auto

pip = $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Tests of one file share fixtures, so a worker starts with a run of neighbouring tests.
pytest = $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

.PHONY: demo lint test test-slow test-all test-gpu clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	PATH="$(abspath $(BIN)):$$PATH" bash sweeps/demo.sh

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: $(VENV)/installed-dev
	$(pytest) $(PYTEST)

test-slow: $(VENV)/installed-dev
	$(pytest) -m "slow and not long" $(PYTEST)

test-all: $(VENV)/installed-dev
	$(pytest) -m "" $(PYTEST)

test-gpu: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m gpu $(PYTEST)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(VENV)/bin/python
ifeq ($(CPU),)
	@echo "Downloading the packages into $(VENV). On Linux these are gigabytes (6 GB installed), most of it"
	@echo "CUDA libraries; without an NVIDIA GPU stop here and run: make $(MAKECMDGOALS) CPU=1"
	$(pip) -r $<
else
	@echo "Downloading the packages into $(VENV), without CUDA libraries."
	$(pip) torch torchvision --index-url https://download.pytorch.org/whl/cpu
	sed 's/^onnxruntime-gpu[^>]*/onnxruntime/' $< > $(VENV)/requirements-cpu.txt
	$(pip) -r $(VENV)/requirements-cpu.txt
endif
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(pip) -r requirements-dev.txt
	touch $@

clean:
	rm -rf data/demo runs/demo runs-quick demo-out

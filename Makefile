# make demo       from nothing to a scored slide, on synthetic tissue
# make lint       style of the code (ruff)
# make test       the quick tests, minutes; make test PYTEST="-k lora" for some of them
# make test-slow  tests of more than 5 seconds each, without those of more than 3 minutes
# make test-all   every test, an hour or more
PYTHON  ?= python3
VENV    ?= .venv
BIN      = $(VENV)/bin
PYTEST  ?=
WORKERS ?= auto

# Tests of one file share fixtures, so a worker starts with a run of neighbouring tests.
pytest = $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

.PHONY: demo lint test test-slow test-all clean
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

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf data/demo runs/demo runs-quick demo-out

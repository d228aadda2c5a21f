# make demo   from nothing to a scored slide, on synthetic tissue
# make test   the tests (make test PYTEST="-m slow" for the long ones)
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PYTEST ?=

.PHONY: demo test clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	PATH="$(abspath $(BIN)):$$PATH" bash sweeps/demo.sh

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(PYTEST)

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

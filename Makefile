# make quickstart | test | test-all | lint | clean. Whichever runs first also sets up .venv; nothing else is needed.
# PYTHON=/path/to/python3.11 chooses the interpreter, WORKERS the number of test processes.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
WORKERS ?= 2

export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
# Two test processes of two threads each would slow each other tenfold; quickstart takes all cores.
test test-all: export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test test-all lint clean

quickstart: $(STAMP)
	$(VENV)/bin/graft quickstart

test: lint
	$(VENV)/bin/python -m pytest -q -n $(WORKERS)

test-all: lint
	$(VENV)/bin/python -m pytest -q -n $(WORKERS) -m "wide or not wide"

lint: $(STAMP)
	$(VENV)/bin/ruff check src tests scripts bench
	$(VENV)/bin/mypy

# A venv that was interrupted half-way has no pip: it is made again. What already fits the constraints, pip leaves alone.
$(STAMP): pyproject.toml constraints.txt
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "Graft needs Python 3.11 or newer; $(PYTHON) is: $$($(PYTHON) --version 2>&1 || true)" >&2; \
	    echo "Name another: make $(firstword $(MAKECMDGOALS) quickstart) PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	  echo "$(PYTHON) -m venv $(VENV)"; $(PYTHON) -m venv $(VENV); }
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

# Keeps .venv; delete it by hand to start from nothing.
clean:
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

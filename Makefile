# Needs only python3 (3.11 to 3.13), make and a package index. `make demo` and `make test` create what is missing.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS := .ci/constraints.txt
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BUILD_CONSTRAINT=$(CONSTRAINTS) $(BIN)/python -m pip install -q -c $(CONSTRAINTS)
TESTS ?= tests

.PHONY: demo test lint clean help

help:
	@echo "make demo    convert and measure a trained model on this CPU"
	@echo "make test    run the tests        (TESTS=tests/test_x.py for some of them)"
	@echo "make lint    ruff and mypy"
	@echo "make clean   remove $(VENV), build/, edgekit-demo/ and caches"

demo: $(VENV)/.has-openvino $(VENV)/.has-tflite
	@$(BIN)/edgekit demo

test: $(VENV)/.has-dev
	@$(BIN)/python -m pytest -n auto --dist loadfile $(TESTS)

lint: $(VENV)/.has-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy edgekit

# One stamp per extra; a change of the dependencies or of the pinned set makes it stale.
$(VENV)/.has-%: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "installing edgekit[$*] into $(VENV): a minute or two the first time"
	@$(PIP) -e '.[$*]'
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: no '$(PYTHON)' — install Python 3.11, 3.12 or 3.13, or say make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1) — edgekit needs 3.11, 3.12 or 3.13: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot create virtual environments — install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .venv-keras .venv-tflite-runtime .venv-tflm build edgekit-demo dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

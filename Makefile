# Sets up the virtual environment once and runs what a newcomer needs. PYTHON=... chooses the interpreter.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help demo test lint clean

help:
	@echo "make demo    stock against accelerated CSM: a table, and WAV, JSON and PNG in demo_out; ARGS=\"--model ...\""
	@echo "make test    the test suite; ARGS=\"-k name\""
	@echo "make lint    ruff and mypy"
	@echo "make clean   remove caches and demo_out; the virtual environment stays"

demo: $(VENV)/.installed-cli
	$(BIN)/csm-accelerate demo $(ARGS)

test: $(VENV)/.installed-dev
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels $(ARGS) || [ $$? -eq 5 ]
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist demo_out .pytest_cache .mypy_cache .ruff_cache .benchmarks *.egg-info
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

# One stamp per extra: reinstalled when the requirements change, never twice otherwise.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

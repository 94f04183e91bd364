# Sets up the virtual environment once and runs what a newcomer needs. PYTHON=... chooses the interpreter.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
RACE := .venv-race
NATIVE := $(wildcard csm_kernels/cpu/src/*)
ARGS ?=
JOBS ?= 2

.PHONY: help demo train-demo test lint budgets race-check sanitize clean

help:
	@echo "make demo    stock against accelerated CSM: a table, and WAV, JSON and PNG in demo_out; ARGS=\"--model ...\""
	@echo "make train-demo   train a small CSM on real speech within 15 minutes; ARGS=\"--minutes 10 --out folder\""
	@echo "make test    the test suite in JOBS=2 processes; ARGS=\"-k name\""
	@echo "make lint    ruff and mypy"
	@echo "make budgets      compile every kernel for every GPU target and rewrite the budgets; read the difference"
	@echo "make race-check   kernel tests under ttsem, which finds races and stray accesses without a GPU; own environment"
	@echo "make sanitize     kernel tests under compute-sanitizer; needs a GPU"
	@echo "make clean   remove caches, demo_out and train_demo_out; the virtual environment stays"

demo: $(VENV)/.installed-cli
	$(BIN)/csm-accelerate demo $(ARGS)

train-demo: $(VENV)/.installed-train
	$(BIN)/python examples/train_demo.py $(ARGS)

test: $(VENV)/.installed-dev
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels -n $(JOBS) $(ARGS) || [ $$? -eq 5 ]
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

budgets: $(VENV)/.installed-dev
	$(BIN)/python tests/test_compile_budgets.py

# ttsem wants another Triton and torch than the package is developed with; opcheck and torch.compile need a real device.
race-check: $(RACE)/.installed
	CSM_KERNELS_PTX=0 $(RACE)/bin/python -m ttsem.sanitize pytest tests/kernels -q -m "not dispatcher" -p no:cacheprovider $(ARGS)

$(RACE)/.installed: pyproject.toml
	$(PYTHON) -m venv $(RACE)
	$(RACE)/bin/python -m pip install --disable-pip-version-check torch==2.13.0 triton==3.8.0 pytest scipy "transformers==5.17.0"
	$(RACE)/bin/python -m pip install --disable-pip-version-check --no-deps --ignore-requires-python ttsem==0.1.0
	$(RACE)/bin/python -m pip install --disable-pip-version-check --no-deps -e .
	touch $@

sanitize: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --disable-pip-version-check nvidia-cuda-sanitizer-api
	for tool in memcheck initcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$$($(BIN)/python -c 'import nvidia, pathlib; print(next(p for root in nvidia.__path__ for p in pathlib.Path(root).rglob("compute-sanitizer") if p.is_file()))')" \
			--tool $$tool --error-exitcode 1 $(BIN)/python -m pytest tests/kernels -q -m "not dispatcher" $(ARGS) || exit 1; \
	done

clean:
	rm -rf build dist demo_out train_demo_out .pytest_cache .mypy_cache .ruff_cache .benchmarks *.egg-info
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

# One stamp per extra: reinstalled when the requirements change, never twice otherwise.
$(VENV)/.installed-%: pyproject.toml constraints.txt setup.py $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

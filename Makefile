# Targets: demo, test, bench, docs, baseline, gpu, lint. All but gpu make their own .venv when there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test bench docs baseline gpu lint

demo: $(STAMP)
	$(BIN)/lipfast compare --data digits --out results/demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 -m "not interpreter"
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PYTEST) -n 2 -m interpreter tests/kernels

bench: $(STAMP)
	$(PYTEST) bench --benchmark-only -s

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

# Records the counted costs anew, on purpose: docs/baseline.md.
baseline: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.baseline.update

# Offline, on a CUDA machine; with the .venv if there is one, else with the machine's own python3.
gpu:
	bench/gpu.sh

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(STAMP): constraints.txt pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@

# make video: an environment of its own, then a video.  make test: the environment, then all tests.
#  make check: everything a change needs before it is sent.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

PROMPT ?= a red circle moves to the left over a blue background

.PHONY: setup video test check bench core pareto clean

setup: $(VENV)/.done

# torch comes first and pinned: asked for by a range, pip would take the newest build with gigabytes of CUDA packages.
# Twice --quiet: pip says what went wrong, and nothing else.
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check

$(VENV)/.done: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): torch, diffusers and hvcompile; this takes some minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip
	@$(PIP) install --constraint constraints.txt torch
	@$(PIP) install --constraint constraints.txt --editable '.[cli,diffusers,dev]'
	@touch $@

video: setup
	@$(BIN)/hvcompile generate "$(PROMPT)" --output out.mp4

test: setup
	$(BIN)/python -m pytest -n 2

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2

bench: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/hvcompile bench --threads 1

core: setup
	$(BIN)/python benchmarks/core.py

pareto: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python benchmarks/pareto.py --threads 1

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache

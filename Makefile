# make video: an environment of its own, then a video.  make test: the environment, then all tests.
#  make check: everything a change needs before it is sent.  make docs: the site, in build/docs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Errors alone: neither its warnings nor its word that there is a newer one.
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check

PROMPT ?= a red circle moves to the left over a blue background

.PHONY: setup video test check docs bench core pareto clean

setup: $(VENV)/.done

# torch comes first and pinned: asked for by a range, pip would take the newest build with gigabytes of CUDA packages.
$(VENV)/.done: pyproject.toml constraints.txt
	@echo "An environment in $(VENV): torch, diffusers and what the tests need. Once, and it takes some minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --constraint constraints.txt --upgrade pip
	@$(PIP) install --constraint constraints.txt torch
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
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

docs: setup
	$(BIN)/sphinx-build -W -q -b html docs build/docs

bench: setup
	@$(PIP) install --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/hvcompile bench --threads 1

core: setup
	$(BIN)/python benchmarks/core.py

pareto: setup
	@$(PIP) install --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python benchmarks/pareto.py --threads 1

clean:
	rm -rf build $(VENV) .mypy_cache .ruff_cache .pytest_cache

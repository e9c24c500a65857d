# `make` lists the targets. Each sets up .venv by itself; once that is done it needs no network.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.PHONY: help demo test test-slow check lint format venv clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Rooms whose types are checked.
TYPED := src/convex_caldera/linalg src/convex_caldera/core src/convex_caldera/fit
# Test processes; each keeps to one thread so that they do not fight over the cores. Each begins
# with its own half of the tests, so that most modules make their fixtures once. anyio comes with
# another package; nothing here is asynchronous.
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -p no:anyio

# glibc returns freed arrays to the system at once and faults them in again; keeping them is
# about a fifth faster where large temporaries come and go, and takes half as much memory again.
test test-slow: export MALLOC_TRIM_THRESHOLD_ := -1
test test-slow: export MALLOC_MMAP_MAX_ := 0
# pytest compiles each test file anew, with what its assertions are to say, unless it may keep it.
unexport PYTHONDONTWRITEBYTECODE
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: venv  ## compress the bundled model to 2.2 bits and compare it with the original
	@$(BIN)/convex-caldera demo

test: venv  ## all tests but the slow ones
	@$(PYTEST) $(PYTEST_ARGS)

test-slow: venv  ## the slow tests, and every law on all of its examples
	@$(PYTEST) -m "slow or hypothesis" --hypothesis-profile=thorough $(PYTEST_ARGS)

lint: venv  ## format, style, types and the import contract
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary $(wildcard $(TYPED)) & types=$$!; failed=0; \
	$(BIN)/lint-imports --no-logo || failed=1; \
	wait $$types || failed=1; exit $$failed

check: lint test  ## everything that must hold before a commit: lint, then test

format: venv  ## rewrite the sources in the house format
	@$(BIN)/ruff format --quiet . && $(BIN)/ruff check --quiet --fix .

clean:  ## remove the environment and all caches
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .ruff_cache .mypy_cache .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp holds what decides the installation: this folder and the two files. So neither a
# touched file nor a changed branch installs anything anew without need.
DECIDES = pwd; cat pyproject.toml constraints.txt
venv:
	@[ -x $(BIN)/python ] && { $(DECIDES); } | cmp -s - $(STAMP) || $(MAKE) --no-print-directory install

.PHONY: install
install:
	@set -e; \
	usable='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; \
	python=; \
	for candidate in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.14 python; do \
	    if $$candidate -c "$$usable" >/dev/null 2>&1; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "No Python >= 3.11 with the venv module was found (python3 is: $$(python3 --version 2>&1))." >&2; \
	    echo "Install one (Debian, Ubuntu: apt install python3 python3-venv), or name it:" >&2; \
	    echo "    make PYTHON=/path/to/python3.11" >&2; \
	    exit 2; \
	fi; \
	echo "Installing into $(VENV) with $$($$python --version); PyTorch is large, allow some minutes ..."; \
	here=$$(head -n 1 $(STAMP) 2>/dev/null || pwd); \
	if [ "$$here" != "$$(pwd)" ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    $$python -m venv --clear $(VENV); \
	fi; \
	$(BIN)/python -m pip install --quiet "setuptools>=77"; \
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[dev,report]"; \
	{ $(DECIDES); } > $(STAMP)

# Everything runs in .venv, which the first target that needs it creates. PYTHON must be 3.11 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test soak lint format bench clean

help:  ## Say what there is.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; say where with make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,dashboard]'
	@touch $@

demo: $(INSTALLED)  ## Compare defaults, TPE and TPE + greedy on digits with corrupted labels; about a minute.
	$(BIN)/greedyhg demo --artifacts greedyhg-artifacts

test: $(INSTALLED)  ## Run the tests.
	$(BIN)/python -m pytest

soak: $(INSTALLED)  ## Kill fifty workers of a study at random, on sqlite and on PostgreSQL each; some minutes.
	GREEDYHG_SOAK_KILLS=50 $(BIN)/python -m pytest tests/trials/test_soak.py

lint: $(INSTALLED)  ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## Put the style right where that can be done by itself.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## Repeat the committed benchmarks: five seeds of two tasks, about six minutes.
	$(BIN)/python benchmarks/equal_cost.py --task digits-cleaning --out benchmarks/results/digits_cleaning.json
	$(BIN)/python benchmarks/equal_cost.py --task digits-l2 --out benchmarks/results/digits_l2.json

clean:  ## Remove the environment and the caches.
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist

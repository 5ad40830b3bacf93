# Everything runs in .venv, which the first target that needs it creates. PYTHON must be 3.11 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := .venv-peers
PEERS_INSTALLED := $(PEERS)/.installed
# docs/performance.md, "On a CPU", says what for.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=20000000000 MALLOC_TOP_PAD_=300000000

.PHONY: help demo test browser soak lint format bench bench-quick bench-peers clean

help:  ## Say what there is.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; say where with make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,dashboard]'
	@touch $@

demo: $(INSTALLED)  ## Compare defaults, TPE and TPE + greedy on digits with corrupted labels; about a minute.
	$(BIN)/greedyhg demo --artifacts greedyhg-artifacts

test: $(INSTALLED)  ## Run the tests.
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

# Its exit status says whether there is one.
FIND_BROWSER := $(BIN)/python -c 'from optuna_greedyhg.report.browser import find_browser; exit(find_browser() is None)'

browser: $(INSTALLED)  ## Install Chromium for the tests that need a browser, where apt-get can; elsewhere say that they are skipped.
	@if ! $(FIND_BROWSER) && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-liberation; \
	fi; \
	$(FIND_BROWSER) || echo "No Chromium or Chrome: the tests in a browser will be skipped; install one, or set BROWSER_PATH."

soak: $(INSTALLED)  ## Kill fifty workers of a study at random, on sqlite and on PostgreSQL each; some minutes.
	GREEDYHG_SOAK_KILLS=50 $(BIN)/python -m pytest tests/trials/test_soak.py

lint: $(INSTALLED)  ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## Put the style right where that can be done by itself.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## Compare with TPE again, on two tasks and five seeds; half an hour.
	$(BIN)/python benchmarks/compare.py --task digits-cleaning
	$(BIN)/python benchmarks/compare.py --task digits-l2

bench-quick: $(INSTALLED)  ## Measure speed and memory against their floors; less than five minutes.
	@$(KEEP_MEMORY) $(BIN)/python benchmarks/quick.py

$(PEERS_INSTALLED): pyproject.toml constraints.txt benchmarks/methods/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt --editable . \
		--requirement benchmarks/methods/requirements.txt
	# Its metadata ask for a Python before 3.11, which its code does not need.
	$(PEERS)/bin/python -m pip install --quiet --no-deps --ignore-requires-python betty-ml==0.2.1
	@touch $@

bench-peers: $(PEERS_INSTALLED)  ## Compare with other packages, in an environment of their own; half an hour.
	$(PEERS)/bin/python benchmarks/peers.py --again --out benchmarks/results/peers.json

clean:  ## Remove the environments and the caches.
	rm -rf $(VENV) $(PEERS) .mypy_cache .ruff_cache .pytest_cache build dist

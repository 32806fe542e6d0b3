# Everything runs in .venv, made with plain venv and pip; constraints.txt pins what is installed.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
# PyTorch with two threads on a busy two-core machine is 10 to 45 times slower than with one.
export OMP_NUM_THREADS ?= 1

# Number of processes that run tests.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

.PHONY: demo test test-long check docs bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/keylayers demo

test: $(VENV)/installed-dev
	$(PYTEST) -m "not long"

# Kills, full disks, fuzzing, several processes, a browser, served models: minutes.
test-long: $(VENV)/installed-dev
	$(PYTEST) -m long

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell src tests docs benchmarks experiments README.md CHANGELOG.md CONTRIBUTING.md

# The site in build/site, which opens from disk. Fails at dead links and requests to other hosts.
docs: $(VENV)/installed-docs
	$(BIN)/python docs/site/build.py

bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks
	$(BIN)/python experiments/pages.py

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group docs
	touch $@

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis

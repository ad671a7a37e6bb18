PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup quickstart test test-slow lint

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: setup ## the main job, end to end; run again, it goes on where it stopped
	test -d corpus/python || $(BIN)/sevenfold corpus python
	$(BIN)/python jobs/pretrain.py jobs/recipes/quickstart.yaml
	$(BIN)/python jobs/sweep.py jobs/recipes/quickstart-sft.yaml
	$(BIN)/python jobs/evaluate.py runs/quickstart runs/quickstart-sft-sweep

test: setup
	$(BIN)/python -m pytest -q -m 'not slow'

test-slow: setup
	$(BIN)/python -m pytest -q -m slow --durations=20 -rs

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

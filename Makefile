PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup quickstart test test-slow test-nightly lint

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: setup ## the whole path, end to end; resumes if it is run again
	test -d corpus/python || $(BIN)/sevenfold corpus python
	$(BIN)/python jobs/pretrain.py jobs/recipes/quickstart.yaml
	$(BIN)/python jobs/sweep.py jobs/recipes/quickstart-sft.yaml
	$(BIN)/python jobs/evaluate.py runs/quickstart runs/quickstart-sft-sweep

# Two test processes with one thread each keep two cores busy. The tests of a file run in the same
# process, since they share its fixtures; slow tests, which share theirs through a folder of the
# session, are distributed one by one.
test: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow and not nightly'

test-slow: setup
	$(BIN)/python -m pytest -q -n 2 --dist load --maxschedchunk 1 -m slow

test-nightly: setup
	$(BIN)/python -m pytest -q -n 2 --dist load --maxschedchunk 1 -m nightly

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup quickstart test test-slow test-nightly lint

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

# Two processes of one thread keep both cores busy. Tests of a file stay together, since they share its fixtures; slow ones, which
# share theirs through the session's folder, are dealt out one by one.
test: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow and not nightly'

test-slow: setup
	$(BIN)/python -m pytest -q -n 3 --dist load --maxschedchunk 1 -m slow

test-nightly: setup
	$(BIN)/python -m pytest -q -n 2 --dist load --maxschedchunk 1 -m nightly

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

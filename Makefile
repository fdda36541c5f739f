# make run    set up and train the demo        make test   set up and run the test suite
# make lint   check style and types            make docs   build the pages of docs/ into docs/_build
# make dist   build sdist and wheel into dist/ make try-dist  install the wheel into an empty environment, and run it
# make gpu-check  measure on a GPU what layerwise promises of it, within 8 minutes; figures go to runs/gpu-check.json
# make clean  remove the environment (runs and caches stay)

PYTHON ?= python3.11
BIN := .venv/bin

# Processes that tests start would compile the package anew, each of them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test lint docs dist try-dist gpu-check clean

run: .venv/ready
	$(BIN)/layerwise run

test: .venv/ready lint
	$(BIN)/pytest -n 3 --dist worksteal

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy layerwise

docs: .venv/ready
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs docs/_build

dist: .venv/ready
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .

try-dist: dist
	.ci/try-dist "$(PYTHON)"

gpu-check: .venv/ready
	$(BIN)/python benchmarks/gpu_check.py --json runs/gpu-check.json

.venv/ready: setup.py constraints.txt layerwise/cache/compiled_reads.c
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv

# make run    set up and train the demo        make test   set up and run the test suite
# make lint   check style and types              make clean  remove the environment (runs and caches stay)

PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: run test lint clean

run: .venv/ready
	$(BIN)/layerwise run

test: .venv/ready lint
	$(BIN)/pytest -n 2

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy layerwise

.venv/ready: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv

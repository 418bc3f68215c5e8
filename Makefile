# Set-up happens once, in .venv, on a machine with Python >= 3.11 and make; PYTHON=python3.12 picks another interpreter.
# `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
DOCS_VENV := .venv-docs
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo demo-eval test test-all test-versions lint format docs-tree site clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

QUESTION := What do you see in this picture?

demo: $(VENV)/.core ## set up, and ask the embedded model about an image
	@echo '$$ llava chat images/demo.jpg "$(QUESTION)"'
	@$(BIN)/python -m llava chat images/demo.jpg "$(QUESTION)"
	@echo "The command is $(BIN)/llava; 'source $(BIN)/activate' puts it on the PATH of this shell."

demo-eval: $(VENV)/.core ## set up, and measure the embedded model on its held-out questions
	@echo '$$ llava eval tiny'
	@$(BIN)/python -m llava eval tiny

PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.dev ## set up, and run the tests but the slow ones
	$(PYTEST) -m 'not slow'

test-all: $(VENV)/.dev ## run all tests, as CI does
	$(PYTEST)

test-versions: ## run the tests on the lowest and the newest supported versions, in environments under build/
	$(PYTHON) scripts/test_versions.py

lint: $(VENV)/.dev ## check style, types and translations
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/docs/translations.py

format: $(VENV)/.dev ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs-tree: ## print every file of the package with its first line
	@$(PYTHON) scripts/docs/tree.py

site: $(DOCS_VENV)/.done ## build the pages of docs/ as a site, in build/site
	$(DOCS_VENV)/bin/python scripts/docs/site.py

clean: ## remove the environment and what was built
	rm -rf $(VENV) $(DOCS_VENV) build llava.egg-info .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; run: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --constraint constraints.txt --editable .
	@touch $@

# An environment of its own, without the package, whose sources the site reads: no target changes another's.
DOCS_NEEDS := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")
$(DOCS_VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(PYTHON) -c '$(DOCS_NEEDS)' > $(DOCS_VENV)/requirements.txt
	$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
		--requirement $(DOCS_VENV)/requirements.txt
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	$(PIP) install --quiet --constraint constraints.txt --no-deps --requirement tests/page-requirements.txt
	@# DeepSpeed has no wheel; without its compiled operators it is built in seconds, with the torch that is here.
	@DS_BUILD_OPS=0 $(PIP) install --quiet --constraint constraints.txt --no-build-isolation deepspeed || \
		echo "DeepSpeed cannot be built here; the tests of ZeRO will be skipped"
	@touch $@ $(VENV)/.core

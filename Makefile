# Three commands for a fresh machine with Python >= 3.11 and make:
#   make demo       set up, and ask the embedded model about an image
#   make demo-eval  set up, and measure the embedded model on its held-out questions
#   make test       set up, and run the tests
# And one for the site of docs/, written to build/site:
#   make site
# Set-up happens once, in .venv; PYTHON=python3.12 picks another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo demo-eval test lint format site clean help

help:
	@sed -n '2,6s/^# *//p' Makefile

QUESTION := What do you see in this picture?

demo: $(VENV)/.core
	@echo '$$ llava chat images/demo.jpg "$(QUESTION)"'
	@$(BIN)/python -m llava chat images/demo.jpg "$(QUESTION)"

demo-eval: $(VENV)/.core
	@echo '$$ llava eval tiny'
	@$(BIN)/python -m llava eval tiny

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

site: $(VENV)/.docs
	$(BIN)/python scripts/docs/site.py

clean:
	rm -rf $(VENV) build llava.egg-info .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; run: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt '.[docs]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	$(PIP) install --quiet --constraint constraints.txt --no-deps --requirement tests/page-requirements.txt
	@# DeepSpeed has no wheel; without its compiled operators it is built in seconds, with the torch that is here.
	@DS_BUILD_OPS=0 $(PIP) install --quiet --constraint constraints.txt --no-build-isolation deepspeed || \
		echo "DeepSpeed cannot be built here; the tests of ZeRO will be skipped"
	@touch $@ $(VENV)/.core

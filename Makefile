# A clean clone needs Python 3.11+ and a C compiler; everything else is made here. `make help` lists the targets.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
CPP := $(wildcard adapters/kernels/cpu/src/*)
BUILT_FROM := pyproject.toml constraints.txt $(wildcard setup.py) $(CPP)
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help dev serve samples test coverage format lint types clean

# Recipes read the state folder from the environment, so that it may have spaces. Tests find theirs themselves.
serve samples: export MANYLORA_HOME := $(or $(MANYLORA_HOME),.manylora)
serve: export MANYLORA_HOST ?= $(HOST)
serve: export MANYLORA_PORT ?= $(PORT)

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

dev: $(VENV)/.installed-dev ## Set up the environment for development

serve: $(VENV)/.installed samples ## Serve the default base and the samples (HOST, PORT, MANYLORA_HOME, MANYLORA_…)
	@exec $(BIN)/manylora serve

# Renamed when complete: a running server watches that folder.
samples: ## Copy the sample adapters to $MANYLORA_HOME/adapters, unless they are there
	@mkdir -p "$$MANYLORA_HOME/adapters"
	@set -e; for config in adapters/samples/*/adapter_config.json; do \
		source=$$(dirname "$$config"); target="$$MANYLORA_HOME/adapters/$${source##*/}"; \
		[ -e "$$target" ] && continue; \
		rm -rf "$$target.tmp"; cp -R "$$source" "$$target.tmp"; mv "$$target.tmp" "$$target"; \
	done

test: $(VENV)/.installed-dev ## Run the default tests (ARGS: options for pytest)
	$(BIN)/python -m pytest -n auto $(ARGS)

coverage: $(VENV)/.installed-dev ## Run the default tests and measure what they cover (ARGS; htmlcov/index.html)
	$(BIN)/python -m pytest -n auto --cov --cov-report=term --cov-report=html $(ARGS)

format: $(VENV)/.installed-dev ## Format Python and C++, and repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

lint: $(VENV)/.installed-dev ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

types: $(VENV)/.installed-dev ## Check types
	$(BIN)/mypy

clean: ## Remove the environment and all caches, but no state (.manylora)
	rm -rf $(VENV) .pytest_cache .hypothesis .mypy_cache .ruff_cache .coverage .coverage.* htmlcov build dist *.egg-info adapters/kernels/cpu/*.so
	find server adapters tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: without changes in what they depend on, nothing is installed again.
$(VENV)/.installed: $(BUILT_FROM) | $(BIN)/pip
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: $(BUILT_FROM) | $(BIN)/pip
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $(VENV)/.installed $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "manylora needs Python 3.11 or newer, and this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

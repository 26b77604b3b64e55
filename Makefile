# The contributor's whole interface; `make help` lists the targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv hooks quickstart test test-cluster stress check docs bench clean
.DELETE_ON_ERROR:

VENV ?= .venv
# The Python that makes the virtual environment; by default the first of these that can.
BASE_PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	$$name -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$name; break; }; done)
# Given to pip install as it is, for example an index of CPU builds of torch.
PIP_ARGS ?=
# Job scripts that tests start read a variable of this name, too.
unexport ARGS
# Tests start hundreds of interpreters; where this is set, each would compile the sources anew.
unexport PYTHONDONTWRITEBYTECODE
# Given to pytest as it is, for example ARGS="-k resume".
ARGS ?=
# Tests that run at once; each starts ranks of its own, so one per two cores is enough on larger machines.
JOBS ?= 2

python := $(VENV)/bin/python
installed := $(VENV)/.installed

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

venv: $(installed) ## make .venv and install everything into it, in the versions of constraints.txt

$(installed): setup.py constraints.txt
	@test -n "$(BASE_PYTHON)" || { echo "error: no Python 3.11 or later with venv and ensurepip; on Debian" \
		"or Ubuntu: apt-get install python3 python3-venv; or name one: make BASE_PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "== $(VENV): a virtual environment of $(BASE_PYTHON)"
	$(BASE_PYTHON) -m venv $(VENV)
	@echo "== installing (one to some minutes, by the network)"
	$(python) -m pip install --disable-pip-version-check --prefer-binary $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

hooks: $(installed) ## install git hooks: ruff before each commit, mypy before each push
	$(python) -m pre_commit install

quickstart: $(installed) ## shards, training, kill, resume, export, generation, report: everything, in minutes
	$(python) -m pipeline.quickstart

test: $(installed) ## run the tests (twelve minutes on 2 quiet cores)
	$(python) -m pytest --numprocesses $(JOBS) --dist worksteal $(ARGS)

test-cluster: $(installed) ## run the Slurm jobs on a real Slurm of 4 nodes on this machine (root; 4 minutes)
	$(python) -m pytest -m 'cluster and not stress' tests/cluster $(ARGS)

stress: $(installed) ## run the long forms of tests (hours): every layout, every point of failure
	$(python) -m pytest --numprocesses $(JOBS) --dist worksteal -m 'stress and not cluster' $(ARGS)
	$(python) -m pytest -m 'stress and cluster' tests/cluster $(ARGS)

check: $(installed) docs ## ruff, mypy --strict, the layering of imports, the pages and project files
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	$(python) -m pytest -q tests/test_layering.py tests/docs/test_blocks.py tests/docs/test_architecture.py tests/test_project_files.py

docs: $(installed) ## build the pages into docs/_build; warnings are errors
	$(python) -m sphinx --builder html --nitpicky --fail-on-warning --keep-going --quiet docs docs/_build/html

bench: $(installed) ## run every benchmark
	@for file in $$(grep -l __main__ benchmarks/*.py); do echo "== $$file"; $(python) "$$file"; done

clean: ## remove caches, build outputs and the quickstart's run; .venv and other runs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf runs/quickstart runs/quickstart-data
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

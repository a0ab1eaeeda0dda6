# Everything runs in .venv, which the first target that needs it makes; `make` alone prints help.
SHELL := /bin/bash
PYTHON := .venv/bin/python
PYTHONS := python3 python3.13 python3.12 python3.11

.PHONY: help venv demo demo-study pretrain-demo test test-slow lint types clean

help: ## print this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 22

venv: .venv/.ready ## make the environment .venv (the others do it when it is missing)
	@:

demo: .venv/.ready ## fine-tune the embedded digits model: a table and a picture in minutes
	@$(PYTHON) tools/demo.py

demo-study: .venv/.ready ## the demo over three seeds, with its controls
	@$(PYTHON) tools/demo_study.py

pretrain-demo: .venv/.ready ## train the demo's pre-trained model again from nothing
	@$(PYTHON) tools/pretrain_demo.py

test: .venv/.ready ## the fast tests
	@$(PYTHON) -m pytest -n 2 -m 'not slow'

test-slow: .venv/.ready ## the tests that take minutes
	@$(PYTHON) -m pytest -m slow

lint: .venv/.ready ## ruff: rules and format
	@$(PYTHON) -m ruff check --quiet .
	@$(PYTHON) -m ruff format --quiet --check .

types: .venv/.ready ## mypy
	@$(PYTHON) -m mypy --no-error-summary

clean: ## remove caches and builds (not .venv, not runs/)
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks build dist
	@find fastgan tools tests -name __pycache__ -prune -exec rm -rf {} +

.venv/.ready: pyproject.toml
	@fail() { echo "error: $$1" >&2; exit 1; }; \
	for python in $(PYTHONS) none; do \
	    "$$python" -c 'import ensurepip, sys, venv; \
	        sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && break; \
	done; \
	[ $$python != none ] || fail \
	    "no Python 3.11 to 3.13 with its venv module, on PATH, install python3 and python3-venv"; \
	type c++ g++ clang++ 2>/dev/null | grep -q . || fail \
	    "no C++ compiler, on PATH, install g++ or clang++ (torch.compile on the CPU calls it)"; \
	echo "$$python: installing into .venv, which takes a minute or more"; \
	$(PYTHON) -m pip --version >/dev/null 2>&1 || "$$python" -m venv .venv && \
	$(PYTHON) -m pip install -qq --disable-pip-version-check -e '.[dev]' && \
	touch $@

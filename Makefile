# Everything runs in .venv, which the first target that needs it makes; `make` alone prints help.
SHELL := /bin/bash
PYTHON := .venv/bin/python
PYTHONS := python3 python3.13 python3.12 python3.11

.PHONY: help venv demo demo-study pretrain-demo test test-slow test-torch211 aot bench lint types
.PHONY: budget gpu-wheels clean

help: ## print this list
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 22

venv: .venv/.ready ## make the environment .venv (the others do it when it is missing)
	@:

demo: .venv/.ready ## fine-tune the embedded digits model: a table and a picture in minutes
	@$(PYTHON) tools/demo.py

demo-study: .venv/.ready ## the demo over three seeds, with its controls
	@$(PYTHON) tools/demo.py --study

pretrain-demo: .venv/.ready ## train the demo's pre-trained model again from nothing
	@$(PYTHON) tools/pretrain_demo.py

test: .venv/.ready ## the fast tests
	@$(PYTHON) -m pytest -n 2 -m 'not slow'

test-slow: .venv/.ready ## the tests that take minutes
	@$(PYTHON) -m pytest -n 2 -m slow

test-torch211: .venv-torch211/.ready ## kernels, networks, training, instruments under torch 2.11 + triton 3.6 (downloads gigabytes)
	@.venv-torch211/bin/python -m pytest -n 2 -m 'not slow' tests/kernels tests/models tests/training tests/performance

aot: .venv/.ready ## compile every kernel for sm_80 and sm_90 (no GPU needed): registers, spills, widths
	@$(PYTHON) -m fastgan_kernels.aot --check

bench: .venv/.ready ## kernel benchmarks; on a machine without a GPU tiny ones that are no speeds
	@$(PYTHON) -m pytest benchmarks

budget: .venv/.ready ## what the published experiments cost on A100, H100, H200: computed, with a plot
	@$(PYTHON) tools/budget.py --plot docs/images/budget.png

gpu-wheels: .venv/.ready ## wheels/: what tools/gpu_report.py takes to a GPU machine without network
	@rm -rf wheels && $(PYTHON) -m pip install -qq --disable-pip-version-check --no-deps -t wheels \
	    $$($(PYTHON) -m pip freeze | \
	    grep -E '^(hydra-core|omegaconf|antlr4-python3-runtime|pytest-xdist|execnet)==')

lint: .venv/.ready ## ruff: rules and format
	@$(PYTHON) -m ruff check --quiet .
	@$(PYTHON) -m ruff format --quiet --check .

types: .venv/.ready ## mypy
	@$(PYTHON) -m mypy --no-error-summary

clean: ## remove caches and builds (not .venv, not runs/)
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks build dist
	@find fastgan kernels benchmarks tools tests -name __pycache__ -prune -exec rm -rf {} +

.venv/.ready: pyproject.toml constraints.txt
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
	$(PYTHON) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]' && \
	touch $@

.venv-torch211/.ready: pyproject.toml
	@$(firstword $(PYTHONS)) -m venv .venv-torch211
	@# Triton 3.6's interpreter fails on loops with run-time bounds from numpy 2.4 on.
	@.venv-torch211/bin/python -m pip install -qq --disable-pip-version-check -e '.[vision,test,plot]' \
	    'torch==2.11.*' 'triton==3.6.*' 'numpy<2.4'
	@touch $@

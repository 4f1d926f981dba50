# Everything runs in .venv. `make demo` and `make test` work on a machine with only Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install install-test demo test check bench-smoke docs clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

install-test: .venv/installed-test

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,lint]"
	# Without triton, which it asks for but does not need on a CPU.
	$(BIN)/python -m pip install --quiet --no-deps "xgrammar>=0.2.8,<0.3" "apache-tvm-ffi>=0.1.11"
	@touch $@

demo: install
	$(BIN)/headrace demo

# Fast tests first, slow ones last; tests that start servers have the machine for themselves.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile
test: install-test
	$(BIN)/python -m pytest -q $(PARALLEL) tests/pure
	$(BIN)/python -m pytest -q $(PARALLEL) tests/cpu -m "not slow"
	$(BIN)/python -m pytest -q tests/e2e -m "not slow"
	$(BIN)/python -m pytest -q $(PARALLEL) tests/cpu -m slow
	$(BIN)/python -m pytest -q tests/e2e -m slow

check: install-test
	$(BIN)/ruff check src tests tools
	$(BIN)/ruff format --check src tests tools
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/pure/test_architecture.py tests/pure/test_docs.py

# Shows that the measurements run; the numbers of a busy machine mean nothing.
bench-smoke: install
	$(BIN)/headrace bench startup --runs 1
	$(BIN)/headrace bench control --concurrency 8 --rounds 1

# Regenerates the option and metric tables.
docs: install
	$(BIN)/python tools/make_docs.py

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

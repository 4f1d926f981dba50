# Everything runs in .venv. `make demo` and `make test` work on a machine with only Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin

# Client packages that pin others of .venv live in a venv over it, see tests/sdk.
SDK := .venv-sdk

.PHONY: install install-test demo test test-sdk check bench-smoke docs clean

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
	$(BIN)/python -m pytest -q $(PARALLEL:loadfile=worksteal) tests/cpu -m slow
	$(BIN)/python -m pytest -q tests/e2e -m slow

$(SDK)/installed: .venv/installed-test tests/sdk/requirements.txt tests/sdk/node/package-lock.json
	$(PYTHON) -m venv --without-pip $(SDK)
	$(BIN)/python -c "import sysconfig as s; print(f'import site; site.addsitedir({s.get_path(\"purelib\")!r})')" \
	  > "$$($(SDK)/bin/python -c 'import sysconfig as s; print(s.get_path("purelib"))')/main.pth"
	$(BIN)/python -m pip --python $(SDK)/bin/python install --quiet --no-deps --no-compile \
	  -r tests/sdk/requirements.txt
	PATH="$(CURDIR)/$(SDK)/bin:$$PATH" npm ci --prefix tests/sdk/node --ignore-scripts --no-audit --no-fund --silent
	@touch $@

# Real client packages against a real server: LangChain, LiteLLM, instructor, lm-eval, Node.
test-sdk: $(SDK)/installed
	LITELLM_LOCAL_MODEL_COST_MAP=True $(SDK)/bin/python -m pytest -q -n 2 --dist loadfile tests/sdk

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
	rm -rf .venv $(SDK) tests/sdk/node/node_modules build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Everything runs in .venv. `make demo` and `make test` work on a machine with only Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin

# Client packages that pin others of .venv live in a venv over it, see tests/sdk.
SDK := .venv-sdk

.PHONY: install install-test install-sdk demo test test-sdk check bench-smoke docs clean

install: .venv/installed

.venv/created:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip hatchling
	@touch $@

# With `make -j2` the kernels compile while pip fetches. Without a compiler torch serves.
.venv/kernels: .venv/created hatch_build.py $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)
	$(BIN)/python hatch_build.py || echo "no native kernels: torch will serve"
	@touch $@

.venv/torch: .venv/created constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	@touch $@

.venv/installed: pyproject.toml .venv/torch .venv/kernels
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

install-test: .venv/installed-test

# All that pyproject.toml asks for, and xgrammar without triton, which it does not need on a CPU.
NEEDS := import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  extras = project["optional-dependencies"]; \
  print(*project["dependencies"], *extras["test"], *extras["lint"], sep="\n")
.venv/needs-test: pyproject.toml .venv/torch
	$(BIN)/python -c '$(NEEDS)' | \
	  $(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement /dev/stdin
	$(BIN)/python -m pip install --quiet --no-deps "xgrammar>=0.2.8,<0.3" "apache-tvm-ffi>=0.1.11"
	@touch $@

.venv/installed-test: .venv/needs-test .venv/kernels
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch .venv/installed $@

demo: install
	$(BIN)/headrace demo

# The fastest first. Tests that start servers wait more than they compute: two files at a time, each
# in its order, with servers that its tests share.
PARALLEL := -q --durations 15 -n logical --maxprocesses 4 --dist worksteal
SERVERS := -q --durations 15 -n 2 --dist loadfile --no-loadscope-reorder
test: install-test
	$(BIN)/python -m pytest $(PARALLEL) tests/pure
	$(BIN)/python -m pytest $(PARALLEL) tests/cpu
	$(BIN)/python -m pytest $(SERVERS) tests/e2e

install-sdk: $(SDK)/installed

$(SDK)/installed: .venv/installed-test tests/sdk/requirements.txt tests/sdk/node/package-lock.json
	$(PYTHON) -m venv --without-pip $(SDK)
	$(BIN)/python -c "import sysconfig as s; print(f'import site; site.addsitedir({s.get_path(\"purelib\")!r})')" \
	  > "$$($(SDK)/bin/python -c 'import sysconfig as s; print(s.get_path("purelib"))')/main.pth"
	$(BIN)/python -m pip --python $(SDK)/bin/python install --quiet --no-deps --no-compile \
	  -r tests/sdk/requirements.txt
	PATH="$(CURDIR)/$(SDK)/bin:$$PATH" npm ci --prefix tests/sdk/node --ignore-scripts --no-audit --no-fund --silent
	@touch $@

# Real client packages against a real server: LangChain, LiteLLM, instructor, lm-eval, Node. The
# longest file first.
test-sdk: $(SDK)/installed
	LITELLM_LOCAL_MODEL_COST_MAP=True $(SDK)/bin/python -m pytest $(SERVERS) \
	  tests/sdk/test_openapi.py $(filter-out %_openapi.py,$(wildcard tests/sdk/test_*.py))

# The rules of the house are tests: tests/pure/test_architecture.py, test_docs.py.
check: install-test
	$(BIN)/ruff check src tests tools
	$(BIN)/ruff format --check src tests tools
	$(BIN)/mypy

# Shows that the measurements run; the numbers of a busy machine mean nothing.
bench-smoke: install-test
	$(BIN)/headrace bench startup --runs 1
	$(BIN)/headrace bench control --concurrency 8 --rounds 1

# Regenerates the option and metric tables.
docs: install
	$(BIN)/python tools/make_docs.py

clean:
	rm -rf .venv $(SDK) tests/sdk/node/node_modules build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

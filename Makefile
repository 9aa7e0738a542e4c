# Every target sets up .venv by itself. PYTHON names the interpreter to set it up with (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEV_READY := .venv/.ready-dev
DOCS_READY := .venv/.ready-docs
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup test check check-full demo docs clean

setup: $(DEV_READY)

# torch comes first and by itself, because it is the large one: with the pin in constraints.txt a failure shows
# at once. The pin has no "+cpu": where pip's index or find-links offers the CPU build of that version, that is
# what it gets, as in CI. PyPI's own wheel for Linux is the CUDA build: larger, and just as good here. For the
# CPU build: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup
# --no-compile: Python compiles what it imports when it does, and that is a small part of what is installed.
INSTALL := $(BIN)/python -m pip install -q --no-compile -c constraints.txt
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11: make PYTHON=python3.11 (or newer)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) -e '.[evaluate,certify]'
	touch $@

# Tests and checks need more than what is used.
$(DEV_READY): $(READY)
	$(INSTALL) -e '.[dev]'
	touch $@

# Processes that run tests, a thread each: more threads than cores slow each other down. A module's tests stay together.
WORKERS ?= 2
PYTEST = env OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadscope --no-loadscope-reorder --durations=15

test: $(DEV_READY)
	$(PYTEST) -m "not slow"

check: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

check-full: check
	$(PYTEST)

demo: $(READY)
	$(BIN)/neuraleraser demo

$(DOCS_READY): $(DEV_READY)  # ruff sets signatures
	$(INSTALL) -e '.[docs]'
	touch $@

# Into site/. A warning, such as a link to nowhere, is an error.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# What make itself made. Results (demo/, runs/) stay.
clean:
	rm -rf .venv build dist site .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# make demo      install, then answer a question with the embedded model
# make test      install, then run the tests
# make check     lint and types, of the tests too
# make coverage  the tests again, and which lines of both packages they did not reach
# make bench     the figures in BENCHMARKS.md, against mlx-lm (takes minutes)

# The first Python of at least 3.11; override with `make PYTHON=...`.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
ARGS ?=
PYTEST := pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test coverage check bench clean

demo: .venv/installed
	$(BIN)/olmo3 generate "How many layers does Olmo 3 7B have?" --model demo --temperature 0 < /dev/null

# Bytecode is written even where the environment says not to: tests start some fifty commands.
test coverage: export PYTHONDONTWRITEBYTECODE =

test: .venv/installed-test
	$(BIN)/python -m $(PYTEST) $(ARGS)

coverage: .venv/installed-test
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m $(PYTEST) $(ARGS)
	$(BIN)/python -m coverage combine --quiet
	@rm -f .coverage.*  # cut short by tests that kill a process or fill its disk
	$(BIN)/python -m coverage report --skip-covered

check: .venv/installed-test .venv/installed-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/installed-test
	$(BIN)/python tests/benchmarks/against_mlx_lm.py

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .coverage .coverage.* htmlcov

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "expected Python 3.11 or newer, found none: install one, or make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/installed-%: pyproject.toml .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

# Needs a Python >= 3.11 with venv and sqlite3; PYTHON=/path/to/python names one.
# Every verb makes the .venv it needs; it is refreshed when pyproject.toml or this file changes.

.DEFAULT_GOAL := help
.NOTPARALLEL: # two verbs would install into one .venv at a time
.DELETE_ON_ERROR:
.PHONY: help demo test test-unpinned check bench bench-guard bench-stores bench-tasks bench-workers build clean

VENV := .venv
UNPINNED := .venv-unpinned
PYTHON ?=
PYTEST_ARGS ?=
PYTEST := pytest -n 2 --dist worksteal

CANDIDATES = $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11)

# A candidate is run, not only looked up: version managers leave commands that do not start.
FIND_PYTHON = python=; for candidate in $(CANDIDATES); do \
	if "$$candidate" -c 'import sys, ensurepip, sqlite3, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then python=$$candidate; break; fi; done; \
	if [ -z "$$python" ]; then \
	echo "Ledger needs Python 3.11 or newer with venv and sqlite3; none of these is one: $(CANDIDATES)" >&2; \
	echo "Install it (Debian: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python …" >&2; \
	exit 1; fi

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' \
		| while IFS='|' read -r verb text; do printf '  make %-14s %s\n' "$$verb" "$$text"; done

demo: $(VENV)/.installed-demo ## a payment without and with the guard, both bills side by side
	@$(VENV)/bin/python examples/demo.py

test: $(VENV)/.installed-dev ## all tests, then branch coverage of ledger.py (PYTEST_ARGS=… is passed on)
	@$(VENV)/bin/coverage erase
	$(VENV)/bin/coverage run -m $(PYTEST) $(PYTEST_ARGS)
	@$(VENV)/bin/coverage combine --quiet
	$(VENV)/bin/coverage report

test-unpinned: ## all tests with the newest versions of other people's packages
	@$(FIND_PYTHON); test -x $(UNPINNED)/bin/python || "$$python" -m venv --clear $(UNPINNED)
	@$(UNPINNED)/bin/python -m pip install -qq --upgrade 'pip>=25.1'
	@peers=$$($(UNPINNED)/bin/python -c "$$READ_PEERS") && $(UNPINNED)/bin/python -m pip install -qq \
		--upgrade --upgrade-strategy eager --editable . --group tools $$peers && echo "$$peers" \
		| xargs $(UNPINNED)/bin/python -m pip show 2>/dev/null | grep -E '^(Name|Version)' | paste - -
	$(UNPINNED)/bin/python -m $(PYTEST) $(PYTEST_ARGS)

define READ_PEERS
import tomllib
groups = tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]
pins = [pin for pin in groups["peers"] + groups["demo"] if isinstance(pin, str)]
print(*(pin.partition("==")[0] for pin in pins))
endef
export READ_PEERS

check: $(VENV)/.installed-dev ## lint, format and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

bench: bench-guard bench-tasks bench-workers bench-stores ## all benchmarks, one after the other (BENCH_SHORT=1 for short runs)

bench-guard: $(VENV)/.installed-demo ## the guard: times and ratios to bare sqlite3
	@$(VENV)/bin/python benchmarks/guard.py

bench-stores: $(VENV)/.installed-dev ## the same on PostgreSQL and Redis, as ratios to the bare driver
	@$(VENV)/bin/python benchmarks/stores.py

bench-workers: $(VENV)/.installed-dev ## workers, as ratios to bare statements
	@$(VENV)/bin/python benchmarks/workers.py

bench-tasks: $(VENV)/.installed-dev ## the task ledger, as ratios to bare statements, and how it grows
	@$(VENV)/bin/python benchmarks/tasks.py

build: $(VENV)/.installed-dev ## wheel and sdist into dist/
	@rm -rf dist
	$(VENV)/bin/python -m build

clean: ## remove what the other verbs made (a ledger.db is history, and stays)
	rm -rf $(VENV) $(UNPINNED) build dist .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(FIND_PYTHON); "$$python" -m venv --clear $(VENV)

# pip >= 25.1 knows dependency groups; the one that Python brings may not.
$(VENV)/.installed-%: pyproject.toml Makefile | $(VENV)/bin/python
	@echo "installing what '$*' needs into $(VENV) (once) …"
	@$(VENV)/bin/python -m pip install -qq --upgrade 'pip>=25.1'
	@$(VENV)/bin/python -m pip install -qq --editable . --group $*
	@touch $@

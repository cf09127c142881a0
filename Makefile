# make demo, make test, make check and make docs work on a fresh machine: they create .venv when it is missing or stale.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# Who has nothing left to do takes over tests of another, so that all are busy to the end.
WORKERS := -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test test-all test-plugins check docs linkcheck install clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mopefuse needs Python 3.10 or newer; try make PYTHON=python3.12")'
	@echo "installing mopefuse and its packages into .venv: a few minutes"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/mopefuse demo --overwrite

# Two tiers: test represents every claim (tests/test_claims.py lists them) in minutes, test-all is what CI runs.
test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not process and not matrix and not soak" $(WORKERS)

test-all: $(INSTALLED)
	$(BIN)/python -m pytest $(WORKERS)

test-plugins: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e plugins/mopefuse-audio
	$(BIN)/python -m pytest -o addopts= -q plugins/mopefuse-audio/tests; status=$$?; \
		$(BIN)/python -m pip uninstall --quiet --yes mopefuse-audio && exit $$status

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/mypy

# The site goes to docs/_build/html. Warnings are errors, and so are broken links within the documentation.
docs: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

# Links to other sites; needs a network.
linkcheck: $(INSTALLED)
	DOCS_NOTEBOOK=off $(BIN)/python -m sphinx -W --keep-going -q -b linkcheck docs docs/_build/linkcheck

clean:
	rm -rf .venv build dist demo docs/_build .pytest_cache .mypy_cache .ruff_cache

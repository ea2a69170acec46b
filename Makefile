# Two commands: `make demo` shows the main job on the built-in model, `make test` checks everything.
# Both make .venv first when there is none, and redo the install when pyproject.toml or constraints.txt change.

PYTHON ?= $(firstword $(shell for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name; done) python3)
WORKERS ?= 2
OUT ?= demo-out

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
RUN_STAMP := $(VENV)/.installed-run
TEST_STAMP := $(VENV)/.installed-test

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs unit figures clean

help:
	@echo "make demo     a slice of the study, then the months of the built-in model diagnosed and edited; ends by naming the page"
	@echo "make test     lint, types, floors, docs, tests and doctests"
	@echo "make lint     ruff, mypy and import-linter only"
	@echo "make unit     pytest only"
	@echo "make docs     the site, strictly, into site/"
	@echo "make figures  the pictures of the README and the docs, made anew"
	@echo "make clean    remove what the other targets made"

# A broken or half-made environment has no working pip: it is made anew. The stamp comes last, so that an
# interrupted install runs again.
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "geoedit needs Python 3.11 or newer; '$(PYTHON)' is `$(PYTHON) --version 2>&1`. Try: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
		echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu it comes with: apt-get install python3-venv" >&2; exit 1; }
endef

$(RUN_STAMP): pyproject.toml constraints.txt
	$(environment)
	@echo "installing geoedit into $(VENV) (the first time takes minutes)"
	@$(PIP_INSTALL) -e .
	@touch $@

$(TEST_STAMP): pyproject.toml constraints.txt
	$(environment)
	@echo "installing geoedit and its test tools into $(VENV) (the first time takes minutes)"
	@$(PIP_INSTALL) -e '.[test,docs]'
	@touch $(RUN_STAMP) $@

demo: $(RUN_STAMP)
	@echo "a slice of the study: are edits foreseen on concepts that the odds have not seen? (under a minute)"
	@$(BIN)/python -m experiments.curvature_predicts_editing --small $(OUT)/study
	@$(BIN)/geoedit diagnose --concept months --apply --out $(OUT)

# Every step runs even if an earlier one failed, and pytest comes last, so that its summary is what one reads.
test: $(TEST_STAMP)
	@failed=""; for step in lint docs unit; do $(MAKE) --no-print-directory $$step || failed="$$failed $$step"; done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi

lint: $(TEST_STAMP)
	@failed=""; for tool in "ruff check ." "ruff format --check ." "mypy" "lint-imports"; do \
		echo "$$tool"; $(BIN)/$$tool || failed="$$failed '$$tool'"; done; \
	if [ -n "$$failed" ]; then echo "lint failed:$$failed" >&2; exit 1; fi

docs: $(TEST_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

unit: $(TEST_STAMP)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n $(WORKERS)

figures: $(RUN_STAMP)
	$(BIN)/python -m experiments.figures

clean:
	rm -rf $(VENV) site demo-out build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

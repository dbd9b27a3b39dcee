# SPDX-License-Identifier: Apache-2.0
# Everyday commands. Each installs what it needs and is missing, and says so.

PYTHON ?= python3
BIN := .venv/bin
C_FILES = $(shell git ls-files '*.c' '*.h')
PY_TYPED = nat_control nat_fastpath switch_agent

.PHONY: help build test test-long test-sim test-mutants test-aarch64 soak lint bench bench-full matplotlib peers bench-failover bench-pair fuzz demo clean packages root

help:
	@echo "make build   .venv with the extensions compiled"
	@echo "make demo    a client, the pair and an outside in namespaces, real traffic, one kill"
	@echo "make test    all tests (root)"
	@echo "make test-long     variants that make test leaves out, for they take minutes (root)"
	@echo "make test-sim      the sync protocol between two instances, simulated: 10000 seeds (SEEDS=N)"
	@echo "make test-mutants  bugs planted in the sync protocol, all of which the tests must find"
	@echo "make test-aarch64  the core compiled for aarch64, its tests under qemu-user: a quarter of an hour"
	@echo "make soak    a pair under traffic, one fault after the other (MINUTES=10 SEED=1; root)"
	@echo "make lint    ruff, mypy, clang-format"
	@echo "make bench   every figure of the data plane beside its floor and the peers, in minutes; a report in bench/results (ONLY=micro; root)"
	@echo "make bench-full    the same at all scales, hours; bench-failover: what a failover costs (root)"
	@echo "make bench-pair    every figure of the pair, with a report and plots in build/bench-pair (TRIALS=25, ONLY=kill; root)"
	@echo "make fuzz    fuzzers on packets and on messages of peers and switches (FUZZ_SECONDS=60)"
	@echo "make clean   all that was built"

packages:
	@tools/install-packages.sh

build: packages $(BIN)/.built

# The stamp is older than any source that it was built from, so one rule serves a change in C and in Python.
$(BIN)/.built: setup.py pyproject.toml $(wildcard nat_fastpath/core/*.[ch] nat_fastpath/*.pyx nat_fastpath/*.h nat_fastpath/heartbeat*.c nat_fastpath/memory_holder.c nat_fastpath/dpdk/*.[ch] nat_fastpath/dpdk/build.py bench/pktgen/*.[ch] bench/pktgen/build.py)
	@test -x $(BIN)/python || { echo "tandem-nat: making .venv"; $(PYTHON) -m venv .venv; }
	@echo "tandem-nat: installing into .venv (pip) and compiling"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# Before anything is built: whoever may not run it shall hear so at once.
root:
	@tools/as-root.sh true

# In namespaces, mostly waiting for clocks: three files at a time. Alone: what asks for huge pages, or times the machine itself.
LABS := $(addprefix tests/,netns switch planes)
ALONE := $(addprefix tests/,dpdk host watch netns/test_vhost.py bench/test_io.py)
# A lab counts each lost packet, and its neighbour may have had the CPU for a while: what failed must pass on its own.
AGAIN := { echo "once more, alone: what failed beside others"; tools/as-root.sh $(BIN)/python -m pytest -m "not long" --last-failed --last-failed-no-failures none; }

test: root build
	tools/as-root.sh $(BIN)/python -m pytest -n auto --dist worksteal -m "not long" $(addprefix --ignore=,$(LABS) $(ALONE))
	tools/as-root.sh $(BIN)/python -m pytest -n 3 --dist loadfile -m "not long" $(LABS) $(addprefix --ignore=,$(ALONE)) || $(AGAIN)
	tools/as-root.sh $(BIN)/python -m pytest -m "not long" $(ALONE) || $(AGAIN)

# What `make test` leaves out: variants that take their time
test-long: root build
	tools/as-root.sh $(BIN)/python -m pytest -m long

SEEDS ?= 10000
test-sim: build
	$(BIN)/python -m tests.sim 1 $(SEEDS)

test-mutants: build
	$(BIN)/python -m tests.sim.mutants

test-aarch64: build
	tools/test-aarch64.sh

# One fault after the other under traffic, in random order: a pair of tests/soak
MINUTES ?= 10
SEED ?= 1
soak: root build
	tools/as-root.sh $(BIN)/python -m tests.soak --minutes $(MINUTES) --seed $(SEED)

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PY_TYPED)
	clang-format --dry-run -Werror $(C_FILES)

matplotlib: build
	@$(BIN)/python -c "import matplotlib" 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'

# NATs to measure beside ours, and what counts instructions
peers:
	@tools/install-packages.sh nftables valgrind

# docs/performance.md tells what is measured and how; ONLY chooses parts
bench: root matplotlib peers
	tools/as-root.sh $(BIN)/python -m bench suite $(if $(ONLY),--only $(ONLY))

bench-full: root matplotlib peers
	tools/as-root.sh $(BIN)/python -m bench suite --scale full $(if $(ONLY),--only $(ONLY))

# 25 trials of each kind of kill, ten of the other ends, and new flows in the three modes: half an hour, on a quiet machine
bench-failover: root build
	tools/as-root.sh $(BIN)/python -m bench failover --all
	tools/as-root.sh $(BIN)/python -m bench newflow

# All figures of the pair: an hour, on a quiet machine, ten minutes of it for false deaths; ONLY chooses by a word of their names
TRIALS ?= 25
bench-pair: root matplotlib
	tools/as-root.sh $(BIN)/python -m bench pair --trials $(TRIALS) $(if $(ONLY),--only $(ONLY))

FUZZ_SECONDS ?= 60
fuzz: build
	$(MAKE) -C tests/fuzz run SECONDS=$(FUZZ_SECONDS)

demo: root build
	tools/as-root.sh $(BIN)/tandem-nat demo

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f nat_fastpath/*.so nat_fastpath/engine.c nat_fastpath/watch.c nat_fastpath/dpdk/*.so nat_fastpath/dpdk/_dpdk.c bench/pktgen/_pktgen.c bench/pktgen/*.so
	$(MAKE) -C tests/fuzz clean
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

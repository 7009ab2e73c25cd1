# gs_pitr: what a developer and a curious visitor need. `make help` lists it.
SHELL := /bin/bash
.DEFAULT_GOAL := help
CARGO ?= cargo
CARGO_FLAGS ?= --locked
SETUP := ./.ci/setup
# Where `make test-full` puts other PostgreSQL versions and versitygw: readable for the user databases run as.
MAJORS ?= /var/tmp/gs_pitr-majors
# How many points `make soak` makes, and what its clients' choices follow from (empty: anew).
ROUNDS ?= 1000
SEED ?=

.PHONY: help setup build test test-full soak demo cluster cluster-down bench lint docs

help: ## list what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## install what demo and tests need, by apt (as root or with sudo); says what
	@$(SETUP)

build: ## build the programs as users run them (release)
	$(CARGO) build $(CARGO_FLAGS) --release -p gs_pitr -p pitr-agent

test: setup ## all tests that CI runs
	$(CARGO) build $(CARGO_FLAGS) --workspace --bins
	$(CARGO) test $(CARGO_FLAGS) --workspace

test-full: setup ## the slow matrices too; their last result stands in docs/TESTING.md
	$(CARGO) build $(CARGO_FLAGS) --workspace --bins
	GS_PITR_TEST_PG_BINDIRS="$$(./.ci/setup-majors $(MAJORS))" GS_PITR_TEST_VERSITYGW="$$(./.ci/setup-versitygw $(MAJORS)/bin)" $(CARGO) test $(CARGO_FLAGS) --workspace

soak: setup ## ROUNDS=1000 points under bank transfers, all recovered to and compared; SEED=S repeats a run
	$(CARGO) build $(CARGO_FLAGS) --workspace --bins
	BANK_ROUNDS=$(ROUNDS) BANK_SEED=$(SEED) $(CARGO) test $(CARGO_FLAGS) --workspace --test bank every_point -- --nocapture

demo: setup ## a cluster as below, one backup, a point, all of it destroyed, and back from the bucket alone
	$(CARGO) build $(CARGO_FLAGS) --workspace --bins
	./target/debug/demo

cluster: setup ## a sharded cluster on loopback with proxies and a load, to try; prints what to type
	$(CARGO) build $(CARGO_FLAGS) --workspace --bins
	./target/debug/cluster up

cluster-down: ## end what make cluster started
	./target/debug/cluster down

bench: setup ## speed and memory against limits and peers, in one run
	$(CARGO) build $(CARGO_FLAGS) --release --workspace --bins
	./target/release/bench-pipeline
	./target/release/bench-node
	./target/release/bench-lock
	$(CARGO) bench $(CARGO_FLAGS) --workspace --bench mount

lint: ## what CI denies
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(CARGO_FLAGS) --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc $(CARGO_FLAGS) --workspace --no-deps
	$(CARGO) deny check bans licenses sources

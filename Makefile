# The few commands of this repository; `make help` lists them.  Settings: PYTHON, FLAVOUR (cpu or gpu), CONFIG.
SHELL := /bin/sh
CONFIG ?= configs/demo.yaml
FLAVOUR ?=
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install serve stop status test test-chaos test-cluster test-dashboards test-hostile test-scaling test-vllm lint lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s%s\n", $$1, $$2}' Makefile

install: ## Make .venv, or bring it up to date (FLAVOUR=gpu for CUDA; PYTHON=python3.12 to choose the Python)
	@python=$$(PYTHON="$(PYTHON)" sh scripts/find-python.sh) && \
	"$$python" scripts/install.py $(if $(FLAVOUR),--flavour $(FLAVOUR))

serve: install ## Serve CONFIG (configs/demo.yaml) on this machine and print an example request
	@$(BIN)/jenga serve $(CONFIG)

stop: ## Stop what `make serve` started
	@if [ -x $(BIN)/jenga ]; then $(BIN)/jenga stop; else echo "nothing is installed, so nothing runs"; fi

# Exit status 3 says that nothing runs, which is an answer and no error of make's.
status: ## Show replicas, health and addresses of what runs
	@if [ -x $(BIN)/jenga ]; then $(BIN)/jenga status || [ $$? -eq 3 ]; else echo "nothing is installed, so nothing runs"; fi

test: install ## Run the whole test suite, ruff and mypy included
	@$(BIN)/python -m pytest

test-vllm: install ## Run vLLM's own tests of cache and scheduler with Jenga, beside stock (network; TESTS=files, LIST=check)
	@$(BIN)/python scripts/test_vllm.py $(if $(filter check,$(LIST)),--check-list) $(TESTS)

test-hostile: install ## Ten thousand abused requests to two engines, and what a well-behaved client notices (10 minutes)
	@$(BIN)/python -m benchmarks.hostile --json results/hostile.json

test-dashboards: install ## Dashboards and alerts on real engines and a real Prometheus (15 minutes; PICTURES=docs/img keeps the pictures)
	@JENGA_PICTURES="$(PICTURES)" $(BIN)/python -m pytest -s tests/dashboards/test_*.py tests/dashboards/live/proof.py

test-cluster: install ## A real `ray up` on hosts made of namespaces, and one at a fake AWS (root, SSH server; 5 minutes)
	@$(BIN)/python tests/cluster/live/run.py

test-scaling: install ## Replicas that come and go with demand, on real engines: 1, 2, 1 (5 minutes)
	@$(BIN)/python -m benchmarks.scaling --small --check

test-chaos: install ## Break that cluster in eight ways under load; prints what became of each request (20 minutes; KINDS=words)
	@JENGA_CHAOS="$(KINDS)" $(BIN)/python tests/cluster/live/run.py tests/cluster/live/chaos.py

lint: install ## Run ruff and mypy only
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

lock: ## Pin the packages anew in requirements/ (UPGRADE=1 also takes newer versions)
	@python=$$(PYTHON="$(PYTHON)" sh scripts/find-python.sh) && "$$python" scripts/lock.py $(if $(UPGRADE),--upgrade)

clean: stop ## Stop what runs, then remove .venv and caches (var/ with models and logs stays)
	@rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache

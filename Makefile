# make up      serve everything on this machine, with one model that answers
# make test    run the tests
# make help    the rest

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PROTO  := .venv-proto
# Versions that were run together. TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu keeps CUDA packages out where PyPI's
# default torch brings them.
PIP    := $(BIN)/python -m pip --disable-pip-version-check -qq install -c constraints.txt $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))
UP     ?=

.PHONY: help setup up test check format e2e bench faults sim proto clean

help:
	@echo 'make up       set up .venv and serve: etcd, coordinator, deployment manager, metrics, engine, gateway (UP="--port 9000" for flags)'
	@echo 'make test     set up .venv and run the tests'
	@echo 'make check    lint, types, import rules, contracts'
	@echo 'make e2e      end-to-end tests, the long ones too'
	@echo 'make bench    CPU-microseconds of the gateway per chunk and per request'
	@echo 'make faults   kill, freeze and cut off every part under load; count every token'
	@echo 'make sim      the control plane with 1,000 engines and 2,000 deployments, in virtual time'
	@echo 'make proto    generate the stubs anew'
	@echo 'make setup    set up .venv for development; make clean removes what was set up'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	@echo "setting up $(VENV) …"
	@$(PYTHON) -m venv $(VENV)

# What serving needs.
$(VENV)/.run: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing what serving needs (a minute, once) …"
	@$(PIP) -e '.[torch,embedded]'
	@touch $@

# What developing needs besides.
$(VENV)/.dev: $(VENV)/.run
	@echo "installing what the tests need …"
	@$(PIP) -e '.[torch,embedded,dev]'
	@touch $@

# The code generators pin an older protobuf, so they live apart.
$(PROTO)/.done:
	@$(PYTHON) -m venv $(PROTO)
	@$(PROTO)/bin/python -m pip --disable-pip-version-check -qq install grpcio-tools==1.80.0 buf-bin==1.75.0
	@touch $@

setup: $(VENV)/.dev

up: $(VENV)/.run
	@exec $(BIN)/inferctl up $(UP)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m 'not slow'

e2e: $(VENV)/.dev
	$(BIN)/python -m pytest tests/e2e

check: $(VENV)/.dev $(PROTO)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy libs services tests bench tools
	PATH=$(CURDIR)/$(PROTO)/bin:$$PATH $(BIN)/python tools/check_protos.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix -q .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python -m bench.gateway

faults: $(VENV)/.dev
	$(BIN)/python -m bench.faults

sim: $(VENV)/.dev
	$(BIN)/python -m bench.sim

proto: $(PROTO)/.done
	PATH=$(CURDIR)/$(PROTO)/bin:$$PATH buf generate

clean:
	rm -rf $(VENV) $(PROTO) .mypy_cache .ruff_cache .pytest_cache .hypothesis bench/out

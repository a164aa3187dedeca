# Everything starts here: `make help`. All of it sets itself up first, into .venv and the user's cache; what is done is not done again.
# ARGS are passed on: make demo ARGS="--payments 20", make test ARGS="-m unit".

PYTHON ?= python3.12 python3.11 python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PREPARED := $(VENV)/.prepared
ARGS ?=

# The first of PYTHON that is 3.11 or 3.12 and can make virtual environments.
usable = import sys, ensurepip, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
python = $(shell for python in $(PYTHON); do "$$python" -c '$(usable)' >/dev/null 2>&1 && echo "$$python" && break; done)
no_python = Paystream needs Python 3.11 or 3.12 with its venv module, and found neither as $(PYTHON). Install one \
(Debian, Ubuntu: apt install python3.12 python3.12-venv; macOS: brew install python@3.12), or say where it is: make PYTHON=/path/to/python3.12

.PHONY: help setup demo test check bench up down
.DEFAULT_GOAL := help

help: ## Show this
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

demo: setup ## Run payments through the whole pipeline and check its promises
	@$(BIN)/paystream demo $(ARGS)

test: check ## Check, then run all tests on a real Kafka, Postgres and Redis
	@$(BIN)/python -m pytest $(ARGS)

up: setup ## Start the local stack and leave it running
	@$(BIN)/paystream up --detach $(ARGS)

down: setup ## Stop it. Its data stays
	@$(BIN)/paystream down $(ARGS)

check: setup ## Lint, format, types, and what may import what
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: setup ## Measure it: latency, payments per second, CPU and memory
	@$(BIN)/paystream bench $(ARGS)

setup: $(PREPARED) ## Only the set-up that all of these do first
	@:

$(PREPARED): $(INSTALLED) infra/local/artifacts.lock
	@echo "set-up 2/2: Kafka and the schema registry" >&2
	@$(BIN)/python -m infra.local.prepare
	@touch $@

$(INSTALLED): requirements.lock pyproject.toml
	@$(if $(python),,$(error $(no_python)))echo "set-up 1/2: Python packages into $(VENV), with $(python)" >&2
	@"$(python)" -m venv $(VENV)
	@$(BIN)/python -m pip install --require-hashes -r requirements.lock >&2
	@$(BIN)/python -m pip install --no-deps --no-build-isolation --quiet --editable . >&2
	@touch $@

# edgezmq. `make help` lists what there is. Needs python3 (3.11 or newer) with venv, and nothing else.
#
#   make demo                    the demonstration: MQTT → node → cloud and back, with two kills
#   make demo LINK=quic          the same over QUIC instead of a websocket
#   make test ARGS="-k routing"  ARGS goes to the command behind the target

PYTHON ?= python3
VENV ?= .venv
AMQTT_VENV ?= .venv-amqtt
ARGS ?=
LINK ?=
# One more than there are processors.
TEST_WORKERS ?= $(shell expr $$(nproc 2>/dev/null || echo 2) + 1)

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet

# The demo's node lives here, not in the user's own state directory.
STATE := $(CURDIR)/.state
DEMO_ARGS = $(if $(LINK),--link $(LINK)) $(ARGS)

# A real broker where there is one (Debian keeps mosquitto in sbin, which is not in everybody's PATH).
MOSQUITTO := $(shell PATH="$$PATH:/usr/sbin:/usr/local/sbin" command -v mosquitto)
MQTT_BROKER := $(if $(MOSQUITTO),,amqtt)

.DEFAULT_GOAL := help
.PHONY: help venv amqtt demo up down status test examples lint types soak fuzz chaos bench bench-peers clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- environment --------------------------------------------------------------------------------------

venv: $(VENV)/.stamp-dev ## Create the virtual environment with everything, also for tests

# A stamp is as new as the last installation: the second `make` costs nothing.
$(VENV)/.stamp-run: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "edgezmq needs Python 3.11 or newer as '$(PYTHON)'. Debian, Ubuntu: sudo apt-get install -y python3 python3-venv"; \
	  echo "Another interpreter: make PYTHON=/path/to/python3.12 ..."; exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "Python's venv is missing. Debian, Ubuntu: sudo apt-get install -y python3-venv"; exit 1; } >&2
	@echo "installing into $(VENV) (once; a minute)"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install -r requirements.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@$(PY) -m compileall -q runtime modules cloudsim demo || true # less memory and a quicker start of each process
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-run requirements-dev.txt
	@$(PIP) install -r requirements-dev.txt
	@touch $@

# atheris has wheels for some Pythons and machines only: beside what everybody needs.
$(VENV)/.stamp-fuzz: $(VENV)/.stamp-dev requirements-fuzz.txt
	@$(PIP) install --only-binary :all: -r requirements-fuzz.txt
	@touch $@

# amqtt pins an older websockets than ours: an environment of its own, and only where no mosquitto is found.
amqtt: $(AMQTT_VENV)/.stamp ## Install amqtt, the MQTT broker for trying out where there is no mosquitto

$(AMQTT_VENV)/.stamp: requirements-amqtt.txt
	@echo "installing amqtt into $(AMQTT_VENV) (once)"
	@$(AMQTT_VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(AMQTT_VENV)
	@$(AMQTT_VENV)/bin/python -m pip --disable-pip-version-check --quiet install -r requirements-amqtt.txt
	@touch $@

# --- run ----------------------------------------------------------------------------------------------

demo: $(VENV)/.stamp-run $(MQTT_BROKER) ## The demonstration; exit status 0 only if nothing was lost
	@$(PY) -m demo $(DEMO_ARGS)

up: $(VENV)/.stamp-run $(MQTT_BROKER) ## Keep such a node running to play with; Ctrl-C ends it
	@$(PY) -m demo --keep $(DEMO_ARGS)

down: $(VENV)/.stamp-run ## End a node that is still running in .state
	@EDGEZMQ_HOME="$${EDGEZMQ_HOME:-$(STATE)}" $(VENV)/bin/edgezmq down $(ARGS)

status: $(VENV)/.stamp-run ## What the node in .state does
	@EDGEZMQ_HOME="$${EDGEZMQ_HOME:-$(STATE)}" $(VENV)/bin/edgezmq status $(ARGS)

# --- check --------------------------------------------------------------------------------------------

# Side by side: most tests wait for most of their time. The stretch is for the deadlines of waits only.
test: $(VENV)/.stamp-dev ## All tests, side by side; ARGS="-k routing", ARGS="-n 0" for one after the other
	@EDGEZMQ_TEST_STRETCH=$${EDGEZMQ_TEST_STRETCH:-2} $(PY) -m pytest -n $(TEST_WORKERS) --dist loadscope $(ARGS)

examples: $(VENV)/.stamp-run ## Build the modules in other languages and test them; ARGS="go c"
	@$(PY) examples/run.py $(ARGS)

lint: $(VENV)/.stamp-dev ## ruff: style and common faults
	@$(PY) -m ruff check . $(ARGS)
	@$(PY) -m ruff format --check --config 'format.exclude = ["*.md"]' .

types: $(VENV)/.stamp-dev ## mypy --strict
	@$(PY) -m mypy $(ARGS)

soak: $(VENV)/.stamp-dev ## Random schedules against the bus's cores, without end or as ARGS says
	@$(PY) -m tests.soak $(ARGS)

fuzz: $(VENV)/.stamp-fuzz ## Feed every decoder of outside bytes with nonsense for 2 min; ARGS="--seconds N"
	@$(PY) -m fuzz $(ARGS)

chaos: $(VENV)/.stamp-dev ## Break a loaded node in every way, count what is lost (25 min); ARGS="--json FILE"
	@$(PY) -m chaos $(ARGS)

bench: $(VENV)/.stamp-dev ## Speed and memory beside the peers; ARGS="--json FILE"
	@$(PY) -m bench $(ARGS)

bench-peers: $(VENV)/.stamp-dev ## Install what `make bench` compares with
	@bench/install-peers $(abspath $(PY))

clean: ## Remove the environments and what tools left behind; keeps .state
	@rm -rf $(VENV) $(AMQTT_VENV) .go .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info

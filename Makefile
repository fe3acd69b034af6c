# From nothing to a running server: `make serve`. From nothing to a tested one: `make test`. Needs Python 3.11+ and make.

PYTHON ?= python3
BIN := .venv/bin
MODEL := LLM/HuggingFaceTB/SmolLM2-135M-Instruct/config.json
GEMMA := LLM/google/gemma-3-270m/gemma-3-270m-q4_k_m.gguf
AUTOBAHN := build/autobahn
NODE_PACKAGES := tests/web/node_modules/.package-lock.json
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Where nothing can be reached it gives up soon.
APT := timeout 600 apt-get --yes -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 -o Acquire::Retries=1

# The Autobahn testsuite is a Python 2.7 program. pyenv's launchers find one only where it is chosen, so pyenv is asked first.
PYTHON2 ?= $(or $(wildcard $(shell pyenv prefix 2.7 2>/dev/null)/bin/python2.7),$(shell command -v python2.7 2>/dev/null))

.PHONY: help serve install test packages fuzz torture autobahn bench check format clean

help:
	@echo "make serve    install what is missing, then serve the default model on port 41443"
	@echo "make install  make .venv with the wsserver command in it, and put the default model into LLM/"
	@echo "make test     run all tests; puts Gemma 3 270M into LLM/ too, 0.3 GB, and Chromium and Mosquitto onto a Debian"
	@echo "make fuzz     say a million random and mutated messages to the server's parts; takes some minutes"
	@echo "make torture  run the tests that take many minutes"
	@echo "make autobahn run the Autobahn testsuite against the server, and beside it the bare library; needs Python 2.7"
	@echo "make bench    measure the server beside its peers; ARGS=--quick only tries"
	@echo "make check    check format, style, types, and for what is known to be unsafe"
	@echo "make format   format the code"
	@echo "make clean    remove .venv, the default model and Gemma"

serve: install
	$(BIN)/wsserver

install: .venv/installed $(MODEL)

test: .venv/installed-dev $(MODEL) $(GEMMA) $(NODE_PACKAGES) packages
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

fuzz: .venv/installed-dev
	$(BIN)/python -m tests.fuzz $(ARGS)

torture: .venv/installed-dev $(MODEL)
	$(BIN)/python -m pytest -m torture -o faulthandler_timeout=0

autobahn: .venv/installed-dev $(AUTOBAHN)/installed
	$(BIN)/python -m tests.autobahn $(AUTOBAHN)/bin/wstest

bench: .venv/installed-bench $(MODEL)
	$(BIN)/python -m bench $(ARGS)

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive wsserver wsserver_mqtt handlers LLM

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv $(AUTOBAHN) tests/web/node_modules LLM/.partial $(dir $(MODEL)) $(dir $(GEMMA))

# The stamps are written last, so that an interrupted install is done again.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer: make PYTHON=python3.12")'
	@echo "making .venv; this takes a few minutes once"
	$(PYTHON) -m venv .venv
	$(PIP) --editable ".[mqtt]"
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --editable ".[dev]"
	touch $@

# llama.cpp is compiled for a quarter of an hour; where it cannot be, the table says so.
.venv/installed-bench: .venv/installed-dev
	$(PIP) --editable ".[dev,bench]"
	-$(PIP) llama-cpp-python
	touch $@

# For the tests of what runs in a browser. What cannot be installed here keeps no test from running but those that need it, which
# are skipped and say so.
$(NODE_PACKAGES): tests/web/package-lock.json
	@npm ci --prefix tests/web --no-audit --no-fund --silent --fetch-retries 1 --fetch-timeout 60000 \
		|| echo "npm has not installed what some tests of client.js and the chat page need; those are skipped"

packages:
	@PATH="$$PATH:/usr/sbin"; missing=""; \
	command -v chromium >/dev/null || missing="chromium fonts-liberation"; \
	command -v mosquitto >/dev/null && command -v mosquitto_pub >/dev/null || missing="$$missing mosquitto mosquitto-clients"; \
	test -z "$$missing" || { echo "installing $$missing for the tests" \
	&& command -v apt-get >/dev/null && test "$$(id -u)" = 0 && export RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
	&& { $(APT) update && $(APT) install --no-install-recommends $$missing; } >/dev/null 2>&1; } \
	|| echo "it could not be installed; the tests that need it are skipped"

# The last virtualenv that makes environments of Python 2.7.
$(AUTOBAHN)/installed: | .venv/installed-dev
	@test -n "$(PYTHON2)" || { echo "make autobahn needs Python 2.7: make autobahn PYTHON2=/path/to/python2.7"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(AUTOBAHN)/virtualenv virtualenv==20.21.1
	PYTHONPATH=$(AUTOBAHN)/virtualenv $(BIN)/python -m virtualenv --quiet --python $(PYTHON2) $(AUTOBAHN)
	$(AUTOBAHN)/bin/pip install --quiet --disable-pip-version-check autobahntestsuite==25.10.1
	touch $@

$(MODEL): | .venv/installed
	$(BIN)/python -m LLM.default_model

# Never beside the default model's: both use one work folder.
$(GEMMA): | .venv/installed $(MODEL)
	$(BIN)/python -m LLM.default_model google/gemma-3-270m

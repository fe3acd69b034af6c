# From nothing to a running server: `make serve`. From nothing to a tested one: `make test`. Needs Python 3.11+ and make.

PYTHON ?= python3
BIN := .venv/bin
MODEL := LLM/HuggingFaceTB/SmolLM2-135M-Instruct/config.json
GEMMA := LLM/google/gemma-3-270m/gemma-3-270m-q4_k_m.gguf
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help serve install test torture bench check format clean

help:
	@echo "make serve    install what is missing, then serve the default model on port 41443"
	@echo "make install  make .venv with the wsserver command in it, and put the default model into LLM/"
	@echo "make test     run all tests; puts Gemma 3 270M into LLM/ too, 0.3 GB"
	@echo "make torture  run the tests that take many minutes"
	@echo "make bench    measure the server beside its peers; ARGS=--quick only tries"
	@echo "make check    check format, style and types"
	@echo "make format   format the code"
	@echo "make clean    remove .venv, the default model and Gemma"

serve: install
	$(BIN)/wsserver

install: .venv/installed $(MODEL)

test: .venv/installed-dev $(MODEL) $(GEMMA)
	$(BIN)/python -m pytest

torture: .venv/installed-dev $(MODEL)
	$(BIN)/python -m pytest -m torture

bench: .venv/installed-bench $(MODEL)
	$(BIN)/python -m bench $(ARGS)

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv LLM/.partial $(dir $(MODEL)) $(dir $(GEMMA))

# The stamps are written last, so that an interrupted install is done again.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer: make PYTHON=python3.12")'
	@echo "making .venv; this takes a few minutes once"
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --editable ".[dev]"
	touch $@

# llama.cpp is compiled for a quarter of an hour; where it cannot be, the table says so.
.venv/installed-bench: .venv/installed-dev
	$(PIP) --editable ".[dev,bench]"
	-$(PIP) llama-cpp-python
	touch $@

$(MODEL): | .venv/installed
	$(BIN)/python -m LLM.default_model

# Never beside the default model's: both use one work folder.
$(GEMMA): | .venv/installed $(MODEL)
	$(BIN)/python -m LLM.default_model google/gemma-3-270m

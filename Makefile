# Two commands set up everything: `make demo` and `make test`. Both create .venv by themselves.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-all docs lint clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/undertow compare recipes/demo.yaml

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(READY)
	$(BIN)/python -m pytest -n 2

docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs

lint: $(READY)
	$(BIN)/ruff check src tests benchmarks comparisons docs examples
	$(BIN)/ruff format --check src tests benchmarks comparisons docs examples
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build dist src/*.egg-info

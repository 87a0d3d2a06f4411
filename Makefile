# Two commands set up everything: `make demo` and `make test`. Both create .venv by themselves.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-fast test-all test-newest test-oldest docs lint clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/undertow compare recipes/demo.yaml

# One process a core, at most eight; JOBS=2 says otherwise. Each takes whole stretches of files, and who is done first
# takes over from another: what the tests of a file share is made once or twice.
JOBS   ?= logical
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal

# Every room in a minute: the matrix on one family, the references, decoding; a run trained, resumed and asked; a server.
FAST := tests/test_house.py tests/test_portable.py tests/test_imports.py tests/test_matrix.py \
	tests/core/test_planted.py tests/core/test_mixers.py tests/core/test_plan_and_edges.py tests/core/test_model.py \
	tests/core/test_generation.py tests/core/test_decode.py tests/core/test_agree.py tests/backbone/test_contract.py \
	tests/data/test_packing.py tests/data/test_examples.py tests/tasks/test_generators.py tests/test_recipe.py \
	tests/training/test_run.py::test_resume_is_bit_for_bit tests/training/test_verbs.py::test_train_eval_generate \
	tests/evaluation/test_buckets.py tests/evaluation/test_lengths.py tests/analysis/test_reading.py \
	tests/analysis/test_lens.py tests/analysis/test_drawing.py tests/cli/test_cli.py tests/test_convert_lrt.py \
	tests/trm/test_trm_network.py tests/trm/test_trm_steps.py tests/serve/test_api.py::test_chat

test: $(READY)
	$(PYTEST) -m "not slow"

test-fast: $(READY)
	$(PYTEST) -m "not slow" -k "not test_matrix or gpt2" $(FAST)

test-all: $(READY)
	$(PYTEST)

# What users get: pip's own choice today, and the oldest that pyproject.toml declares. Both are environments of their
# own, with the package's dependencies alone; only torch is held, to the CPU build. They run the README's five lines,
# the command line, both names of a cache, imports in two orders, and the matrix on one family.
VERSIONS := tests/test_versions.py tests/test_matrix.py tests/core/test_model.py tests/core/test_cache_names.py \
	tests/test_imports.py tests/test_readme.py::test_python_blocks_run \
	tests/training/test_verbs.py::test_train_eval_generate -m "not slow" -k "not test_matrix or gpt2"

.venv-%/.ready: pyproject.toml constraints-torch.txt constraints-oldest.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check --upgrade \
		-c $(if $(filter oldest,$*),constraints-oldest.txt,constraints-torch.txt) -e . pytest pytest-xdist psutil hypothesis
	touch $@

test-newest test-oldest: test-%: .venv-%/.ready
	.venv-$*/bin/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal $(VERSIONS)

.PRECIOUS: .venv-%/.ready

docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs

lint: $(READY)
	$(BIN)/ruff check src tests benchmarks comparisons docs examples
	$(BIN)/ruff format --check src tests benchmarks comparisons docs examples
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest runs build dist src/*.egg-info

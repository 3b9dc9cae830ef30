# Needs Python ≥ 3.11 and make. Each target makes .venv when it is not there and installs what is missing.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint gpu-check clean

demo: $(INSTALLED)
	$(VENV)/bin/litdeploy demo

# Two processes of one thread each: two of two threads would take turns on two cores. They get the files in the order in
# which tests/conftest.py puts them, the long ones first.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python -m tests.house

# On a machine with a GPU, with the Python that has torch for it: make gpu-check GPU_PYTHON=python3
GPU_PYTHON ?= $(PYTHON)
gpu-check:
	$(GPU_PYTHON) -m benchmarks.gpu_check $(if $(DATA),--data $(DATA)) $(if $(TEACHER),--teacher $(TEACHER)) \
		$(if $(OUT),--out $(OUT)) $(GPU_CHECK)

clean:
	rm -rf $(VENV) deploy demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(INSTALLED): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@

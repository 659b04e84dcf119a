PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: help demo demo-full test test-lowest lint docs bench clean

help:
	@echo "make demo       install, prepare data and LLM, cache, evaluate, fine-tune, compare"
	@echo "make demo-full  the same with all layers and long histories (wants a GPU)"
	@echo "make test       install, lint, type-check and run the whole test suite"
	@echo "make test-lowest  the central tests on the lowest versions that the requirements allow"
	@echo "make bench      measure HSFT against the usual way (about an hour on two cores)"
	@echo "make lint       ruff and mypy only"
	@echo "make docs       build the documentation site into site/, warnings as errors"
	@echo "make clean      remove the virtual environment, caches and demo runs"

demo: $(VENV)/demo.stamp
	$(PY) demo/run.py

demo-full: $(VENV)/demo.stamp
	$(PY) demo/run.py --full

test: lint docs
	$(PY) demo/prepare_data.py
	$(PY) demo/prepare_llm.py
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile

# The parts of the suite that meet the most of the dependencies, on their lowest versions.
LOWEST_TESTS := $(addprefix tests/, test_api.py run/test_cli.py model/test_user_llm.py encoding/test_item_llm.py hub/test_import.py hub/test_repository.py trainer/test_resume.py evaluator/test_evaluator.py \
	data/test_data.py model/test_losses.py report/test_memory.py data/test_bad_csv.py model/test_bad_models.py data/test_fast_data.py data/test_foreign_caches.py config/test_completion.py \
	trainer/test_mlflow_log.py trainer/test_wandb_log.py finished/test_sweep.py finished/test_serve.py)

test-lowest: .venv-lowest/stamp
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(LOWEST_TESTS)

.venv-lowest/stamp: requirements-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --disable-pip-version-check -q -r requirements-lowest.txt
	touch $@

bench: $(VENV)/dev.stamp
	$(PY) demo/prepare_data.py
	$(PY) demo/prepare_llm.py
	$(PY) benchmarks/run.py
	$(PY) benchmarks/packing.py
	$(PY) benchmarks/softmax_memory.py --positions 64 --budget_mb 64

lint: $(VENV)/dev.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

$(PY):
	$(PYTHON) -m venv $(VENV)

# An editable install: the `hsft` command of the environment runs the code of this folder.
$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(PY)
	@echo "installing into $(VENV): some minutes, 1.7 GB with torch for the CPU, several times that with CUDA"
	$(PY) -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[demo,serve]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(PY)
	@echo "installing into $(VENV): some minutes, 1.7 GB with torch for the CPU, several times that with CUDA"
	$(PY) -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf site build dist code/hsft.egg-info $(VENV) .venv-lowest .pytest_cache .mypy_cache .ruff_cache .hypothesis .demo runs/demo

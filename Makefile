# make demo: installs into .venv, trains a small model and writes a report.  make test: everything that CI runs.
# make soak: long versions of the resilience tests; resumable, results in soak.json.
# TORCH_INDEX: URL of an index with CPU builds of torch, for use where pip's index has CUDA builds only.
TORCH_INDEX ?=
PYTHON ?= python3
PIP = .venv/bin/pip install --quiet --disable-pip-version-check \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
SOURCES = clipwright/*.py pipeline data_prep eval tests
export DS_BUILD_OPS = 0
# Set as an environment variable, not with -c, so that it also applies to build dependencies.
export PIP_CONSTRAINT = $(CURDIR)/constraints/cpu.txt
export DS_ACCELERATOR = cpu

.PHONY: demo test lint soak clean

demo: .venv/installed
	.venv/bin/clipwright demo

test: .venv/installed-dev lint
	OMP_NUM_THREADS=1 .venv/bin/pytest

soak: .venv/installed-dev
	.venv/bin/python tests/soak.py

lint: .venv/installed-dev
	.venv/bin/ruff check $(SOURCES)
	.venv/bin/ruff format --check $(SOURCES)
	.venv/bin/pyright
	.venv/bin/lint-imports

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints/cpu.txt | .venv/bin/python
	$(PIP) -e '.[cpu]'
	touch $@

.venv/installed-dev: pyproject.toml constraints/cpu.txt | .venv/bin/python
	$(PIP) -e '.[cpu,dev]'
	touch $@ .venv/installed

clean:
	rm -rf demo build dist

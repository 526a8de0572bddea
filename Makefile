# Everything a newcomer runs. `make demo` and `make test` need Python >= 3.11, make and a package index.
PYTHON ?= python3
VENV := .venv
# Windows has the environment's programs in another folder.
RUN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)

.PHONY: demo test install check clean

demo: $(VENV)/.package
	$(RUN)/beit3 demo

# Two processes of one thread each: the tests' networks are too small to share a thread.
test: install
	OMP_NUM_THREADS=1 $(RUN)/pytest --numprocesses 2 --dist loadfile

install: $(VENV)/.development

check: install
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/codespell
	$(RUN)/mypy

$(RUN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.package: pyproject.toml | $(RUN)/python
	$(RUN)/pip install --quiet --editable '.[dense]'
	touch $@

$(VENV)/.development: pyproject.toml | $(RUN)/python
	$(RUN)/pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.package

clean:
	rm -rf $(VENV) build dist src/*.egg-info

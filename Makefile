# Everything a newcomer runs. `make demo` and `make test` need Python >= 3.11, make and a package index.
PYTHON ?= python3
VENV := .venv
# Windows has the environment's programs in another folder.
RUN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)

.PHONY: demo test install check weights picture clean

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

# The weights that ship (src/beit3/shipped), anew: about a quarter of an hour on two free cores.
# README.md beside them has the steps and the scores.
weights: install
	OMP_NUM_THREADS=1 $(RUN)/python -m beit3.demo.shipping

# The picture of README.md, of the page with these weights. Chromium is a package of the system.
picture: install
	$(RUN)/python docs/images/page.py

$(RUN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.package: pyproject.toml | $(RUN)/python
	$(RUN)/pip install --quiet --editable '.[dense,serve]'
	touch $@

$(VENV)/.development: pyproject.toml | $(RUN)/python
	$(RUN)/pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.package

clean:
	rm -rf $(VENV) build dist src/*.egg-info

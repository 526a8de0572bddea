# Everything a newcomer runs. `make demo` and `make test` need Python >= 3.11, make and a package index.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: demo test install check clean

demo: $(VENV)/.package
	$(RUN)/beit3 demo

test: install
	$(RUN)/pytest

install: $(VENV)/.development

check: install
	$(RUN)/ruff check .
	$(RUN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.package: pyproject.toml | $(VENV)/bin/python
	$(RUN)/pip install --quiet --editable '.[dense]'
	touch $@

$(VENV)/.development: pyproject.toml | $(VENV)/bin/python
	$(RUN)/pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.package

clean:
	rm -rf $(VENV) build dist src/*.egg-info

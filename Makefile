# make demo: the main job on the built-in model; make test: what CI runs. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint format package clean

demo: .venv/ready
	$(BIN)/losa demo --output losa-demo --overwrite

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# A wheel and an sdist in dist/; both are installed into clean environments, where they must pass the demo.
package: .venv/ready
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python scripts/try_package.py dist/*.whl dist/*.tar.gz

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv losa-demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

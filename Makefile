# make demo: the main job on the built-in model; make test: what CI runs. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint format docs fuzz package clean

demo: .venv/base
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

# The documentation in docs/_build/html; a link that leads nowhere, or a public name without a docstring, is an error.
docs: .venv/ready
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet -b html docs docs/_build/html

# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, the AVX-512 ones with their instructions in plain C++; then
# the loader, by files, tensors and descriptions that were tampered with.
CSRC := src/losa/sparse/csrc
SANITIZED := $(CXX) -std=c++17 -O1 -g -Wall -Wextra -fsanitize=address,undefined -fno-sanitize-recover=all -pthread
FUZZ_SECONDS ?= 60
fuzz: .venv/ready
	mkdir -p build
	$(SANITIZED) -mavx2 -mfma -mf16c -mbmi2 -mpopcnt -c $(CSRC)/avx2.cpp -o build/avx2.o
	$(SANITIZED) tests/fuzz_kernels.cpp $(CSRC)/common.cpp build/avx2.o -o build/fuzz -ldl
	$(SANITIZED) -DLOSA_FUZZ_EMULATED -Itests/emulated tests/fuzz_kernels.cpp $(CSRC)/common.cpp $(CSRC)/avx512.cpp \
	    $(CSRC)/avx512_bf16.cpp -o build/fuzz512 -ldl
	build/fuzz $(FUZZ_SECONDS)
	build/fuzz512 $(FUZZ_SECONDS)
	LOSA_FUZZ=25 $(BIN)/python -m pytest -q tests/test_packed.py tests/test_packed_linear.py -k tampered

# A wheel and an sdist in dist/; both are installed into clean environments, where they must pass the demo.
package: .venv/ready
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python scripts/try_package.py dist/*.whl dist/*.tar.gz

PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

# What losa itself needs, and its reports; then what its tests and documentation do.
.venv/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable '.[report]'
	touch $@

.venv/ready: .venv/base
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv losa-demo build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis

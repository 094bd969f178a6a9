# SPDX-License-Identifier: Apache-2.0
# The habits of this project. Every target makes what it needs: `make test` and `make demo` are all the set-up there is.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc)

# torch: on a machine without a GPU the plain package brings gigabytes of CUDA libraries; this version has a CPU build.
HAS_GPU := $(shell command -v nvidia-smi)
TORCH ?= $(if $(HAS_GPU),torch,torch==2.13.0)
# nvcc: the one of this machine, or from the package index the one that cubins/manifest was made with (13.0.88).
TOOLKIT ?= cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]>=13.0.2,<13.0.4
HAS_NVCC := $(or $(FMHA_NVCC),$(shell command -v nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
comma := ,
EXTRAS := demo,bench,test$(if $(HAS_NVCC),,$(comma)build)

# What was tested: tests/constraints.txt. `make test-newest` runs with whatever is newest, so that drift is seen on purpose.
CONSTRAINTS := --constraint tests/constraints.txt
NEWEST := .venv-newest

CXX_FILES = $$(git ls-files 'kernel_src/*.h' 'kernel_src/*.cuh' 'kernel_src/*.cpp')

.PHONY: demo test test-fast test-all test-newest constraints lint format gpu-test gpu-verify gpu-sanitize bench kernels wheel clean

demo: $(VENV)/ready
	$(BIN)/python -m fmha_runtime.demo

test: $(VENV)/ready
	$(BIN)/python -m pytest -n $(JOBS) -m "not gpu and not breadth" tests

# Without the emulator: two minutes on 2 cores.
test-fast: $(VENV)/ready
	$(BIN)/python -m pytest -n $(JOBS) -m "not gpu and not breadth and not emulator" tests

# With what is only breadth.
test-all: $(VENV)/ready
	$(BIN)/python -m pytest -n $(JOBS) -m "not gpu" tests

test-newest:
	$(MAKE) test VENV=$(NEWEST) CONSTRAINTS=

# After `make test-newest` and `make lint VENV=.venv-newest CONSTRAINTS=` passed: what they ran with becomes what is tested.
constraints: $(NEWEST)/ready
	$(NEWEST)/bin/python tools/constraints.py

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The packaged cubins and their manifest; the manifest is committed, the cubins are not.
kernels: $(VENV)/ready
	$(BIN)/fmha build --into cubins

# A wheel that carries its cubins, for machines without nvcc: make wheel ARCHS="sm90a sm89"; it lies in dist/.
wheel: $(VENV)/ready
	$(BIN)/python tools/wheel.py --arch $(ARCHS)

# Into the package: the tests have a cache of their own.
gpu-test: $(VENV)/ready
	$(BIN)/fmha build --into cubins --arch sm90 --arch sm90a
	$(BIN)/python -m pytest -m gpu tests

gpu-verify: $(VENV)/ready
	$(BIN)/fmha build --arch sm90 --arch sm90a
	$(BIN)/python tools/verify_all.py sm90=cubin sm90a=cubin sm80=ptx sm86=ptx sm89=ptx

gpu-sanitize: $(VENV)/ready
	$(BIN)/fmha build --arch sm90 --arch sm90a
	$(BIN)/python tools/sanitize.py

bench: $(VENV)/ready
	$(BIN)/fmha build --arch sm90 --arch sm90a
	$(BIN)/fmha bench

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch and the toolkit first: the extras then find their requirement met by the version that was chosen.
$(VENV)/ready: pyproject.toml tests/constraints.txt | $(VENV)/bin/python
	@echo "Setting up $(VENV), once; nothing outside it is changed."
	@echo "1/3 $(TORCH): the largest download, silent until it is there"
	@$(BIN)/python -m pip install --quiet $(CONSTRAINTS) "$(TORCH)"
	@echo "2/3 nvcc: $(if $(HAS_NVCC),that of this machine is used,$(TOOLKIT))"
	@$(if $(HAS_NVCC),,$(BIN)/python -m pip install --quiet $(CONSTRAINTS) "$(TOOLKIT)")
	@echo "3/3 this package from its checkout, with $(EXTRAS): transformers and the demo's model among it"
	@$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable ".[$(EXTRAS)]"
	@touch $@
	@echo "$(VENV) is ready."

$(VENV)/lint: pyproject.toml $(VENV)/ready
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find cubins -name '*.cubin' -delete

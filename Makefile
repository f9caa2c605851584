# `make demo`, `make test`, `make lint`, `make docs`: each builds what it needs in .venv first, and nothing twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
export PATH := $(CURDIR)/$(BIN):$(PATH) # torch's build looks for ninja there

# TORCH is a pip requirement. Without an NVIDIA GPU the default is one that does not bring CUDA: from
# the configured indexes, else from PyTorch's own, else (no such wheel for this machine) whatever is.
CPU_TORCH := torch==2.13.0
PYTORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
GPU := $(shell command -v nvidia-smi; ls -d /proc/driver/nvidia 2>/dev/null)
ifdef TORCH
  INSTALL_TORCH = $(PIP) "$(TORCH)"
else ifneq ($(GPU),)
  TORCH := torch
  INSTALL_TORCH = $(PIP) $(TORCH)
else
  TORCH := $(CPU_TORCH)+cpu
  INSTALL_TORCH = $(PIP) $(TORCH) 2>/dev/null || \
    $(PIP) --retries 1 --extra-index-url $(PYTORCH_CPU_INDEX) $(TORCH) || $(PIP) $(CPU_TORCH)
endif

.PHONY: demo test lint docs kernel-tests sanitize spills clean FORCE
demo: $(VENV)/built
	$(BIN)/reformer train --resume

test: $(VENV)/built
	$(BIN)/python -m pytest

lint: $(VENV)/built
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	find csrc examples -regex '.*\.\(cpp\|h\|cu\|cuh\)' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest reformer_ext._C

docs: $(VENV)/docs # the site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The CUDA kernels without torch, on the GPU of this machine: against loops on the host, then small
# cases under compute-sanitizer (whose racecheck stops at cluster launches, as the sort makes them).
NVCC ?= nvcc
CUDA_ARCH ?= 90a
.SECONDARY: # keep the object files
KERNEL_TESTS := test_hash_sort_kernels test_chunked_attention_kernels bench_tiled_attention
KERNEL_FILES := $(shell find csrc/kernels -type f)
KERNEL_OBJECTS := $(patsubst csrc/kernels/%.cu,build/kernels/%.o,$(filter %.cu,$(KERNEL_FILES)))
NVCCFLAGS := -O3 -std=c++17 -lineinfo --expt-relaxed-constexpr -Xcompiler -fopenmp -I csrc/kernels \
  -gencode=arch=compute_$(CUDA_ARCH),code=sm_$(CUDA_ARCH)
SANITIZER := compute-sanitizer --error-exitcode 1

kernel-tests: $(KERNEL_TESTS:%=build/kernels/%)
	build/kernels/test_hash_sort_kernels
	build/kernels/test_chunked_attention_kernels 400 1
	build/kernels/bench_tiled_attention check

sanitize: $(KERNEL_TESTS:%=build/kernels/%)
	$(SANITIZER) --tool memcheck build/kernels/test_hash_sort_kernels small
	set -e; for tool in memcheck racecheck; do \
	  $(SANITIZER) --tool $$tool build/kernels/test_chunked_attention_kernels -20 1; \
	  $(SANITIZER) --tool $$tool build/kernels/bench_tiled_attention small; \
	done

# The instances of attention, and the hash by wgmma, fill the registers; a spill costs them a tenth.
# Needs nvcc, but no GPU.
spills: $(wildcard csrc/kernels/chunked_attention/tiled/*.cu csrc/kernels/chunked_attention/local/*.cu) \
  csrc/kernels/lsh_hash/wgmma.cu
	@mkdir -p build/kernels
	set -e; for kernel in $^; do \
	  $(NVCC) $(NVCCFLAGS) -Xptxas --warn-on-spills,--warning-as-error -c $$kernel -o build/kernels/spills.o; \
	done

build/kernels/%.o: csrc/kernels/%.cu $(filter %.h %.cuh,$(KERNEL_FILES))
	@mkdir -p $(@D)
	$(NVCC) $(NVCCFLAGS) -c $< -o $@

build/kernels/%: csrc/tests/%.cu $(KERNEL_OBJECTS)
	$(NVCC) $(NVCCFLAGS) $^ -o $@

clean:
	rm -rf build $(VENV) *.egg-info reformer_ext/_C.*.so reformer_ext/_build_info.json

# Records which torch was asked for; changes only when that does.
$(VENV)/torch: FORCE
	@echo "$(TORCH)" | cmp -s - $@ || { set -e; \
	  echo "Installing $(TORCH) into $(VENV)"; \
	  $(PYTHON) -m venv $(VENV); \
	  $(PIP) "setuptools>=77" wheel ninja numpy; \
	  $(INSTALL_TORCH); \
	  echo "$(TORCH)" > $@; }

$(VENV)/built: $(VENV)/torch setup.py pyproject.toml $(shell find csrc -type f)
	@echo "Building the extension (some minutes the first time)"
	$(PIP) --no-build-isolation -e '.[demo,test]'
	@touch $@

$(VENV)/docs: $(VENV)/built
	$(PIP) --no-build-isolation -e '.[docs]'
	@touch $@

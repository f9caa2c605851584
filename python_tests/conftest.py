"""Fixtures of every test: seeds, poisoned memory, devices and the marker ``gpu``."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from skips import *  # noqa: F403 hooks

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts

torch.set_num_threads(1)  # the sizes are small; test_ops.py compares with several

CUDA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPU_DTYPES = (torch.float64, *CUDA_DTYPES)


def gpu(*values: object, **options: object) -> object:
    """``pytest.param`` of a test on CUDA: marked, and skipped with a reason where there is none."""
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.param(*values, marks=[pytest.mark.gpu, absent], **options)


def device_dtypes(cpu: tuple = CPU_DTYPES, cuda: tuple = CUDA_DTYPES) -> list:
    """Parameters ``(device, dtype)`` with readable ids."""
    names = {dtype: str(dtype).removeprefix("torch.") for dtype in {*cpu, *cuda}}
    return [pytest.param("cpu", dtype, id=f"cpu-{names[dtype]}") for dtype in cpu] + [
        gpu("cuda", dtype, id=f"cuda-{names[dtype]}") for dtype in cuda
    ]


def everywhere(cases: list) -> list:
    """Parameters ``(device, dtype, case)``: on CUDA without the head dimensions it refuses."""
    return [
        pytest.param(*where.values, case, id=f"{where.id}-{case}", marks=where.marks)
        for where in device_dtypes()
        for case in cases
        if where.values[0] == "cpu" or case.runs_on_cuda
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(absent)


@pytest.fixture(params=["cpu", gpu("cuda")])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Seeds torch, and makes ``torch.empty`` NaN so that memory read before it is written shows."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)

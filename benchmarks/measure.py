"""Time, memory and the limits of the machine.

Method: GPU time between CUDA events around one call, launches hidden behind a spinning kernel; wall
time on the CPU; median and quartiles of at least 5 calls after 3 to warm up (2 after 1 where a call
takes over 2 seconds; over 30, the first is the only one), inputs rotated among 4 sets, caches not
flushed. Memory is the peak of one call beyond what was there before it: torch's
allocator on CUDA; on the CPU the process's resident memory (VmHWM, after the heap's free pages went
back). Limits of the same run: a device copy, bytes read and written, and a square matrix product,
bf16 on CUDA and fp32 on the CPU.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .case import Call

WARM_UP, MIN_REPS, MAX_REPS, MAX_SECONDS = 3, 5, 50, 4.0
SLOW, VERY_SLOW = 2e3, 3e4  # ms of a call that is made less often, and once
GPU_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")


def output_of(*command: str) -> str | None:
    root = Path(__file__).parent
    try:
        return subprocess.check_output(
            command, text=True, stderr=subprocess.DEVNULL, cwd=root
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: str, module: str) -> dict[str, object]:
    """What a reader needs to judge the numbers by."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "triton", "transformers", "reformer_pytorch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    result: dict[str, object] = {
        "command": " ".join(["python", "-m", module, *sys.argv[1:]]),
        "commit": output_of("git", "describe", "--always", "--dirty", "--abbrev=40"),
        "versions": versions,
        "machine": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "method": " ".join((__doc__ or "").split("Method:")[1].split()),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        result["gpu"] = properties.name
        result["cudnn"] = torch.backends.cudnn.version()
    return result


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def timed(calls: Sequence[Call], device: str) -> dict[str, float | None]:
    """Milliseconds (median, quartiles, calls) and the extra memory of one call in MiB."""

    def once(index: int) -> float:
        call = calls[index % len(calls)]
        if device == "cpu":
            begin = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - begin)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(10_000_000)  # about 5 ms: the host gets ahead
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    times: list[float] = []
    memory = peak_memory(lambda: times.append(once(0)), device)
    first = times.pop()
    if first > VERY_SLOW:
        return {"ms": first, "q1": first, "q3": first, "calls": 1, "memory_mib": memory}
    warm_up, min_reps = (1, 2) if first > SLOW else (WARM_UP, MIN_REPS)
    for index in range(1, warm_up):
        once(index)
    memory = peak_memory(calls[0], device)
    begin = time.perf_counter()
    while len(times) < min_reps or (
        len(times) < MAX_REPS and time.perf_counter() - begin < MAX_SECONDS
    ):
        times.append(once(len(times)))
    low, median, high = statistics.quantiles(times, n=4)
    return {"ms": median, "q1": low, "q3": high, "calls": len(times), "memory_mib": memory}


def peak_memory(call: Call, device: str) -> float | None:
    """MiB at the peak of the call beyond those before it; None on a CPU without Linux's /proc."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if sys.platform != "linux":
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = resident("VmRSS")
    call()
    return max(0.0, resident("VmHWM") - before)


def resident(field: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 2**10


def ceilings(device: str) -> dict[str, object]:
    """Copy GB/s and matmul TFLOP/s of this machine; on a GPU also its clocks under the matmul."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    source = torch.randn(2**30 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    copy = timed([lambda: target.copy_(source)], device)["ms"]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    matmul = timed([lambda: a @ b], device)["ms"]
    assert copy is not None and matmul is not None
    result: dict[str, object] = {
        "copy_gbs": 2.0 * source.nbytes / copy / 1e6,
        "matmul_tflops": 2.0 * size**3 / matmul / 1e9,
        "matmul_dtype": str(dtype).removeprefix("torch."),
    }
    if device == "cuda":
        for _ in range(1000):  # a second or two of work, during which the driver is asked
            torch.matmul(a, b)
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        answer = output_of(
            "nvidia-smi", "-i", f"GPU-{uuid}", f"--query-gpu={','.join(GPU_FIELDS)}",
            "--format=csv,noheader",
        )  # fmt: skip
        torch.cuda.synchronize()
        if answer is not None:
            values = [value.strip() for value in answer.split(",")]
            result["gpu_under_load"] = dict(zip(GPU_FIELDS, values, strict=True))
    return result


def kernels(call: Call, device: str) -> dict[str, dict[str, float]]:
    """Milliseconds and launches by kernel of one call (on the CPU: by operator), longest first."""
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    rows = {}
    for event in profiler.key_averages():
        spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if event.device_type == wanted and spent > 0:
            rows[event.key] = {"ms": spent / 1e3, "calls": float(event.count)}
    return dict(sorted(rows.items(), key=lambda row: -row[1]["ms"]))

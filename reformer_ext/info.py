"""What is installed and what it can do: ``python -m reformer_ext info``."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import __version__
from ._extension import _C

# Dispatch keys that say where an operator runs; a composite one runs where its parts do.
_KERNELS = {
    "CPU": ["CPU"],
    "CUDA": ["CUDA"],
    "composite": ["CompositeImplicitAutograd", "CompositeExplicitAutograd"],
}


def info() -> dict[str, Any]:
    """Versions, what the operators were built for, the GPUs, and where each operator runs.

    Returns:
        A dict, fit for JSON: the versions ``reformer_ext``, ``python``, ``torch``, ``torch_cuda``;
        ``cpu_capability``; ``built_for`` (the library's ``python``, ``torch``, ``cuda``,
        ``cuda_archs``); ``gpus`` (name and compute capability of each); and ``operators`` (name ->
        kernels: of ``CPU``, ``CUDA``, or ``composite``, which runs where its parts do).
    """
    operators = sorted(
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("reformer::")
    )
    return {
        "reformer_ext": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "built_for": _C.build_info(),
        "gpus": [
            f"{gpu.name} ({gpu.major}.{gpu.minor})"
            for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ],
        "operators": {
            name: [
                kernel
                for kernel, keys in _KERNELS.items()
                if any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)
            ]
            for name in operators
        },
    }


def main() -> None:
    """Prints :func:`info` for a person."""
    facts = info()
    built = facts["built_for"]
    cuda = f"CUDA {built['cuda']}, {built['cuda_archs']}" if built["cuda"] else "CPU only"
    print(f"reformer_ext  {facts['reformer_ext']}, built for torch {built['torch']} ({cuda})")
    print(f"python        {facts['python']}")
    print(f"torch         {facts['torch']} (CUDA {facts['torch_cuda'] or 'none'})")
    print(f"cpu           {facts['cpu_capability']}, {torch.get_num_threads()} threads")
    print(f"gpu           {', '.join(facts['gpus']) or 'none visible'}")
    width = max(map(len, facts["operators"]))
    for name, kernels in facts["operators"].items():
        print(f"{name:<{width}}  {' '.join(kernels)}")

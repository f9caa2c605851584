"""Loads the compiled operators, or says why they do not load.

A library built for another torch may load and then corrupt memory: versions are compared first.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch  # also loads the libraries that _C is linked with

_INSTALL = "pip install --no-build-isolation --force-reinstall --no-deps"


def _describe(python: str, torch_version: str, cuda: str | None) -> str:
    return f"torch {torch_version} ({f'CUDA {cuda}' if cuda else 'no CUDA'}) and Python {python}"


def _check_build() -> None:
    path = Path(__file__).with_name("_build_info.json")
    if not path.exists():
        raise ImportError(f"reformer_ext: the operators are not built; build them: {_INSTALL}")
    built = json.loads(path.read_text())
    python = platform.python_version_tuple()
    if built["torch"] != str(torch.__version__) or built["python"].split(".")[:2] != [*python[:2]]:
        was = _describe(built["python"], built["torch"], built["cuda"])
        present = _describe(".".join(python), str(torch.__version__), torch.version.cuda)
        raise ImportError(
            f"reformer_ext was built for {was}, but present is {present}; rebuild it: {_INSTALL}"
        )


_check_build()
try:
    from . import _C as _C
except (ImportError, OSError) as error:
    raise ImportError(
        f"reformer_ext: the operators were built for this torch, {torch.__version__}, but do not "
        f"load: {error}; rebuild them: {_INSTALL}"
    ) from error

"""Checkpoints: written so that a kill at any moment leaves the old one or the new one, whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["CheckpointError", "load_checkpoint", "save_checkpoint"]

_FORMAT = "reformer_ext.checkpoint"
_VERSION = 1


class CheckpointError(Exception):
    """A file is not a checkpoint of this program, or not a whole one."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replaces ``path`` by ``state`` (tensors and plain Python values) in one atomic step.

    Written to a hidden file beside it, flushed to the disk, then renamed over it. An error (a full
    disk, say) leaves ``path`` as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": _FORMAT, "version": _VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself must reach the disk, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What :func:`save_checkpoint` wrote, with its tensors on the CPU. Runs no code from the file.

    Raises:
        CheckpointError: no such file, truncated, or written by something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint: {path} does not exist") from None
    except IsADirectoryError:
        raise CheckpointError(f"checkpoint: expected {path} to be a file, got a folder") from None
    except Exception as error:  # torch.load raises almost anything on a damaged file
        size = path.stat().st_size if path.exists() else 0
        raise CheckpointError(
            f"checkpoint: {path} ({size:,} bytes) is truncated or no checkpoint of reformer_ext"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(f"checkpoint: {path} was not written by reformer_ext")
    if state.get("version") != _VERSION:
        raise CheckpointError(
            f"checkpoint: {path}: expected version {_VERSION}, got {state.get('version')}"
        )
    return state

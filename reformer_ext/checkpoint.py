"""Checkpoints: written so that a kill at any moment leaves the old one or the new one, whole."""

from __future__ import annotations

import contextlib
import os
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .nn import ReformerLM
from .nn.formats import FORMAT, check_format
from .nn.pretrained import restore_model
from .terminal import shown

__all__ = [
    "CheckpointError",
    "load_checkpoint",
    "load_model",
    "model_of",
    "naming",
    "save_checkpoint",
]

_KIND = "reformer_ext.checkpoint"


class CheckpointError(Exception):
    """A file is not a checkpoint of this program, or not a whole one."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replaces ``path`` by ``state`` (tensors and plain Python values) in one atomic step.

    Written to a hidden file beside it, flushed to the disk, then renamed over it. An error (a full
    disk, say) leaves ``path`` as it was.

    Raises:
        OSError: with the name of the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            torch.save({"format": _KIND, "version": FORMAT, **state}, file)
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


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of writing, which names no file, names ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What :func:`save_checkpoint` wrote, with its tensors on the CPU. Runs no code from the file.

    Raises:
        CheckpointError: no such file, no ordinary one, unreadable, truncated, damaged, written by
            something else or by a newer version.
    """
    name = shown(path)
    try:
        # A pipe would be waited for.
        if stat.S_ISDIR(mode := os.stat(path).st_mode):
            raise CheckpointError(f"checkpoint: expected {name} to be a file, got a folder")
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"checkpoint: expected {name} to be an ordinary file")
        with open(path, "rb") as file:
            state = _read(file)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint: {name} does not exist") from None
    except OSError as error:
        raise CheckpointError(
            f"checkpoint: cannot read {name}: {error.strerror or error}"
        ) from error
    except _Damaged as error:
        raise CheckpointError(f"checkpoint: {name} is damaged: {error}") from error
    except CheckpointError:
        raise
    except Exception as error:  # torch.load raises almost anything on a damaged file
        raise CheckpointError(
            f"checkpoint: {name} ({os.path.getsize(path):,} bytes) is truncated or no checkpoint "
            "of reformer_ext"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _KIND:
        raise CheckpointError(f"checkpoint: {name} was not written by reformer_ext")
    try:
        check_format(name, state.get("version"))
    except ValueError as error:
        raise CheckpointError(f"checkpoint: {error}") from None
    return state


class _Damaged(Exception):
    """Its archive is whole, and its contents are not what was written."""


def _read(file: Any) -> object:
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()  # torch.load does not compare the sums
    if damaged is not None:
        raise _Damaged(f"{damaged} is not what was written")
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def model_of(state: dict[str, Any], path: Path) -> ReformerLM:
    """The model of a loaded checkpoint, on the CPU in training mode.

    Raises:
        CheckpointError: the state makes no model.
    """
    try:
        return restore_model(ReformerLM, state.get("config"), state.get("model"), "config", "model")
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint: {shown(path)} does not fit this version: {error}"
        ) from error


def load_model(path: Path, device: torch.device) -> ReformerLM:
    """A trained model in evaluation mode: of a checkpoint of ``reformer train``, or of a folder of
    :meth:`ReformerLM.save_pretrained <reformer_ext.nn.pretrained.PretrainedModel.save_pretrained>`.

    Raises:
        CheckpointError: no such file, truncated, damaged, or written by something else.
    """
    if path.is_dir():
        try:
            return ReformerLM.from_pretrained(path, device=device)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"checkpoint: {error}") from error
    return model_of(load_checkpoint(path), path).to(device).eval()

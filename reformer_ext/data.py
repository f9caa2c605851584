"""A corpus of bytes from files: a fixed split into training and held-out files, and sampling.

Every draw is a function of (seed, step) alone, so a resumed run sees the data it would have seen.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .terminal import shown

__all__ = ["Corpus", "CorpusError", "find_files", "load_corpus", "sample_batch", "step_seed"]

SEPARATOR = b"\0"  # after every file, so that a model learns where files begin and end
MIN_BYTES = 4096  # of training and held-out bytes together; less teaches nothing
_HELD_OUT_SHARE = 0.05
_MAX_HELD_OUT = 1 << 20


class CorpusError(Exception):
    """The files named by the user cannot be trained on; the message says why."""


@dataclass(frozen=True)
class Corpus:
    """Training and held-out bytes, uint8 ``(n,)`` each, every file followed by a NUL byte."""

    name: str
    train: Tensor
    held_out: Tensor
    n_train_files: int
    n_held_out_files: int  # 0: the held-out bytes are the end of the only (or a very large) file
    fingerprint: str  # of all bytes and of the split

    def describe(self) -> str:
        """One line for the user."""
        held_out = f"{self.n_held_out_files} files" if self.n_held_out_files else "the end of one"
        return (
            f"{self.name}: {len(self.train):,} bytes ({self.n_train_files} files) to train on, "
            f"{len(self.held_out):,} ({held_out}) held out"
        )


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The files named, and all files below the folders named, sorted, each once.

    Below folders, symbolic links, hidden names and ``__pycache__`` are left out. Without paths: the
    ``.py`` files of the running Python's standard library, without its test suites, which not every
    installation has, and ``site-packages``. Raises CorpusError if a path does not exist, or a
    folder cannot be read.
    """
    if not paths:
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
        return [f for f in sorted(_walk(root, skip)) if f.suffix == ".py"]
    files: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            files.update(dict.fromkeys(sorted(_walk(path, set()))))
        elif path.is_file():
            files[path] = None
        else:
            raise CorpusError(f"corpus: {shown(path)} is neither a file nor a folder")
    return list(files)


def load_corpus(paths: Sequence[Path] = ()) -> Corpus:
    """Reads the files of :func:`find_files` and holds some of them out.

    Files are held out in the order of a hash of their contents until they make 5% of all bytes, at
    most 1 MiB, so the split depends on neither names nor order. Files too large for that stay in
    the training set; if no file fits (there is only one, say), the end of the last is held out.

    Raises:
        CorpusError: nothing to read, an unreadable file, or too few bytes.
    """
    name = ", ".join(map(shown, paths)) if paths else "the Python standard library"
    contents: dict[bytes, bytes] = {}  # copies of a file would leak from training to held-out
    for file in find_files(paths):
        try:
            data = file.read_bytes()
        except OSError as error:
            raise CorpusError(f"corpus: cannot read {shown(file)}: {error.strerror}") from error
        if data:
            contents.setdefault(hashlib.sha256(data).digest(), data + SEPARATOR)
    total = sum(map(len, contents.values()))
    if total < MIN_BYTES:
        raise CorpusError(
            f"corpus: expected at least {MIN_BYTES:,} bytes, got {total:,} in {len(contents)} "
            f"files ({name}); name more files"
        )

    budget = min(int(total * _HELD_OUT_SHARE), _MAX_HELD_OUT)
    held_out: dict[bytes, None] = {}
    left = budget
    for key in sorted(contents):
        if len(contents[key]) <= left:
            held_out[key] = None
            left -= len(contents[key])
        if left < budget // 10:  # filling the rest would favour small files
            break
    training = [data for key, data in contents.items() if key not in held_out]
    if held_out:
        validation = b"".join(contents[key] for key in held_out)
    else:
        validation = training[-1][-budget:]
        training[-1] = training[-1][:-budget]
    text = b"".join(training)
    return Corpus(
        name=name,
        train=torch.frombuffer(bytearray(text), dtype=torch.uint8),
        held_out=torch.frombuffer(bytearray(validation), dtype=torch.uint8),
        n_train_files=len(training),
        n_held_out_files=len(held_out),
        fingerprint=hashlib.sha256(
            hashlib.sha256(text).digest() + hashlib.sha256(validation).digest()
        ).hexdigest(),
    )


def sample_batch(data: Tensor, batch: int, context: int, seed: int, step: int) -> Tensor:
    """``batch`` windows of ``context + 1`` bytes at places drawn from (seed, step).

    ``data`` uint8 ``(n,)``, n > context -> int64 ``(batch, context + 1)`` on the CPU.
    """
    generator = torch.Generator().manual_seed(step_seed(seed, step))
    starts = torch.randint(len(data) - context, (batch, 1), generator=generator)
    return data[starts + torch.arange(context + 1)].long()


def step_seed(seed: int, step: int) -> int:
    """A seed for everything random in one step."""
    digest = hashlib.sha256(f"{seed}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _walk(root: Path, skip: set[str]) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        folder = shown(error.filename or root)
        raise CorpusError(f"corpus: cannot read {folder}: {error.strerror}") from error

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [
            name for name in folders if name[0] != "." and name not in skip | {"__pycache__"}
        ]
        for name in names:
            path = Path(folder, name)
            if name[0] != "." and path.is_file() and not path.is_symlink():
                yield path

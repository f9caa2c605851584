"""What people see: text that does a terminal no harm, and the progress of a run."""

from __future__ import annotations

import codecs
import re
import shutil
import sys
from pathlib import Path

import torch

__all__ = ["Output", "Progress", "clock", "device_name", "readable", "shown"]

_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def readable(text: str) -> str:
    """Control characters but new lines and tabs as ``\\x1b``, bytes that are not UTF-8 as
    ``\\xff``."""

    def escape(match: re.Match[str]) -> str:
        code = ord(match[0])
        if 0xDC80 <= code <= 0xDCFF:  # what file names have in place of such a byte
            code -= 0xDC00
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return _CONTROL.sub(escape, text)


def shown(path: Path | str) -> str:
    """A file name on one line."""
    return readable(str(path)).replace("\n", "\\x0a").replace("\t", "\\x09")


class Output:
    """Bytes on the standard output, at once: as they are, or readable on a terminal.

    Raises:
        ValueError: it is closed.
    """

    def __init__(self) -> None:
        if sys.stdout is None:
            raise ValueError("generate: expected an open standard output, got a closed one")
        self.decoder = None
        if sys.stdout.isatty():
            self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(self, data: bytes) -> None:
        if self.decoder is None:
            sys.stdout.buffer.write(data)
        else:
            sys.stdout.write(readable(self.decoder.decode(data)))
        sys.stdout.flush()

    def end(self) -> None:
        """Ends the line of a terminal."""
        if self.decoder is not None:
            print(readable(self.decoder.decode(b"", final=True)), flush=True)


class Progress:
    """A bar on a terminal; elsewhere a line per evaluation. OSError if nobody can see it."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.steps = steps
        self.device = device
        self.terminal = sys.stderr.isatty()
        self.loss: float | None = None
        self.rate: float | None = None  # tokens per second
        self.held_out = ""

    def update(self, record: dict[str, float], tokens: int, seconds: float) -> None:
        loss, rate = record["loss"], tokens / seconds
        # Means over some 20 steps.
        self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
        self.rate = rate if self.rate is None else 0.95 * self.rate + 0.05 * rate
        if "held_out" in record:
            self.held_out = f", held-out {record['held_out']:.3f}"
        step = int(record["step"])
        line = (
            f"{step:,}/{self.steps:,}  {self.loss:.3f} bits/byte{self.held_out}  "
            f"{self.rate:,.0f} tokens/s  {_memory(self.device)}  "
            f"{clock((self.steps - step) * tokens / self.rate)} left"
        )
        if self.terminal:
            filled = 20 * step // self.steps
            bar = "#" * filled + "." * (20 - filled)
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{f'[{bar}] {line}':<{width}.{width}}", end="", file=sys.stderr, flush=True)
        elif "held_out" in record or step == self.steps:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.terminal:
            print(file=sys.stderr)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def _memory(device: torch.device) -> str:
    """The peak so far: of the GPU's allocator, else of the process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    try:
        import resource
    except ImportError:  # Windows
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak / 2**30 if sys.platform == 'darwin' else peak / 2**20:.1f} GiB"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"

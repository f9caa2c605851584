"""Runs of ``reformer train``: their state, saved and restored, their folder and interruptions."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch
from torch import Tensor

from .checkpoint import CheckpointError, load_checkpoint, model_of, save_checkpoint
from .data import Corpus, load_corpus
from .nn import ReformerLM
from .nn.pretrained import config_from_fields, first_line
from .optim import Muon, split_parameters
from .recipe import Recipe
from .terminal import shown

__all__ = ["Interruptions", "Run", "TrainError", "build", "locked", "restore"]


class TrainError(Exception):
    """The run cannot start or go on; the message says why and what to do."""


@dataclass
class Run:
    """The state of a run: all that a checkpoint holds."""

    recipe: Recipe
    paths: list[str]
    corpus: Corpus
    model: ReformerLM
    optimizers: list[torch.optim.Optimizer]
    step: int
    seconds: float
    history: list[dict[str, float]]  # the lines of log.jsonl

    def save(self, path: Path) -> None:
        """Raises TrainError for weights that are not finite: the file before is worth more."""
        parameters = list(self.model.parameters())
        if not torch.stack([p.isfinite().all() for p in parameters]).all():
            raise TrainError(
                f"train: the weights are not finite after step {self.step}; {shown(path)} keeps "
                "those before; start again with a lower --lr"
            )
        save_checkpoint(
            path,
            {
                "config": dataclasses.asdict(self.model.config),
                "recipe": dataclasses.asdict(self.recipe),
                "paths": self.paths,
                "corpus": self.corpus.fingerprint,
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "step": self.step,
                "seconds": self.seconds,
                "history": self.history,
                "threads": torch.get_num_threads(),
            },
        )


def build(
    model: ReformerLM, recipe: Recipe, paths: list[str], corpus: Corpus, device: torch.device
) -> Run:
    """A run at its first step."""
    model = model.to(device).train()
    matrices, others = split_parameters(model, model.head)
    return Run(
        recipe=recipe,
        paths=paths,
        corpus=corpus,
        model=model,
        optimizers=[
            Muon(matrices, lr=recipe.lr, weight_decay=recipe.weight_decay),
            torch.optim.AdamW(
                others, lr=recipe.lr_other, betas=(0.9, 0.95), weight_decay=0.0, fused=True
            ),
        ],
        step=0,
        seconds=0.0,
        history=[],
    )


def restore(
    checkpoint: Path, paths: Sequence[Path], options: Mapping[str, Any], device: torch.device
) -> Run:
    """The run of a checkpoint.

    Args:
        checkpoint: its file.
        paths: where its corpus is now; none: where it was.
        options: fields of ReformerConfig and Recipe, which have to be those of the run.
        device: where to go on.

    Raises:
        CheckpointError, CorpusError, TrainError: with a message for the user.
    """
    state = load_checkpoint(checkpoint)
    model = model_of(state, checkpoint)
    try:
        recipe = config_from_fields(Recipe, state["recipe"])
        saved = _saved(state, recipe)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise _misfit(checkpoint, error) from error
    stored = {**dataclasses.asdict(model.config), **dataclasses.asdict(recipe)}
    for name, value in options.items():
        if stored[name] != value:
            raise TrainError(
                f"train: --resume keeps {name} = {stored[name]}, got {value}; leave it out, or "
                "start another run"
            )
    corpus = load_corpus(paths or [Path(path) for path in saved.paths])
    if corpus.fingerprint != saved.corpus:
        raise TrainError(
            f"train: the files ({corpus.name}) are not those that {shown(checkpoint)} was trained "
            "on; start another run"
        )
    run = build(model, recipe, saved.paths, corpus, device)
    kinds = ({"momentum"}, {"step", "exp_avg", "exp_avg_sq"})
    for optimizer, of_it, names in zip(run.optimizers, saved.optimizers, kinds, strict=True):
        try:
            _load_optimizer(optimizer, of_it, names)
        except Exception as error:  # torch raises almost anything on a damaged state
            raise _misfit(checkpoint, error) from error
    run.step, run.seconds, run.history = saved.step, saved.seconds, saved.history
    threads = torch.get_num_threads()
    if device.type == "cpu" and saved.threads not in (None, threads):
        print(
            f"reformer: trained with {saved.threads} CPU threads so far, now {threads}: losses may "
            f"differ in the last bits (OMP_NUM_THREADS={saved.threads} repeats them)",
            file=sys.stderr,
        )
    return run


@dataclass(frozen=True)
class _Saved:
    """What a checkpoint holds beside model and recipe, checked."""

    paths: list[str]
    corpus: str
    optimizers: list[Any]
    step: int
    seconds: float
    history: list[dict[str, float]]
    threads: int | None


def _saved(state: Mapping[str, Any], recipe: Recipe) -> _Saved:
    """Raises KeyError or ValueError, naming the entry."""
    entries: dict[str, Any] = {"threads": None, **state}  # which old checkpoints lack
    saved = _Saved(**{field.name: entries[field.name] for field in dataclasses.fields(_Saved)})

    def check(name: str, condition: bool, expected: str) -> None:
        if not condition:
            value = repr(getattr(saved, name))
            got = value if len(value) < 60 else f"{value[:60]} ..."
            raise ValueError(f"{name}: expected {expected}, got {got}")

    paths, optimizers, history = saved.paths, saved.optimizers, saved.history
    check("paths", isinstance(paths, list) and all(isinstance(p, str) for p in paths), "names")
    check("corpus", isinstance(saved.corpus, str), "a fingerprint")
    check("optimizers", isinstance(optimizers, list) and len(optimizers) == 2, "two states")
    check("step", _is_int(saved.step) and 0 <= saved.step <= recipe.steps, f"0 .. {recipe.steps}")
    check("seconds", _is_number(saved.seconds) and saved.seconds >= 0, "a number >= 0")
    check(
        "history",
        isinstance(history, list)
        and len(history) == saved.step
        and all(
            isinstance(line, dict)
            and line.get("step") == step
            and "loss" in line
            and all(isinstance(k, str) and _is_number(v) for k, v in line.items())
            for step, line in enumerate(history, 1)
        ),
        f"{saved.step} lines of numbers",
    )
    check("threads", saved.threads is None or _is_int(saved.threads), "an integer")
    return saved


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _misfit(checkpoint: Path, error: Exception) -> CheckpointError:
    text = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
    return CheckpointError(f"checkpoint: {shown(checkpoint)} does not fit this version: {text}")


def _load_optimizer(optimizer: torch.optim.Optimizer, state: Any, names: set[str]) -> None:
    """The state of each parameter; the options are those that the optimizer was made with."""
    options = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
        for parameter in group["params"]:
            of_it = optimizer.state.get(parameter, {})
            if of_it and set(of_it) != names:
                raise ValueError(f"optimizers: expected {sorted(names)}, got {list(of_it)}")
            for name, value in of_it.items():
                shape = () if name == "step" else parameter.shape
                if not isinstance(value, Tensor) or value.shape != shape:
                    raise ValueError(f"optimizers: expected {name} of shape {list(shape)}")


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """The folder of a run, made if absent, for this process alone.

    What a killed run left half written goes; a folder that was made for nothing, too.

    Raises:
        TrainError: another run has it, or ``out`` is no folder.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise TrainError(
            f"train: expected --out to be a folder, got the file {shown(out)}"
        ) from None
    path = out / ".lock"
    try:
        with _lock(path, out):
            try:
                for name in ("checkpoint.pt", "loss.png"):
                    for temporary in out.glob(f".{name}*.tmp"):
                        temporary.unlink(missing_ok=True)
                yield
            finally:
                path.unlink(missing_ok=True)
    except BaseException:
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()
        raise


def _lock(path: Path, out: Path) -> TextIO:
    """The file at ``path``, locked, with who has it written into it."""
    while True:
        file = open(path, "a+")  # noqa: SIM115
        try:
            _take(file, out)
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                now = time.strftime("%Y-%m-%d %H:%M:%S")
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()} since {now}")
                file.flush()
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # a run that ended meanwhile has removed it


def _take(file: TextIO, out: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has another kind, and few clusters
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise TrainError(
            f"train: {shown(out)} is in use by {holder}; --out names another folder"
        ) from None
    except OSError:  # a file system without locks
        pass


class Interruptions:
    """True once SIGINT, SIGTERM or SIGHUP has come; a second one then acts as usual.

    What was ignored from the start, as under nohup, stays so.
    """

    def __init__(self) -> None:
        self.came = False
        self.previous: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.came

    def __enter__(self) -> Interruptions:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows lacks the last
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        self.__exit__()

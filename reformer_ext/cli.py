"""The command line: ``reformer`` or ``python -m reformer_ext``."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import _startup, info
from .checkpoint import CheckpointError
from .data import CorpusError
from .generate import Sampling, generate, generate_batch, load_model
from .nn import ReformerConfig
from .report import inspect_checkpoint
from .terminal import Output, readable, shown
from .train import Recipe, TrainError, default_recipe, train

__all__ = ["main"]


def _layers(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _contexts(text: str) -> tuple[tuple[int, float], ...]:
    """Pairs of a context and its share of the steps."""
    stages = [part.split(":") for part in text.split(",")]
    try:
        if len(stages) == 1 and len(stages[0]) == 1:
            return ((int(text), 1.0),)
        return tuple((int(context), float(share)) for context, share in stages)
    except ValueError:
        raise argparse.ArgumentTypeError(
            "expected N, or N:SHARE,N:SHARE ... with shares that add up to 1 "
            f"(8192:0.9,65536:0.1), got {text!r}"
        ) from None


_EPILOG = """\
train learns the Python standard library of this machine, or the files and folders named, in a few
minutes; a killed run goes on with --resume. generate continues a prompt with a trained model.
inspect shows how much of exact attention its hashing captures. info says what is installed and
what it can do."""

# Options of train that are fields of ReformerConfig or Recipe: part of the run, so kept on resume.
_FIELDS: tuple[tuple[str, Any, str], ...] = (
    ("steps", int, "optimiser steps"),
    ("batch", int, "sequences per step"),
    (
        "context",
        _contexts,
        "bytes per sequence; or a schedule such as 8192:0.9,65536:0.1, contexts and their shares "
        "of the steps, each step with the bytes of --batch sequences of the last context",
    ),
    ("lr", float, "learning rate of the weight matrices (Muon)"),
    ("lr-other", float, "learning rate of all other parameters (AdamW)"),
    ("warmup", int, "steps of linear warm-up; linear decay to zero follows"),
    ("weight-decay", float, "of the weight matrices"),
    ("seed", int, "of initial weights, data and dropout"),
    ("eval-every", int, "steps between evaluations on held-out bytes"),
    ("dim", int, "width of the model"),
    ("layers", _layers, "attention of each layer: local, lsh or full"),
    ("heads", int, "attention heads"),
    ("n-hashes", int, "hash rounds of LSH layers"),
    ("chunk-size", int, "positions in a chunk of LSH layers"),
    ("local-chunk-size", int, "positions in a chunk of local layers"),
    ("dropout", float, "of embeddings and layer outputs"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; ``argv`` defaults to the process's arguments.

    Every error is one line on the standard error; with ``REFORMER_DEBUG=1`` in the environment its
    traceback. If nobody reads the output any more, as after ``head``, the command ends quietly.

    Returns:
        The exit status: 0, 1 for an error, 2 for wrong usage (argparse exits itself), 130 if
        interrupted.
    """
    _startup.ready()
    for stream in (sys.stdout, sys.stderr):  # text that their encoding lacks is no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        args = _parser().parse_args(argv)
        status = int(args.run(args))
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE and not error.filename:
            _discard_output()
            return 0
        if os.environ.get("REFORMER_DEBUG") == "1":
            raise
        with contextlib.suppress(OSError):
            print(f"reformer: {_explain(error)}", file=sys.stderr)
        return 1


def _explain(error: Exception) -> str:
    """An error on one line."""
    text = " ".join(line.strip() for line in readable(str(error)).splitlines())
    if isinstance(error, OSError) and error.filename is not None:
        return f"{shown(os.fsdecode(error.filename))}: {error.strerror}"
    if isinstance(error, (CheckpointError, CorpusError, TrainError, ValueError, OSError)):
        return text
    kind = type(error).__name__
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        kind = "out of memory"
    short = text if len(text) < 300 else f"{text[:300]} ..."
    return f"{kind}: {short} (REFORMER_DEBUG=1 shows where)"


def _discard_output() -> None:
    """So that what is left in the buffers is not written, and complained about, at the exit."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reformer", description="Reformer: attention over very long sequences.", epilog=_EPILOG
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    learn = commands.add_parser(
        "train",
        help="train a byte-level language model on files",
        description="Trains a byte-level ReformerLM and leaves checkpoint.pt, log.jsonl, loss.png "
        "and sample.txt in the folder of the run. The defaults take a few minutes on two CPU "
        "cores, or on a GPU.",
    )
    learn.add_argument(
        "paths",
        nargs="*",
        type=Path,
        help="files and folders of any kind (default: the Python standard library's sources)",
    )
    learn.add_argument(
        "--out", type=Path, help="folder of the run (default: runs/ and the first path's name)"
    )
    existing = learn.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="go on from the checkpoint in --out; start anew if there is none",
    )
    existing.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    learn.add_argument(
        "--checkpoint-every", type=int, default=50, metavar="STEPS", help="(default: %(default)s)"
    )
    _add_device(learn)
    recipe = learn.add_argument_group("the run (kept by --resume)")
    for name, kind, text in _FIELDS:
        cpu, gpu = (_default(name.replace("-", "_"), device) for device in ("cpu", "cuda"))
        default = cpu if cpu == gpu else f"{cpu} on a CPU, {gpu} on a GPU"
        metavar = {int: "N", float: "X", _contexts: "N"}.get(kind, "KINDS")
        recipe.add_argument(
            f"--{name}", type=kind, metavar=metavar, help=f"{text} (default: {default})"
        )
    learn.set_defaults(run=_train)

    write = commands.add_parser(
        "generate",
        help="continue a prompt with a trained model",
        description="Writes the prompt and its continuation to the standard output, as raw bytes "
        "(on a terminal control characters as \\x1b), each as soon as it is there; several prompts "
        "one after the other under headings.",
    )
    write.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="of reformer train, or a saved model's folder",
    )
    prompt = write.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="(default: the beginning of a file); may be repeated: all are continued together",
    )
    prompt.add_argument("--prompt-file", type=Path, help="file with the prompt, any bytes")
    write.add_argument("--length", type=int, default=500, help="bytes (default: %(default)s)")
    write.add_argument(
        "--temperature", type=float, default=0.8, help="0: the likeliest (default: %(default)s)"
    )
    write.add_argument("--top-k", type=int, default=0, help="among the k likeliest (0: all)")
    write.add_argument(
        "--top-p", type=float, default=1.0, help="among the likeliest that make up p (default: 1)"
    )
    write.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="on bytes of the context, as in CTRL (default: 1, none)",
    )
    write.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end after this; may be repeated",
    )
    write.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    _add_device(write)
    write.set_defaults(run=_generate)

    look = commands.add_parser(
        "inspect",
        help="show what the LSH attention of a trained model sees and misses",
        description="Compares LSH attention with exact attention on a few sequences: the share of "
        "the softmax that each layer and head captures by the number of hash rounds, how full the "
        "buckets are, how many keys come again in other rounds, how far away the keys are, and "
        "what the loss is with the LSH layers replaced by local attention or zeroed. Prints "
        "tables and writes a report.",
    )
    look.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="of reformer train, or a saved model's folder",
    )
    look.add_argument(
        "--data",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="files and folders to read (default: the bytes held out in training)",
    )
    look.add_argument(
        "--out",
        type=Path,
        help="report, a page ending in .html or a picture ending in .png (default: inspect.html "
        "beside the checkpoint)",
    )
    for name, text in (
        ("--length", "bytes per sequence (default: the model's context)"),
        ("--sequences", "how many (default: as many as make 8,192 bytes, at least 1)"),
        ("--n-hashes", "hash rounds (default: the model's)"),
    ):
        look.add_argument(name, type=int, metavar="N", help=text)
    look.add_argument(
        "--queries", type=int, default=256, metavar="N", help="per sequence (default: %(default)s)"
    )
    look.add_argument(
        "--top-k",
        type=int,
        default=16,
        metavar="N",
        help="likeliest keys of a query to look for (default: %(default)s)",
    )
    look.add_argument(
        "--loss-bytes",
        type=int,
        default=1 << 16,
        metavar="N",
        help="to take losses of, with and without LSH layers (default: %(default)s; 0: none)",
    )
    _add_device(look)
    look.set_defaults(run=_inspect)

    facts = commands.add_parser("info", help="versions, devices and operators")
    facts.set_defaults(run=_info)
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")


def _default(field: str, device: str) -> str:
    config, recipe = default_recipe(torch.device(device))
    given = {**config, **recipe}
    owner = Recipe if field in Recipe.__dataclass_fields__ else ReformerConfig
    value = given.get(field, owner.__dataclass_fields__[field].default)
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _device(name: str | None) -> torch.device:
    available = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if available else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device: expected cpu or cuda, got {name}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {name}")
    if device.type == "cuda":
        if not available:
            raise ValueError(f"--device: {name} is not available: torch sees no GPU")
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"--device: {name} is not available: torch sees {count} GPUs")
        torch.set_float32_matmul_precision("high")
    return device


def _train(args: argparse.Namespace) -> int:
    names = [name.replace("-", "_") for name, _, _ in _FIELDS]
    options = {key: getattr(args, key) for key in names if getattr(args, key) is not None}
    if args.context is not None:
        options["context"] = args.context[-1][0]
        options["schedule"] = args.context if len(args.context) > 1 else ()
    name = "python"
    if args.paths:
        try:
            name = args.paths[0].resolve().stem
        except (OSError, RuntimeError):  # a loop of links, which is no corpus
            name = args.paths[0].stem
    return train(
        args.paths,
        args.out or Path("runs", name or "root"),
        device=_device(args.device),
        options=options,
        resume=args.resume,
        overwrite=args.overwrite,
        checkpoint_every=args.checkpoint_every,
    )


def _generate(args: argparse.Namespace) -> int:
    output = Output()
    prompts = [os.fsencode(text) for text in args.prompt or [""]]
    if args.prompt_file:
        prompts = [args.prompt_file.read_bytes()]
    model = load_model(args.checkpoint, _device(args.device))
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty)
    options: dict[str, Any] = {
        "sampling": sampling,
        "stop": [os.fsencode(text) for text in args.stop],
        "seed": args.seed,
    }
    if len(prompts) > 1:
        texts = generate_batch(model, prompts, args.length, **options)
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
            output.write(f"==> {number} <==\n".encode() + prompt + text + b"\n")
        return 0
    continuation = generate(model, prompts[0], args.length, **options)
    output.write(prompts[0])
    for byte in continuation:
        output.write(byte)
    output.end()
    return 0


def _inspect(args: argparse.Namespace) -> int:
    inspect_checkpoint(
        args.checkpoint,
        args.out or args.checkpoint.with_name("inspect.html"),
        data=args.data,
        length=args.length,
        sequences=args.sequences,
        n_hashes=args.n_hashes,
        n_queries=args.queries,
        top_k=args.top_k,
        loss_bytes=args.loss_bytes,
        device=_device(args.device),
    )
    return 0


def _info(args: argparse.Namespace) -> int:
    info.main()
    return 0

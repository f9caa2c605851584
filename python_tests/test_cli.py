"""What the command line does where things go wrong: one line, an exit status, nothing lost."""

from __future__ import annotations

import builtins
import contextlib
import importlib.abc
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import GOLDEN, corpus

from reformer_ext import data as data_module
from reformer_ext import train as train_module
from reformer_ext.checkpoint import load_checkpoint, save_checkpoint
from reformer_ext.cli import main
from reformer_ext.generate import Sampling, sample
from reformer_ext.nn import ReformerLM
from reformer_ext.runs import TrainError, locked, restore
from reformer_ext.terminal import Output, readable

TRAINED = GOLDEN / "trained" / "checkpoint.pt"  # at step 4 of 8
TINY = [
    *("--device=cpu", "--batch=2", "--context=40", "--dim=8", "--heads=2", "--layers=local,lsh"),
    *("--chunk-size=8", "--local-chunk-size=8", "--n-hashes=2", "--eval-every=1"),
]


@pytest.fixture(autouse=True)
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "_SAMPLE_BYTES", 20)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    return corpus(folder)


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], message: str, *arguments: str | Path) -> None:
    """The command ends with status 1 and one line that has the message."""
    capsys.readouterr()
    assert run(*arguments) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.startswith("reformer: ")
    assert printed.count("\n") == 1


def environment(**variables: str) -> dict[str, str]:
    threads = str(torch.get_num_threads())
    return {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": os.getcwd(), **variables}


COMMAND = [sys.executable, "-m", "reformer_ext"]


# The folder of a run


def test_a_folder_has_one_run_at_a_time(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with locked(out):
        for option in ("--overwrite", "--resume"):
            refused(
                capsys,
                f"{out} is in use by process {os.getpid()} on ",
                *("train", files, "--out", out, "--steps=1", option, *TINY),
            )
        assert [path.name for path in out.iterdir()] == [".lock"]
    assert list(out.iterdir()) == []
    # What a killed run left is no obstacle, and goes.
    for name in (".lock", ".checkpoint.pt.12.tmp", ".loss.png.12.tmp", ".mine.tmp"):
        (out / name).write_text("process 12 on moon")
    assert run("train", files, "--out", out, "--steps=1", *TINY) == 0
    assert {path.name for path in out.iterdir()} == {
        *(".mine.tmp", "checkpoint.pt", "log.jsonl", "loss.png", "sample.txt")
    }


def test_a_folder_made_for_nothing_goes(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "a" / "b"):
        _ = 1 // 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(TrainError, match=r"expected --out to be a folder, got the file .*/file"):
        locked(tmp_path / "file").__enter__()


def test_temporary_files_have_the_name_of_their_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(Path(a).name), real(a, b)))
    for process in (111, 222):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        save_checkpoint(tmp_path / "checkpoint.pt", {})
    assert seen == [".checkpoint.pt.111.tmp", ".checkpoint.pt.222.tmp"]


# Divergence


def test_weights_that_are_not_finite_are_not_saved(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    real_step = train_module._step
    broken = [math.nan]

    def step(state: Any, device: torch.device) -> float:
        loss = real_step(state, device)
        if state.step == 3:
            next(state.model.parameters()).data.fill_(broken[0])
        return loss

    monkeypatch.setattr(train_module, "_step", step)
    options = ["train", files, "--out", out, "--steps=6", "--checkpoint-every=2", *TINY]
    for broken[0] in (math.nan, 1e38):  # the last is finite, but of no use
        for others in (["--eval-every=100"], ["--eval-every=1"]):
            assert run(*options, *others, "--overwrite") == 1
            message = "the held-out loss is nan at step 4; the checkpoint of step 2 is kept"
            assert message in capsys.readouterr().err
            assert load_checkpoint(out / "checkpoint.pt")["step"] == 2
    monkeypatch.undo()
    assert run("train", "--out", out, "--resume", "--device=cpu") == 0
    assert load_checkpoint(out / "checkpoint.pt")["step"] == 6


def test_no_run_saves_weights_that_are_not_finite(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(TRAINED, out)
    state = restore(out / "checkpoint.pt", [files], {}, torch.device("cpu"))
    list(state.model.parameters())[-1].data[0] = math.inf
    with pytest.raises(
        TrainError, match=r"the weights are not finite after step 4; .* keeps those"
    ):
        state.save(out / "checkpoint.pt")
    assert (out / "checkpoint.pt").read_bytes() == TRAINED.read_bytes()


def test_a_diverged_model_generates_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_checkpoint(TRAINED)
    state["model"]["head.weight"].fill_(math.nan)
    save_checkpoint(tmp_path / "nan.pt", state)
    for option in ("--temperature=0", "--temperature=1"):
        refused(
            capsys,
            "generate: expected logits that are finite: the model has diverged, got nan",
            *("generate", "--checkpoint", tmp_path / "nan.pt", "--device=cpu", option),
        )


# Sampling at the edge


@pytest.mark.parametrize("temperature", [1e-38, 1e-46, 5e-324])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float) -> None:
    logits = torch.tensor([1.0, 3.0, -torch.inf, 2.999])
    sampling = Sampling(temperature=temperature)
    generator = torch.Generator().manual_seed(0)
    assert {sample(logits, sampling, generator) for _ in range(20)} == {1}


def test_a_tiny_share_takes_the_likeliest() -> None:
    sampling = Sampling(temperature=1.0, top_p=1e-46)
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([1.0, 3.0, 2.999])
    assert {sample(logits, sampling, generator) for _ in range(20)} == {1}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_refuses_what_is_not_finite(value: float, temperature: float) -> None:
    with pytest.raises(ValueError, match="expected logits that are finite"):
        sample(torch.tensor([0.0, value]), Sampling(temperature), torch.Generator())


# Readers that go away


def _train(files: Path, out: Path, *options: str, **streams: Any) -> subprocess.Popen[bytes]:
    arguments = ["train", files, "--out", out, "--steps=100000", *options, *TINY]
    return subprocess.Popen([*COMMAND, *map(str, arguments)], env=environment(), **streams)


def test_a_broken_standard_error_is_an_interruption(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = _train(files, out, "--checkpoint-every=50000", **streams)
    assert process.stderr is not None
    assert b"bits/byte" in process.stderr.readline()
    process.stderr.close()
    assert process.stdout is not None
    assert f"interrupted: {out / 'checkpoint.pt'} holds".encode() in process.stdout.read()
    assert process.wait(timeout=60) == 130
    step = load_checkpoint(out / "checkpoint.pt")["step"]
    assert 1 <= step == len((out / "log.jsonl").read_text().splitlines())


def test_one_pipe_for_both_that_breaks(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = " ".join([*COMMAND, "train", str(files), "--out", str(out), "--steps=100000", *TINY])
    script = f"set -o pipefail; {command} 2>&1 | head -3"
    result = subprocess.run(["bash", "-c", script], env=environment(), capture_output=True)
    assert result.returncode == 130, result
    assert result.stdout.count(b"\n") == 3
    assert load_checkpoint(out / "checkpoint.pt")["step"] >= 1


def test_closed_standard_streams(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = " ".join([*COMMAND, "train", str(files), "--out", str(out), "--steps=2", *TINY])
    script = f"{command} >&- 2>&-"
    assert subprocess.run(["bash", "-c", script], env=environment()).returncode == 0
    assert load_checkpoint(out / "checkpoint.pt")["step"] == 2
    lines = (out / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 2]


def test_generating_into_a_closed_output_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert run("generate", "--checkpoint", TRAINED, "--device=cpu") == 1
    assert "generate: expected an open standard output" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["info"],
        ["--help"],
        ["generate", f"--checkpoint={TRAINED}", "--device=cpu", "--prompt=a", "--prompt=b"],
        ["generate", f"--checkpoint={TRAINED}", "--device=cpu", "--length=5"],
    ],
    ids=["info", "help", "prompts", "prompt"],
)
def test_a_pipe_closed_from_the_start_is_no_error(arguments: Sequence[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [*COMMAND, *arguments], env=environment(), stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, b"")


def test_a_report_is_written_though_nobody_reads_the_table(files: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    report = tmp_path / "report.html"
    command = [*COMMAND, "inspect", f"--checkpoint={TRAINED}", "--data", str(files), "--device=cpu"]
    result = subprocess.run(
        [*command, "--out", str(report), "--queries=5", "--sequences=1"],
        env=environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, b"")
    assert report.read_text().endswith("</html>\n")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_ctrl_c_while_torch_is_imported_shows_no_traceback() -> None:
    process = subprocess.Popen(
        [*COMMAND, "info"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while b"libtorch_cpu" not in Path(f"/proc/{process.pid}/maps").read_bytes():
            assert time.monotonic() < deadline
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130)
    assert printed == (b"", b"")


# Errors of any kind


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (AttributeError("no such thing"), "AttributeError: no such thing (REFORMER_DEBUG=1 shows"),
        (OverflowError("too large"), "OverflowError: too large (REFORMER_DEBUG=1 shows where)"),
        (MemoryError(), "out of memory: "),
        (
            RuntimeError(
                "[enforce fail at alloc.cpp:1]\n  DefaultCPUAllocator: can't allocate memory"
            ),
            "out of memory: [enforce fail at alloc.cpp:1] DefaultCPUAllocator: can't allocate",
        ),
        (OSError(28, "No space left on device", "/a/b"), "reformer: /a/b: No space left on device"),
        (ValueError("two\nlines and \x1b[2J"), "reformer: two lines and \\x1b[2J"),
    ],
)
def test_every_error_is_one_line(
    error: Exception,
    message: str,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def step(state: Any, device: torch.device) -> float:
        raise error

    monkeypatch.setattr(train_module, "_step", step)
    arguments = ["train", files, "--out", tmp_path / "run", "--steps=2", *TINY]
    assert run(*arguments) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    monkeypatch.setenv("REFORMER_DEBUG", "1")
    with pytest.raises(type(error)):
        run(*arguments, "--overwrite")


def test_values_out_of_range(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, message in (
        (
            "--batch=1000000000",
            "batch: expected at most 2,147,483,648 bytes a step, got 1,000,000,",
        ),
        ("--lr=inf", "lr: expected a finite number, at least 0, got inf"),
        ("--lr-other=nan", "lr_other: expected a finite number, at least 0, got nan"),
    ):
        refused(capsys, message, "train", files, "--out", tmp_path / "r", *TINY, option)
    assert not (tmp_path / "r").exists()
    refused(
        capsys,
        "generate: expected seed of 64 bits, got 18446744073709551616",
        *("generate", "--checkpoint", TRAINED, f"--seed={2**64}"),
    )
    assert run("generate", "--checkpoint", TRAINED, f"--seed={2**64 - 1}", "--length=1") == 0
    report = tmp_path / "report.html"
    inspect = ["inspect", "--checkpoint", TRAINED, "--data", files, "--out", report]
    assert run(*inspect, "--sequences=1", "--top-k", str(10**30), "--device=cpu") == 0


def test_a_loop_of_links(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    refused(capsys, "corpus: loop is neither a file nor a folder", "train", "loop")
    refused(capsys, "cannot read loop: Too many levels", "generate", "--checkpoint", "loop")


# Names and texts


def test_file_names_of_any_bytes(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not UTF-8, dollars that could be a formula, and an output that knows ASCII alone."""
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff $x^{$ .txt"))
    strange.write_bytes(b"".join(path.read_bytes() for path in files.iterdir()))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    out = tmp_path / "\u00e9"
    assert run("train", strange, "--out", out, "--steps=2", *TINY) == 0
    assert run("train", "--out", out, "--resume", "--device=cpu") == 0
    assert rb"/\xff $x^{$ .txt: " in written.getvalue()
    assert (out / "loss.png").exists()
    assert (out / "sample.txt").stat().st_size == 64 + 20


def test_readable() -> None:
    assert readable("a\tb\n\u00e9\u4e2d") == "a\tb\n\u00e9\u4e2d"
    assert readable("\x1b[2J\r\x00\x7f\x9b") == r"\x1b[2J\x0d\x00\x7f\x9b"
    assert readable(os.fsdecode(b"\xfe")) == r"\xfe"
    assert readable("\ud800") == r"\ud800"


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_no_control_characters(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", Terminal(written, encoding="utf-8"))
    output = Output()
    for byte in "\u00e9 \x1b[2J\xff".encode() + b"\xff\x9b\xe4":
        output.write(bytes([byte]))
    output.end()
    assert written.getvalue().decode() == "\u00e9 \\x1b[2J\u00ff\ufffd\ufffd\ufffd\n"
    written.truncate(0)

    text = b"\x1b[31m\x07"
    monkeypatch.setattr(train_module, "generate", lambda *_: iter([text]))
    assert run("train", files, "--out", tmp_path / "run", "--steps=1", *TINY) == 0
    assert b"|\\x1b[31m\\x07\n" in written.getvalue()
    assert b"\x1b" not in written.getvalue()
    assert (tmp_path / "run" / "sample.txt").read_bytes().endswith(text)


# Files that cannot be read or written


def test_only_ordinary_files_are_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "checkpoint.pt")
    message = f"expected {tmp_path / 'checkpoint.pt'} to be an ordinary file"
    for command in ("generate", "inspect"):
        refused(capsys, message, command, "--checkpoint", tmp_path / "checkpoint.pt")
    refused(capsys, message, "train", "--resume", "--out", tmp_path)


def test_unreadable_checkpoint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        if path == TRAINED:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", refuse)
    message = f"checkpoint: cannot read {TRAINED}: Permission denied"
    refused(capsys, message, "generate", "--checkpoint", TRAINED)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_names_the_file(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    temporary = out / f".checkpoint.pt.{os.getpid()}.tmp"
    real = builtins.open

    def full(path: Any, *args: Any, **kwargs: Any) -> Any:
        return real("/dev/full" if path == temporary else path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", full)
        message = f"{out / 'checkpoint.pt'}: No space left on device"
        refused(capsys, message, "train", files, "--out", out, "--steps=1", *TINY)


def test_unreadable_folders_are_no_empty_ones(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = files / "secret"
    secret.mkdir()
    real = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path) == secret:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(data_module.os, "scandir", refuse)
    refused(capsys, f"corpus: cannot read {secret}: Permission denied", "train", files)


def test_inspect_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    inspect = ["inspect", "--device=cpu", "--checkpoint"]
    message = f"inspect: expected --data with files, got none in {empty}"
    refused(capsys, message, *inspect, TRAINED, "--data", empty)
    message = f"expected --data with the folder of a model, {GOLDEN / 'lm_rotary'}"
    refused(capsys, message, *inspect, GOLDEN / "lm_rotary")


# Files of the right kind with wrong contents


def _junk() -> Iterator[tuple[str, dict[str, Any], str]]:
    state = load_checkpoint(TRAINED)
    recipe, history = state["recipe"], state["history"]
    adam = state["optimizers"][1]

    def with_moment(value: Any) -> dict[str, Any]:
        of_first = {**adam["state"][0], "exp_avg": value}
        moved = {**adam, "state": {**adam["state"], 0: of_first}}
        return {"optimizers": [state["optimizers"][0], moved]}

    yield "step", {"step": "four"}, "step: expected 0 .. 8, got 'four'"
    yield "late", {"step": 9}, "step: expected 0 .. 8, got 9"
    yield "seconds", {"seconds": math.nan}, "seconds: expected a number >= 0, got nan"
    yield "short", {"history": history[:3]}, "history: expected 4 lines of numbers, got [{"
    yield "lines", {"history": ["x"] * 4}, "history: expected 4 lines of numbers, got ['x'"
    yield "paths", {"paths": 3}, "paths: expected names, got 3"
    yield "optimizers", {"optimizers": None}, "optimizers: expected two states, got None"
    yield "optimizer", {"optimizers": [3, {}]}, "does not fit this version: "
    yield "shape", with_moment(torch.zeros(3)), "optimizers: expected exp_avg of shape [256, 8]"
    yield "moment", with_moment("x"), "optimizers: expected exp_avg of shape [256, 8]"
    yield "recipe", {"recipe": {**recipe, "batch": 1.5}}, "batch: expected an integer, got 1.5"
    yield "fields", {"recipe": {**recipe, "wings": 2}}, "unknown fields ['wings']"
    yield "no recipe", {"recipe": None}, "does not fit this version: "
    yield "config", {"config": ["x"]}, "config: expected named fields, got list"
    yield "names", {"config": {1: 2}}, "config: expected named fields, got dict"
    yield "heads", {"config": {**state["config"], "heads": None}}, "ReformerConfig.heads: expected"
    yield "huge", {"config": {**state["config"], "vocab_size": 2**62}}, "config: "
    yield "weights", {"model": {"x": 3}}, "model: expected named tensors, got something else"
    yield "no weights", {"model": {}}, "model: not the weights of config: "


JUNK = {name: (changes, message) for name, changes, message in _junk()}


@pytest.mark.parametrize("name", JUNK)
def test_checkpoints_of_junk(
    name: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, message = JUNK[name]
    save_checkpoint(tmp_path / "checkpoint.pt", {**load_checkpoint(TRAINED), **changes})
    resume = ["train", files, "--resume", "--out", tmp_path, "--device=cpu"]
    refused(capsys, f"checkpoint: {tmp_path / 'checkpoint.pt'} does not fit this ver", *resume)
    refused(capsys, message, *resume)
    state = load_checkpoint(TRAINED)
    del state["step" if name == "step" else "recipe"]
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    refused(capsys, " is missing", *resume)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "config.json: expected JSON, got maximum recursion depth"),
        ({"vocab_size": 2**62}, "config.json: "),
        ({"vocab_size": 10**12}, "model.safetensors: not the weights of .*size mismatch"),
        ({"layers": ["local"] * 3 + [[]]}, "config.json: "),
        ({"dim": "8"}, "config.json: ReformerConfig.dim: expected an integer >= 1, got '8'"),
        ({"n_buckets": "many"}, "config.json: ReformerConfig.n_buckets: expected None"),
    ],
)
def test_folders_of_junk(content: Any, message: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "lm_rotary", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        ReformerLM.from_pretrained(tmp_path)


# Threads, and a matplotlib that is there but broken


def test_another_number_of_threads_is_said(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run("train", files, "--out", out, "--steps=1", *TINY) == 0
    state = load_checkpoint(out / "checkpoint.pt")
    assert state["threads"] == torch.get_num_threads() == 1
    for threads, said in ((1, False), (7, True)):
        save_checkpoint(out / "checkpoint.pt", {**state, "threads": threads})
        capsys.readouterr()
        assert run("train", files, "--out", out, "--resume", "--device=cpu") == 0
        printed = capsys.readouterr().err
        assert ("trained with 7 CPU threads so far, now 1: losses may differ" in printed) is said


class _Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "matplotlib.figure":
            raise AttributeError("module 'numpy' has no attribute 'float_'")


def test_a_broken_matplotlib_costs_the_pictures_alone(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Broken(), *sys.meta_path])
    inspect = ["inspect", "--checkpoint", TRAINED, "--data", files, "--device=cpu", "--out"]
    why = "is broken (AttributeError: module 'numpy' has no attribute 'float_')"
    assert run(*inspect, tmp_path / "report.html", "--sequences=1", "--queries=5") == 0
    assert f"without pictures: matplotlib {why}" in capsys.readouterr().out
    refused(capsys, f"needs matplotlib, which {why}", *inspect, tmp_path / "report.png")
    out = tmp_path / "run"
    assert run("train", files, "--out", out, "--steps=1", *TINY) == 0
    assert f"loss.png not drawn: matplotlib {why}" in capsys.readouterr().out
    assert (out / "sample.txt").exists()

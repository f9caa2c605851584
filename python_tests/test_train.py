"""The command line's main job: training, checkpoints, generation, and what bad input gets."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from reformer_ext import train as train_module
from reformer_ext.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from reformer_ext.cli import main
from reformer_ext.data import CorpusError, find_files, load_corpus, sample_batch
from reformer_ext.generate import Sampling, generate, generate_batch, load_model, sample
from reformer_ext.nn import ReformerConfig, ReformerLM
from reformer_ext.optim import Muon, learning_rate_factor, orthogonalize, split_parameters
from reformer_ext.train import Recipe, evaluate, yardsticks

# Dropout on, so that a resumed run must also get its random numbers right.
TINY = [
    *("--device=cpu", "--batch=2", "--context=64", "--dim=32", "--heads=2", "--layers=local,lsh"),
    *("--chunk-size=16", "--local-chunk-size=16", "--n-hashes=2", "--warmup=2", "--eval-every=10"),
    "--dropout=0.1",
]


@pytest.fixture(scope="module", autouse=True)
def short_samples() -> Iterator[None]:
    """The sample at the end of a run, which takes longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "_SAMPLE_BYTES", 20)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 files of 600 bytes, each a different stretch of a repetitive text."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(40):
        lines = [f"def f{(index * 7 + n) % 50}(x): return x + {n}\n" for n in range(20)]
        (folder / f"{index:02d}.py").write_text("".join(lines))
    return folder


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def steps(out: Path) -> list[tuple[int, float, float | None]]:
    """The log without the line of the final result, which has times in it."""
    return [(r["step"], r["loss"], r.get("held_out")) for r in log(out) if "loss" in r]


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 60 steps."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    assert run("train", corpus, "--out", out, "--steps=60", *TINY) == 0
    return out


def test_training_learns_and_leaves_its_files(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a" / "run"
    assert run("train", corpus, "--out", out, "--steps=60", *TINY) == 0
    printed = capsys.readouterr()
    assert "bits per byte (gzip -9 " in printed.out
    assert f"{corpus}: " in printed.out
    assert "60/60" in printed.err
    assert "tokens/s" in printed.err
    assert "GiB" in printed.err

    records = log(out)
    assert [record["step"] for record in records] == [*range(1, 61), 60]
    losses = [loss for _, loss, _ in steps(out)]
    assert 7 < losses[0] < 9  # about 8 bits: uniform
    assert sum(losses[-5:]) / 5 < losses[0] - 2
    held_out = [value for _, _, value in steps(out) if value is not None]
    assert len(held_out) == 6
    assert held_out[-1] < held_out[0]
    assert records[-1]["held_out_all"] == pytest.approx(held_out[-1], rel=0.2)

    picture = (out / "loss.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    assert width > 500
    assert height > 300
    assert picture.endswith(b"IEND\xaeB`\x82")
    sample = (out / "sample.txt").read_bytes()
    held = bytes(load_corpus([corpus]).held_out.tolist())
    assert sample.startswith(held[:64])
    assert len(sample) == 64 + 20
    assert {path.name for path in out.iterdir()} == {
        *("checkpoint.pt", "log.jsonl", "loss.png", "sample.txt")
    }


def test_without_matplotlib_it_says_so(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = trained / "loss.png"
    content = picture.read_bytes()
    picture.unlink()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert run("train", "--resume", "--out", trained, "--device=cpu") == 0
    assert "matplotlib is absent" in capsys.readouterr().out
    assert not picture.exists()
    # A finished run resumed does no step and draws the same picture.
    assert run("train", "--resume", "--out", trained, "--device=cpu") == 0
    assert picture.read_bytes() == content


def test_resumed_run_equals_an_uninterrupted_one(
    corpus: Path, tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    real_step = train_module._step

    def dying_step(state: Any, device: torch.device) -> float:
        if state.step == 37:
            raise KeyboardInterrupt
        return real_step(state, device)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "_step", dying_step)
        arguments = ["train", corpus, "--out", out, "--steps=60", "--checkpoint-every=10", *TINY]
        assert run(*arguments) == 130
    assert load_checkpoint(out / "checkpoint.pt")["step"] == 30
    torch.manual_seed(12345)  # as another process would have it
    assert run(*arguments, "--resume") == 0
    assert steps(out) == steps(trained)
    ours, theirs = (load_checkpoint(folder / "checkpoint.pt") for folder in (out, trained))
    for name, value in theirs["model"].items():
        assert torch.equal(ours["model"][name], value), name


def _heed_signals() -> None:
    """What ignores signals, as nohup does, hands that on to its children."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


def _start(corpus: Path, out: Path, n_lines: int, *options: str) -> subprocess.Popen[bytes]:
    """A run in a process of its own, once it has made ``n_lines`` steps."""
    command = [sys.executable, "-m", "reformer_ext", "train", str(corpus), "--out", str(out)]
    process = subprocess.Popen(
        [*command, *options, *TINY],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=_heed_signals,
    )
    deadline = time.monotonic() + 120
    log_file = out / "log.jsonl"
    while not log_file.exists() or log_file.read_bytes().count(b"\n") < n_lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


def test_kill_9_loses_only_the_steps_since_the_checkpoint(corpus: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "killed", tmp_path / "whole"
    process = _start(corpus, out, 23, "--steps=150", "--checkpoint-every=5")
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    step = load_checkpoint(out / "checkpoint.pt")["step"]
    assert 20 <= step < 150
    assert step % 5 == 0
    # A write cut short leaves its temporary file, which is no obstacle.
    (out / ".checkpoint.pt.tmp").write_bytes(b"PK half a checkpoint")
    arguments = ["train", corpus, "--steps=150", *TINY]
    assert run(*arguments, "--out", out, "--resume") == 0
    assert run(*arguments, "--out", whole) == 0
    assert steps(out) == steps(whole)
    assert not (out / ".checkpoint.pt.tmp").exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_finish_the_step_and_save(name: str, corpus: Path, tmp_path: Path) -> None:
    process = _start(corpus, tmp_path, 12, "--steps=100000", "--checkpoint-every=50000")
    process.send_signal(getattr(signal, name))
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    step = load_checkpoint(tmp_path / "checkpoint.pt")["step"]
    assert step == len(log(tmp_path))
    assert f"interrupted: {tmp_path / 'checkpoint.pt'} holds step {step:,}" in printed.decode()


def test_resume_without_a_checkpoint_starts(corpus: Path, tmp_path: Path) -> None:
    assert run("train", corpus, "--out", tmp_path, "--steps=2", "--resume", *TINY) == 0
    assert len(steps(tmp_path)) == 2


def test_another_run_is_not_overwritten(
    corpus: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "checkpoint.pt").read_bytes()
    assert run("train", corpus, "--out", trained, "--steps=2", *TINY) == 1
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert run("train", "--out", trained, "--resume", "--dim=64", "--device=cpu") == 1
    assert "--resume keeps dim = 32, got 64" in capsys.readouterr().err
    assert run("train", corpus / "00.py", __file__, "--out", trained, "--resume") == 1
    assert "are not those that" in capsys.readouterr().err
    assert (trained / "checkpoint.pt").read_bytes() == before


def test_overwrite(corpus: Path, tmp_path: Path) -> None:
    for n in (3, 2):
        assert run("train", corpus, "--out", tmp_path, f"--steps={n}", "--overwrite", *TINY) == 0
        assert len(steps(tmp_path)) == n


def test_loss_that_is_not_finite_keeps_the_checkpoint(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real_step = train_module._step

    def exploding_step(state: Any, device: torch.device) -> float:
        return math.nan if state.step == 5 else real_step(state, device)

    monkeypatch.setattr(train_module, "_step", exploding_step)
    options = ["--steps=9", "--checkpoint-every=2", *TINY]
    assert run("train", corpus, "--out", tmp_path, *options) == 1
    assert "the loss is nan at step 6; the checkpoint of step 4 is kept" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 4


def _foreign(kind: str, good: bytes) -> bytes:
    if kind == "truncated":
        return good[: len(good) // 2]
    if kind == "pickle":
        return pickle.dumps(subprocess.Popen, protocol=2)  # must not be unpickled
    return {"empty": b"", "text": b"not a checkpoint\n" * 100}[kind]


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "pickle"])
def test_damaged_checkpoint(
    kind: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "checkpoint.pt"
    content = _foreign(kind, (trained / "checkpoint.pt").read_bytes())
    path.write_bytes(content)
    for command in (
        ["train", "--resume", "--out", tmp_path, "--device=cpu"],
        ["generate", "--checkpoint", path, "--device=cpu"],
    ):
        assert run(*command) == 1
        assert "is truncated or no checkpoint of reformer_ext" in capsys.readouterr().err
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_foreign_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": {"weight": torch.zeros(2)}}, path)
    assert run("generate", "--checkpoint", path) == 1
    assert "was not written by reformer_ext" in capsys.readouterr().err
    save_checkpoint(path, {"config": {"dim": 8, "wings": 2}, "model": {}})
    assert run("generate", "--checkpoint", path) == 1
    assert "does not fit this version" in capsys.readouterr().err
    assert run("generate", "--checkpoint", tmp_path / "none.pt") == 1
    assert "none.pt does not exist" in capsys.readouterr().err


def test_failed_save_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def full_disk(state: object, file: Any) -> None:
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"step": 2})
    monkeypatch.undo()
    assert load_checkpoint(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    with pytest.raises(CheckpointError, match="to be a file, got a folder"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, [], r"neither a file nor a folder"),
        (b"", [], r"expected at least 4,096 bytes, got 0 in 0 files"),
        (b"x" * 100, [], r"expected at least 4,096 bytes, got 101 in 1 files"),
        (bytes(5000), ["--context=8192"], r"more than --context = 8,192 bytes to train on"),
        (bytes(5000), ["--steps=0"], r"steps: expected at least 1, got 0"),
        (bytes(5000), ["--heads=5"], r"ReformerConfig.heads: expected a divisor of dim"),
        (bytes(5000), ["--layers=local,lhs"], r"ReformerConfig.layers: expected one or more of"),
        (bytes(5000), ["--device=tpu"], r"--device: expected cpu or cuda, got tpu"),
        (bytes(5000), ["--checkpoint-every=0"], r"checkpoint_every: expected at least 1, got 0"),
    ],
)
def test_bad_input(
    content: bytes | None,
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "file"
    if content is not None:
        file.write_bytes(content)
    assert run("train", file, "--out", tmp_path / "run", *options) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("reformer: ")
    assert message in printed.err
    assert not (tmp_path / "run").exists()


def test_corpus_split_is_by_content(corpus: Path, tmp_path: Path) -> None:
    whole = load_corpus([corpus])
    held_out = set(bytes(whole.held_out.tolist()).split(b"\0")) - {b""}
    training = set(bytes(whole.train.tolist()).split(b"\0")) - {b""}
    assert whole.n_held_out_files == len(held_out) > 0
    assert not held_out & training
    assert held_out | training == {file.read_bytes() for file in corpus.iterdir()}
    # Other names, another order and a copy of every file: the same split, nothing counted twice.
    for file in corpus.iterdir():
        content = file.read_bytes()
        (tmp_path / hashlib.md5(content).hexdigest()).write_bytes(content)
    again = load_corpus([tmp_path, corpus])
    assert torch.equal(again.held_out, whole.held_out)
    assert len(again.train) == len(whole.train)


def test_one_file_holds_its_end_out(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40
    file = tmp_path / "one"
    file.write_bytes(content)
    corpus = load_corpus([file])
    assert bytes(corpus.train.tolist()) + bytes(corpus.held_out.tolist()) == content + b"\0"
    assert len(corpus.held_out) == len(content) // 20
    assert corpus.n_held_out_files == 0


def test_find_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/x.bin", ".git/config", "a/__pycache__/x.pyc", ".hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to(tmp_path / "b.txt")
    files = [tmp_path / "a/x.bin", tmp_path / "b.txt"]
    assert find_files([tmp_path]) == files
    assert find_files([tmp_path / "b.txt", tmp_path]) == files[::-1]
    library = find_files([])
    assert Path(json.__file__) in library
    assert not [f for f in library if f.suffix != ".py" or "site-packages" in f.parts]


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    (tmp_path / "secret").touch()
    with pytest.raises(CorpusError, match=r"cannot read .*secret: Permission denied"):
        load_corpus([tmp_path])


def test_sample_batch_follows_seed_and_step_alone() -> None:
    data = torch.arange(256, dtype=torch.uint8).repeat(8)
    batch = sample_batch(data, 3, 100, seed=1, step=5)
    assert batch.shape == (3, 101)
    assert batch.dtype == torch.int64
    assert torch.equal((batch - batch[:, :1]) % 256, torch.arange(101).expand(3, -1) % 256)
    torch.manual_seed(99)
    assert torch.equal(batch, sample_batch(data, 3, 100, seed=1, step=5))
    assert not torch.equal(batch, sample_batch(data, 3, 100, seed=1, step=6))
    assert not torch.equal(batch, sample_batch(data, 3, 100, seed=2, step=5))
    assert torch.equal(sample_batch(data, 1, len(data) - 1, 0, 0)[0], data.long())


@pytest.fixture(scope="module")
def model() -> ReformerLM:
    torch.manual_seed(0)
    config = ReformerConfig(dim=16, heads=2, layers=("local", "lsh"), max_length=32, chunk_size=8)
    return ReformerLM(config).train()


def test_evaluate_predicts_each_byte_once(model: ReformerLM) -> None:
    data = torch.randint(256, (107,), dtype=torch.uint8)
    nats = 0.0
    model.eval()
    with torch.no_grad():
        for start in range(0, 106, 32):
            window = data[start : start + 33].long()
            logits = model(window[None, :-1])[0]
            nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    model.train()
    step = model.reformer.hash_step.clone()
    state = torch.get_rng_state()
    assert evaluate(model, data, 32, 2) == pytest.approx(nats / 106 / math.log(2), rel=1e-5)
    assert model.training
    assert torch.equal(model.reformer.hash_step, step)
    assert torch.equal(torch.get_rng_state(), state)
    first = evaluate(model, data[:33], 32, 2)
    assert evaluate(model, data, 32, 2, max_bytes=40) == pytest.approx(first, rel=1e-5)


def test_generate(trained: Path) -> None:
    model = load_model(trained / "checkpoint.pt", torch.device("cpu"))
    prompt = b"def f1(x): return x + 1\ndef f2(x)"

    def text(prompt: bytes = prompt, length: int = 20, seed: int = 0, **sampling: Any) -> bytes:
        options = {"sampling": Sampling(**sampling), "seed": seed}
        return b"".join(generate(model, prompt, length, **options))

    assert len(text()) == 20
    assert text() == text()
    assert text() != text(seed=1)
    greedy = text(temperature=0)
    context = model.config.max_length
    with torch.no_grad():
        logits = model(torch.tensor([list(prompt)]), cache=model.new_cache(1, context))
    assert greedy[0] == int(logits[0, -1].argmax())
    assert text(top_k=1, seed=7) == text(top_p=1e-6, seed=7) == greedy
    assert len(text(b"", 3)) == 3
    # No more than the last max_length bytes count, and a full context begins anew.
    assert text(b"junk" * 50 + prompt * 4) == text((prompt * 4)[-context:])
    long = text(length=3 * context)
    assert len(long) == 3 * context
    assert long.startswith(text())
    assert text(length=0) == b""


def test_cached_scoring_is_near_the_forward_passes(trained: Path, corpus: Path) -> None:
    """Bits per byte of held-out windows, byte by byte on the cache and all at once."""
    model = load_model(trained / "checkpoint.pt", torch.device("cpu"))
    data, context = load_corpus([corpus]).held_out.long(), model.config.max_length
    windows = torch.stack([data[s : s + context + 1] for s in range(0, 10 * context, context)])
    tokens, targets = windows[:, :-1], windows[:, 1:].flatten()
    with torch.no_grad():
        cache = model.new_cache(len(tokens), context)
        steps = [model(part, cache=cache) for part in tokens.split(1, dim=1)]
        cached, whole = (
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets).item()
            for logits in (torch.cat(steps, dim=1), model(tokens))
        )
    assert cached == pytest.approx(whole, rel=0.03)  # after the demo, within 1%
    assert cached != whole  # they do not see the same keys


def test_generate_is_the_models_argmax() -> None:
    """With all that may lie between hidden states and a byte, and a prompt that is not alone."""
    torch.manual_seed(0)
    config = ReformerConfig(
        vocab_size=300,
        dim=32,
        heads=2,
        layers=("local", "full"),
        streams="concat",
        head_bias=True,
        initializer_range=0.3,
    )
    model = ReformerLM(config).double().eval()
    assert model.output_bias is not None
    torch.nn.init.normal_(model.output_bias, std=10.0)
    prompts = [b"abc", b"defghij"]
    texts = generate_batch(model, prompts, 9, sampling=Sampling(temperature=0))
    for prompt, text in zip(prompts, texts, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([list(prompt + text)]))[0, len(prompt) - 1 : -1, :256]
        assert text == bytes(logits.argmax(dim=-1).tolist())


def test_generate_takes_memory_for_what_it_writes() -> None:
    config = ReformerConfig(dim=32, heads=2, layers=("local", "lsh", "full"), chunk_size=16)
    model = ReformerLM(config).eval()
    with mock.patch.object(model, "new_cache", wraps=model.new_cache) as new_cache:
        long, short = (b"".join(generate(model, b"abc", n, seed=1)) for n in (40, 7))
    assert [call.args for call in new_cache.call_args_list] == [(1, 43), (1, 10)]
    assert long[:7] == short


def test_generate_with_a_compiled_model() -> None:
    torch.manual_seed(0)
    config = ReformerConfig(dim=32, heads=2, layers=("local", "lsh"), max_length=24)
    model = ReformerLM(config).eval()
    torch._dynamo.reset()
    texts = [
        b"".join(generate(either, b"abc", 60, seed=1))
        for either in (model, torch.compile(model, backend="eager"))
    ]
    assert texts[0] == texts[1]


def test_generate_errors(model: ReformerLM) -> None:
    bad = {"temperature": -1.0, "top_p": 0.0, "top_k": -1, "repetition_penalty": 0.0}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=f"generate: expected {name} "):
            Sampling(**{name: value})
    with pytest.raises(ValueError, match="generate: expected length >= 0, got -1"):
        generate(model, b"", -1)
    with pytest.raises(ValueError, match="generate: expected prompt of bytes, got str"):
        generate(model, "text", 1)
    small = ReformerLM(ReformerConfig(vocab_size=255, dim=32, heads=2, layers=("local",)))
    with pytest.raises(ValueError, match=r"expected model\.config\.vocab_size >= 256, got 255"):
        generate(small.eval(), b"x", 1)
    with pytest.raises(ValueError, match="generate: expected stop without an empty string"):
        generate_batch(model, [b""], 1, stop=[b"x", b""])


def test_generate_stops(trained: Path) -> None:
    model = load_model(trained / "checkpoint.pt", torch.device("cpu"))
    whole = b"".join(generate(model, b"def f1", 60, seed=3))
    end = whole[20:23]
    cut = b"".join(generate(model, b"def f1", 60, seed=3, stop=[b"\xff\xff", end]))
    assert cut == whole[: whole.index(end) + 3]


def test_generate_batch_is_one_by_one(trained: Path) -> None:
    model = load_model(trained / "checkpoint.pt", torch.device("cpu"))
    prompts = [b"def f1(x): return x + 1\n", b"", b"de" * 100]
    sampling = Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.3)
    options: dict[str, Any] = {"sampling": sampling, "stop": [b"\n"]}
    together = generate_batch(model, prompts, 90, seed=5, **options)
    for i, (prompt, text) in enumerate(zip(prompts, together, strict=True)):
        assert text == b"".join(generate(model, prompt, 90, seed=5 + i, **options))
    assert generate_batch(model, [], 5) == []


def test_sampling_by_hand() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.9])

    def draws(context: tuple[int, ...] = (), **fields: Any) -> set[int]:
        generator = torch.Generator().manual_seed(0)
        sampling = Sampling(**{"temperature": 1.0, **fields})
        return {sample(logits, sampling, generator, context) for _ in range(200)}

    assert draws() == {0, 1, 2, 3, 4}
    assert draws(temperature=0) == draws(top_k=1) == draws(top_p=0.3) == {0}
    assert draws(top_k=3) == {0, 1, 4}
    assert draws(top_p=0.7) == {0, 4}  # 0.42 + 0.38
    assert draws(temperature=0.01) == {0}
    assert draws(temperature=0.1, top_k=2) == {0, 4}
    # 2 / 2.5 and 1.9 / 2.5 fall below the 1 that the context lacks.
    assert draws((0, 4, 3, 0), temperature=0, repetition_penalty=2.5) == {1}
    assert logits.tolist() == pytest.approx([2.0, 1.0, 0.0, -1.0, 1.9])


def test_generate_writes_raw_bytes(
    trained: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    prompt = tmp_path / "prompt"
    prompt.write_bytes(b"\xff\x00def")
    options = ["--checkpoint", trained / "checkpoint.pt", "--device=cpu", "--length=9"]
    assert run("generate", *options, "--prompt-file", prompt) == 0
    printed = capfdbinary.readouterr().out
    assert printed.startswith(b"\xff\x00def")
    assert len(printed) == 14
    assert run("generate", *options, "--prompt", "d\u00e9f") == 0
    assert capfdbinary.readouterr().out.startswith("d\u00e9f".encode())
    assert run("generate", *options, "--prompt=ab", "--prompt=c", "--stop=zz") == 0
    printed = capfdbinary.readouterr().out
    assert re.fullmatch(rb"==> 1 <==\nab.{9}\n==> 2 <==\nc.{9}\n", printed, re.DOTALL)


def test_muon_orthogonalizes_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 16, 48), (2, 48, 16), (1, 20, 20)):
        matrices = torch.randn(shape, generator=generator)
        result = orthogonalize(matrices)
        assert result.shape == shape
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        # The same singular vectors, singular values near 1.
        product = u.mT @ result @ v.mT
        values = product.diagonal(dim1=1, dim2=2)
        assert (product - values.diag_embed()).abs().max() < 1e-4
        assert values.min() > 0.2
        assert values.max() < 1.3
        assert values.median() > 0.6


def test_muon_treats_every_matrix_alone() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(8, 4), torch.randn(4, 8), torch.randn(8, 4)]
    gradients = [torch.randn_like(weight) for weight in weights]

    def updated(indices: list[int]) -> list[torch.Tensor]:
        parameters = [torch.nn.Parameter(weights[i].clone()) for i in indices]
        optimizer = Muon(parameters, lr=0.1, weight_decay=0.5)
        for _ in range(3):
            for parameter, i in zip(parameters, indices, strict=True):
                parameter.grad = gradients[i].clone()
            optimizer.step()
        return [parameter.detach() for parameter in parameters]

    together = updated([0, 1, 2])
    for i in range(3):
        torch.testing.assert_close(together[i], updated([i])[0])
    with pytest.raises(ValueError, match=r"Muon: expected 2-D parameters, got shape \[3\]"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


def test_parameters_are_split_completely(model: ReformerLM) -> None:
    matrices, others = split_parameters(model, model.head)
    assert {id(p) for p in matrices + others} == {id(p) for p in model.parameters()}
    assert len(matrices) == 2 * 4  # two projections of attention and of feed-forward each
    assert any(p is model.output_weight for p in others)


def test_learning_rate_schedule() -> None:
    factors = [learning_rate_factor(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert max(factors) == factors[10] == 1.0
    assert factors[-1] == pytest.approx(1 / 90)
    assert all(0 < factor <= 1 for factor in factors)
    assert learning_rate_factor(0, 1, 10) > 0  # warm-up longer than the run


def test_yardsticks() -> None:
    zeros, noise = yardsticks(bytes(10000)), yardsticks(os.urandom(10000))
    assert set(zeros) >= {"gzip -9"}
    assert all(value < 0.2 for value in zeros.values())
    assert all(7.9 < value < 8.3 for value in noise.values())


@pytest.mark.parametrize("command", [[], ["train"], ["generate"], ["info"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    assert "usage: reformer" in capsys.readouterr().out


def test_a_schedule_has_parts_of_the_same_bytes() -> None:
    recipe = Recipe(10, 2, 64, schedule=((16, 0.55), (32, 0.25), (64, 0.2)))
    assert recipe.stages() == [(6, 8, 16), (2, 4, 32), (2, 2, 64)]
    assert [recipe.at(step) for step in (0, 5, 6, 7, 8, 9)] == [
        *[(8, 16)] * 2,
        *[(4, 32)] * 2,
        *[(2, 64)] * 2,
    ]
    assert Recipe(10, 2, 64).stages() == [(10, 2, 64)]
    down = Recipe(10, 8, 16, schedule=((64, 0.5), (16, 0.5)))
    assert (down.longest, down.at(4), down.at(5)) == (64, (2, 64), (8, 16))


def test_training_follows_its_schedule_and_resumes_in_it(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    evaluated: set[int] = set()
    dies = {"at": -1}
    real_sample, real_evaluate, real_step = sample_batch, evaluate, train_module._step

    def sampled(data: torch.Tensor, batch: int, context: int, *rest: int) -> torch.Tensor:
        asked.append((batch, context))
        return real_sample(data, batch, context, *rest)

    def evaluated_at(model: ReformerLM, data: torch.Tensor, context: int, *rest: Any) -> float:
        evaluated.add(context)
        return real_evaluate(model, data, context, *rest)

    def dying_step(state: Any, device: torch.device) -> float:
        if state.step == dies["at"]:
            raise KeyboardInterrupt
        return real_step(state, device)

    monkeypatch.setattr(train_module, "sample_batch", sampled)
    monkeypatch.setattr(train_module, "evaluate", evaluated_at)
    monkeypatch.setattr(train_module, "_step", dying_step)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = ["train", corpus, "--steps=10", "--checkpoint-every=1", *TINY]
    arguments += ["--context=16:0.6,64:0.4", "--eval-every=3"]
    expected = [(8, 16)] * 6 + [(2, 64)] * 4

    assert run(*arguments, "--out", whole) == 0
    assert asked == expected
    assert evaluated == {64}
    assert [line["context"] for line in log(whole)[:-1]] == [context for _, context in expected]
    assert load_checkpoint(whole / "checkpoint.pt")["config"]["max_length"] == 64
    asked.clear()
    for step, status in ((4, 130), (8, 130), (-1, 0)):
        dies["at"] = step
        assert run(*arguments, "--out", parts, "--resume") == status
    assert asked == expected
    assert steps(parts) == steps(whole)
    assert run("train", "--resume", "--out", parts, "--device=cpu", "--context=64") == 1


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ("16:0.5,64:0.4", "context: expected shares that add up to 1, got 0.5 + 0.4 = 0.9"),
        ("16:1.5,64:-0.5", "context: expected contexts of at least 1 with shares above 0, got (64"),
        ("0:0.5,64:0.5", "context: expected contexts of at least 1 with shares above 0, got (0, "),
        (
            "48:0.5,64:0.5",
            "context: expected a divisor of the 128 bytes of a step (2 x 64), got 48",
        ),
        ("16:0.99,64:0.01", "context: expected at least one of 10 steps for each context, got no"),
        ("64:0.5,1048576:0.5", "more than --context = 1,048,576 bytes to train on, got "),
        ("1048576:0.5,32768:0.5", "context: expected a divisor of the 65,536 bytes of a step"),
        ("16:nan,64:0.5", "context: expected contexts of at least 1 with shares above 0, got (16"),
    ],
)
def test_schedules_that_do_not_add_up(
    context: str, message: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run("train", corpus, "--out", out, "--steps=10", *TINY, f"--context={context}") == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("context", ["many", "16:0.5,64", "16:0.5:64", "", "16,64"])
def test_schedules_of_another_form(context: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("train", f"--context={context}")
    assert "--context: expected N, or N:SHARE,N:SHARE ... with" in capsys.readouterr().err

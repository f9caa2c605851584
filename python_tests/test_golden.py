"""Files that earlier versions wrote load, and mean what they meant: same logits, same losses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from golden import GOLDEN, MODELS, TRAIN_OPTIONS, TRAINED_STEPS, answers
from safetensors.torch import load_file

from reformer_ext.cli import main
from reformer_ext.data import load_corpus
from reformer_ext.generate import load_model
from reformer_ext.train import evaluate


def check(model: Any, folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    actual = answers(model)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # Tables of angles and random rotations are the machine's to about 1e-7.
        torch.testing.assert_close(
            actual[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_every_folder_is_tested() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {
        *MODELS,
        *("reformer_pytorch", "transformers", "trained"),
    }


@pytest.mark.parametrize("name", MODELS)
def test_saved_models(name: str) -> None:
    kind = type(MODELS[name]())
    check(kind.from_pretrained(GOLDEN / name), GOLDEN / name)


@pytest.mark.parametrize("name", MODELS)
def test_saving_again_changes_nothing(name: str, tmp_path: Path) -> None:
    kind = type(MODELS[name]())
    model = kind.from_pretrained(GOLDEN / name)
    model.save_pretrained(tmp_path)
    check(kind.from_pretrained(tmp_path), GOLDEN / name)
    before, after = (load_file(f / "model.safetensors") for f in (GOLDEN / name, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_weights_of_reformer_pytorch() -> None:
    check(golden.read_reformer_pytorch(GOLDEN / "reformer_pytorch"), GOLDEN / "reformer_pytorch")


def test_weights_of_transformers() -> None:
    check(golden.read_transformers(GOLDEN / "transformers"), GOLDEN / "transformers")


def expected_lines() -> list[dict[str, float]]:
    return json.loads((GOLDEN / "trained" / "expected.json").read_text())


def test_checkpoint_is_the_model_it_was(tmp_path: Path) -> None:
    model = load_model(GOLDEN / "trained" / "checkpoint.pt", torch.device("cpu"))
    held_out = load_corpus([golden.corpus(tmp_path)]).held_out
    context, batch = TRAIN_OPTIONS["context"], TRAIN_OPTIONS["batch"]
    bits = evaluate(model, held_out, context, batch)
    assert bits == pytest.approx(expected_lines()[TRAINED_STEPS - 1]["held_out"], rel=1e-5)
    assert not math.isclose(bits, expected_lines()[-1]["held_out_all"], rel_tol=1e-3)


def test_training_goes_on_where_it_was(tmp_path: Path) -> None:
    out, files = tmp_path / "run", tmp_path / "files"
    out.mkdir()
    files.mkdir()
    shutil.copy(GOLDEN / "trained" / "checkpoint.pt", out)
    arguments = ["train", str(golden.corpus(files)), "--resume", "--device=cpu"]
    assert main([*arguments, "--out", str(out)]) == 0
    actual = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for line, expected in zip(actual, expected_lines(), strict=True):
        for key, value in expected.items():
            assert line[key] == pytest.approx(value, rel=1e-5), (expected["step"], key)

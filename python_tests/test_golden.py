"""Files that earlier versions wrote load, and mean what they meant: same logits, same losses."""

from __future__ import annotations

import dataclasses
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

from reformer_ext.checkpoint import load_checkpoint
from reformer_ext.cli import main
from reformer_ext.data import load_corpus
from reformer_ext.generate import load_model
from reformer_ext.nn import ReformerConfig, ReformerLM
from reformer_ext.nn.formats import ABSENT, FORMAT
from reformer_ext.nn.pretrained import config_from_fields
from reformer_ext.train import Recipe, evaluate


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


def test_every_field_says_what_its_absence_means() -> None:
    """A new field of ReformerConfig goes into ABSENT, at the value of models that lack it."""
    fields = {field.name for field in dataclasses.fields(ReformerConfig)}
    assert set(ABSENT["ReformerConfig"]) == fields
    optional = {
        field.name
        for field in dataclasses.fields(Recipe)
        if field.default is not dataclasses.MISSING
    }
    assert set(ABSENT["Recipe"]) == optional


def test_a_missing_field_is_not_a_new_default(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "lm_rotary", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    kept = {name: fields[name] for name in ("architecture", *golden.TINY, "layers")}
    path.write_text(json.dumps(kept))
    check(ReformerLM.from_pretrained(tmp_path), GOLDEN / "lm_rotary")
    assert dataclasses.asdict(config_from_fields(ReformerConfig, {})) == ABSENT["ReformerConfig"]


def test_new_defaults_move_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of an old file, or of another library's weights, computes what it did."""
    new = {
        "look_back": 3,
        "same_bucket": True,
        "correct_duplicates": True,
        "shared_qk_scale": 0.3,
        "local_wrap": True,
        "rotary_base": 3.0,
        "rotary_before_hash": True,
        "streams": "concat",
        "head_bias": True,
        "hash_seed": 5,
        "norm_eps": 0.1,
    }
    names = [field.name for field in dataclasses.fields(ReformerConfig)]
    before = ReformerConfig.__init__.__defaults__
    assert before is not None and len(before) == len(names)
    defaults = tuple(new.get(name, value) for name, value in zip(names, before, strict=True))
    models = {name: type(make()) for name, make in MODELS.items()}
    monkeypatch.setattr(ReformerConfig.__init__, "__defaults__", defaults)
    assert ReformerConfig().rotary_base == 3.0
    for name, kind in models.items():
        check(kind.from_pretrained(GOLDEN / name), GOLDEN / name)
    check(golden.read_reformer_pytorch(GOLDEN / "reformer_pytorch"), GOLDEN / "reformer_pytorch")
    check(golden.read_transformers(GOLDEN / "transformers"), GOLDEN / "transformers")


def test_the_format_is_written(tmp_path: Path) -> None:
    ReformerLM.from_pretrained(GOLDEN / "lm_rotary").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["format"] == FORMAT
    assert load_checkpoint(GOLDEN / "trained" / "checkpoint.pt")["version"] == 1


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (FORMAT + 1, f"expected format at most {FORMAT}, got {FORMAT + 1}; a newer version wrote"),
        (0, "expected format to be an integer >= 1, got 0"),
        ("1", "expected format to be an integer >= 1, got '1'"),
        (True, "expected format to be an integer >= 1, got True"),
    ],
)
def test_other_formats_are_refused(
    number: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(GOLDEN / "lm_rotary", folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": number, "wings": 2}))
    with pytest.raises(ValueError, match="config.json: " + message):
        ReformerLM.from_pretrained(folder)

    checkpoint = tmp_path / "checkpoint.pt"
    state = load_checkpoint(GOLDEN / "trained" / "checkpoint.pt")
    torch.save({**state, "version": number}, checkpoint)
    for command in (
        ["generate", f"--checkpoint={checkpoint}"],
        ["inspect", f"--checkpoint={checkpoint}"],
        ["train", f"--out={tmp_path}", "--resume"],
        ["generate", f"--checkpoint={folder}"],
    ):
        assert main([*command, "--device=cpu"]) == 1
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1


def test_flipped_bits_in_weights_are_noticed(tmp_path: Path) -> None:
    ReformerLM.from_pretrained(GOLDEN / "lm_rotary").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    for at in range(start, len(good), (len(good) - start) // 20):
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        with pytest.raises(ValueError, match=r"model.safetensors: damaged: the weights are not"):
            ReformerLM.from_pretrained(tmp_path)
    path.write_bytes(good)
    ReformerLM.from_pretrained(tmp_path)


def test_flipped_bits_in_a_checkpoint_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = (GOLDEN / "trained" / "checkpoint.pt").read_bytes()
    state = load_checkpoint(GOLDEN / "trained" / "checkpoint.pt")
    path = tmp_path / "checkpoint.pt"
    tensors = [*state["model"].values(), state["optimizers"][1]["state"][0]["exp_avg"]]
    for tensor in tensors:
        at = good.index(tensor.numpy().tobytes())
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert main(["generate", f"--checkpoint={path}", "--device=cpu"]) == 1
        assert f"{path} is damaged: archive/data/" in capsys.readouterr().err

"""The golden files of format 1 in ``data/golden_v1``, and what is asked of them.

``python python_tests/golden.py`` wrote them once, with the version that had format 1 alone. They
are never written again: they stand for the files that users have. A later format gets a folder of
its own.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reformer_ext.checkpoint import load_checkpoint, save_checkpoint
from reformer_ext.integrations.reformer_pytorch import from_reformer_pytorch
from reformer_ext.integrations.transformers import from_transformers
from reformer_ext.nn import (
    ReformerConfig,
    ReformerEncoderDecoder,
    ReformerForMaskedLM,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
    ReformerLM,
)

GOLDEN = Path(__file__).parent / "data" / "golden_v1"

TINY: dict[str, Any] = {
    "vocab_size": 12,
    "dim": 8,
    "heads": 2,
    "ff_hidden": 8,
    "n_hashes": 2,
    "chunk_size": 8,
    "local_chunk_size": 8,
    "max_length": 40,
    "initializer_range": 0.5,  # so that attention matters
}


def _config(**fields: Any) -> ReformerConfig:
    return ReformerConfig(**{**TINY, **fields})


# Folders of save_pretrained. Together: all kinds of layers, positions, streams and heads.
MODELS: dict[str, Callable[[], Any]] = {
    "lm_rotary": lambda: ReformerLM(_config(layers=("local", "lsh", "full"))),
    "lm_axial": lambda: ReformerLM(
        _config(
            layers=("lsh", "local"),
            positions="axial",
            axial_shape=(5, 8),
            axial_dims=(2, 6),
            streams="concat",
            head_bias=True,
            local_wrap=True,
            n_buckets=(4, 2),
            length_multiple=8,
            attention_out_bias=True,
        )
    ),
    "lm_absolute": lambda: ReformerLM(
        _config(
            layers=("lsh", "full"),
            positions="absolute",
            full_shared_qk=True,
            same_bucket=True,
            correct_duplicates=True,
            shared_qk_scale=None,
            tie_embeddings=True,
            ff_glu=True,
            ff_activation="silu",
            n_buckets=4,
            hash_seed=7,
        )
    ),
    "masked_lm": lambda: ReformerForMaskedLM(
        _config(layers=("lsh",), causal=False, rotary_before_hash=True, reversible=False)
    ),
    "classifier": lambda: ReformerForSequenceClassification(
        _config(layers=("local", "lsh"), causal=False, heads_at_once=1), 3, hidden=5
    ),
    "token_classifier": lambda: ReformerForTokenClassification(
        _config(layers=("full", "local"), positions="axial", axial_sum=True, causal=False), 3
    ),
    "question_answering": lambda: ReformerForQuestionAnswering(
        _config(layers=("lsh",), positions="none", causal=False, ff_chunk_size=5)
    ),
    "encoder_decoder": lambda: ReformerEncoderDecoder(
        _config(layers=("local", "lsh"), causal=False),
        _config(layers=("local", "lsh"), positions="absolute", look_back=2),
        ("full", "lsh"),
    ),
}

# Foreign weights with the options that from_* gets beside them.
REFORMER_PYTORCH: dict[str, Any] = {
    "num_tokens": 12,
    "dim": 8,
    "depth": 2,
    "max_seq_len": 32,
    "heads": 2,
    "dim_head": 4,
    "bucket_size": 8,
    "n_hashes": 2,
    "ff_chunks": 1,
    "ff_mult": 1,
    "causal": True,
}
TRANSFORMERS: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 8,
    "attention_head_size": 4,
    "num_attention_heads": 2,
    "feed_forward_size": 8,
    "attn_layers": ["local", "lsh"],
    "axial_pos_shape": [4, 8],
    "axial_pos_embds_dim": [2, 6],
    "max_position_embeddings": 32,
    "lsh_attn_chunk_length": 8,
    "local_attn_chunk_length": 8,
    "num_buckets": 4,
    "num_hashes": 2,
    "is_decoder": True,
    "hidden_dropout_prob": 0.0,
    "local_attention_probs_dropout_prob": 0.0,
    "lsh_attention_probs_dropout_prob": 0.0,
}

# What `reformer train` got. Of 8 steps 4 were done before it was interrupted.
TRAIN_OPTIONS: dict[str, Any] = {
    "dim": 8,
    "heads": 2,
    "layers": ("local", "lsh"),
    "ff_hidden": 8,
    "chunk_size": 8,
    "local_chunk_size": 8,
    "n_hashes": 2,
    "initializer_range": 0.2,
    "dropout": 0.1,
    "steps": 8,
    "batch": 2,
    "context": 40,
    "warmup": 2,
    "eval_every": 2,
}
TRAINED_STEPS = 4


def corpus(folder: Path) -> Path:
    """The files that the run was trained on, written into ``folder``."""
    for index in range(12):
        lines = [f"{(index * 7 + n) % 50} apples and {n} pears\n" for n in range(24)]
        (folder / f"{index:02d}.txt").write_text("".join(lines))
    return folder


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """What a model is asked, from a generator of its own."""
    generator = torch.Generator().manual_seed(5)
    config = getattr(model, "config", None) or model.decoder_config
    length = min(37, config.max_length)
    tokens = torch.randint(12, (2, length), generator=generator)
    asked = {"tokens": tokens, "targets": torch.randint(12, (2, length), generator=generator)}
    if isinstance(model, ReformerEncoderDecoder):
        asked["source"] = torch.randint(12, (2, 29), generator=generator)
    return asked


def answers(model: Any) -> dict[str, Tensor]:
    """Logits, losses, and what the gradients and a cache give: float64."""
    model = model.double().eval()
    asked = inputs(model)
    tokens, targets = asked["tokens"], asked["targets"]
    padding = torch.zeros_like(tokens, dtype=torch.bool)
    padding[1, -9:] = True
    given = (asked["source"], tokens) if "source" in asked else (tokens,)
    goals: tuple[Tensor, ...] = (targets,)
    if isinstance(model, ReformerForSequenceClassification):
        goals = (targets[:, 0] % 3,)
    elif isinstance(model, ReformerForTokenClassification):
        goals = (targets % 3,)
    elif isinstance(model, ReformerForQuestionAnswering):
        goals = (targets[:, 0], targets[:, 1] + 9)

    def logits(**kwargs: Any) -> Tensor:
        with torch.no_grad():
            result = model(*given, **kwargs)
        return torch.stack(result) if isinstance(result, tuple) else result

    found = {"logits": logits(), "padded_logits": logits(key_padding_mask=padding)}
    found["padded_logits"] = found["padded_logits"].clamp(min=-1e9)  # -inf at padding
    found["loss"] = model.loss(*given, *goals)
    if isinstance(model, ReformerLM) and model.config.causal:
        cache = model.new_cache(2, tokens.shape[1])
        parts = tokens.tensor_split([20, 21, 22], dim=1)
        with torch.no_grad():
            found["cached_logits"] = torch.cat([model(part, cache=cache) for part in parts], dim=1)
    model.train()  # whose hashes follow the step
    loss = model.loss(*given, *goals)
    loss.backward()
    found["training_loss"] = loss
    norms = [p.grad.norm() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    found["gradients"] = torch.stack(norms)
    model.eval()
    # Some positions are enough.
    return {
        name: (value[..., ::6, :] if "logits" in name and value.shape[-2] > 6 else value)
        .detach()
        .contiguous()
        for name, value in found.items()
    }


def read_reformer_pytorch(folder: Path) -> Any:
    """Our model of the weights of a reformer_pytorch.ReformerLM."""
    from safetensors.torch import load_file

    options = json.loads((folder / "options.json").read_text())
    return from_reformer_pytorch(load_file(folder / "theirs.safetensors"), **options)


def read_transformers(folder: Path) -> Any:
    """Our model of the weights of a transformers.ReformerModelWithLMHead."""
    from safetensors.torch import load_file
    from transformers import ReformerConfig as TheirConfig

    config = TheirConfig(**json.loads((folder / "options.json").read_text()))
    return from_transformers(config, load_file(folder / "theirs.safetensors"))


def _write_foreign(folder: Path, model: nn.Module, options: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    kept = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if "irrev_blocks" not in name
    }
    save_file(kept, folder / "theirs.safetensors")
    (folder / "options.json").write_text(json.dumps(options, indent=1) + "\n")


def _is_stable(model: Any, found: dict[str, Tensor]) -> bool:
    """No hash near a tie: rounding of another machine must not move a position."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stable = True
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.mul_(1 + 1e-5 * noise)
        for parameter in model.parameters():
            parameter.grad = None
        moved = {**answers(model)}
        stable &= all(
            torch.allclose(moved[name], value, rtol=5e-3, atol=5e-3)
            for name, value in found.items()
        )
        model.load_state_dict(before)
    return stable


def _write_answers(folder: Path, load: Callable[[], Any]) -> bool:
    from safetensors.torch import save_file

    model = load()
    found = answers(model)
    save_file(found, folder / "expected.safetensors")
    return _is_stable(load().double(), found)


def _write_stable(folder: Path, write: Callable[[], None], read: Callable[[Path], Any]) -> None:
    """Tries seeds until rounding does not matter."""
    for seed in range(100):
        torch.manual_seed(seed)
        write()
        if _write_answers(folder, lambda: read(folder)):
            return
        shutil.rmtree(folder)
    raise RuntimeError(f"{folder}: every seed has a hash near a tie")


def _write() -> None:
    import reformer_pytorch
    import transformers

    from reformer_ext import train as train_module

    torch.set_num_threads(1)
    for name, make in MODELS.items():
        folder = GOLDEN / name

        def write(make: Callable[[], Any] = make, folder: Path = folder) -> None:
            model = make()
            for module in model.modules():
                if hasattr(module, "hash_step"):
                    module.hash_step.fill_(3)
            model.save_pretrained(folder)

        _write_stable(folder, write, type(make()).from_pretrained)

    for name, read, make, options in (
        (
            "reformer_pytorch",
            read_reformer_pytorch,
            lambda: reformer_pytorch.ReformerLM(**REFORMER_PYTORCH),
            REFORMER_PYTORCH,
        ),
        (
            "transformers",
            read_transformers,
            lambda: transformers.ReformerModelWithLMHead(
                transformers.ReformerConfig(**TRANSFORMERS)
            ),
            TRANSFORMERS,
        ),
    ):
        folder = GOLDEN / name

        def write_foreign(
            make: Callable[[], Any] = make, folder: Path = folder, options: Any = options
        ) -> None:
            _write_foreign(folder, make(), options)

        _write_stable(folder, write_foreign, read)

    real_step = train_module._step

    def interrupted_step(run: Any, device: torch.device) -> float:
        if run.step == TRAINED_STEPS:
            raise KeyboardInterrupt
        return real_step(run, device)

    folder = GOLDEN / "trained"
    with tempfile.TemporaryDirectory() as files:
        arguments: dict[str, Any] = {"device": torch.device("cpu"), "options": TRAIN_OPTIONS}
        text = corpus(Path(files))
        whole = Path(files, "..", "whole_run").resolve()
        train_module.train([text], whole, overwrite=True, **arguments)
        train_module._step = interrupted_step  # type: ignore[assignment]
        with contextlib.suppress(KeyboardInterrupt):
            train_module.train([text], folder, checkpoint_every=TRAINED_STEPS, **arguments)
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    kept = [
        {key: line[key] for key in ("step", "loss", "held_out", "held_out_all") if key in line}
        for line in lines
    ]
    (folder / "log.jsonl").unlink()
    state = load_checkpoint(folder / "checkpoint.pt")
    save_checkpoint(folder / "checkpoint.pt", {**state, "paths": ["/home/user/apples"]})
    (folder / "expected.json").write_text(json.dumps(kept, indent=1) + "\n")
    shutil.rmtree(whole)
    for file in GOLDEN.rglob("*.*"):
        file.chmod(0o644)


if __name__ == "__main__":
    _write()

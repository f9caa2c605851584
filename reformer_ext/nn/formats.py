"""What files mean: the number of their format, and the fields that a file may lack.

Format 1 is ``config.json`` beside ``model.safetensors``, and the checkpoints of ``reformer train``;
files without a number are of format 1. ``FORMAT`` goes up when an older version could read a new
file and compute something else; a mere new field it refuses by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["ABSENT", "FORMAT", "check_format"]

FORMAT = 1  # what this version writes, and the highest that it reads

# By the name of a configuration class: what a file means that lacks a field. Every field is here,
# and no value ever changes: defaults are for new models. A field that did not exist yet stands at
# the value with which a model computes as it did without.
ABSENT: Mapping[str, Mapping[str, Any]] = {
    "ReformerConfig": {
        "vocab_size": 256,
        "dim": 512,
        "layers": ("local", "lsh", "local", "lsh", "local", "lsh"),
        "repeat": 1,
        "repeat_order": "cycle",
        "heads": 8,
        "head_dim": None,
        "heads_at_once": 0,
        "ff_hidden": None,
        "ff_chunk_size": 0,
        "ff_activation": "gelu",
        "ff_glu": False,
        "n_hashes": 8,
        "chunk_size": 64,
        "n_buckets": None,
        "look_back": 1,
        "look_ahead": None,
        "local_chunk_size": 64,
        "local_look_back": 1,
        "local_look_ahead": None,
        "local_wrap": False,
        "causal": True,
        "same_bucket": False,
        "correct_duplicates": False,
        "shared_qk_scale": 1.0,
        "next_values": False,
        "shared_qk_rotary": True,
        "full_shared_qk": False,
        "attention_out_bias": False,
        "attention_dropout": 0.0,
        "local_attention_dropout": None,
        "ff_dropout": 0.0,
        "dropout": 0.0,
        "output_dropout": 0.0,
        "positions": "rotary",
        "rotary_base": 10000.0,
        "rotary_before_hash": False,
        "axial_shape": None,
        "axial_dims": None,
        "axial_sum": False,
        "max_length": 65536,
        "length_multiple": 1,
        "streams": "mean",
        "reversible": True,
        "tie_embeddings": False,
        "head_bias": False,
        "loss_chunk_size": 4096,
        "hash_seed": 0,
        "norm_eps": 1e-5,
        "initializer_range": 0.02,
    },
    "Recipe": {  # of checkpoints; what is not here was never left out
        "lr": 0.01,
        "lr_other": 0.003,
        "warmup": 20,
        "weight_decay": 0.01,
        "seed": 0,
        "eval_every": 100,
        "schedule": (),
    },
}


def check_format(source: str, number: object) -> None:
    """Raises ValueError in the name of a file for a format that this version does not know."""
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{source}: expected format to be an integer >= 1, got {number!r}")
    if number > FORMAT:
        raise ValueError(
            f"{source}: expected format at most {FORMAT}, got {number}; a newer version wrote it"
        )

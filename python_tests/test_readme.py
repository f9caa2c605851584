"""The README's Python runs as it stands, but for sizes and the device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).resolve().parent.parent / "README.md"
SMALLER = {
    '"cuda"': '"cpu"',
    ".cuda()": "",
    "B, H, L, D = 1, 8, 65536, 64": "B, H, L, D = 1, 2, 1024, 16",
    "32 * 64": "4 * 8",
    "dim=512": "dim=32",
    "capacity=70_000": "capacity=100",
}


def test_python_blocks_run() -> None:
    from transformers import ReformerConfig, ReformerModelWithLMHead

    text = README.read_text()
    for old, new in SMALLER.items():
        assert old in text, f"{old} is no longer in the README"
        text = text.replace(old, new)
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 4
    padding = torch.zeros(2, 20, dtype=torch.bool)
    padding[0, :7] = True
    theirs = ReformerConfig(
        attn_layers=["local", "lsh"],
        hidden_size=32,
        num_attention_heads=2,
        attention_head_size=16,
        axial_pos_shape=(4, 16),
        axial_pos_embds_dim=(16, 16),
        num_buckets=4,
        lsh_attn_chunk_length=8,
        local_attn_chunk_length=8,
        is_decoder=True,
    )
    names: dict[str, Any] = {
        "tokens": torch.randint(256, (1, 200)),
        "prompts": torch.randint(256, (2, 20)),
        "padding": padding,
        "hf_model": ReformerModelWithLMHead(theirs).eval(),
    }
    for block in blocks:
        exec(compile(block, README.name, "exec"), names)
    assert names["out"].shape == names["near"].shape
    assert names["logits"].shape == (2, 1, 256)
    assert names["weights"].keys() == names["hf_model"].state_dict().keys()

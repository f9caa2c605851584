"""Random cases for hypothesis: test_properties.py checks laws, test_fuzz.py the reference."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from python_tests.cases import AttentionCase

booleans = st.booleans()
chunk_sizes = st.sampled_from([1, 3, 4, 8, 16, 50])


@st.composite
def attention_cases(draw: DrawFn, **fields: object) -> AttentionCase:
    """Any combination of flags in small sizes; ``fields``: values, or strategies, instead."""
    choices: dict[str, object] = {
        "batch": st.integers(1, 2),
        "heads": st.integers(1, 2),
        "length": st.integers(1, 40),
        "head_dim": st.sampled_from([1, 4, 8, 16]),
        "rounds": st.integers(0, 4),
        "n_buckets": st.integers(1, 9),
        "shared": booleans,
        "chunk_size": chunk_sizes,
        "look_back": st.integers(0, 3),
        "look_ahead": st.integers(0, 2),
        "causal": booleans,
        "mask_self": st.sampled_from([None, False, True]),
        "wrap": st.sampled_from([None, False, True]),
        "padding": st.sampled_from([None, "tail", "head", "scattered", "row"]),
        "same_bucket": booleans,
        "correct_duplicates": booleans,
        "dropout_p": st.sampled_from([0.0, 0.3]),
        "layout": st.sampled_from(["contiguous", "transposed", "sliced"]),
        **fields,
    }
    drawn = {
        name: draw(choice) if isinstance(choice, SearchStrategy) else choice
        for name, choice in choices.items()
    }
    return AttentionCase("drawn", **drawn)  # type: ignore[arg-type]

"""Models with a head for a task: against plain formulas on the hidden states, and saved whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from python_tests.cases import tiny_config
from reformer_ext.nn import (
    ReformerConfig,
    ReformerForMaskedLM,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
    ReformerLM,
)
from reformer_ext.nn.pretrained import PretrainedModel


def small_config(**fields: object) -> ReformerConfig:
    return tiny_config(**{"vocab_size": 40, "causal": False, **fields})


def batch() -> tuple[Tensor, Tensor]:
    """Tokens, and the padding at the end of all but the first."""
    tokens = torch.randint(40, (3, 19))
    return tokens, torch.arange(19) >= torch.tensor([[19], [11], [1]])


def models(**fields: object) -> list[PretrainedModel]:
    config = small_config(**fields)
    return [
        ReformerForMaskedLM(config),
        ReformerForSequenceClassification(config, 3),
        ReformerForTokenClassification(config, num_labels=5),
        ReformerForQuestionAnswering(config),
    ]


def targets_of(model: nn.Module) -> tuple[Tensor, ...]:
    if isinstance(model, ReformerForSequenceClassification):
        return (torch.randint(3, (3,)),)
    if isinstance(model, ReformerForQuestionAnswering):
        return torch.tensor([3, 2, 0]), torch.tensor([18, 10, 0])
    return (torch.randint(5, (3, 19)),)


def test_masked_lm_sees_both_sides_and_counts_masked_tokens() -> None:
    model = ReformerForMaskedLM(small_config(loss_chunk_size=7)).double().eval()
    tokens, mask = batch()
    targets = torch.where(torch.rand(3, 19) < 0.3, tokens, -100).masked_fill(mask, -100)
    logits = model(tokens, key_padding_mask=mask)
    loss = model.loss(tokens, targets, key_padding_mask=mask)
    torch.testing.assert_close(loss, F.cross_entropy(logits.transpose(1, 2), targets))
    changed = tokens.clone()
    changed[0, 18] = (changed[0, 18] + 1) % 40
    assert not torch.equal(model(changed)[0, 17], logits[0, 17])


def test_sequence_classification_is_of_the_mean_without_padding() -> None:
    model = ReformerForSequenceClassification(small_config(), 3).double().eval()
    tokens, mask = batch()
    logits = model(tokens, key_padding_mask=mask)
    hidden = model.reformer(tokens, key_padding_mask=mask)
    for row, length in enumerate((19, 11, 1)):
        expected = model.head(hidden[row, :length].mean(dim=0))
        torch.testing.assert_close(logits[row], expected)
    torch.testing.assert_close(model(tokens), model.head(model.reformer(tokens).mean(dim=1)))
    labels = torch.tensor([2, -100, 0])
    loss = model.loss(tokens, labels, key_padding_mask=mask)
    by_hand = -torch.log_softmax(logits, dim=-1)
    torch.testing.assert_close(loss, (by_hand[0, 2] + by_hand[2, 0]) / 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_first_position_and_a_hidden_layer(side: str) -> None:
    model = ReformerForSequenceClassification(small_config(), 3, pooling="first", hidden=7)
    model.double().eval()
    tokens, mask = batch()
    if side == "left":
        mask = mask.flip(1)
    hidden = model.reformer(tokens, key_padding_mask=mask)
    first = torch.stack([row[~padding][0] for row, padding in zip(hidden, mask, strict=True)])
    expected = model.head(torch.tanh(model.dense(first)))
    torch.testing.assert_close(model(tokens, key_padding_mask=mask), expected)
    hidden = model.reformer(tokens)[:, 0]
    torch.testing.assert_close(model(tokens), model.head(torch.tanh(model.dense(hidden))))
    packed = torch.cat([tokens[0], tokens[1, :11]])[None]
    alone = torch.cat([model(tokens[:1]), model(tokens[1:2, :11])])
    torch.testing.assert_close(model(packed, cu_seqlens=[0, 19, 30]), alone)


def test_a_mean_over_many_positions_fits_in_float16() -> None:
    config = small_config(layers=("local",), local_chunk_size=4)
    model = ReformerForSequenceClassification(config, 3).eval()
    torch.nn.init.constant_(model.reformer.norm.bias, 8.0)
    model.half()
    tokens = torch.randint(40, (1, 9000))
    mask = torch.zeros(1, 9000, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, key_padding_mask=mask), model(tokens))


def test_token_classification_loss_is_the_cross_entropy_of_its_logits() -> None:
    model = ReformerForTokenClassification(small_config(loss_chunk_size=7), 5).double().eval()
    tokens, mask = batch()
    labels = torch.randint(5, (3, 19)).masked_fill(mask, -100)
    logits = model(tokens, key_padding_mask=mask)
    assert logits.shape == (3, 19, 5)
    for reduction in ("mean", "sum", "none"):
        torch.testing.assert_close(
            model.loss(tokens, labels, reduction, key_padding_mask=mask),
            F.cross_entropy(logits.transpose(1, 2), labels, reduction=reduction),
        )
    packed = torch.cat([tokens[0], tokens[1, :11], tokens[2, :1]])[None]
    torch.testing.assert_close(
        model(packed, cu_seqlens=[0, 19, 30, 31])[0, :19], model(tokens[:1])[0]
    )
    torch.testing.assert_close(
        model.loss(packed, packed % 5, cu_seqlens=[0, 19, 30, 31]),
        F.cross_entropy(model(packed, cu_seqlens=[0, 19, 30, 31])[0], packed[0] % 5),
    )


def test_question_answering_never_answers_with_padding() -> None:
    model = ReformerForQuestionAnswering(small_config()).double().eval()
    tokens, mask = batch()
    start, end = model(tokens, key_padding_mask=mask)
    expected = model.head(model.reformer(tokens, key_padding_mask=mask))
    torch.testing.assert_close(start[~mask], expected[..., 0][~mask])
    torch.testing.assert_close(end[~mask], expected[..., 1][~mask])
    assert (start[mask] == -torch.inf).all()
    assert (end[mask] == -torch.inf).all()
    starts, ends = torch.tensor([4, 0, -100]), torch.tensor([7, 10, -100])
    loss = model.loss(tokens, starts, ends, key_padding_mask=mask)
    terms = [
        expected[row, :length, side].logsumexp(0) - expected[row, position, side]
        for side, positions in enumerate((starts, ends))
        for row, (length, position) in enumerate(zip((19, 11), positions, strict=False))
    ]
    torch.testing.assert_close(loss, torch.stack(terms).mean())


@pytest.mark.parametrize("as_tensor", [False, True])
def test_packed_sequences_are_those_alone(as_tensor: bool) -> None:
    """Values, losses and gradients; the third sequence is empty."""
    lengths = [19, 11, 0, 1, 11]
    ends = [0, 19, 30, 30, 31, 42]
    cu_seqlens = torch.tensor(ends) if as_tensor else ends
    packed = torch.randint(40, (1, 42))
    sequences = [part for part in packed.split(lengths, dim=1) if part.shape[1]]

    model = ReformerForSequenceClassification(small_config(), 3).double().eval()
    logits = model(packed, cu_seqlens=cu_seqlens)
    alone = torch.cat([model(sequence) for sequence in sequences])
    torch.testing.assert_close(logits[[0, 1, 3, 4]], alone)
    torch.testing.assert_close(logits[2], model.head.bias)
    labels = torch.tensor([2, 0, -100, 1, 1])
    loss = model.loss(packed, labels, cu_seqlens=cu_seqlens)
    expected = F.cross_entropy(alone, labels[[0, 1, 3, 4]])
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(x, list(model.parameters())) for x in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-10)

    answers = ReformerForQuestionAnswering(small_config()).double().eval()
    found = answers(packed, cu_seqlens=cu_seqlens)
    spans = [answers(sequence) for sequence in sequences]
    for side in range(2):
        torch.testing.assert_close(found[side], torch.cat([span[side] for span in spans], dim=1))
    targets = torch.tensor([3, 0, -100, 0, 10]), torch.tensor([18, 10, -100, 0, -100])
    loss = answers.loss(packed, *targets, cu_seqlens=cu_seqlens)
    sides = []
    for side in range(2):
        of_side = targets[side][[0, 1, 3, 4]]
        losses = [
            F.cross_entropy(span[side], target[None])
            for span, target in zip(spans, of_side, strict=True)
            if target >= 0
        ]
        sides.append(torch.stack(losses).mean())
    expected = torch.stack(sides).mean()
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(x, list(answers.parameters())) for x in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-10)

    for head, wanted in ((model, [labels]), (answers, targets)):
        with pytest.raises(ValueError, match="expected cu_seqlens to end at the total length, 42"):
            head.loss(packed, *wanted, cu_seqlens=[0, 41])
        with pytest.raises(ValueError, match=r"expected (labels|starts) \[2\], got \[5\]"):
            head.loss(packed, *wanted, cu_seqlens=[0, 20, 42])


@pytest.mark.parametrize("index", range(4))
def test_padding_is_not_read(index: int) -> None:
    model = models(layers=("local", "lsh", "full"))[index].double().eval()
    tokens, mask = batch()
    targets = [t.masked_fill(mask, -100) if t.shape == mask.shape else t for t in targets_of(model)]
    losses = [
        model.loss(t, *targets, key_padding_mask=mask)
        for t in (tokens, tokens.masked_fill(mask, 7))
    ]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("index", range(4))
def test_trains_under_autocast(index: int) -> None:
    """The loss falls, and every parameter gets a finite gradient."""
    model = models(dropout=0.05)[index]
    tokens, mask = batch()
    targets = targets_of(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss(tokens, *targets, key_padding_mask=mask)
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_sequence_of_padding_alone_is_finite() -> None:
    model = ReformerForSequenceClassification(small_config(), 3).eval()
    tokens = torch.randint(40, (2, 9))
    mask = torch.tensor([[False] * 9, [True] * 9])
    logits = model(tokens, key_padding_mask=mask)
    torch.testing.assert_close(logits[1], model.head.bias)


@pytest.mark.parametrize("index", range(4))
def test_save_and_load(index: int, tmp_path: Path) -> None:
    model = models()[index]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config == model.config
    tokens, mask = batch()
    expected = model.eval()(tokens, key_padding_mask=mask)
    got = loaded(tokens, key_padding_mask=mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["architecture"] == type(model).__name__
    assert fields.get("num_labels") == (None, 3, 5, None)[index]
    with pytest.raises(ValueError, match="expected architecture ReformerLM, got ReformerFor"):
        ReformerLM.from_pretrained(tmp_path)


def test_load_errors(tmp_path: Path) -> None:
    ReformerForTokenClassification(small_config(), 5).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for changes, message in (
        (
            {"num_labels": 0},
            "config.json: ReformerForTokenClassification: expected num_labels >= 1",
        ),
        ({"num_tags": 5}, r"config.json: unknown fields \['num_tags'\]"),
        ({"num_labels": 4}, "(?s)model.safetensors: not the weights of .*size mismatch"),
    ):
        path.write_text(json.dumps({**fields, **changes}))
        with pytest.raises(ValueError, match=message):
            ReformerForTokenClassification.from_pretrained(tmp_path)
    del fields["num_labels"]
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"config.json: .*missing .* argument: 'num_labels'"):
        ReformerForTokenClassification.from_pretrained(tmp_path)


def test_errors() -> None:
    with pytest.raises(
        ValueError, match=r"ReformerForMaskedLM: expected config.causal to be False"
    ):
        ReformerForMaskedLM(small_config(causal=True))
    with pytest.raises(ValueError, match="SequenceClassification: expected num_labels >= 1, got 0"):
        ReformerForSequenceClassification(small_config(), 0)
    with pytest.raises(ValueError, match=r"expected pooling in \('mean', 'first'\), got 'last'"):
        ReformerForSequenceClassification(small_config(), 3, pooling="last")
    for hidden in (0, 2.5):
        with pytest.raises(ValueError, match=f"expected hidden to be None or >= 1, got {hidden}"):
            ReformerForSequenceClassification(small_config(), 3, hidden=hidden)
    with pytest.raises(
        ValueError, match=r"TokenClassification: expected num_labels >= 1, got 3\.0"
    ):
        ReformerForTokenClassification(small_config(), 3.0)
    tokens = torch.zeros(3, 19, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"Classification: expected labels \[3\], got \[3, 1\]"):
        models()[1].loss(tokens, tokens[:, :1])
    with pytest.raises(ValueError, match=r"chunked_lm_loss: expected targets \[3, 19\], got \[3\]"):
        models()[2].loss(tokens, tokens[:, 0])
    with pytest.raises(ValueError, match=r"Answering: expected ends \[3\], got \[2\]"):
        models()[3].loss(tokens, tokens[:, 0], tokens[:2, 0])

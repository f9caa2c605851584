"""ReversibleStack: its gradients are those of plain autograd, whatever surrounds it.

The published reversible Reformers fail several of these; PEERS names them: transformers (HF) and
reformer-pytorch (RP).
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import data_parallel
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import reformer_ext
from python_tests.cases import tiny_config
from reformer_ext import ops
from reformer_ext.nn import Reformer, ReformerConfig, ReformerLM, ReversibleStack
from reformer_ext.nn.blocks import by_heads
from reformer_ext.nn.reversible import ReversibleBlock

DIM = 16


class Mlp(nn.Module):
    """A user's own F or G: nothing in it knows of reversibility."""

    def __init__(self, dropout: float = 0.0, positionwise_chunk_size: int = 0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.up = nn.Linear(DIM, 2 * DIM)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(2 * DIM, DIM)
        self.positionwise_chunk_size = positionwise_chunk_size

    def forward(self, x: Tensor) -> Tensor:
        size = self.positionwise_chunk_size or x.shape[1]
        return torch.cat([self.part(part) for part in x.split(size, dim=1)], dim=1)

    def part(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(torch.tanh(self.up(self.norm(x)))))


def mlp_stacks(depth: int = 3, dropout: float = 0.0, chunk: int = 0) -> list[ReversibleStack]:
    """The same network, reversible and plain."""
    blocks = [(Mlp(dropout), Mlp(dropout, chunk)) for _ in range(depth)]
    reversible = ReversibleStack(blocks)
    plain = ReversibleStack(copy.deepcopy(blocks), reversible=False)
    return [reversible, plain]


def reformers(dtype: torch.dtype = torch.float64, **fields: object) -> list[Reformer]:
    """The same Reformer, reversible and plain."""
    defaults = {
        "dim": DIM,
        "layers": ("local", "lsh", "full", "lsh"),
        "chunk_size": 8,
        "local_chunk_size": 8,
        "ff_chunk_size": 5,
    }
    models = []
    for reversible in (True, False):
        torch.manual_seed(7)
        config = tiny_config(**{**defaults, **fields, "reversible": reversible})
        models.append(Reformer(config).to(dtype))
    return models


def gradients(
    model: nn.Module, run: Callable[[nn.Module], Tensor], seed: int = 5
) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.zero_grad()
    torch.manual_seed(seed)
    out = run(model)
    out.square().sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(
    reversible: tuple[Tensor, dict[str, Tensor | None]],
    plain: tuple[Tensor, dict[str, Tensor | None]],
    tolerance: float,
) -> None:
    assert torch.equal(reversible[0], plain[0]), "the forward passes differ"
    assert reversible[1].keys() == plain[1].keys()
    for name, expected in plain[1].items():
        got = reversible[1][name]
        assert (got is None) == (expected is None), name
        if got is not None and expected is not None:
            error = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
            assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


def mean_stream(x: Tensor) -> Callable[[nn.Module], Tensor]:
    def run(stack: nn.Module) -> Tensor:
        y1, y2 = stack(x, 2 * x)
        return y1 + y2

    return run


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[list[int]]:
    """Collects the sizes of what autograd saves beside the parameters."""
    parameters = {p.data_ptr() for p in model.parameters()}
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_gradients_are_those_of_plain_autograd(
    dtype: torch.dtype, tolerance: float, chunk: int, dropout: float
) -> None:
    x = torch.randn(2, 13, DIM, dtype=dtype)
    results = [
        gradients(stack.to(dtype), mean_stream(x)) for stack in mlp_stacks(4, dropout, chunk)
    ]
    assert_same(*results, tolerance)


def test_input_gradients_are_those_of_plain_autograd() -> None:
    found = []
    for stack in mlp_stacks(dropout=0.2):
        x1 = torch.linspace(-1, 1, 2 * 9 * DIM, dtype=torch.float64).view(2, 9, DIM)
        x2 = x1.cos()
        x1.requires_grad_(), x2.requires_grad_()
        torch.manual_seed(0)
        y1, y2 = stack.double()(x1, x2)
        (y1.sin().sum() + (y2**3).sum()).backward()
        found.append((x1.grad, x2.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-12)


def test_gradcheck() -> None:
    stack = ReversibleStack([(Mlp(), Mlp(0.0, 2))]).double()
    x1 = torch.randn(1, 3, DIM, dtype=torch.float64, requires_grad=True)
    x2 = torch.randn(1, 3, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stack, (x1, x2))


@pytest.mark.parametrize("length", [1, 2, 13, 37])
def test_lsh_layers_with_dropout(length: int) -> None:
    """HF draws another dropout mask in LSH layers' backward: 23 to 35% gradient error."""
    x = torch.randn(2, length, DIM, dtype=torch.float64)
    mask = torch.zeros(2, length, dtype=torch.bool)
    mask[1, (length + 1) // 2 :] = True
    results = [
        gradients(model, lambda model: model(x, key_padding_mask=mask))
        for model in reformers(dropout=0.1, attention_dropout=0.2)
    ]
    assert_same(*results, 1e-10)


@pytest.mark.parametrize("line", ["whole", "padded", "packed"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads_at_once", [1, 2])
def test_heads_in_turns_are_all_heads(heads_at_once: int, causal: bool, line: str) -> None:
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[1, 11:] = True
    x = torch.randn(2, 30, DIM, dtype=torch.float64)
    kwargs = {"key_padding_mask": mask} if line == "padded" else {}
    if line == "packed":
        x, kwargs = x.view(1, 60, DIM), {"cu_seqlens": [0, 20, 27, 47, 60]}
    fields = {"heads": 4, "causal": causal, "attention_out_bias": True}
    together = reformers(**fields)[1]
    in_turns = reformers(**fields, heads_at_once=heads_at_once)
    expected, reversible, plain = (
        gradients(model, lambda model: model(x, **kwargs)) for model in (together, *in_turns)
    )
    assert_same(reversible, plain, 1e-10)
    assert not torch.equal(plain[0], expected[0]), "the same sums, or by chance"
    torch.testing.assert_close(plain, expected, rtol=1e-10, atol=1e-11)


def test_heads_in_turns_with_dropout() -> None:
    x = torch.randn(2, 37, DIM, dtype=torch.float64)
    fields = {"heads": 4, "heads_at_once": 2, "dropout": 0.1, "attention_dropout": 0.2}
    models = reformers(**fields)
    assert_same(*(gradients(model, lambda model: model(x)) for model in models), 1e-10)

    # No two layers or groups of heads share a mask.
    calls = by_heads(models[0].config, models[0]._layer_kwargs(x, None, None))
    seeds = [
        part["dropout_seed"].item() for parts in calls for part in parts if "dropout_seed" in part
    ]
    assert len(set(seeds)) == len(seeds) == 2 * 3  # "full" draws from the global generator


def test_without_gradients_heads_go_together() -> None:
    x = torch.randn(1, 50, DIM)
    together, in_turns = (
        reformers(torch.float32, heads_at_once=heads_at_once)[0].eval() for heads_at_once in (0, 1)
    )
    with torch.no_grad():
        assert torch.equal(in_turns(x), together(x))


def test_lsh_layers_hash_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputed inputs differ by rounding; hashing them anew would now and then move a query."""
    calls = 0

    def counted(*args: object) -> Tensor:
        nonlocal calls
        calls += 1
        return lsh_hash(*args)

    lsh_hash = ops.lsh_hash
    monkeypatch.setattr(ops, "lsh_hash", counted)
    x = torch.randn(1, 150, DIM)
    results = [
        gradients(model, lambda model: model(x))
        for model in reformers(torch.float32, layers=("lsh",) * 4, n_buckets=32)
    ]
    assert calls == 4 + 4  # reversible and plain, forwards only
    assert_same(*results, 1e-4)


def test_replay_returns_what_the_forward_kept() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(DIM))
            self.kept: list[Tensor] = []
            self.replayed: list[Tensor] = []

        def forward(
            self, x: Tensor, step: Tensor | None = None
        ) -> tuple[Tensor, dict[str, Tensor]]:
            if step is None:
                step = torch.floor(1e6 * x.detach())
                self.kept.append(step)
            else:
                self.replayed.append(step)
            return self.scale * step * x, {"step": step}

    f = Quantised()
    stack = ReversibleStack([(f, Mlp()), (f, Mlp())])
    y1, _ = stack(torch.randn(1, 4, DIM))
    y1.sum().backward()
    assert len(f.kept) == len(f.replayed) == 2
    for kept, replayed in zip(f.kept, reversed(f.replayed), strict=True):
        assert torch.equal(kept, replayed)


@pytest.mark.parametrize("inside", [True, False], ids=["backward-inside", "backward-outside"])
def test_autocast(inside: bool) -> None:
    """HF and RP recompute outside autocast unless backward runs inside it."""
    x = torch.randn(2, 11, DIM)
    found, kinds = [], set()
    for stack in mlp_stacks(6):
        for module in stack.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda _m, _i, out: kinds.add(out.dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y1, y2 = stack(x)
            assert y1.dtype == y2.dtype == torch.float32
            if inside:
                (y1 * y2).sum().backward()
        if not inside:
            (y1 * y2).sum().backward()
        found.append((y1.detach(), {name: p.grad for name, p in stack.named_parameters()}))
    assert kinds == {torch.bfloat16}
    assert_same(*found, 2e-2)


def test_24_layers() -> None:
    """Float32 gradients as of plain autograd; bfloat16 autocast as near to float64 as that."""
    tokens = torch.randint(256, (2, 130))
    fields = {"dim": 64, "heads": 4, "layers": ("local", "lsh") * 12, "chunk_size": 16}

    def loss_gradients(reversible: bool, dtype: torch.dtype, autocast: bool) -> Tensor:
        torch.manual_seed(7)
        config = ReformerConfig(**fields, n_hashes=2, local_chunk_size=16, reversible=reversible)
        model = ReformerLM(config).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters()])

    def error(got: Tensor, expected: Tensor) -> float:
        return float((got - expected).norm() / expected.norm())

    exact = loss_gradients(False, torch.float64, False)
    reversible, plain = (loss_gradients(r, torch.float32, False) for r in (True, False))
    assert error(reversible, plain) < 1e-5
    assert error(reversible, exact) < 1e-5
    reversible, plain = (loss_gradients(r, torch.float32, True) for r in (True, False))
    assert error(reversible, exact) < 1.05 * error(plain, exact) < 0.5


def test_memory_does_not_grow_with_depth() -> None:
    x = torch.randn(1, 64, DIM)
    totals = []
    for depth in (1, 6):
        reversible, plain = mlp_stacks(depth)
        for stack in (reversible, plain):
            with saved_bytes(stack) as sizes:
                stack(x)
            totals.append(sum(sizes))
    shallow, shallow_plain, deep, deep_plain = totals
    assert shallow == deep == 2 * x.nbytes
    assert deep_plain > 5 * shallow_plain


def test_bytes_kept_per_token_and_lsh_layer() -> None:
    """The buckets, int16: 2 bytes a head and round."""
    fields = {"layers": ("lsh",) * 3, "heads": 2, "n_hashes": 4, "positions": "none"}
    model = reformers(torch.float32, **fields)[0]
    x = torch.randn(1, 128, DIM)
    with saved_bytes(model.layers) as sizes:
        model.layers(x, f_kwargs=[{"return_buckets": True}] * 3)
    assert sum(sizes) == 2 * x.nbytes + 3 * 128 * 2 * 4 * 2


class LiveBytes(TorchDispatchMode):
    """The peak of what operators return and is alive; their own workspaces do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self.add(leaf.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, key, storage.nbytes())

    def remove(self, key: int, nbytes: int) -> None:
        self.known.remove(key)
        self.now -= nbytes


def training_step(device: str, length: int, **fields: object) -> Callable[[], None]:
    defaults = {"layers": ("local", "lsh") * 2, "n_hashes": 2}
    model = ReformerLM(ReformerConfig(**{**defaults, **fields})).to(device)
    tokens = torch.randint(256, (1, length + 1), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()

    return step


@pytest.mark.parametrize(("heads_at_once", "layer"), [(0, 8 / 2), (2, 4.5 / 2)])
def test_peak_bytes_per_token(heads_at_once: int, layer: float) -> None:
    """Streams and their gradients, 4 times float32; in bfloat16 a local layer's queries, keys,
    values and output, and their gradients; rotary factors, half a float32. It was 16.7 times
    float32. With half of the heads at a time most is held where the layer is normalised again:
    three halves of gradients, and what the norm gives in float32 and bfloat16."""
    sizes = {"dim": 64, "heads": 4, "n_hashes": 1, "ff_chunk_size": 64, "loss_chunk_size": 64}
    sizes["heads_at_once"] = heads_at_once
    peaks = []
    for length in (2048, 4096):
        step = training_step("cpu", length, **sizes)
        with LiveBytes() as live:
            step()
        peaks.append(live.peak)
    assert (peaks[1] - peaks[0]) / 2048 < (4 + layer + 1 / 2 + 0.2) * 64 * 4


def test_positionwise_backward_is_by_chunks() -> None:
    """G's activations exist for one chunk at a time in the backward pass too."""
    longest = 0

    class Watch(Mlp):
        def part(self, x: Tensor) -> Tensor:
            nonlocal longest
            if torch.is_grad_enabled():
                longest = max(longest, x.shape[1])
            return super().part(x)

    stack = ReversibleStack([(Mlp(), Watch(positionwise_chunk_size=6))])
    y1, _ = stack(torch.randn(2, 20, DIM))
    y1.sum().backward()
    assert longest == 6


def test_several_forwards_before_a_backward() -> None:
    """HF and RP keep seeds and buckets on the modules: the second forward overwrites the first."""
    model, _ = reformers(dropout=0.3, attention_dropout=0.3)
    inputs = [torch.randn(1, 21, DIM, dtype=torch.float64) for _ in range(2)]
    start = model.hash_step.clone()

    torch.manual_seed(11)
    for x in inputs:
        model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.zero_grad()
    model.hash_step.copy_(start)
    torch.manual_seed(11)
    torch.stack([model(x).square().sum() for x in inputs]).sum().backward()
    got = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_parameter_gets_a_gradient_from_a_frozen_input(
    training: bool, dropout: float, length: int
) -> None:
    """HF and RP: silently none for a raw input; RP: none with layer dropout at short lengths."""
    tokens = torch.randint(256, (2, length))
    for model in reformers(dropout=dropout):
        model.train(training)
        model.embedding.weight.requires_grad_(False)
        model(tokens).pow(3).sum().backward()
        missing = [
            name
            for name, p in model.named_parameters()
            if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
        ]
        assert not missing


def test_frozen_parameters_stay_without_gradient() -> None:
    found = []
    x = torch.randn(1, 3, DIM)
    for stack in mlp_stacks(3):
        stack.blocks[1].f.requires_grad_(False)
        stack.blocks[2].g.up.requires_grad_(False)
        found.append(gradients(stack, mean_stream(x)))
    assert sum(grad is None for grad in found[0][1].values()) == 6 + 2
    assert_same(*found, 1e-4)


def test_a_wholly_frozen_stack_needs_no_graph() -> None:
    stack = mlp_stacks(2)[0].requires_grad_(False)
    y1, y2 = stack(torch.randn(1, 3, DIM))
    assert not y1.requires_grad
    assert not y2.requires_grad


def test_backward_in_eval_mode() -> None:
    x = torch.randn(1, 30, DIM, dtype=torch.float64)
    found = [gradients(model.eval(), lambda model: model(x)) for model in reformers(dropout=0.5)]
    assert_same(*found, 1e-10)


def test_backward_in_another_mode_is_refused() -> None:
    stack = mlp_stacks(1, dropout=0.5)[0]
    y1, _ = stack(torch.randn(1, 3, DIM))
    stack.eval()
    with pytest.raises(RuntimeError, match="ReversibleStack: expected backward in the mode"):
        y1.sum().backward()


@pytest.mark.parametrize("how", ["functional", "frozen"])
def test_backward_with_other_parameters_is_refused(how: str) -> None:
    """It would leave those of the forward without gradient."""
    stack, plain = mlp_stacks(depth=1)
    x = torch.randn(2, 3, DIM)
    if how == "frozen":
        y = sum(stack(x))
        stack.requires_grad_(False)
    else:
        given = {name: p.detach().clone().requires_grad_() for name, p in plain.named_parameters()}
        y = sum(torch.func.functional_call(plain, given, (x,)))
        y.sum().backward()
        assert all(p.grad is not None for p in given.values())
        y = sum(torch.func.functional_call(stack, given, (x,)))
    with pytest.raises(RuntimeError, match="expected backward with the parameters of its forward"):
        y.sum().backward()


def test_a_shared_layer_has_buckets_of_each_call() -> None:
    """RP's bucket cache, keyed by depth, would mix them up."""
    x = torch.randn(2, 30, DIM, dtype=torch.float64)
    kwargs = [{"hash_step": step, "return_buckets": True} for step in range(3)]
    results = []
    for reversible in (True, False):
        torch.manual_seed(3)
        block = reformers(layers=("lsh", "lsh"))[0].layers.blocks[0]
        pairs = [(block.f, block.g)]
        stack = ReversibleStack(pairs, schedule=[0] * 3, reversible=reversible).double()
        results.append(gradients(stack, lambda stack: sum(stack(x, f_kwargs=kwargs))))
    assert_same(*results, 1e-10)


class Shifted(Mlp):
    """An F with an argument of its own for each call."""

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        return super().forward(x + shift)


def written_out(
    calls: Sequence[ReversibleBlock], shifts: Sequence[float], x1: Tensor, x2: Tensor
) -> tuple[Tensor, Tensor]:
    """The network by its formula, one block after the other."""
    for block, shift in zip(calls, shifts, strict=True):
        x1 = x1 + block.f(x2, shift=shift)
        x2 = x2 + block.g(x1)
    return x1, x2


def stream_gradients(
    model: nn.Module, run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], length: int = 9
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """:func:`gradients`, with those of both input streams."""
    x1 = torch.linspace(-1, 1, 2 * length * DIM, dtype=torch.float64).view(2, length, DIM)
    x2 = x1.cos()
    x1.requires_grad_(), x2.requires_grad_()

    def both(_: nn.Module) -> Tensor:
        y1, y2 = run(x1, x2)
        return torch.stack([y1, 2 * y2])

    out, found = gradients(model, both)
    return out, {**found, "x1": x1.grad, "x2": x2.grad}


SCHEDULES = [[0] * 12, [0, 1, 0, 1, 0, 1], [0, 0, 0, 1, 1, 1], (1, 0, 1, 1)]


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_schedule_is_the_stack_written_out(schedule: Sequence[int], reversible: bool) -> None:
    """With tied modules: ALBERT's layers, or the Universal Transformer's."""
    pairs = [(Shifted(0.2), Mlp(0.2, 4)) for _ in range(max(schedule) + 1)]
    stack = ReversibleStack(pairs, schedule=schedule, reversible=reversible).double()
    tied = copy.deepcopy(stack)
    shifts = [0.1 * index for index in range(len(schedule))]
    f_kwargs = [{"shift": shift} for shift in shifts]
    found = [
        stream_gradients(stack, lambda x1, x2: stack(x1, x2, f_kwargs)),
        stream_gradients(
            tied, lambda x1, x2: written_out([tied.blocks[i] for i in schedule], shifts, x1, x2)
        ),
    ]
    assert all(grad.abs().max() > 0 for grad in found[1][1].values())
    assert_same(*found, 1e-10)


def test_a_scheduled_block_has_one_owner() -> None:
    """One name in the state dict, one input of the graph a parameter, whatever the calls."""
    once, often = (
        ReversibleStack([(Mlp(), Mlp()), (Mlp(), Mlp())], schedule=schedule)
        for schedule in (None, [0, 1] * 5)
    )
    assert list(often.state_dict()) == list(once.state_dict())
    often.load_state_dict(once.state_dict())
    y1, _ = often(torch.randn(1, 3, DIM))
    edges = [node.variable for node, _ in y1.grad_fn.next_functions if node is not None]
    assert list(map(id, edges)) == list(map(id, often.parameters()))


def test_memory_does_not_grow_with_calls() -> None:
    x = torch.randn(2, 64, DIM, requires_grad=True)
    saved, peaks = [], []
    for n_calls in (2, 24):
        stack = ReversibleStack([(Mlp(), Mlp())], schedule=[0] * n_calls, preserve_rng_state=False)
        with saved_bytes(stack) as sizes:
            stack(x)
        saved.append(sum(sizes))
        with LiveBytes() as live:
            sum(stack(x)).sum().backward()
        peaks.append(live.peak)
    assert saved == [2 * x.nbytes] * 2
    assert peaks[0] == peaks[1]


def test_a_schedule_may_be_set_anew() -> None:
    stack = ReversibleStack([(Mlp(), Mlp()), (Mlp(), Mlp())]).double()
    assert list(stack.schedule) == [0, 1]
    x = torch.randn(1, 3, DIM, dtype=torch.float64)
    expected = gradients(stack, mean_stream(x))
    y = mean_stream(x)(stack)
    stack.schedule = [1]
    stack.zero_grad()
    y.square().sum().backward()  # of the schedule of its forward
    assert_same((y, {name: p.grad for name, p in stack.named_parameters()}), expected, 1e-12)
    _, found = gradients(stack, mean_stream(x))
    assert all((grad is None) == name.startswith("blocks.0.") for name, grad in found.items())
    stack.schedule = None
    assert list(stack.schedule) == [0, 1]
    stack.schedule = []
    assert torch.equal(stack(x)[0], x)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([0, 2], "schedule of indices of 2 blocks, got 2"),
        ([-1], "schedule of indices of 2 blocks, got -1"),
        ([True], "schedule of indices of 2 blocks, got True"),
        ([0, 1.0], "schedule of indices of 2 blocks, got 1.0"),
        ("01", "schedule of indices of 2 blocks, got '0'"),
        (2, "schedule to be a sequence of block indices, got 2"),
        ({0, 1}, "schedule to be a sequence of block indices, got {0, 1}"),
    ],
    ids=str,
)
def test_bad_schedules(schedule: object, message: str) -> None:
    blocks = [(Mlp(), Mlp()), (Mlp(), Mlp())]
    whole = f"^{re.escape(f'ReversibleStack: expected {message}')}$"
    with pytest.raises(ValueError, match=whole):
        ReversibleStack(blocks, schedule=schedule)
    stack = ReversibleStack(blocks)
    with pytest.raises(ValueError, match=whole):
        stack.schedule = schedule
    assert list(stack.schedule) == [0, 1]


@pytest.mark.parametrize("reversible", [True, False])
def test_blocks_without_f_or_g(reversible: bool) -> None:
    """Sublayers alternate between the streams, so that each sees the one before it."""
    pairs = [(Mlp(), None), (Mlp(), None), (Mlp(), Mlp()), (None, Mlp()), (Mlp(), None)]
    schedule = [0, 1, 0, 2, 3, 4]
    stack = ReversibleStack(pairs, schedule=schedule, reversible=reversible).double()
    assert {name.split(".")[2] for name in stack.state_dict() if ".3." in name} == {"g"}
    tied = copy.deepcopy(stack)

    def alternate(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c, d, e = tied.blocks
        for odd, even in [(a.f, b.f), (a.f, c.f), (c.g, d.g)]:
            x1 = x1 + odd(x2)
            x2 = x2 + even(x1)
        return x1 + e.f(x2), x2

    assert_same(stream_gradients(stack, stack), stream_gradients(tied, alternate), 1e-10)

    message = "ReversibleBlock: expected F or G to be a module, got None for both"
    with pytest.raises(ValueError, match=f"^{message}$"):
        ReversibleStack([(Mlp(), Mlp()), (None, None)])
    message = "expected no f_kwargs for call 4, of a block without F, got ['shift']"
    with pytest.raises(ValueError, match=f"^ReversibleStack: {re.escape(message)}$"):
        stack(torch.zeros(1, 2, DIM).double(), f_kwargs=[{}, {}, {}, {}, {"shift": 1.0}, {}])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reversible", [True, False])
def test_taps(reversible: bool, dtype: torch.dtype) -> None:
    """What F reads, by call; the recomputation hands out nothing, and a tap may draw numbers."""
    pairs = [(Shifted(0.3), Mlp(0.3)), (Shifted(0.3), None)]
    stack = ReversibleStack(pairs, schedule=[0, 1, 0], reversible=reversible).to(dtype)
    read: list[Tensor] = []
    for block in stack.blocks:
        block.f.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0].detach()))
    taps: list[tuple[int, Tensor]] = []
    x = torch.randn(2, 7, DIM, dtype=dtype, requires_grad=True)
    expected = gradients(stack, lambda stack: sum(stack(x)))
    read.clear()
    got = gradients(stack, lambda stack: sum(stack(x, tap=lambda *tap: taps.append(tap))))
    assert_same(got, expected, 0.0)
    assert [index for index, _ in taps] == [0, 1, 2]
    for (_, tapped), inner in zip(taps, read[:3], strict=True):
        assert tapped.dtype == dtype
        assert not tapped.requires_grad
        assert torch.equal(tapped, inner)
    assert torch.equal(taps[0][1], x)
    assert not torch.equal(taps[1][1], taps[2][1])

    with torch.no_grad():
        stack(x, tap=lambda *tap: taps.append(tap))
    assert [index for index, _ in taps] == [0, 1, 2] * 2


def test_a_tap_that_draws_numbers() -> None:
    found = []
    for stack in mlp_stacks(3, dropout=0.3):
        x = torch.randn(1, 5, DIM, dtype=torch.float64)

        def run(stack: nn.Module, x: Tensor = x) -> Tensor:
            return sum(stack.double()(x, tap=lambda _index, _x: torch.rand(3)))

        torch.manual_seed(0)
        x.copy_(torch.randn(1, 5, DIM, dtype=torch.float64))
        found.append(gradients(stack, run))
    assert_same(*found, 1e-12)


def hooked_stacks(case: str) -> list[ReversibleStack]:
    """The same network reversible and plain, in the ways that parameters come."""
    pairs: list[tuple[nn.Module, nn.Module]] = [(Mlp(), Mlp(0.0, 4)), (Mlp(), Mlp())]
    schedule = [0, 1, 0] if case == "scheduled" else None
    if case == "tied":
        pairs[1][0].up.weight = pairs[0][1].up.weight
    elif case == "parametrised":
        nn.utils.parametrizations.weight_norm(pairs[0][0].up)
    elif case == "frozen":
        pairs[0][1].requires_grad_(False)
    elif case == "nested":

        class Inner(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stack = ReversibleStack([pairs[0]], schedule=[0, 0])

            def forward(self, x: Tensor) -> Tensor:
                return sum(self.stack(x))

        pairs = [(Inner(), pairs[1][1])]
    stack = ReversibleStack(pairs, schedule=schedule).double()
    plain = copy.deepcopy(stack)
    for module in plain.modules():
        if isinstance(module, ReversibleStack):
            module.reversible = False
    return [stack, plain]


@pytest.mark.parametrize(
    "case", ["ordinary", "scheduled", "tied", "parametrised", "frozen", "nested"]
)
def test_hooks_on_parameters_run_once(case: str) -> None:
    """On the whole gradient: torch.autograd.grad in the recomputation would run them on its
    part, and a hook that halves would halve twice."""
    found = []
    for stack in hooked_stacks(case):
        runs: Counter[str] = Counter()
        steps: list[Tensor] = []
        parameters = {name: p for name, p in stack.named_parameters() if p.requires_grad}
        for name, p in parameters.items():
            p.register_hook(lambda _grad, count=runs.update, name=name: count([name]))
            p.register_hook(lambda grad: (grad / 2).tanh())  # not linear: on the sum alone
            p.register_post_accumulate_grad_hook(
                lambda _p, count=runs.update, name=name: count([f"{name}+"])
            )
        torch.autograd.graph.register_multi_grad_hook(
            list(parameters.values()), lambda grads, steps=steps: steps.append(len(grads))
        )
        removed = next(iter(parameters.values())).register_hook(torch.zeros_like)
        removed.remove()
        found.append(stream_gradients(stack, stack))
        assert runs == Counter({n: 1 for p in parameters for n in (p, f"{p}+")})
        assert steps == [len(parameters)]
    assert_same(*found, 1e-10)


def test_hooks_stay_after_a_failed_backward() -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, dy: Tensor) -> Tensor:
            raise ArithmeticError("on purpose")

    class Unlucky(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return Fails.apply(super().forward(x))

    stack = ReversibleStack([(Unlucky(), Mlp())])
    weight = stack.blocks[0].f.up.weight
    weight.register_hook(lambda grad: 0 * grad)
    y1, _ = stack(torch.randn(1, 3, DIM))
    with pytest.raises(ArithmeticError, match="on purpose"):
        y1.sum().backward()
    weight.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_full_backward_hooks_on_modules() -> None:
    """What they see and change is as in the plain stack, once a call."""
    found, seen = [], []
    for stack in hooked_stacks("scheduled"):
        grads: list[Tensor] = []

        def halve(_module: nn.Module, inputs: object, outputs: object, grads=grads) -> object:
            grads.extend(grad.clone() for grad in (*inputs, *outputs))
            return tuple(grad / 2 for grad in inputs)

        stack.blocks[0].f.register_full_backward_hook(halve)
        stack.blocks[1].g.up.register_full_backward_hook(halve)
        found.append(stream_gradients(stack, stack))
        seen.append(grads)
    assert_same(*found, 1e-10)
    assert len(seen[0]) == 2 * 3
    torch.testing.assert_close(*seen, rtol=1e-10, atol=1e-12)


def test_gradients_that_are_the_streams_gradient() -> None:
    """A sum's gradient is its terms', the very same tensor: the streams' own changes later."""

    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(1, 5, DIM))
            self.b = nn.Parameter(torch.randn(1, 5, DIM))

        def forward(self, x: Tensor) -> Tensor:
            return x + (self.a + self.b)

    blocks = [(Offset(), Mlp()), (Offset(), Offset())]
    stacks = [ReversibleStack(blocks), ReversibleStack(copy.deepcopy(blocks), reversible=False)]
    x = torch.randn(1, 5, DIM, dtype=torch.float64)
    assert_same(*(gradients(stack.double(), mean_stream(x)) for stack in stacks), 1e-12)


def test_the_users_streams_and_gradients_stay() -> None:
    stack = mlp_stacks(2)[0]
    streams = stack(torch.randn(1, 3, DIM))
    given = [torch.randn(1, 3, DIM) for _ in streams]
    before = [tensor.detach().clone() for tensor in (*streams, *given)]
    torch.autograd.backward(streams, given)
    for now, then in zip((*streams, *given), before, strict=True):
        assert torch.equal(now, then)


def test_global_generator_is_left_alone() -> None:
    x = torch.randn(1, 12, DIM, dtype=torch.float64)
    after = []
    for model in reformers(dropout=0.4, attention_dropout=0.1):
        torch.manual_seed(0)
        out = model(x).sum()
        after.append(torch.get_rng_state())
        out.backward()
        assert torch.equal(torch.get_rng_state(), after[-1]), "backward moved the generator"
    assert torch.equal(*after), "reversible and plain forwards draw differently"

    model = reformers()[0]
    state = torch.get_rng_state()
    model(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), state), "hashing drew a number"


def test_gradients_accumulate_and_graphs_are_retained() -> None:
    stack = mlp_stacks(2, dropout=0.2)[0].double()
    loss = mean_stream(torch.randn(1, 5, DIM, dtype=torch.float64))(stack).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in stack.parameters()]
    loss.backward()
    for first, p in zip(once, stack.parameters(), strict=True):
        torch.testing.assert_close(p.grad, 2 * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_parameter_changed_before_backward_is_refused() -> None:
    stack = mlp_stacks(1)[0]
    y1, _ = stack(torch.randn(1, 3, DIM))
    with torch.no_grad():
        stack.blocks[0].f.up.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y1.sum().backward()


def test_no_grad_forward_is_the_same() -> None:
    stack = mlp_stacks(2)[0]
    x = torch.randn(1, 3, DIM)
    expected = stack(x)
    with torch.no_grad():
        got = stack(x)
    torch.testing.assert_close(got, tuple(y.detach() for y in expected), rtol=0, atol=0)
    with torch.inference_mode():
        assert torch.equal(stack(x)[0], got[0])


def test_half_precision_streams_are_float32() -> None:
    """200 steps of 1/512 vanish one by one beside 1 in bfloat16."""

    class Step(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype == torch.bfloat16
            return torch.full_like(x, 1 / 512)

    y1, _ = ReversibleStack([(Step(), Step())] * 200)(torch.ones(1, 1, 1, dtype=torch.bfloat16))
    assert y1.dtype == torch.bfloat16
    assert y1.item() == pytest.approx(1 + 200 / 512, rel=2**-8)


def test_empty_stack_is_the_identity() -> None:
    x = torch.randn(1, 2, DIM, requires_grad=True)
    y1, y2 = ReversibleStack([])(x)
    assert torch.equal(y1, x)
    assert torch.equal(y2, x)


def test_bad_arguments() -> None:
    stack = mlp_stacks(2)[0]
    x = torch.randn(1, 2, DIM)
    with pytest.raises(ValueError, match=r"f_kwargs for each of 2 calls of a block, got 1$"):
        stack(x, f_kwargs=[{}])
    with pytest.raises(ValueError, match="got bias that requires grad"):
        stack(x, f_kwargs=[{}, {"bias": (torch.ones(1, requires_grad=True),)}])


def test_double_backward_is_refused() -> None:
    stack = mlp_stacks(1)[0]
    x = torch.randn(1, 2, DIM, requires_grad=True)
    (dx,) = torch.autograd.grad(stack(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_compiled_blocks_train() -> None:
    x = torch.randn(2, 24, DIM, dtype=torch.float64)
    torch._dynamo.reset()
    reversible, plain = reformers(layers=("local", "lsh"), dropout=0.0, ff_chunk_size=0)
    for block in reversible.layers.blocks:
        block.f.compile(backend="aot_eager", fullgraph=True)
        block.g.compile(backend="aot_eager", fullgraph=True)
    found = [gradients(model, lambda model: model(x)) for model in (reversible, plain)]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_blocks_repeat_their_dropout(backend: str) -> None:
    """The gradient along a line against a difference of two losses: the recomputation is another
    graph than the forward, and must draw the same masks."""
    torch._dynamo.reset()
    options = {"dropout": 0.2, "ff_dropout": 0.2, "attention_dropout": 0.2, "ff_chunk_size": 0}
    model = reformers(layers=("local",), **options)[0]
    for block in model.layers.blocks:
        block.f.compile(backend="aot_eager", fullgraph=True)
        block.g.compile(backend=backend, fullgraph=True)
    tokens = torch.randint(256, (2, 24))
    direction = [torch.randn_like(parameter) for parameter in model.parameters()]

    def loss() -> Tensor:
        torch.manual_seed(5)
        return model(tokens).sin().sum()

    loss().backward()
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), direction, strict=True))
    ends = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for parameter, d in zip(model.parameters(), direction, strict=True):
                parameter.add_(d, alpha=step)
        ends.append(loss().item())
    torch.testing.assert_close(slope.item(), (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-4)


def test_whole_model_compiles_around_the_stack() -> None:
    tokens = torch.randint(256, (1, 24))
    torch._dynamo.reset()
    reversible, plain = reformers(layers=("local", "lsh"))
    compiled = torch.compile(reversible, backend="aot_eager")
    expected = gradients(plain, lambda model: model(tokens))
    compiled(tokens).square().sum().backward()
    got = {name: p.grad for name, p in reversible.named_parameters()}
    torch.testing.assert_close(got, expected[1], rtol=1e-9, atol=1e-11)


def _two_ranks(job: str, folder: Path) -> str:
    """Runs both ranks of data_parallel.py; what they complained of, or nothing. Never hangs."""
    script = Path(__file__).with_name("data_parallel.py")
    tested = str(Path(reformer_ext.__file__).parents[1])  # not another that is installed
    processes = [
        subprocess.Popen(
            [sys.executable, script, job, str(rank), folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": tested},
            text=True,
        )
        for rank in range(2)
    ]
    complaints = ""
    for process in processes:
        try:
            printed, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            printed, _ = process.communicate()
            printed += f"{job}: no end after two minutes"
        complaints += printed if process.returncode != 0 else ""
    return complaints


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> None:
    if _two_ranks("probe", tmp_path_factory.mktemp("probe")):
        pytest.skip("torch's gloo cannot connect two processes of this machine")


@pytest.mark.usefixtures("two_processes")
def test_sharding_single_blocks_is_refused(tmp_path: Path) -> None:
    """Its parameters would silently get no gradient."""
    complaints = _two_ranks("sharded_blocks", tmp_path)
    assert not complaints, complaints


@pytest.mark.usefixtures("two_processes")
@pytest.mark.parametrize(
    "job",
    [kind + of for kind in ("replicated", "sharded") for of in ("", "_repeat", "_schedule")],
)
def test_two_processes(job: str, tmp_path: Path) -> None:
    """DDP and FSDP2: the mean gradient of the batch, accumulated, tied embeddings and blocks that
    are called several times included; under DDP each parameter's hook runs once."""
    complaints = _two_ranks(job, tmp_path)
    assert not complaints, complaints
    model, tokens = data_parallel.case(job)
    data_parallel.stack_of(model).reversible = False
    if job.startswith("replicated"):
        data_parallel.halve_gradients(model)
    for _ in range(2):
        model.zero_grad()
        model(tokens[:, :13]).square().mean().backward()
        model(tokens).square().mean().backward()
    expected = [p.grad for p in model.parameters()]
    for rank in range(2):
        got = torch.load(tmp_path / f"{job}-{rank}.pt", weights_only=True)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dropout_and_autocast_on_cuda() -> None:
    fields = {
        "layers": ("local", "lsh"),
        "dim": 64,
        "heads": 2,
        "dropout": 0.2,
        "attention_dropout": 0.2,
    }
    x = torch.randn(2, 300, 64, device="cuda")
    found = []
    for model in reformers(torch.float32, **fields):
        model.cuda()
        torch.manual_seed(1)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = model(x)
        state = torch.cuda.get_rng_state()
        out.square().sum().backward()
        assert torch.equal(torch.cuda.get_rng_state(), state)
        found.append((out.detach(), {name: p.grad for name, p in model.named_parameters()}))
    assert_same(*found, 2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("heads_at_once", "limit"), [(0, 9.5), (8, 7.2)])
def test_peak_bytes_per_token_on_cuda(heads_at_once: int, limit: float) -> None:
    """As on the CPU, and the workspace of one head of sixteen. It was 14 times float32."""
    sizes = {"dim": 1024, "heads": 16, "heads_at_once": heads_at_once, "ff_chunk_size": 1024}
    workspace_limit = ops.workspace_limit()
    ops.set_workspace_limit(0)
    peaks = []
    try:
        for length in (16384, 32768):
            step = training_step("cuda", length, **sizes)
            torch.cuda.reset_peak_memory_stats()
            step()
            peaks.append(torch.cuda.max_memory_allocated())
            del step
    finally:
        ops.set_workspace_limit(workspace_limit)
    assert (peaks[1] - peaks[0]) / 16384 < limit * 1024 * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_step_in_a_cuda_graph() -> None:
    """Without module dropout nothing reads a generator's state, and hashing needs no host."""
    fields = {"layers": ("local", "lsh"), "dim": 64, "heads": 2, "attention_dropout": 0.1}
    model = reformers(torch.float32, **fields)[0].cuda()
    x = torch.randn(1, 256, 64, device="cuda")

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            loss = model(x).square().sum()
        loss.backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    weight = model.layers.blocks[1].f.attention.in_proj.weight
    found = []
    for _ in range(2):
        graph.replay()
        found.append(weight.grad.clone())
    torch.cuda.synchronize()
    assert all(grad.isfinite().all() for grad in found)
    assert not torch.equal(*found), "the hash and the dropout stood still"

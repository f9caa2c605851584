"""Reversible residual layers (Reformer, section 3): activations are recomputed, not stored.

``y1 = x1 + F(x2)``, ``y2 = x2 + G(y1)`` is undone by ``x2 = y2 - G(y1)``, ``x1 = y1 - F(x2)``: one
backward pass needs the final streams only, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["ReversibleBlock", "ReversibleStack"]


class ReversibleBlock(nn.Module):
    """One pair (F, G) of a :class:`ReversibleStack`; each maps ``(B, L, dim)`` to the same
    shape. One of them may be None.

    Raises:
        ValueError: both are None.
    """

    f: nn.Module | None
    g: nn.Module | None

    def __init__(self, f: nn.Module | None, g: nn.Module | None) -> None:
        super().__init__()
        if f is None and g is None:
            raise ValueError("ReversibleBlock: expected F or G to be a module, got None for both")
        self.register_module("f", f)
        self.register_module("g", g)


class ReversibleStack(nn.Module):
    """A stack of reversible blocks; the memory of its backward pass does not grow with depth.

    The streams are at least float32, also under autocast and for half-precision inputs: what is
    recomputed by subtraction is then as good as what was stored. Parameters get their gradients
    whether or not the input needs one. The recomputation runs in the forward's autocast state,
    with the forward's random numbers, and leaves the global generators alone; nothing is kept on
    the modules, so several forwards may precede a backward. FSDP2 may shard the stack or what is
    around it, but not its blocks one by one. Hooks on parameters run as under plain autograd: once
    a backward, on the whole gradient. Hooks inside F and G run too, but what they are given changes
    later: they clone what they keep.

    A block may be called more than once, with the same weights: ``schedule=[0] * 12`` is an ALBERT
    of 12 layers. The weights are saved under one name, and memory is that of one call.

    Each F and G reads the stream that was added to last, at first ``x2``, and adds to the other: F
    of the next block reads what G of this one added to or, in a block without G, what F did.

    F or G may

    * return ``(output, replay)`` instead of the output: ``replay`` is a dict of tensors that the
      recomputation passes back as keyword arguments. A hash returns its buckets there, since the
      recomputed input differs from the original by rounding and could fall into another one;
    * have an attribute ``positionwise_chunk_size``: a module that acts on each position alone,
      over at most that many at a time (0: all). Its backward pass then runs chunk by chunk too.

    Args:
        blocks: pairs (F, G) of modules; one of a pair may be None.
        schedule: for each call of a block, its index; default each block once, in order. Also an
            attribute, to be set between forward passes.
        reversible: False runs the same network, to the same numbers, under plain autograd.
        preserve_rng_state: give the recomputation the forward's random numbers. May be False if no
            F or G draws from torch's global generators; then the training step can be captured in
            a CUDA graph.

    Raises:
        ValueError: a pair is of two None, or schedule is not a sequence of indices of blocks.
    """

    def __init__(
        self,
        blocks: Iterable[tuple[nn.Module | None, nn.Module | None]],
        *,
        schedule: Sequence[int] | None = None,
        reversible: bool = True,
        preserve_rng_state: bool = True,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ReversibleBlock(f, g) for f, g in blocks)
        self.schedule = schedule
        self.reversible = reversible
        self.preserve_rng_state = preserve_rng_state

    @property
    def schedule(self) -> Sequence[int]:
        """For each call of a block, its index."""
        return range(len(self.blocks)) if self._schedule is None else self._schedule

    @schedule.setter
    def schedule(self, schedule: Sequence[int] | None) -> None:
        indices = range(len(self.blocks))
        if schedule is not None:
            if not isinstance(schedule, Sequence):
                raise ValueError(
                    "ReversibleStack: expected schedule to be a sequence of block indices, got "
                    f"{schedule!r}"
                )
            for index in schedule:
                if type(index) is not int or index not in indices:
                    raise ValueError(
                        f"ReversibleStack: expected schedule of indices of {len(indices)} blocks, "
                        f"got {index!r}"
                    )
        self._schedule = None if schedule is None else tuple(schedule)

    def forward(
        self,
        x1: Tensor,
        x2: Tensor | None = None,
        f_kwargs: Sequence[Mapping[str, Any] | Sequence[Mapping[str, Any]]] | None = None,
        context: Mapping[str, Tensor] | None = None,
        tap: Callable[[int, Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs the blocks, as scheduled.

        Args:
            x1: ``(B, L, dim)``.
            x2: the same shape; default ``x1``.
            f_kwargs: for each call of a block the keyword arguments of its F, or several: the block
                then adds what F gives for each, ``y1 = x1 + F(x2, **first) + F(x2, **second) ...``,
                and holds the activations of one at a time. Tensors among them get no gradient.
            context: keyword tensors for the F of every block, as the encoder's output that each
                layer of a decoder attends to. They are kept once for all blocks, and their
                gradient is one sum over the blocks: what made them is back-propagated once.
            tap: called in the forward pass, not in the recomputation, as ``tap(index, x)`` before
                each call of a block: its index in the schedule, and what its F reads, detached,
                ``(B, L, dim)`` in the dtype of x1. It may keep x, not change it. For memories of
                earlier segments (Transformer-XL), diagnostics, distillation.

        Returns:
            ``y1, y2``, shape and dtype as ``x1``.

        Raises:
            ValueError: f_kwargs has not one entry per call of a block, one for a block without F,
                or a tensor that requires grad.
            RuntimeError: a block is sharded on its own; in backward, if a module's ``training``
                flag is not what it was, or its parameters are others (as after
                ``torch.func.functional_call``, which takes ``reversible=False``) or frozen.
        """
        dtype = x1.dtype
        stream_dtype = torch.promote_types(dtype, torch.float32)
        x1 = x1.to(stream_dtype)
        x2 = x1 if x2 is None else x2.to(stream_dtype)
        schedule = self.schedule
        if f_kwargs is None:
            f_kwargs = [{}] * len(schedule)
        context = context or {}
        if len(f_kwargs) != len(schedule):
            raise ValueError(
                f"ReversibleStack: expected f_kwargs for each of {len(schedule)} calls of a block, "
                f"got {len(f_kwargs)}"
            )
        calls: list[_Call] = []
        source, target = 1, 0
        for index, kwargs in enumerate(f_kwargs):
            block = self.blocks[schedule[index]]
            assert isinstance(block, ReversibleBlock)
            first = len(calls)
            terms = [kwargs] if isinstance(kwargs, Mapping) else kwargs
            if block.f is not None:
                names = tuple(context)
                calls += [_Call(block.f, term, dtype, source, target, names) for term in terms]
                source, target = target, source
            elif any(terms):
                raise ValueError(
                    f"ReversibleStack: expected no f_kwargs for call {index}, of a block without "
                    f"F, got {sorted({name for term in terms for name in term})}"
                )
            if block.g is not None:
                calls.append(_Call(block.g, {}, dtype, source, target))
                source, target = target, source
            if tap is not None and len(calls) > first:
                calls[first].tap = partial(tap, index)
        # A compiled or exported inference graph has no use for the Function, which dynamo cannot
        # trace.
        plain = not self.reversible or (torch.compiler.is_compiling() and not self.training)
        if plain or not torch.is_grad_enabled():
            streams = [x1, x2]
            del x1, x2
            for call in calls:
                call.show(streams[call.source])
                y = call(streams[call.source], **call.pick(context))[0]
                streams[call.target] = streams[call.target] + y
                del y
            x1, x2 = streams
        else:
            x1, x2 = self._apply_reversible(calls, x1, x2, context)
        return x1.to(dtype), x2.to(dtype)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _apply_reversible(
        self, calls: list[_Call], x1: Tensor, x2: Tensor, context: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        for call in calls:
            for name, value in call.kwargs.items():
                if any(leaf.requires_grad for leaf in _tensors(value)):
                    raise ValueError(
                        f"ReversibleStack: expected f_kwargs without gradient, got {name} that "
                        "requires grad (pass it as context, or make it a parameter of F)"
                    )
        run = _Run(calls, self, x1.device, self.preserve_rng_state, tuple(context))
        if not calls:
            return x1, x2
        streams: tuple[Tensor, Tensor] = _Reversible.apply(  # type: ignore[no-untyped-call]
            run, x1, x2, *context.values(), *run.parameters
        )
        if streams[0].grad_fn is not None:
            streams[0].grad_fn.register_prehook(run.take_gradients)
        return streams


@dataclass
class _Call:
    """One call of an F or a G, and what its repetition needs beside the input."""

    module: nn.Module
    kwargs: Mapping[str, Any]
    dtype: torch.dtype  # that the module works in; the streams may be wider
    source: int  # the stream, 0 or 1, that the module reads
    target: int  # the one that it is added to
    context: tuple[str, ...] = ()
    tap: Callable[[Tensor], None] | None = None
    replay: tuple[str, ...] = ()
    rng: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Tensor, **tensors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """With the context, and in the recomputation the replay."""
        result = self.module(x.to(self.dtype), **self.kwargs, **tensors)
        return (result, {}) if isinstance(result, Tensor) else result

    def show(self, x: Tensor) -> None:
        """To the tap, if there is one."""
        if self.tap is not None:
            self.tap(x.detach().to(self.dtype))

    def pick(self, context: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the module gets of it."""
        return {name: context[name] for name in self.context}

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]


class _Run:
    """One forward pass of a stack: its calls and the state they ran in."""

    def __init__(
        self,
        calls: list[_Call],
        stack: nn.Module,
        device: torch.device,
        preserve_rng_state: bool,
        context: tuple[str, ...],
    ) -> None:
        self.calls = calls
        self.stack = stack
        self.device = device
        self.preserve_rng_state = preserve_rng_state
        self.context = context
        self.incoming: tuple[Tensor | None, ...] | None = None
        self.parameters = self.current_parameters()
        if any(_is_sharded(p) for p in self.parameters):  # would get no gradient
            raise RuntimeError(
                "ReversibleStack: expected whole parameters, got sharded ones; apply fully_shard "
                "to the stack, not to its blocks"
            )
        self.training = [module.training for module in stack.modules()]
        self.autocast_state = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in dict.fromkeys(("cpu", device.type))
            if torch.amp.is_autocast_available(kind)  # not on the meta device
        ]

    def current_parameters(self) -> list[nn.Parameter]:
        """Those of all calls that require grad, each once."""
        return list(dict.fromkeys(p for call in self.calls for p in call.parameters()))

    def take_gradients(self, incoming: tuple[Tensor | None, ...]) -> tuple[None, ...] | None:
        """Before the backward: the engine would hold on to what it passes until the end. It must
        pass what has a gradient itself, for double backward to be refused."""
        if any(dy is not None and dy.requires_grad for dy in incoming):
            self.incoming = None
            return None
        self.incoming = incoming
        return (None,) * len(incoming)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The forward's autocast state. Uncached: where torch's cache ignores the grad mode, the
        weights that the forward casts without gradient would reach the recomputation."""
        with ExitStack() as stack:
            for kind, enabled, dtype in self.autocast_state:
                stack.enter_context(
                    torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=False)
                )
            yield

    def rng_state(self) -> list[Tensor]:
        if not self.preserve_rng_state:
            return []
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return states

    def set_rng_state(self, states: list[Tensor]) -> None:
        if states:
            torch.set_rng_state(states[0])
            for state in states[1:]:
                torch.cuda.set_rng_state(state, self.device)

    @contextmanager
    def fork_rng(self) -> Iterator[None]:
        """Leaves the global generators as they were found."""
        states = self.rng_state()
        try:
            yield
        finally:
            self.set_rng_state(states)


class _Reversible(torch.autograd.Function):
    """Saves the final streams, the context and the replays. The parameters are inputs, so that they
    get gradients through the engine (hooks, DistributedDataParallel, accumulation) even if the
    streams need none; saving them makes autograd refuse a backward after they were changed in
    place."""

    @staticmethod
    def forward(
        ctx: Any, run: _Run, x1: Tensor, x2: Tensor, *context_and_parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        context = dict(zip(run.context, context_and_parameters, strict=False))
        kept: list[Tensor] = []
        streams = [x1, x2]
        del x1, x2
        with run.autocast():
            for call in run.calls:
                call.show(streams[call.source])
                call.rng = run.rng_state()
                y, replay = call(streams[call.source], **call.pick(context))
                streams[call.target] = streams[call.target] + y
                del y
                call.replay = tuple(replay)
                kept.extend(replay.values())
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*streams, *context_and_parameters, *kept)
        return streams[0], streams[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy1: Tensor | None, dy2: Tensor | None) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        incoming, run.incoming = list(run.incoming or (dy1, dy2)), None
        if run.training != [module.training for module in run.stack.modules()]:
            raise RuntimeError(
                "ReversibleStack: expected backward in the mode of its forward (train or eval), "
                "got modules switched in between, which would recompute another function"
            )
        if list(map(id, run.current_parameters())) != list(map(id, run.parameters)):
            raise RuntimeError(
                "ReversibleStack: expected backward with the parameters of its forward, got "
                "others, or frozen ones, which would get no gradient"
            )
        saved = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # now, not at the end, unless the graph is retained
        # To be changed in place: the final streams are the user's, and so may be their gradients.
        y = [saved.pop(0).clone() for _ in range(2)]
        dy = [torch.zeros_like(y[0]) if d is None else d.clone() for d in incoming]
        del incoming
        context = dict(zip(run.context, saved, strict=False))
        kept = saved[len(run.context) + len(run.parameters) :]
        del saved
        gradients: dict[str | nn.Parameter, Tensor] = {}  # by name of the context's, or parameter

        def undo(call: _Call) -> None:
            """Takes ``module(y[source])`` off ``y[target]``, and adds to ``dy[source]`` what
            ``dy[target]`` at the module's output is at its input."""
            source, target = call.source, call.target
            run.set_rng_state(call.rng)
            split = len(kept) - len(call.replay)
            replay = dict(zip(call.replay, kept[split:], strict=True))
            del kept[split:]
            leaves = {
                name: given.detach().requires_grad_(given.requires_grad)
                for name, given in call.pick(context).items()
            }
            inputs: dict[str | nn.Parameter, Tensor] = {
                name: leaf for name, leaf in leaves.items() if leaf.requires_grad
            }
            parameters = call.parameters()
            inputs.update(zip(parameters, parameters, strict=True))
            size = getattr(call.module, "positionwise_chunk_size", 0) or y[source].shape[1]
            streams = y[source], y[target], dy[source], dy[target]
            parts = zip(*(torch.split(stream, size, 1) for stream in streams), strict=True)
            for x, total, dx, dtotal in parts:
                x = x.detach().requires_grad_()
                with torch.enable_grad(), run.autocast():
                    output = call(x, **leaves, **replay)[0]
                    root: Tensor = _Widened.apply(  # type: ignore[no-untyped-call]
                        output, dtotal.dtype
                    )
                total -= output.detach()
                del output  # memory that the gradients need
                if not root.requires_grad:
                    continue
                with _without_hooks(parameters):
                    found, *others = torch.autograd.grad(
                        root, [x, *inputs.values()], dtotal, allow_unused=True
                    )
                if found is not None:
                    dx += found
                for key, gradient in zip(inputs, others, strict=True):
                    if gradient is None:
                        continue
                    if _share_memory(gradient, dtotal):  # which changes later
                        gradient = gradient.clone()
                    # Not in place: two parameters may have one gradient.
                    known = gradients.get(key)
                    gradients[key] = gradient if known is None else known + gradient

        with run.fork_rng():
            for call in reversed(run.calls):
                undo(call)
        keys: tuple[str | nn.Parameter, ...] = (*run.context, *run.parameters)
        return None, *dy, *(gradients.get(key) for key in keys)


class _Widened(torch.autograd.Function):
    """Stands for ``y`` in the dtype of its gradient: engine and caller hold the gradient that they
    start from, and this way no second one in the dtype of ``y``."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = y.dtype
        return y.new_zeros((), dtype=dtype).expand(y.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy.to(ctx.dtype), None


@contextmanager
def _without_hooks(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Without their tensor hooks: ``torch.autograd.grad`` would run them on its part of the
    gradient, and the engine, which gets the sum from the stack, runs them again on that. The engine
    cannot want them here: it reaches the parameters after the stack's backward."""
    hidden = [(hooks, dict(hooks)) for p in parameters if (hooks := p._backward_hooks)]
    try:
        for hooks, _ in hidden:
            hooks.clear()
        yield
    finally:
        for hooks, kept in hidden:
            new = dict(hooks)
            hooks.clear()
            hooks.update({**kept, **new})


def _is_sharded(parameter: nn.Parameter) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor  # half a second that few need

    return isinstance(parameter, DTensor)


def _share_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))

"""Times whole models: training, prefill and decoding, beside exact attention and transformers.

python -m benchmarks.models train --lengths 65536,262144,1048576 --json train.json --plot train
python -m benchmarks.models prefill --lengths 16384,131072,1048576 --json prefill.json
python -m benchmarks.models decode --lengths 1024,16384,131072,1048576 --json decode.json

train: forward, backward and AdamW on one sequence of random bytes, bf16 autocast on CUDA; tokens/s
and the peak of allocated memory. "compiled blocks", on CUDA, is the same model with torch.compile
on the halves of each block; "plain autograd" the same model, to the same numbers, with every
activation stored; "exact" is the same width and depth with plain residual layers, torch's
SDPA and activation checkpointing; "accelerated" is transformers' own model after
integrations.transformers.accelerate. prefill: the prompt of one sequence, into an empty cache.
decode: one token for one sequence after so many, on a cache filled with random numbers, in a CUDA
graph on CUDA. In both, "exact" keeps keys and values in full. A model that ran out of memory, or
whose step took longer than --longest-step, is not run at greater lengths. Before anything is timed,
small twins are checked: gradients against plain autograd, cached logits against a forward pass.
measure.py says how time and memory are taken.

The longest lengths want --heads-at-once, a divisor of --heads, for ours and, so that freed memory
is not lost between blocks of other sizes, PYTORCH_ALLOC_CONF=expandable_segments:True in the
environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reformer_ext.generate import autocast
from reformer_ext.integrations.transformers import accelerate
from reformer_ext.nn import (
    ChunkedFeedForward,
    DecodingCache,
    FullSelfAttention,
    ReformerConfig,
    ReformerLM,
    RotaryPositions,
    chunked_lm_loss,
)

from . import measure, plot, report
from .ops import comma_separated

Step = Callable[[], object]
Mode = Callable[[], AbstractContextManager[object]]
Row = dict[str, Any]
Model = TypeVar("Model", bound=nn.Module)


class ExactLM(nn.Module):
    """A plain Transformer: exact attention, every layer checkpointed."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.rotary = RotaryPositions(config.head_width)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                (
                    nn.LayerNorm(config.dim),
                    FullSelfAttention(config.dim, config.heads, causal=True),
                    nn.LayerNorm(config.dim),
                    ChunkedFeedForward(config.dim, config.ff_hidden),
                )
            )
            for _ in config.layers
        )
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        rotary = self.rotary(tokens.shape[1], tokens.device)

        def layer(
            x: Tensor, norm1: nn.Module, attention: nn.Module, norm2: nn.Module, ff
        ) -> Tensor:
            x = x + attention(norm1(x), rotary=rotary)
            return x + ff(norm2(x))

        for parts in self.layers:
            x = checkpoint(layer, x, *parts, use_reentrant=False)
        return chunked_lm_loss(self.norm(x), self.head.weight, None, targets)


def transformers_model(config: ReformerConfig, length: int, decoding: bool) -> nn.Module:
    """Its Reformer of the same sizes. Raises ImportError where it is not installed."""
    from transformers import ReformerConfig as TheirConfig
    from transformers import ReformerModelWithLMHead

    side = 1 << (length - 1).bit_length() // 2
    return ReformerModelWithLMHead(
        TheirConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            num_attention_heads=config.heads,
            attention_head_size=config.head_width,
            feed_forward_size=config.ff_hidden or 4 * config.dim,
            attn_layers=list(config.layers),
            num_hashes=config.n_hashes,
            lsh_attn_chunk_length=config.chunk_size,
            local_attn_chunk_length=config.local_chunk_size,
            axial_pos_shape=(side, -(-length // side)),
            axial_pos_embds_dim=(config.dim // 2, config.dim - config.dim // 2),
            max_position_embeddings=side * -(-length // side),
            is_decoder=True,
            use_cache=decoding,
            hidden_dropout_prob=0.0,
            local_attention_probs_dropout_prob=0.0,
        )
    )


def training_steps(
    config: ReformerConfig, length: int, device: torch.device
) -> Iterator[tuple[str, Callable[[], Step]]]:
    """Name and maker of a step by model; a maker raises if the model cannot run."""
    tokens = torch.randint(config.vocab_size, (1, length + 1), device=device)

    def step_of(
        model: nn.Module, loss_of: Callable[[nn.Module], Tensor], mode: Mode = nullcontext
    ) -> Step:
        model.to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            with autocast(device):
                loss = loss_of(model)
            with mode():
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def ours(model: nn.Module) -> Tensor:
        return model.loss(tokens[:, :-1], tokens[:, 1:])

    def theirs(model: nn.Module) -> Tensor:
        return model(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss

    def recomputing() -> AbstractContextManager[object]:
        # Transformers recomputes in the backward's mode, float32 without this. No cache: it would
        # hold weights cast without gradient.
        return torch.autocast(
            device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False
        )

    def transformers() -> nn.Module:
        return transformers_model(config, length, False)

    def compiled(model: ReformerLM) -> nn.Module:
        torch._dynamo.config.recompile_limit = 64  # with and without gradient, for each hash seed
        for block in model.reformer.layers.blocks:
            block.f.compile()
            block.g.compile()
        return model

    plain = dataclasses.replace(config, reversible=False, heads_at_once=0)
    yield "reformer_ext", lambda: step_of(ReformerLM(config), ours)
    if device.type == "cuda":
        yield "reformer_ext (compiled blocks)", lambda: step_of(compiled(ReformerLM(config)), ours)
    yield "reformer_ext (plain autograd)", lambda: step_of(ReformerLM(plain), ours)
    yield "exact (checkpointed)", lambda: step_of(ExactLM(config), ours)
    yield "transformers", lambda: step_of(transformers(), theirs, recomputing)
    yield (
        "transformers (accelerated)",
        lambda: step_of(accelerate(transformers()), theirs, recomputing),
    )


def full_attention(config: ReformerConfig) -> ReformerConfig:
    """The same sizes with exact attention in every layer."""
    return dataclasses.replace(config, layers=("full",) * len(config.layers))


def for_inference(model: Model, device: torch.device) -> Model:
    """The same model on the device, in evaluation mode; in bfloat16 on CUDA."""
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


def prefill_steps(
    config: ReformerConfig, length: int, device: torch.device
) -> Iterator[tuple[str, Callable[[], Step]]]:
    """As :func:`training_steps`, for reading a prompt of ``length`` tokens."""
    prompt = torch.randint(config.vocab_size, (1, length), device=device)

    def ours(config: ReformerConfig) -> Step:
        model = for_inference(ReformerLM(config), device)
        return torch.no_grad()(lambda: model(prompt, cache=model.new_cache(1, length)))

    def theirs(model: nn.Module) -> Step:
        for_inference(model, device)
        return torch.no_grad()(lambda: model(prompt, use_cache=True))

    def transformers() -> nn.Module:
        return transformers_model(config, length, True)

    yield "reformer_ext", lambda: ours(config)
    yield "exact (cached)", lambda: ours(full_attention(config))
    yield "transformers", lambda: theirs(transformers())
    yield "transformers (accelerated)", lambda: theirs(accelerate(transformers()))


def decoding_steps(
    config: ReformerConfig, length: int, device: torch.device
) -> Iterator[tuple[str, Callable[[], Step]]]:
    """As :func:`training_steps`, for a token after ``length`` of them."""
    token = torch.randint(config.vocab_size, (1, 1), device=device)

    def cached(config: ReformerConfig) -> Step:
        model = for_inference(ReformerLM(config), device)
        cache = model.new_cache(1, length + 1000)
        pretend(cache, length)

        def step() -> Tensor:
            with torch.no_grad():
                return model(token, cache=cache)

        return graphed(step, cache) if device.type == "cuda" else rewinding(step, cache)

    def theirs() -> Step:
        # Its cache grows step by step.
        model = for_inference(transformers_model(config, length + 1000, True), device)
        with torch.no_grad():
            prompt = torch.randint(config.vocab_size, (1, length), device=device)
            past = model(prompt, use_cache=True).past_buckets_states

        def step() -> None:
            with torch.no_grad():
                model(token, use_cache=True, past_buckets_states=past)

        return step

    yield "reformer_ext", lambda: cached(config)
    yield "exact (cached)", lambda: cached(full_attention(config))
    yield "transformers", theirs


def pretend(cache: DecodingCache, length: int) -> None:
    """As if ``length`` random tokens had been read: what a step costs does not depend on which."""
    for name, buffer in cache.named_buffers():
        if name.endswith(("keys", "values")):
            buffer.normal_()
        elif name.endswith("table"):
            buffer.random_(0, length)
        elif name.endswith(("counts", "lengths")):
            buffer.fill_(length)
    cache.used, cache.filled = length, True


def rewinding(step: Step, cache: DecodingCache) -> Step:
    """The same step over and over at one place."""
    length = cache.used

    def again() -> None:
        step()
        cache.lengths.fill_(length)
        cache.used = length

    return again


def graphed(step: Step, cache: DecodingCache) -> Step:
    """Its replay: positions go on, up to the capacity, as in generation."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


JOBS = {"train": training_steps, "prefill": prefill_steps, "decode": decoding_steps}


def check(device: torch.device) -> dict[str, float]:
    """Errors of small twins, relative to the largest value; exits if one is large."""
    fields = {"dim": 64, "heads": 2, "layers": ("local", "lsh"), "local_chunk_size": 16}
    tokens = torch.randint(256, (1, 200), device=device)
    gradients = []
    for reversible in (True, False):
        torch.manual_seed(0)
        model = ReformerLM(ReformerConfig(**fields, reversible=reversible)).to(device)
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    # In one chunk and within buckets a forward pass sees what decoding does.
    config = ReformerConfig(**fields, chunk_size=256, same_bucket=True, n_buckets=4)
    model = ReformerLM(config).to(device).eval()
    with torch.no_grad():
        expected = model(tokens)
        cache = model.new_cache(1, 200)
        got = torch.cat([model(part, cache=cache) for part in tokens.split(100, 1)], 1)
    errors = {
        "training gradient": _error(gradients[0], gradients[1]),
        "cached logits": _error(got, expected),
    }
    if not all(error < 1e-3 for error in errors.values()):
        raise SystemExit(f"benchmarks.models: wrong results, not timed: {errors}")
    return errors


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", choices=list(JOBS))
    parser.add_argument("--lengths", type=comma_separated(int), default="16384,65536")
    sizes = {"dim": 1024, "heads": 16, "pairs": 6, "n-hashes": 8, "ff-chunk-size": 16384}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--heads-at-once", type=int, default=0, help="in training, to save memory (default 0: all)"
    )
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=best)
    parser.add_argument("--models", type=comma_separated(str), help="names; default: all")
    parser.add_argument(
        "--longest-step",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="a model with a longer one is not run at greater lengths (default 60)",
    )
    parser.add_argument(
        "--kernels", action="store_true", help="of one step, longest first (CPU: operators)"
    )
    parser.add_argument(
        "--json", type=Path, help="write everything to this file, anew after each model"
    )
    parser.add_argument("--plot", type=Path, help="draw to this file; suffixes are added")
    return parser


def main() -> None:
    args = arguments().parse_args()
    device = torch.device(args.device)
    config = ReformerConfig(
        dim=args.dim,
        heads=args.heads,
        layers=("local", "lsh") * args.pairs,
        n_hashes=args.n_hashes,
        heads_at_once=args.heads_at_once,
        ff_chunk_size=args.ff_chunk_size,
    )
    lengths: dict[int, dict[str, Row]] = {}
    results: dict[str, Any] = {
        **measure.environment(args.device, "benchmarks.models"),
        "job": args.job,
        "config": dataclasses.asdict(config),
        "errors": check(device),
        "lengths": lengths,
    }
    stopped: dict[str, str] = {}  # why, by model
    for length in sorted(args.lengths):
        print(f"{args.job}, {length:,} tokens")
        rows = lengths[length] = {}
        for name, make in JOBS[args.job](config, length, device):
            if args.models and name not in args.models:
                continue
            row = {"skipped": stopped[name]} if name in stopped else timed(make, length, args)
            rows[name] = row
            if row.get("out_of_memory"):
                stopped[name] = f"out of memory at {length:,} tokens"
            elif row.get("ms", 0.0) > 1e3 * args.longest_step:
                stopped[name] = f"a step took {row['ms'] / 1e3:.0f} s at {length:,} tokens"
            print(f"  {name:32}{described(row, args.job)}", flush=True)
            for kernel, part in row.get("kernels", {}).items():
                print(f"    {part['ms']:10.4f} ms {part['calls']:4.0f} x {kernel[:90]}")
            if args.json:
                report.write(results, args.json)
    if args.plot:
        plot.draw_models([results], args.plot)


def described(row: Row, job: str) -> str:
    """A line of the table."""
    if "skipped" in row:
        return f" skipped: {row['skipped']}"
    speed = (
        f"{row['ms']:12.3f} ms a token"
        if job == "decode"
        else f"{row['tokens_per_s']:12,.0f} tokens/s"
    )
    launches = ""
    if "kernels" in row:
        launches = f"{sum(part['calls'] for part in row['kernels'].values()):8.0f} launches"
    return f"{speed}{row['gib']:9.2f} GiB{row['calls']:5} timed{launches}"


def timed(make: Callable[[], Step], length: int, args: argparse.Namespace) -> Row:
    """Milliseconds and tokens/s of a step, and GiB at its peak, parameters included."""
    step: Step | None = None
    try:
        step = make()
        row: Row = dict(measure.timed([step], args.device))
        if args.device == "cuda":
            row["gib"] = torch.cuda.max_memory_allocated() / 2**30
        else:
            row["gib"] = measure.resident("VmHWM") / 2**10
        if args.kernels:
            row["kernels"] = measure.kernels(step, args.device)
    except Exception as error:  # absent, too large, out of memory, a peer's own
        row = {"skipped": f"{error or type(error).__name__}".strip().splitlines()[0]}
        if isinstance(error, torch.OutOfMemoryError):
            row["out_of_memory"] = True
        return row
    finally:
        step = None
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    row["tokens_per_s"] = 1e3 * (1 if args.job == "decode" else length) / row["ms"]
    return row


if __name__ == "__main__":
    main()

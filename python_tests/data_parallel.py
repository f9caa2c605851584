"""One of two processes of a data-parallel step, as a script: ``data_parallel.py JOB RANK FOLDER``.

``probe`` only adds two numbers over the process group: it tells a machine where gloo does not work
from a defect of ours. The other jobs leave the rank's gradients in the folder: ``replicated`` under
DistributedDataParallel, two micro-batches accumulated; ``sharded`` under FSDP2; either with
``_repeat`` of a model that repeats its layers, or ``_schedule`` of a stack that calls its blocks
several times.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard

from reformer_ext.nn import ReformerConfig, ReformerLM, ReversibleStack


class Repeated(nn.Module):
    """Three blocks, one without G, called eight times."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 16)
        f, g = ([self.layer() for _ in range(3)] for _ in range(2))
        pairs = [(f[0], g[0]), (f[1], g[1]), (f[2], None)]
        self.layers = ReversibleStack(pairs, schedule=[0, 1, 2, 0, 1, 0, 0, 2])

    def layer(self) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh())

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.cat(self.layers(self.embedding(tokens)), dim=-1)


def case(job: str) -> tuple[nn.Module, Tensor]:
    """The job's model and the batch, one sequence a rank."""
    torch.manual_seed(0)
    tokens = torch.arange(2 * 30).view(2, 30) % 256
    if job.endswith("_schedule"):
        return Repeated().double(), tokens
    fields = {"dim": 16, "heads": 2, "layers": ("local", "lsh"), "n_hashes": 2, "chunk_size": 8}
    fields["repeat"] = 2 if job.endswith("_repeat") else 1
    config = ReformerConfig(**fields, local_chunk_size=8, tie_embeddings=True)
    return ReformerLM(config).double(), tokens


def stack_of(model: nn.Module) -> ReversibleStack:
    (stack,) = (module for module in model.modules() if isinstance(module, ReversibleStack))
    return stack


def halve_gradients(model: nn.Module) -> None:
    """By hooks, which must run once: on each rank's gradient, before their mean."""
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: grad / 2)


def replicated(job: str, rank: int) -> list[Tensor | None]:
    model, tokens = case(job)
    halve_gradients(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):  # the second step finds the reducer as the first left it
        wrapped.zero_grad()
        with wrapped.no_sync():
            wrapped(tokens[rank : rank + 1, :13]).square().mean().backward()
        wrapped(tokens[rank : rank + 1]).square().mean().backward()
    return [p.grad for p in model.parameters()]


def sharded(job: str, rank: int) -> list[Tensor]:
    model, tokens = case(job)
    # Around the stack, which recomputes its blocks in one backward: they are gathered together.
    fully_shard(stack_of(model))
    fully_shard(model)
    for _ in range(2):
        model.zero_grad()
        model(tokens[rank : rank + 1, :13]).square().mean().backward()
        model(tokens[rank : rank + 1]).square().mean().backward()
    return [p.grad.full_tensor() for p in model.parameters()]


def main(job: str, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the host name resolves to
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{job}-rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    if job == "probe":
        total = torch.ones(1)
        distributed.all_reduce(total)
        assert total.item() == 2
    else:
        torch.save(JOBS[job](job, rank), folder / f"{job}-{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def sharded_blocks(job: str, _rank: int) -> list[Tensor]:
    model, tokens = case(job)
    fully_shard(stack_of(model).blocks[0].f)
    with pytest.raises(RuntimeError, match="fully_shard to the stack, not to its blocks"):
        model(tokens)
    return []


JOBS = {
    "replicated": replicated,
    "replicated_repeat": replicated,
    "replicated_schedule": replicated,
    "sharded": sharded,
    "sharded_repeat": sharded,
    "sharded_schedule": sharded,
    "sharded_blocks": sharded_blocks,
}

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # not by the interpreter: a thread of gloo may outlive its group, which aborts then

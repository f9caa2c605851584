"""One of two processes of a data-parallel step, as a script: ``data_parallel.py JOB RANK FOLDER``.

``probe`` only adds two numbers over the process group: it tells a machine where gloo does not work
from a defect of ours. The other jobs leave the rank's gradients in the folder: ``replicated`` under
DistributedDataParallel, two micro-batches accumulated; ``sharded`` under FSDP2.
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

from reformer_ext.nn import ReformerConfig, ReformerLM


def case() -> tuple[ReformerLM, Tensor]:
    """The model and the batch, one sequence a rank."""
    torch.manual_seed(0)
    fields = {"dim": 16, "heads": 2, "layers": ("local", "lsh"), "n_hashes": 2, "chunk_size": 8}
    config = ReformerConfig(**fields, local_chunk_size=8, tie_embeddings=True)
    return ReformerLM(config).double(), torch.arange(2 * 30).view(2, 30) % 256


def replicated(rank: int) -> list[Tensor | None]:
    model, tokens = case()
    wrapped = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):  # the second step finds the reducer as the first left it
        wrapped.zero_grad()
        with wrapped.no_sync():
            wrapped(tokens[rank : rank + 1, :13]).square().mean().backward()
        wrapped(tokens[rank : rank + 1]).square().mean().backward()
    return [p.grad for p in model.parameters()]


def sharded(rank: int) -> list[Tensor]:
    model, tokens = case()
    # Around the stack, which recomputes its blocks in one backward: they are gathered together.
    fully_shard(model.reformer.layers)
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
        torch.save(JOBS[job](rank), folder / f"{job}-{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def sharded_blocks(rank: int) -> list[Tensor]:
    model, tokens = case()
    fully_shard(model.reformer.layers.blocks[0].f)
    with pytest.raises(RuntimeError, match="fully_shard to the stack, not to its blocks"):
        model(tokens)
    return []


JOBS = {"replicated": replicated, "sharded": sharded, "sharded_blocks": sharded_blocks}

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # not by the interpreter: a thread of gloo may outlive its group, which aborts then

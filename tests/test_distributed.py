"""Training on two processes (gloo, CPU): gradients equal those of one process that sees both halves of the batch.

Run as a script, this file is one of the two processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from bcast_cases import small
from processes import free_port
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.checkpoint import checkpoint

import cast_kernels

CASE = small(batch=4, frames=2, patches=5, dim=32, bottleneck=16, heads=1)
BACKENDS = ["eager", "cpu"]
#: What the two processes do: the wrapper, and whether activations are checkpointed and products run under autocast.
MODES = ["ddp", "fsdp", "fsdp1", "fsdpeach", "ddp-checkpoint", "fsdp-autocast"]


class Exchange(nn.Module):
    """Two exchanges behind each other, as in two blocks of the model."""

    def __init__(self, backend: str, checkpointed: bool) -> None:
        super().__init__()
        self.first, self.second = CASE.module(backend=backend), CASE.module(backend=backend)
        self.checkpointed = checkpointed

    def forward(self, spatial: Tensor, temporal: Tensor) -> tuple[Tensor, Tensor]:
        for module in (self.first, self.second):
            if self.checkpointed:
                spatial, temporal = checkpoint(module, spatial, temporal, use_reentrant=False)
            else:
                spatial, temporal = module(spatial, temporal)
        return spatial, temporal


def gradients(module: nn.Module, spatial: Tensor, temporal: Tensor, autocast: bool) -> dict[str, Tensor]:
    """Of the mean square of both outputs over clips and everything else."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = module(spatial, temporal)
    sum(x.float().square().mean() for x in outputs).backward()
    if isinstance(module, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(module, with_grads=True):
            found = {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
    else:
        found = {name: p.grad for name, p in module.named_parameters()}
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in found.items() if x is not None}


def distances(mode: str, backend: str) -> dict[str, float]:
    """In one of the processes: each gradient's distance from the single process's, relative to its norm."""
    kind, _, extra = mode.partition("-")
    if kind == "fsdpeach" and backend == "cpu":
        backend = "auto"  # its layers must be called, which a kernel asked for by name refuses
    single, module = (Exchange(backend, extra == "checkpoint") for _ in range(2))
    wrapped: nn.Module
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(module)
    elif kind == "fsdp1":  # its parameters are views into a flat one, and plain tensors while it computes
        wrapped = FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))
    else:
        for child in module.children():
            if kind == "fsdpeach":  # hooks on layers inside: each has its weights only while it is called
                fully_shard(child.cross_s_down)
                fully_shard(child.t2s_cross)
            fully_shard(child)
        wrapped = fully_shard(module)
    spatial, temporal = CASE.inputs()
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    want = gradients(single, spatial, temporal, extra == "autocast")
    found = gradients(wrapped, spatial[half], temporal[half], extra == "autocast")
    found = {name.removeprefix("module.").removeprefix("_fsdp_wrapped_module."): x for name, x in found.items()}
    assert found.keys() == want.keys()
    return {name: float((found[name] - x).norm() / x.norm()) for name, x in want.items()}


@pytest.fixture(scope="module")
def found() -> list[dict[str, dict[str, float]]]:
    """What each of two processes found: mode and backend -> distances."""
    here = Path(__file__).parent
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__], env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        done = [process.communicate(timeout=300) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, (_, errors) in zip(ranks, done, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in done]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_equal_those_of_one_process(
    mode: str, backend: str, found: list[dict[str, dict[str, float]]]
) -> None:
    allowed = 0.02 if "autocast" in mode else 1e-5
    for rank in found:
        own = rank[f"{mode} {backend}"]
        assert len(own) == len(list(Exchange(backend, False).parameters()))
        assert all(distance < allowed for distance in own.values()), own


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing_changes_no_bit(backend: str, autocast: bool) -> None:
    inputs = CASE.inputs()
    plain, checkpointed = (gradients(Exchange(backend, on), *inputs, autocast) for on in (False, True))
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(checkpointed[name], x) for name, x in plain.items())


def test_checkpointing_keeps_the_streams_only() -> None:
    """Between the blocks; inside of them everything is computed again."""
    kept = []
    for on in (False, True):
        sizes: dict[int, int] = {}
        module = Exchange("cpu", on)
        module.first.recompute = module.second.recompute = cast_kernels.Recompute.NOTHING.value
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.update({x.data_ptr(): x.nbytes}), x)[1], lambda x: x
        ):
            module(*CASE.inputs(grad=True))
        kept.append(sum(sizes.values()))
    assert kept[1] < kept[0] / 2


if __name__ == "__main__":
    dist.init_process_group("gloo")
    print(json.dumps({f"{mode} {backend}": distances(mode, backend) for mode in MODES for backend in BACKENDS}))
    dist.destroy_process_group()
    # FSDP keeps the group's threads alive. One that asks for the GIL while the interpreter ends aborts the process:
    # seen once. What this process found is printed, so it leaves without an end of the interpreter.
    sys.stdout.flush()
    os._exit(0)

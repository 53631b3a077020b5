"""The model of the CUDA kernels as they are built, beside the launches that csrc/cuda makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_cases import needs_kernels
from ptx_emulator.cuda import run
from ptx_emulator.predict.devices import device

from cast_kernels import _native
from cast_kernels.evidence.cuda_launches import CudaLaunch, kept
from cast_kernels.evidence.cuda_model import built, launches, report
from cast_kernels.evidence.cuda_model.arithmetic import predict
from cast_kernels.evidence.cuda_model.problem import Sizes

BUILT = report.BUILT
PROCESSORS, CHEAP = 132, 1


def recorded(batch: int) -> dict[str, list[CudaLaunch]]:
    """The launches of both phases at the paper's size, bf16, on memory that is there."""
    cuda = _native.cuda()
    problem = cuda.Problem(batch, 8, 196, 768, 384, 12, 0, 1, "bf16", "bf16", "bf16", 1e-6)
    memory = []

    def address(size: int) -> int:
        memory.append(torch.zeros(size, dtype=torch.uint8))
        return int(memory[-1].data_ptr())

    streams = [batch * 8 * (196 + cls) * 768 * 2 for cls in (1, 0)]
    given = {
        "problem": problem, "x": list(map(address, streams)), "parameters": [address(768 * 384 * 2)] * 28,
        "scale": [0, 0], "recompute": CHEAP, "saved": address(cuda.saved_bytes(problem, CHEAP)),
        "scratch": address(max(cuda.forward_scratch_bytes(problem, CHEAP),
                               cuda.backward_scratch_bytes(problem, CHEAP, PROCESSORS))),
        "multiprocessors": PROCESSORS, "stream": 0,
    }  # fmt: skip
    y, gradients = list(map(address, streams)), [address(768 * 384 * 2) for _ in range(28)]
    with kept() as forward:
        cuda.forward(**given, y=y)
    with kept() as backward:
        cuda.backward(**given, grad_y=y, grad_x=list(map(address, streams)), gradients=gradients)
    for one in (*forward, *backward):
        one.__dict__["memory"] = memory  # alive as long as a launch is
    return {"forward": forward, "backward": backward}


@needs_kernels
@pytest.mark.parametrize("batch", [1, 6, 32])
def test_its_ctas_are_those_that_are_launched(batch: int) -> None:
    """But for those that widen a vector, and those that write zeros for CLS: 64 rows of 64 channels each."""
    zeros = 6 * -(-batch * 8 // 64)
    left_out = {"prepare": 10, "attention": zeros, "attention_backward": 2 * zeros}
    found = recorded(batch)
    for phase, make in launches.PHASES.items():
        model = make(Sizes(batch), BUILT)
        assert len(model) == len(found[phase])
        for ours, theirs in zip(model, found[phase], strict=True):
            less = theirs.grid[0] - ours.count
            assert 0 <= less <= left_out.get(ours.name, 0), (ours.name, ours.count, theirs.grid)
            assert (ours.cluster, ours.per_sm) == (theirs.cluster, built.compiled(theirs.kernel)["ctas"])


#: Kind -> phase, number of its launch, CTA.
SAMPLES = {
    "prepare, a square": ("forward", 0, 0), "prepare, 64 positions": ("forward", 0, 230),
    "attention, space": ("forward", 2, 0), "attention, space, last rows": ("forward", 2, 18),
    "attention, time": ("forward", 2, 200),
    "attention_backward, queries": ("backward", 4, 0), "attention_backward, queries, last rows": ("backward", 4, 18),
    "attention_backward, keys": ("backward", 4, 192), "attention_backward, keys, last rows": ("backward", 4, 210),
    "attention_backward, time": ("backward", 4, 390), "position_sums, 8 members": ("backward", 6, 600),
    "finish, a matrix": ("backward", 8, 0), "finish, of time": ("backward", 8, 216),
    "finish, of space": ("backward", 8, 288), "finish, a table": ("backward", 8, 1200),
    "finish, a norm": ("backward", 8, 1500),
}  # fmt: skip


@needs_kernels
def test_what_was_counted_is_what_the_emulator_counts() -> None:
    found, now = recorded(1), {}
    assert SAMPLES.keys() == built.COUNTED.keys()

    def count(phase: str, number: int, cta: int) -> Any:
        return run(found[phase][number].record(), checks=False, ctas=[cta]).counters

    for kind, place in SAMPLES.items():
        c = count(*place)
        waves = c.shared_load_wavefronts + c.shared_store_wavefronts
        now[kind] = (c.warp_instructions, c.tensor_flops, waves, c.global_load_sectors, c.global_store_sectors)
    assert now == {
        kind: (one.instructions, one.flops, one.wavefronts, one.loads, one.stores)
        for kind, one in built.COUNTED.items()
    }
    more = count("backward", 6, 0).warp_instructions - now["position_sums, 8 members"][0]  # 49 members
    assert more / (49 - 8) == built.MEMBER


def test_shares_of_positions_are_few() -> None:
    """32 clips: 6,272 members of a frame and 256 of a patch; one clip: 196 and 8."""
    assert built.splits(Sizes(32)) == {"time": 8, "space": 4}
    assert built.splits(Sizes(1)) == {"time": 4, "space": 1}


def test_384_rows_of_a_matrix_are_two_pairs() -> None:
    """Up 3, out 2, queries 2, keys and values 3, down 2 x 2: 14 of each stream, where tiles would be 12."""
    assert built.pairs(Sizes(6)) == 28


def test_loads_in_a_chain_are_waited_for() -> None:
    """18 and the start, one CTA alone: 600 clocks each."""
    kind = built.COUNTED["finish, of space"]
    one = built.launch("finish", "bcast_finish_bf16_bf16", [(1, kind.cta())], 0, 0)
    assert predict(one, device("H100")).waits >= (18 * 600 + 1000) / 1600 - 1e-9

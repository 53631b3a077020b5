"""A machine with two different GPUs: the tensors' own decides, whichever is current. Tensors here are fake."""

from __future__ import annotations

import pytest
import torch
from fake_gpu import fake_gpu

import cast_kernels
from cast_kernels import backends
from cast_kernels.ops import adapter, bcast, ffn, self_attention

BF16 = torch.bfloat16
#: By number; None is the current one.
CAPABILITIES = {None: (9, 0), 0: (9, 0), 1: (7, 5)}


def problems(device: str) -> list[backends.AnyProblem]:
    """One of each op on the device, and a module's."""
    with torch.device("meta"):
        module = cast_kernels.BCAST(32, 32, 2, 2, 3).to(BF16)
    with fake_gpu(), torch.no_grad(), torch.device(device):

        def made(*sizes: tuple[int, ...]) -> list[torch.Tensor]:
            return [torch.empty(size, dtype=BF16) for size in sizes]

        norm, own = [(32,), (32,)], [(16, 32), (16,), (32, 16), (32,)]
        halves = cast_kernels.FFNParameters(*made(*norm, (64, 32), (64,), (32, 64), (32,), *own))
        attends = cast_kernels.SelfAttentionParameters(*made(*norm, (96, 32), (96,), (32, 32), (32,), *own))
        module.to_empty(device=device)
        (x,), streams = made((4, 32)), made((1, 2, 4, 32), (1, 2, 3, 32))
        return [
            ffn.pose(x, halves),
            self_attention.pose(x[None], attends, 2),
            adapter.pose(x, cast_kernels.AdapterParameters(*made(*own)), x, True),
            bcast.pose(streams[0], streams[1], module.gathered(), 2, ("time", "space")),
            module.problem(),
        ]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[backends.AnyProblem]]:
    """The current GPU is an H100, the other one is older than what our kernels need."""
    found = {device: problems(device) for device in ("cuda:0", "cuda:1")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", CAPABILITIES.__getitem__)
    return found


def test_the_tensors_own_gpu_decides(two_gpus: dict[str, list[backends.AnyProblem]]) -> None:
    new, old = two_gpus["cuda:0"], two_gpus["cuda:1"]
    assert [backends.select("auto", problem) for problem in new] == ["triton"] * 5
    assert [backends.select("auto", problem) for problem in old] == ["eager"] * 5
    for problem in old:
        assert backends.can_run("triton", problem).reason == "cuda:1 is sm_75; the kernels need sm_80 or newer"


def test_another_gpu_than_hopper_is_what_cuda_says_first(two_gpus: dict[str, list[backends.AnyProblem]]) -> None:
    """Another bottleneck, a build or a driver would change nothing there."""
    new, old = (two_gpus[device][-1] for device in ("cuda:0", "cuda:1"))
    with pytest.raises(cast_kernels.BackendError) as caught:
        backends.select("cuda", old)
    assert str(caught.value) == (
        "backend='cuda' cannot run this problem: cuda:1 is sm_75; the CUDA kernels are for sm_90 (H100, H200) alone. "
        "Use backend='auto', which takes 'eager' here; cast_kernels.explain(...) says of each whether and why."
    )
    assert backends.can_run("cuda", new).reason == "the bottleneck has 32 channels; 192 and 384 are possible"

"""The CUDA kernels of B-CAST behind the public op, forward and backward, executed by the emulator."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from cuda_cases import ODD, needs_kernels

import cast_kernels
from cast_kernels import backends
from cast_kernels.evidence.cases import KINDS, Case, compare, poisoned_memory, run
from cast_kernels.evidence.cuda_launches import emulated
from cast_kernels.problem import FFNProblem, Recompute

pytestmark = needs_kernels

TINY = replace(ODD, batch=1, patches=9, dim=64, backward=True)
#: Name -> problem, dtypes, when copies land.
PROBLEMS: dict[str, tuple[Case, str, str]] = {
    "bf16": (replace(TINY, scaled=True, batch=2), "bf16", "late"),
    "fp16": (replace(TINY, recompute="nothing", heads=3), "fp16", "early"),
    "autocast": (replace(TINY, scaled=True, dim=72), "amp", "early"),
    "autocast, bf16 streams": (replace(TINY, recompute="all"), "amp16", "late"),
    "space-time, space": (replace(TINY, windows=("space-time", "space"), positions=False), "bf16", "late"),
    "t2s alone": (replace(TINY, directions=("t2s",), recompute="nothing"), "bf16", "late"),
    "s2t alone": (replace(TINY, directions=("s2t",), heads=12), "fp16", "early"),
    "long windows": (replace(TINY, patches=70, frames=2), "bf16", "late"),
    "d 384": (replace(TINY, bottleneck=384, heads=12, frames=2), "bf16", "early"),
}
PAPER = Case(batch=1, scaled=True)


def check(case: Case, kind: str, **options: object) -> list[str]:
    """Every output and gradient against fp64; returns the kernels that ran."""
    dtypes = KINDS[kind]
    with emulated(**options) as ran, poisoned_memory():  # type: ignore[arg-type]
        ours = run(case, "cuda", **dtypes._asdict())
    eager = run(case, "eager", **dtypes._asdict())
    errors = compare(ours, eager, run(case, None, dtypes.dtype, exact=True, streams=dtypes.streams))
    assert [error for error in errors if not error.ok] == []
    return [one.launch.kernel for one in ran]


@pytest.mark.parametrize("name", PROBLEMS)
def test_errors_are_at_most_twice_eagers(name: str) -> None:
    case, kind, landing = PROBLEMS[name]
    kernels = check(case, kind, landing=landing)
    again = {"nothing": 0, "cheap": 2, "all": 3}[case.recompute]
    assert len(kernels) == 4 + 1 + again + 5 + case.positions


@pytest.mark.heavy
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", ["bf16", "amp"])
@pytest.mark.parametrize("options", [{"landing": "late"}, {"landing": "random", "seed": 1}], ids=["late", "random"])
def test_the_papers_size(kind: str, options: dict[str, object]) -> None:
    check(PAPER, kind, **options)


def step(case: Case, **options: object) -> dict[str, torch.Tensor]:
    with emulated(**options):  # type: ignore[arg-type]
        return run(case, "cuda", **KINDS["bf16"]._asdict())


def test_bits_are_the_same_under_every_schedule() -> None:
    case = replace(TINY, frames=2, patches=5, directions=("t2s",), scaled=True)
    first = step(case)
    for options in ({"landing": "early", "lane_order": True}, {"landing": "random", "seed": 2}):
        again = step(case, **options)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_only_what_is_wanted_is_launched() -> None:
    """A frozen exchange sends gradients on, and no sum over rows is made."""
    module = TINY.module(torch.bfloat16, "cuda").requires_grad_(False)
    spatial, temporal = TINY.inputs(torch.bfloat16, grad=True)
    with emulated() as ran:
        torch.autograd.backward(module(spatial, temporal), TINY.output_grads(torch.bfloat16))
    assert spatial.grad is not None
    assert temporal.grad is not None
    assert [one.launch.kernel.split("_bf16")[0] for one in ran[-4:]] == [
        "bcast_exchange", "bcast_exchange_backward", "bcast_attention_backward", "bcast_project_backward"
    ]  # fmt: skip


def test_what_it_cannot_run_is_said() -> None:
    with emulated():
        for change, reason in (
            ({"bottleneck": 128, "heads": 4}, "the bottleneck has 128 channels; 192 and 384 are possible"),
            ({"heads": 24}, "heads have 8 channels, 192 in 24 heads; 16, 32, 64 are possible"),
            ({"dim": 68}, "the streams have 68 channels; a multiple of 8 is needed"),
        ):
            case = replace(TINY, **change)
            with pytest.raises(cast_kernels.BackendError, match=reason):
                case.module(torch.bfloat16, "cuda")(*case.inputs(torch.bfloat16))
        with pytest.raises(
            cast_kernels.BackendError,
            match=r"is torch\.float32; .* torch\.bfloat16, torch\.float16: run",
        ):
            TINY.module(torch.float32, "cuda")(*TINY.inputs(torch.float32))
    with pytest.raises(cast_kernels.BackendError, match="the streams are on cpu; the CUDA kernels run on cuda"):
        TINY.module(torch.bfloat16, "cuda")(*TINY.inputs(torch.bfloat16))


SMALL = replace(TINY, frames=2, patches=5, directions=("t2s",))


def gradients(spatial: torch.Tensor, temporal: torch.Tensor) -> list[torch.Tensor]:
    """Of a sum, so that the gradient that comes in is one number expanded."""
    module = SMALL.module(torch.bfloat16, "cuda")
    with emulated():
        outputs = module(spatial, temporal)
        return list(torch.autograd.grad(sum(y.sum() for y in outputs), (spatial, temporal, *module.parameters())))


def test_strides_and_addresses_change_no_bit() -> None:
    spatial, temporal = SMALL.inputs(torch.bfloat16)
    wanted = gradients(spatial.clone().requires_grad_(), temporal.clone().requires_grad_())
    odd = torch.empty(temporal.numel() + 1, dtype=torch.bfloat16)[1:].view_as(temporal).copy_(temporal)
    assert odd.data_ptr() % 16
    turned = spatial.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    for got, want in zip(gradients(turned.requires_grad_(), odd.requires_grad_()), wanted, strict=True):
        assert torch.equal(got, want)


def test_no_clip_makes_no_launch() -> None:
    none = replace(SMALL, batch=0)
    module, (spatial, temporal) = none.module(torch.bfloat16, "cuda"), none.inputs(torch.bfloat16, grad=True)
    with emulated() as ran:
        torch.autograd.backward(module(spatial, temporal), none.output_grads(torch.bfloat16))
    assert ran == []
    assert not any(p.grad is not None and p.grad.any() for p in module.parameters())


def test_the_experts_ops_are_left_to_triton() -> None:
    sizes = {"rows": 10, "dim": 64, "hidden": 128, "adapter": 16, "activation": "gelu", "recompute": Recompute.CHEAP}
    problem = FFNProblem(**sizes, dtype=torch.bfloat16, device="cuda")  # type: ignore[arg-type]
    assert backends.select("cuda", problem) == "triton"
    assert re.search(r"cuda +yes +ffn is left to triton: ", backends.explain("cuda", problem))
    with pytest.raises(cast_kernels.BackendError, match=r"this problem: ffn is left to triton: .* on meta"):
        backends.select("cuda", replace(problem, device="meta"))


def test_a_compiler_asks_whether_the_kernels_can_run() -> None:
    """On a CPU, with sizes and a dtype that they take."""
    torch._dynamo.reset()
    module, inputs = TINY.module(torch.bfloat16), TINY.inputs(torch.bfloat16)
    compiled = torch.compile(module, fullgraph=True, backend="eager")(*inputs)
    for got, want in zip(compiled, module(*inputs), strict=True):
        torch.testing.assert_close(got, want)

"""The op `adapter`: mathematics, eager against fp64, what compiles, what runs in emulation, bad input.

tests/interpreted/test_interpreted_experts.py runs its kernels and their contract with PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import CASES, Case, run
from bcast_cases import assert_at_most_twice_eager
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import Launcher, Recorder, offline_driver
from ptx_emulator.triton.launcher import Emulator
from triton_kernels import EMULATED

import cast_kernels
from cast_kernels import AdapterParameters, backends
from cast_kernels.evidence.cases import poisoned_memory
from cast_kernels.evidence.compile import read
from cast_kernels.evidence.gates import EXCEPTIONS, judge
from cast_kernels.ops.adapter import pose

TARGETS = ("sm_80", "sm_90")
SMALL = Case(lead=(2, 37), dim=96, adapter=48, skip=True, scaled=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager_equals_reference_in_fp64(case: Case) -> None:
    ours, exact = run(case, torch.float64, "eager"), run(case, torch.float64, None)
    assert ours.keys() == exact.keys()
    assert len(exact) == 7
    for name, truth in exact.items():
        torch.testing.assert_close(ours[name], truth, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("skip", [False, True])
def test_reference_gradcheck(skip: bool) -> None:
    case = Case(lead=(3,), dim=4, adapter=2, skip=skip, scaled=True)

    def call(x: torch.Tensor, residual: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return cast_kernels.reference.adapter(
            x, AdapterParameters(*parameters), residual=residual, skip=skip, scale=0.5,
            row_scale=case.row_scale(torch.float64),
        )  # fmt: skip

    streams = [case.stream(name, torch.float64, grad=True) for name in ("x", "residual")]
    assert torch.autograd.gradcheck(call, (*streams, *case.parameters(torch.float64, grad=True)), fast_mode=True)


def test_the_reference_is_the_published_module() -> None:
    """Two linear layers with GELU between, beside a residual."""
    case = Case(skip=True)
    down, up = torch.nn.Linear(48, 16).double(), torch.nn.Linear(16, 48).double()
    parameters = case.parameters(torch.float64)
    with torch.no_grad():
        for parameter, value in zip([*down.parameters(), *up.parameters()], parameters, strict=True):
            parameter.copy_(value)
    x, residual = case.stream("x", torch.float64), case.stream("residual", torch.float64)
    ours = cast_kernels.reference.adapter(x, parameters, residual=residual, skip=True, scale=0.25)
    expected = residual + x + 0.25 * up(torch.nn.functional.gelu(down(x)))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_eager_runs_and_stays_in_every_dtype(dtype: torch.dtype) -> None:
    case = Case(skip=True, scaled=True)
    y = cast_kernels.adapter(
        case.stream("x", dtype), case.parameters(dtype), residual=case.stream("residual", dtype), skip=True, scale=0.5,
        row_scale=case.row_scale(dtype),
    )  # fmt: skip
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), run(case, torch.float64, None)["y"], atol=0.05, rtol=0.05)


# --- compiled code ---------------------------------------------------------------------------------------------------


def launched(name: str, launcher: Launcher, case: Case, cache: Path, recompute: str = "cheap") -> dict[str, Any]:
    with offline_driver(target(name), launcher, cache), poisoned_memory():
        return run(case, torch.bfloat16, "triton", recompute)


@pytest.fixture(autouse=True)
def fill() -> None:
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize("name", TARGETS)
def test_kernels_compile_within_the_gates(name: str, tmp_path: Path) -> None:
    """At the paper's widths: on tensor cores, within shared memory, no spills in loops."""
    recorder, rows = Recorder(), {}
    for recompute in ("cheap", "nothing"):
        launched(name, recorder, Case(lead=(130,), dim=768, adapter=192, skip=True, scaled=True), tmp_path, recompute)
    for record in recorder.records.values():
        row = judge(read(record.first, "bf16", ["the paper's widths"]), EXCEPTIONS)
        rows.setdefault(row.kernel, []).append(row)
        if row.kernel.startswith("adapter"):
            assert row.failures == (), row
            assert row.dots
    assert {kernel: len(found) for kernel, found in rows.items()} == {
        "adapter_forward": 2, "adapter_backward": 2, "weight_gradient": 1, "sum_parts": 1, "reduce_rows": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", EMULATED)
def test_compiled_code_is_right_in_emulation(name: str, tmp_path: Path) -> None:
    emulator = Emulator()
    ours = launched(name, emulator, SMALL, tmp_path)
    assert_at_most_twice_eager(ours, run(SMALL, torch.bfloat16, "eager"), run(SMALL, torch.float64, None))
    assert {kernel: runs.launches for kernel, runs in emulator.runs.items()} == {
        "adapter_forward": 1, "adapter_backward": 1, "weight_gradient": 1, "sum_parts": 1, "reduce_rows": 1,
    }  # fmt: skip


# --- selection and bad input -----------------------------------------------------------------------------------------


def test_explain_names_every_backend_and_the_choice() -> None:
    case = Case()
    text = backends.explain("auto", pose(case.stream("x"), case.parameters(), case.stream("residual")))
    assert "AdapterProblem" in text
    assert "its ffn and self_attention contain it" in text
    assert "kernels run on cuda" in text
    assert "runs: eager" in text


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(adapter=20), "20 channels; a multiple of 16 up to 768"),
        (Case(adapter=784), "784 channels"),
        (Case(dim=40), "the stream has 40 channels; a multiple of 16"),
    ],
    ids=str,
)
def test_the_kernels_say_which_sizes_they_cannot_take(case: Case, reason: str) -> None:
    with pytest.raises(cast_kernels.BackendError, match=reason):
        run(case, torch.float32, "triton")


def spoiled(**changes: object) -> dict[str, Any]:
    """Arguments of a good call, with changes; names of parameters change a parameter."""
    case = Case()
    fields = {name: changes.pop(name) for name in list(changes) if name in AdapterParameters._fields}
    good = {"x": case.stream("x"), "residual": case.stream("residual")}
    return good | {"parameters": case.parameters()._replace(**fields)} | changes  # type: ignore[arg-type]


BAD_CALLS: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "scalar": (lambda: spoiled(x=torch.tensor(1.0)), ValueError, r"x has shape \(\); it must be \[..., D\]"),
    "residual": (lambda: spoiled(residual=torch.ones(3, 48)), ValueError, r"residual has shape \(3, 48\)"),
    "up": (lambda: spoiled(up_weight=torch.ones(16, 48)), ValueError, r"up_weight has shape.*must be \(48, 16\)"),
    "half": (lambda: spoiled(up_weight=None, up_bias=None), ValueError, "up_weight and up_bias missing"),
    "mixed dtypes": (lambda: spoiled(x=Case().stream("x").bfloat16()), TypeError, "mixed: x torch.bfloat16, residual"),
    "integers": (lambda: spoiled(x=Case().stream("x").int()), TypeError, "must be floating point"),
    "array": (lambda: spoiled(residual=Case().stream("residual").numpy()), TypeError, "residual is a numpy.ndarray"),
    "nothing": (lambda: spoiled(x=None), TypeError, "x is None; it must be a torch.Tensor$"),
    "devices": (lambda: spoiled(residual=torch.ones(3, 15, 48, device="meta")), ValueError, "cpu and meta"),
    "recompute": (lambda: spoiled(recompute="some"), ValueError, "'some'; allowed: 'auto', 'nothing', 'cheap', 'all'"),
    "backend": (lambda: spoiled(backend="gpu"), ValueError, "allowed: 'auto', 'triton', 'cuda', 'cpu', 'eager'"),
    "scale": (lambda: spoiled(row_scale=torch.ones(4)), ValueError, r"row_scale has shape \(4,\).*\(3, 15\)"),
    "native": (lambda: spoiled(backend="cpu"), cast_kernels.BackendError, "no kernel of the adapter alone"),
    "device": (lambda: spoiled(backend="triton"), cast_kernels.BackendError, "on cpu; Triton kernels run on cuda"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_say_what_came_and_what_is_allowed(name: str) -> None:
    make, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        cast_kernels.adapter(**make())

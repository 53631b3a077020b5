"""A Gluon kernel as Triton compiles it for Hopper: clusters, multicast, tensor maps made on the device."""

import re
from typing import Any

import engines
import numpy as np
import pytest
from ptx_emulator import cuda
from ptx_emulator.core.formats import bf16_to_f32, f32_to_bf16
from ptx_emulator.cuda import Pointer, Record

triton = pytest.importorskip("triton", minversion="3.8", reason="Gluon has clusters since Triton 3.8")
from triton.backends.compiler import GPUTarget  # noqa: E402

FENCE = "fence.mbarrier_init.release.cluster ;"
BARRIER = "barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;"
DEPTH, ROWS = 200, 200  # no multiple of a tile


@pytest.fixture(autouse=True)
def both_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch runs by the native engine too, which must agree."""
    monkeypatch.setattr("ptx_emulator.cuda.record.launch", engines.launch)


def launch_of(*, told: bool = True, freed: bool = True, without: str = "") -> tuple[Record, np.ndarray]:
    """(a launch on random numbers, with an output of NaN; the exact values). without: taken out of the PTX."""
    import gluon_kernels

    made = triton.compile(
        gluon_kernels.source(told, freed), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_ctas": 2}
    )
    random = np.random.default_rng(0)
    x, w = (f32_to_bf16(random.standard_normal((n, DEPTH)).astype(np.float32)) for n in (ROWS, 128))
    y, scratch = np.full((ROWS, 128), 0x7FFF, np.uint16), np.zeros(2 * made.metadata.global_scratch_size, np.uint8)
    text = made.asm["ptx"]
    if without:
        text, count = re.subn(r"(@!?%p\d+ )?" + re.escape(without), "", text)
        assert count == 1
    arguments = (*map(Pointer, "xwy"), DEPTH, ROWS, Pointer("scratch"), 0)
    buffers = {"x": x, "w": w, "y": y, "scratch": scratch}
    record = Record(text, made.metadata.name, (2, 1, 1), (128, 1, 1), arguments, buffers, made.metadata.shared)
    return record, bf16_to_f32(x).astype(np.float64) @ bf16_to_f32(w).astype(np.float64).T


def run(landing: str = "late", seed: int | None = None, **options: Any) -> tuple[set[str], float]:
    """(kinds of faults, root mean square error over that of the exact values). options: of `launch_of`."""
    record, exact = launch_of(**options)
    report = cuda.run(record, landing=landing, seed=seed)
    error = bf16_to_f32(record.buffers["y"]) - exact
    return {f.kind for f in report.faults}, float(np.sqrt((error**2).mean() / (exact**2).mean()))


@pytest.mark.parametrize(("landing", "seed"), [("late", None), ("early", None), ("random", 2)])
def test_right_under_every_landing(landing: str, seed: int | None) -> None:
    faults, error = run(landing=landing, seed=seed)
    assert not faults
    assert error < 2e-3


def test_a_missing_barrier_of_the_cluster_is_found() -> None:
    """Where the kernel has none after init, Triton puts a relaxed one, behind a fence; both are needed then."""
    assert run(freed=False)[0] >= {"read-write"}
    assert not run(told=False)[0]
    for part in (FENCE, BARRIER):
        assert run(told=False, without=part)[0] == {"mbarrier used before its init is visible"}

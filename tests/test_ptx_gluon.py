"""A Gluon kernel as Triton compiles it for Hopper: clusters, multicast, tensor maps made on the device."""

import re

import numpy as np
import ptx_emulator
import pytest
from ptx_emulator.core.formats import bf16_to_f32, f32_to_bf16

triton = pytest.importorskip("triton", minversion="3.8", reason="Gluon has clusters since Triton 3.8")
from triton.backends.compiler import GPUTarget  # noqa: E402

FENCE = "fence.mbarrier_init.release.cluster ;"
BARRIER = "barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;"
DEPTH, ROWS = 200, 200  # no multiple of a tile


def run(*, told: bool = True, freed: bool = True, without: str = "", **options: object) -> tuple[set[str], float]:
    """(kinds of faults, root mean square error over that of the exact values). without: taken out of the PTX."""
    import gluon_kernels

    made = triton.compile(
        gluon_kernels.source(told, freed), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_ctas": 2}
    )
    random = np.random.default_rng(0)
    x, w = (f32_to_bf16(random.standard_normal((n, DEPTH)).astype(np.float32)) for n in (ROWS, 128))
    y, scratch = np.full((ROWS, 128), 0x7FFF, np.uint16), np.zeros(2 * made.metadata.global_scratch_size, np.uint8)
    memory = ptx_emulator.Memory()
    at = [memory.register(a.view(np.uint8).reshape(-1)) for a in (x, w, y, scratch)]
    text = made.asm["ptx"]
    if without:
        text, count = re.subn(r"(@!?%p\d+ )?" + re.escape(without), "", text)
        assert count == 1
    (kernel,) = ptx_emulator.parse(text).kernels.values()
    report = ptx_emulator.launch(
        kernel,
        grid=(2, 1, 1),
        threads=128,
        arguments=[*at[:3], DEPTH, ROWS, at[3], 0],
        memory=memory,
        shared_bytes=made.metadata.shared,
        target="sm_90",
        **options,  # type: ignore[arg-type]
    )
    memory.write_back()
    exact = bf16_to_f32(x).astype(np.float64) @ bf16_to_f32(w).astype(np.float64).T
    error = float(np.sqrt(((bf16_to_f32(y) - exact) ** 2).mean() / (exact**2).mean()))
    return {f.kind for f in report.faults}, error


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

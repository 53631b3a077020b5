"""A Hopper kernel as nvcc compiles it: right under every landing and schedule, and each of nineteen faults is seen."""

import re
import shutil
import struct
import subprocess
from pathlib import Path

import engines
import numpy as np
import ptx_emulator
import pytest
from ptx_emulator import cuda
from ptx_emulator.core.formats import bf16_to_f32, f32_to_bf16
from ptx_emulator.cuda import Pointer, Record, Tiled

SOURCE = Path(__file__).parent / "cuda" / "gemm.cu"
COMPILE = ("-ptx", "-arch=compute_90a", "-O3", "-std=c++17", "-lineinfo", "-I", str(SOURCE.parent))
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
SHARED = 3 * (128 + 64) * 128 + 128 * 128 + 48
SIZES = (200, 112, 200)  # none a multiple of the tile: rows and columns outside of the tensors, and a part of a step


@pytest.fixture(autouse=True)
def both_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every record runs by the native engine as well, which must agree."""
    monkeypatch.setattr("ptx_emulator.cuda.record.launch", engines.launch)


def compiled(source: str, folder: Path) -> str:
    """The PTX of a kernel. Skips where there is no nvcc."""
    if NVCC is None:
        pytest.skip("no nvcc: a CUDA toolkit compiles this kernel")
    (folder / "gemm.cu").write_text(source)
    done = subprocess.run(
        [NVCC, *COMPILE, "gemm.cu", "-o", "gemm.ptx"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return (folder / "gemm.ptx").read_text()


@pytest.fixture(scope="module")
def gemm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compiled(SOURCE.read_text(), tmp_path_factory.mktemp("gemm"))


def launch_of(ptx: str) -> tuple[Record, np.ndarray]:
    """(a launch on random numbers, with an output of NaN; the exact values in float64)."""
    m, n, k = SIZES
    random = np.random.default_rng(0)
    a, b = (f32_to_bf16(random.standard_normal(s).astype(np.float32)) for s in ((m, k), (n, k)))
    bias, c = random.standard_normal(n).astype(np.float32), np.full((m, n), 0x7FFF, np.uint16)
    maps = [
        Tiled(Pointer(name), "bf16", x.shape[::-1], (2 * x.shape[1],), (64, rows), 128)
        for name, x, rows in (("a", a, 128), ("b", b, 32), ("c", c, 64))
    ]
    arguments = (*maps, Pointer("bias"), struct.pack("<3i", m, n, k))
    buffers = {"a": a, "b": b, "c": c, "bias": bias}
    record = Record(ptx, "gemm", (2, 1, 1), (384, 1, 1), arguments, buffers, SHARED)
    return record, bf16_to_f32(a).astype(np.float64) @ bf16_to_f32(b).astype(np.float64).T + bias


def run(ptx: str, landing: str = "late", seed: int | None = None) -> tuple[set[str], float]:
    """(kinds of faults, root mean square error to float64 over that of the exact values)."""
    record, exact = launch_of(ptx)
    report = cuda.run(record, landing=landing, seed=seed)
    error = bf16_to_f32(record.buffers["c"]) - exact
    return {fault.kind for fault in report.faults}, float(np.sqrt((error**2).mean() / (exact**2).mean()))


@pytest.mark.parametrize(("landing", "seed"), [("late", None), ("early", None), ("random", 0)])
def test_right_under_every_landing(gemm: str, landing: str, seed: int | None) -> None:
    faults, error = run(gemm, landing=landing, seed=seed)
    assert not faults
    assert error < 2e-3, "one rounding to bfloat16 is 1.7e-3"


WRONG = "wrong values"
#: what is planted -> (what is replaced by what; findings, errors' words or WRONG, of which one must come, as patterns)
PLANTED: dict[str, tuple[list[tuple[str, str]], tuple[str, ...]]] = {
    "no proxy fence": ([("      fence_for_copies();\n", "")], ("bulk copy reads a write without fence.proxy.async",)),
    "no barrier before the store": (
        [("      fence_for_copies();\n      meet_group(group);", "      fence_for_copies();")],
        ("write-read by a bulk copy",),
    ),
    "output reused before it was read": (
        [("if (thread == 0) wait_until_read();", "")],
        ("write to the source of a bulk copy",),
    ),
    "stage freed before its products are waited for": (
        [
            ("        products_wait();\n", ""),
            ("arrive_at(&s.empty[ring.stage], thread);", "arrive_at(&s.empty[ring.stage], thread);\n products_wait();"),
        ],
        ("read-write",),
    ),
    "no wait for products": ([("        products_wait();\n", "")], ("register of a pending wgmma used",)),
    "no fence of products": (
        [("        products_begin();\n", "")],
        ("wgmma register written after the last wgmma.fence",),
    ),
    "no commit of products": ([("        products_commit();\n", "")], ("register of a pending wgmma used",)),
    "consumer's first parity": (
        [("more_registers<232>();\n    Ring ring;", "more_registers<232>();\n    Ring ring{0, 1};")],
        ("outstanding", "write-read by wgmma", "wgmma reads a copy in flight"),
    ),
    "parity does not flip": ([("stage = 0; parity ^= 1;", "stage = 0;")], ("outstanding",)),
    "bytes of A only": ([("A_BYTES + B_BYTES);", "A_BYTES);")], (r"-\d+ bytes outstanding", "more arrivals")),
    "half of the bytes of B": (
        [("A_BYTES + B_BYTES);", "A_BYTES + B_BYTES / 2);")],
        (r"-\d+ bytes outstanding", "more arrivals"),
    ),
    "one CTA's consumers counted": ([("2 * CLUSTER)", "2)")], ("outstanding",)),
    "consumers free their own CTA only": (
        [
            (
                "if (thread < CLUSTER) arrive_at(&s.empty[ring.stage], thread)",
                "if (thread == 0) arrive_at(&s.empty[ring.stage], rank)",
            ),
            ("2 * CLUSTER)", "2)"),
        ],
        ("read-write",),
    ),
    "no cluster barrier after init": (
        [("  __syncwarp();\n  meet_cluster();", "  __syncthreads();")],
        ("mbarrier used before its init is visible",),
    ),
    "a CTA ends while its peer may arrive": (
        [("    __syncwarp();\n  }\n  meet_cluster();", "    __syncwarp();\n  }")],
        ("CTA ends while a peer may still reach into its memory", "which has ended"),
    ),
    "wrong stride in a descriptor": ([("uint64_t(64) << 32", "uint64_t(32) << 32")], (WRONG,)),
    "no swizzle": ([("(2 * j + lane / 16) ^ (line % 8)", "2 * j + lane / 16")], (WRONG,)),
    "producer does not wait": (
        [("      wait_for(&s.empty[ring.stage], ring.parity ^ 1);\n", "")],
        ("more arrivals", "read-write", "write to a copy in flight"),
    ),
    "more registers than there are": ([("more_registers<232>", "more_registers<248>")], ("wait for 248 registers",)),
}


@pytest.mark.heavy
@pytest.mark.parametrize("landing", ["late", "early"])
@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_seen(name: str, landing: str, tmp_path: Path) -> None:
    """In program order, without any luck of a schedule."""
    changes, expected = PLANTED[name]
    source = SOURCE.read_text()
    for old, new in changes:
        assert old in source, old
        source = source.replace(old, new)
    ptx = compiled(source, tmp_path)
    try:
        faults, error = run(ptx, landing=landing)
        seen = [*faults, *([WRONG] if not error < 1e-2 else [])]
    except ptx_emulator.EmulationError as stopped:
        seen = [str(stopped)]
    assert any(re.search(words, one) for words in expected for one in seen), seen


SYNCHRONISES = re.compile(
    r"(?:@!?%\w+\s+)?\b(?:mbarrier\.|fence\.|bar\.|barrier\.|setmaxnreg\.|cp\.async\.bulk|wgmma\.[fcw])[^;]*;"
)
#: what may go without harm -> why
HARMLESS = {
    "fence.mbarrier_init": "the barrier of the cluster behind it releases all that came before",
    "bar.warp.sync": "the lanes of the warp wait for each other at the barrier of the cluster behind it",
    "setmaxnreg.inc": "the account of the register file has a surplus then",
}


def without_each(ptx: str) -> list[tuple[str, str]]:
    """(instruction, PTX without it) for each instruction that synchronises; a wait is made to pass at once."""
    found = []
    for match in SYNCHRONISES.finditer(ptx):
        instead = "setp.eq.u32 p, 0, 0;" if "try_wait" in match[0] else ""
        found.append((" ".join(match[0].split()), ptx[: match.start()] + instead + ptx[match.end() :]))
    return found


@pytest.mark.heavy
def test_each_synchronising_instruction_is_needed(tmp_path: Path) -> None:
    """Taken away one at a time: a finding, an error or wrong values, but for those that may go."""
    missed = []
    mutants = without_each(compiled(SOURCE.read_text(), tmp_path))
    assert len(mutants) > 25
    for name, ptx in mutants:
        try:
            faults, error = run(ptx)
        except ptx_emulator.EmulationError:
            continue
        if not faults and error < 1e-2:
            missed.append(name)
    assert [name for name in missed if not name.startswith(tuple(HARMLESS))] == []
    assert {key for key in HARMLESS if any(name.startswith(key) for name in missed)} == set(HARMLESS)

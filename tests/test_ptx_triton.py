"""Whole kernels: what Triton compiles for sm_80 and sm_90, executed and compared with float64, and mutants of it."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ptx_emulator
import ptx_emulator.core.execute
import pytest
import torch
from engines import built, launch

TARGETS = ("sm_80", "sm_90")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# relative error (Frobenius) of a result rounded to the type, plus what tf32's 10 bits cost a product
LIMITS = {"bf16": 3e-3, "fp16": 4e-4, "tf32": 1e-3, "tf32x3": 1e-6}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("ptx_triton_kernels.py")
    subprocess.run([sys.executable, str(script), str(folder / "kernels.json")], check=True, env=environment)
    return json.loads((folder / "kernels.json").read_text())


class Problem:
    """A launch with its reference: `run` executes PTX and returns (report, relative error)."""

    def __init__(
        self,
        built: dict[str, Any],
        target: str,
        tensors: list[torch.Tensor],
        numbers: list[float],
        grid: tuple[int, int],
        want: torch.Tensor,
    ) -> None:
        self.built, self.target, self.tensors, self.numbers, self.grid, self.want = (
            built,
            target,
            tensors,
            numbers,
            grid,
            want,
        )

    def run(
        self, ptx: str | None = None, run: Callable[..., ptx_emulator.Report] = launch
    ) -> tuple[ptx_emulator.Report, float]:
        """The last tensor is the output; it starts as NaN. run: the launch, by both engines or by one."""
        kernel = ptx_emulator.parse(ptx or self.built["ptx"]).kernels[self.built["name"]]
        memory = ptx_emulator.Memory()
        arrays = [t.contiguous().view(torch.uint8).numpy().reshape(-1) for t in self.tensors]
        arrays.append(
            torch.full(self.want.shape, math.nan, dtype=self.tensors[0].dtype).view(torch.uint8).numpy().reshape(-1)
        )
        addresses = [memory.register(array, name=str(i)) for i, array in enumerate(arrays)]
        report = run(
            kernel,
            grid=(*self.grid, 1),
            threads=self.built["threads"],
            arguments=[*addresses, *self.numbers],
            memory=memory,
            shared_bytes=self.built["shared"],
            target=self.target,
        )
        memory.write_back()
        got = torch.from_numpy(arrays[-1]).view(self.tensors[0].dtype).reshape(self.want.shape).double()
        return report, float((got - self.want).norm() / self.want.norm())


def matmul(compiled: dict[str, Any], name: str, target: str, m: int = 100, n: int = 96, k: int = 112) -> Problem:
    _, kind, transposed, _ = name.split()
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(DTYPES[kind]) for shape in ((m, k), (k, n)))
    left, right = a.T.contiguous() if transposed[0] == "1" else a, b.T.contiguous() if transposed[1] == "1" else b
    numbers = [m, n, k, left.shape[1], right.shape[1], n]
    return Problem(
        compiled[f"{name} {target}"],
        target,
        [left, right],
        numbers,
        (-(-m // 64), -(-n // 64)),
        a.double() @ b.double(),
    )


def attention(compiled: dict[str, Any], target: str, n: int = 150, heads: int = 2) -> Problem:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(n, heads * 32, generator=generator).bfloat16() for _ in range(3))
    split = [t.double().reshape(n, heads, 32).transpose(0, 1) for t in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*split).transpose(0, 1).reshape(n, heads * 32)
    scale = 32**-0.5 * math.log2(math.e)
    return Problem(
        compiled[f"attention bf16 {target}"], target, [q, k, v], [n, heads * 32, scale], (-(-n // 64), heads), want
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["bf16 00 tf32", "bf16 11 tf32", "fp16 01 tf32", "fp32 00 tf32", "fp32 01 tf32x3"])
def test_matmul(compiled: dict[str, Any], name: str, target: str) -> None:
    """100 rows in tiles of 64, so that masks are used."""
    problem = matmul(compiled, f"matmul {name}", target)
    report, error = problem.run()
    kind, _, precision = name.split()
    assert error < LIMITS[kind if kind != "fp32" else precision]
    assert report.faults == []
    assert report.ctas == 4
    times = 3 if precision == "tf32x3" else 1
    assert report.counters.tensor_flops == times * 4 * 2 * 64 * 64 * 128, "four tiles, k padded to 128"
    assert all(
        name.startswith("wgmma" if target == "sm_90" else "mma") or kind == "fp32"
        for name in report.counters.tensor_flops_by_kind
    )


@pytest.mark.skipif(not built(), reason="the vector machine is not built")
@pytest.mark.parametrize("target", TARGETS)
def test_all_of_a_kernel_is_compiled_code(compiled: dict[str, Any], target: str) -> None:
    """Copies, ldmatrix, products, softmax: nothing is left to the interpreter."""
    native = partial(ptx_emulator.launch, engine="native")
    for problem in (matmul(compiled, "matmul bf16 00 tf32", target), attention(compiled, target)):
        report, error = problem.run(run=native)
        assert error < LIMITS["bf16"]
        assert report.counters.warp_instructions > 0
        assert dict(report.interpreted) == {}


@pytest.mark.parametrize("target", TARGETS)
def test_attention(compiled: dict[str, Any], target: str) -> None:
    report, error = attention(compiled, target).run()
    assert error < LIMITS["bf16"]
    assert report.faults == []


@pytest.mark.parametrize("target", TARGETS)
def test_rows(compiled: dict[str, Any], target: str) -> None:
    """Softmax, and LayerNorm with GELU: reductions over warps, exp, erf, rsqrt."""
    generator = torch.Generator().manual_seed(2)
    x = (3 * torch.randn(37, 200, generator=generator) + 1).half()
    problem = Problem(compiled[f"softmax fp16 {target}"], target, [x], [37, 200, 200], (10, 1), x.double().softmax(1))
    report, error = problem.run()
    assert error < LIMITS["fp16"]
    assert report.faults == []
    x, w = torch.randn(37, 208, generator=generator).bfloat16(), torch.randn(208, generator=generator).bfloat16()
    want = torch.nn.functional.gelu(torch.nn.functional.layer_norm(x.double(), (208,), w.double(), eps=1e-6))
    problem = Problem(compiled[f"layernorm_gelu bf16 {target}"], target, [x, w], [37, 208, 208, 1e-6], (10, 1), want)
    report, error = problem.run()
    assert error < LIMITS["bf16"]
    assert report.faults == []


@pytest.mark.parametrize("target", TARGETS)
def test_two_problems_in_one_grid(compiled: dict[str, Any], target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CTAs of two lengths and one that leaves at once: run part by part, and run with masks, with the same outcome."""
    generator = torch.Generator().manual_seed(3)
    m, m2, n, k, k2 = 100, 70, 64, 160, 96
    a, b, c = (torch.randn(shape, generator=generator).bfloat16() for shape in ((m, k), (m2, k2), (k, n)))
    want = torch.cat([a.double() @ c.double(), b.double() @ c[:k2].double()])
    numbers = [m, m2, n, k, k2, 2]
    problem = Problem(compiled[f"two_problems bf16 {target}"], target, [a, b, c], numbers, (5, 1), want)
    parts, error = problem.run()
    assert error < LIMITS["bf16"]
    monkeypatch.setattr(ptx_emulator.core.execute, "MAX_SPLITS", 0)
    masked, masked_error = problem.run()
    assert masked_error == error
    assert masked.counters == parts.counters
    assert masked.faults == parts.faults == []


def mutants(ptx: str, patterns: str) -> Iterator[tuple[str, str]]:
    """(what was removed and where, PTX without it)."""
    lines = ptx.split("\n")
    for i, line in enumerate(lines):
        if re.match(rf"\s*(?:{patterns})", line):
            yield f"{i}: {line.strip()}", "\n".join(lines[:i] + lines[i + 1 :])


def missed(problem: Problem, patterns: str) -> tuple[int, list[str]]:
    """(number of mutants, those that neither a finding, an error nor the result gives away)."""
    count, unseen = 0, []
    for name, ptx in mutants(problem.built["ptx"], patterns):
        count += 1
        try:
            report, error = problem.run(ptx)
        except ptx_emulator.EmulationError:
            continue
        if not report.faults and error < LIMITS["bf16"]:
            unseen.append(name)
    return count, unseen


ORDER = r"bar\.sync|fence\.proxy|wgmma\.(?:fence|wait_group|commit_group)|cp\.async\.wait_group"


@pytest.mark.parametrize("target", TARGETS)
def test_removed_ordering_is_caught(compiled: dict[str, Any], target: str) -> None:
    """Every barrier, fence and wait removed in turn from a pipelined matmul and an attention."""
    build: list[Callable[[], Problem]] = [
        lambda: matmul(compiled, "matmul bf16 00 tf32", target, m=150, k=160),
        lambda: attention(compiled, target),
    ]
    counts, unseen = zip(*(missed(make(), ORDER) for make in build), strict=True)
    print(counts, unseen)
    assert sum(counts) >= 18
    assert len(unseen[0]) <= {"sm_80": 6, "sm_90": 1}[target], unseen[0]
    assert len(unseen[1]) <= 3, unseen[1]


@pytest.mark.parametrize("target", TARGETS)
def test_a_longer_wait_group_is_caught(compiled: dict[str, Any], target: str) -> None:
    """wait_group n -> n + 1 where copies are in flight: stale data, and the checker says so."""
    problem = matmul(compiled, "matmul bf16 00 tf32", target, k=160)
    found = re.search(r"cp\.async\.wait_group\s+(\d+);", problem.built["ptx"])
    assert found is not None
    number = int(found.group(1))
    report, error = problem.run(problem.built["ptx"].replace(found.group(0), f"cp.async.wait_group {number + 1};"))
    assert not error < LIMITS["bf16"]
    assert any("in flight" in fault.kind for fault in report.faults)


@pytest.mark.parametrize("target", TARGETS)
def test_swapped_cta_axes_are_caught(compiled: dict[str, Any], target: str) -> None:
    problem = matmul(compiled, "matmul bf16 00 tf32", target, m=200)
    ptx = (
        problem.built["ptx"]
        .replace("%ctaid.x", "%ctaid.?")
        .replace("%ctaid.y", "%ctaid.x")
        .replace("%ctaid.?", "%ctaid.y")
    )
    try:
        _, error = problem.run(ptx)
    except ptx_emulator.MemoryFault:
        return
    assert not error < LIMITS["bf16"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_removed_mask_is_caught(compiled: dict[str, Any], target: str) -> None:
    """A store that ignores its mask writes outside the output."""
    problem = matmul(compiled, "matmul bf16 00 tf32", target)
    ptx, count = re.subn(r"@%p\d+ (st\.global)", r"\1", problem.built["ptx"])
    assert count
    with pytest.raises(ptx_emulator.MemoryFault, match=r"st\.global"):
        problem.run(ptx)

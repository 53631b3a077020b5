"""Counting what a kernel executes by following its control flow alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ptx_emulator import Instruction, Kernel, parse
from ptx_emulator.predict.scalar import evaluate
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import Argument, Launch, Recorder, offline_driver
from triton_kernels import product, scale

from cast_kernels.evidence import trace

HEADER = ".version 8.0\n.target sm_80\n.visible .entry k(\n\t.param .u64 k_param_0,\n\t.param .u32 k_param_1\n)\n"
REGISTERS = ".reg .pred %p<9>; .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .b32 %d, %minus;"


def launch(body: str, grid: tuple[int, int, int] = (1, 1, 1), n: int = 5) -> Launch:
    """A launch of hand-written PTX with one warp, whose second argument is n."""
    arguments = (Argument("x", "*fp32", torch.zeros(1)), Argument("n", "i32", n))
    metadata = SimpleNamespace(hash=body, num_warps=1, shared=0)
    text = f"{HEADER}{{\n{REGISTERS}\n{body}\n}}\n"
    return Launch("k", target("sm_80"), grid, arguments, {}, {"ptx": text}, metadata)


def parsed(code: str) -> tuple[Kernel, list[Instruction]]:
    """A kernel of these instructions, and they."""
    kernel = parse(f"{HEADER}{{\n{REGISTERS}\n{code}\n}}\n").kernels["k"]
    return kernel, kernel.instructions


LOOP = """
	ld.param.u32 	%r1, [k_param_1];
	mov.u32 	%r2, %ctaid.x;
	mul.lo.s32 	%r3, %r1, %r2;   // block c passes the loop max(1, c * n) times
	mov.b32 	%r4, 0;
$L__BB0_1:
	.loc	1 2 3
	ld.global.v4.b32 	{ %r5, %r6, %r7, %r8 }, [ %rd1 + 0 ];
	add.s32 	%r4, %r4, 1;
	setp.lt.s32 	%p1, %r4, %r3;
	@%p1 bra 	$L__BB0_1;
	@%p2 st.global.b32 [ %rd2 + 0 ], { %r5 };
	ret;
"""


def test_loops_are_counted_for_each_block() -> None:
    counted = trace.trace(launch(LOOP, grid=(4, 1, 1)))
    passes = 1 + 5 + 10 + 15
    assert counted.load_sectors == passes * 32 * 16 / 32
    assert counted.store_sectors == 4 * 32 * 4 / 32
    assert counted.warp_instructions == 4 * 4 + 4 * passes + 2 * 4


def test_a_sample_of_blocks_stands_for_all() -> None:
    every = trace.trace(launch(LOOP, grid=(101, 1, 1)), samples=101)
    some = trace.trace(launch(LOOP, grid=(101, 1, 1)), samples=9)
    assert some.load_sectors == pytest.approx(every.load_sectors, rel=1e-3)


BOTH_SIDES = """
	ld.global.b32 	%r1, [ %rd1 + 0 ];
	setp.gt.s32 	%p1, %r1, 0;
	@%p1 bra 	$L__BB0_2;
	add.s32 	%r2, %r1, 1;
	add.s32 	%r2, %r2, 2;
	bra.uni 	$L__BB0_3;
$L__BB0_2:
	add.s32 	%r2, %r1, 3;
$L__BB0_3:
	ret;
"""


def test_a_branch_on_data_is_passed_on_both_sides() -> None:
    assert trace.trace(launch(BOTH_SIDES)).warp_instructions == 3 + 3 + 1 + 1


def test_a_loop_that_depends_on_data_is_refused() -> None:
    body = LOOP.replace("ld.param.u32 \t%r1, [k_param_1]", "ld.global.b32 \t%r1, [ %rd9 + 0 ]")
    with pytest.raises(NotImplementedError, match="a loop ends by %p1"):
        trace.trace(launch(body))


@pytest.mark.parametrize(
    ("opcode", "operands", "value"),
    [
        ("add.s32", ("7", "%minus"), 4), ("shr.s32", ("%minus", "1"), -2), ("shr.u32", ("%minus", "31"), 1),
        ("div.s32", ("%minus", "2"), -1), ("rem.s32", ("%minus", "2"), -1), ("mul.wide.s32", ("%minus", "2"), -6),
        ("mul.hi.u32", ("%minus", "2"), 1), ("cvt.u64.u32", ("%minus",), (1 << 32) - 3), ("shl.b32", ("1", "32"), 0),
        ("mul.hi.u32", ("2", "-3"), 1),
        ("setp.lt.u32", ("%minus", "5"), 0), ("setp.lt.s32", ("%minus", "5"), 1), ("selp.b32", ("1", "2", "%p0"), 2),
        ("mad.lo.s32", ("2", "3", "%minus"), 3), ("min.s32", ("%minus", "0x5"), -3), ("not.b32", ("0",), 0xFFFFFFFF),
        ("add.f32", ("0f3F800000", "0f3F800000"), None), ("add.s32", ("7", "%r7"), None),
    ],
)  # fmt: skip
def test_scalar_instructions(opcode: str, operands: tuple[str, ...], value: int | None) -> None:
    target = "%p1" if opcode.startswith("setp") else "%d"
    kernel, (instruction,) = parsed(f"{opcode} {', '.join((target, *operands))};")
    number = {name: i for i, (name, _) in enumerate(kernel.registers)}
    values: dict[int | str, int | None] = {number["%minus"]: -3, number["%p0"]: 0}
    evaluate(instruction, values, {})
    assert values[number[target]] == value


def test_parameters_are_found_through_an_address() -> None:
    kernel, code = parsed("mov.b64 %rd1, k_param_1; ld.param.b32 %r1, [%rd1];")
    values: dict[int | str, int | None] = {}
    for instruction in code:
        evaluate(instruction, values, {"k_param_0": 3, "k_param_1": 11})
    assert values[kernel.registers.index(("%r1", "b32"))] == 11


@pytest.mark.parametrize(("name", "kind"), [("sm_80", "mma"), ("sm_90", "wgmma")])
def test_a_compiled_product(name: str, kind: str, tmp_path: Path) -> None:
    m, n, k, bm, bk = 256, 128, 512, 64, 64
    a, b = torch.zeros(m, k, dtype=torch.bfloat16), torch.zeros(k, n, dtype=torch.bfloat16)
    with offline_driver(target(name), Recorder(), tmp_path) as recorder:
        product(a, b, bm=bm, bk=bk)
    (record,) = recorder.records.values()
    counted = trace.trace(record.first)
    assert counted.tensor_flops == {kind: 2 * m * n * k}
    ctas, steps = m // bm, k // bk
    assert counted.load_sectors >= ctas * steps * (bm + n) * bk * 2 / 32  # all of it, and the prologue's copies
    assert counted.load_sectors <= ctas * (steps + 2) * (bm + n) * bk * 2 / 32
    assert counted.store_sectors == m * n * 4 / 32
    writes = ctas * steps * (bm + n) * bk * 2 / 128
    reads = ctas * steps * 2 * (bm + n) * bk * 2 / 128  # two by two warps: each row and column is read twice
    assert counted.shared_wavefronts >= writes + (reads if kind == "mma" else 0)
    assert counted.shared_wavefronts <= 1.3 * (writes + (reads if kind == "mma" else 0)) + ctas * bm * n * 4 / 64


def test_kernels_without_products_or_loops(tmp_path: Path) -> None:
    with offline_driver(target("sm_90"), Recorder(), tmp_path) as recorder:
        scale(torch.zeros(1024, dtype=torch.bfloat16), 2.0)
    (record,) = recorder.records.values()
    counted = trace.trace(record.first)
    assert not counted.tensor_flops
    assert (counted.load_sectors, counted.store_sectors) == (1024 * 2 / 32, 1024 * 4 / 32)

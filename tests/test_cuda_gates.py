"""The gates of `cast-kernels compile --cuda`: each fails where its fault is planted, and no other does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cuda_cases import needs_kernels
from ptx_emulator.predict.natural_loops import in_natural_loops
from ptx_emulator.predict.resources import functions, in_loops, listing, read_sass, spills

from cast_kernels import _native, cli
from cast_kernels.evidence import cuda_compile
from cast_kernels.evidence.cuda_compile import assemble, assembler, hear, launched, read_kernel
from cast_kernels.evidence.cuda_gates import (
    DESIGNED,
    EXACT,
    EXCEPTIONS,
    CudaRow,
    Launched,
    Spilling,
    judge,
    judge_build,
    loose,
)
from cast_kernels.evidence.cuda_modules import entries

ROOT = Path(__file__).parent.parent
PROJECT = "bcast_project_bf16_bf16_192"
LAUNCHED = Launched((256,), (4,), 107_520)


def ptxas() -> str:
    """The toolkit's, or why there is none."""
    try:
        return assembler()
    except RuntimeError as error:
        beside = Path("/usr/local/cuda/bin/ptxas")
        if not beside.is_file():
            pytest.skip(str(error))
        return str(beside)


def alone(kernel: str) -> str:
    """Its PTX without the lines of its source, whose names are the whole module's."""
    return re.sub(r"^\s*\.(loc|file)\b.*\n", "", entries()[kernel].ptx, flags=re.MULTILINE)


def row_of(kernel: str, change: Callable[[str], str] = str, sass: Callable[[str], str] = str) -> CudaRow:
    """One kernel's row, its PTX or its machine code changed."""
    ptx = change(alone(kernel))
    cubin, said = assemble(ptx, ptxas())
    code = sass(functions(listing(cubin))[kernel])
    return read_kernel(entries()[kernel].module, kernel, ptx, code, hear(said)[kernel], launched().get(kernel))


@pytest.fixture(scope="module")
def good() -> CudaRow:
    if _native.CUDA is None:
        pytest.skip(f"nothing to assemble: {_native.CUDA_REASON}")
    return row_of(PROJECT)


def test_a_good_kernel_passes(good: CudaRow) -> None:
    assert judge(good, {}) == good
    assert good.launched == LAUNCHED
    assert (good.registers, good.roles, good.ctas, good.tensor_core) == (128, (32, 224), 2, "HGMMA")
    assert good.spills == good.loop_spills == 0


@needs_kernels
@pytest.mark.parametrize(
    ("was", "becomes", "note"),
    [
        ("wgmma.fence.sync.aligned;", "", "C75"),
        (r"wgmma.wait_group.sync.aligned \d;", "", "C75"),
        (r"\.maxntid.*\n\.minnctapersm.*\n", "", "setmaxnreg"),
    ],
    ids=["no fence", "no wait", "no launch bounds"],
)
def test_notes_of_ptxas_fail(was: str, becomes: str, note: str) -> None:
    """wgmmas that it serialised, fences and waits that it had to add, setmaxnreg that it ignored."""
    row = row_of(PROJECT, lambda ptx: re.sub(was, becomes, ptx))
    found = [failure for failure in judge(row, {}).failures if note in failure]
    assert any(re.search(r"\bC75\d\d\b", failure) for failure in found)
    assert bool(row.threads) or any("no launch bounds" in failure for failure in judge(row, {}).failures)


@needs_kernels
def test_spills_inside_loops_fail_and_an_exception_allows_its_number() -> None:
    """Twelve CTAs of 128 threads leave 40 registers."""
    kernel = "bcast_attention_bf16_64"
    row = row_of(kernel, lambda ptx: re.sub(r"\.minnctapersm \d+", ".minnctapersm 12", ptx))
    count = row.loop_spills
    assert count > 50
    (failure,) = judge(row, {}).failures
    assert failure == f"{count} spill instructions inside loops"
    passed = judge(row, {kernel: Spilling(count, "measured nowhere yet")})
    assert passed.failures == ()
    assert passed.allowed == f"{count} spill instructions inside loops, {count} allowed: measured nowhere yet"
    (failure,) = judge(row, {kernel: Spilling(count - 1, "")}).failures
    assert failure == f"{count} spill instructions inside loops; the exception allows {count - 1}"
    assert loose([row], {kernel: Spilling(count, "")}) == []
    assert loose([row], {kernel: Spilling(count + 1, ""), "gone": Spilling(1, "")}) == [
        f"{kernel}: the exception allows {count + 1} spill instructions inside loops, there are {count}",
        "there is no kernel gone, which has an exception",
    ]


#: A wait whose second try stands at the end and jumps back into the middle; a loop around a spill; a called function.
SASS = """
        /*0000*/                   STL [R1], R2 ;
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R4+URZ], R9 ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/                   LDL R2, [R1] ;
        /*0040*/                   ISETP.NE.AND P1, PT, R3, RZ, PT ;
.L_x_4:
        /*0050*/                   LDL R3, [R1+0x4] ;
        /*0060*/               @P1 BRA `(.L_x_4) ;
        /*0070*/                   CALL.REL.NOINC `($f) ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R4+URZ], R9 ;
        /*00a0*/              @!P0 BRA `(.L_x_2) ;
        /*00b0*/                   BRA `(.L_x_1) ;
$f:
        /*00c0*/                   STL [R1+0x8], R5 ;
        /*00d0*/                   RET.REL.NODEC R4 `(k) ;
"""


def test_loops_are_natural_ones() -> None:
    code, labels = read_sass(SASS)
    inside = [at for at, one in enumerate(in_natural_loops(code, labels)) if one]
    assert inside == [5, 6, 9, 10, 12, 13]
    assert [at for at, one in enumerate(in_loops(code, labels)) if one] == list(range(3, 12))
    assert [at for at, one in enumerate(spills(code)) if one] == [0, 3, 5, 12]
    assert in_natural_loops([], {}) == []
    with pytest.raises(RuntimeError, match="goal of BRX"):
        in_natural_loops(*read_sass("        /*0000*/                   BRX R2 -0x10 ;\n"))


def test_a_loop_with_two_ways_in_and_an_outer_one() -> None:
    """The inner jump back has a goal that the outer code also enters behind: it dominates nothing, so it is no loop."""
    lines = ["A: @P0 BRA C", "B: NOP", "C: NOP", "D: @P1 BRA B", "E: @P2 BRA A", "F: EXIT"]
    text = ""
    for number, line in enumerate(lines):
        name, rest = line.split(": ")
        rest = re.sub(r"BRA (\w)", r"BRA `(.L_\1)", rest)
        text += f".L_{name}:\n        /*{number:04x}*/  {rest} ;\n"
    code, labels = read_sass(text)
    assert in_natural_loops(code, labels) == [True] * 5 + [False]
    outer = text.replace("@P2 BRA `(.L_A)", "NOP")
    assert in_natural_loops(*read_sass(outer)) == [False] * 6


def test_a_function_in_ptx_fails(good: CudaRow) -> None:
    row = row_of(PROJECT, lambda ptx: ptx.replace(".visible .entry", ".visible .func f() { ret; }\n.visible .entry", 1))
    assert judge(row, {}).failures == ("1 .func in the PTX of bcast_project: a kernel must be all inline",)
    assert row.functions == 1
    assert good.functions == 0


def test_more_registers_than_the_file_has_fail(good: CudaRow) -> None:
    """`setmaxnreg.inc` would wait for ever, and ptxas says nothing."""
    row = row_of(PROJECT, lambda ptx: ptx.replace(".u32 224;", ".u32 232;"))
    assert row.notes == ()
    assert judge(row, {}).failures == (
        "setmaxnreg asks for 32 + 232 registers a thread; the kernel begins with 2 x 128",
    )
    three = replace(good, threads=384, registers=168, ctas=2, launched=replace(LAUNCHED, threads=(384,)))
    assert judge(replace(three, roles=(24, 240)), {}).failures == ()
    assert judge(replace(three, roles=(32, 240)), {}).failures == (
        "setmaxnreg asks for 32 + 240 + 240 registers a thread; the kernel begins with 3 x 168",
    )
    assert judge(replace(three, roles=(40,)), {}).failures == ()  # the rest keep what they began with
    assert judge(replace(good, roles=(24, 40, 224)), {}).failures  # two of the three at once, the largest


def test_a_second_cta_that_does_not_fit_fails(good: CudaRow) -> None:
    ptx = alone(PROJECT)
    cubin, said = assemble(ptx, ptxas())
    code, told = functions(listing(cubin))[PROJECT], hear(said)[PROJECT]
    most = 233_472 // 2 - 1024
    for shared, failures in (
        (most, ()),
        (most + 1, ("an SM holds 1 CTAs, designed for 2",)),
        (
            232_449,
            ("232449 bytes of shared memory; sm_90 allows 232448", "an SM holds 0 CTAs, designed for 2"),
        ),
    ):
        row = read_kernel(good.module, PROJECT, ptx, code, told, replace(LAUNCHED, shared_bytes=shared))
        assert judge(row, {}).failures == failures
    (failure,) = judge(replace(good, module="bcast_new"), {}).failures
    assert failure == "bcast_new has no line in DESIGNED: how many CTAs must an SM hold?"


def test_a_launch_that_is_not_what_was_compiled_fails(good: CudaRow) -> None:
    known = Launched((128, 256), (2,), 107_520)
    assert judge(replace(good, launched=known), {}).failures == (
        "compiled for 256 threads, launched with 128, 256",
        "compiled for 4 CTAs of a cluster, launched with 2",
    )
    assert "no configuration launches it" in judge(replace(good, launched=None), {}).failures[0]


@needs_kernels
def test_known_mistakes_of_ptxas_fail() -> None:
    """Machine code that does not wait for its wgmmas; PTX with an addition that a release gets wrong."""
    early = row_of(PROJECT, sass=lambda code: re.sub(r"WARPGROUP\.DEPBAR[^;]*;", "NOP ;", code))
    assert any("of a wgmma that may still be under way" in failure for failure in judge(early, {}).failures)
    added = row_of(PROJECT, lambda ptx: ptx.replace("ret;", "// add.s16x2\n\tret;", 1))
    (failure,) = judge(added, {}).failures
    assert "packed addition of 16 bits" in failure


def test_notes_are_their_kernels() -> None:
    said = """ptxas info    : (C7517) Potential Performance Loss: wgmma serialized in function 'b' of the module
ptxas info    : (C7599) something about all
ptxas info    : Compiling entry function 'a' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem
ptxas info    : Compiling entry function 'b' for 'sm_90a'
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 168 registers
"""
    told = hear(said)
    assert [len(told[kernel].notes) for kernel in "ab"] == [1, 2]
    assert "C7599" in told["a"].notes[0]
    assert (told["a"].static_bytes, told["b"].static_bytes) == (512, 0)
    assert (told["b"].registers, told["b"].stack_bytes) == (168, 8)
    with pytest.raises(RuntimeError, match="does not tell"):
        hear("Compiling entry function 'a' for 'sm_90a'\n")


def test_a_long_build_and_a_large_module_fail() -> None:
    assert judge_build({"processor_seconds": 240}, 8_000_000) == []
    assert judge_build({}, 1) == []
    assert judge_build({"processor_seconds": 241}, 8_000_001) == [
        "the build took 241 s of processor time; 240 are allowed",
        "the module has 8000001 bytes; 8000000 are allowed",
    ]


@needs_kernels
def test_the_command_fails_where_a_kernel_does_and_writes_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ptxas()
    monkeypatch.setattr(cuda_compile, "modules", lambda: {"bcast_prepare": alone("bcast_prepare_bf16_bf16")})
    monkeypatch.setattr(cuda_compile, "loose", lambda rows: [])
    known = {"bcast_prepare_bf16_bf16": launched()["bcast_prepare_bf16_bf16"]}
    monkeypatch.setattr(cuda_compile, "launched", lambda: known)
    told = tmp_path / "told.json"
    assert cli.main(["compile", "--cuda", "--ptxas", path, "--json", str(told)]) == 0
    assert "1 kernels, 0 failed" in capsys.readouterr().out
    (row,) = json.loads(told.read_text())["kernels"]
    assert row["kernel"] == "bcast_prepare_bf16_bf16"
    known["bcast_gone"] = known["bcast_prepare_bf16_bf16"]
    assert cli.main(["compile", "--cuda", "--ptxas", path]) == 1
    assert "FAIL  there is no kernel bcast_gone, which is launched" in capsys.readouterr().out
    known.clear()
    assert cli.main(["compile", "--cuda", "--ptxas", path]) == 1
    assert "FAIL  bcast_prepare_bf16_bf16: no configuration launches it" in capsys.readouterr().out
    assert cli.main(["compile", "--cuda", "--ptxas", str(tmp_path / "none")]) == 2  # a wrong argument
    assert str(tmp_path / "none") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "bf16"], "leave out --dtype"),
        (["--problems", "step"], "leave out --problems"),
        (["--cache"], "leave out --cache"),
        (["--ptxas", "a", "b"], "takes one assembler, not 2"),
    ],
)
def test_what_means_nothing_for_these_kernels_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compile", "--cuda", *options]) == 2
    assert message in capsys.readouterr().err


def test_without_the_kernels_the_command_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_native, "CUDA", None)
    monkeypatch.setattr(_native, "CUDA_REASON", "the CUDA kernels are not built: no nvcc on PATH")
    assert cli.main(["compile", "--cuda"]) == 1
    assert capsys.readouterr().err == ("cast-kernels compile: error: the CUDA kernels are not built: no nvcc on PATH\n")


def test_the_assembler_is_the_builds_or_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ptxas").write_text("")
    monkeypatch.setattr(_native, "RECORD", {"cuda": {"nvcc": str(tmp_path / "nvcc")}})
    assert assembler() == str(tmp_path / "ptxas")
    (tmp_path / "ptxas").unlink()
    with pytest.raises(RuntimeError, match="not there any more; name a ptxas with --ptxas"):
        assembler()
    monkeypatch.setattr(_native, "RECORD", {})
    with pytest.raises(RuntimeError, match="recorded no toolkit; name a ptxas with --ptxas"):
        assembler()


def test_the_committed_rows_pass() -> None:
    """What was assembled last, by today's gates and exceptions."""
    told = json.loads((ROOT / "benchmarks/evidence/cuda_compile.json").read_text())
    rows = []
    for row in told["kernels"]:
        known = Launched(*(tuple(x) if isinstance(x, list) else x for x in row["launched"].values()))
        lists = {name: tuple(value) for name, value in row.items() if isinstance(value, list)}
        rows.append(CudaRow(**row | lists | {"launched": known, "failures": ()}))
    assert [(row.kernel, row.failures) for row in map(judge, rows) if row.failures] == []
    assert {row.module for row in rows} == DESIGNED.keys()
    assert told["ptxas"] == EXACT
    assert loose(rows) == []
    assert EXCEPTIONS.keys() == {row.kernel for row in rows if row.allowed}
    assert judge_build(told, told["module_bytes"]) == []
    assert told["processor_seconds"] > 0

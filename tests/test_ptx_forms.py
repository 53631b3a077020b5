"""What nvcc writes around the instructions: parameters as bytes, constants, source lines, and the forms that stop."""

import struct

import numpy as np
import ptx_emulator
import pytest
from ptx_snippets import HEADER, SCRATCH, entry, run

LANES = np.arange(64, dtype=np.uint32)
STORE = "mad.wide.u32 %d32, %tid0, 4, %ptr0; st.global.b32 [%d32], %r1;"


def go(code: str, threads: int = 64, **options: object) -> np.ndarray:
    out = np.zeros(threads, np.uint32)
    run(entry(code, 1, **options), [out], threads=threads)
    return out


STRUCT = f"""{HEADER}.visible .entry f(.param .u64 out, .param .align 8 .b8 s[24], .param .f32 eps) {{ {SCRATCH}
mov.u32 %r9, %tid.x; ld.param.u64 %d0, [out]; ld.param.v2.u32 {{%r1, %r2}}, [s+8]; ld.param.f32 %f1, [eps];
mov.b64 %d1, s; ld.param.u32 %r3, [%d1+16]; cvta.param.u64 %d2, %d1; ld.u32 %r4, [%d2+20];
mov.b32 %r5, %f1; mad.wide.u32 %d3, %r9, 20, %d0; st.global.b32 [%d3], %r1; st.global.b32 [%d3+4], %r2;
st.global.b32 [%d3+8], %r3; st.global.b32 [%d3+12], %r4; st.global.b32 [%d3+16], %r5; ret; }}"""


def launch_struct(*arguments: object, text: str = STRUCT) -> np.ndarray:
    memory, out = ptx_emulator.Memory(), np.zeros(32 * 5, np.uint32)
    address = memory.register(out.view(np.uint8), "out")
    kernel = ptx_emulator.parse(text).kernels["f"]
    ptx_emulator.launch(kernel, grid=(1, 1, 1), threads=32, arguments=[address, *arguments], memory=memory)  # type: ignore[list-item]
    memory.write_back()
    return out.reshape(32, 5)


def test_a_struct_is_given_as_bytes() -> None:
    bits = struct.unpack("<I", struct.pack("<f", 1e-6))[0]
    rows = [1, 2, 3, 4, bits]
    for eps in (1e-6, struct.pack("<f", 1e-6)):
        np.testing.assert_array_equal(launch_struct(struct.pack("<Q4I", 9, 1, 2, 3, 4), eps), [rows] * 32)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((bytes(20), 1.0), ValueError, "s has 24 bytes, 20 were given"),
        ((7, 1.0), TypeError, "struct of 24 bytes: pass its bytes or a TensorMap"),
        ((bytes(24), 1), TypeError, r"eps is \.f32; pass a float, or the 4 bytes of its bits, not the int 1"),
        ((bytes(24), bytes(8)), ValueError, "eps has 4 bytes, 8 were given"),
        ((bytes(24), "1"), TypeError, "number or bytes, not str"),
    ],
)
def test_arguments_of_a_wrong_kind(arguments: tuple[object, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        launch_struct(*arguments)


def test_parameters_are_read_only_and_bounded() -> None:
    with pytest.raises(ptx_emulator.MemoryFault, match="the param space is read only"):
        go("mov.b64 %d1, x0; cvta.param.u64 %d1, %d1; st.b32 [%d1], 1;")
    with pytest.raises(ptx_emulator.MemoryFault, match="outside the parameters"):
        go("mov.b64 %d1, x0; cvta.param.u64 %d1, %d1; ld.b32 %r1, [%d1+8];")
    with pytest.raises(ptx_emulator.Misaligned, match="byte 2 of the parameters is no multiple of 4"):
        go("ld.param.b32 %r1, [x0+2];")


CONSTANTS = """.const .align 4 .b8 bytes[8] = {1, 0, 0, 0, 0xFF};
.visible .const .align 8 .f32 halves[3] = {0f3F000000, 1.5, 0fC0000000};
.const .u32 one = 1;
.const .align 4 .b8 zeros[8];
.const .u64 pointer[1] = {generic(one)};
"""


def test_constants_with_initialisers() -> None:
    code = """ld.const.b32 %r2, [bytes]; ld.const.b32 %r3, [bytes+4]; ld.const.f32 %f1, [halves+4]; mov.b32 %r4, %f1;
    mov.b64 %d1, halves; ld.const.b32 %r5, [%d1+8]; cvta.const.u64 %d2, %d1; ld.b32 %r6, [%d2]; ld.const.u32 %r7, [one];
    ld.const.v2.u32 {%r8, %r9}, [zeros]; and.b32 %r10, %tid0, 3; shl.b32 %r10, %r10, 1; cvt.u64.u32 %d3, %r10;
    mov.b64 %d4, bytes; add.s64 %d4, %d4, %d3; ld.const.u8 %r11, [%d4];"""
    given = {"%r2": 1, "%r3": 0xFF, "%r4": 0x3FC00000, "%r5": 0xC0000000, "%r6": 0x3F000000, "%r7": 1, "%r9": 0}
    for register, value in given.items():
        assert (go(f"{code} mov.b32 %r1, {register};{STORE}", outside=CONSTANTS) == value).all(), register
    np.testing.assert_array_equal(
        go(f"{code} mov.b32 %r1, %r11;{STORE}", outside=CONSTANTS), np.array([1, 0, 255, 0] * 16)
    )


def test_constants_that_cannot_be_had() -> None:
    with pytest.raises(ptx_emulator.Unsupported, match="unknown symbol pointer"):
        go("ld.const.u64 %d1, [pointer];", outside=CONSTANTS)
    with pytest.raises(ptx_emulator.MemoryFault, match="outside the constants"):
        go("ld.const.b32 %r1, [bytes+60];", outside=CONSTANTS)
    for text, says in ((".const .b32 x[1] = {1, 2};", "x has 1 elements, 2"), (".const x;", "unreadable constant")):
        with pytest.raises(ptx_emulator.ParseError, match=says):
            ptx_emulator.parse(HEADER + text)


def test_trap() -> None:
    with pytest.raises(ptx_emulator.Trap, match="thread 40 of CTA 0"):
        go("setp.eq.u32 %p1, %tid0, 40; @%p1 trap;")
    assert (go("setp.eq.u32 %p1, %tid0, 99; mov.b32 %r1, 5; @%p1 trap;" + STORE) == 5).all()


@pytest.mark.parametrize(
    ("form", "out", "want"),
    [
        ("bar.red.popc.u32 %r1, 0, %p1;", "", 10),
        ("bar.red.popc.u32 %r1, 0, !%p1;", "", 54),
        ("barrier.cta.red.or.pred %p2, 1, 64, %p1;", "selp.b32 %r1, 1, 0, %p2;", 1),
        ("bar.red.and.pred %p2, 0, %p1;", "selp.b32 %r1, 1, 0, %p2;", 0),
        ("bar.red.and.pred %p2, 0, %p3;", "selp.b32 %r1, 1, 0, %p2;", 1),
    ],
)
def test_a_barrier_with_a_reduction(form: str, out: str, want: int) -> None:
    setup = "setp.lt.u32 %p1, %tid0, 10; setp.lt.u32 %p3, %tid0, 64; mov.b32 %r2, 0; setp.lt.u32 %p4, %tid0, 32;"
    assert (go(f"{setup} {form} {out}" + STORE) == want).all()
    apart = f"{setup} @%p4 bra $A; add.u32 %r2, %r2, 1; {form} bra $J; $A: {form} $J: {out}{STORE}"
    assert (go(apart) == want).all(), "reached along two ways"


def test_a_warp_barrier_waits_for_its_lanes() -> None:
    """The lower half of each warp runs ahead: it may read what the upper half stores before only behind the barrier."""
    code = """mov.b32 %r9, tile; mad.lo.u32 %r8, %tid0, 4, %r9; xor.b32 %r7, %tid0, 16; mad.lo.u32 %r7, %r7, 4, %r9;
    and.b32 %r2, %tid0, 31; setp.lt.u32 %p1, %r2, 16; @!%p1 bra $UP;
    st.shared.b32 [%r8], %tid0; bar.warp.sync -1; ld.shared.b32 %r1, [%r7]; bra $J;
    $UP: st.shared.b32 [%r8], %tid0; bar.warp.sync 0xFFFFFFFF; ld.shared.b32 %r1, [%r7];
    $J: """
    shared = ".shared .align 16 .b8 tile[1024];\n"
    np.testing.assert_array_equal(go(code + STORE, outside=shared), LANES ^ 16)
    early = go(code.replace("bar.warp.sync -1;", "").replace("bar.warp.sync 0xFFFFFFFF;", "") + STORE, outside=shared)
    assert (early != LANES ^ 16).any(), "without the barrier the half that runs ahead reads too early"


def test_a_warp_barrier_of_lanes_that_never_meet() -> None:
    code = "setp.lt.u32 %p1, %tid0, 5; @%p1 bar.warp.sync 0xFF; @!%p1 bar.sync 1, 96;"
    with pytest.raises(ptx_emulator.Deadlock, match=r"bar\.warp\.sync 0xFF.*5 threads, thread 0 first.*0x000000ff"):
        go(code)
    assert (go("mov.b32 %r1, 3; setp.gt.u32 %p1, %tid0, 8; @%p1 ret; bar.warp.sync -1;" + STORE)[:8] == 3).all(), (
        "lanes that have left are not waited for"
    )


def test_reports_name_the_source_line() -> None:
    text = entry(
        "\n.loc 1 7 3\nmov.b32 %r9, tile;\n.loc 1 8 9, function_name $L, inlined_at 1 7 3\nst.shared.b32 [%r9], %tid0;"
        "\n.loc 1 9 1\nld.shared.b32 %r1, [%r9+{0}];",
        0,
        outside='.file 1 "some/where/kernel.cu"\n.section .debug_str { $L: .b8 102, 0 }\n'
        ".shared .align 16 .b8 tile[8];\n",
    )
    report = run(text.replace("{0}", "0"), [], threads=64)
    assert {(f.line, f.other_line) for f in report.faults} >= {("kernel.cu:9", "kernel.cu:8")}
    assert any("(kernel.cu:9) after warp" in str(f) for f in report.faults)
    with pytest.raises(ptx_emulator.MemoryFault, match=r"\(kernel\.cu:9\)"):
        run(text.replace("{0}", "64"), [])
    with pytest.raises(ptx_emulator.Unsupported, match=r"discard.*\(kernel\.cu:9\)"):
        run(text.replace("ld.shared.b32 %r1, [%r9+{0}]", "discard.L2 [%d1], 128"), [])
    with pytest.raises(ptx_emulator.Deadlock, match=r"\(kernel\.cu:3\)"):
        run(entry("\n.loc 1 3 1\nbar.sync 0, 96;", 0, outside='.file 1 "kernel.cu"\n'), [])


BOUNDS = ".maxntid 384, 1, 1\n.minnctapersm 1\n"
SPECIALISED = """setp.lt.u32 %p1, %tid0, 128; @%p1 bra $P; setmaxnreg.inc.sync.aligned.u32 {up}; bra $J;
$P: setmaxnreg.dec.sync.aligned.u32 {down}; $J: mov.b32 %r1, 6;"""


def test_the_account_of_the_register_file() -> None:
    def launch(up: int, down: int, directives: str = BOUNDS) -> set[str]:
        out = np.zeros(384, np.uint32)
        text = entry(SPECIALISED.format(up=up, down=down) + STORE, 1, directives=directives)
        report = run(text, [out], threads=384)
        assert (out == 6).all()
        return {fault.kind for fault in report.faults}

    assert not launch(240, 24)
    assert not launch(232, 40)
    with pytest.raises(
        ptx_emulator.Deadlock, match=r"inc.* 1 warpgroups wait for 248.*have 40 \+ 248 \+ 168 of 168 x 3"
    ):
        launch(248, 40)
    with pytest.raises(ptx_emulator.Deadlock, match="of 80 x 3"):
        launch(240, 24, BOUNDS.replace("sm 1", "sm 2"))
    assert not launch(240, 24, ".maxnreg 168\n")
    assert launch(240, 24, "") == {"setmaxnreg is ignored: the kernel has neither launch bounds nor .maxnreg"}
    with pytest.raises(ptx_emulator.EmulationError, match="more registers than the 168"):
        launch(240, 176)
    with pytest.raises(ptx_emulator.Unsupported, match="multiple of 8"):
        launch(241, 24)


def test_griddepcontrol_of_one_launch() -> None:
    """Nothing comes before a launch of its own, so the wait ends at once; another form stops."""
    assert (go("griddepcontrol.wait; mov.b32 %r1, 4; griddepcontrol.launch_dependents;" + STORE) == 4).all()
    with pytest.raises(ptx_emulator.Unsupported, match=r"griddepcontrol\.other"):
        go("griddepcontrol.other;")


def test_directives_of_clusters() -> None:
    text = HEADER + ".visible .entry f()\n.explicitcluster\n.reqnctapercluster 2, 1, 1\n.maxnreg 64\n{ ret; }"
    kernel = ptx_emulator.parse(text).kernels["f"]
    assert (kernel.cluster, kernel.max_registers) == ((2, 1, 1), 64)


@pytest.mark.parametrize(
    "name", ["tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;", "discard.L2 [%d1], 128;"]
)
def test_what_is_not_emulated_stops_with_its_name(name: str) -> None:
    with pytest.raises(ptx_emulator.Unsupported, match=name.split(".")[0]):
        go(name)

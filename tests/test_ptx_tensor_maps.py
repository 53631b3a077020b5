"""Tensor maps that a kernel writes itself, field by field, and publishes in global memory."""

import numpy as np
import ptx_emulator
import pytest
from ptx_snippets import entry, run

OUTSIDE = ".shared .align 1024 .b8 tile[1024];\n.shared .align 128 .b8 made[128];\n.shared .align 8 .b8 bar[8];\n"
REPLACE = "@%p2 tensormap.replace.tile.{0}.shared::cta.b1024.{1} [%r8]{2};\n"
FIELDS = [
    ("global_address", "b64", ", %ptr0"),
    ("rank", "b32", ", 1"),
    ("box_dim", "b32", ", 0, 8"),
    ("box_dim", "b32", ", 1, 4"),
    ("global_dim", "b32", ", 0, 12"),
    ("global_dim", "b32", ", 1, 6"),
    ("global_stride", "b64", ", 0, 48"),
    ("element_stride", "b32", ", 0, 1"),
    ("element_stride", "b32", ", 1, 1"),
    ("elemtype", "b32", ", 2"),
    ("interleave_layout", "b32", ", 0"),
    ("swizzle_mode", "b32", ", 0"),
    ("fill_mode", "b32", ", 0"),
]
MAKE = "".join(REPLACE.replace("{0}", f).replace("{1}", kind).replace("{2}", more) for f, kind, more in FIELDS)
CODE = """mov.b32 %r9, tile; mov.b32 %r8, made; mov.b32 %r10, bar; setp.eq.u32 %p2, %tid0, 0;
{make} bar.warp.sync -1;
tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%ptr2], [%r8], 128;
fence.proxy.tensormap::generic.acquire.gpu [%ptr2], 128;
@%p2 mbarrier.init.shared::cta.b64 [%r10], 1; bar.sync 0;
@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 128;
@%p2 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r9], [%ptr2, {8, 1}], [%r10];
$W: mbarrier.try_wait.parity.shared::cta.b64 %p5, [%r10], 0; @!%p5 bra $W;
mad.lo.u32 %r7, %tid0, 4, %r9; ld.shared.b32 %r1, [%r7]; mad.wide.u32 %d1, %tid0, 4, %ptr1; st.global.b32 [%d1], %r1;"""


def go(make: str = MAKE, code: str = CODE) -> tuple[np.ndarray, ptx_emulator.Report]:
    x, out, scratch = np.arange(72, dtype=np.uint32), np.zeros(32, np.uint32), np.zeros(128, np.uint8)
    report = run(entry(code.replace("{make}", make), 3, outside=OUTSIDE), [x, out, scratch])
    return out.reshape(4, 8), report


def test_a_map_made_by_a_kernel() -> None:
    out, report = go()
    want = np.zeros((4, 8), np.uint32)
    want[:, :4] = np.arange(72, dtype=np.uint32).reshape(6, 12)[1:5, 8:]
    np.testing.assert_array_equal(out, want)
    assert not report.faults


def test_maps_that_a_kernel_made_wrong() -> None:
    with pytest.raises(ptx_emulator.MemoryFault, match=r"strides \(40,\): multiples of 16; the map at"):
        go(MAKE.replace("0, 48", "0, 40"))
    with pytest.raises(ptx_emulator.MemoryFault, match="no tensor map; pass a TensorMap"):
        go("")
    with pytest.raises(ptx_emulator.Unsupported, match="element_stride 2 in"):
        go(MAKE.replace("1, 1]", "1, 2]").replace(", 1, 1;", ", 1, 2;"))
    with pytest.raises(ptx_emulator.Unsupported, match="interleave_layout 1 in"):
        go(
            MAKE.replace(
                "interleave_layout.shared::cta.b1024.b32 [%r8], 0", "interleave_layout.shared::cta.b1024.b32 [%r8], 1"
            )
        )
    with pytest.raises(ptx_emulator.EmulationError, match="the lanes of a warp name different maps"):
        go(
            code=CODE.replace(
                "tensormap.cp_", "mad.wide.u32 %d3, %tid0, 0, %ptr2; @%p2 add.s64 %d3, %d3, 128;\ntensormap.cp_"
            ).replace("aligned [%ptr2]", "aligned [%d3]")
        )
    with pytest.raises(ptx_emulator.Divergence, match="some lanes of a warp only"):
        go(code=CODE.replace("\ntensormap.cp_", "\n@%p2 tensormap.cp_"))


def test_a_change_needs_an_acquiring_fence_before_its_use() -> None:
    """The map lies in global memory; the fence names it, and comes behind the change."""
    fence = "fence.proxy.tensormap::generic.acquire.gpu [%ptr2], 128;\n"
    assert fence in CODE
    kind = {"tensor map used without fence.proxy.tensormap"}
    assert {f.kind for f in go(code=CODE.replace(fence, ""))[1].faults} == kind
    assert {f.kind for f in go(code=CODE.replace(fence, fence.replace("%ptr2", "%ptr1")))[1].faults} == kind
    early = CODE.replace(fence, "").replace("bar.warp.sync -1;\n", f"bar.warp.sync -1;\n{fence}")
    assert {f.kind for f in go(code=early)[1].faults} == kind
    release = fence.replace("acquire.gpu [%ptr2], 128", "release.gpu")
    assert {f.kind for f in go(code=CODE.replace(fence, release))[1].faults} == kind


@pytest.mark.parametrize(
    ("field", "more", "says"),
    [
        ("element_stride", ", 1, 1", r"strides \(1, 127\): 1 each"),
        ("interleave_layout", ", 0", "layout 127: 0"),
    ],
)
def test_a_field_that_the_kernel_left_out(field: str, more: str, says: str) -> None:
    """It is what was in shared memory before."""
    left = REPLACE.replace("{0}", field).replace("{1}", "b32").replace("{2}", more)
    assert left in MAKE
    with pytest.raises(ptx_emulator.MemoryFault, match=says):
        go(MAKE.replace(left, ""))


def test_a_map_that_other_lanes_of_the_warp_filled() -> None:
    """32 lanes write a word each, one of them changes the whole; one lane that wrote it all need not meet others."""
    fill = "mad.lo.u32 %r11, %tid0, 4, %r8; mov.u32 %r12, 0; {0}st.shared.b32 [%r11], %r12; {1}"
    alone = "{0}" + "".join(f"@%p2 st.shared.b32 [%r11+{4 * i}], %r12; " for i in range(1, 32)) + "{1}"
    kind = {"write by other lanes of the warp, which have not met"}
    for first, met, kinds in (
        ("", "", kind),
        ("", "bar.warp.sync -1;", set()),
        ("", "bar.sync 0;", set()),
        ("@%p2 ", "", set()),
    ):
        more = alone.replace("{1}", "").replace("{0}", "") if first else ""
        code = CODE.replace("{make}", fill.replace("{0}", first).replace("{1}", more + met) + "{make}")
        assert {f.kind for f in go(code=code)[1].faults} == kinds, (first, met)


def test_a_map_that_another_warp_makes() -> None:
    """Two warps: without a barrier the one that publishes reads what the other writes."""
    code = CODE.replace("setp.eq.u32 %p2, %tid0, 0;", "setp.eq.u32 %p2, %tid0, 32; setp.lt.u32 %p1, %tid0, 32;")
    code = code.replace("\ntensormap.cp_", "\n{0} @%p1 tensormap.cp_").split("fence.proxy")[0]

    def faults(between: str) -> set[str]:
        arrays = [np.zeros(72, np.uint32), np.zeros(32, np.uint32), np.zeros(128, np.uint8)]
        text = entry(code.replace("{make}", MAKE).replace("{0}", between), 3, outside=OUTSIDE)
        return {f.kind for f in run(text, arrays, threads=64).faults}

    assert faults("bar.sync 0;") == set()
    assert faults("") == {"write-read"}

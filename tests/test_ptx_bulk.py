"""Bulk copies: in a row and by tensor maps, into shared memory and out of it, and what may not touch them meanwhile."""

import itertools

import numpy as np
import ptx_emulator
import pytest
from ptx_emulator.core.tensor_maps import swizzled, unpacked
from ptx_snippets import HEADER, SCRATCH

TOLD = "mbarrier::complete_tx::bytes"
LANDINGS = ("early", "late")
OUTSIDE = ".shared .align 1024 .b8 tile[8192];\n.shared .align 8 .b8 bar[16];\n"
SETUP = f"""{SCRATCH} .reg .b64 %map; .reg .b64 %x; .reg .b64 %y; ld.param.u64 %x, [x]; ld.param.u64 %y, [y];
mov.b64 %map, m; cvta.param.u64 %map, %map; mov.u32 %r0, %tid.x; mov.b32 %r9, tile; mov.b32 %r10, bar;
mad.lo.u32 %r8, %r0, 4, %r9; setp.eq.u32 %p2, %r0, 0; setp.lt.u32 %p1, %r0, 32;
mov.u32 %r2, %cluster_ctarank; mov.b32 %r3, 0x10000;
@%p2 mbarrier.init.shared::cta.b64 [%r10], 1; @%p2 fence.mbarrier_init.release.cluster;
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
"""
END = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; ret; }"
WAIT = "$W: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p5, [%r10], 0; @!%p5 bra $W;"
#: every thread copies words of the tile to y, {bytes} in all; CTA by CTA
DUMP = """mov.b32 %r20, %r0; $D: mad.lo.u32 %r21, %r20, 4, %r9; ld.shared.b32 %r22, [%r21];
mad.lo.u32 %r23, %r2, {bytes}, 0; mad.lo.u32 %r23, %r20, 4, %r23; cvt.u64.u32 %d20, %r23; add.s64 %d20, %d20, %y;
setp.lt.u32 %p6, %r20, {words}; @%p6 st.global.b32 [%d20], %r22;
add.u32 %r20, %r20, 64; setp.lt.u32 %p6, %r20, {words}; @%p6 bra $D;"""


def dump(size: int) -> str:
    return DUMP.replace("{bytes}", str(size)).replace("{words}", str(size // 4))


def expect(size: int) -> str:
    return f"@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], {size};"


def go(
    code: str,
    x: np.ndarray,
    y: np.ndarray,
    tensor: ptx_emulator.TensorMap | None = None,
    clusters: int = 1,
    on: str = "x",
    **options: object,
) -> ptx_emulator.Report:
    """Run `code` with x and y, whose contents it changes, and a map of one of them."""
    text = f"{HEADER}{OUTSIDE}.visible .entry f(.param .u64 x, .param .u64 y, .param .align 128 .b8 m[128]) {{ {SETUP}"
    kernel = ptx_emulator.parse(text + code + END).kernels["f"]
    memory = ptx_emulator.Memory()
    at = {name: memory.register(a.view(np.uint8).reshape(-1), name) for name, a in (("x", x), ("y", y))}
    given = bytes(128) if tensor is None else ptx_emulator.TensorMap(**{**vars(tensor), "address": at[on]})
    options.setdefault("target", "sm_90")
    report = ptx_emulator.launch(
        kernel,
        grid=(clusters, 1, 1),
        threads=64,
        arguments=[at["x"], at["y"], given],
        memory=memory,
        clusters=clusters,
        **options,  # type: ignore[arg-type]
    )
    memory.write_back()
    return report


def words(count: int, start: int = 0) -> np.ndarray:
    return np.arange(start, start + count, dtype=np.uint32)


def kinds(report: ptx_emulator.Report) -> set[str]:
    return {fault.kind for fault in report.faults}


LOAD = f"@%p2 cp.async.bulk.shared::cluster.global.{TOLD} [%r9], [%x], 512, [%r10];"


@pytest.mark.parametrize("landing", LANDINGS)
def test_bytes_in_a_row(landing: str) -> None:
    x, y = words(128), np.zeros(128, np.uint32)
    report = go(expect(512) + LOAD + WAIT + dump(512), x, y, landing=landing)
    np.testing.assert_array_equal(y, x)
    assert not report.faults
    assert report.counters.async_copy_bytes == 512
    hinted = LOAD.replace("bytes [", "bytes.L2::cache_hint [").replace("[%r10];", "[%r10], %d1;")
    y[:] = 0
    assert not go(expect(512) + hinted + WAIT + dump(512), x, y, landing=landing).faults
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("landing", LANDINGS)
def test_reads_that_do_not_wait_are_found(landing: str) -> None:
    x, y = words(128), np.zeros(128, np.uint32)
    found = kinds(go(expect(512) + LOAD + dump(512) + WAIT, x, y, landing=landing))
    assert found == {"write-read"} if landing == "early" else found >= {"read of a copy in flight"}
    store = "st.shared.b32 [%r8], 7; bar.sync 0;"
    found = kinds(go(store + expect(512) + LOAD + WAIT, x, y, landing=landing))
    assert found == {"bulk copy over a write without fence.proxy.async"}
    fence = store.replace("bar", "fence.proxy.async.shared::cta; bar")
    assert not go(fence + expect(512) + LOAD + WAIT, x, y, landing=landing).faults
    assert kinds(go(fence.replace("bar.sync 0;", "") + expect(512) + LOAD + WAIT, x, y, landing=landing)) == {
        "write-write"
    }
    found = kinds(go(expect(512) + LOAD, x, y, landing=landing))
    assert found == {"CTA ends while a copy into its memory may be in flight"}


def test_sizes_and_places_of_a_bulk_copy() -> None:
    x, y = words(128), np.zeros(128, np.uint32)
    for old, new, says in (
        ("512,", "24,", "size 0x18"),
        ("[%x]", "[%x+8]", "the address"),
        ("[%r9]", "[%r9+8]", "shared"),
    ):
        with pytest.raises(ptx_emulator.Misaligned, match=f"{says}.*no multiple of 16"):
            go(LOAD.replace(old, new), x, y)
    with pytest.raises(ptx_emulator.MemoryFault, match="outside every buffer"):
        go(LOAD.replace("512,", "528,"), x, y)
    with pytest.raises(ptx_emulator.MemoryFault, match="outside the CTA's"):
        go(LOAD.replace("[%r9]", "[%r9+16384]"), x, y)
    with pytest.raises(ptx_emulator.MemoryFault, match="no mbarrier was initialised at shared byte 8200"):
        go(LOAD.replace("[%r10]", "[%r10+8]"), x, y)
    with pytest.raises(ptx_emulator.Deadlock, match="0 of 1 arrivals and -16 bytes outstanding"):
        go(expect(496) + LOAD + WAIT, x, y)


FILL = (
    "$F: st.shared.b32 [%r8], %r0; add.u32 %r0, %r0, 64; add.u32 %r8, %r8, 256; setp.lt.u32 %p6, %r0, 128; @%p6 bra $F;"
)
FENCE = "fence.proxy.async.shared::cta; bar.sync 0;"
PUT = "@%p2 cp.async.bulk.global.shared::cta.bulk_group [%y], [%r9], 512;"
COMMIT, DONE = "@%p2 cp.async.bulk.commit_group;", "@%p2 cp.async.bulk.wait_group 0;"
READ = DONE.replace("group 0", "group.read 0")


@pytest.mark.parametrize("landing", LANDINGS)
def test_out_of_shared_memory(landing: str) -> None:
    def run(code: str) -> tuple[np.ndarray, set[str]]:
        y = np.zeros(128, np.uint32)
        found = kinds(go(FILL + code, words(1), y, landing=landing))
        return y, found

    for code in (FENCE + PUT + COMMIT + DONE, FENCE + PUT + COMMIT + READ):
        y, found = run(code)
        np.testing.assert_array_equal(y, words(128))
        assert not found
    assert run(PUT.join(("bar.sync 0;", "")) + COMMIT + DONE)[1] == {
        "bulk copy reads a write without fence.proxy.async"
    }
    assert run("fence.proxy.async.shared::cta;" + PUT + COMMIT + DONE)[1] == {"write-read by a bulk copy"}
    again = "bar.sync 0; st.shared.b32 [%r9], 9;"
    assert run(FENCE + PUT + COMMIT + again + DONE)[1] >= {"write to the source of a bulk copy"}
    assert not run(FENCE + PUT + COMMIT + READ + again.replace("st", "@%p2 st"))[1]
    assert run(FENCE + PUT + COMMIT)[1] == {"CTA ends while a bulk copy may still read its memory"}
    two = PUT + COMMIT + PUT.replace("[%y], [%r9], 512", "[%y], [%r9+256], 256") + COMMIT
    assert run(FENCE + two + DONE.replace(" 0", " 1"))[1] == {"CTA ends while a bulk copy may still read its memory"}


def test_late_copies_read_what_was_overwritten() -> None:
    """The value shows it as well, where a copy reads as late as it may."""
    y = np.zeros(128, np.uint32)
    code = FILL + FENCE + PUT + COMMIT + "bar.sync 0; @%p2 st.shared.b32 [%r9], 99;" + DONE
    go(code, words(1), y, landing="late")
    assert y[0] == 99
    go(code, words(1), y, landing="early")
    assert y[0] == 0


REDUCTIONS = {
    "add.u32": (lambda old, new: old + new, np.uint32),
    "max.s32": (np.maximum, np.int32),
    "xor.b32": (np.bitwise_xor, np.uint32),
    "add.u64": (lambda old, new: old + new, np.uint64),
    "inc.u32": (lambda old, new: np.where(old >= new, 0, old + 1), np.uint32),
}


@pytest.mark.parametrize("form", REDUCTIONS)
def test_reductions_into_global_memory(form: str) -> None:
    function, kind = REDUCTIONS[form]
    y = words(128, 50)
    want = function(y.view(kind).copy(), words(128).view(kind))
    code = PUT.replace("cp.async", "cp.reduce.async").replace("bulk_group [", f"bulk_group.{form} [")
    report = go(FILL + FENCE + code + COMMIT + DONE, words(1), y)
    np.testing.assert_array_equal(y.view(kind), want)
    assert not report.faults


@pytest.mark.parametrize("landing", LANDINGS)
def test_into_the_shared_memory_of_a_peer(landing: str) -> None:
    """Each CTA of two sends its tile to the other's upper half; then a reduction adds to it."""
    code = f"""mad.lo.u32 %r0, %r2, 1000, %r0; mov.b32 %r11, %r0; st.shared.b32 [%r8], %r0; {FENCE}
    xor.b32 %r12, %r2, 1; mapa.shared::cluster.u32 %r13, %r9, %r12; mapa.shared::cluster.u32 %r14, %r10, %r12;
    {expect(512)} barrier.cluster.arrive; barrier.cluster.wait;
    @%p2 cp.async.bulk.shared::cluster.shared::cta.{TOLD} [%r13+256], [%r9], 256, [%r14];
    @%p2 cp.reduce.async.bulk.shared::cluster.shared::cta.{TOLD}.add.u32 [%r13+512], [%r9], 256, [%r14];
    {WAIT} mov.u32 %r0, %tid.x; """
    y = np.zeros(2 * 128, np.uint32)
    report = go(code + dump(512), words(1), y, clusters=2, landing=landing)
    mine, theirs = words(64), words(64, 1000)
    np.testing.assert_array_equal(y, np.concatenate([mine, theirs, theirs, mine]))
    assert not report.faults
    race = code.replace(WAIT, "st.shared.b32 [%r8], 5;" + WAIT)
    assert kinds(go(race + dump(512), words(1), y, clusters=2, landing=landing)) & {
        "write to the source of a bulk copy",
        "read-write",
    }


@pytest.mark.parametrize(
    "form",
    [
        f"cp.async.bulk.shared::cluster.global.{TOLD} [%r13], [%x], 16, [%r10];",
        f"cp.async.bulk.shared::cluster.shared::cta.{TOLD} [%r13], [%r9], 16, [%r10];",
        f"st.async.shared::cluster.{TOLD}.b32 [%r13], %r0, [%r10];",
    ],
)
def test_a_copy_and_its_mbarrier_are_in_one_cta(form: str) -> None:
    code = f"xor.b32 %r12, %r2, 1; mapa.shared::cluster.u32 %r13, %r9, %r12; @%p2 {form}"
    with pytest.raises(ptx_emulator.EmulationError, match=r"another CTA than (its|their) mbarrier is in"):
        go(code, words(8), words(8), clusters=2)


def tile(
    x: np.ndarray, kind: str, box: tuple[int, ...], swizzle: int = 0, fill: str = "zero"
) -> ptx_emulator.TensorMap:
    """A map of an array, innermost dimension first."""
    return ptx_emulator.TensorMap(0, kind, x.shape[::-1], x.strides[-2::-1], box, swizzle, fill)


def box_of(x: np.ndarray, corner: tuple[int, ...], box: tuple[int, ...], fill: float = 0) -> np.ndarray:
    """The box by plain indexing, flat, its innermost dimension first."""
    out = np.full(box[::-1], fill, x.dtype)
    for place in itertools.product(*(range(n) for n in box[::-1])):
        at = tuple(c + p for c, p in zip(corner[::-1], place, strict=True))
        if all(0 <= i < n for i, n in zip(at, x.shape, strict=True)):
            out[place] = x[at]
    return out.reshape(-1)


def load_tile(corner: tuple[int, ...], size: int, more: str = "", operands: str = "") -> str:
    where = ", ".join(map(str, corner))
    return (
        f"{expect(size)} @%p2 cp.async.bulk.tensor.{len(corner)}d.shared::cluster.global.tile.{TOLD}{more} "
        f"[%r9], [%map, {{{where}}}], [%r10]{operands}; {WAIT} {dump(size)}"
    )


@pytest.mark.parametrize("landing", LANDINGS)
@pytest.mark.parametrize(
    ("shape", "box", "corner"),
    [
        ((40,), (16,), (8,)),
        ((6, 16), (8, 4), (-4, 3)),
        ((3, 4, 8), (8, 2, 2), (0, 3, -1)),
        ((2, 3, 4, 8), (4, 2, 2, 2), (4, 1, 2, 0)),
        ((2, 2, 3, 2, 8), (8, 1, 2, 2, 2), (0, 1, 1, 1, 0)),
    ],
)
def test_boxes_of_one_to_five_dimensions(
    landing: str, shape: tuple[int, ...], box: tuple[int, ...], corner: tuple[int, ...]
) -> None:
    x = words(int(np.prod(shape)), 1).reshape(shape)
    size = 4 * int(np.prod(box))
    y = np.full(size // 4, 7, np.uint32)
    report = go(load_tile(corner, size), x, y, tile(x, "u32", box), landing=landing)
    np.testing.assert_array_equal(y, box_of(x, corner, box))
    assert not report.faults


@pytest.mark.parametrize("width", [0, 32, 64, 128])
def test_swizzles(width: int) -> None:
    """16-byte chunk c of the 128-byte line n lies at c ^ n, of which a narrower swizzle takes fewer bits."""
    row = (width or 64) // 2
    x = np.arange(16 * row, dtype=np.uint16).reshape(16, row)
    y = np.zeros(16 * row // 2, np.uint32)
    go(load_tile((0, 0), 32 * row), x, y, tile(x, "u16", (row, 16), width))
    chunks = x.reshape(-1, 8)
    mask = {0: 0, 32: 1, 64: 3, 128: 7}[width]
    want = np.empty_like(chunks)
    for number, chunk in enumerate(chunks):
        want[number ^ (number >> 3 & mask)] = chunk
    np.testing.assert_array_equal(y.view(np.uint16), want.reshape(-1))
    assert len(set(swizzled(np.arange(1024), width).tolist())) == 1024


def test_what_lies_outside_is_zero_or_nan() -> None:
    x = np.arange(1, 33, dtype=np.float32).reshape(4, 8)
    for fill, value in (("zero", 0.0), ("nan", np.nan)):
        y = np.zeros(16, np.uint32)
        go(load_tile((4, 2), 64), x, y, tile(x, "f32", (8, 2), fill=fill))
        np.testing.assert_array_equal(y.view(np.float32), box_of(x, (4, 2), (8, 2), value))


@pytest.mark.parametrize("landing", LANDINGS)
def test_one_copy_for_all_ctas_of_a_cluster(landing: str) -> None:
    x, y = words(64, 5).reshape(4, 16), np.zeros(3 * 32, np.uint32)
    code = load_tile((0, 1), 128, ".multicast::cluster.L2::cache_hint", ", %h1, %d1").replace("@%p2 cp", "@%p7 cp")
    code = (
        "mov.b16 %h1, 5; setp.eq.and.u32 %p7, %r2, 0, %p2;"
        + code.replace(
            expect(128), expect(128).replace("@%p2", "@%p8") + "barrier.cluster.arrive; barrier.cluster.wait;"
        ).replace("$W:", "@%p9 bra $E; $W:")
        + "$E: "
    )
    code = "setp.eq.u32 %p9, %r2, 1; setp.ne.and.u32 %p8, %r2, 1, %p2;" + code
    code = code.replace("%p9", "%p4").replace("%p8", "%p3").replace("%p7", "%p0")
    report = go(code, x, y, tile(x, "u32", (16, 2)), clusters=3, landing=landing)
    want = x[1:3].reshape(-1)
    np.testing.assert_array_equal(y.reshape(3, 32), [want, 0 * want, want])
    assert not report.faults
    with pytest.raises(ptx_emulator.EmulationError, match="CTAs 0x9 of a cluster of 3"):
        go(code.replace("%h1, 5", "%h1, 9"), x, y, tile(x, "u32", (16, 2)), clusters=3)


def store_tile(corner: tuple[int, ...], form: str = "cp.async.bulk.tensor.{0}d.global.shared::cta.bulk_group") -> str:
    where = ", ".join(map(str, corner))
    put = f"@%p2 {form.replace('{0}', str(len(corner)))} [%map, {{{where}}}], [%r9];"
    return FILL + FENCE + put + COMMIT + DONE


@pytest.mark.parametrize("landing", LANDINGS)
def test_a_box_out_of_shared_memory(landing: str) -> None:
    """What lies outside of the tensor is not written; a reduction adds with the map's type."""
    y = np.zeros((5, 8), np.uint32)
    report = go(store_tile((4, -1)), words(1), y, tile(y, "u32", (8, 4)), on="y", landing=landing)
    want = np.zeros((5, 8), np.uint32)
    want[:3, 4:] = words(32).reshape(4, 8)[1:, :4]
    np.testing.assert_array_equal(y, want)
    assert not report.faults
    form = "cp.reduce.async.bulk.tensor.{0}d.global.shared::cta.add.tile.bulk_group"
    y[:] = 100
    go(store_tile((0, 1), form), words(1), y, tile(y, "u32", (8, 4)), on="y", landing=landing)
    np.testing.assert_array_equal(y[1:], 100 + words(32).reshape(4, 8))
    assert (y[0] == 100).all()


def test_prefetches_change_nothing_and_stay_inside() -> None:
    x, y = words(32).reshape(4, 8), np.zeros(32, np.uint32)
    quiet = "prefetch.tensormap [%map]; cp.async.bulk.prefetch.L2.global [%x], 128; "
    quiet += "cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%map, {0, 3}];"
    assert not go(quiet, x, y, tile(x, "u32", (8, 4))).faults
    with pytest.raises(ptx_emulator.MemoryFault, match="outside every buffer"):
        go(quiet.replace("128", "256"), x, y, tile(x, "u32", (8, 4)))


def test_maps_that_are_none() -> None:
    x, y = words(128), np.zeros(128, np.uint32)
    with pytest.raises(ptx_emulator.MemoryFault, match="no tensor map; pass a TensorMap"):
        go(load_tile((0, 0), 64), x, y)
    with pytest.raises(ptx_emulator.MemoryFault, match="map of 1 dimensions"):
        go(load_tile((0, 0), 64), x, y, tile(x, "u32", (16,)))
    with pytest.raises(ptx_emulator.Misaligned, match="no multiple of 64"):
        go("add.s64 %map, %map, 8;" + load_tile((0,), 64), x, y, tile(x, "u32", (16,)))
    wide = words(512).reshape(16, 32)
    with pytest.raises(ptx_emulator.Misaligned, match="swizzle's 1024 bytes"):
        go("add.u32 %r9, %r9, 128;" + load_tile((0, 0), 512), wide, y, tile(wide, "u32", (32, 4), 128))
    for form in ("im2col", "tile::gather4"):
        with pytest.raises(ptx_emulator.Unsupported, match=form):
            go(load_tile((0,), 64).replace("global.tile", f"global.{form}"), x, y, tile(x, "u32", (16,)))


GOOD = {"address": 4096, "type": "bf16", "sizes": (64, 8), "strides": (128,), "box": (64, 8), "swizzle": 128}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"address": 8}, "multiple of 16"),
        ({"type": "f8"}, "one of u8"),
        ({"sizes": (), "box": ()}, "0 dimensions"),
        ({"strides": (120,)}, "multiples of 16"),
        ({"strides": ()}, "one for each dimension but"),
        ({"box": (64, 257)}, "1 to 256"),
        ({"box": (64,)}, "one number for each of 2"),
        ({"box": (4, 8)}, "8 bytes"),
        ({"swizzle": 64}, "its swizzle 64"),
        ({"swizzle": 48}, "swizzle 48"),
        ({"fill": "one"}, "fill 'one'"),
        ({"type": "u16", "fill": "nan"}, "floating types only"),
        ({"sizes": (0, 8)}, "1 to 2"),
    ],
)
def test_maps_that_the_driver_would_refuse(change: dict[str, object], says: str) -> None:
    made = ptx_emulator.TensorMap(**GOOD)  # type: ignore[arg-type]
    assert unpacked(made.pack()) == made
    assert (len(made.pack()), made.box_bytes) == (128, 1024)
    with pytest.raises(ValueError, match=says):
        ptx_emulator.TensorMap(**{**GOOD, **change})  # type: ignore[arg-type]

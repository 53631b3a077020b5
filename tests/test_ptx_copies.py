"""cp.async: what is visible when, group counting, zero fill."""

import numpy as np
import ptx_emulator
import pytest
from ptx_snippets import entry, run

TILE = ".shared .align 128 .b8 tile[2048];\n"
SETUP = (
    "mov.b32 %r1, tile; mad.lo.u32 %r2, %tid0, 16, %r1; mad.wide.u32 %d1, %tid0, 16, %ptr0; "
    "mad.wide.u32 %d2, %tid0, 16, %ptr1;"
)


def store(target: str = "%d2", source: str = "%r2") -> str:
    return f"ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [{source}]; st.global.v4.b32 [{target}], {{%r4, %r5, %r6, %r7}};"


def words(count: int = 128) -> np.ndarray:
    return np.arange(1, count + 1, dtype=np.uint32)


def test_visible_only_after_the_wait() -> None:
    copy = "cp.async.cg.shared.global [%r2], [%d1], 16; cp.async.commit_group;"
    source, out = words(), np.zeros(128, np.uint32)
    report = run(entry(f"{SETUP} {copy} cp.async.wait_group 0; {store()}", 2, outside=TILE), [source, out])
    np.testing.assert_array_equal(out, source)
    assert not report.faults
    out[:] = 0
    report = run(entry(f"{SETUP} {copy} {store()} cp.async.wait_group 0;", 2, outside=TILE), [source, out])
    assert (out == 0x7FFF7FFF).all(), "poison: nothing has landed"
    assert [f.kind for f in report.faults] == ["read of a copy in flight"]
    assert "ld.shared.v4.b32" in report.faults[0].instruction
    assert "cp.async.cg" in report.faults[0].other


@pytest.mark.parametrize("keep", [0, 1, 2, 3])
def test_wait_keeps_the_newest_groups(keep: int) -> None:
    copies = "".join(
        f"cp.async.cg.shared.global [%r2+{512 * i}], [%d1+{512 * i}], 16; cp.async.commit_group;" for i in range(3)
    )
    code = f"{SETUP} {copies} cp.async.wait_group {keep};" + "".join(
        store(f"%d2+{512 * i}", f"%r2+{512 * i}") for i in range(3)
    )
    source, out = words(384), np.zeros(384, np.uint32)
    report = run(entry(code, 2, outside=TILE), [source, out])
    landed = 128 * max(0, 3 - keep)
    np.testing.assert_array_equal(out[:landed], source[:landed])
    assert (out[landed:] == 0x7FFF7FFF).all()
    assert bool(report.faults) == (keep > 0)


def test_wait_all_needs_no_commit_and_wait_group_does() -> None:
    source = words()
    for wait, whole in (("wait_all", True), ("wait_group 0", False)):
        out = np.zeros(128, np.uint32)
        run(
            entry(f"{SETUP} cp.async.cg.shared.global [%r2], [%d1], 16; cp.async.{wait}; {store()}", 2, outside=TILE),
            [source, out],
        )
        assert (out == source).all() == whole


@pytest.mark.parametrize("size", [4, 8, 16])
def test_sizes_and_zero_fill(size: int) -> None:
    """src-size runs from 0 to size over the lanes; the rest is zero, and bytes beyond it are not read."""
    code = f"""{SETUP} mov.b32 %r8, 0; st.shared.v4.b32 [%r2], {{%r8, %r8, %r8, %r8}}; rem.u32 %r3, %tid0, {size + 1};
    mad.lo.u32 %r9, %tid0, {size}, %r1; mad.wide.u32 %d3, %tid0, {size}, %ptr0;
    cp.async.ca.shared.global [%r9], [%d3], {size}, %r3; cp.async.wait_all; bar.sync 0; {store()}"""
    source = np.random.default_rng(0).integers(1, 256, 32 * size, dtype=np.uint8)
    out = np.zeros(512, np.uint8)
    run(entry(code, 2, outside=TILE), [source, out])
    want = source.reshape(32, size).copy()
    for lane in range(32):
        want[lane, lane % (size + 1) :] = 0
    np.testing.assert_array_equal(out[: 32 * size].reshape(32, size), want)


def test_a_copy_of_nothing_reads_nothing() -> None:
    code = f"{SETUP} mov.b32 %r3, 0; cp.async.cg.shared.global [%r2], [%d1], 16, %r3; cp.async.wait_all; {store()}"
    out = np.ones(128, np.uint32)
    report = run(entry(code, 2, outside=TILE), [np.zeros(0, np.uint32), out])
    assert (out == 0).all()
    assert report.counters.global_load_sectors == 0


def test_ignored_source() -> None:
    code = (
        f"{SETUP} setp.lt.u32 %p1, %tid0, 5; cp.async.cg.shared.global [%r2], [%d1], 16, %p1; "
        f"cp.async.wait_all; {store()}"
    )
    source, out = words(), np.ones(128, np.uint32)
    run(entry(code, 2, outside=TILE), [source, out])
    np.testing.assert_array_equal(out, np.where(np.arange(128) < 20, 0, source))


def test_the_source_is_checked() -> None:
    code = f"{SETUP} cp.async.cg.shared.global [%r2], [%d1], 16; cp.async.wait_all;"
    with pytest.raises(ptx_emulator.MemoryFault, match=r"cp\.async\.cg"):
        run(entry(code, 1, outside=TILE).replace("%ptr1", "%ptr0"), [words(127)])
    with pytest.raises(ptx_emulator.Misaligned, match=r"cp\.async\.cg"):
        run(entry(code.replace("[%r2]", "[%r2+8]"), 1, outside=TILE).replace("%ptr1", "%ptr0"), [words()])


def test_the_source_is_read_at_issue() -> None:
    code = f"""{SETUP} cp.async.cg.shared.global [%r2], [%d1], 16; mov.b32 %r3, 0;
    st.global.b32 [%d1], %r3; cp.async.wait_all; {store()}"""
    source, out = words(), np.zeros(128, np.uint32)
    run(entry(code, 2, outside=TILE), [source, out])
    np.testing.assert_array_equal(out, words())


def test_groups_belong_to_threads() -> None:
    """Warp 0 commits twice between its copies and warp 1 once: one newest group kept means different copies."""
    code = f"""{SETUP} setp.lt.u32 %p1, %tid0, 32; cp.async.cg.shared.global [%r2], [%d1], 16;
    @%p1 cp.async.commit_group;
    cp.async.cg.shared.global [%r2+1024], [%d1+1024], 16; cp.async.commit_group; cp.async.wait_group 1;
    {store()} {store("%d2+1024", "%r2+1024")}"""
    source, out = words(512), np.zeros(512, np.uint32)
    run(entry(code, 2, outside=TILE), [source, out], threads=64)
    poison = np.full(512, 0x7FFF7FFF)
    want = np.where(
        (np.arange(512) < 128), source, poison
    )  # only warp 0's first copy is in a group that was waited for
    np.testing.assert_array_equal(out, want)

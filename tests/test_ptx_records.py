"""Records of launches: pointers and tensor maps where they lie, files, and what is refused."""

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import ptx_emulator
import pytest
from ptx_emulator.cuda import Pointer, Record, Struct, Tiled, load, run, save
from ptx_snippets import HEADER

#: y[i] = x[i] + n, where a struct has {pad, x, n} and y is a parameter of its own.
ADD = f"""{HEADER}.visible .entry add(.param .align 8 .b8 s[24], .param .u64 y, .param .f32 f) {{
.reg .b64 %d<9>; .reg .b32 %r<9>; .reg .f32 %f<3>;
ld.param.u64 %d1, [s+8]; ld.param.u32 %r1, [s+16]; ld.param.u64 %d2, [y];
mov.u32 %r2, %tid.x; mul.wide.u32 %d3, %r2, 4; add.s64 %d4, %d1, %d3; add.s64 %d5, %d2, %d3;
ld.global.u32 %r3, [%d4]; add.u32 %r4, %r3, %r1; st.global.u32 [%d5], %r4; ret;
}}"""

#: Copies a box to shared memory by a tensor map, and its first words to y.
TILE = f"""{HEADER}.visible .entry tile(.param .align 64 .b8 m[192], .param .u64 y) {{
.reg .b64 %d<9>; .reg .b32 %r<9>; .reg .pred %p<5>;
.shared .align 128 .b8 box[128]; .shared .align 8 .b64 bar;
mov.u32 %r2, %tid.x; setp.eq.u32 %p1, %r2, 0; mov.u32 %r5, bar; mov.u32 %r6, box; mov.u64 %d1, m;
cvta.param.u64 %d1, %d1;
@%p1 mbarrier.init.shared::cta.b64 [%r5], 1; fence.mbarrier_init.release.cluster; bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 128; mov.u32 %r7, 0;
@%p1 cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r6], [%d1, {{%r7}}], [%r5];
$W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r5], 0; @!%p2 bra $W;
mul.lo.u32 %r3, %r2, 4; add.u32 %r4, %r6, %r3; ld.shared.u32 %r1, [%r4];
ld.param.u64 %d2, [y]; mul.wide.u32 %d3, %r2, 4; add.s64 %d5, %d2, %d3; st.global.u32 [%d5], %r1; ret;
}}"""


def adding() -> Record:
    """y of float32 words' bits; x begins at the third word of its buffer."""
    x, y = np.arange(40, dtype=np.uint32), np.zeros(32, np.uint32)
    given = Struct(struct.pack("<qqii", -1, -1, 7, 0), {8: Pointer("x", 8)})
    return Record(ADD, "add", (1, 1, 1), (32, 1, 1), (given, Pointer("y"), 0.5), {"x": x, "y": y})


def tiling() -> Record:
    """The map of the part of x that begins at its seventeenth word."""
    x, y = np.arange(64, dtype=np.uint32), np.zeros(32, np.uint32)
    given = Struct(bytes(192), {0: Tiled(Pointer("x", 64), "u32", (40,), (), (32,))})
    return Record(TILE, "tile", (1, 1, 1), (32, 1, 1), (given, Pointer("y")), {"x": x, "y": y})


def test_a_pointer_inside_of_a_struct() -> None:
    record = adding()
    assert not run(record).faults
    assert (record.buffers["y"] == np.arange(2, 34) + 7).all()


def test_a_tensor_map_inside_of_a_struct() -> None:
    record = tiling()
    assert not run(record).faults
    assert (record.buffers["y"] == np.arange(16, 48)).all()


@pytest.mark.parametrize("make", [adding, tiling])
def test_a_file_has_all_of_a_record(make: object, tmp_path: Path) -> None:
    record: Record = make()  # type: ignore[operator]
    save(record, tmp_path / "launch.npz")
    loaded = load(tmp_path / "launch.npz")
    assert {**vars(loaded), "buffers": 0} == {**vars(record), "buffers": 0}
    assert list(loaded.buffers) == list(record.buffers)
    assert vars(run(loaded).counters) == vars(run(record).counters)
    for name, array in record.buffers.items():
        assert loaded.buffers[name].dtype == array.dtype
        assert (loaded.buffers[name] == array).all()
    assert record.buffers["y"].any()


def test_a_file_has_what_a_record_seldom_says(tmp_path: Path) -> None:
    """Every field differs from what it is where a record leaves it out; nothing here is launched."""
    tile = Tiled(Pointer("x", 16), "bf16", (8, 4, 2), (32, 128), (4, 2, 1), 64, "nan")
    given = (tile, Struct(bytes(range(200)), {8: tile, 0: Pointer("x", 4)}), b"\x00\xff", -3, 1.5, Pointer("x"))
    buffers = {"x": np.arange(64, dtype=np.float32).reshape(8, 8), "empty": np.zeros(0, np.uint16)}
    record = Record("text\n\u03b1", "k", (2, 3, 4), (64, 1, 1), given, buffers, 4096, (2, 1, 1), "sm_80", {"x": 8})
    save(record, tmp_path / "launch.npz")
    loaded = load(tmp_path / "launch.npz")
    assert {**vars(loaded), "buffers": 0} == {**vars(record), "buffers": 0}
    for name, array in buffers.items():
        assert (loaded.buffers[name].shape, loaded.buffers[name].dtype) == (array.shape, array.dtype)
        assert (loaded.buffers[name] == array).all()


def test_a_buffer_lies_where_its_memory_lay() -> None:
    """Words of four bytes need no multiple of 16, but one of four."""
    record = replace(adding(), offsets={"x": 12})
    assert not run(record).faults
    assert (record.buffers["y"] == np.arange(2, 34) + 7).all()
    with pytest.raises(ptx_emulator.Misaligned, match="no multiple of 4"):
        run(replace(record, offsets={"x": 14}))


def test_what_is_no_record(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("other", "text"):
        with pytest.raises(ValueError, match=f"{name}.npz is no record of a launch"):
            load(tmp_path / f"{name}.npz")


def test_what_is_refused() -> None:
    record = adding()
    with pytest.raises(KeyError, match="no kernel 'sub' in the module; it has add"):
        run(replace(record, kernel="sub"))
    with pytest.raises(ptx_emulator.Unsupported, match="more than one dimension"):
        run(replace(record, block=(32, 2, 1)))
    with pytest.raises(KeyError, match="no buffer 'z' in the record; it has x, y"):
        run(replace(record, arguments=(record.arguments[0], Pointer("z"), 0.5)))
    with pytest.raises(ValueError, match="at byte 20 lies outside the 24 bytes"):
        run(replace(record, arguments=(Struct(bytes(24), {20: Pointer("x")}), Pointer("y"), 0.5)))
    with pytest.raises(ValueError, match="'x' is not contiguous"):
        run(replace(record, buffers={**record.buffers, "x": np.arange(80, dtype=np.uint32)[::2]}))
    with pytest.raises(ptx_emulator.MemoryFault, match="of 'x'"):
        run(replace(record, arguments=(Struct(bytes(24), {8: Pointer("x", 64)}), Pointer("y"), 0.5)))

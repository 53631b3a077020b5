"""Addresses that are not plain names: of parameters, through registers, and of buffers that begin inside a block."""

from __future__ import annotations

import numpy as np
import ptx_emulator
import pytest
from ptx_snippets import entry, run

CHOOSE = """
    mov.b64 %d1, x1; mov.b64 %d2, x2; setp.lt.u32 %p1, %tid0, 10; selp.b64 %d3, %d1, %d2, %p1;
    ld.param.b64 %d4, [%d3]; ld.global.b32 %r1, [%d4];
    mad.wide.u32 %d5, %tid0, 4, %ptr0; st.global.b32 [%d5], %r1;"""


def test_the_address_of_a_parameter_is_a_value() -> None:
    """Compilers choose between two pointers by choosing between their parameters' addresses, lane by lane."""
    out = np.zeros(32, np.uint32)
    run(entry(CHOOSE, 3), [out, np.array([7], np.uint32), np.array([9], np.uint32)])
    assert out.tolist() == [7] * 10 + [9] * 22


def test_an_address_behind_the_parameters_is_a_fault() -> None:
    code = "mov.b64 %d1, x0; add.s64 %d1, %d1, 4096; ld.param.b64 %d2, [%d1]; st.global.b64 [%ptr0], %d2;"
    with pytest.raises(ptx_emulator.MemoryFault, match="outside the parameters"):
        run(entry(code, 1), [np.zeros(32, np.uint32)])


@pytest.mark.parametrize("offset", [0, 4, 16, 252])
def test_a_buffer_begins_where_it_was_told_and_ends_with_its_bytes(offset: int) -> None:
    memory = ptx_emulator.Memory()
    address = memory.register(np.arange(64, dtype=np.uint8), "x", offset=offset)
    assert address % 256 == offset
    store = ptx_emulator.parse(entry("st.global.b32 [%ptr0+60], 5;", 1)).kernels["f"]
    ptx_emulator.launch(store, grid=(1, 1, 1), threads=32, arguments=[address], memory=memory)
    for outside in (address + 4, address - 64):
        with pytest.raises(ptx_emulator.MemoryFault):
            ptx_emulator.launch(store, grid=(1, 1, 1), threads=32, arguments=[outside], memory=memory)


@pytest.mark.parametrize("offset", [-1, 256])
def test_an_offset_outside_of_a_block_is_refused(offset: int) -> None:
    with pytest.raises(ValueError, match="0 to 255"):
        ptx_emulator.Memory().register(np.zeros(4, np.uint8), offset=offset)

"""Reading PTX text: scopes, labels, guards, operands, symbols, entries."""

import numpy as np
import ptx_emulator
import pytest
from ptx_emulator.core.syntax import Address, Literal, Not, Pair, Register, Sink, Symbol, Vector
from ptx_snippets import HEADER, entry, run


def one(code: str, **options: object) -> ptx_emulator.Kernel:
    (kernel,) = ptx_emulator.parse(entry(code, 1, **options)).kernels.values()
    return kernel


def test_nested_scopes_may_repeat_names() -> None:
    """As inlined assembly does: the same register name and the same label twice."""
    block = (
        "{ .reg .pred p; .reg .b32 %x; setp.ge.u32 p, %tid0, LIMIT; mov.b32 %x, 1; @p bra DONE; "
        "mov.b32 %x, 2;\nDONE: add.u32 %r1, %r1, %x; }"
    )
    code = (
        f"mov.b32 %r1, 0; {block.replace('LIMIT', '8')} {block.replace('LIMIT', '16')} mad.wide.u32 %d1, "
        f"%tid0, 4, %ptr0; st.global.b32 [%d1], %r1;"
    )
    out = np.zeros(32, np.uint32)
    run(entry(code, 1), [out])
    lanes = np.arange(32)
    np.testing.assert_array_equal(out, np.where(lanes >= 8, 1, 2) + np.where(lanes >= 16, 1, 2))


def test_operands() -> None:
    kernel = one(
        "@!%p1 shfl.sync.up.b32 %r1|%p2, %r2, 0x1, 0, -1; ld.global.v2.b32 {%r1, _}, [%d1+-16]; "
        "and.pred %p1, %p2, !%p3; mov.b32 %r1, tile; st.global.b32 [ %d1 + 0 ], 0f3F800000;",
        outside=".shared .b8 tile[4];",
    )
    shuffle, load, logic, move, store = kernel.instructions[2:7]
    assert shuffle.guard_negated
    assert isinstance(shuffle.guard, Register)
    assert isinstance(shuffle.operands[0], Pair)
    assert shuffle.operands[2:] == (Literal("0x1"), Literal("0"), Literal("-1"))
    assert isinstance(load.operands[0], Vector)
    assert load.operands[0].items[1] == Sink()
    assert isinstance(load.operands[1], Address)
    assert load.operands[1].offset == -16
    assert isinstance(logic.operands[2], Not)
    assert move.operands[1] == Symbol("tile")
    assert store.operands[1] == Literal("0f3F800000")
    assert store.root == "st"
    assert store.modifiers == ("global", "b32")
    assert shuffle.text.startswith("@!%p1 shfl.sync.up.b32")


def test_two_entries_and_what_is_skipped() -> None:
    text = (
        HEADER
        + """
    .extern .shared .align 16 .b8 dynamic[];
    .shared .align 4 .b8 used_by_b[100];
    .global .align 1 .b8 message[4] = {1, 2, 3, 4};
    /* a comment; with { braces */
    .visible .entry a(.param .u64 .ptr .global .align 16 p, .param .f32 q) .reqntid 128, 1, 1 .minnctapersm 1 {
        .pragma "nounroll";
        .loc 1 2 3 // file.py:2:3
        ret;
    }
    .entry b() .maxntid 256 { .reg .b32 %r<2>; mov.b32 %r1, used_by_b; ret; }
    .section .debug_abbrev { .b8 1 .b8 2 }
    """
    )
    module = ptx_emulator.parse(text)
    assert module.target == "sm_90a"
    a, b = module.kernels["a"], module.kernels["b"]
    assert a.parameters == [("p", "u64", 8, 8), ("q", "f32", 4, 4)]
    assert (a.required_threads, a.max_threads, a.shared_bytes) == (128, None, 0)
    assert (b.required_threads, b.max_threads, b.shared_bytes) == (None, 256, 100)
    assert [i.text for i in a.instructions] == ["ret"]


def test_shared_symbols_are_aligned() -> None:
    kernel = one(
        "mov.b32 %r1, first; mov.b32 %r1, second;",
        outside=".shared .align 4 .b8 first[3];\n.shared .align 1024 .b32 second[2];\n",
    )
    assert kernel.shared_symbols == {"first": 0, "second": 1024}
    assert kernel.shared_bytes == 1032


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("hello", ptx_emulator.ParseError),
        (HEADER + ".visible .entry a() { mov.b32 %r1, 2 }", ptx_emulator.ParseError),
        (HEADER + ".visible .entry a() { ret;", ptx_emulator.ParseError),
        (HEADER + ".visible .entry a() { @%p1 ret; }", ptx_emulator.ParseError),
        (HEADER + ".visible .entry a(.param .v4 x) { ret; }", ptx_emulator.ParseError),
        (HEADER + ".func helper() { ret; }", ptx_emulator.Unsupported),
        (HEADER + ".visible .entry a() { .reg .b128 %x; ret; }", ptx_emulator.Unsupported),
    ],
)
def test_what_cannot_be_read(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        ptx_emulator.parse(text)


def test_a_module_variable_is_refused_when_used() -> None:
    text = entry("mov.b64 %d1, table;", 0, outside=".global .b32 table[2] = {1, 2};")
    with pytest.raises(ptx_emulator.Unsupported, match=r"table in mov\.b64"):
        run(text, [])


def test_only_text() -> None:
    with pytest.raises(TypeError, match="str"):
        ptx_emulator.parse(b"")  # type: ignore[arg-type]

"""What may be wrong with one instruction: it is missing, or an operand, a modifier or a field of it is another.

Each change is one of PTX's text. Where an operand is altered, the probe is the instruction as it was, with a trap in
front for lanes whose operand the change would have made another: a kernel that runs through its probe was not changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ptx_emulator.mutants.text import Found


@dataclass(frozen=True)
class Change:
    """One wrong thing instead of an instruction."""

    family: str  #: what kind of thing is wrong
    words: str  #: how
    instead: str  #: the statements in its place
    probe: str = ""  #: statements that trap where `instead` has another operand; "" where it differs wherever it runs


#: family -> opcodes that may be missing
_DELETED = {
    "barrier": r"bar\.(?:sync|warp|arrive|red)|barrier\.",
    "fence": r"fence\.|membar|wgmma\.fence",
    "wait": r"cp\.async\.(?:bulk\.)?wait|wgmma\.wait",
    "commit": r"cp\.async\.(?:bulk\.)?commit|wgmma\.commit",
    "arrival": r"mbarrier\.(?:init|arrive|expect_tx|complete_tx)|cp\.async\.mbarrier",
    "copy": r"cp\.async\.bulk\.(?!wait|commit|prefetch)|cp\.reduce|st\.async|red\.async",
    "product": r"wgmma\.mma_async",
    "registers": r"setmaxnreg",
    "tensor map": r"tensormap\.replace",
}
#: bits of a descriptor's field -> its first bit, and how many; the start address, the offsets in units of 16 bytes
_DESCRIPTOR = {"start address": (0, 14), "leading byte offset": (16, 14), "stride byte offset": (32, 14)}
_BASE_OFFSET, _SWIZZLE = 49, 62
#: arithmetic with %0 for the altered value and %1 for the value as it was, of %b bits
_COUNTS = {
    "+ 1": "add.u%b %0, %1, 1;",
    "- 1": "sub.u%b %0, %1, 1;",
    "x 2": "shl.b%b %0, %1, 1;",
    "/ 2": "shr.u%b %0, %1, 1;",
}
#: field of a tensor map that a kernel makes -> what may be done to it; its swizzle is an immediate, from 0 to 3
_MAP_FIELDS = {
    "box_dim": {"x 2": _COUNTS["x 2"], "/ 2": _COUNTS["/ 2"]},
    "global_dim": {"+ 1": _COUNTS["+ 1"], "- 1": _COUNTS["- 1"]},
    "global_stride": {"+ 16": "add.u%b %0, %1, 16;", "- 16": "sub.u%b %0, %1, 16;", "x 2": _COUNTS["x 2"]},
    "global_address": {"+ 16": "add.u%b %0, %1, 16;"},
}
_BYTES = {**_COUNTS, "+ 1": "add.u%b %0, %1, 2;", "- 1": "sub.u%b %0, %1, 2;"}  # an element of 16 bits


def changes(found: Found) -> Iterator[Change]:
    """All changes of one instruction."""
    for family, pattern in _DELETED.items():
        if re.match(pattern, found.opcode):
            yield Change(family, "deleted", "")
    if re.match(r"mbarrier\.(?:try|test)_wait", found.opcode):
        yield Change("wait", "passes at once", f"setp.eq.u32 {found.operands[0]}, 0, 0;")
        if ".parity" in found.opcode:
            yield _altered(found, "parity", "flipped", 2, "xor.b%b %0, %1, 1;", 32)
    yield from _counts(found)
    yield from _order(found)
    yield from _peers(found)
    if found.opcode.startswith("wgmma.mma_async"):
        yield from _product(found)
    if found.opcode.startswith("tensormap.replace"):
        yield from _map_field(found)


def _counts(found: Found) -> Iterator[Change]:
    """Arrivals, bytes, groups and threads that an instruction names."""
    opcode, operands = found.opcode, found.operands
    if opcode.startswith("mbarrier.init"):
        yield from _each(found, "expected arrivals", "count", 1, _COUNTS, 32)
    elif opcode.startswith("mbarrier.") and ".expect_tx" in opcode:
        yield from _each(found, "expected bytes", "bytes", len(operands) - 1, _BYTES, 32)
    elif opcode.startswith("mbarrier.arrive"):
        address = next(i for i, operand in enumerate(operands) if operand.startswith("["))
        twice = (*operands[: address + 1], "2")
        if len(operands) == address + 1:
            yield Change("expected arrivals", "arrives x 2", found.written(opcode, twice))
        else:
            yield from _each(found, "expected arrivals", "count", address + 1, _COUNTS, 32)
    elif re.match(r"(?:wgmma|cp\.async|cp\.async\.bulk)\.wait_group", opcode):
        more = str(int(operands[0]) + 1)
        yield Change("wait", "one group more may be outstanding", found.with_operand(0, more))
    elif re.match(r"bar\.sync|barrier\.sync", opcode) and len(operands) == 2:
        yield _altered(found, "barrier", "32 threads more", 1, "add.u%b %0, %1, 32;", 32)
        yield _altered(found, "barrier", "32 threads fewer", 1, "sub.u%b %0, %1, 32;", 32)


def _order(found: Found) -> Iterator[Change]:
    """A release or an acquire that is relaxed."""
    opcode = found.opcode
    if opcode.startswith("barrier.cluster.arrive"):
        if ".relaxed" not in opcode:
            relaxed = opcode.replace(".release", "").replace("cluster.arrive", "cluster.arrive.relaxed")
            yield Change("order", "relaxed", found.written(relaxed, found.operands))
    elif opcode.startswith("mbarrier.") and (".release." in opcode or ".acquire." in opcode):
        yield Change(
            "order", "relaxed", found.written(re.sub(r"\.(release|acquire)", ".relaxed", opcode), found.operands)
        )


def _peers(found: Found) -> Iterator[Change]:
    """Which CTAs of a cluster are meant."""
    if "multicast" in found.opcode:
        mask = 3 if found.operands[2].startswith("[") else 2
        for bit in (1, 2):
            code = f"xor.b%b %0, %1, {bit};"
            yield _altered(found, "multicast mask", f"bit {bit} flipped", mask, code, 16)
    if found.opcode.startswith("mapa"):
        yield _altered(found, "rank", "bit 1 flipped", 2, "xor.b%b %0, %1, 1;", 32)
        yield _altered(found, "rank", "+ 1", 2, "add.u%b %0, %1, 1;", 32)


def _map_field(found: Found) -> Iterator[Change]:
    """A field of a tensor map that the kernel makes."""
    field, bits, last = found.opcode.split(".")[3], found.opcode.rpartition(".b")[2], len(found.operands) - 1
    if field == "swizzle_mode":
        for mode in range(4):
            if mode != int(found.operands[last], 0):
                yield Change("tensor map", f"{field} {mode}", found.with_operand(last, str(mode)))
    yield from _each(found, "tensor map", field, last, _MAP_FIELDS.get(field, {}), int(bits))


def _product(found: Found) -> Iterator[Change]:
    """Descriptors and immediates of wgmma: D, A, B, scale-d, the signs of A and B, whether each is transposed."""
    operands = found.operands
    for index, name in ((1, "A"), (2, "B")):
        if not operands[index].startswith("{"):
            yield from _descriptor(found, index, name)
    flag = operands[3]
    for words, code in (
        ("adds where it should not, and the other way round", "not.pred %0, %1;"),
        ("always adds", "setp.eq.u32 %0, 0, 0;"),
        ("never adds", "setp.ne.u32 %0, 0, 0;"),
    ):
        yield _altered_predicate(found, words, 3, flag, code)
    for index, name in ((4, "A"), (5, "B")):
        other = "1" if operands[index].startswith("-") else "-1"
        yield Change("immediate", f"sign of {name}", found.with_operand(index, other))
    first = "A" if len(operands) == 8 else "B"
    for index in range(6, len(operands)):
        other = "0" if operands[index] == "1" else "1"
        yield Change("immediate", f"transposes {first if index == 6 else 'B'}", found.with_operand(index, other))


def _descriptor(found: Found, index: int, name: str) -> Iterator[Change]:
    for field, (first, bits) in _DESCRIPTOR.items():
        edits = {"+ 1": f"add.u64 %0, %1, {1 << first};", "- 1": f"sub.u64 %0, %1, {1 << first};"}
        if first:
            for words, shift in (("x 2", "shl.b64"), ("/ 2", "shr.u64")):
                part = f"bfe.u64 %0, %1, {first}, {bits}; {shift} %0, %0, 1;"
                edits[words] = f"{part} bfi.b64 %0, %0, %1, {first}, {bits};"
        else:
            edits["+ 64"] = "add.u64 %0, %1, 64;"
        for words, code in edits.items():
            yield _altered(found, "descriptor", f"{field} of {name} {words}", index, code, 64)
    code = f"xor.b64 %0, %1, {1 << _BASE_OFFSET};"
    yield _altered(found, "descriptor", f"base offset of {name} 1", index, code, 64)
    for mode in (1, 2, 3):
        code = f"xor.b64 %0, %1, {mode << _SWIZZLE};"
        yield _altered(found, "descriptor", f"swizzle of {name} xor {mode}", index, code, 64)


def _each(found: Found, family: str, what: str, index: int, edits: dict[str, str], bits: int) -> Iterator[Change]:
    for words, code in edits.items():
        yield _altered(found, family, f"{what} {words}", index, code, bits)


def _altered(found: Found, family: str, words: str, index: int, code: str, bits: int) -> Change:
    """Operand `index` replaced by what `code` makes of it."""
    old = found.operands[index]
    new = code.replace("%b", str(bits)).replace("%0", "mutant").replace("%1", old)
    head = f"{{ .reg .b{bits} mutant; {new} "
    chosen = ""
    if found.guard:
        pair = f"{old}, mutant" if found.negated else f"mutant, {old}"
        chosen = f"selp.b{bits} mutant, {pair}, {found.guard}; "
    probe = (
        f"{head}{chosen}.reg .pred differs; setp.ne.u{bits} differs, mutant, {old}; @differs trap; }} "
        f"{found.with_operand(index, old)}"
    )
    return Change(family, words, f"{head}{found.with_operand(index, 'mutant')} }}", probe)


def _altered_predicate(found: Found, words: str, index: int, flag: str, code: str) -> Change:
    """The same of a predicate, which may be a literal."""
    old = "flag" if re.match(r"\d", flag) else flag
    given = f".reg .pred flag; setp.ne.u32 flag, {flag}, 0; " if old == "flag" else ""
    head = f"{{ {given}.reg .pred mutant; {code.replace('%0', 'mutant').replace('%1', old)} "
    trap = f".reg .pred differs; xor.pred differs, mutant, {old}; @differs trap;"
    probe = f"{head}{trap} }} {found.with_operand(index, flag)}"
    return Change("immediate", words, f"{head}{found.with_operand(index, 'mutant')} }}", probe)

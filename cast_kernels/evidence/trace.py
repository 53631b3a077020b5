"""Counters without running a kernel: its PTX's control flow is followed, its data is not.

How often a loop runs depends on block numbers and sizes, never on what a tensor holds. So the few instructions that
branches depend on are interpreted, for one thread of a CTA, and all others are counted as often as their block is
passed. A branch that does depend on data, as inside of erf, is passed on both sides, as a warp of mixed data does.
Every lane of an access is taken as active and as near to its neighbours as can be: masks and bank conflicts are seen
by the emulator only.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache

from ptx_emulator.triton.driver import Launch

from cast_kernels.evidence.model import SECTOR, Counters
from cast_kernels.evidence.scalar import Value, can_follow, evaluate

#: CTAs that are traced of one launch.
SAMPLES = 24
#: Blocks that a CTA may pass before it is taken to hang.
_PATIENCE = 1_000_000
_WARP = 32
_WAVEFRONT = 128  # bytes
_REGISTER = re.compile(r"%\w+(?:\.[xyz])?")


@dataclass(frozen=True)
class Instruction:
    """One instruction: `add.s32 %r1, %r2, 4` under `@!%p3`."""

    opcode: tuple[str, ...]  # split at the dots
    operands: tuple[str, ...]
    guard: str  # register, or ""
    negated: bool

    @cached_property
    def destinations(self) -> tuple[str, ...]:
        """Registers that are written."""
        if not self.operands or self.opcode[0] in ("st", "bar", "cp", "red", "stmatrix", "bra"):
            return ()
        return tuple(_REGISTER.findall(self.operands[0]))

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Registers that are read."""
        found = tuple(name for operand in self.operands[1:] for name in _REGISTER.findall(operand))
        return (*found, self.guard) if self.guard else found


@dataclass
class Block:
    """Instructions that run one behind the other."""

    label: str = ""
    code: list[Instruction] = field(default_factory=list)
    counted: Counters = field(default_factory=Counters)  # of one warp


def trace(launch: Launch, samples: int = SAMPLES) -> Counters:
    """What the launch executes, from a sample of its CTAs.

    Raises:
        NotImplementedError: how often a loop runs depends on data.
    """
    traced = ctas(launch, samples)
    x, y, z = launch.grid
    return total(traced).times(x * y * z / len(traced))


def ctas(launch: Launch, samples: int = SAMPLES) -> list[Counters]:
    """What single CTAs execute, a sample evenly over the grid, in its order.

    Raises:
        NotImplementedError: how often a loop runs depends on data.
    """
    program = _program(launch.asm["ptx"], launch.kernel)
    x, y, z = launch.grid
    parameters = {f"{launch.kernel}_param_{i}": _number(a.value) for i, a in enumerate(launch.arguments)}
    found = []
    for number in sample(x * y * z, samples):
        special = {
            "%ctaid.x": number % x, "%ctaid.y": number // x % y, "%ctaid.z": number // (x * y),
            "%nctaid.x": x, "%nctaid.y": y, "%nctaid.z": z, "%ntid.x": launch.threads,
        }  # fmt: skip
        passed = program.run(parameters, special)
        warp = total([program.blocks[position].counted.times(times) for position, times in passed.items()])
        found.append(warp.times(launch.threads // _WARP))
    return found


def total(counters: Sequence[Counters]) -> Counters:
    """Each counter summed."""
    flops: dict[str, float] = defaultdict(float)
    for one in counters:
        for kind, value in one.tensor_flops.items():
            flops[kind] += value
    rest = (sum(getattr(one, item.name) for one in counters) for item in fields(Counters)[1:])
    return Counters(dict(flops), *rest)


def sample(ctas: int, samples: int) -> list[int]:
    """Numbers of CTAs evenly over the grid, all if there are no more."""
    taken = min(samples, ctas)
    return [(2 * i + 1) * ctas // (2 * taken) for i in range(taken)]


def length(launch: Launch) -> int:
    """Instructions in the launch's PTX, each once."""
    return sum(len(block.code) for block in _program(launch.asm["ptx"], launch.kernel).blocks)


def _number(value: object) -> Value:
    """A parameter's value; addresses and fractions decide no branch."""
    return value if isinstance(value, int) else None


# ---- reading ---------------------------------------------------------------------------------------------------------

_LABEL = re.compile(r"(\$[\w$]+):")


@lru_cache(maxsize=256)
def _program(ptx: str, kernel: str) -> Program:
    return Program(read(ptx, kernel))


def read(ptx: str, kernel: str) -> list[Block]:
    """The entry's blocks in their order; a block ends before a label and behind a branch."""
    body = re.split(rf"\.entry\s+{re.escape(kernel)}\s*\(", ptx, maxsplit=1)[1].split("{", 1)[1]
    body = re.split(r"^\}", body, maxsplit=1, flags=re.MULTILINE)[0]
    body = re.sub(r"//[^\n]*|\t\.(?:loc|file|pragma)[^\n]*", "", body)
    blocks = [Block()]
    for statement in body.split(";"):
        text = statement.lstrip("{} \t\n")  # a scope's braces; a vector's are never first
        while found := _LABEL.match(text):
            if not found[1].startswith("$L__tmp"):  # a place for the debugger, not for a branch
                if blocks[-1].label or blocks[-1].code:
                    blocks.append(Block())
                blocks[-1].label = found[1]
            text = text[found.end() :].lstrip("{} \t\n")
        if not text or text.startswith("."):
            continue
        instruction = _instruction(text)
        blocks[-1].code.append(instruction)
        if instruction.opcode[0] in _LEAVING:
            blocks.append(Block())
    for block in blocks:
        block.counted = count(block.code)
    return blocks


def _instruction(text: str) -> Instruction:
    guard, negated = "", False
    if text.startswith("@"):
        head, text = text.split(None, 1)
        guard, negated = head.strip("@!"), "!" in head
    opcode, rest = [*text.split(None, 1), ""][:2]
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
    return Instruction(tuple(opcode.strip().split(".")), tuple(operands), guard, negated)


# ---- counting --------------------------------------------------------------------------------------------------------

_BITS = re.compile(r"[bfsu](\d+)")


def count(code: Sequence[Instruction]) -> Counters:
    """What one warp executes when it passes these instructions."""
    flops: dict[str, float] = defaultdict(float)
    wavefronts = loads = stores = 0.0
    for instruction in code:
        opcode = instruction.opcode
        if opcode[0] in ("mma", "wgmma"):
            kind, value = tensor(opcode)
            if kind:
                flops[kind] += value
        elif opcode[:2] in (("ld", "global"), ("st", "global")):
            sectors = _WARP * _lane_bytes(opcode) / SECTOR
            loads, stores = (loads + sectors, stores) if opcode[0] == "ld" else (loads, stores + sectors)
        elif opcode[0] in ("ld", "st") and opcode[1].startswith("shared"):
            wavefronts += max(1.0, _WARP * _lane_bytes(opcode) / _WAVEFRONT)
        elif opcode[0] in ("ldmatrix", "stmatrix"):
            wavefronts += next(int(part[1:]) for part in opcode if re.fullmatch(r"x[124]", part))
        elif opcode[:2] == ("cp", "async") and "global" in opcode:
            size = int(instruction.operands[2], 0)
            loads += _WARP * size / SECTOR
            wavefronts += _WARP * size / _WAVEFRONT
    return Counters(dict(flops), wavefronts, loads, stores, len(code))


def tensor(opcode: tuple[str, ...]) -> tuple[str, float]:
    """Kind and FLOPs, for each warp, of a tensor-core instruction; ("", 0) for wgmma's fences and waits."""
    shape = next((found for part in opcode if (found := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", part))), None)
    if shape is None:
        return "", 0.0
    m, n, k = (int(number) for number in shape.groups())
    sharing = 4 if opcode[0] == "wgmma" else 1  # the warps of a group execute one product together
    return opcode[0] + (".tf32" if "tf32" in opcode else ""), 2 * m * n * k / sharing


def _lane_bytes(opcode: tuple[str, ...]) -> int:
    vector = next((int(part[1:]) for part in opcode if re.fullmatch(r"v[248]", part)), 1)
    found = _BITS.fullmatch(opcode[-1])
    assert found, opcode
    return vector * int(found[1]) // 8


# ---- following -------------------------------------------------------------------------------------------------------


_LEAVING = ("bra", "ret", "exit")
_THREAD = {"%tid.x", "%laneid", "%warpid"}


class Program:
    """Blocks of a kernel, and the instructions that its branches depend on."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self.labels: dict[str, int] = {block.label: position for position, block in enumerate(blocks) if block.label}
        code = [instruction for block in blocks for instruction in block.code]
        unknown = _from_data(code)
        sources: dict[str, set[str]] = defaultdict(set)  # of every register
        for instruction in code:
            for name in instruction.destinations:
                sources[name].update(instruction.sources)
        waiting = {i.guard for i in code if i.opcode[0] in _LEAVING and i.guard} - unknown
        needed: set[str] = set()
        while waiting:
            name = waiting.pop()
            needed.add(name)
            waiting |= sources[name] - needed - unknown
        self.slices: list[list[Instruction]] = [
            [i for i in block.code if i.opcode[0] in _LEAVING or not needed.isdisjoint(i.destinations)]
            for block in blocks
        ]

    def run(self, parameters: Mapping[str, Value], special: Mapping[str, int]) -> Counter[int]:
        """How often one CTA passes each block."""
        registers: dict[str, Value] = dict(special)
        passed: Counter[int] = Counter()
        mixed: set[int] = set()  # blocks whose last branch leads around the other side of a mixed branch
        position = 0
        for _ in range(_PATIENCE):
            if position >= len(self.blocks):
                return passed
            passed[position] += 1
            after = position + 1
            for instruction in self.slices[position]:
                if instruction.guard:
                    condition = registers.get(instruction.guard)
                    if condition is None and instruction.opcode[0] == "bra":
                        self._mix(position, self.labels[instruction.operands[0]], instruction, mixed)
                        continue
                    if condition is not None and bool(condition) == instruction.negated:
                        continue
                if instruction.opcode[0] in ("ret", "exit"):
                    return passed
                if instruction.opcode[0] != "bra":
                    evaluate(instruction.opcode, instruction.operands, registers, parameters)
                elif position not in mixed:
                    after = self.labels[instruction.operands[0]]
            position = after
        raise RuntimeError(f"a CTA passed {_PATIENCE} blocks: its loop has no end")

    def _mix(self, position: int, goal: int, branch: Instruction, mixed: set[int]) -> None:
        """A branch on data: a warp's threads go both ways, so it passes what lies on either side."""
        if goal <= position:
            if not self._jumps(position + 1, goal):
                raise NotImplementedError(f"a loop ends by {branch.guard}, which depends on data or is not followed")
        elif self._jumps(goal - 1):
            mixed.add(goal - 1)

    def _jumps(self, position: int, goal: int | None = None) -> bool:
        """Whether the block ends with a jump, to the block `goal` if that is given."""
        last = self.blocks[position].code[-1:]
        if not last or last[0].opcode[0] != "bra" or last[0].guard:
            return False
        return goal is None or self.labels[last[0].operands[0]] == goal


def _from_data(code: Sequence[Instruction]) -> set[str]:
    """Registers whose value depends on memory, on the thread, or on what is not followed."""
    unknown: set[str] = set(_THREAD)
    for _ in range(len(code)):
        before = len(unknown)
        for instruction in code:
            if not can_follow(instruction.opcode) or not unknown.isdisjoint(instruction.sources):
                unknown.update(instruction.destinations)
        if len(unknown) == before:
            break
    return unknown

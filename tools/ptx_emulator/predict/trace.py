"""Counters without running a kernel: its PTX's control flow is followed, its data is not.

How often a loop of these kernels runs depends on block numbers and sizes, never on what a tensor holds. The trace
interprets the few instructions that branches depend on, for one thread of a CTA. It counts all others as often as
their block is passed. A branch on data, as inside of erf, is passed on both sides, as a warp of mixed data does. Every
lane of an access counts as active, and its address as next to its neighbour's: masks and bank conflicts are seen by
the emulator only.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache

from ptx_emulator.core.kernel import Kernel
from ptx_emulator.core.syntax import Address, Instruction, Literal, Symbol, parts_of
from ptx_emulator.predict.counters import SECTOR, Counters, total
from ptx_emulator.predict.scalar import Name, Value, can_follow, evaluate, names

#: CTAs that are traced of one launch.
SAMPLES = 24
#: Blocks that a CTA may pass before it is taken to hang.
_PATIENCE = 1_000_000
_WARP = 32
_WAVEFRONT = 128  # bytes


def ctas(
    kernel: Kernel, grid: tuple[int, int, int], threads: int, values: Sequence[Value], samples: int = SAMPLES
) -> list[Counters]:
    """What single CTAs execute, a sample evenly over the grid, in its order.

    Args:
        kernel: parsed.
        grid: CTAs along x, y and z.
        threads: of a CTA, along x.
        values: of the kernel's first parameters; None for one that decides no branch, such as an address.
        samples: how many CTAs are followed.

    Raises:
        NotImplementedError: how often a loop runs depends on data.
    """
    program = _program(_Whole(kernel))
    x, y, z = grid
    parameters = {parameter.name: value for parameter, value in zip(kernel.parameter_list, values, strict=False)}
    found = []
    for number in sample(x * y * z, samples):
        special: dict[Name, Value] = {
            "ctaid.x": number % x, "ctaid.y": number // x % y, "ctaid.z": number // (x * y),
            "nctaid.x": x, "nctaid.y": y, "nctaid.z": z, "ntid.x": threads,
        }  # fmt: skip
        passed = program.run(parameters, special)
        warp = total([program.counted[position].times(times) for position, times in passed.items()])
        found.append(warp.times(threads // _WARP))
    return found


def whole(traced: Sequence[Counters], grid: tuple[int, int, int]) -> Counters:
    """What a launch executes, of which some CTAs were traced."""
    x, y, z = grid
    return total(traced).times(x * y * z / len(traced))


def sample(ctas: int, samples: int) -> list[int]:
    """Numbers of CTAs evenly over the grid, all if there are no more."""
    taken = min(samples, ctas)
    return [(2 * i + 1) * ctas // (2 * taken) for i in range(taken)]


def used_parameters(kernel: Kernel) -> set[int]:
    """Positions of the parameters that an instruction names. The compiler dropped the others: nothing can read them."""
    operands = [operand for instruction in kernel.instructions for operand in instruction.operands]
    named = {part.name for operand in operands for part in parts_of(operand) if isinstance(part, Symbol)}
    return {position for position, parameter in enumerate(kernel.parameter_list) if parameter.name in named}


class _Whole:
    """A kernel, by its identity: one that was parsed once is decoded once."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __hash__(self) -> int:
        return id(self.kernel)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Whole) and other.kernel is self.kernel


@lru_cache(maxsize=256)
def _program(whole: _Whole) -> Program:
    return Program(whole.kernel)


# ---- counting --------------------------------------------------------------------------------------------------------

_BITS = re.compile(r"[bfsu](\d+)")


def count(code: Sequence[Instruction]) -> Counters:
    """What one warp executes when it passes these instructions."""
    flops: dict[str, float] = defaultdict(float)
    wavefronts = loads = stores = 0.0
    for instruction in code:
        root, modifiers = instruction.root, instruction.modifiers
        if root in ("mma", "wgmma"):
            kind, value = tensor(instruction)
            if kind:
                flops[kind] += value
        elif root in ("ld", "st") and modifiers[0] == "global":
            sectors = _WARP * _lane_bytes(modifiers) / SECTOR
            loads, stores = (loads + sectors, stores) if root == "ld" else (loads, stores + sectors)
        elif root in ("ld", "st") and modifiers[0].startswith("shared"):
            wavefronts += max(1.0, _WARP * _lane_bytes(modifiers) / _WAVEFRONT)
        elif root in ("ldmatrix", "stmatrix"):
            wavefronts += next(int(part[1:]) for part in modifiers if re.fullmatch(r"x[124]", part))
        elif root == "cp" and modifiers[0] == "async" and "global" in modifiers:
            size = instruction.operands[2]
            if not isinstance(size, Literal):
                raise NotImplementedError(f"the bytes of a copy are not counted: {instruction.text}")
            loads += _WARP * int(size.text, 0) / SECTOR
            wavefronts += _WARP * int(size.text, 0) / _WAVEFRONT
    return Counters(dict(flops), wavefronts, loads, stores, len(code))


def tensor(instruction: Instruction) -> tuple[str, float]:
    """Kind and FLOPs, for each warp, of a tensor-core instruction; ("", 0) for wgmma's fences and waits."""
    parts = instruction.modifiers
    shape = next((found for part in parts if (found := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", part))), None)
    if shape is None:
        return "", 0.0
    m, n, k = (int(number) for number in shape.groups())
    sharing = 4 if instruction.root == "wgmma" else 1  # the warps of a group execute one product together
    return instruction.root + (".tf32" if "tf32" in parts else ""), 2 * m * n * k / sharing


def _lane_bytes(modifiers: tuple[str, ...]) -> int:
    vector = next((int(part[1:]) for part in modifiers if re.fullmatch(r"v[248]", part)), 1)
    found = _BITS.fullmatch(modifiers[-1])
    assert found, modifiers
    return vector * int(found[1]) // 8


# ---- following -------------------------------------------------------------------------------------------------------

_LEAVING = ("bra", "ret", "exit")
_THREAD = ("tid.x", "laneid", "warpid")
_NO_DESTINATION = ("st", "bar", "cp", "red", "stmatrix", "bra")
#: Of a place for the debugger, not for a branch.
_DEBUG_LABEL = "$L__tmp"


def destinations(instruction: Instruction) -> list[Name]:
    """Registers that are written."""
    if instruction.root in _NO_DESTINATION or not instruction.operands:
        return []
    return [] if isinstance(instruction.operands[0], Address) else names(instruction.operands[0])


def sources(instruction: Instruction) -> list[Name]:
    """Registers that decide what is written."""
    found = [name for operand in instruction.operands[1:] for name in names(operand)]
    return [*found, instruction.guard.index] if instruction.guard else found


class Program:
    """Blocks of a kernel, and the instructions that its branches depend on."""

    def __init__(self, kernel: Kernel) -> None:
        code = kernel.instructions
        labels = {name: at for name, at in kernel.labels.items() if not name.startswith(_DEBUG_LABEL)}
        behind = {number + 1 for number, ins in enumerate(code) if ins.root in _LEAVING}
        starts = sorted(start for start in {0, *labels.values(), *behind} if start < len(code))
        stops = [*starts[1:], len(code)]
        self.blocks: list[list[Instruction]] = [code[start:stop] for start, stop in zip(starts, stops, strict=True)]
        self.counted: list[Counters] = [count(block) for block in self.blocks]  # of one warp
        place = {start: position for position, start in enumerate(starts)}
        self.labels: dict[str, int] = {name: place.get(at, len(starts)) for name, at in labels.items()}
        needed = _deciding(code)
        self.slices: list[list[Instruction]] = [
            [ins for ins in block if ins.root in _LEAVING or not needed.isdisjoint(destinations(ins))]
            for block in self.blocks
        ]

    def run(self, parameters: Mapping[str, Value], special: Mapping[Name, Value]) -> Counter[int]:
        """How often one CTA passes each block."""
        registers = dict(special)
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
                    condition = registers.get(instruction.guard.index)
                    if condition is None and instruction.root == "bra":
                        self._mix(position, instruction, mixed)
                        continue
                    if condition is not None and bool(condition) == instruction.guard_negated:
                        continue
                if instruction.root in ("ret", "exit"):
                    return passed
                if instruction.root != "bra":
                    evaluate(instruction, registers, parameters)
                elif position not in mixed:
                    after = self._goal(instruction)
            position = after
        raise RuntimeError(f"a CTA passed {_PATIENCE} blocks: its loop has no end")

    def _goal(self, branch: Instruction) -> int:
        target = branch.operands[0]
        if not isinstance(target, Symbol) or target.name not in self.labels:
            raise NotImplementedError(f"a branch to no label: {branch.text}")
        return self.labels[target.name]

    def _mix(self, position: int, branch: Instruction, mixed: set[int]) -> None:
        """A branch on data: a warp's threads go both ways, so it passes what lies on either side."""
        goal = self._goal(branch)
        if goal <= position:
            if not self._jumps(position + 1, goal):
                condition = branch.text.split()[0].lstrip("@!")
                raise NotImplementedError(f"a loop ends by {condition}, which depends on data or is not followed")
        elif self._jumps(goal - 1):
            mixed.add(goal - 1)

    def _jumps(self, position: int, goal: int | None = None) -> bool:
        """Whether the block ends with a jump, to the block `goal` if that is given."""
        last = self.blocks[position][-1]
        if last.root != "bra" or last.guard:
            return False
        return goal is None or self._goal(last) == goal


def _deciding(code: Sequence[Instruction]) -> set[Name]:
    """The registers that branches depend on, but for those of data."""
    unknown = _from_data(code)
    reads: dict[Name, set[Name]] = defaultdict(set)  # of every register
    for ins in code:
        for name in destinations(ins):
            reads[name].update(sources(ins))
    waiting: set[Name] = set()
    waiting |= {ins.guard.index for ins in code if ins.root in _LEAVING and ins.guard} - unknown
    needed: set[Name] = set()
    while waiting:
        name = waiting.pop()
        needed.add(name)
        waiting |= reads[name] - needed - unknown
    return needed


def _from_data(code: Sequence[Instruction]) -> set[Name]:
    """Registers whose value depends on memory, on the thread, or on what is not followed."""
    unknown: set[Name] = set(_THREAD)
    touched = [(ins, destinations(ins), sources(ins)) for ins in code]
    for _ in range(len(code)):
        before = len(unknown)
        for ins, written, read in touched:
            if not can_follow(ins) or not unknown.isdisjoint(read):
                unknown.update(written)
        if len(unknown) == before:
            break
    return unknown

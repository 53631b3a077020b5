"""What a compiled kernel takes of a multiprocessor, read from its machine code: registers, spills, tensor-core opcodes.

NVIDIA's code is disassembled by the nvdisasm and cuobjdump inside the Triton package, AMD's is Triton's own text.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from ptx_emulator.targets import Target

#: Instructions that move a spilled register, NVIDIA's and (scratch memory) AMD's.
_SPILLS = re.compile(r"STL\b|LDL\b|scratch_(?:load|store)\w*")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction."""

    opcode: str  # with its modifiers: "HMMA.16816.F32.BF16"
    target: str  # label that a branch goes to, "" for the rest
    operands: str = ""  # NVIDIA's, as nvdisasm writes them: "R24, R56, gdesc[UR32], R24, gsb0"
    guarded: bool = False  # NVIDIA's: a predicate in front decides whether it is executed


@dataclass(frozen=True)
class Resources:
    """One kernel's use of a target. Counts are of instructions in the code, not of those executed."""

    registers: int  # per thread; AMD: vector registers, accumulation registers included
    stack_bytes: int  # per thread
    spills: int
    loop_spills: int
    shared_bytes: int  # per CTA
    ctas: int  # that fit on one multiprocessor; 0: none does
    occupancy: float  # warps of those CTAs to the warps that a multiprocessor can hold
    tensor_core: str  # kind of the tensor-core instructions, "" if there are none
    tensor_core_count: int
    async_copies: int  # cp.async
    tma_copies: int
    instructions: int  # without the padding behind the code


def resources(asm: Mapping[str, Any], shared_bytes: int, warps: int, target: Target) -> Resources:
    """Read a compiled kernel.

    Args:
        asm: what Triton compiled, with "cubin" for NVIDIA or "amdgcn" for AMD.
        shared_bytes: dynamic shared memory of a CTA, `metadata.shared`.
        warps: of a CTA.
        target: what it was compiled for.

    Raises:
        RuntimeError: a disassembler is missing from the Triton package, or fails.
    """
    if target.backend == "hip":
        text = asm["amdgcn"]
        code, labels = read_amdgcn(text)
        registers, stack = _amd_field(text, "vgpr_count"), _amd_field(text, "private_segment_fixed_size")
    else:
        code, labels = read_sass(listing(asm["cubin"]))
        usage = _disassemble("cuobjdump", asm["cubin"], "-res-usage")
        registers, stack = _usage_field(usage, "REG"), _usage_field(usage, "STACK")
    inside = in_loops(code, labels)
    spilling = spills(code)
    found = opcodes(code)
    kinds = {kind: n for kind, n in found.items() if re.match(r"HMMA|HGMMA|UTC\w*MMA|v_s?mfma", kind)}
    ctas = resident_ctas(target, registers, shared_bytes, warps)
    return Resources(
        registers=registers,
        stack_bytes=stack,
        spills=sum(spilling),
        loop_spills=sum(spill and loop for spill, loop in zip(spilling, inside, strict=True)),
        shared_bytes=shared_bytes,
        ctas=ctas,
        occupancy=ctas * warps / target.max_warps,
        tensor_core="+".join(sorted(kinds)),
        tensor_core_count=sum(kinds.values()),
        async_copies=found["LDGSTS"],
        tma_copies=sum(n for opcode, n in found.items() if re.match(r"UTMA(LDG|STG|REDG)", opcode)),
        instructions=len(code) - found["NOP"],
    )


def listing(cubin: bytes) -> str:
    """A compiled kernel's machine code as text.

    Raises:
        RuntimeError: the disassembler is missing from the Triton package, or fails.
    """
    return _disassemble("nvdisasm", cubin, "-c")


def spills(code: Iterable[Instruction]) -> list[bool]:
    """Whether each instruction moves a spilled register."""
    return [bool(_SPILLS.match(instruction.opcode)) for instruction in code]


def opcodes(code: Iterable[Instruction]) -> Counter[str]:
    """How often each instruction is in the code, by its name without modifiers."""
    return Counter(instruction.opcode.split(".")[0] for instruction in code)


def read_sass(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """nvdisasm's listing -> instructions, and for each label the index of the instruction that follows it."""
    instruction = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
    branch = re.compile(r"`\((\.L\w+)\)")

    def parse(line: str) -> Instruction | None:
        found = instruction.match(line)
        if found is None:
            return None
        guard, opcode, operands = found.groups()
        goal = branch.search(operands) if opcode.split(".")[0] == "BRA" else None
        return Instruction(opcode, goal[1] if goal else "", operands.strip(), bool(guard))

    return _read(text, re.compile(r"(\.L\w+):"), parse)


def functions(text: str) -> dict[str, str]:
    """nvdisasm's listing -> the part of each kernel, by name."""
    parts = re.split(r"^\.text\.(\w+):$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def following(at: int, instruction: Instruction, labels: Mapping[str, int]) -> Iterator[int]:
    """Where NVIDIA's code can go on behind the instruction at an index. Calls come back, and are not followed.

    Raises:
        RuntimeError: a jump whose goal is not in the instruction.
    """
    opcode = instruction.opcode.split(".")[0]
    if opcode in ("BRX", "BRXU", "JMP", "JMX", "JMXU"):
        raise RuntimeError(f"the goal of {instruction.opcode} {instruction.operands} is not known")
    ends = opcode in ("EXIT", "RET") or (opcode == "BRA" and not instruction.operands.split("`")[0].strip())
    if instruction.guarded or not ends:
        yield at + 1
    if instruction.target:
        yield labels[instruction.target]


def read_amdgcn(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """AMD assembly -> instructions, and for each label the index of the instruction that follows it."""
    instruction = re.compile(r"\s+([a-z]+_[\w.]+)\s*(.*)")

    def parse(line: str) -> Instruction | None:
        found = instruction.match(line.split(";")[0])
        if found is None:
            return None
        opcode, operands = found.groups()
        return Instruction(opcode, operands.strip() if re.match(r"s_c?branch", opcode) else "")

    return _read(text, re.compile(r"(\.LBB\w+):"), parse)


def _read(
    text: str, label: re.Pattern[str], parse: Callable[[str], Instruction | None]
) -> tuple[list[Instruction], dict[str, int]]:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := label.match(line):
            labels[found[1]] = len(code)
        elif instruction := parse(line):
            code.append(instruction)
    return code, labels


def in_loops(code: list[Instruction], labels: Mapping[str, int]) -> list[bool]:
    """Whether each instruction lies between a backward branch and its label.

    A block that the compiler moved behind the loop it belongs to makes the range longer, never shorter.
    """
    inside = [False] * len(code)
    for end, instruction in enumerate(code):
        start = labels.get(instruction.target, end) if instruction.target else end
        if start < end:
            inside[start : end + 1] = [True] * (end + 1 - start)
    return inside


def resident_ctas(target: Target, registers: int, shared_bytes: int, warps: int) -> int:
    """CTAs that fit on one multiprocessor at once, 0 if not even one does.

    Registers are given out by warp, in units of 256 to each scheduler's quarter (NVIDIA), or of 8 a thread out of
    512 (AMD, per SIMD of four); shared memory by CTA in units of 128 bytes, with what the system keeps for itself.
    """
    if shared_bytes > target.shared_limit:
        return 0
    if target.backend == "cuda":
        by_registers = 4 * (16384 // _round_up(max(registers, 1) * 32, 256))
    else:
        by_registers = 4 * min(8, 512 // _round_up(max(registers, 1), 8))
    shared = _round_up(shared_bytes + target.shared_reserved, 128)
    by_shared = target.shared_total // shared if shared else target.max_ctas
    return min(by_registers // warps, by_shared, target.max_warps // warps, target.max_ctas)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _disassemble(tool: str, cubin: bytes, *options: str) -> str:
    try:
        path = getattr(triton.knobs.nvidia, tool).path
    except (AttributeError, RuntimeError) as error:
        folder = Path(triton.__file__).parent / "backends/nvidia/bin"
        raise RuntimeError(
            f"{tool} is missing from Triton {triton.__version__} ({folder}); install Triton from its wheel, "
            f"or name one with TRITON_{tool.upper()}_PATH"
        ) from error
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [path, *options, file.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _usage_field(usage: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage does not tell {name}: {usage.strip()[:200]}")
    return int(found[1])


def _amd_field(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", text)
    if found is None:
        raise RuntimeError(f"the AMD assembly does not tell .{name}")
    return int(found[1])

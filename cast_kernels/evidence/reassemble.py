"""`cast-kernels compile --ptxas`: assemble the PTX of Triton's kernels by other releases of ptxas.

This shows each release's instructions, registers and spills for the same PTX, its reports of serialised wgmmas, and
known defects in its code. It does not show that the code computes the right values.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ptx_emulator.predict.resources import listing, opcodes, read_sass, resources
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import Launch
from rich.table import Table

from cast_kernels.assemblers import assembler, checked, release, version_of
from cast_kernels.evidence.compile import describe_tile, launched
from cast_kernels.evidence.console import wide_console
from cast_kernels.evidence.defects import shown
from cast_kernels.evidence.problems import PROBLEMS
from cast_kernels.evidence.rows import keep

#: Compared instructions: products, asynchronous and matrix copies, barriers, and points of reconvergence of a warp's
#: threads.
_KINDS = re.compile(r"([HQIB]?G?MMA|UTC\w*MMA|LDGSTS|LDSM|STSM|LDTM|STTM|UTMA\w+|BAR|BSSY)$")


@dataclass(frozen=True)
class Assembled:
    """One kernel's PTX through one assembler. Counts are of instructions in the code."""

    target: str
    dtype: str
    kernel: str
    tile: str
    ptxas: str  # its release
    triton: bool  # whether Triton takes it for this target
    refused: str = ""  # the error of ptxas; then the other fields are empty
    registers: int = 0
    spills: int = 0
    loop_spills: int = 0
    shared_bytes: int = 0  # per CTA: Triton's request at the launch, and the addition by ptxas
    instructions: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    failures: tuple[str, ...] = ()


class RefusedError(RuntimeError):
    """ptxas did not assemble."""


def assemble(ptx: str, path: str, fusion: bool = True) -> tuple[bytes, str]:
    """Machine code and the output of ptxas, with Triton 3.8's options.

    PTX names its language version, and ptxas refuses a newer one than its own. A newer version is lowered to the newest
    that this ptxas supports; ptxas then names unsupported instructions.

    Args:
        ptx: of one kernel.
        path: of the ptxas.
        fusion: whether it may fuse products and sums.

    Raises:
        RefusedError: with the lines of ptxas's errors.
        RefusedError: with the lines in which ptxas says why.
    """
    goal = re.search(r"\.target\s+(\w+)", ptx)
    name = goal[1] if goal else ""
    with tempfile.TemporaryDirectory(prefix="cast-kernels-") as folder:
        source, code = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(_lowered(ptx, release(version_of(path))))
        # Triton sets level 2 because of a defect of ptxas 13.
        options = ["-lineinfo", "-v", "--regAllocOptLevel=2", *([] if fusion else ["--fmad=false"])]
        command = [path, *options, f"--gpu-name={name}", str(source), "-o", str(code)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        said = (done.stderr + done.stdout).replace(str(source), "kernel.ptx")
        if done.returncode:
            lines = [line for line in said.splitlines() if re.search(r"\b(error|fatal)\b", line)]
            raise RefusedError("; ".join(lines[:2]) or said.strip()[:200])
        return code.read_bytes(), said


def _lowered(ptx: str, known: Sequence[int]) -> str:
    """The text with the newest version of PTX that a ptxas of this release reads, if it names a newer one."""
    from triton.backends.nvidia.compiler import ptx_get_version

    named = re.search(r"\.version (\d+)\.(\d+)", ptx)
    if named is None or len(known) < 2:
        return ptx
    newest = ptx_get_version(f"{known[0]}.{known[1]}")
    if int(named[1]) * 10 + int(named[2]) <= newest:
        return ptx
    return ptx.replace(named[0], f".version {newest // 10}.{newest % 10}", 1)


def read(launch: Launch, dtype: str, path: str, own: bool) -> Assembled:
    """Assemble one kernel and read the result.

    Args:
        launch: of the kernel.
        dtype: of the products.
        path: of the ptxas.
        own: whether Triton takes this ptxas for the launch's target.
    """
    row = Assembled(launch.target.name, dtype, launch.kernel, describe_tile(launch), version_of(path), own)
    try:
        cubin, said = assemble(launch.asm["ptx"], path, launch.metadata.enable_fp_fusion)
    except RefusedError as error:
        return replace(row, refused=str(error))
    shared = launch.metadata.shared + sum(map(int, re.findall(r"(\d+) bytes smem", said)))
    used = resources({"cubin": cubin}, shared, launch.metadata.num_warps, launch.target)
    found = opcodes(read_sass(listing(cubin))[0])
    failures = [*shown(launch.asm["ptx"], cubin, int(launch.target.arch)), *_serialised(said)]
    return replace(
        row, registers=used.registers, spills=used.spills, loop_spills=used.loop_spills, shared_bytes=shared,
        instructions=used.instructions, kinds={kind: n for kind, n in sorted(found.items()) if _KINDS.match(kind)},
        failures=tuple(failures),
    )  # fmt: skip


def _serialised(said: str) -> Iterator[str]:
    """ptxas's reports of wgmmas that wait for each other because of the registers around them."""
    for code in sorted(set(re.findall(r"\(C75\d\d\)", said))):
        yield f"ptxas reports {code[1:-1]}: wgmmas are serialised, or waits added"


def compare(
    name: str, dtype: str, problems: str, paths: Sequence[str], cache: Path | None = None
) -> Iterator[Assembled]:
    """Each kernel of the product, assembled by Triton's ptxas and then by others.

    Args:
        name: of a target.
        dtype: key of :data:`~cast_kernels.evidence.cases.KINDS`.
        problems: key of :data:`PROBLEMS`.
        paths: of other assemblers; a release that occurred before is skipped.
        cache: folder of compiled kernels; None for a temporary one.

    Raises:
        ValueError: the target has no ptxas, or a path is no ptxas.
    """
    goal = target(name)
    if goal.backend != "cuda":
        raise ValueError(f"{name} is assembled by LLVM, not by a ptxas; leave it out")
    own = assembler(int(goal.arch))
    chosen = {own.version: own.path}
    for path in paths:
        chosen.setdefault(checked(path), path)
    with tempfile.TemporaryDirectory(prefix="cast-kernels-") as temporary:
        records = launched(name, dtype, PROBLEMS[problems], cache or Path(temporary))
    for record, _ in records.values():
        for path in chosen.values():
            yield read(record.first, dtype, path, path == own.path)


def render(rows: Sequence[Assembled]) -> Table:
    """One line for each assembler of one target and dtype: sums over the assembled kernels."""
    title = f"{rows[0].target} {rows[0].dtype}: the same PTX through each ptxas; nothing was run"
    table = Table(title=title, title_justify="left")
    kinds = sorted({kind for row in rows for kind in row.kinds})
    headings = ("kernels", "refused", "most regs", "spills", "in loops", "most shared", "instructions", *kinds, "fail")
    table.add_column("ptxas")
    for heading in headings:
        table.add_column(heading, justify="right")
    for version in dict.fromkeys(row.ptxas for row in rows):
        table.add_row(*summary([row for row in rows if row.ptxas == version], kinds))
    return table


def summary(rows: Sequence[Assembled], kinds: Sequence[str]) -> list[str]:
    """The cells of one assembler."""
    done = [row for row in rows if not row.refused]
    cells: list[Any] = [
        rows[0].ptxas + (" (Triton's)" if rows[0].triton else ""), len(rows), len(rows) - len(done),
        max((row.registers for row in done), default=0), sum(row.spills for row in done),
        sum(row.loop_spills for row in done), max((row.shared_bytes for row in done), default=0),
        sum(row.instructions for row in done), *(sum(row.kinds.get(kind, 0) for row in done) for kind in kinds),
        sum(bool(row.failures) for row in done),
    ]  # fmt: skip
    return [str(cell) for cell in cells]


def differences(rows: Sequence[Assembled]) -> Iterator[str]:
    """Differences between another assembler and Triton's: kinds of instructions, or more spills inside loops."""
    own = {(row.target, row.dtype, row.kernel, row.tile): row for row in rows if row.triton}
    for row in rows:
        first = own[row.target, row.dtype, row.kernel, row.tile]
        if row.triton or row.refused or first.refused:
            continue
        about = f"{row.target} {row.dtype} {row.kernel} [{row.tile}] {row.ptxas}"
        changed = [
            f"{kind} {first.kinds.get(kind, 0)} -> {row.kinds.get(kind, 0)}"
            for kind in sorted({*first.kinds, *row.kinds})
            if first.kinds.get(kind, 0) != row.kinds.get(kind, 0)
        ]
        if row.loop_spills > first.loop_spills:
            changed.append(f"spills inside loops {first.loop_spills} -> {row.loop_spills}")
        if changed:
            yield f"{about}: {', '.join(changed)}"


def main(
    targets: Sequence[str], dtypes: Sequence[str], problems: str, paths: Sequence[str], json_file: Path | None = None,
    cache: Path | None = None,
) -> int:  # fmt: skip
    """Assemble, print, and return the exit code: 1 if an assembler refused a kernel or its code has a defect.

    Args:
        targets: names of targets that have a ptxas.
        dtypes: keys of :data:`~cast_kernels.evidence.cases.KINDS`.
        problems: key of :data:`PROBLEMS`.
        paths: of assemblers in addition to Triton's.
        json_file: file for the rows as JSON, written after each target and dtype; see
            :func:`~cast_kernels.evidence.rows.keep`.
        cache: folder of compiled kernels for reuse; None for a temporary one.
    """
    console, rows = wide_console(), list[Assembled]()
    for name in targets:
        for dtype in dtypes:
            found = list(compare(name, dtype, problems, paths, cache))
            rows += found
            console.print(render(found))
            for line in differences(found):
                console.print(line, markup=False, soft_wrap=True)
            if json_file:
                keep([asdict(row) for row in found], json_file)
    for row in rows:
        for failure in (*([row.refused] if row.refused else []), *row.failures):
            about = f"{row.target} {row.kernel} [{row.tile}] {row.dtype} by {row.ptxas}"
            console.print(f"FAIL  {about}: {failure}", markup=False, soft_wrap=True)
    failed = sum(bool(row.failures or row.refused) for row in rows)
    console.print(f"{len(rows)} kernels assembled, {failed} refused or with a defect", markup=False, soft_wrap=True)
    return 1 if failed else 0

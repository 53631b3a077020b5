"""`cast-kernels compile --cuda`: assemble every kernel of csrc/cuda from the embedded PTX, and judge it by gates.

This shows the kernels' resources, their instructions, and whether ptxas changed the order of their products. It does
not show that they compute the right values (tests/test_cuda_forward.py) or how fast they are.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from ptx_emulator.predict.natural_loops import in_natural_loops
from ptx_emulator.predict.resources import functions, listing, opcodes, read_sass, resident_ctas, spills
from rich.table import Table

from cast_kernels import _native
from cast_kernels.assemblers import checked
from cast_kernels.evidence.console import wide_console
from cast_kernels.evidence.cuda_gates import EXACT, TARGET, CudaRow, Launched, judge, judge_build, loose
from cast_kernels.evidence.cuda_launches import CudaLaunch, kept
from cast_kernels.evidence.cuda_modules import modules, split
from cast_kernels.evidence.defects import shown_by

#: An address that nothing reads, because launches are only recorded.
_SOMEWHERE = 1 << 20
#: A value of `Recompute` in csrc/cuda/bcast.h.
_NO_BACKWARD = 3


class Told(NamedTuple):
    """Output of ptxas for one kernel."""

    registers: int  # of a thread
    stack_bytes: int  # of a thread
    static_bytes: int  # of shared memory
    notes: tuple[str, ...]  # C75xx


def launched() -> dict[str, Launched]:
    """Each kernel's launch parameters, over every supported configuration.

    Raises:
        RuntimeError: the CUDA kernels are not built.
    """
    with kept() as launches:
        for problem, recompute in _configurations():
            _call(problem, recompute)
    found: dict[str, list[CudaLaunch]] = {}
    for launch in launches:
        found.setdefault(launch.kernel, []).append(launch)
    return {kernel: _together(own) for kernel, own in found.items()}


def _configurations() -> Iterator[tuple[Any, int]]:
    """A problem for each choice of types, bottleneck and heads, with each number of `Recompute`."""
    for compute, wide, d, head in product(("bf16", "fp16"), range(3), (192, 384), (16, 32, 64)):
        streams, parameters = ("fp32" if wide == 2 else compute), ("fp32" if wide else compute)
        sizes = (6, 8, 196, 768, d, d // head, 0, 1)
        for recompute in range(4):
            yield _native.cuda().Problem(*sizes, compute, streams, parameters, 1e-6), recompute


def _call(problem: Any, recompute: int) -> None:
    """Call a forward, and the backward if there is one."""
    cuda, two, all_parameters = _native.cuda(), [_SOMEWHERE] * 2, [_SOMEWHERE] * 28
    memory = {"recompute": recompute, "saved": _SOMEWHERE, "scratch": _SOMEWHERE, "stream": 0}
    given = {"problem": problem, "x": two, "parameters": all_parameters, "scale": two, **memory}
    given["multiprocessors"] = TARGET.processors
    cuda.forward(**given, y=two)
    if recompute < _NO_BACKWARD:
        cuda.backward(**given, grad_y=two, grad_x=two, gradients=all_parameters)


def _together(launches: Sequence[CudaLaunch]) -> Launched:
    return Launched(
        tuple(sorted({one.threads for one in launches})),
        tuple(sorted({one.cluster for one in launches})),
        max(one.shared_bytes for one in launches),
    )


def assemble(ptx: str, ptxas: str) -> tuple[bytes, str]:
    """Machine code and the output of ptxas, with the options of the build.

    Raises:
        RuntimeError: it does not assemble; the message is ptxas's.
    """
    goal = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory(prefix="cast-kernels-") as folder:
        source, code = Path(folder) / "module.ptx", Path(folder) / "module.cubin"
        source.write_text(ptx)
        command = [ptxas, "-v", "-O3", f"-arch={goal[1] if goal else ''}", str(source), "-o", str(code)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        said = done.stderr + done.stdout
        if done.returncode:
            raise RuntimeError(f"{ptxas}: {said.strip()[:400]}")
        return code.read_bytes(), said


def read(module: str, ptx: str, ptxas: str, known: Mapping[str, Launched]) -> list[CudaRow]:
    """Assemble a module and read each of its kernels, before :func:`judge`.

    Args:
        module: name of its source.
        ptx: its text.
        ptxas: path of the assembler.
        known: launch parameters by kernel.

    Raises:
        RuntimeError: it does not assemble.
    """
    cubin, said = assemble(ptx, ptxas)
    code, told = functions(listing(cubin)), hear(said)
    return [
        read_kernel(module, kernel, text, code[kernel], told[kernel], known.get(kernel))
        for kernel, text in split(ptx).items()
    ]


def read_kernel(module: str, kernel: str, ptx: str, sass: str, told: Told, known: Launched | None) -> CudaRow:
    """One kernel from its PTX, the listing of its machine code and the output of ptxas."""
    code, labels = read_sass(sass)
    inside = in_natural_loops(code, labels)
    spilling, found = spills(code), opcodes(code)
    kinds = {kind: n for kind, n in found.items() if re.match(r"HMMA|[HQIB]GMMA", kind)}
    threads = _directive(ptx, "maxntid", 0)
    warps = (threads or max(known.threads if known else (32,))) // 32
    shared = told.static_bytes + (known.shared_bytes if known else 0)
    return CudaRow(
        module=module,
        kernel=kernel,
        launched=known,
        threads=threads,
        cluster=_directive(ptx, "reqnctapercluster", 1),
        registers=told.registers,
        roles=tuple(sorted({int(n) for n in re.findall(r"\bsetmaxnreg\.\S+\s+(\d+)", ptx)})),
        stack_bytes=told.stack_bytes,
        spills=sum(spilling),
        loop_spills=sum(spill and loop for spill, loop in zip(spilling, inside, strict=True)),
        shared_bytes=shared,
        ctas=resident_ctas(TARGET, told.registers, shared, warps),
        tensor_core="+".join(sorted(kinds)),
        tensor_core_count=sum(kinds.values()),
        instructions=len(code) - found["NOP"],
        functions=len(re.findall(r"^\s*(?:\.\w+\s+)*\.func\b", ptx, re.MULTILINE)),
        notes=told.notes,
        defects=tuple(shown_by(ptx, sass, int(TARGET.arch))),
    )


def _directive(ptx: str, name: str, missing: int) -> int:
    """The product of a directive's numbers."""
    found = re.search(rf"^\.{name}\s+([\d, ]+)", ptx, re.MULTILINE)
    return prod(int(number) for number in found[1].split(",")) if found else missing


def hear(said: str) -> dict[str, Told]:
    """The output of `ptxas -v` by kernel.

    A note that names no kernel counts for every kernel.
    """
    blocks = re.split(r"Compiling entry function '(\w+)'", said)
    notes = [line.strip() for line in said.splitlines() if re.search(r"\bC75\d\d\b", line)]
    kernels = blocks[1::2]
    found = {}
    for kernel, text in zip(kernels, blocks[2::2], strict=True):
        own = tuple(
            note for note in notes if not (named := [one for one in kernels if re.search(rf"\b{one}\b", note)])
            or kernel in named
        )  # fmt: skip
        found[kernel] = Told(
            _number(r"Used (\d+) registers", text), _number(r"(\d+) bytes stack frame", text),
            _number(r"(\d+) bytes smem", text, 0), own,
        )  # fmt: skip
    return found


def _number(pattern: str, text: str, missing: int | None = None) -> int:
    found = re.search(pattern, text)
    if found is None and missing is None:
        raise RuntimeError(f"ptxas -v does not tell {pattern!r}: {text.strip()[:200]}")
    return int(found[1]) if found else int(missing or 0)


def assembler() -> str:
    """The ptxas of the toolkit that built the kernels.

    Raises:
        RuntimeError: the build recorded no toolkit, or its ptxas is gone.
    """
    nvcc = _native.RECORD.get("cuda", {}).get("nvcc")
    path = Path(nvcc).with_name("ptxas") if nvcc else None
    if path is None or not path.is_file():
        was = f"{path} is not there any more" if path else "the build recorded no toolkit"
        raise RuntimeError(f"{was}; name a ptxas with --ptxas PATH")
    return str(path)


def render(rows: Sequence[CudaRow], ptxas: str) -> Table:
    """A table of the kernels."""
    table = Table(title=f"sm_90a, ptxas {ptxas}: assembled only, nothing was run", title_justify="left")
    table.add_column("kernel", no_wrap=True)
    for heading in ("threads", "regs", "roles", "spills", "in loops", "shared", "CTAs", "SASS", "tensor core", "gates"):
        table.add_column(heading, justify="left" if heading in ("roles", "tensor core", "gates") else "right")
    for row in rows:
        table.add_row(
            row.kernel, str(row.threads), str(row.registers), "+".join(map(str, row.roles)) or "-", str(row.spills),
            str(row.loop_spills), str(row.shared_bytes), str(row.ctas), str(row.instructions),
            f"{row.tensor_core_count} {row.tensor_core}" if row.tensor_core else "-",
            "FAIL" if row.failures else ("exception" if row.allowed else "ok"),
        )  # fmt: skip
    return table


def main(ptxas: str | None = None, json_file: Path | None = None) -> int:
    """Assemble, print, and return the exit code: 1 if a gate fails.

    Args:
        ptxas: path of the assembler; None for that of the build.
        json_file: file for the rows as JSON.

    Raises:
        RuntimeError: the CUDA kernels are not built, the build's ptxas is missing, or a module does not assemble.
        ValueError: the path is not a ptxas.
    """
    module = _native.cuda()
    path = ptxas or assembler()
    release, known = checked(path), launched()
    rows = [judge(row) for name, ptx in modules().items() for row in read(name, ptx, path, known)]
    record, size = _native.RECORD.get("cuda", {}), Path(str(module.__file__)).stat().st_size
    failures = [f"{row.kernel}: {failure}" for row in rows for failure in row.failures]
    failures += loose(rows) if release == EXACT else []
    failures += [
        f"there is no kernel {kernel}, which is launched" for kernel in known.keys() - {r.kernel for r in rows}
    ]
    failures += judge_build(record, size)
    _print(rows, failures, release, record, size)
    if json_file:
        known_of_build = ("toolkit", "architectures", "seconds", "processor_seconds")
        told = {name: record[name] for name in known_of_build if name in record}
        told |= {"ptxas": release, "module_bytes": size, "kernels": [asdict(row) for row in rows]}
        json_file.write_text(json.dumps(told, indent=1) + "\n")
    return 1 if failures else 0


def _print(rows: Sequence[CudaRow], failures: Sequence[str], ptxas: str, record: Mapping[str, Any], size: int) -> None:
    console = wide_console()
    console.print(render(rows, ptxas))
    for reason in dict.fromkeys(row.allowed.partition(": ")[2] for row in rows if row.allowed):
        console.print(f"exception  {reason}", markup=False, highlight=False, soft_wrap=True)
    spent = f"{record['processor_seconds']} s of processor time" if "processor_seconds" in record else "not recorded"
    console.print(f"module: {size / 1e6:.1f} MB; its build: {spent}")
    for failure in failures:
        console.print(f"FAIL  {failure}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{len(rows)} kernels, {sum(bool(row.failures) for row in rows)} failed")

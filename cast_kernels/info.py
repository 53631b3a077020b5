"""What was built and what runs here; for the rest, why not, and the command that would change it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cast_kernels import __version__, _native, assemblers, backends
from cast_kernels.gpu.machine import driver_version
from cast_kernels.ops import _signatures
from cast_kernels.problem import Problem


def typical(device: str) -> Problem:
    """The problem for which backends give their verdicts, of the paper's size: float32 on a CPU, as `cast train` on a
    GPU."""
    autocast = torch.bfloat16 if device == "cuda" else None
    return Problem(1, 8, 196, 768, 384, 12, "time", "space", torch.float32, device, autocast)


def gpus() -> list[dict[str, Any]]:
    """Every GPU that PyTorch can use."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [
        {
            "name": one.name, "capability": f"{one.major}.{one.minor}", "multiprocessors": one.multi_processor_count,
            "memory_bytes": one.total_memory,
        }
        for one in found
    ]  # fmt: skip


def collect() -> dict[str, Any]:
    """All output of `cast-kernels info`, ready for JSON."""
    record = _native.RECORD
    cpu = {"built": _native.CORE is not None} | {k: v for k, v in record.get("cpu", {}).items() if k != "built"}
    if not cpu["built"]:
        cpu |= {"reason": _native.REASON, "change_with": _native.BUILD_COMMAND}
    elif cpu.get("levels_missing") or not cpu.get("openmp", True):
        cpu["change_with"] = f"install a newer GCC with OpenMP, then: {_native.BUILD_COMMAND}"
    found = gpus()
    problem = typical("cuda" if found else "cpu")
    return {
        "cast_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "emulator": emulator(),
        "cuda": cuda(),
        "runs": {
            "instruction_set": _native.ISA or _native.ISA_ERROR or "none, the native core is not built",
            "cap": os.environ.get("CAST_KERNELS_CPU_ISA", "none (CAST_KERNELS_CPU_ISA sets one)"),
            "threads": torch.get_num_threads(),
            "repeated_calls": _signatures.describe(),
        },
        "gpus": found,
        "gpu": {"cuda": torch.version.cuda, "driver": driver_version()} if found else {"why_none": _why_no_gpu()},
        "ptxas": [assemblers.describe(number) for number in _architectures(found)],
        "problem": str(problem),
        "backends": {name: list(backends.can_run(name, problem)) for name in backends.BACKENDS},
    }


def _architectures(found: list[dict[str, Any]]) -> list[int]:
    """Architectures of the GPUs here; without a GPU, the most common ones."""
    here = {int(gpu["capability"].replace(".", "")) for gpu in found}
    return sorted(here) or [80, 90, 100]


def emulator() -> dict[str, Any]:
    """Whether the PTX emulator has its native engine, or why not; the interpreter is always there."""
    try:
        from ptx_emulator.native.library import library

        return {"built": True, "level": library().level}
    except ImportError as error:
        reason = _native.RECORD.get("emulator", {}).get("reason") or str(error)
        return {"built": False, "reason": reason, "change_with": _native.BUILD_COMMAND}


def cuda() -> dict[str, Any]:
    """Whether the CUDA kernels were built, by which tools, and whether their driver is here."""
    record = _native.RECORD.get("cuda", {})
    if _native.CUDA is None:
        return record | {"built": False, "reason": _native.CUDA_REASON, "change_with": _native.CUDA_BUILD_COMMAND}
    version, why_none = _native.CUDA.driver()
    driver = {"driver": f"{version // 1000}.{version % 1000 // 10}"} if version else {"why_no_driver": why_none}
    return record | {"built": True, "modules": sorted(_native.CUDA.packed_ptx())} | driver


def _why_no_gpu() -> str:
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return f"PyTorch {torch.__version__} is {built}, and sees none"


def render(info: dict[str, Any]) -> Table:
    """The same as a table for people."""
    table = Table(title=f"cast_kernels {info['cast_kernels']}", title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("torch, python", f"{info['torch']}, {info['python']}")
    cpu = info["cpu"]
    table.add_row("native cpu", "built" if cpu["built"] else f"not built: {cpu['reason']}")
    if cpu["built"]:
        levels = ", ".join(cpu.get("levels", [])) or "not recorded"
        missing = f"; the compiler lacks {', '.join(cpu['levels_missing'])}" if cpu.get("levels_missing") else ""
        table.add_row("  compiler", str(cpu.get("compiler", "not recorded")))
        table.add_row("  levels", levels + missing)
        table.add_row("  flags", _flags(cpu))
        table.add_row("  OpenMP", "yes" if cpu.get("openmp") else "no: one thread only")
    if "change_with" in cpu:
        table.add_row("  to change it", escape(cpu["change_with"]))
    for row in _cuda_rows(info["cuda"]):
        table.add_row(*row)
    engine = info["emulator"]
    table.add_row(
        "native emulator",
        f"built, runs with {engine['level']}" if engine["built"] else f"not built: {engine['reason']}",
    )
    if "change_with" in engine:
        table.add_row("  to change it", engine["change_with"])
    runs = info["runs"]
    table.add_row("runs with", f"{runs['instruction_set']}, {runs['threads']} threads, cap: {runs['cap']}")
    table.add_row("repeated calls", runs["repeated_calls"])
    for gpu in info["gpus"]:
        about = f"compute capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors"
        table.add_row("GPU", f"{gpu['name']}, {about}, {gpu['memory_bytes'] / 2**30:.0f} GiB")
    told = info["gpu"]
    if info["gpus"]:
        table.add_row("CUDA, driver", f"{told['cuda']}, {told['driver']}")
    else:
        table.add_row("GPU", f"none: {told['why_none']}")
    for ptxas in info["ptxas"]:
        table.add_row("ptxas", escape(assemblers.line(ptxas)))
        for defect in ptxas["defects"] if info["gpus"] else ():  # --json tells them without a GPU too
            about = f"{defect['name']}: {defect['what']} ({defect['source']}). Our kernels: {defect['our_kernels']}"
            table.add_row("  known bad", escape(about))
    table.add_row("asked about", info["problem"])
    for name, (ok, reason) in info["backends"].items():
        table.add_row(f"backend {name}", f"{'yes' if ok else 'no'}: {reason}")
    return table


def _cuda_rows(cuda: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Facts about the CUDA kernels, a line each."""
    if not cuda["built"]:
        yield "native cuda", escape(f"not built: {cuda['reason']}")
        yield "  to change it", escape(cuda["change_with"])
        return
    yield "native cuda", f"built: {', '.join(cuda['modules'])}"
    told = {name: cuda.get(name, "not recorded") for name in ("toolkit", "ptxas", "nvcc", "architectures")}
    yield "  toolkit", escape(f"{told['toolkit']} with ptxas {told['ptxas']} ({told['nvcc']})")
    names = told["architectures"]
    yield "  architectures", names if isinstance(names, str) else ", ".join(names)
    yield "  driver", escape(f"of CUDA {cuda['driver']}" if "driver" in cuda else f"none: {cuda['why_no_driver']}")


def _flags(cpu: dict[str, Any]) -> str:
    """Flags that the compiler and the linker got from outside, and the flags that the build appended to undo them."""
    if "compiler_flags" not in cpu:
        return "not recorded"
    given = f"compiler {cpu['compiler_flags'] or 'none'}; linker {cpu['linker_flags'] or 'none'}"
    return f"{given}; appended {cpu['appended_flags']}"


def show() -> None:
    """Print the table."""
    Console().print(render(collect()))

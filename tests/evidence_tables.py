"""The tables of docs/evidence.md, docs/ptxas.md and docs/cuda.md that are made from the files in benchmarks/evidence.

python tests/evidence_tables.py        # writes them anew, each between two marks
"""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cast_kernels.assemblers import release
from cast_kernels.evidence import mutant_table
from cast_kernels.evidence.cases import Case
from cast_kernels.evidence.mutants import TAKEN
from cast_kernels.evidence.prediction_report import markdown_table
from cast_kernels.evidence.problems import SIZES
from cast_kernels.evidence.reassemble import Assembled, summary

ROOT = Path(__file__).resolve().parent.parent
EVIDENCE = ROOT / "benchmarks/evidence"
PAGES = (ROOT / "docs/evidence.md", ROOT / "docs/ptxas.md", ROOT / "docs/cuda.md")
DTYPES = ("bf16", "fp16", "amp", "amp16", "fp32")
_MARKED = re.compile(
    r"(<!-- (?P<name>[\w ]+), made by tests/evidence_tables\.py -->\n).*?(<!-- end of it -->\n)", re.DOTALL
)
Run = dict[str, Any]


def read(name: str) -> Any:
    """A file of evidence."""
    return json.loads((EVIDENCE / name).read_text())


def page(text: str) -> str:
    """The page with its tables as the files have them now.

    Raises:
        KeyError: a mark names no table.
    """
    return _MARKED.sub(lambda m: f"{m[1]}\n{TABLES[m['name']]()}\n\n{m[3]}", text)


def table(headings: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    return "\n".join(markdown_table(headings, cells))


def planted() -> str:
    """How many faults were planted in each target's kernels, and what became of them."""
    kept = mutant_table.read(EVIDENCE / "mutants.json")
    rows, cells = kept["mutants"], []
    for target, dtype in _groups(rows):
        own = [row for row in rows if row[:2] == [target, dtype]]
        cells.append([target, dtype, *map(str, _counts(own)), _sampled(kept["made"], target, dtype)])
    every, caught, harmless, missed = _counts(rows)
    told = f"**{every:,} are planted, {caught:,} caught, {harmless:,} harmless, {missed or 'none'} missed.**"
    headings = ("target", "dtype", "planted", "caught", "harmless", "missed", "faults of each kernel")
    return f"{told}\n\n{table(headings, cells)}"


def _groups(rows: Iterable[mutant_table.Row]) -> list[tuple[str, str]]:
    found = {(row[0], row[1]) for row in rows}
    return sorted(found, key=lambda group: (DTYPES.index(group[1]), group[0]))


def _counts(rows: Sequence[mutant_table.Row]) -> tuple[int, int, int, int]:
    """Planted, caught, harmless, missed."""
    caught, missed = sum(row[8] for row in rows), len(mutant_table.missed(rows))
    return len(rows), caught, len(rows) - caught - missed, missed


def _sampled(made: dict[str, dict[str, Any]], target: str, dtype: str) -> str:
    """Which of a kernel's faults were planted: by problem where they differ."""
    steps: dict[int, list[str]] = {}
    for name, one in made.items():
        if name.startswith(f"{target}, {dtype}, "):
            steps.setdefault(one["every"], []).append(name.split(", ", 2)[2])
    words = {step: "each" if step == 1 else f"one of {step}" for step in sorted(steps)}
    if len(steps) == 1:
        return next(iter(words.values()))
    return "; ".join(f"{word} in {', '.join(steps[step])}" for step, word in words.items())


def by_kind() -> str:
    """What each kind of planted fault was seen by, and why it was not."""
    rows = mutant_table.read(EVIDENCE / "mutants.json")["mutants"]
    order = {group: place for place, group in enumerate(_groups(rows))}
    rows = sorted(rows, key=lambda row: (order[row[0], row[1]], TAKEN.index(row[4])))
    headings = ("target", "dtype", "taken away", "planted", "caught", "by", "not caught, because")
    return table(headings, mutant_table.counted(rows, (0, 1, 4)))


def full_size() -> str:
    """B-CAST at the paper's size, executed: errors, work and traffic, by the native engine."""
    cells = []
    for run in _runs("full"):
        total = {name: sum(k["counters"].get(name, 0) for k in run["kernels"]) for name in _COUNTERS}
        useful = sum(kernel["useful_flops"] for kernel in run["kernels"])
        loads, stores = (
            total[f"shared_{way}_wavefronts"] / total[f"shared_{way}_wavefronts_ideal"] for way in ("load", "store")
        )
        cells.append([
            run["target"], run["dtype"], str(run["case"]["batch"]), _worst(run),
            f"{total['tensor_flops'] / 1e6:.0f} / {useful / 1e6:.0f}",
            f"{total['global_load_sectors'] / 1e3:.0f} k + {total['global_store_sectors'] / 1e3:.0f} k",
            f"{loads:.2f} / {stores:.2f}", f"{sum(kernel['seconds'] for kernel in run['kernels']):.0f}",
            f"{run['seconds']:.0f}",
        ])  # fmt: skip
    headings = (
        "target", "dtype", "clips", "worst ratio to eager's error", "tensor MFLOP issued / useful",
        "load + store sectors", "shared-memory wavefronts to ideal", "s", "s",
    )  # fmt: skip
    return table(headings, cells)


_COUNTERS = (
    "tensor_flops", "global_load_sectors", "global_store_sectors", "shared_load_wavefronts",
    "shared_load_wavefronts_ideal", "shared_store_wavefronts", "shared_store_wavefronts_ideal",
)  # fmt: skip


def _runs(size: str) -> list[Run]:
    """Those of a size by the native engine, each with its problem, in the tables' order."""
    found = [run | {"problem": _case(run)} for run in read("emulate.json") if run["engine"] == "native"]
    own = [run for run in found if run["problem"] in SIZES[size]]
    return sorted(
        own, key=lambda run: (run["target"], DTYPES.index(run["dtype"]), SIZES[size].index(run["problem"]))
    )  # fmt: skip


def _case(run: Run) -> Case:
    told = run["case"]
    return Case(**told | {name: tuple(told[name]) for name in ("windows", "directions")})


def _worst(run: Run) -> str:
    if run["fault"]:
        return f"FAULT: {run['fault'].splitlines()[0]}"
    worst = max(run["errors"], key=lambda error: error["ratio"])
    return f"{worst['ratio']:.2f} `{worst['name']}`{'' if run['ok'] else ' FAIL'}"


def other_problems() -> str:
    """The worst ratio of every problem of `small` and `paper` in every dtype."""
    cells = []
    for size in ("small", "paper"):
        runs = _runs(size)
        for problem in SIZES[size]:
            for target in dict.fromkeys(run["target"] for run in runs):
                own = {run["dtype"]: run for run in runs if run["target"] == target and run["problem"] == problem}
                ratios = [_worst(own[dtype]) if dtype in own else "" for dtype in _EMULATED]
                cells.append([f"`{size}`", str(problem), target, *ratios])
    return table(("size", "problem", "target", *_EMULATED), cells)


_EMULATED = ("bf16", "fp16", "amp", "fp32")


def block() -> str:
    """A training step of a block of CAST-B, executed: errors beside eager's, work and time."""
    cells = []
    for run in read("block.json"):
        ratios = {name: ours / eager for name, (ours, eager, *_) in run["errors"].items()}
        worst = max(ratios, key=lambda name: ratios[name])
        kernels = run["kernels"].values()
        cells.append([
            run["target"], run["dtype"], f"{ratios[worst]:.2f} `{worst}`{'' if run['ok'] else ' FAIL'}",
            f"{ratios['spatial']:.2f}, {ratios['temporal']:.2f}", f"{ratios['update']:.2f}",
            str(sum(one["ctas"] for one in kernels)), f"{sum(one['seconds'] for one in kernels):.0f}",
            f"{run['seconds']:.0f}",
        ])  # fmt: skip
    headings = (
        "target", "dtype", "worst ratio", "outputs' ratios", "update's", "CTAs", "s in the emulator", "s"
    )  # fmt: skip
    return table(headings, cells)


def compiled() -> str:
    """What each kernel takes in bf16: the largest of its variants, and the fewest CTAs."""
    rows = [row for row in read("compile.json") if row["dtype"] == "bf16"]
    cells = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        own = [row for row in rows if row["kernel"] == kernel]
        for place, target in enumerate(dict.fromkeys(row["target"] for row in own)):
            cells.append([f"`{kernel}`" if not place else "", *_variants([r for r in own if r["target"] == target])])
    headings = (
        "kernel", "target", "variants", "registers", "spills", "in loops", "shared", "CTAs a SM", "tensor core"
    )  # fmt: skip
    return table(headings, cells)


def _variants(rows: Sequence[Run]) -> list[str]:
    used = [row["resources"] for row in rows]
    largest = [max(one[name] for one in used) for name in ("registers", "spills", "loop_spills", "shared_bytes")]
    cores = sorted({one["tensor_core"] for one in used if one["tensor_core"]})
    return [
        rows[0]["target"], str(len(rows)), *map(str, largest), str(min(one["ctas"] for one in used)),
        ", ".join(cores) or "-",
    ]  # fmt: skip


def assembled() -> str:
    """Sums over the kernels of a training step, by target, dtype and release of ptxas."""
    rows = [Assembled(**row) for row in read("assemblers.json")]
    rows.sort(key=lambda row: (row.target, DTYPES.index(row.dtype), release(row.ptxas)))
    kinds = [kind for kind in _ASSEMBLED if any(row.kinds.get(kind) for row in rows)]
    cells = []
    for target, dtype, version in dict.fromkeys((row.target, row.dtype, row.ptxas) for row in rows):
        own = [row for row in rows if (row.target, row.dtype, row.ptxas) == (target, dtype, version)]
        name, count, refused, _, spills, in_loops, _, instructions, *counts, failing = summary(own, kinds)
        cells.append([target, dtype, name, count, refused, spills, in_loops, instructions, *counts, failing])
    headings = ("target", "dtype", "ptxas", "kernels", "refused", "spills", "in loops", "instructions", *kinds, "fail")
    return table(headings, cells)


#: Of kernels that are one of many: bf16 throughout, and what a page can hold.
_INSTANCE = re.compile(r"bcast_(?P<stem>\w+?)_bf16(_bf16)?(_384|_32)?")


def cuda_kernels() -> str:
    """What the CUDA kernels take of a multiprocessor: an instance of each at the paper's size."""
    cells = []
    for row in read("cuda_compile.json")["kernels"]:
        if found := _INSTANCE.fullmatch(row["kernel"]):
            registers = " + ".join(map(str, row["roles"] or [row["registers"]]))
            cells.append([
                f"`{found['stem']}`", registers, str(row["spills"]), f"{row['shared_bytes']:,}", str(row["ctas"])
            ])  # fmt: skip
    return table(("kernel", "registers", "spill instructions", "shared memory", "CTAs an SM"), cells)


_ASSEMBLED = ("HGMMA", "UTCHMMA", "UTCQMMA", "HMMA", "LDGSTS", "LDSM", "STSM", "BAR", "BSSY")

#: Name in a mark -> what makes the table.
TABLES: dict[str, Callable[[], str]] = {
    "planted faults": planted,
    "planted faults by kind": by_kind,
    "the paper size": full_size,
    "other problems": other_problems,
    "a block": block,
    "compiled kernels": compiled,
    "assemblers": assembled,
    "CUDA kernels": cuda_kernels,
}


def main() -> None:
    """Write the pages' tables anew."""
    ArgumentParser(description="Write the tables of the pages of evidence anew.").parse_args()
    for path in PAGES:
        path.write_text(page(path.read_text()))


if __name__ == "__main__":
    main()

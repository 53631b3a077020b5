"""Check liger-kernel's operations on the emulator: values against plain PyTorch, findings, seconds.

    pip install --no-deps liger-kernel==0.8.5
    python benchmarks/check_liger.py [--op rope ...] [--target sm_90 ...] [--folder benchmarks/evidence]

Each operation's forward and backward run as Triton's code for the target, on a CPU's tensors. No time here is a GPU's.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from liger_ops import LEFT_OUT, OPS, differentiated, error
from ptx_emulator.targets import EMULATED
from ptx_emulator.triton import checking
from ptx_emulator.triton.checker import counted
from report import processor

#: Part of the emulator's note about a value whose last bits depend on the order of the warps.
ROUNDED = "differ by rounding"


def check(name: str, target: str) -> dict[str, Any]:
    """One operation on one target, as a row."""
    op, begin = OPS[name], time.perf_counter()
    exact = differentiated(op.plain, op, torch.float64)
    row: dict[str, Any] = {"op": name, "target": target, "error": None, "refused": ""}
    with tempfile.TemporaryDirectory() as cache, checking(target, Path(cache)) as checker:
        try:
            row["error"] = error(differentiated(op.liger, op, torch.float32), exact)
        except Exception as refused:  # one operation's failure must not end the table
            row["refused"] = f"{type(refused).__name__}: {refused}"
    told = checker.as_json()
    row["kernels"] = [kernel["kernel"] for kernel in told["kernels"]]
    row["launches"] = sum(kernel["launches"] for kernel in told["kernels"])
    row["findings"], row["notes"] = told["findings"], told["notes"]
    row["emulated_s"] = round(sum(kernel["seconds"] for kernel in told["kernels"]), 2)
    row["seconds"] = round(time.perf_counter() - begin, 1)
    return row


def page(made: dict[str, Any]) -> str:
    """The table in Markdown."""
    lines = [
        "# liger-kernel on the emulator",
        "",
        f"Operations of liger-kernel {made['liger_kernel']}, forward and backward in float32, compiled by Triton "
        f"{made['triton']} and executed on a CPU ({made['machine']}, PyTorch on {made['threads']}, {made['date']}), "
        "each on small tensors of one shape. Error: the largest relative error of an output or a gradient, against "
        "plain PyTorch in float64; where it is near 1e-3, products take tf32. Seconds: of the whole operation, and of "
        "these in the emulator. The first row's contain the start of the compiler, and other programs may have run "
        "beside it. Note: several warps write one word, and the last of them decides its last bits "
        "(triton-lang/triton#7264). `python benchmarks/check_liger.py`",
        "",
        "| operation | target | kernels | launches | error | seconds | in the emulator | found |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in made["rows"]:
        kinds = ", ".join(dict.fromkeys(f"**{f['kind']}** in `{f['kernel']}`" for f in row["findings"]))
        rounded = "note: rounding" if any(ROUNDED in note for note in row["notes"]) else ""
        amount = "-" if row["error"] is None else f"{row['error']:.1e}"
        name = row["op"] if OPS[row["op"]].backward else f"{row['op']}, forward"
        found = "; ".join(filter(None, (kinds, rounded, row["refused"].split("\n")[0]))) or "nothing"
        cells = (name, row["target"], len(row["kernels"]), row["launches"], amount, row["seconds"],
                 row["emulated_s"], found)  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "Not in the table, since a machine without a GPU cannot call them or there is nothing to run:", ""]
    lines += [f"- `{name}` {why}" for name, why in LEFT_OUT.items()]
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    """Run, print and write; the exit status is 1 if an operation did not finish."""
    parser = ArgumentParser(description="Check liger-kernel's operations on the PTX emulator.")
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help="operations (all)")
    parser.add_argument("--target", nargs="+", choices=EMULATED, default=list(EMULATED), help="architectures (all)")
    parser.add_argument("--folder", type=Path, help="write liger.json and liger.md here")
    options = parser.parse_args(words)
    rows = []
    for name in options.op:
        for target in options.target:
            rows.append(check(name, target))
            shown = {key: rows[-1][key] for key in ("op", "target", "error", "launches", "seconds", "refused")}
            print(shown, *(f"{f['kind']}: {f['message']}" for f in rows[-1]["findings"]), sep="\n  ", flush=True)
    made = {
        "liger_kernel": version("liger-kernel"),
        "triton": version("triton"),
        "torch": version("torch"),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {processor()}",
        "threads": counted(torch.get_num_threads(), "thread"),
        "date": date.today().isoformat(),
        "rows": rows,
    }
    if options.folder:
        (options.folder / "liger.json").write_text(json.dumps(made, indent=1) + "\n")
        (options.folder / "liger.md").write_text(page(made))
    return 1 if any(row["refused"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

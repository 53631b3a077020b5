"""What `cast-kernels gpu-check` found, as tables and as Markdown; and which prediction belongs to which time."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from cast_kernels.evidence.model import UNCERTAINTY
from cast_kernels.evidence.prediction_report import markdown_table

#: Where predictions were committed: in the repository, not in an installed package.
PREDICTIONS = Path(__file__).parents[2] / "benchmarks/predictions"

#: Phases as they are measured -> as they are predicted.
_PHASES = {"inference": ("inference",), "training": ("forward", "backward")}
_TIMES = ("warm_ms", "cold_ms", "graph_warm_ms", "graph_cold_ms")


def predictions_for(gpu: Mapping[str, Any], folder: Path) -> dict[tuple[int, str], float]:
    """(batch, measured phase) -> predicted milliseconds; empty if there are none for this GPU.

    Args:
        gpu: `name`, in which the prediction's must be a word (a GH200 is no H200), and `multiprocessors`, of which it
            must have as many (an H100 PCIe is no H100 SXM).
        folder: of what `cast-kernels predict` wrote.
    """
    words = re.findall(r"[A-Z0-9]+", gpu["name"].upper())
    if "NVL" in words:  # an H100 NVL has an SXM's multiprocessors, but another memory or power limit
        return {}
    for path in sorted(folder.glob("*.json")):
        if path.stem.upper() in words:
            (entry,) = json.loads(path.read_text())["devices"].values()
            if entry["constants"]["multiprocessors"] != gpu["multiprocessors"]:
                return {}
            return {
                (one["batch"], measured): sum(one["us"][phase] for phase in phases) / 1e3
                for one in entry["batches"]
                for measured, phases in _PHASES.items()
            }
    return {}


def beside(times: Sequence[Mapping[str, Any]], predicted: Mapping[tuple[int, str], float]) -> list[dict[str, Any]]:
    """Our best measured time beside its prediction, and whether it is as near as predictions claim to be."""
    found = []
    for entry in times:
        key = (entry["batch"], entry["phase"])
        if entry["variant"] == "triton" and key in predicted:
            measured = min(entry[name] for name in _TIMES if name in entry)
            ratio = measured / predicted[key]
            found.append({
                "batch": key[0], "phase": key[1], "measured_ms": measured, "predicted_ms": predicted[key],
                "ratio": ratio, "inside": abs(ratio - 1) <= UNCERTAINTY,
            })  # fmt: skip
    return found


def verdict(passed: bool) -> str:
    """The last line."""
    return "all is right; please send the report" if passed else "FAIL: see above; please send the report all the same"


Section = tuple[str, tuple[str, ...], list[tuple[str, ...]]]  # title, headings, cells


def sections(found: Mapping[str, Any]) -> list[Section]:
    """Everything as titled tables of text."""
    device, ceilings = found["device"], found["ceilings"]
    summary: list[tuple[str, ...]] = [(key, str(value)) for key, value in device.items()]
    if ceilings:
        summary += [("copy", f"{ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s")]
        summary += [("bf16 GEMM", f"{ceilings['gemm_flops_per_s'] / 1e12:.0f} TFLOP/s")]
    broken: list[Section] = []
    cells: list[tuple[str, ...]] = [("FAIL", b["section"], b["error"].replace("\n", " ")) for b in found["broken"]]
    cells += [("FAIL", name, "not finished when this was written") for name in found.get("unfinished", ())]
    if cells:
        broken = [("what an error ended; entries before it are below", ("", "section", "error"), cells)]
    nothing = "no prediction for this GPU" if PREDICTIONS.is_dir() else "predictions come with the source tree"
    correct: list[tuple[str, ...]] = [
        ("FAIL", c["backend"], c["dtype"], c["case"], "-", "-", "-", c["why_not"]) if "why_not" in c else
        (
            "ok" if c["ok"] and c["same_bits_twice"] else "FAIL", c["backend"], c["dtype"], c["case"], c["worst"],
            f"{c['rms']:.2e}", f"{c['eager_rms']:.2e}", "same" if c["same_bits_twice"] else "DIFFERENT",
        )
        for c in found["correctness"]
    ]  # fmt: skip
    times: list[tuple[str, ...]] = [
        (str(t["batch"]), t["variant"], t["phase"], *(_number(t.get(name)) for name in _TIMES),
         f"{t['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in t else "-", t.get("why_not", t.get("no_graph", "")))
        for t in found["times"]
    ]  # fmt: skip
    predicted: list[tuple[str, ...]] = [
        (str(p["batch"]), p["phase"], _number(p["measured_ms"]), _number(p["predicted_ms"]), f"{p['ratio']:.2f}",
         "yes" if p["inside"] else "no")
        for p in found["predicted"]
    ]  # fmt: skip
    sanitizer: list[tuple[str, ...]] = [
        (s["tool"], "ok" if s["ok"] else "FAIL", s["output"].replace("\n", " ")) for s in found["sanitizer"]
    ]
    return [
        *broken,
        ("GPU and its measured ceilings", ("", ""), summary),
        ("correctness against fp64, the worst tensor of each; at most twice eager's error",
         ("", "backend", "dtype", "case", "tensor", "rms", "eager's", "run twice"), correct),
        ("compute-sanitizer", ("tool", "", "output"), sanitizer or [("-", "", "not installed, or not asked for")]),
        ("medians of CUDA events, milliseconds",
         ("B", "variant", "phase", "warm", "cold L2", "graph", "graph, cold L2", "peak MB", ""), times),
        (f"predicted beside measured (best of ours); the model claims +-{UNCERTAINTY:.0%}",
         ("B", "phase", "measured ms", "predicted ms", "ratio", "inside"),
         predicted or [("-", nothing, "", "", "", "")]),
    ]  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def tables(found: Mapping[str, Any]) -> list[Table]:
    """The sections for a terminal."""
    made = []
    for title, headings, cells in sections(found):
        table = Table(*headings, title=title, title_justify="left")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))  # an error's brackets are no markup
        made.append(table)
    return made


def markdown(found: Mapping[str, Any], passed: bool) -> str:
    """The sections as a document."""
    lines = [f"# cast_kernels {found['cast_kernels']} on {found['device']['name']}", ""]
    for title, headings, cells in sections(found):
        plain = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in cells]
        lines += [f"## {title[0].upper()}{title[1:]}", "", *markdown_table(headings, plain), ""]
    return "\n".join([*lines, verdict(passed), ""])

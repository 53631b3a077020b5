"""The report's sections. Empty sections are omitted; the last section says how to get them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from torch import nn

from cast.evaluation.cost import ModelCost
from cast.evaluation.inference import Cost
from cast.evaluation.predictions import Predictions
from cast.evaluation.published import EK100, K400_SSV2, SOURCE, PublishedResult, dataset_name
from cast.evaluation.report import classes, clips, plots
from cast.evaluation.report.curves import Log, thinned
from cast.evaluation.report.html import facts, page, table, tiles
from cast.evaluation.summary import meanings, summarise, tasks
from cast.model import CAST
from cast.video.views import Protocol

#: Number of videos whose attention is shown.
_ATTENTION = 2


@dataclass(frozen=True)
class Evidence:
    """The content of the report. Entries that are None or empty are omitted.

    Args:
        title: of the page.
        predictions: the evaluated model's.
        baselines: of other models on the same videos, by name, in the same order.
        protocol: the clips of the test.
        paths: the videos' files, in the predictions' order.
        model: needed for its attention, if it is a CAST.
        model_cost: its size and its multiply-accumulates.
        cost: the cost of the run.
        log: the training's curves.
        facts: more rows for the model card, name and text.
    """

    title: str
    predictions: Predictions
    protocol: Protocol
    baselines: Mapping[str, Predictions] = field(default_factory=dict)
    paths: Sequence[Path] = ()
    model: nn.Module | None = None
    model_cost: ModelCost | None = None
    cost: Cost | None = None
    log: Log | None = None
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, Predictions]:
        """The evaluated model, then the baselines, by name."""
        return {self.predictions.model: self.predictions, **self.baselines}


def html(evidence: Evidence) -> str:
    """The whole page."""
    sections = {"": _lead(evidence)}
    if evidence.predictions.labels:
        summary = summarise(evidence.predictions, evidence.baselines)
        sections |= {
            "Accuracy": _accuracy(evidence, summary),
            "Balanced understanding": _balance(evidence, summary),
            "Against the baselines": _against(summary, evidence.predictions.model),
            "Class by class": classes.section(evidence.predictions, evidence.baselines),
            "What is taken for what": classes.confusions(evidence.predictions, summary),
            "What the models see and say": _videos(evidence),
        }
    sections |= {
        "Where the streams look": _attention(evidence),
        "Learning curves": _curves(evidence.log),
        "Model card": _card(evidence),
        "How to read this": _made(evidence),
    }
    parts = [f"<h1>{escape(evidence.title)}</h1>"]
    for title, content in sections.items():
        if content:
            parts.append((f"<h2>{escape(title)}</h2>\n" if title else "") + content)
    return page(evidence.title, "\n".join(parts))


def _lead(evidence: Evidence) -> str:
    videos = len(evidence.predictions.videos)
    text = (
        f"{videos:,} videos, {evidence.protocol.name} views of {evidence.protocol.frames} frames at "
        f"{evidence.protocol.size} pixels{_shrunk(evidence)}, {evidence.protocol.sampling} sampling; softmax of every "
        "view, then the mean."
    )
    return f'<p class="lead">{escape(text)}</p>'


def _shrunk(evidence: Evidence) -> str:
    side = evidence.protocol.short_side
    return "" if side is None else f" (larger pictures shrunk to a short side of {side} first, as in training)"


def _accuracy(evidence: Evidence, summary: Mapping[str, Any]) -> str:
    figures, between = summary["metrics"], summary["confidence_95"]
    shown = [(task.capitalize(), figures[f"{task}_top1"]) for task in tasks(evidence.predictions)]
    if "harmonic_mean" in figures:
        shown.append(("Harmonic mean", figures["harmonic_mean"]))
    parts = [tiles((name, f"{value:.1f} %") for name, value in shown)]
    others = {name: entry["metrics"] for name, entry in summary["baselines"].items()}
    rows = []
    for name, value in figures.items():
        task = name.removesuffix("_top1")
        interval = f" <small>{between[task][0]:.1f}–{between[task][1]:.1f}</small>" if task in between else ""
        cells = [_words(name), f"<b>{value:.1f}</b>{interval}"]
        cells += [f"{entry[name]:.1f}" if name in entry else "–" for entry in others.values()]
        rows.append(("", cells))
    parts.append(
        table(["", f"{escape(evidence.predictions.model)}, % <small>95 %</small>", *map(escape, others)], rows)
    )
    return "\n".join(parts)


def _words(name: str) -> str:
    """A figure's name as a title: `verb_top1` -> `Verb top-1`."""
    text = name.replace("_", " ").replace("top1", "top-1").replace("top5", "top-5").replace("f1", "F1")
    return escape(text[0].upper() + text[1:])


def _balance(evidence: Evidence, summary: Mapping[str, Any]) -> str:
    counts = {head: values.shape[1] for head, values in evidence.predictions.probabilities.items()}
    known = dataset_name(counts)
    own = evidence.predictions.model
    everyone = {own: summary["metrics"]} | {n: entry["metrics"] for n, entry in summary["baselines"].items()}
    note = ""
    if evidence.predictions.compositional:
        reference: tuple[PublishedResult, ...] = EK100 if known == "EK100" else ()
        points = [plots.Point(n, m["noun_top1"], m["verb_top1"]) for n, m in everyone.items() if "noun_top1" in m]
        labels, lines = ("noun accuracy, %", "verb accuracy, %"), []
    elif known in ("K400", "SSV2"):
        reference, points = K400_SSV2, []
        value, nan = summary["metrics"]["action_top1"], math.nan
        lines = [plots.Point(f"{own} here", *((value, nan) if known == "K400" else (nan, value)))]
        labels = ("Kinetics-400 accuracy, %", "Something-Something V2 accuracy, %")
        note = "One data set gives one coordinate, so this model is a line. "
    else:
        return ""
    if reference:
        note += (
            f"Grey: published results ({SOURCE}), shown because the numbers of classes are those of "
            f"{'Kinetics-400 or Something-Something V2' if lines else 'EPIC-Kitchens-100'}."
        )
    drawn = plots.balance(points, [_as_point(p) for p in reference], labels, lines)
    return (
        "<p>Grey lines join points of equal harmonic mean: a balanced model lies towards the upper right, a one-sided "
        f'one along an axis.</p>\n{drawn}\n<p class="note">{note}</p>'
    )


def _as_point(published: PublishedResult) -> plots.Point:
    # The paper's CAST stands beside the evaluated one.
    name = "CAST (paper)" if published.method == "CAST" else published.method
    return plots.Point(name, published.space, published.time)


def _against(summary: Mapping[str, Any], own: str) -> str:
    rows = []
    for name, entry in summary["baselines"].items():
        for task, paired in entry["paired"].items():
            gain = entry["f1_gain"].get(task)
            f1 = f"{gain['mean']:+.1f}" if gain else "–"
            classes_text = f"{gain['classes_better']} / {gain['classes_worse']}" if gain else "–"
            cells = [escape(name), escape(task), f"{entry['gain'][f'{task}_top1']:+.1f}"]
            cells += [f"{paired['won']} / {paired['lost']}", _p_value(paired["p_value"]), f1, classes_text]
            rows.append(("", cells))
    if not rows:
        return ""
    head = [
        "Baseline", "Task", "Top-1, points", "Videos won / lost", "p <small>McNemar</small>",
        "F1, mean over classes, points", "Classes better / worse",
    ]  # fmt: skip
    return (
        f"<p>{escape(own)} minus each baseline on the same videos. Won: only {escape(own)} is right; lost: only the "
        "baseline is.</p>" + table(head, rows)
    )


def _p_value(value: float) -> str:
    return "&lt; 0.001" if value < 0.001 else f"{value:.3f}"


def _videos(evidence: Evidence) -> str:
    if not evidence.paths:
        return ""
    groups = clips.chosen(evidence.predictions, evidence.baselines)
    note = "Videos evenly spaced over each outcome, not picked by hand; the share is the model's probability."
    return f"<p>{note}</p>\n" + clips.video_rows(groups, evidence.models, evidence.paths)


def _attention(evidence: Evidence) -> str:
    model, paths, predictions = evidence.model, evidence.paths, evidence.predictions
    if not (isinstance(model, CAST) and _exchanges(model)) or not paths:
        return ""
    if predictions.labels:
        groups = clips.chosen(predictions, evidence.baselines, each=1)
        numbers = [(group.title, group.videos[0]) for group in groups][:_ATTENTION]
    else:
        numbers = [("Video", 0)]
    videos = {f"{title}: {predictions.videos[number]}": paths[number] for title, number in numbers}
    return (
        "<p>Cross-attention of the exchange, mean over heads. In a space window every moment of one stream looks over "
        "the patches of the other at the same moment: bright patches are looked at more than evenly. In a time window "
        "every patch looks over the moments of the same patch: the matrices show which moment asks (rows) and which "
        "answers (columns), mean over patches.</p>\n" + clips.attention_rows(model, evidence.protocol, videos)
    )


def _exchanges(model: CAST) -> bool:
    return any(model.config.exchanges(index) for index in range(model.config.depth))


def _curves(log: Log | None) -> str:
    if log is None:
        return ""
    drawn = []
    for series, label, percent in (
        (log.losses, "loss", False), (log.accuracies, "accuracy, %", True), (log.rates, "learning rate", False),
    ):  # fmt: skip
        if series:
            drawn.append(f"<div>{plots.lines(thinned(series), log.axis, label, percent)}</div>")
    return f'<div class="pair">{"".join(drawn)}</div>'


def _card(evidence: Evidence) -> str:
    rows: list[tuple[str, str]] = []
    about, protocol, cost = evidence.predictions.about, evidence.protocol, evidence.cost
    said = {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in about.items()}
    rows += [(name.replace("_", " "), str(value)) for name, value in said.items() if isinstance(value, (str, int))]
    if size := evidence.model_cost:
        rows += [
            ("parameters", f"{size.parameters:,}, of which {size.learnable:,} learnable"),
            ("compute", f"{size.gmacs:,.4g} GMACs a view" + f", {size.gmacs * protocol.clips:,.4g} a video"),
        ]
    rows.append(("views", f"{protocol.name} (temporal x spatial), {protocol.clips} clips a video"))
    if cost and cost.clips:
        pace = cost.clips / cost.seconds
        rows += [
            ("throughput", f"{pace:,.1f} clips/s, {pace / protocol.clips:,.2f} videos/s with decoding, on "
             f"{cost.processes} x {cost.device}"),
            ("peak memory", f"{cost.peak_memory / 2**30:.2f} GiB a process"
             + (" (GPU)" if "CPU" not in cost.device else " (whole process)")),
        ]  # fmt: skip
    rows += list(evidence.facts.items())
    return facts(rows)


def _made(evidence: Evidence) -> str:
    missing = []
    if not evidence.predictions.labels:
        missing.append("accuracies, because the data set has no labels")
    if not evidence.baselines:
        missing.append("comparisons with the experts (give their prediction files with --baselines.NAME FILE)")
    if evidence.log is None:
        missing.append("learning curves (give the training's JSONL log with --log FILE)")
    if evidence.model is None:
        missing.append("attention and the model's size, because the answers were read from a file")
    elif not (isinstance(evidence.model, CAST) and _exchanges(evidence.model)):
        missing.append("attention, which only a CAST with an exchange has")
    used = meanings(evidence.predictions) if evidence.predictions.labels else {}
    parts = [facts((name.replace("_", " "), meaning) for name, meaning in used.items())] if used else []
    parts.append(
        '<p class="note">All accuracies are in percent. The 95 % intervals are Wilson\'s: how far another sample of '
        "as many videos may lie; they say nothing about another training.</p>"
    )
    if missing:
        parts.append(f'<p class="note">Not shown: {escape("; ".join(missing))}.</p>')
    return "\n".join(parts)

"""One HTML file with everything in it: no scripts, no other files, no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from string import Template
from typing import Any

from cast.demo import plots
from cast.demo.clips import CachedClips
from cast.demo.controls import CHANCE, Control
from cast.demo.results import METRICS
from cast.demo.scene import FRAMES, NOUNS, VERBS
from cast.demo.study import MODELS, Outcome
from cast.demo.timing import StepTimes
from cast.optional import require
from cast.video.reader import read

#: Clips shown, evenly spaced over the validation set: chosen before any model was trained.
_SAMPLES = 8
#: Frames of each that are shown.
_SHOWN = range(0, FRAMES, 5)

_NAMES = {"spatial": "Spatial alone", "temporal": "Temporal alone", "ensemble": "Ensemble", "cast": "CAST"}

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>CAST demo</title><style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left } tr.cast td { font-weight: 600 }
td small { color: #666; font-weight: 400 }
.pair { display: flex; flex-wrap: wrap; gap: 2rem; align-items: flex-start } svg { max-width: 100%; height: auto }
.clip { display: flex; flex-wrap: wrap; gap: 1.2rem; margin: 1.2rem 0; align-items: center }
.clip img { image-rendering: pixelated; width: 33.6rem; max-width: 100% }
.clip td, .clip th { padding: .1rem .6rem; font-size: .9rem; text-align: left; border: 0 }
.right { color: #00703c } .wrong { color: #b3261e } .lead { font-size: 1.15rem } .note { color: #555 }
</style></head><body>
<h1>CAST on videos of acting digits</h1>
<p class="lead">$lead</p>
<h2>Accuracy</h2>
$accuracy
<p class="note">$accuracy_note</p>
<h2>Balanced understanding</h2>
<p>Each point is one seed. Grey lines join points of equal harmonic mean: a balanced model lies towards the upper
right, a one-sided one along an axis.</p>
$balance
<h2>Learning curves</h2>
<p>Training loss, and accuracy on the first validation clips, seed $seed.</p>
$curves
<h2>What the models see and say</h2>
<p>Evenly spaced validation clips, every fifth frame. In each, one digit acts (its verb and noun are the answer),
another stands frozen, and a cut-up digit acts as a decoy.</p>
$samples
<div class="pair"><div><h2>Experts</h2>$experts</div>
<div><h2>Step time</h2>$steps<p class="note">$steps_note</p></div></div>
<h2>Controls</h2>
<p>Linear probes on grey pixels, in percent. Without the order of frames, direction must stay a coin flip; decoy and
bystander must stay at chance; motion must not tell the noun; told where the actor is, motion in order tells its verb.
</p>
$controls
<h2>How this was made</h2>
$made
</body></html>
""")


@dataclass(frozen=True)
class Findings:
    """Everything that the report shows."""

    metrics: dict[str, Any]
    outcomes: Sequence[Outcome]
    controls: Sequence[Control]
    times: StepTimes
    val: CachedClips


def html(findings: Findings) -> str:
    """The whole page."""
    metrics, first = findings.metrics, findings.outcomes[0]
    fused, eager = findings.times.medians
    gain = metrics["gain"]["action"]
    return _PAGE.substitute(
        lead="Two small frozen experts, one for what is seen and one for what happens, exchange in every layer. "
        f"Action accuracy is <b>{metrics['cast']['action']:.1f} %</b>; without the exchange the same experts reach "
        f"{metrics['ensemble']['action']:.1f} %, a difference of <b>{gain['mean']:+.1f} points</b>.",
        accuracy=_accuracy(metrics),
        accuracy_note=_ensemble_note(first) + _spread_note(metrics),
        balance=plots.balance(findings.outcomes),
        curves=plots.curves(first),
        seed=first.seed,
        samples="\n".join(_sample(number, findings) for number in _chosen(len(findings.val))),
        experts=plots.expert_curves(first),
        steps=plots.steps(findings.times),
        steps_note=f"Forward and backward of {findings.times.batch_size} clips, measured in turn: median "
        f"{fused:.1f} ms fused (backend {escape(findings.times.fused_backend)}), {eager:.1f} ms eager.",
        controls=_controls(findings.controls),
        made=_made(metrics),
    )


def _table(head: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]]) -> str:
    """Rows are (class, cells); cells are HTML."""
    lines = ["<table><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += [f'<tr class="{name}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" for name, cells in rows]
    return "\n".join([*lines, "</table>"])


def _accuracy(metrics: dict[str, Any]) -> str:
    several = len(metrics["runs"]) > 1

    def cell(model: str, metric: str) -> str:
        spread = f" <small>± {metrics['spread'][model][metric]:.1f}</small>" if several else ""
        return f"{metrics[model][metric]:.1f}{spread}"

    rows = [(model, [_NAMES[model], *(cell(model, metric) for metric in METRICS)]) for model in MODELS]
    return _table(["", "Verb %", "Noun %", "Action %", "Harmonic mean"], rows)


def _ensemble_note(outcome: Outcome) -> str:
    parts = [f"{escape(name)}: {figures['action']:.1f} %" for name, figures in outcome.ensembles.items()]
    return f"The ensemble is the better of two, by action accuracy (seed {outcome.seed}): {'; '.join(parts)}. "


def _spread_note(metrics: dict[str, Any]) -> str:
    if len(metrics["runs"]) == 1:
        return "One seed: nothing here tells how far another one would land."
    gains = ", ".join(f"{gain:+.1f}" for gain in metrics["gain"]["action"]["by_seed"])
    return (
        f"Means over {len(metrics['runs'])} seeds ± their standard deviation; CAST over the ensemble by seed: {gains}."
    )


def _chosen(clips: int) -> list[int]:
    # Steps that are no multiple of 10 or 12 run through nouns and verbs.
    return [(2 * number + 1) * clips // (2 * _SAMPLES) // 11 * 11 % clips for number in range(min(_SAMPLES, clips))]


def _sample(number: int, findings: Findings) -> str:
    sample = findings.val.samples[number]
    rows = [
        f"<tr><th>{escape(sample.path.stem)}</th><th>{_action(sample.labels['verb'], sample.labels['noun'])}</th></tr>"
    ]
    for model in MODELS:
        answers = findings.outcomes[0].probabilities[model]
        guess = {head: int(answers[head][number].argmax()) for head in ("verb", "noun")}
        words = " ".join(
            f'<span class="{"right" if guess[head] == sample.labels[head] else "wrong"}">'
            f"{name} {'✓' if guess[head] == sample.labels[head] else '✗'}</span>"
            for head, name in (("verb", VERBS[guess["verb"]]), ("noun", NOUNS[guess["noun"]]))
        )
        rows.append(f"<tr><td>{_NAMES[model]}</td><td>{words}</td></tr>")
    picture = f'<img src="{_strip(sample.path)}" alt="Frames of {escape(sample.path.stem)}">'
    return f'<div class="clip">{picture}<table>{"".join(rows)}</table></div>'


def _action(verb: int, noun: int) -> str:
    return f"{VERBS[verb]} {NOUNS[noun]}"


def _strip(path: Any) -> str:
    """Frames side by side, as a data URI."""
    image, file = require("PIL.Image", "demo"), io.BytesIO()
    frames = read(path, list(_SHOWN), threads=1)
    image.fromarray(frames.swapaxes(0, 1).reshape(frames.shape[1], -1, 3)).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _controls(controls: Sequence[Control]) -> str:
    heads = ("verb", "pair", "direction", "noun")
    rows = [("", [f"{c.where}, {c.features}", *(f"{c.accuracy[head]:.1f}" for head in heads)]) for c in controls]
    rows.append(("note", ["chance", *(f"{CHANCE[head]:.1f}" for head in heads)]))
    return _table(["Probe", "Verb", "Verb pair", "Direction", "Noun"], rows)


def _made(metrics: dict[str, Any]) -> str:
    machine, data = metrics["machine"], metrics["dataset"]
    seconds = sum(sum(run["training_seconds"].values()) for run in metrics["runs"])
    sizes = ", ".join(f"{count} {split}" for split, count in data["sizes"].items())
    rows = {
        "Videos": f"{sizes}; SHA-256 {data['sha256'][:16]}…",
        "Training": f"{seconds:.0f} s of training steps; {metrics['seconds_of_this_run']:.0f} s for this whole run",
        "Machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['device']}",
        "Software": f"Python {machine['python']}, torch {machine['torch']}",
    }
    return _table(["", ""], [("", [name, escape(text)]) for name, text in rows.items()])

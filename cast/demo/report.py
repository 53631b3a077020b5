"""The demo's report: one HTML file without scripts, other files or network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from string import Template
from typing import Any

from cast.demo import plots
from cast.demo.clips import CachedClips
from cast.demo.controls import Control, chance
from cast.demo.results import METRICS
from cast.demo.scale import FULL, QUICK, Scale
from cast.demo.scene import FRAMES, Classes
from cast.demo.study import MODELS, Outcome
from cast.demo.timing import StepTimes
from cast.evaluation.report.html import page, strip, table, verdict
from cast.video.annotations import Sample
from cast.video.reader import read

#: Clips shown, evenly spaced over the validation set, so that the models do not influence the choice.
_SAMPLES = 8
#: Frames shown of each clip.
_SHOWN = range(0, FRAMES, 5)

#: The quick demo's note, in the report and on the terminal.
QUICKLY = (
    f"This is the quick demo: {len(QUICK.classes.verbs)} verbs and {len(QUICK.classes.nouns)} nouns instead of "
    f"{len(FULL.classes.verbs)} and {len(FULL.classes.nouns)}, {QUICK.sizes.train} training clips instead of "
    f"{FULL.sizes.train}, {QUICK.config.num_frames} frames of each instead of {FULL.config.num_frames}. It shows the "
    "mechanism; the full demo measures it."
)

_NAMES = {"spatial": "Spatial alone", "temporal": "Temporal alone", "ensemble": "Ensemble", "cast": "CAST"}

_BODY = Template("""<h1>CAST on videos of acting digits</h1>
<p class="lead">$lead</p>
$quickly
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
$made""")


@dataclass(frozen=True)
class Findings:
    """The content of the report."""

    metrics: dict[str, Any]
    outcomes: Sequence[Outcome]
    controls: Sequence[Control]
    times: StepTimes
    val: CachedClips
    scale: Scale


def html(findings: Findings) -> str:
    """The whole page."""
    metrics, first = findings.metrics, findings.outcomes[0]
    fused, eager = findings.times.medians
    gain = metrics["gain"]["action"]
    body = _BODY.substitute(
        lead="Two small frozen experts, one for what is seen and one for what happens, exchange in every layer. "
        f"Action accuracy is <b>{metrics['cast']['action']:.1f} %</b>; without the exchange the same experts reach "
        f"{metrics['ensemble']['action']:.1f} %, a difference of <b>{gain['mean']:+.1f} points</b>.",
        quickly=f'<p class="note">{escape(QUICKLY)}</p>' if metrics["demo"] == "quick" else "",
        accuracy=_accuracy(metrics),
        accuracy_note=_ensemble_note(first) + _spread_note(metrics) + _decided_note(metrics["runs"]),
        balance=plots.balance(findings.outcomes),
        curves=plots.curves(first),
        seed=first.seed,
        samples="\n".join(_sample(number, findings) for number in _chosen(len(findings.val))),
        experts=plots.expert_curves(first),
        steps=plots.steps(findings.times),
        steps_note=f"Forward and backward of {findings.times.batch_size} clips, measured in turn: median "
        f"{fused:.1f} ms fused (backend {escape(findings.times.fused_backend)}), {eager:.1f} ms eager.",
        controls=_controls(findings.controls, findings.scale.classes),
        made=_made(metrics),
    )
    return page("CAST demo", body)


def _accuracy(metrics: dict[str, Any]) -> str:
    several = len(metrics["runs"]) > 1

    def cell(model: str, metric: str) -> str:
        spread = f" <small>± {metrics['spread'][model][metric]:.1f}</small>" if several else ""
        return f"{metrics[model][metric]:.1f}{spread}"

    rows = [(model, [_NAMES[model], *(cell(model, metric) for metric in METRICS)]) for model in MODELS]
    return table(["", "Verb %", "Noun %", "Action %", "Harmonic mean"], rows)


def _ensemble_note(outcome: Outcome) -> str:
    parts = [f"{escape(name)}: {figures['action']:.1f} %" for name, figures in outcome.ensembles.items()]
    return f"The ensemble is the better of two, by action accuracy (seed {outcome.seed}): {'; '.join(parts)}. "


def _spread_note(metrics: dict[str, Any]) -> str:
    if len(metrics["runs"]) == 1:
        return "One seed: this says nothing about the spread over seeds."
    gains = ", ".join(f"{gain:+.1f}" for gain in metrics["gain"]["action"]["by_seed"])
    return (
        f"Means over {len(metrics['runs'])} seeds ± their standard deviation; CAST over the ensemble by seed: {gains}."
    )


def _decided_note(runs: Sequence[dict[str, Any]]) -> str:
    return "".join(f" {escape(verdict_of(run))}" for run in runs)


def verdict_of(run: dict[str, Any]) -> str:
    """A sentence that says whether one run separates CAST from the ensemble."""
    one, other, chance_of_it = (run[k] for k in ("only_cast_right", "only_ensemble_right", "chance_of_such_a_split"))
    often = f"{100 * chance_of_it:.2g} %" if chance_of_it > 1e-4 else "less than 0.01 %"
    decided = "no accident" if chance_of_it < 0.01 else "so this run decides nothing between the two"
    return (
        f"Seed {run['seed']}: of the clips whose action only one of the two names, CAST names {one} and the ensemble "
        f"{other}; a coin falls as unevenly in {often} of cases: {decided}."
    )


def _chosen(clips: int) -> list[int]:
    # Steps that are no multiple of 10 or 12 give clips of all nouns and verbs.
    return [(2 * number + 1) * clips // (2 * _SAMPLES) // 11 * 11 % clips for number in range(min(_SAMPLES, clips))]


def _sample(number: int, findings: Findings) -> str:
    sample, names = findings.val.samples[number], findings.scale.classes.names()
    rows = [f"<tr><th>{escape(sample.path.stem)}</th><th>{_action(names, sample)}</th></tr>"]
    for model in MODELS:
        answers = findings.outcomes[0].probabilities[model]
        guess = {head: int(answers[head][number].argmax()) for head in ("verb", "noun")}
        words = " ".join(verdict(names[head][label], label == sample.labels[head]) for head, label in guess.items())
        rows.append(f"<tr><td>{_NAMES[model]}</td><td>{words}</td></tr>")
    picture = strip(list(read(sample.path, list(_SHOWN), threads=1)), f"Frames of {sample.path.stem}")
    return f'<div class="clip">{picture}<table>{"".join(rows)}</table></div>'


def _action(names: dict[str, list[str]], sample: Sample) -> str:
    return " ".join(names[head][sample.labels[head]] for head in ("verb", "noun"))


def _controls(controls: Sequence[Control], classes: Classes) -> str:
    heads = ("verb", "pair", "direction", "noun")
    rows = [("", [f"{c.where}, {c.features}", *(f"{c.accuracy[head]:.1f}" for head in heads)]) for c in controls]
    guess = chance(classes)
    rows.append(("note", ["chance", *(f"{guess[head]:.1f}" for head in heads)]))
    return table(["Probe", "Verb", "Verb pair", "Direction", "Noun"], rows)


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
    return table(["", ""], [("", [name, escape(text)]) for name, text in rows.items()])

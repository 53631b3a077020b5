"""The CUDA kernels of B-CAST's forward, executed by the emulator: values, and what they may touch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cuda_cases import ODD, Call, call, errors, needs_kernels

from cast_kernels.evidence.cases import Case
from cast_kernels.evidence.cuda_launches import emulated

pytestmark = needs_kernels

TINY = replace(ODD, batch=1, patches=9, dim=64)
#: Name -> problem, dtypes, what is kept for backward, when copies land.
PROBLEMS: dict[str, tuple[Case, str, str | None, str]] = {
    "bf16": (replace(ODD, scaled=True), "bf16", None, "late"),
    "fp16": (ODD, "fp16", "nothing", "early"),
    "autocast": (replace(TINY, scaled=True, dim=72), "amp", "cheap", "early"),
    "autocast, bf16 streams": (replace(TINY, patches=11, directions=("s2t",)), "amp16", "all", "late"),
    "autocast to fp16": (replace(TINY, directions=("t2s",)), "amp_fp16", None, "late"),
    "space, time": (replace(TINY, windows=("space", "time"), batch=2), "bf16", None, "early"),
    "space-time": (replace(TINY, windows=("space-time", "space-time")), "bf16", None, "late"),
    "space-time, space": (replace(TINY, windows=("space-time", "space"), positions=False), "fp16", None, "early"),
    "t2s alone": (replace(TINY, directions=("t2s",), scaled=True), "bf16", "nothing", "late"),
    "s2t alone": (replace(TINY, directions=("s2t",), positions=False), "bf16", "cheap", "early"),
    "heads of 16": (replace(TINY, heads=12), "bf16", None, "late"),
    "heads of 64": (replace(TINY, heads=3), "fp16", None, "early"),
    "d 384": (replace(TINY, bottleneck=384, heads=12), "bf16", None, "early"),
    "d 384, autocast": (replace(TINY, bottleneck=384, heads=6, directions=("t2s",)), "amp", "nothing", "late"),
    "long windows": (replace(TINY, patches=70, frames=2), "bf16", None, "late"),
}
#: Every kernel runs more than once round each of its rings.
PAPER = Case(batch=1, backward=False, scaled=True)


def check(case: Case, kind: str, recompute: str | None, **options: object) -> None:
    made = call(case, kind, recompute)
    given = [one.clone() for one in made.given]
    with emulated(**options) as ran:  # type: ignore[arg-type]
        made.forward()
    assert [one.launch.kernel.split("_")[1] for one in ran] == ["prepare", "project", "attention", "exchange"]
    found = errors(case, kind, made)
    assert found
    assert all(error.ok for error in found), found
    for before, after in zip(given, made.given, strict=True):
        assert torch.equal(before, after), "an input or a parameter was written"
    if recompute is None:
        assert made.saved.tolist() == [255], "without a backward nothing is kept"


@pytest.mark.parametrize("name", PROBLEMS)
def test_errors_are_at_most_twice_eagers(name: str) -> None:
    case, kind, recompute, landing = PROBLEMS[name]
    check(case, kind, recompute, landing=landing)


@pytest.mark.heavy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["bf16", "amp"])
@pytest.mark.parametrize("options", [{"landing": "late"}, {"landing": "random", "seed": 1}], ids=["late", "random"])
def test_the_papers_size(kind: str, options: dict[str, object]) -> None:
    check(PAPER, kind, "cheap", **options)


def words(made: Call) -> list[torch.Tensor]:
    """All that a forward leaves behind, as integers: NaN equals itself."""
    return [made.y[0].view(torch.uint8), made.y[1].view(torch.uint8), made.saved]


def test_bits_are_the_same_under_every_schedule() -> None:
    """Within one schedule the emulator repeats itself, so that a second run of it would show nothing.

    One run looks at the order of lanes too; all go by vector clocks.
    """
    case = replace(TINY, scaled=True, frames=2)
    runs = []
    drawn = ({"landing": "random", "seed": seed} for seed in (1, 2, 3))
    for options in ({}, {"landing": "early", "lane_order": True}, *drawn):
        made = call(case, "amp", "nothing")
        with emulated(**options):  # type: ignore[arg-type]
            made.forward()
        runs.append(words(made))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    assert not any(y.isnan().any() for y in made.y)


def test_a_clips_bits_depend_on_no_other_clip() -> None:
    """Neither on their number nor on one of NaN, whose rows share tiles with theirs."""
    alone, bad = (call(replace(TINY, batch=batch, frames=2)) for batch in (1, 3))
    for one, stream in zip(alone.x, bad.x, strict=True):
        stream[1] = float("nan")
        one.copy_(stream[2:])
    for made in (alone, bad):
        with emulated():
            made.forward()
    for one, spoilt in zip(alone.y, bad.y, strict=True):
        assert torch.equal(one, spoilt[2:])
        assert spoilt[1].isnan().all()
        assert not spoilt[0].isnan().any()

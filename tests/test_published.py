"""Everything that the published functions answered beside ours, and every deliberate difference beside its document.

`DIFFERENCES` is the whole list of what is not equal. `docs/reproduce.md` has a row for each, with the reason and what
to set; each has a test here of what both sides do. All other tests demand equality.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import PythonsOwn, Scripted, published
from torch import nn

import cast
from cast.config import CASTConfig, make_config
from cast.evaluation.predictions import Predictions
from cast.evaluation.subsets import TAIL, UNSEEN, read_subsets
from cast.evaluation.summary import metrics
from cast.layers import sincos_table
from cast.metrics import average_views, top_pairs
from cast.pretrain.masking import hidden_patches, tube_mask
from cast.pretrain.model import VideoMAE
from cast.training import cosine, layer_scale, parameter_groups
from cast.training.recipes import load_recipe
from cast.training.session import Session
from cast.training.settings import TrainSettings
from cast.video import randaugment
from cast.video.annotations import Sample
from cast.video.augment import AugmentSettings, _erased, _multiscale, draw
from cast.video.randaugment import RandAugment
from cast.video.sampling import stride_indices, train_indices, view_indices
from cast.video.transforms import view_transform

ROOT = Path(__file__).parents[1]

#: Names of the rows of docs/reproduce.md's table.
DIFFERENCES = (
    "short videos in training, uniform",
    "one temporal view, uniform",
    "one temporal view, dense",
    "validation during training",
    "repeated augmentation",
    "masks of pre-training",
)

SAMPLINGS = [(sampling, frames) for sampling in ("uniform", "dense") for frames in (8, 16, 32)]


def lengths(section: dict[str, Any], frames: int) -> range:
    first, last = section["lengths"][str(frames)]
    return range(first, last + 1)


def test_the_document_lists_every_difference() -> None:
    text = (ROOT / "docs/reproduce.md").read_text().split("## Where ours differs from the published code")[1]
    rows = [line.split("|") for line in text.split("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    assert [row[1].strip() for row in rows] == list(DIFFERENCES)
    assert all(len(row) == 7 and all(cell.strip() for cell in row[1:-1]) for row in rows)  # the reason, what to set


# --- frames


@pytest.mark.parametrize(("sampling", "frames"), SAMPLINGS)
def test_views_of_the_test(sampling: str, frames: int) -> None:
    section = published()["test_indices"]
    views = section["views"][sampling]
    for length, theirs in zip(lengths(section, frames), section[f"{sampling}_{frames}"], strict=True):
        ours = [view_indices(length, view, views, sampling, frames).tolist() for view in range(views)]
        assert ours == theirs, length


@pytest.mark.parametrize(("sampling", "frames"), SAMPLINGS)
def test_training_clips(sampling: str, frames: int) -> None:
    section = published()["train_indices"]
    theirs = section[f"{sampling}_{frames}"]
    counts = theirs["starts" if sampling == "dense" else "choices"]
    for length, first, count in zip(lengths(section, frames), theirs["first"], counts, strict=True):
        if sampling == "uniform" and length < frames:
            assert first == [0] * frames
            continue  # see the difference below
        rng = Scripted()
        assert train_indices(length, rng, sampling, frames).tolist() == first, length
        assert (rng.choices or [1]) == [count], length
        if rng.choices:
            last = train_indices(length, Scripted(count - 1), sampling, frames)
            assert (last - first).tolist() == [count - 1] * frames


def test_difference_short_videos_in_training() -> None:
    """Theirs is frame 0 sixteen times, which the test above asserts."""
    rng = np.random.default_rng(0)
    for length in range(1, 16):
        for _ in range(20):
            ours = train_indices(length, rng, "uniform", 16)
            even = np.arange(17) * length / 16  # the clip in sixteen equal parts
            assert (np.floor(even[:-1]) <= ours).all()
            assert (ours <= even[1:]).all()


@pytest.mark.parametrize("frames", [8, 16, 32])
def test_difference_one_uniform_view(frames: int) -> None:
    section = published()["test_indices"]
    for length, theirs in zip(lengths(section, frames), section["one_view"][f"uniform_{frames}"], strict=True):
        assert view_indices(length, 0, 2, "uniform", frames).tolist() == theirs, "the way to get theirs"
        ours = view_indices(length, 0, 1, "uniform", frames)
        assert ours.tolist() == view_indices(length, 1, 2, "uniform", frames).tolist()


def test_difference_one_dense_view() -> None:
    assert published()["test_indices"]["one_view_dense"] is None
    assert view_indices(300, 0, 1, "dense").tolist() == view_indices(300, 2, 5, "dense").tolist()


def test_pre_training_clips() -> None:
    theirs = published()["videomae"]["train_indices"]
    first, last = theirs["lengths"]
    for length, indices, starts in zip(range(first, last + 1), theirs["first"], theirs["starts"], strict=True):
        rng = Scripted()
        assert stride_indices(length, rng).tolist() == indices, length
        assert (rng.choices or [1]) == [starts], length
    np.testing.assert_array_equal(stride_indices(99, Scripted(5), frames=4, stride=2), [5, 7, 9, 11])
    for length in (9, 99):
        ours, other = (f(length, np.random.default_rng(3), "uniform", 16) for f in (stride_indices, train_indices))
        np.testing.assert_array_equal(ours, other)


# --- pictures


def corner(height: int, width: int, crop: int, crops: int) -> list[int]:
    """Where a view's crop lies, read off a picture whose pixels are their coordinates."""
    cut = view_transform(224, crop, crops, normalise=False).transforms[1]
    pixels = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return cut(torch.stack(pixels))[:, 0, 0].tolist()


@pytest.mark.parametrize("case", range(25))
def test_crops_of_the_test(case: int) -> None:
    section = published()["spatial"]["cases"]
    assert len(section) == 25
    theirs = section[case]
    small = view_transform(224, normalise=False).transforms[0](torch.zeros(1, 3, *theirs["size"], dtype=torch.uint8))
    assert list(small.shape[-2:]) == theirs["resized"]
    assert [corner(*theirs["resized"], crop, 3) for crop in range(3)] == theirs["test"]
    assert corner(*theirs["resized"], 0, 1) == theirs["validation"]


def test_random_erasing() -> None:
    theirs = published()["random_erasing"]
    for seed, box in zip(theirs["seeds"], theirs["boxes"], strict=True):
        rng = PythonsOwn(seed)
        rng.random()  # whether to erase at all
        assert list(_erased(theirs["side"], rng)) == box, seed

    class Largest:
        """Tall boxes that fit nowhere."""

        def __init__(self) -> None:
            self.asked: list[tuple[float, float]] = []

        def uniform(self, low: float, high: float) -> float:
            self.asked.append((low, high))
            return high

    largest = Largest()
    assert _erased(theirs["side"], largest) is None
    assert len(largest.asked) == 2 * theirs["attempts"]
    area, aspect = largest.asked[:2]
    assert area == pytest.approx((theirs["min_area"], theirs["max_area"]))
    assert aspect == pytest.approx(theirs["log_aspect"])


def test_multiscale_crops() -> None:
    theirs = published()["videomae"]["multiscale"]
    size, shares = theirs["size"], tuple(theirs["scales"])
    for case in theirs["cases"]:
        picture = size, case["height"], case["width"]
        counts = Scripted()
        _multiscale(shares, *picture, counts)
        pairs, places = counts.choices
        boxes = Counter(
            _multiscale(shares, *picture, Scripted(pair, place)) for pair in range(pairs) for place in range(places)
        )
        assert pairs * places == case["draws"]
        assert boxes == {tuple(box[:4]): box[4] for box in case["boxes"]}, picture


@pytest.mark.parametrize("height", [221, 222, 223, 224, 225, 226, 227])
def test_multiscale_sides_snap_within_two_pixels(height: int) -> None:
    drawn = draw(AugmentSettings(multiscale=(1.0,)), 224, height, 300, np.random.default_rng(0)).crop
    assert drawn[2:] == ((224, 224) if 222 <= height <= 226 else (height, height))
    assert drawn[0] + drawn[2] <= max(height, 224)


#: timm's names of RandAugment's operations.
OPERATIONS = {
    "AutoContrast": "autocontrast", "Equalize": "equalize", "Invert": "invert", "Rotate": "rotate",
    "PosterizeIncreasing": "posterize", "SolarizeIncreasing": "solarize", "SolarizeAdd": "solarize_add",
    "ColorIncreasing": "color", "ContrastIncreasing": "contrast", "BrightnessIncreasing": "brightness",
    "SharpnessIncreasing": "sharpness", "ShearX": "shear_x", "ShearY": "shear_y", "TranslateXRel": "translate_x",
    "TranslateYRel": "translate_y",
}  # fmt: skip


def test_randaugment() -> None:
    theirs = published()["randaugment"]
    strengths, grey = randaugment._STRENGTHS, randaugment._GREY
    assert theirs["operations"].keys() == OPERATIONS.keys()
    assert sorted(OPERATIONS.values()) == sorted(strengths)
    for name, arguments in theirs["operations"].items():
        for sign, values in (arguments or {}).items():
            ours = [strengths[OPERATIONS[name]](m / 10, {"plus": 1.0, "minus": -1.0}[sign]) for m in range(11)]
            assert ours == pytest.approx(values, abs=1e-12), (name, sign)
    assert theirs["fill"] == [grey] * 3
    for case in theirs["parsed"]:
        ours = RandAugment.parse(case["text"])
        assert len(strengths) == case["operations"]
        assert vars(ours) == {name: case[name] for name in ("magnitude", "count", "deviation", "probability")}


# --- training


@pytest.mark.parametrize("kind", ["compositional", "one_head"])
@pytest.mark.parametrize("trains", ["frozen_experts", "all_trainable"])
def test_parameter_groups(kind: str, trains: str) -> None:
    theirs = published()["parameter_groups"][kind]
    with torch.device("meta"):
        model = cast.CAST(heads={"verb": 97, "noun": 300} if kind == "compositional" else {"action": 174})
    parameters = dict(model.named_parameters())
    assert {name: list(p.shape) for name, p in parameters.items()} == dict(
        zip(theirs["names"], theirs["shapes"], strict=True)
    )
    if trains == "all_trainable":
        model.requires_grad_(True)
    for decay, expected in theirs[trains].items():
        groups = parameter_groups(model, 0.05, float(decay))
        ours = {id(p): (group["weight_decay"], group["lr_scale"]) for group in groups for p in group["params"]}
        assert len(groups) == expected["groups"]
        rows = zip(theirs["names"], expected["weight_decay"], expected["lr_scale"], strict=True)
        for name, weight_decay, scale in rows:
            found = ours.get(id(parameters[name]), (None, None))
            assert found == (weight_decay, scale if scale is None else pytest.approx(scale, rel=1e-12)), (name, decay)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("clip_ln_pre.weight", 0.75**13),
        ("stream.expert.ln_pre.bias", 0.75**13),
        ("spatial.expert.cls_token", 0.75**13),  # timm's
        ("spatial.expert.pos_embed", 0.75**13),
        ("spatial.expert.norm_pre.weight", 0.75**13),
        ("time_positional_embedding", 1.0),  # AIM's, which is new
        ("clip_ln_post.weight", 1.0),
    ],
)
def test_what_comes_before_the_first_block_is_slowest(name: str, scale: float) -> None:
    assert layer_scale(name, 12, 0.75) == scale


def test_of_tables_of_positions_clips_own_decays() -> None:
    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("positional_embedding", "time_positional_embedding", "pos_embed", "clip_time_pos"):
                self.register_parameter(name, nn.Parameter(torch.ones(3, 3)))

    tables = Tables()
    decays = {id(p): group["weight_decay"] for group in parameter_groups(tables, 0.05, 1.0) for p in group["params"]}
    assert [name for name, p in tables.named_parameters() if decays[id(p)]] == ["positional_embedding"]


def test_schedule() -> None:
    theirs = published()["schedule"]
    cases = [theirs | recipe for recipe in theirs["recipes"].values()] + theirs["more"]
    assert len(cases) > 5
    for case in cases:
        warmup, steps = case["warmup_epochs"] * case["steps_per_epoch"], case["epochs"] * case["steps_per_epoch"]
        rate = cosine(case["peak"], case["floor"], warmup, steps)
        assert [rate(step) for step in range(steps)] == pytest.approx(case["lr_values"], rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("name", ["ek100", "ssv2", "k400"])
def test_recipes(name: str) -> None:
    settings, schedule = load_recipe(TrainSettings, name), published()["schedule"]
    optim, theirs = settings.optim, schedule["recipes"][name]
    ours = {
        "base_lr": optim.lr, "base_min_lr": optim.min_lr, "total_batch": optim.total_batch, "peak": optim.peak,
        "floor": optim.floor, "recipe_epochs": optim.epochs, "recipe_warmup_epochs": optim.warmup_epochs,
        "layer_decay": optim.layer_decay, "drop_path": settings.model.drop_path, "weight_decay": optim.weight_decay,
    }  # fmt: skip
    assert ours == {key: value for key, value in theirs.items() if not isinstance(value, list)}
    assert set(theirs["weight_decay_values"]) == {optim.weight_decay}
    assert optim.total_batch % (optim.micro_batch * schedule["gpus"]) == 0


def test_drop_path() -> None:
    theirs = published()["drop_path"]
    for rate, rates in theirs["rates"].items():
        config = make_config("base", drop_path=float(rate), depth=theirs["depth"])
        assert [config.drop_rate(block) for block in range(config.depth)] == pytest.approx(rates, abs=1e-7)


def steps_and_rates(tmp_path: Path, *changes: str) -> tuple[int, float, float]:
    """Steps of an epoch over 25 videos, and the highest and the last rate."""
    chosen = load_recipe(TrainSettings, "digits", f"data.root={tmp_path}", f"out={tmp_path / 'out'}", *changes)
    samples = [Sample(tmp_path / f"{number}.mp4", {"verb": 0, "noun": 0}, number) for number in range(25)]
    for sample in samples:
        sample.path.touch()
    session = Session(chosen, (), False, "")
    plan = session.plan(session.loader(samples), len(samples))
    return plan.steps_per_epoch, chosen.optim.peak, chosen.optim.floor


def test_difference_repeated_augmentation(tmp_path: Path) -> None:
    """Ours counts clips: twice the steps. Twice the batches at half the base rate is the published loop."""
    bare = ("optim.total_batch=8", "optim.micro_batch=4", "optim.lr=1e-3", "optim.min_lr=1e-5")
    doubled = ("optim.total_batch=16", "optim.micro_batch=8", "optim.lr=5e-4", "optim.min_lr=5e-6")
    once = steps_and_rates(tmp_path, *bare)
    assert once[0] == 3
    assert steps_and_rates(tmp_path, *bare, "data.augment.repeats=2") == (6, *once[1:])
    assert steps_and_rates(tmp_path, *doubled, "data.augment.repeats=2") == once


@pytest.mark.parametrize("name", ["ek100", "ssv2", "k400", "ablation"])
def test_a_recipe_says_how_to_repeat_as_published(name: str) -> None:
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    changes = re.findall(r"([a-z_.]+)=([0-9.e-]+)", text.split("repeats: 1")[1].split("\nmodel:")[0])
    assert [key for key, _ in changes] == [
        "data.augment.repeats", "optim.total_batch", "optim.micro_batch", "optim.lr", "optim.min_lr",
    ]  # fmt: skip
    bare = load_recipe(TrainSettings, name)
    twice = load_recipe(TrainSettings, name, *(f"{key}={value}" for key, value in changes))
    assert twice.data.augment.repeats == 2
    assert (twice.optim.total_batch, twice.optim.micro_batch) == (
        2 * bare.optim.total_batch,
        2 * bare.optim.micro_batch,
    )
    assert twice.optim.accumulate(16) == bare.optim.accumulate(16)
    assert (twice.optim.peak, twice.optim.floor) == pytest.approx((bare.optim.peak, bare.optim.floor))


def test_difference_validation() -> None:
    """Theirs draws at random, as in training; ours is one view, always the same (tests/test_video_loader.py)."""
    assert published()["train_indices"]["validation_equals_training"] is True


# --- pre-training


def test_difference_masks() -> None:
    """Counts and tubes are equal; another generator draws the patches; a mask that hides nothing is refused."""
    theirs = published()["videomae"]["masks"]
    for patches, ratio, hidden in theirs["counts"]:
        if hidden:
            assert hidden_patches(patches, ratio) == hidden
        else:
            with pytest.raises(ValueError, match="some must be hidden"):
                hidden_patches(patches, ratio)
    frames, patches = theirs["frames"], theirs["patches"]
    for ratio, by_seed in theirs["hidden"].items():
        ours = tube_mask(2, frames, patches, float(ratio)).hidden.view(2, frames, -1)
        assert {len(set(hidden)) for hidden in by_seed} == {ours.shape[2]}
        assert torch.equal(ours % patches, (ours % patches)[:, :1].expand_as(ours))


def test_positions() -> None:
    for case in published()["videomae"]["positions"]:
        table = sincos_table(case["rows"], case["width"]).double().view(case["rows"], case["width"])
        for row, name in ((0, "first"), (-1, "last")):
            np.testing.assert_allclose(table[row], case[name], atol=1e-6)


def test_initialisation() -> None:
    theirs = published()["videomae"]["init"]
    torch.manual_seed(0)
    ours = dict(VideoMAE(CASTConfig()).named_parameters())
    assert {name: list(p.shape) for name, p in ours.items()} == dict(
        zip(theirs["names"], theirs["shapes"], strict=True)
    )
    for name, std, mean in zip(theirs["names"], theirs["std"], theirs["mean"], strict=True):
        values = ours[name].detach()
        # Of n values a deviation is known to about 1 / sqrt(2n); 2 % is below that for vectors.
        share = 0.02 + 4 / (2 * values.numel()) ** 0.5
        assert float(values.std()) == pytest.approx(std, rel=share, abs=1e-9), name
        assert float(values.mean()) == pytest.approx(mean, abs=max(1e-9, 8 * std / values.numel() ** 0.5)), name


# --- results


@pytest.mark.parametrize("name", ["ek100", "ssv2", "k400"])
def test_merged_views(name: str) -> None:
    theirs = published()["merge"][name]
    heads = {"verb": "verb_", "noun": "noun_"} if name == "ek100" else {"action": ""}
    logits = {head: torch.tensor(theirs[f"{key}logits"], dtype=torch.float64) for head, key in heads.items()}
    labels = {head: torch.tensor(theirs[f"{key}labels"]) for head, key in heads.items()}
    assert {values.shape[1] for values in logits.values()} == {theirs["views"] * theirs["crops"]}
    probabilities = {head: average_views(values) for head, values in logits.items()}
    assert {head: values.argmax(1).tolist() for head, values in probabilities.items()} == {
        head: theirs[f"{key}guess"] for head, key in heads.items()
    }
    classes = {head: [""] * values.shape[1] for head, values in probabilities.items()}
    videos = [str(number) for number in range(len(labels[next(iter(heads))]))]
    figures = metrics(Predictions(videos, probabilities, labels, {}, classes))
    renamed = {"action_top5": "action_top5_paired", "top1": "action_top1", "top5": "action_top5"}
    for key, value in theirs["percent"].items():
        wanted = key if name == "ek100" and key != "action_top5" else renamed[key]
        assert figures[wanted] == pytest.approx(value, abs=1e-10), key


def test_views_are_averaged_in_float64() -> None:
    logits = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [0.1, 0.2]]])
    average = average_views(logits)
    assert average.dtype == torch.float64
    assert torch.equal(average, logits.double().softmax(-1).mean(-2))
    assert torch.equal(average_views(logits.bfloat16()), average_views(logits.bfloat16().double()))


def test_organisers_scores(tmp_path: Path) -> None:
    theirs = published()["organisers"]
    probabilities = {
        head: torch.tensor(theirs[f"{head}_scores"], dtype=torch.float64).softmax(-1) for head in ("verb", "noun")
    }
    labels = {head: torch.tensor(theirs[f"{head}_labels"]) for head in ("verb", "noun")}
    pairs = top_pairs(probabilities["verb"], probabilities["noun"], 5)[1]
    assert pairs.tolist() == theirs["best_pairs"]

    rows = {"participant_id": theirs["unseen_participants"], "verb": theirs["tail_verbs"], "noun": theirs["tail_nouns"]}
    for column, name in (("participant_id", UNSEEN["val"]), *TAIL.items()):
        (tmp_path / name).write_text("\n".join(map(str, [column, *rows[column]])) + "\n")
    names, numbers = theirs["narration_ids"], range(len(theirs["narration_ids"]))
    samples = [Sample(Path(f"{names[n]}.mp4"), {head: int(labels[head][n]) for head in labels}) for n in numbers]
    counts = {head: values.shape[1] for head, values in probabilities.items()}
    subsets = read_subsets(tmp_path, "val", samples, counts)
    classes = {head: [""] * count for head, count in counts.items()}
    figures = metrics(Predictions(names, probabilities, labels, {}, classes, subsets=subsets))
    for key, value in theirs["percent"].items():
        subset, task, k = re.fullmatch(r"(all|tail|unseen)_(\w+)_accuracy_at_([15])", key).groups()
        ours = f"{task}_top{k}{'_joint' if task == 'action' and k == '5' else ''}"
        assert figures[ours if subset == "all" else f"{subset}_{ours}"] == pytest.approx(value, abs=1e-10), key


def test_every_section_is_compared() -> None:
    """Whatever the file holds is asked for by a test of this module."""
    text = Path(__file__).read_text()
    sections = published().keys() - {"sources"} | published()["videomae"].keys()
    assert not [name for name in sections if f'["{name}"]' not in text]

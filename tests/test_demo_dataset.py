"""The demo's data set: the same bytes again, honest labels, and controls that find no leak."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from cast.demo.clips import CachedClips, Stills, normalise
from cast.demo.controls import Control, chance, controls, shared_scans
from cast.demo.dataset import MANIFEST, Sizes, digest, encode, make_dataset, read_scenes, to_yuv420
from cast.demo.scene import (
    ALL,
    FIRST_VALIDATION_SCAN,
    FRAMES,
    NOUNS,
    SIZE,
    VERBS,
    Classes,
    _digits,
    _draw,
    plan,
    render,
    render_still,
)
from cast.evaluation import VALIDATION
from cast.video.reader import frame_count, read

SIZES = Sizes(plain=24, train=720, val=360)
SMALL = Sizes(plain=6, train=10, val=6)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "data"
    make_dataset(path, SIZES)
    return path


@pytest.fixture(scope="module")
def clips(directory: Path) -> dict[str, CachedClips]:
    return {split: CachedClips(directory, split, 32) for split in ("train", "val")}


@pytest.fixture(scope="module")
def figures(directory: Path, clips: dict[str, CachedClips]) -> dict[tuple[str, str], Control]:
    return {(c.where, c.features): c for c in controls(clips["train"], clips["val"], directory)}


def files(path: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        yield file.relative_to(path).as_posix(), hashlib.sha256(file.read_bytes()).hexdigest()


def test_made_again_it_has_the_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    first = make_dataset(tmp_path / "a", SMALL, workers=1)
    second = make_dataset(tmp_path / "b", SMALL, workers=2)
    assert first == second
    assert dict(files(tmp_path / "a")) == dict(files(tmp_path / "b"))
    assert len(list((tmp_path / "a").rglob("*.mp4"))) == 22
    other = make_dataset(tmp_path / "c", SMALL, seed=1, workers=1)
    assert other["sha256"] != first["sha256"]


def test_an_interrupted_run_goes_on_and_a_finished_one_is_kept(tmp_path: Path) -> None:
    made = make_dataset(tmp_path, SMALL, workers=1)
    (tmp_path / MANIFEST).unlink()
    (tmp_path / "train" / "train_00003.mp4").write_bytes(b"half a video")
    (tmp_path / "train" / "train_00004.mp4").unlink()
    assert make_dataset(tmp_path, SMALL, workers=1) == made
    assert digest(tmp_path) == made["sha256"]
    (tmp_path / "train" / "train_00004.mp4").unlink()
    assert make_dataset(tmp_path, SMALL, workers=1) == made  # the manifest says that it is complete: nothing is made


def test_other_settings_in_the_same_directory_are_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path, SMALL, workers=1)
    with pytest.raises(ValueError, match="choose another directory"):
        make_dataset(tmp_path, SMALL, seed=3, workers=1)


def test_a_set_of_fewer_classes_shows_no_others(tmp_path: Path) -> None:
    classes = Classes(("grow", "shrink"), ("zero", "three"))
    make_dataset(tmp_path, Sizes(plain=4, train=16, val=4), workers=1, classes=classes)
    assert json.loads((tmp_path / "classes.json").read_text()) == {
        "verb": ["grow", "shrink"],
        "noun": ["zero", "three"],
    }
    lines = [line.split(",")[1:] for line in (tmp_path / "train.csv").read_text().splitlines()]
    assert all(lines.count([verb, noun]) == 4 for verb in "01" for noun in "01")
    things = [thing for roles in read_scenes(tmp_path).values() for thing in roles.values()]
    assert {VERBS[int(thing["verb"])] for thing in things} == set(classes.verbs)
    assert {int(_digits()[1][int(thing["scan"])]) for thing in things} == {0, 3}
    drawn = Stills(20, 16, classes=classes)
    assert drawn.nouns.tolist() == [0, 1] * 10
    with pytest.raises(ValueError, match="choose another directory"):
        make_dataset(tmp_path, Sizes(plain=4, train=16, val=4), workers=1)


def test_annotations_match_the_videos(directory: Path) -> None:
    classes = json.loads((directory / "classes.json").read_text())
    assert classes == {"verb": list(VERBS), "noun": list(NOUNS)}
    for split, count in (("train", 720), ("val", 360)):
        lines = [line.split(",") for line in (directory / f"{split}.csv").read_text().splitlines()]
        assert [line[0] for line in lines] == sorted(path.stem for path in (directory / split).glob("*.mp4"))
        actions = np.array([[int(verb), int(noun)] for _, verb, noun in lines])
        pairs, times = np.unique(actions, axis=0, return_counts=True)
        assert len(pairs) == 120
        assert (times == count // 120).all()


def test_a_file_shows_what_was_drawn(directory: Path) -> None:
    for index in (0, 59, 119):
        path = directory / "train" / f"train_{index:05d}.mp4"
        assert frame_count(path) == FRAMES
        error = read(path, range(FRAMES)).astype(float) - render(0, "train", index)
        # Half of the colour's resolution is lost, and some to the quantiser; a wrong frame would differ by far more.
        assert np.sqrt((error**2).mean()) < 9


def test_colours_survive_encoding(tmp_path: Path) -> None:
    for colour in ((255, 255, 255), (0, 0, 0), (200, 40, 90), (10, 220, 30)):
        frames = np.full((4, 32, 32, 3), colour, np.uint8)
        luma = 16 + (65.481 * colour[0] + 128.553 * colour[1] + 24.966 * colour[2]) / 255
        assert to_yuv420(frames)[0, 0, 0] == round(luma)
        path = tmp_path / "colour.mp4"
        path.write_bytes(encode(frames))
        assert np.abs(read(path, range(4)).astype(int) - frames).max() <= 4


def test_the_second_verb_of_a_pair_is_the_first_one_backwards() -> None:
    thing = plan(0, "plain", 0)[0].things[0]
    for verb in range(0, len(VERBS), 2):
        forward, backward = (np.zeros((FRAMES, SIZE, SIZE, 3), np.float32) for _ in range(2))
        _draw(forward, np.random.default_rng(1), replace(thing, verb=verb))
        _draw(backward, np.random.default_rng(1), replace(thing, verb=verb + 1))
        assert forward.std(0).max() > 1, VERBS[verb]
        # The odd verb plays the same course from its end.
        np.testing.assert_array_equal(forward[::-1], backward)


def test_a_bystander_does_not_move_and_the_others_do(clips: dict[str, CachedClips], directory: Path) -> None:
    scenes, moved = read_scenes(directory), {"actor": 0, "bystander": 0, "decoy": 0}
    for index in range(60):
        things = scenes[f"train_{index:05d}"]
        movie = render(0, "train", index).astype(float)
        for role in moved:
            row, column = divmod(int(things[role]["quarter"]), 2)
            # The middle of a quarter: neighbours reach into its margins.
            part = movie[:, row * 32 + 10 : row * 32 + 22, column * 32 + 10 : column * 32 + 22]
            moved[role] += bool(part.std(0).max() > 3)
    assert moved["bystander"] == 0
    assert moved["actor"] > 50
    assert moved["decoy"] > 45


def test_what_surrounds_the_actor_is_independent_of_its_labels() -> None:
    from scipy.stats import chi2_contingency

    scenes = [plan(0, "train", index)[0] for index in range(2400)]
    facts = {
        "quarter": [s.things[0].quarter for s in scenes],
        "bystander's quarter": [s.things[1].quarter for s in scenes],
        "bystander's verb": [s.things[1].verb for s in scenes],
        "decoy's verb": [s.things[2].verb for s in scenes],
        "decoy's quarter": [s.things[2].quarter for s in scenes],
    }
    for label in ("verb", "noun"):
        for name, values in facts.items():
            table = np.zeros((12, 12))
            np.add.at(table, ([getattr(s, label) for s in scenes], values), 1)
            table = table[table.sum(1) > 0][:, table.sum(0) > 0]
            assert chi2_contingency(table).pvalue > 1e-3, (label, name)


def test_decoys_are_cut_up_and_actors_whole() -> None:
    for index in range(50):
        actor, bystander, decoy = plan(0, "val", index)[0].things
        assert actor.tiles == bystander.tiles == (0, 1, 2, 3)
        assert all(tile != place for place, tile in enumerate(decoy.tiles))
        assert len({actor.quarter, bystander.quarter, decoy.quarter}) == 3


def test_validation_digits_are_new(directory: Path) -> None:
    assert shared_scans(directory) == set()
    assert all(
        int(thing["scan"]) >= FIRST_VALIDATION_SCAN
        for name, things in read_scenes(directory).items()
        if name.startswith("val_")
        for thing in things.values()
    )


def test_training_draws_other_frames_each_epoch_and_validation_the_same(clips: dict[str, CachedClips]) -> None:
    train = clips["train"]
    assert np.array_equal(train.indices(3, 7), train.indices(3, 7))
    assert not np.array_equal(train.indices(3, 7), train.indices(4, 7))
    assert np.array_equal(train.indices(VALIDATION, 7), np.arange(16) * 2 + 1)
    videos, labels = train.batch(VALIDATION, np.array([5, 130]))
    assert videos.shape == (2, 3, 16, 32, 32)
    assert labels["noun"].tolist() == [5, 0]
    assert labels["verb"].tolist() == [0, 1]
    expected = normalise(train.pixels[5, 1::2]).transpose(0, 1)
    assert (videos[0] == expected).all()


def test_stills_show_their_noun_once() -> None:
    stills = Stills(20, 32)
    assert stills.nouns.tolist() == [n % 10 for n in range(20)]
    again, noun = render_still(0, 13)
    assert noun == 3
    assert (render_still(0, 13)[0] == again).all()
    pictures, labels = stills.batch(0, np.array([4]))
    assert pictures.shape == (1, 3, 32, 32)
    assert labels["noun"].tolist() == [4]


# The bounds below are three standard errors of 360 clips beyond chance, or far below what was measured.


@pytest.mark.parametrize("role", ["decoy", "bystander"])
def test_decoy_and_bystander_tell_nothing(figures: dict[tuple[str, str], Control], role: str) -> None:
    for features in ("one frame", "order-free statistics", "ordered frames"):
        accuracy = figures[role, features].accuracy
        assert accuracy["verb"] < chance(ALL)["verb"] + 4.5
        assert accuracy["pair"] < chance(ALL)["pair"] + 7.5  # a neighbour's margin shows
        assert accuracy["noun"] < chance(ALL)["noun"] + 5


def test_one_frame_does_not_tell_direction_nor_who_acts(figures: dict[tuple[str, str], Control]) -> None:
    assert 30 < figures["actor", "one frame"].accuracy["direction"] < 65
    assert figures["whole frame", "one frame"].accuracy["verb"] < 20
    assert figures["whole frame", "one frame"].accuracy["noun"] < 30


def test_statistics_without_order_tell_the_pair_but_not_the_direction(
    figures: dict[tuple[str, str], Control],
) -> None:
    accuracy = figures["actor", "order-free statistics"].accuracy
    assert accuracy["pair"] > 80
    assert 40 < accuracy["direction"] < 62


def test_order_tells_the_verb_where_the_actor_is_known(figures: dict[tuple[str, str], Control]) -> None:
    known, unknown = (figures[where, "ordered frames"].accuracy["verb"] for where in ("actor", "whole frame"))
    assert known > 80
    assert unknown < known - 20


def test_motion_alone_does_not_tell_the_noun(figures: dict[tuple[str, str], Control]) -> None:
    assert figures["whole frame", "ordered frames"].accuracy["noun"] < chance(ALL)["noun"] + 5


def test_a_leak_would_be_found(clips: dict[str, CachedClips], directory: Path) -> None:
    """Brighten a corner by the label: the probe of one frame must see it."""
    leaky = {}
    for split, original in clips.items():
        leaky[split] = copy.copy(original)
        leaky[split].pixels = original.pixels.clone()
        leaky[split].pixels[:, :, :, :4, :4] = (original.labels["noun"] * 25)[:, None, None, None, None].byte()
    found = {(c.where, c.features): c for c in controls(leaky["train"], leaky["val"], directory, ("whole frame",))}
    assert found["whole frame", "one frame"].accuracy["noun"] > 35

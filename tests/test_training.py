"""The training loop: schedule, parameter groups, and checkpoints that survive a kill with the same result."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cast.evaluation import average, probabilities
from cast.training import Checkpoints, Progress, Recipe, layer_scale, train

RECIPE = Recipe(epochs=3, batch_size=4, lr=1e-2, warmup=1, checkpoint_every=2)


class Points:
    """Twenty-two points in the plane, labelled by quadrant; training jitters them by epoch."""

    def __init__(self, heads: tuple[str, ...] = ("verb", "noun")) -> None:
        generator = torch.Generator().manual_seed(0)
        self.points, self.heads = torch.randn(22, 2, generator=generator), heads

    def __len__(self) -> int:
        return len(self.points)

    def batch(self, epoch: int, indices: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = self.points[torch.from_numpy(indices)]
        labels = {head: (chosen[:, number] > 0).long() for number, head in enumerate(self.heads)}
        return chosen + 0.01 * max(epoch, 0), labels


class Net(nn.Module):
    """Has dropout, so that a wrong generator state after resuming would show."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(2, 16), nn.GELU(), nn.Dropout(0.3))
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.heads = nn.ModuleDict({"verb": nn.Linear(16, 2), "noun": nn.Linear(16, 2)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.frozen(self.body(x))
        return {name: head(x) for name, head in self.heads.items()}


class Killed(BaseException):
    pass


def run(directory: Path, stop_at: int | None = None, recipe: Recipe = RECIPE) -> tuple[Net, Progress]:
    net = Net()

    def on_step(progress: Progress, figures: dict[str, float]) -> None:
        if progress.step == stop_at:
            raise Killed

    return net, train(net, Points(), recipe, directory, on_step)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_schedule_rises_linearly_then_falls_as_a_cosine_to_zero() -> None:
    recipe = Recipe(epochs=10, batch_size=1, lr=2.0, warmup=2)
    rates = [recipe.rate(step, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([0.2 * (n + 1) for n in range(10)])
    assert recipe.rate(30, 5) == pytest.approx(1.0)
    assert recipe.rate(50, 5) == pytest.approx(0.0)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


def test_it_learns_and_leaves_frozen_parameters_alone(tmp_path: Path) -> None:
    net, progress = run(tmp_path, recipe=Recipe(epochs=30, batch_size=4, lr=1e-2))
    assert progress.history[0]["loss"] > 1 > 0.75 > progress.history[-1]["loss"]
    assert progress.history[-1]["verb"] > 70
    assert len(progress.history) == 30
    assert same(net.frozen, Net().frozen)
    assert not net.training


def test_vectors_and_position_tables_do_not_decay(tmp_path: Path) -> None:
    class Silent(nn.Module):
        """Gradients are zero, so only weight decay moves anything."""

        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
            self.clip_time_pos = nn.Parameter(torch.ones(2, 2))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            zero = sum(p.sum() for p in self.parameters()) * 0.0
            return {"verb": x + zero}

    net = Silent()
    train(net, Points(("verb",)), RECIPE, tmp_path)
    assert (net.matrix < 1).all()
    assert (net.vector == 1).all()
    assert (net.clip_time_pos == 1).all()


@pytest.mark.parametrize("stop_at", [1, 2, 5, 7, 14])
def test_resuming_gives_the_bits_of_a_run_that_never_stopped(tmp_path: Path, stop_at: int) -> None:
    whole, expected = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "broken", stop_at=stop_at)
    torch.manual_seed(12345)  # whatever the next process does before
    resumed, progress = run(tmp_path / "broken")
    assert same(whole, resumed)
    assert progress.history == expected.history
    assert progress.step == expected.step == 15


def test_a_finished_run_is_read_not_repeated(tmp_path: Path) -> None:
    whole, expected = run(tmp_path)
    again, progress = run(tmp_path, stop_at=15)
    assert same(whole, again)
    assert progress == expected


def test_a_kill_while_saving_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(tmp_path / "whole")
    replace_file, saves = os.replace, []

    def die(source: object, target: object) -> None:
        saves.append(target)
        if len(saves) == 3:
            raise Killed
        replace_file(source, target)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(Killed):
        run(tmp_path / "broken")
    monkeypatch.undo()
    assert (tmp_path / "broken" / "unfinished").is_dir()
    assert [path.name for path in (tmp_path / "broken").glob("step-*")] == ["step-00000004"]
    resumed, _ = run(tmp_path / "broken")
    assert same(whole, resumed)


def test_only_the_newest_checkpoint_is_kept(tmp_path: Path) -> None:
    run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000015"]


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match="choose another directory"):
        run(tmp_path, recipe=replace(RECIPE, lr=0.5))


def test_heads_and_labels_must_agree(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"heads \['noun', 'verb'\].*labels \['verb'\]"):
        train(Net(), Points(("verb",)), RECIPE, tmp_path)


def test_divergence_is_an_error(tmp_path: Path) -> None:
    net = Net()
    net.heads["verb"].bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="diverged"):
        train(net, Points(), RECIPE, tmp_path)
    assert not list(tmp_path.glob("step-*"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"lr": 0.0}, "lr"),
        ({"warmup": 9}, "warmup"),
        ({"layer_decay": 0.0}, "layer_decay"),
    ],
)
def test_recipes_that_make_no_sense(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RECIPE, **wrong)


def test_too_few_samples_for_a_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="22 samples make no batch of 23"):
        run(tmp_path, recipe=replace(RECIPE, batch_size=23))


def test_probabilities_do_not_depend_on_the_batch_size() -> None:
    net = Net()
    whole, truths = probabilities(net, Points(), batch_size=22)
    parts, _ = probabilities(net, Points(), batch_size=5)
    torch.testing.assert_close(whole, parts)
    assert torch.equal(truths["verb"], (Points().points[:, 0] > 0).long())
    torch.testing.assert_close(whole["noun"].sum(1), torch.ones(22))
    first, _ = probabilities(net, Points(), batch_size=5, limit=7)
    torch.testing.assert_close(first["verb"], whole["verb"][:7])


def test_an_ensemble_is_the_mean_of_probabilities() -> None:
    a, b = {"verb": torch.tensor([[0.9, 0.1]])}, {"verb": torch.tensor([[0.3, 0.7]])}
    torch.testing.assert_close(average([a, b])["verb"], torch.tensor([[0.6, 0.4]]))
    with pytest.raises(ValueError, match="same heads"):
        average([a, {"noun": b["verb"]}])
    with pytest.raises(ValueError, match="same heads"):
        average([])


def test_checkpoints_of_an_empty_directory(tmp_path: Path) -> None:
    from accelerate import Accelerator

    assert Checkpoints(tmp_path, Accelerator(), {}, Net()).load() is None


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    fewer = Points()
    fewer.points = fewer.points[:21]
    with pytest.raises(ValueError, match=r"of another training.*'samples': 22.*'samples': 21"):
        train(Net(), fewer, RECIPE, tmp_path)
    other = Net()
    other.frozen.requires_grad_(True)
    with pytest.raises(ValueError, match="of another training"):
        train(other, Points(), RECIPE, tmp_path)


def test_a_training_from_before_clips_positions_decayed_is_refused(tmp_path: Path) -> None:
    class Positions(Net):
        def __init__(self) -> None:
            super().__init__()
            self.positional_embedding = nn.Parameter(torch.zeros(2, 2))

    train(Positions(), Points(), RECIPE, tmp_path)
    (state,) = tmp_path.glob("step-*/state.json")
    content = json.loads(state.read_text())
    assert content["identity"].pop("rules") == ["groups"]
    state.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="written by an earlier version, with another rule for groups"):
        train(Positions(), Points(), RECIPE, tmp_path)


def test_layer_decay_is_the_published_one() -> None:
    """14 values for 12 blocks: 0.75^(12-i) in block i, embeddings one step slower, the rest at 1."""
    names = {
        "blocks.0.cross_s_down.weight": 0.75**12,
        "blocks.11.T_MLP_Adapter.D_fc1.weight": 0.75,
        "clip_conv1.weight": 0.75**13,
        "patch_embed.proj.weight": 0.75**13,
        "clip_ln_post.weight": 1.0,
        "noun_last_Adapter.D_fc1.weight": 1.0,
        "head_verb.weight": 1.0,
    }
    assert {name: layer_scale(name, 12, 0.75) for name in names} == names
    assert round(layer_scale("blocks.0.attn.qkv.weight", 12, 0.75), 4) == 0.0317


def test_layer_decay_slows_the_blocks_down() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2))
            self.head = nn.Linear(2, 2, bias=False)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"verb": self.head(self.blocks[1](self.blocks[0](x)))}

    torch.manual_seed(0)
    net, recipe = Deep(), Recipe(epochs=1, batch_size=22, lr=1e-2, warmup=0, weight_decay=0.0, layer_decay=0.5)
    before = [p.detach().clone() for p in net.parameters()]
    with tempfile.TemporaryDirectory() as directory:
        train(net, Points(("verb",)), recipe, directory)
    # Adam's first step is the learning rate in every coordinate.
    steps = [float((p - old).abs().max()) for p, old in zip(net.parameters(), before, strict=True)]
    assert steps == pytest.approx([0.25e-2, 0.5e-2, 1e-2], rel=1e-3)

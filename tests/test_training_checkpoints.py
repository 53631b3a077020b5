"""Checkpoints: what they hold, whom they belong to, and that a full disk or a damaged file loses nothing."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from training_cases import PointNet, engine, planned, same

from cast.training import CheckpointError, Checkpoints, Progress, load_trained
from cast.training import checkpoints as room
from cast.training.identity import changed_rules

PLAN = planned(checkpoint_every=1)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def stop_at(step: int):  # type: ignore[no-untyped-def]
    def stop(progress, report):  # type: ignore[no-untyped-def]
        if progress.step == step:
            raise KeyboardInterrupt

    return stop


def test_trainable_leaves_the_frozen_out_and_full_does_not(tmp_path: Path) -> None:
    net = PointNet()
    for weights in ("trainable", "full"):
        net = PointNet()
        engine(tmp_path / weights, net, weights=weights).run()
        state = load_file(tmp_path / weights / "step-00000012" / "weights.safetensors")
        frozen = {"frozen.weight", "frozen.bias"} if weights == "trainable" else set()
        assert state.keys() == net.state_dict().keys() - frozen
        with safe_open(tmp_path / weights / "step-00000012" / "weights.safetensors", "pt") as file:
            assert file.metadata()["weights"] == weights
    moments = load_file(tmp_path / "full" / "step-00000012" / "optimizer.safetensors")
    assert {key.split(":")[1] for key in moments} == {"step", "exp_avg", "exp_avg_sq"}
    assert not [key for key in moments if key.startswith("frozen")]


def test_other_experts_are_refused_unless_the_checkpoint_has_its_own(tmp_path: Path) -> None:
    for weights in ("trainable", "full"):
        net = PointNet()
        engine(tmp_path / weights, net, weights=weights).run()
        if weights == "trainable":
            with pytest.raises(ValueError, match="load the same experts as in that training"):
                engine(tmp_path / weights, PointNet(frozen_seed=9), weights=weights)
        else:
            other = PointNet(frozen_seed=9)
            engine(tmp_path / weights, other, weights=weights)
            assert same(other, net)


def test_trained_weights_go_into_a_model_with_the_same_experts(tmp_path: Path) -> None:
    net = PointNet()
    running = engine(tmp_path, net, plan=planned(ema=0.5))
    running.run()
    checkpoint = tmp_path / "step-00000012"
    fresh = PointNet()
    load_trained(fresh, checkpoint)
    assert same(fresh, net)
    load_trained(fresh, checkpoint, average=True)
    assert running.average is not None
    assert torch.equal(fresh.heads["verb"].weight, running.average.read()["heads.verb.weight"])
    with pytest.raises(ValueError, match="belongs to frozen weights with the hash"):
        load_trained(PointNet(frozen_seed=9), checkpoint)
    with pytest.raises(CheckpointError, match="is no checkpoint, or damaged"):
        load_trained(PointNet(), tmp_path)


def test_as_many_stay_as_asked(tmp_path: Path) -> None:
    engine(tmp_path, PointNet(), plan=PLAN, keep=3).run()
    assert names(tmp_path) == ["step-00000010", "step-00000011", "step-00000012"]


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_works(tmp_path: Path, file: str) -> None:
    whole = PointNet()
    engine(tmp_path / "whole", whole, plan=PLAN).run()
    with pytest.raises(KeyboardInterrupt):
        engine(tmp_path / "a", PointNet(), plan=PLAN, keep=2).run(stop_at(5))
    newest = tmp_path / "a" / "step-00000004"
    content = bytearray((newest / file).read_bytes())
    content[len(content) // 2] ^= 0x10  # one bit
    (newest / file).write_bytes(content[:-1] if file == "state.json" else content)
    with pytest.raises(CheckpointError, match="is damaged") as caught:
        engine(tmp_path / "a", PointNet(), plan=PLAN, keep=2)
    assert f"remove it to go on from {tmp_path / 'a' / 'step-00000003'}" in str(caught.value)
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    net = PointNet()
    engine(tmp_path / "a", net, plan=PLAN, keep=2).run()
    assert same(net, whole)


def test_a_full_disk_is_an_error_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    """The system refuses to write more than 200 bytes into a file: as a full disk does, in the middle of one."""
    running = engine(tmp_path, PointNet(), plan=PLAN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(progress, report):  # type: ignore[no-untyped-def]
        if progress.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))

    try:
        with pytest.raises(CheckpointError, match="cannot write the checkpoint of step 4") as caught:
            running.run(limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{tmp_path / 'step-00000003'} is whole" in str(caught.value)
    assert "make room" in str(caught.value)
    assert names(tmp_path) == ["step-00000003"]
    whole, net = PointNet(), PointNet()
    engine(tmp_path.with_name("whole"), whole, plan=PLAN).run()
    engine(tmp_path, net, plan=PLAN).run()
    assert same(net, whole)


def test_no_space_left_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(room, "write_tensors", refuse)
    with pytest.raises(CheckpointError, match=r"No space left on device\. There is no earlier one"):
        engine(tmp_path, PointNet(), plan=PLAN).run()
    assert names(tmp_path) == []


def test_the_end_of_an_epoch_that_cannot_be_written_leaves_the_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, text: str) -> None:
        path.write_text(text[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    def validate(model: torch.nn.Module) -> dict[str, float]:
        monkeypatch.setattr(room, "write_text", refuse)
        return {}

    whole, net = PointNet(), PointNet()
    expected = engine(tmp_path / "whole", whole).run()
    with pytest.raises(CheckpointError, match=r"cannot write the end of the epoch.*No space left.*with --resume"):
        engine(tmp_path / "parts", PointNet()).run(on_epoch=validate)
    monkeypatch.undo()
    assert names(tmp_path / "parts" / "step-00000006") == ["optimizer.safetensors", "state.json", "weights.safetensors"]
    running = engine(tmp_path / "parts", net)
    assert running.progress.step == 6
    assert running.run().history == expected.history
    assert same(net, whole)


def test_what_differs_is_named(tmp_path: Path) -> None:
    engine(tmp_path, PointNet()).run()
    path = tmp_path / "step-00000012" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"identity": {"plan": "test", "optim": {"lr": 1}}}))
    with pytest.raises(ValueError, match=r"it has \{'optim.lr': 1\}, this one \{'optim.lr': None\}"):
        engine(tmp_path, PointNet())


def test_a_checkpoint_from_before_a_rule_changed_is_refused_by_the_rules_name(tmp_path: Path) -> None:
    net, accelerator = PointNet(), Accelerator()
    engine(tmp_path, net).run()
    assert changed_rules(dense=False) == {}
    for rules, why in (({"dense": True}, "another rule for dense .docs/training.md"), ({}, None)):
        again = Checkpoints(tmp_path, accelerator, {"plan": "test", **changed_rules(**rules)}, PointNet())
        again.attach(PointNet(), None, None)
        if why is None:
            assert again.load() is not None
        else:
            with pytest.raises(ValueError, match=f"written by an earlier version, with {why}"):
                again.load()
    ruled = Checkpoints(tmp_path / "new", accelerator, {"plan": "test", **changed_rules(dense=True)}, net)
    ruled.attach(net, None, None)
    ruled.save(Progress())
    assert ruled.load() == Progress()


@pytest.mark.parametrize(
    ("options", "message"), [({"keep": 0}, "keep is 0"), ({"weights": "half"}, "weights is 'half'")]
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine(tmp_path, PointNet(), **options)


def test_a_copy_that_a_person_keeps_beside_them_is_no_checkpoint(tmp_path: Path) -> None:
    engine(tmp_path, PointNet(), plan=planned(epochs=1)).run()
    for copy in ("step-00000006-best", "step-best"):
        (tmp_path / "step-00000006").rename(tmp_path / copy)
        (tmp_path / copy / "note.txt").write_text("mine")
        engine(tmp_path, PointNet(), plan=planned(epochs=1)).run()  # from nothing
        assert (tmp_path / copy / "note.txt").is_file()
    engine(tmp_path, PointNet(), keep=1).run()
    assert names(tmp_path) == ["step-00000006-best", "step-00000012", "step-best"]


def test_a_file_with_a_checkpoints_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step-00000099").write_text("mine")
    running = engine(tmp_path, PointNet(), plan=planned(epochs=1))
    assert running.progress.step == 0
    running.run()
    assert names(tmp_path) == ["step-00000006", "step-00000099"]


def test_what_goes_on_from_a_full_checkpoint_names_the_experts_that_it_has(tmp_path: Path) -> None:
    engine(tmp_path, PointNet(), plan=planned(epochs=1), weights="full").run()
    engine(tmp_path, PointNet(frozen_seed=3), weights="trainable").run()  # with the full one's frozen layer
    load_trained(PointNet(), tmp_path / "step-00000012")
    with pytest.raises(ValueError, match="belongs to frozen weights"):
        load_trained(PointNet(frozen_seed=3), tmp_path / "step-00000012")


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What stands for DeepSpeed: it keeps the optimizer's state in files of its own, in a folder of its own."""
    monkeypatch.setattr(Checkpoints, "_is_deepspeed", property(lambda self: True))
    fake: dict[str, Any] = {"fails": None}

    def file(folder: str) -> Path:
        return Path(folder) / "pytorch_model" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"

    def save(self: Accelerator, folder: str, **options: Any) -> None:
        file(folder).parent.mkdir(parents=True)
        (Path(folder) / "random_states_0.pkl").write_bytes(b"\0" * 2_000_000)
        torch.save(self._optimizers[-1].optimizer.state_dict(), file(folder))
        if fake["fails"]:
            raise fake["fails"]

    def load(self: Accelerator, folder: str, **options: Any) -> None:
        self._optimizers[-1].optimizer.load_state_dict(torch.load(file(folder)))

    monkeypatch.setattr(Accelerator, "save_state", save)
    monkeypatch.setattr(Accelerator, "load_state", load)
    return fake


def test_every_file_of_deepspeed_is_flushed_and_has_a_checksum(
    tmp_path: Path, deepspeed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(room, "flush", lambda path: flushed.append(path.name))
    with pytest.raises(KeyboardInterrupt):
        engine(tmp_path / "a", PointNet(), plan=PLAN, keep=2).run(stop_at(5))
    newest = tmp_path / "a" / "step-00000004"
    ours = json.loads((newest / "state.json").read_text())["files"]
    below = {path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()}
    assert ours.keys() == below - {"state.json"}
    assert len(ours) == 3
    assert {Path(name).name for name in ours} | {"engine", "pytorch_model"} <= set(flushed)

    whole, net = PointNet(), PointNet()
    engine(tmp_path / "whole", whole, plan=PLAN).run()
    engine(tmp_path / "a", net, plan=PLAN, keep=2).run()
    assert same(net, whole)
    newest = max(tmp_path.glob("a/step-*"))
    file = next(newest.rglob("*optim_states.pt"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10  # one bit
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: engine/pytorch_model/.*optim_states\.pt changed"):
        engine(tmp_path / "a", PointNet(), plan=PLAN, keep=2)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"is damaged .*No such file"):
        engine(tmp_path / "a", PointNet(), plan=PLAN, keep=2)


@pytest.mark.parametrize(
    "fault", [RuntimeError("PytorchStreamWriter failed writing file data/0\nat line 1"), OSError(28, "No space left")]
)
def test_a_full_disk_under_deepspeed_is_an_error_of_one_line(
    tmp_path: Path, deepspeed: dict[str, Any], fault: Exception
) -> None:
    running = engine(tmp_path, PointNet(), plan=PLAN)

    def fill(progress, report):  # type: ignore[no-untyped-def]
        if progress.step == 4:
            deepspeed["fails"] = fault

    with pytest.raises(CheckpointError, match="cannot write the checkpoint of step 4") as caught:
        running.run(fill)
    assert str(fault).splitlines()[0] in str(caught.value)
    assert f"{tmp_path / 'step-00000003'} is whole. A checkpoint takes more than 2 MB" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["step-00000003"]

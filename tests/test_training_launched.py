"""`cast train` on two processes, by PyTorch's own ways and others', against one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("PIL")

import sharded_process
import torch
from processes import together
from test_training_command import TINY, lines, settings, weights

from cast.demo.dataset import Sizes, make_dataset
from cast.training.command import fit

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("digits")
    make_dataset(directory, Sizes(plain=0, train=24, val=10), workers=1)
    return directory


def launch(mode: str, out: Path, *overrides: str, extra: str = "") -> None:
    """Two processes of sharded_process.py by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = os.pathsep.join(part for part in (str(HERE.parent), extra) if part)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [*command, str(HERE / "sharded_process.py"), mode, str(out), *overrides],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def assert_close(out: Path, reference: Path) -> None:
    """The same weights up to the order of additions, and the same figures."""
    found, want = weights(out), weights(reference)
    start = lines(reference, "start")
    assert start
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(lines(out, "step"), lines(reference, "step"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    for ours, theirs in zip(lines(out, "epoch"), lines(reference, "epoch"), strict=True):
        assert (ours.pop("kind"), theirs.pop("kind")) == ("epoch", "epoch")
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-3)


@pytest.fixture(scope="module")
def single(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with the whole batch at once; gradients clipped."""
    out = tmp_path_factory.mktemp("single")
    fit(settings(data, out, "optim.micro_batch=8", "optim.clip_grad=0.7", "optim.warmup_epochs=0"))
    return out


def shared(data: Path, *more: str) -> tuple[str, ...]:
    return (f"data.root={data}", *TINY, "optim.micro_batch=2", "optim.clip_grad=0.7", "optim.warmup_epochs=0", *more)


def test_two_processes_equal_one(data: Path, single: Path, tmp_path: Path) -> None:
    """On gloo, each with two micro-batches of 2 for the one's batch of 8; validation of 10 clips is shared, too."""
    together(sharded_process.run, "ddp", str(tmp_path), *shared(data), processes=2, logs=tmp_path)
    assert_close(tmp_path, single)


@pytest.mark.heavy
def test_fsdp2_equals_one_process(data: Path, single: Path, tmp_path: Path) -> None:
    launch("fsdp2", tmp_path, *shared(data), "optim.ema=0.5")
    assert_close(tmp_path, single)
    fit(
        settings(data, tmp_path, *shared(data), "optim.micro_batch=8", "optim.ema=0.5"), resume=True
    )  # whole tensors: one can read them


@pytest.mark.heavy
def test_fsdp2_under_bf16_equals_ddp(data: Path, tmp_path: Path) -> None:
    """Both add gradients up in fp32 and leave rounding to autocast; bf16 sums would be a hundred times further off."""
    for mode in ("ddp", "fsdp2"):
        launch(mode, tmp_path / mode, *shared(data), "run.precision=bf16")
    found, want = weights(tmp_path / "fsdp2"), weights(tmp_path / "ddp")
    assert max(float((found[name] - tensor).abs().max()) for name, tensor in want.items()) < 1e-7


@pytest.mark.heavy
@pytest.mark.parametrize("mode", ["zero1", "zero2"])
def test_deepspeed_equals_one_process(data: Path, single: Path, tmp_path: Path, mode: str) -> None:
    """Clipping at 0.7 is the recipe's, not DeepSpeed's own 1.0."""
    pytest.importorskip("deepspeed")
    for _ in range(2):  # the second time it reads what the first one finished
        launch(mode, tmp_path, *shared(data), extra=os.environ.get("PYTHONPATH", ""))
        assert_close(tmp_path, single)

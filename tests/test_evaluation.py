"""The test protocol and its runs: every clip as the protocol says, every sample once, and no bit lost by a kill."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from evaluation_cases import CLASSES, COUNTS, small_cast, write_dataset
from processes import together
from published_views import views_of
from torch import Tensor, nn
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from video_files import write_video

from cast.baselines import TwoStream, build
from cast.cli import main as command
from cast.evaluation import Predictions, Protocol, Run, evaluate, read_predictions, write_predictions
from cast.evaluation.cost import model_cost
from cast.evaluation.inference import Cost, _together, sample_names
from cast.evaluation.parts import Parts
from cast.evaluation.run import find_log
from cast.loading import load_checkpoint
from cast.model.config import make_config
from cast.predict import predict
from cast.video.annotations import Sample, read_compositional
from cast.video.reader import VideoError
from cast.video.views import normalise
from cast.video.workers import WorkerError

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

PROTOCOL = Protocol(size=16)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("videos") / "data")


@pytest.fixture(scope="module")
def samples(root: Path) -> list[Sample]:
    return read_compositional(root / "val.csv", root / "val")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    small_cast().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def straight(samples: list[Sample]) -> Predictions:
    """An evaluation that nothing disturbed."""
    return evaluate(small_cast(), samples, CLASSES, PROTOCOL, Run(batch_size=12))[0]


@pytest.mark.parametrize(
    ("protocol", "name"),
    [
        (Protocol(size=16), "2x3"),
        (Protocol("dense", size=16), "5x3"),
        (Protocol(views=3, crops=1, size=16), "3x1"),
        (Protocol("dense", 1, 2, frames=4, size=24), "1x2"),
    ],
)
def test_clips_are_those_of_the_published_protocol(protocol: Protocol, name: str, tmp_path: Path) -> None:
    video = write_video(tmp_path / "clip.mp4", count=90)
    clips = protocol.read(video)
    expected = list(views_of(video, protocol.size, protocol.sampling, protocol.views, protocol.crops, protocol.frames))
    assert protocol.name == name
    assert clips.dtype == torch.uint8
    assert len(clips) == protocol.clips == len(expected)
    for clip, view in zip(normalise(clips), expected, strict=True):
        assert torch.equal(clip, view)


def test_impossible_protocols_are_refused() -> None:
    with pytest.raises(ValueError, match="sampling is 'sparse'; it must be 'uniform' or 'dense'"):
        Protocol("sparse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="crops is 0; it must be at least 1"):
        Protocol(crops=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        Run(batch_size=0)


def test_answers_are_the_mean_of_the_views_softmax(samples: list[Sample], straight: Predictions) -> None:
    """As the model says one clip at a time, and as `cast predict` says."""
    model = small_cast()
    assert straight.videos == [f"clip_{number}.mp4" for number in range(7)]
    for row in (0, 3, 6):
        sample = samples[row]
        with torch.inference_mode():
            views = [model(clip[None]) for clip in views_of(sample.path, 16)]
        foretold = predict(model, sample.path, CLASSES, top=6)
        for head in CLASSES:
            expected = torch.cat([view[head].softmax(-1) for view in views]).mean(0)
            torch.testing.assert_close(straight.probabilities[head][row], expected, rtol=1e-4, atol=1e-6)
            assert straight.views[head][row].tolist() == [int(view[head].argmax()) for view in views]
            assert straight.labels[head][row] == sample.labels[head]
            best = foretold.guesses[head][0]
            assert (best.index, best.probability) == (
                int(straight.guesses(head)[row]),
                pytest.approx(float(straight.probabilities[head][row].max()), rel=1e-4),
            )


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (4, 2), (100, 1)])
def test_batches_and_workers_change_rounding_at_most(
    batch_size: int, workers: int, samples: list[Sample], straight: Predictions
) -> None:
    found, cost = evaluate(small_cast(), samples, CLASSES, PROTOCOL, Run(batch_size, workers))
    for head in CLASSES:
        torch.testing.assert_close(found.probabilities[head], straight.probabilities[head], rtol=1e-4, atol=1e-6)
    assert (cost.clips, cost.processes, cost.resumed) == (42, 1, 0)
    assert cost.peak_memory > 2**20


def test_processes_work_at_the_same_time() -> None:
    """Clips add up; of time and of memory the largest counts."""
    shares = [Cost(12, 3.0, 1, "CPU, 1 thread", 500, 2), Cost(6, 2.0, 1, "CPU, 1 thread", 700, 1)]
    assert _together(shares) == Cost(18, 3.0, 2, "CPU, 1 thread", 700, 3)


class _Dies(nn.Module):
    """A model whose process is killed, as it were, at a forward pass."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.body, self.left = small_cast(), after

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.body(video)


def test_a_killed_run_goes_on_with_the_same_bits(samples: list[Sample], straight: Predictions, tmp_path: Path) -> None:
    parts = Parts(tmp_path / "parts", {"model": "a"}, 0)
    with pytest.raises(KeyboardInterrupt):
        evaluate(_Dies(2), samples, CLASSES, PROTOCOL, Run(12), parts=parts)
    with open(parts.own, "a") as file:
        file.write('{"video":"clip_4.mp4","labels":{"ve')  # what a kill leaves of a line
    found, cost = evaluate(small_cast(), samples, CLASSES, PROTOCOL, Run(12), parts=parts)
    assert cost.resumed == 4
    assert cost.clips == 18
    for head in CLASSES:
        assert torch.equal(found.probabilities[head], straight.probabilities[head])
        assert torch.equal(found.views[head], straight.views[head])
    with pytest.raises(ValueError, match="parts of another evaluation"):
        evaluate(small_cast(), samples, CLASSES, PROTOCOL, Run(12), parts=Parts(parts.directory, {"model": "b"}, 0))
    parts.own.write_text(parts.own.read_text().replace('"views"', "views", 1))
    with pytest.raises(ValueError, match="damaged"):
        parts.load()


def test_a_chunk_of_which_a_kill_left_a_part_is_answered_whole(
    samples: list[Sample], straight: Predictions, tmp_path: Path
) -> None:
    parts = Parts(tmp_path / "parts", {"model": "a"}, 0)
    with pytest.raises(KeyboardInterrupt):
        evaluate(_Dies(2), samples, CLASSES, PROTOCOL, Run(12), parts=parts)
    lines = parts.own.read_text().splitlines(keepends=True)
    parts.own.write_text("".join(lines[:-1]))  # one of the second chunk's two videos
    found, cost = evaluate(small_cast(), samples, CLASSES, PROTOCOL, Run(12), parts=parts)
    assert cost.resumed == 2
    assert list(found.videos) == list(straight.videos)
    for head in CLASSES:
        assert torch.equal(found.probabilities[head], straight.probabilities[head])


def test_a_bad_video_is_one_line_from_a_worker_too(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path / "data", 2)
    bad = data / "val" / "clip_1.mp4"
    bad.write_text("no video\n" * 300)
    words = ["evaluate", checkpoint, data, "--out", tmp_path / "out", "--workers", "1", "--views", "1"]
    assert command([str(word) for word in words]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"cast evaluate: error: {bad}: is not a video")
    assert error.count("\n") == 1


class _Deadly(Protocol):
    """Ends the process that reads."""

    def read(self, path: Any, threads: int = 1) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return torch.empty(0)


def test_a_worker_that_is_killed_is_told_with_its_videos(
    samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    # DataLoader looks for dead workers every five seconds.
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.3,))
    with pytest.raises(WorkerError, match=r"died at or soon after .*clip_0\.mp4.* \(killed by SIGKILL\).*--workers"):
        evaluate(small_cast(), samples, CLASSES, _Deadly(size=16), Run(batch_size=12, workers=1))


def test_what_cannot_be_evaluated_is_refused(samples: list[Sample], tmp_path: Path) -> None:
    model = small_cast()
    with pytest.raises(ValueError, match="there are no samples"):
        evaluate(model, [], CLASSES, PROTOCOL)
    with pytest.raises(ValueError, match=r"clip_0\.mp4 more than once"):
        evaluate(model, [samples[0], samples[0]], CLASSES, PROTOCOL)
    with pytest.raises(ValueError, match=r"heads are \{'.*\} and the data set's \{'verb': 6, 'noun': 2\}"):
        evaluate(model, samples, CLASSES | {"noun": ["door", "tap"]}, PROTOCOL)
    (tmp_path / "bad.mp4").write_bytes(b"\0\0\0\x20ftypisom")
    with pytest.raises(VideoError, match=r"bad\.mp4"):
        evaluate(model, [Sample(tmp_path / "bad.mp4", {"verb": 0, "noun": 0})], CLASSES, PROTOCOL)
    with torch.no_grad():
        model.get_parameter("head_verb.bias")[2] = torch.nan
    with pytest.raises(ValueError, match=r"verb is not a number for clip_0\.mp4, clip_1\.mp4: its weights"):
        evaluate(model, samples, CLASSES, PROTOCOL)


def test_baselines_and_trainings_directories_are_checkpoints(tmp_path: Path) -> None:
    """The experts' answers, which CAST is compared with, come from their own checkpoints."""
    sizes = {"image_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = build("independent-adapters", make_config(heads=COUNTS, **sizes)).eval()
    model.save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "model" / "labels.json").write_text(json.dumps(CLASSES))
    (tmp_path / "run" / "log.jsonl").write_text("")
    for path in (tmp_path / "run", tmp_path / "run" / "model"):
        loaded = load_checkpoint(path)
        assert isinstance(loaded.model, TwoStream)
        assert loaded.classes == CLASSES
        assert find_log(path) == tmp_path / "run" / "log.jsonl"
    clip = torch.randn(1, 3, 16, 16, 16)
    with torch.inference_mode():
        assert torch.equal(loaded.model(clip)["verb"], model(clip)["verb"])
    cost = model_cost(loaded.model, 16, 16)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.gmacs > 0


def test_names_have_as_many_folders_as_they_need() -> None:
    paths = ["/data/a/x/1.mp4", "/data/a/y/1.mp4", "/data/b/x/2.mp4"]
    assert sample_names([Sample(Path(path), {}) for path in paths[1:]]) == ["1.mp4", "2.mp4"]
    assert sample_names([Sample(Path(path), {}) for path in paths]) == ["x/1.mp4", "y/1.mp4", "x/2.mp4"]


def test_two_processes_write_the_files_of_one(checkpoint: Path, root: Path, tmp_path: Path) -> None:
    """Seven videos on two processes: shares of four and three, nothing twice and nothing lost."""
    arguments = ["evaluate", checkpoint, root, "--workers", "0", "--batch_size", "6", "--views", "1", "--out"]
    assert command([str(word) for word in (*arguments, tmp_path / "1")]) == 0
    words = [str(word) for word in (*arguments, tmp_path / "2")]
    together(command, words, processes=2, logs=tmp_path)
    for name in ("predictions.jsonl", "metrics.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name
    cost = json.loads((tmp_path / "2" / "cost.json").read_text())
    assert (cost["processes"], cost["clips"]) == (2, 21)
    assert not (tmp_path / "2" / "unfinished").exists()
    assert len(read_predictions(tmp_path / "2" / "predictions.jsonl").videos) == 7


def test_the_command_writes_everything_and_reads_it_again(
    checkpoint: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1, "epoch": 0.1, "loss": 2.5}\n{"step": 2, "loss": 2.0, "val_verb": 9}\n'
    )
    options = ["--out", out, "--workers", "0", "--views", "1", "--log", tmp_path / "log.jsonl"]
    assert command([str(word) for word in ("evaluate", checkpoint, root, *options)]) == 0
    shown = capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert f"{metrics['metrics']['verb_top1']:.2f}" in shown
    assert metrics["about"]["protocol"] == Protocol(views=1, size=16).to_dict()
    report = (out / "report.html").read_text()
    for words in ("Learning curves", "Where the streams look", "GMACs a view", "1x3", "clips/s", "&lt;b&gt;onion"):
        assert words in report
    assert "<b>onion" not in report

    # A second run needs no model's answers: neither the finished directory nor one that is given its file.
    monkeypatch.setattr("cast.evaluation.run.evaluate", lambda *arguments: pytest.fail("answered again"))
    assert command([str(word) for word in ("evaluate", checkpoint, root, *options)]) == 0
    baseline = f"--baselines.spatial={out / 'predictions.jsonl'}"
    (out / "log.jsonl").write_text("somebody else's\n")  # found beside the answers, not asked for
    arguments = ("evaluate", out / "predictions.jsonl", root, "--out", again, baseline)
    assert command([str(word) for word in arguments]) == 0
    compared = json.loads((again / "metrics.json").read_text())
    assert compared["metrics"] == metrics["metrics"]
    assert set(compared["baselines"]["spatial"]["gain"].values()) == {0.0}
    capsys.readouterr()
    assert command([str(word) for word in (*arguments[:-1], baseline.replace("spatial", "CAST"))]) == 1
    assert "a baseline cannot be called 'CAST'" in capsys.readouterr().err
    report = (again / "report.html").read_text()
    assert "over spatial" in report
    assert "left out:" in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{none}", "{root}"], "none: no such checkpoint"),
        (["{checkpoint}", "{none}"], "none: no such data set"),
        (["{checkpoint}", "{root}", "--split", "test"], "split is 'test'"),
        (["{checkpoint}", "{root}", "--baselines.x={none}"], "no such predictions file for a baseline"),
        (["{checkpoint}", "{root}", "--log", "{none}"], "no such training log"),
        (["{checkpoint}", "{root}", "--sls", "[2,3,3]"], "EPIC-Kitchens-100's submission needs"),
        (["{root}/val.csv", "{root}"], "val.csv"),
    ],
)
def test_bad_usage_is_one_line(
    arguments: list[str], message: str, checkpoint: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"none": tmp_path / "none", "root": root, "checkpoint": checkpoint}
    words = [word.format(**places) for word in arguments]
    assert command(["evaluate", *words, "--out", str(tmp_path / "out"), "--workers", "0"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_results_that_cannot_be_written_are_told_before_any_are_made(
    checkpoint: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("notes")
    words = ["evaluate", str(checkpoint), str(root), "--workers", "0"]
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert command([*words, "--out", str(out)]) == 1
        assert f"--out is {out}, but {tmp_path / 'file'} is a file; name a directory" in capsys.readouterr().err
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "locked")  # root may write everywhere
    assert command([*words, "--out", str(tmp_path / "locked" / "new" / "deep")]) == 1
    assert f"{tmp_path / 'locked'} may not be written to" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "notes"


def test_another_evaluation_in_the_directory_is_kept(
    checkpoint: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "predictions.jsonl").write_text('{"format":"cast-predictions","about":{},"classes":{}}\n')
    before = (tmp_path / "predictions.jsonl").read_bytes()
    assert command(["evaluate", str(checkpoint), str(root), "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err
    assert (tmp_path / "predictions.jsonl").read_bytes() == before


def test_a_challenge_without_labels_gets_its_submission_and_no_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_cast(heads={"verb": 97, "noun": 300}).save_pretrained(tmp_path / "model")
    for number, count in enumerate((20, 12)):
        write_video(tmp_path / f"P01_{number}.mp4", count=count)  # the second is shorter than a clip
    annotations, out = tmp_path / "annotations.csv", tmp_path / "out"
    annotations.write_text("narration_id\nP01_0\nP01_1\n")
    (tmp_path / "skip.csv").write_text("path,fault\nP01_1.mp4,short\n")
    words = ["evaluate", tmp_path / "model", annotations, "--workers", "0", "--sls", "[2,3,3]", "--out"]
    assert command([str(word) for word in (*words, out)]) == 0
    shown = capsys.readouterr().out
    found = json.loads((out / "metrics.json").read_text())
    assert found.keys() == {"about", "videos", "note"}
    assert found["note"] == "the data set has no labels, so nothing was measured"
    assert found["note"] in shown
    assert "accuracies, because the data set has no labels" in (out / "report.html").read_text()
    with ZipFile(out / "submission.zip") as file:
        results = json.loads(file.read("test.json"))["results"]
    assert {name: len(answers["noun"]) for name, answers in results.items()} == {"P01_0": 300, "P01_1": 300}

    (tmp_path / "skip.csv").write_text("path,fault\nP01_1.mp4,undecodable\n")
    assert command([str(word) for word in (*words, tmp_path / "again")]) == 1
    error = capsys.readouterr().err
    assert "1 of 2 videos are skipped (1 undecodable)" in error
    assert "a submission must answer every video" in error
    assert not (tmp_path / "again").exists()


def test_a_report_does_not_make_up_how_a_file_was_made(
    root: Path, straight: Predictions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_predictions(tmp_path / "foreign.jsonl", replace(straight, about={}))
    assert command(["evaluate", str(tmp_path / "foreign.jsonl"), str(root), "--out", str(tmp_path / "out")]) == 1
    assert "does not say how the test was made" in capsys.readouterr().err

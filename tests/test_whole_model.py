"""A whole model's prediction: its composition is the product's, its rules do what they say."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_gpu import fake_gpu, gpu_autocast
from ptx_emulator.predict.devices import device
from ptx_emulator.predict.model import Prediction
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import cast
from cast_kernels.cli import main
from cast_kernels.evidence import compiled_model, host, whole_model
from cast_kernels.evidence import whole_report as report
from cast_kernels.evidence.autocast import cuda_rules
from cast_kernels.evidence.cases import STREAMS
from cast_kernels.evidence.eager_model import Ledger, Operation
from cast_kernels.evidence.parts import Model, parts
from cast_kernels.evidence.unrun import Unrun

#: A model of which every part is there and nothing takes time.
TINY = Model(
    batch=1, depth=2, frames=2, grid=2, patch=8, dim=64, heads=2, hidden=64, adapter=16, bottleneck=32, verbs=2, nouns=2
)
PREDICTIONS = Path(__file__).parent.parent / "benchmarks/predictions/model"
H100 = device("H100")


def product(model: Model) -> cast.CAST:
    """The product's model of these sizes, in eager PyTorch."""
    return cast.CAST(
        image_size=model.grid * model.patch, patch_size=model.patch, num_frames=model.frames * model.tubelet,
        tubelet_size=model.tubelet, embed_dim=model.dim, depth=model.depth, num_heads=model.heads,
        mlp_ratio=model.hidden / model.dim, adapter_ratio=model.adapter / model.dim,
        down_ratio=model.dim / model.bottleneck, heads={"verb": model.verbs, "noun": model.nouns},
        drop_path=model.drop_path, fused=False, stream_dtype="auto" if model.streams == "fp32" else "autocast",
    ).train(model.training)  # fmt: skip


def traced_product(model: Model) -> tuple[Counter[Operation], Counter[Operation]]:
    """Operators of the product's forward and backward under CUDA's autocast rules."""
    side = model.grid * model.patch
    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(model.training):
        with unset_fake_temporarily():
            made = product(model)
        video = torch.empty(model.batch, 3, model.frames * model.tubelet, side, side)
        labels = torch.zeros(model.batch, dtype=torch.int64)
        with Ledger() as forward:
            with cuda_rules(torch.bfloat16):
                logits = made(video)
            if model.training:
                loss = F.cross_entropy(logits["verb"].float(), labels) + F.cross_entropy(logits["noun"].float(), labels)
        with Ledger() as backward:
            if model.training:
                torch.autograd.grad(loss, [p for p in made.parameters() if p.requires_grad])
    return Counter(forward.operations), Counter(backward.operations)


def traced_parts(model: Model) -> tuple[Counter[Operation], Counter[Operation]]:
    found: dict[str, Counter[Operation]] = {"forward": Counter(), "backward": Counter()}
    for part, phase, operations in whole_model.operations(model):
        for operation in operations:
            found[phase][operation] += part.times
    return found["forward"], found["backward"]


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("training", [True, False])
def test_the_parts_are_the_products_operators(streams: str, training: bool) -> None:
    """Linear drop-path rates do not show in shapes; without any, no draw does. The loss's gradient is made once."""
    model = replace(TINY, depth=3, batch=2, streams=streams, training=training)
    (forward, backward), (ours, our_backward) = traced_product(model), traced_parts(model)
    assert ours == forward
    # autograd.grad fills the gradient of a scalar; the part is given one.
    backward -= Counter(o for o in backward if o.name == "aten.ones_like")
    assert our_backward == backward
    assert training == bool(backward)


@pytest.mark.parametrize(("stream_dtype", "expected"), [("auto", torch.float32), ("autocast", torch.bfloat16)], ids=str)
def test_the_dtype_of_the_streams_under_cudas_autocast(stream_dtype: str, expected: torch.dtype) -> None:
    """Of the product on a fake GPU, before and behind every block."""
    with fake_gpu():
        with unset_fake_temporarily(), torch.device("meta"):
            model = cast.CAST("tiny", heads={"action": 5}, fused=False, stream_dtype=stream_dtype)
        model = model.to_empty(device="cuda")
        seen: list[torch.dtype] = []
        for block in model.blocks:
            block.register_forward_hook(lambda _, given, out: seen.extend(x.dtype for x in (*given, *out)))
        with gpu_autocast(torch.bfloat16):
            model(torch.empty(1, 3, 16, 48, 48, device="cuda"))
    assert seen == [expected] * 4 * len(model.blocks)


def test_cudas_rules_on_the_cpu_are_cudas() -> None:
    """The product's forward: the same operators with the same bytes as under CUDA's own autocast on a fake GPU."""
    model = replace(TINY, training=False)
    side = model.grid * model.patch
    shape = (model.batch, 3, model.frames * model.tubelet, side, side)
    with fake_gpu():
        with unset_fake_temporarily(), torch.device("meta"):
            made = product(model)
        made = made.to_empty(device="cuda")
        with torch.no_grad(), gpu_autocast(torch.bfloat16), Ledger() as theirs:
            made(torch.empty(shape, device="cuda"))
    ours, _ = traced_product(model)
    attention = "scaled_dot_product"
    assert Counter(o for o in theirs.operations if attention not in o.name) == Counter(
        {o: n for o, n in ours.items() if attention not in o.name}
    )


def test_what_is_not_run_is_what_would_run() -> None:
    """The same operators on tensors without contents and on real ones."""
    for part in parts(TINY, "eager"):
        real, unrun = Ledger(), Unrun()
        for ledger in (real, unrun):
            with ledger:
                part.backward(part.forward(torch.bfloat16))
        assert Counter(unrun.operations) == Counter(real.operations), part.name


def ways(**changes: Any) -> list[whole_model.WayToRun]:
    return list(whole_model.predict(["H100"], [replace(TINY, **changes)]))


def test_every_way_of_a_small_model() -> None:
    eager, compiled, ours = ways()
    assert [way.name for way in (eager, compiled, ours)] == list(report.WAYS)
    for way in (eager, compiled, ours):
        assert way.us == pytest.approx(sum(row.us for row in way.rows))
        assert way.us >= way.kernels * 2.5 * 0.999  # none takes less than a launch
        assert way.without_graphs >= way.us
        assert 0 < way.of(*whole_model.FIXED) < way.us
    assert compiled.kernels < eager.kernels
    assert sum(r.flops for r in compiled.rows) == pytest.approx(sum(r.flops for r in eager.rows), rel=0.01)
    names = {row.part.partition(": ")[2] for row in ours.rows if row.kind == "ours"}
    assert {"project", "exchange", "adapter_backward", "norm", "activate", "weight_gradient"} <= names
    assert all(row.us >= row.bound for row in ours.rows)
    assert ours.failures == ()
    assert eager.host_us == pytest.approx((eager.kernels - 2) * (host.OPERATOR + host.LAUNCH))


def test_a_launch_of_ours_is_charged_as_a_library_kernel() -> None:
    def launch(flops: float, moved: float, shared: float) -> Prediction:
        return Prediction("k", (1, 1, 1), 1, 1.0, 0.0, shared, 0.0, 0.0, 0.0, flops, moved, 0.0)

    assert whole_model.charged(launch(0, 3e9, 0), H100) == pytest.approx(1e3 / 0.8)
    assert whole_model.charged(launch(H100.peak, 0, 0), H100) == pytest.approx(1e6 / 0.65)
    assert whole_model.charged(launch(0, 0, 7.0), H100) == 7.0
    assert whole_model.charged(launch(0, 0, 1.0), H100) == pytest.approx(2.5)


@pytest.mark.heavy
def test_blocks_of_a_compiled_model_are_counted_by_difference() -> None:
    deep = replace(TINY, depth=5, training=False, drop_path=0.0)
    by_difference = compiled_model.count(deep)["forward"]
    outright = compiled_model._compiled(deep)["forward"]
    assert sum(by_difference.values()) == sum(outright.values())
    assert sum(n * o.bytes for o, n in by_difference.items()) == pytest.approx(
        sum(n * o.bytes for o, n in outright.items()), rel=0.01
    )


def test_committed_predictions_are_labelled_and_follow_the_rules() -> None:
    files = sorted(PREDICTIONS.glob("*.json"))
    assert [path.stem for path in files] == ["a100", "h100", "h200"]
    for path in files:
        found = json.loads(path.read_text())
        assert found["label"] == "predicted, unvalidated: no kernel of ours has been timed"
        seen = {(w["way"], w["model"]["batch"], w["model"]["training"], w["model"]["streams"]) for w in found["ways"]}
        assert len(seen) == 3 * 3 * 2 * 2
        assert {w["model"]["recompute"] for w in found["ways"]} == {"nothing"}
        for way in found["ways"]:
            assert way["gpu_us"] == pytest.approx(sum(row["us"] for row in way["rows"]), rel=1e-3)
            assert way["without_graphs_us"] == max(way["gpu_us"], way["host_us"])
    assert (PREDICTIONS / "README.md").read_text() == report.markdown(PREDICTIONS)


def test_a_committed_row_of_eager_is_what_the_model_gives() -> None:
    found = json.loads((PREDICTIONS / "h100.json").read_text())
    way = next(w for w in found["ways"] if w["way"] == "eager AMP" and w["model"]["training"])
    model = Model(**way["model"])
    rows = {(r["part"], r["phase"], r["kind"]): r for r in way["rows"] if not r["part"].startswith("self")}
    for part, phase, operations in whole_model.operations(replace(model, depth=1)):
        if part.name != "heads":
            continue
        own = [o for o in operations if o.kind == "elementwise"]
        us = 1e6 * sum(o.seconds(H100) for o in own)
        assert rows["heads", phase, "elementwise"]["us"] == pytest.approx(us, rel=1e-2)
        assert rows["heads", phase, "elementwise"]["kernels"] == len(own)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(whole_model, "both", lambda batches, recompute, streams: [replace(TINY, streams=streams[0])])
    folder = tmp_path / "model"
    arguments = ["predict", "--model", "--device", "H100", "--batch", "1", "--streams", "bf16", "--folder", str(folder)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "no kernel of ours has been timed" in printed
    assert "training" in printed
    assert "…" not in printed  # no word is cut short
    found = json.loads((folder / "h100.json").read_text())
    assert [way["way"] for way in found["ways"]] == list(report.WAYS)
    assert found["command"] == "cast-kernels predict --model --recompute nothing --streams bf16 --folder"
    assert "| H100 | 1 | training step | bf16 |" in (folder / "README.md").read_text()


def test_goals_are_held_against_predictions() -> None:
    def way(name: str, us: float, host_us: float) -> dict[str, Any]:
        times = {"gpu_us": us, "without_graphs_us": max(us, host_us), "with_graphs_us": us}
        model = {"batch": 6, "streams": "fp32", "training": True}
        return {"device": "H100", "way": name, "model": model, **times}

    lines = report.goals([way("eager AMP", 150.0, 0.0), way("torch.compile", 110.0, 0.0), way("ours", 100.0, 120.0)])
    assert [line.split()[0] for line in lines] == ["met", "accepted", "accepted", "missed", "met", "accepted"]


def test_what_is_measured_on_the_host_is_as_stated() -> None:
    """Within a factor of ten: machines differ, and other work is on them."""
    assert host.OPERATOR / 10 < host.measure(repeats=3) < host.OPERATOR * 10

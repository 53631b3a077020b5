"""The benchmarks' own logic: what may call itself faster, what is missing, FLOPs, memory, samples."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

import cast
from cast_kernels.ops.bcast import flops as bcast_flops

pytest.importorskip("cast_kernels._C", reason="the native core measures the machine's ceiling")

import compare as compare_module
import measure
import peers
from baselines import OneDNNLinears
from bench_bcast import OURS as BCAST_OURS
from bench_bcast import ROWS as BCAST_ROWS
from bench_model import FUSED, GROUPS, PLAIN
from compare import Candidate, compare, worst_ratio
from measure import Unavailable, interleave, peak_memory, time_limit
from models import Training, count_flops, exact_training, make_batch, make_model
from peak_memory import measure_apart
from report import recorded_time, render, replay

MEASURE_CEILING = compare_module.measure_ceiling
TRUTH = {"x": torch.linspace(1, 2, 64, dtype=torch.float64)}
SMALL = cast.CASTConfig(
    image_size=32, patch_size=16, num_frames=4, embed_dim=32, depth=2, num_heads=2, heads={"verb": 97, "noun": 300}
)


@pytest.fixture(autouse=True)
def quick_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_module, "measure_ceiling", lambda: 100.0)  # the real one takes a second per group


def off_by(relative: float) -> Candidate:
    """A candidate whose every value is wrong by this much."""
    return Candidate(lambda: time.sleep(1e-3), lambda: {"x": TRUTH["x"] * (1 + relative)})


def rows_of(**candidates: Any) -> dict[str, dict[str, Any]]:
    def refuse() -> Candidate:
        raise Unavailable("not installed; do this")

    builders = {name: (refuse if c is None else lambda c=c: c) for name, c in candidates.items()}
    return compare(builders, TRUTH, "eager", flops=10**6, samples=3, seconds=1.0)


# -- what may call itself faster


@pytest.mark.parametrize(("relative", "correct"), [(1.9e-6, True), (2.1e-6, False), (float("nan"), False)])
def test_only_a_correct_candidate_has_a_speedup(relative: float, correct: bool) -> None:
    row = rows_of(eager=off_by(1e-6), other=off_by(relative))["other"]
    assert row["correct"] == correct
    assert (row["speedup"] is not None) == correct
    cells = str([list(column.cells) for column in render("group", {"other": row}).columns])
    assert ("inexact" in cells) == (not correct)


def test_one_wrong_gradient_is_enough_and_is_named() -> None:
    exact = {name: torch.ones(4, dtype=torch.float64) for name in ("x", "grad.a", "grad.b")}
    eager = dict.fromkeys(exact, 1e-6)
    assert worst_ratio(eager | {"grad.b": 3e-6}, eager, exact) == (pytest.approx(3), "grad.b")


def test_an_eager_that_happens_to_be_exact_allows_rounding_but_nothing_else() -> None:
    exact = {"x": torch.ones(4, dtype=torch.float64)}
    assert worst_ratio({"x": 2**-25}, {"x": 0.0}, exact)[0] == 1
    assert worst_ratio({"x": 2**-22}, {"x": 0.0}, exact)[0] == 8
    assert worst_ratio({"x": 1e-9}, {"x": 0.0}, {"x": torch.zeros(4)})[0] == float("inf")


def test_fused_and_unfused_training_steps_agree_and_the_error_is_seen() -> None:
    video, labels = make_batch(SMALL, 1)
    exact = exact_training(SMALL, video, labels)

    def build(name: str) -> Candidate:
        run = Training(make_model(SMALL, **PLAIN[name]), video, labels)
        return Candidate(run.step, run.results)

    rows = compare({name: lambda name=name: build(name) for name in PLAIN}, exact, "fused=False", 10**6, 2, 1.0)
    assert all(rows[name]["correct"] for name in FUSED), rows
    assert any(key.startswith("grad.blocks.0.cross_s_up") for key in exact)
    assert 0 < rows["fused=False"]["error"] < 1e-5


def test_nothing_is_zero_and_models_of_one_variant_are_equal() -> None:
    models = [make_model(SMALL, **arguments).state_dict() for arguments in PLAIN.values()]
    assert all(torch.equal(models[0][key], model[key]) for model in models for key in models[0])
    assert all(x.double().std() > 0.01 for x in models[0].values())


# -- what is missing


PEER_ERRORS = """
import sys
import peers, torch
from models import exact_logits, make_batch, make_model
from test_benchmarks import SMALL
video = make_batch(SMALL, 1)[0]
logits, exact = getattr(peers, sys.argv[1])(make_model(SMALL, fused=False), video, 1)(), exact_logits(SMALL, video)
assert logits.keys() == exact.keys()
for name, truth in exact.items():
    torch.testing.assert_close(logits[name].double(), truth, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.parametrize(("peer", "package"), [("openvino", "openvino"), ("onnx_runtime", "onnxruntime")])
def test_peers_compute_the_same_logits(peer: str, package: str) -> None:
    """In a process of its own: OpenVINO 2026.4 crashed while it compiled an earlier form of the model."""
    pytest.importorskip(package, reason=f"{package} is in the extra 'bench' only")
    folders = [str(Path(__file__).parent), str(Path(peers.__file__).parent)]
    command = [sys.executable, "-c", PEER_ERRORS, peer]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_row_of_ours_is_in_a_group() -> None:
    assert all(set(FUSED) <= set(names) for names in GROUPS.values())
    assert {name for *_, name in BCAST_ROWS} >= set(BCAST_OURS)
    assert {(dtype, batch) for dtype, batch, _, _ in BCAST_ROWS} == {
        (d, b) for d in ("fp32", "bf16") for b in (1, 2, 6)
    }


def test_onednn_linears_run_in_onednn() -> None:
    class Seen(TorchDispatchMode):
        names: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    x, weight, bias = torch.randn(5, 7), torch.randn(3, 7), torch.randn(3)
    with torch.no_grad(), Seen(), OneDNNLinears():
        y = F.linear(x, weight, bias)
    assert any("_linear_pointwise" in name for name in Seen.names)
    torch.testing.assert_close(y, x @ weight.T + bias)


# -- FLOPs


def model_flops(config: cast.CASTConfig) -> int:
    """Of one clip's forward, by hand: two per multiply-add, matrix products and convolutions."""
    rows = {"spatial": config.exchange_frames * (1 + config.num_patches)}
    rows["temporal"] = config.exchange_frames * config.num_patches
    windows = {"spatial": 1 + config.num_patches, "temporal": rows["temporal"]}
    dim = config.embed_dim
    block = 0
    for stream, count in rows.items():
        weights = 4 * dim * dim + 2 * dim * config.mlp_dim + 2 * 2 * dim * config.adapter_dim
        block += count * (weights + 2 * windows[stream] * dim)
    pixels = 3 * config.patch_size**2 * (1 + config.tubelet_size)
    heads = dim * sum(config.classes.values())
    exchange = bcast_flops(make_model(config).blocks[0].problem())  # type: ignore[operator]
    return 2 * (config.depth * block + rows["temporal"] * pixels * dim + heads) + config.depth * exchange


def test_flops_as_torch_counts_them_agree_with_a_count_by_hand() -> None:
    assert count_flops(SMALL, 1) == model_flops(SMALL)
    assert count_flops(SMALL, 3) == 3 * model_flops(SMALL)


def test_base_model_has_the_paper_s_multiply_adds() -> None:
    assert count_flops("base", 1) == pytest.approx(2 * 390.5e9, rel=1e-4)


def test_a_training_step_is_more_than_two_forwards_and_less_than_three() -> None:
    # Frozen weights need no gradient; inputs of every layer do, but those of the first block and the embeddings.
    config = cast.CASTConfig(depth=3)
    assert 2 < count_flops(config, 1, training=True) / count_flops(config, 1) < 3


# -- memory and time


def test_peak_memory_sees_an_allocation_that_is_gone_again() -> None:
    def run() -> None:
        bytearray(b"x" * (96 << 20))

    seen = peak_memory(run)
    assert 90 < seen["peak_mib"] - seen["before_mib"] < 400
    assert peak_memory(lambda: None)["peak_mib"] - seen["before_mib"] < 60


def test_training_memory_is_measured_in_a_process_of_its_own() -> None:
    seen = measure_apart("tiny", 2, {"fused": True, "depth": 1})
    assert 50 < seen["before_mib"] < seen["peak_mib"]


def test_a_process_that_fails_is_a_missing_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho first >&2\necho 'MemoryError: too much' >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(Unavailable, match=r"^MemoryError: too much$"):
        measure_apart("tiny", 2, {"fused": True})


def test_little_time_means_few_samples() -> None:
    steps = {"long": lambda: time.sleep(0.16), "short": lambda: None}
    assert {row["samples"] for row in interleave(steps, 9, seconds=0.01).values()} == {measure.FEWEST}
    rows = interleave({"quick": lambda: time.sleep(0.01)}, 3, seconds=10.0)
    assert rows["quick"]["samples"] == len(rows["quick"]["all_ms"]) == 3
    assert rows["quick"]["min_ms"] >= 10


def test_a_step_that_takes_seconds_is_not_called_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SLOW_SECONDS", 0.3)  # more than a busy machine takes for nothing
    calls: list[str] = []

    def step(name: str) -> None:
        calls.append(name)
        time.sleep(0.4)

    steps = {"a": lambda: step("a"), "b": lambda: step("b"), "quick": lambda: None}
    rows = interleave(steps, 9, seconds=0.05)
    assert calls == ["a", "b"]
    assert [row["samples"] for row in rows.values()] == [1, 1, measure.FEWEST]
    assert all(rows[name]["min_ms"] == rows[name]["median_ms"] >= 400 for name in "ab")


def test_time_limit_stops_a_loop_and_gives_the_timer_back() -> None:
    def loop() -> None:
        while time.monotonic() - began < 60:  # or the loop would end by itself, which is no error
            with contextlib.suppress(Exception):  # as a compiler's handler for ordinary errors might
                sum(range(1000))

    before = signal.getsignal(signal.SIGALRM)
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"the loop was stopped after 0 s"), time_limit(0.05, "the loop"):
        loop()
    assert signal.getsignal(signal.SIGALRM) is before


@pytest.mark.benchmark(timer=recorded_time)
def test_pytest_benchmark_keeps_the_interleaved_samples(benchmark: Any) -> None:
    replay(benchmark, {"all_ms": [3.0, 1.0, 2.0], "correct": True})
    assert benchmark.extra_info == {"correct": True}
    if benchmark.enabled:
        assert benchmark.stats.stats.data == pytest.approx([3e-3, 1e-3, 2e-3])


def test_the_ceiling_is_measured_and_a_share_of_it_is_a_rate() -> None:
    row = rows_of(eager=off_by(1e-6))["eager"]
    assert row["gflops"] == pytest.approx(10**6 / row["median_ms"] / 1e6)
    assert row["of_ceiling"] == pytest.approx(row["gflops"] / 100)
    assert 1 < MEASURE_CEILING() < 1e5


def test_a_column_without_figures_is_left_out() -> None:
    table = render("group", {"a": {"peak_mib": 2.0}})
    Console(quiet=True).print(table)
    assert [column.header for column in table.columns] == ["variant", "peak MiB"]

"""The benchmarks' own logic: what may call itself faster, what is missing, FLOPs, memory, samples."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import bench_model
import models
import peers
import pytest
import torch
import torch.nn.functional as F
from baselines import OneDNNLinears
from compare import compare, worst_ratio
from fake_machine import FakeMachine
from groups import KINDS, PAPER, SMALL, Candidate, Work
from measure import CpuMachine, Unavailable
from models import Training, count_flops, exact_training, make_batch, make_model
from report import Report, recorded_time, render, replay
from session import Session
from torch.utils._python_dispatch import TorchDispatchMode
from variants import AttentionBy, ours

import cast
from cast_kernels import _native
from cast_kernels.ops.bcast import flops as bcast_flops

TRUTH = {"x": torch.linspace(1, 2, 64, dtype=torch.float64)}
TINY = cast.CASTConfig(
    image_size=32, patch_size=16, num_frames=4, embed_dim=32, depth=2, num_heads=2, heads={"verb": 97, "noun": 300}
)
needs_core = pytest.mark.skipif(_native.CORE is None, reason="the native core is not built")


def off_by(relative: float) -> Candidate:
    """A candidate whose every value is wrong by this much."""
    return Candidate(lambda: time.sleep(1e-3), lambda: {"x": TRUTH["x"] * (1 + relative)})


def rows_of(**candidates: Any) -> dict[str, dict[str, Any]]:
    def refuse() -> Candidate:
        raise Unavailable("not installed; do this")

    builders = {name: (refuse if c is None else lambda c=c: c) for name, c in candidates.items()}
    work = Work(builders, lambda: TRUTH, lambda: 10**6, KINDS["fp32"], samples=3, seconds=1.0)
    return compare(CpuMachine(), work, list(candidates), 60.0, "cpu")  # type: ignore[arg-type]


# -- what may call itself faster


@pytest.mark.parametrize(("relative", "correct"), [(1.9e-6, True), (2.1e-6, False), (float("nan"), False)])
def test_only_a_correct_candidate_has_a_speedup(relative: float, correct: bool) -> None:
    row = rows_of(eager=off_by(1e-6), other=off_by(relative))["other"]
    assert row["correct"] == correct
    assert ("speedup" in row) == correct
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


@needs_core
def test_fused_and_unfused_training_steps_agree_and_the_error_is_seen() -> None:
    video, labels = make_batch(TINY, 1)
    rows = {"fused=False": {"backend": "eager"}, **ours("cpu", True)}

    def build(backend: str, **arguments: Any) -> Candidate:
        run = Training(make_model(TINY, **arguments).fuse(backend), video, labels)
        return Candidate(run.step, run.results)

    builders = {name: lambda options=options: build(**options) for name, options in rows.items()}
    exact = exact_training(make_model(TINY), video, labels)
    work = Work(builders, lambda: exact, lambda: 10**6, KINDS["fp32"], samples=3, seconds=0.0)
    found = compare(CpuMachine(), work, list(rows), 60.0, "cpu")  # type: ignore[arg-type]
    assert all(found[name]["correct"] for name in rows), found
    assert any(key.startswith("grad.blocks.0.cross_s_up") for key in exact)
    assert 0 < found["fused=False"]["error"] < 1e-5


def test_nothing_is_zero_and_models_of_one_variant_are_equal() -> None:
    made = [make_model(TINY, recompute=level).state_dict() for level in ("cheap", "nothing", "all")]
    assert all(torch.equal(made[0][key], model[key]) for model in made for key in made[0])
    assert all(x.double().std() > 0.01 for x in made[0].values())


def test_a_model_that_was_never_initialised_is_the_model_with_its_weights() -> None:
    """Nothing but the weights is left unset: positions that no checkpoint holds, for example."""
    made, ordinary = make_model(TINY), cast.CAST(TINY).eval()
    ordinary.load_state_dict(made.state_dict())
    assert {n: b.tolist() for n, b in made.named_buffers()} == {n: b.tolist() for n, b in ordinary.named_buffers()}
    video, _ = make_batch(TINY, 1)
    with torch.no_grad():
        assert all(torch.equal(x, y) for x, y in zip(made(video).values(), ordinary(video).values(), strict=True))


def test_no_weight_is_drawn_twice() -> None:
    """A run makes dozens of models: what initialises one first costs more than it."""

    class Drawn(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if torch.Tag.nondeterministic_seeded in func.tags and made.device.type != "meta":
                self.count += made.numel()
            return made

    with Drawn() as drawn:
        model = make_model(TINY)
    assert drawn.count == sum(x.numel() for x in model.parameters())


def test_what_no_row_needs_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs take a second or two a group: the first contact's rooms have no use for them."""
    group = next(group for group in bench_model.groups("cpu", SMALL) if group.name == "model training step fp32 B1")
    counted: list[int] = []
    monkeypatch.setattr(bench_model, "count_flops", lambda *_, **__: counted.append(1) or 5)
    work = group.work(CpuMachine())  # type: ignore[arg-type]
    assert not counted
    assert work.flops() == 5


# -- what is missing


PEER_ERRORS = """
import sys
import peers, torch
from models import exact_logits, make_batch, make_model
from test_benchmarks import TINY
video = make_batch(TINY, 1)[0]
logits = getattr(peers, sys.argv[1])(make_model(TINY, fused=False), video, 1)()
exact = exact_logits(make_model(TINY), video)
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


def test_what_raises_is_a_row_that_failed_and_the_others_are_measured() -> None:
    def broken() -> Candidate:
        raise KeyError("inside another library")

    builders = {"eager": lambda: off_by(1e-6), "broken": broken, "other": lambda: off_by(1e-6)}
    work = Work(builders, lambda: TRUTH, lambda: 10**6, KINDS["fp32"], samples=3, seconds=0.0)
    rows = compare(CpuMachine(), work, list(builders), 60.0, "cpu")  # type: ignore[arg-type]
    assert rows["broken"] == {"failed": "KeyError: 'inside another library'"}
    assert rows["other"]["speedup"]


class Step:
    """A step that its n-th call ends, and that holds something."""

    def __init__(self, last: int, error: Exception) -> None:
        self.left, self.error = last, error

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


@pytest.mark.parametrize("call", [1, 2, 3, 5, 8, "kept"])
def test_a_row_that_is_out_of_memory_costs_that_row_and_its_memory_is_free(call: int | str) -> None:
    """Whichever call it is: the first, the peak's, a time's, one with a cold cache, or the count of what is kept."""
    held: list[weakref.ref[Any]] = []

    class Freeing(FakeMachine):
        def free(self) -> None:
            gc.collect()
            self.log.append("free" if held[0]() is None else "held")

    def large() -> Candidate:
        def keep() -> int:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

        step = Step(call if isinstance(call, int) else 0, torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"))
        held.append(weakref.ref(step))
        return Candidate(step, lambda: {"x": TRUTH["x"]}, keep if call == "kept" else lambda: step.left)

    builders = {"large": large, "eager": lambda: off_by(1e-6), "other": lambda: off_by(1e-6)}
    work = Work(builders, lambda: TRUTH, lambda: 10**6, KINDS["fp32"], samples=3, seconds=0.0)
    machine, shown = Freeing(lambda: 10.0), []
    rows = compare(machine, work, ["eager", "large", "other"], 60.0, "cuda", lambda name, row: shown.append(name))
    assert rows["large"]["missing"].startswith("out of memory: CUDA out of memory. Tried")
    assert "more" not in rows["large"]["missing"]
    assert "free" in machine.log
    assert shown.count("large") >= 2
    for name in ("eager", "other"):
        assert not {"failed", "missing", "no_graph"} & rows[name].keys()
        for mode in ("", "cold_", "graph_", "graph_cold_"):
            assert len(rows[name][f"{mode}all_ms"]) == 3
            assert rows[name][f"{mode}speedup"] == 1


def test_a_step_that_raises_while_it_is_timed_is_a_row_that_failed() -> None:
    builders = {"eager": lambda: off_by(1e-6), "other": lambda: off_by(1e-6)}
    builders["broken"] = lambda: Candidate(Step(4, KeyError("inside")), lambda: TRUTH)
    work = Work(builders, lambda: TRUTH, lambda: 10**6, KINDS["fp32"], samples=5, seconds=0.0)
    rows = compare(CpuMachine(), work, ["eager", "broken", "other"], 60.0, "cpu")  # type: ignore[arg-type]
    assert rows["broken"]["failed"] == "KeyError: 'inside'"
    assert "median_ms" not in rows["broken"]
    assert rows["other"]["speedup"]


def test_what_a_first_step_allocates_for_good_is_no_peak() -> None:
    """An optimizer's state, for example: it was part of the peak where the results were of backward alone."""

    class Counting(FakeMachine):
        def peak_bytes(self, step: Any) -> int:
            before = calls[0]
            step()
            return (1 if before else 100) << 20

    calls = [0]

    def step() -> None:
        calls[0] += 1

    work = Work({"eager": lambda: Candidate(step, lambda: TRUTH)}, lambda: TRUTH, lambda: 1, KINDS["fp32"])
    assert compare(Counting(lambda: 10.0), work, ["eager"], 60.0, "cuda")["eager"]["peak_mib"] == 1


def test_torch_compile_is_reset_between_rows_and_nothing_is_compiled_while_it_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    compiled: set[str] = set()

    def reset() -> None:
        log.append("reset")
        compiled.clear()

    def build(name: str) -> Candidate:
        def step() -> None:
            if name.startswith("torch.compile") and name not in compiled:
                log.append(f"compile {name}")
                compiled.add(name)

        return Candidate(step, lambda: TRUTH)

    class Logging(CpuMachine):
        def elapsed_ms(self, step: Any, repeats: int = 1) -> float:
            log.append("time")
            return super().elapsed_ms(step, repeats)

    monkeypatch.setattr(torch._dynamo, "reset", reset)
    names = ["eager", "torch.compile, one", "torch.compile, two", "ours"]
    builders = {name: partial(build, name) for name in names}
    work = Work(builders, lambda: TRUTH, lambda: 1, KINDS["fp32"], samples=3, seconds=0.0)
    compare(Logging(), work, names, 60.0, "cpu")  # type: ignore[arg-type]
    one, two = "compile torch.compile, one", "compile torch.compile, two"
    assert log[:6] == ["reset", one, "reset", two, one, "time"]
    assert set(log[5:]) == {"time"}


def test_without_a_baseline_there_is_no_speedup() -> None:
    rows = rows_of(eager=None, other=off_by(1e-6))
    assert rows["eager"] == {"missing": "not installed; do this"}
    assert "speedup" not in rows["other"]
    assert rows["other"]["median_ms"] > 0


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
    assert count_flops(TINY, 1) == model_flops(TINY)
    for training in (False, True):  # so one clip's are counted
        assert models._flops(TINY, 3, training) == 3 * count_flops(TINY, 1, training)


def test_base_model_has_the_paper_s_multiply_adds() -> None:
    assert count_flops("base", 1) == pytest.approx(2 * 390.5e9, rel=1e-4)


def test_a_training_step_is_more_than_two_forwards_and_less_than_three() -> None:
    # Frozen weights need no gradient; inputs of every layer do, but those of the first block and the embeddings.
    config = cast.CASTConfig(depth=3)
    assert 2 < count_flops(config, 1, training=True) / count_flops(config, 1) < 3


# -- memory and time


@pytest.mark.benchmark(timer=recorded_time)
def test_pytest_benchmark_keeps_the_interleaved_samples(benchmark: Any) -> None:
    replay(benchmark, {"all_ms": [3.0, 1.0, 2.0], "correct": True})
    assert benchmark.extra_info == {"correct": True}
    if benchmark.enabled:
        assert benchmark.stats.stats.data == pytest.approx([3e-3, 1e-3, 2e-3])


@needs_core
def test_the_ceiling_is_measured_and_a_share_of_it_is_a_rate() -> None:
    session = Session("cpu", SMALL, 1.0, Report(None))
    session._measure_ceilings()
    ceiling = session.report.ceilings["fma_flops_per_s"]
    assert 1e9 < ceiling < 1e14
    rows = {"a": {"median_ms": 2.0}, "b": {"missing": "no"}}
    session._rate(rows, 10**9, 0, "torch.float32")
    assert rows["a"]["gflops"] == 500
    assert rows["a"]["of_ceiling"] == pytest.approx(5e11 / ceiling)
    assert rows["b"] == {"missing": "no"}


def test_a_bound_of_float32_is_none_of_bfloat16_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session("cpu", SMALL, 1.0, Report(None))
    session.report.ceilings = {"fma_flops_per_s": 1e12}
    for level, share in (("avx512", 0.5), ("avx512_bf16", None)):
        monkeypatch.setattr("cast_kernels._native.ISA", level)
        session._rate(rows := {"a": {"median_ms": 2.0}}, 10**9, 0, "torch.bfloat16")
        assert rows["a"].get("of_ceiling") == share


def test_shares_on_a_gpu_are_of_the_graph_s_time() -> None:
    session = Session("cuda", PAPER, 1.0, Report(None))
    session.report.ceilings = {"copy_bytes_per_s": 4e12, "gemm_flops_per_s": 1e15, "gemm_fp32_flops_per_s": 1e14}
    rows = {"a": {"median_ms": 2.0, "graph_median_ms": 1.0}}
    session._rate(rows, 5 * 10**11, 2 * 10**9, "torch.bfloat16")
    assert (rows["a"]["of_ceiling"], rows["a"]["of_copy"]) == (0.5, 0.5)


def test_another_librarys_attention_takes_pytorchs_place() -> None:
    seen = []

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(q.shape))
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    q, k, v = (torch.randn(5, 2, 7, 16) for _ in range(3))
    with AttentionBy(attention):
        mixed = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(mixed, F.scaled_dot_product_attention(q, k, v))
    assert seen == [(5, 7, 2, 16)]


# -- the prediction beside the measurement

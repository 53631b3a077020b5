"""What `recompute="auto"` does: a rule of shapes and of the device's whole memory, and of nothing else."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import ffn_cases
import pytest
import torch
from fake_gpu import fake_gpu, gpu_autocast, module_and_streams

import cast_kernels
from cast import CAST
from cast.model.layers import Running
from cast.training.settings import RunSettings
from cast_kernels import AdapterProblem, FFNProblem, Problem, Recompute, SelfAttentionProblem
from cast_kernels import recompute as levels
from cast_kernels.cpu import bcast as cpu_bcast

BF16, FP32 = torch.bfloat16, torch.float32
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
GIB = 2**30


def problems(batch: int) -> list[Any]:
    """The calls of one block of CAST-B that keep something, under AMP."""
    rest = {"dtype": FP32, "device": "cuda", "autocast": BF16}
    cheap = {"recompute": Recompute.CHEAP, **rest}
    return [
        Problem(batch, 8, 196, 768, 384, 12, "time", "space", **rest),  # type: ignore[arg-type]
        *(FFNProblem(batch * n, 768, 3072, 192, "gelu", **cheap) for n in (1576, 1568)),  # type: ignore[arg-type]
        SelfAttentionProblem(8 * batch, 197, 768, 12, 192, **cheap),  # type: ignore[arg-type]
        SelfAttentionProblem(batch, 1568, 768, 12, 192, **cheap),  # type: ignore[arg-type]
        AdapterProblem(batch * 1576, 768, 192, True, **cheap),  # type: ignore[arg-type]
    ]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Says how much memory every GPU has, in GiB. What is free must not be asked for."""

    def free(*_: object) -> None:
        raise AssertionError("the rule asked what is free at the moment")

    def have(gib: float) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        properties = SimpleNamespace(total_memory=int(gib * GIB))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index=None: properties)

    for name in ("mem_get_info", "memory_allocated", "memory_reserved", "memory_stats"):
        monkeypatch.setattr(torch.cuda, name, free)
    return have


@pytest.mark.parametrize(
    ("batch", "gib", "expected"),
    [
        (1, 80, "nothing"),
        (6, 80, "nothing"),
        (46, 80, "nothing"),
        (47, 80, "cheap"),
        (6, 12, "nothing"),
        (6, 10, "cheap"),
    ],
)
def test_the_rule(batch: int, gib: float, expected: str, memory: Callable[[float], None]) -> None:
    """Of an FFN, which keeps most."""
    memory(gib)
    _, ffn, *_ = problems(batch)
    assert levels.resolve("auto", ffn, GPU) == expected
    assert levels.kept(ffn, GPU) == batch * 1576 * (3072 + 192) * 2
    assert (levels.kept(ffn, GPU) <= levels.allowed(GPU)) == (expected == "nothing")


@pytest.mark.parametrize("batch", [1, 6, 32])
def test_predictions_are_of_the_level_that_the_gpus_take(batch: int, memory: Callable[[float], None]) -> None:
    """79.1 GiB: what an A100 or H100 of 80 GB says that it has, the least of the GPUs that are predicted."""
    memory(79.1)
    assert {levels.resolve("auto", problem, GPU) for problem in problems(batch)} == {"nothing"}


def test_a_step_keeps_at_most_a_sixth_of_the_memory(memory: Callable[[float], None]) -> None:
    """At the largest batch that keeps everything: what twelve blocks keep because of the rule."""
    memory(80)
    largest = max(b for b in range(1, 64) if all(levels.resolve("auto", p, GPU) == "nothing" for p in problems(b)))
    together = 12 * sum(levels.kept(problem, GPU) for problem in problems(largest)[:5])
    assert 80 * GIB / 8 < together < 80 * GIB / 6


def test_what_is_asked_for_is_what_runs(memory: Callable[[float], None]) -> None:
    memory(0.001)
    for problem in problems(1):
        assert levels.resolve("nothing", problem, GPU) == "nothing"
        assert [levels.resolve(level, problem, GPU) for level in ("auto", "cheap", "all")] == ["cheap", "cheap", "all"]
    memory(1000)
    for problem in problems(1):
        assert [levels.resolve(level, problem, GPU) for level in Recompute] == list(Recompute)
        assert levels.resolve("auto", problem, GPU) == "nothing"
        with torch.no_grad():
            assert levels.resolve("auto", problem, GPU) == "cheap"


def on_cpu(batch: int) -> list[Any]:
    """The same calls on a CPU, in float32."""
    return [replace(problem, device="cpu", autocast=None) for problem in problems(batch)]


@pytest.mark.parametrize(("gib", "largest"), [(8, 2), (16, 5), (24, 7), (64, 20)])
def test_the_rule_on_a_cpu(gib: float, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an exchange, which keeps most."""
    monkeypatch.setattr(levels, "_host_memory", lambda: int(gib * GIB))
    for batch, expected in [(largest, "nothing"), (largest + 1, "cheap")]:
        exchange, *rest = on_cpu(batch)
        assert levels.resolve("auto", exchange, CPU) == expected
        assert levels.kept(exchange, CPU) == batch * cpu_bcast.saved_words(exchange, "nothing") * 4
        assert all(levels.kept(one, CPU) < levels.kept(exchange, CPU) for one in rest)
    with torch.no_grad():
        assert levels.resolve("auto", on_cpu(1)[0], CPU) == "cheap"


def test_a_step_on_a_cpu_keeps_at_most_half_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the largest batch that keeps everything: what twelve blocks keep, and five streams a block."""
    monkeypatch.setattr(levels, "_host_memory", lambda: 24 * GIB)
    calls = on_cpu(7)
    streams = 5 * 7 * (1576 + 1568) // 2 * 768 * 4
    together = 12 * (sum(levels.kept(one, CPU) for one in calls[:5]) + streams)
    assert 24 * GIB / 3 < together < 24 * GIB / 2


def test_a_containers_and_a_launchers_share_of_the_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(levels, "_CONTAINER", (limit, tmp_path / "absent"))
    machine = levels._host_memory()
    assert machine == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for text, expected in [("max", machine), (str(machine * 2), machine), (str(GIB), GIB)]:
        limit.write_text(text + "\n")
        assert levels._host_memory() == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert levels._host_memory() == GIB // 4


def test_on_other_devices_it_is_cheap() -> None:
    for problem in problems(1):
        assert levels.resolve("auto", replace(problem, device="meta"), torch.device("meta")) == "cheap"
    assert levels.explain(problems(1)[0], torch.device("meta")) == "recompute='auto' is 'cheap' on meta"


def test_an_ops_problem_has_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ffn_cases.Case()
    for gib, expected in [(24, Recompute.NOTHING), (1e-6, Recompute.CHEAP)]:
        monkeypatch.setattr(levels, "_host_memory", lambda gib=gib: int(gib * GIB))
        assert cast_kernels.ops.ffn.pose(case.x(), case.parameters()).recompute is expected


def test_it_is_the_default_everywhere() -> None:
    assert Running().recompute == RunSettings().recompute == cast_kernels.BCAST(16, 16, 1, 2, 2).recompute == "auto"
    model = CAST("tiny", depth=1, num_frames=4, image_size=16)
    assert [block.recompute for _, block in model.cast_blocks()] == ["auto"]


def test_explain_prints_the_rules_numbers(memory: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    memory(80)
    _, ffn, *_ = problems(6)
    text = levels.explain(ffn, GPU)
    assert text == (
        "recompute='auto' is 'nothing': 'nothing' keeps 58.9 MiB of a call and is taken up to 455.1 MiB, 1/180 of the "
        "80.0 GiB of cuda:0"
    )
    monkeypatch.setattr(levels, "_host_memory", lambda: 16 * GIB)
    assert levels.explain(on_cpu(6)[0], CPU) == (
        "recompute='auto' is 'cheap': 'nothing' keeps 167.5 MiB of a call and is taken up to 146.3 MiB, 1/112 of the "
        "16.0 GiB of memory that a process has here"
    )
    module = cast_kernels.BCAST(16, 16, 1, 2, 3)
    assert "recompute='auto' is 'nothing'" in cast_kernels.explain(
        module, torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 3, 16)
    )


@pytest.mark.parametrize(("gib", "level"), [(80, "nothing"), (0.01, "cheap")])
def test_in_a_compiled_graph_it_is_a_constant(gib: float, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = torch.compiler.assume_constant_result(lambda index: int(gib * GIB))
    monkeypatch.setattr(levels, "_total_memory", known)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with fake_gpu(), gpu_autocast(BF16):
        module, *streams = module_and_streams(batch=2, backend="triton")
        torch.compile(module, fullgraph=True, backend=keep)(*streams)
    (call,) = [node for graph in graphs for node in graph.graph.nodes if "cast_kernels.bcast" in str(node.target)]
    assert level in call.args

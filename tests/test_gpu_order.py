"""The line of a report that says which backend `auto` should take first, and what a GPU without the other lacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from groups import PAPER
from measure import Unavailable
from variants import is_second, options_of, ours

from cast_kernels import backends
from cast_kernels.gpu import check as gpu_check
from cast_kernels.gpu import order
from cast_kernels.gpu import report as gpu_report

Groups = dict[str, dict[str, dict[str, Any]]]


def measured(**times: tuple[float, float]) -> Groups:
    """Groups of B-CAST by "kind_clips_work" -> milliseconds of Triton and of CUDA C++, as graphs."""
    groups = {}
    for key, pair in times.items():
        kind, clips, work = key.split("_")
        rows = {
            order.row_of(name): {
                "median_ms": 9.0,
                "spread_ms": [8.0, 9.5],
                "graph_median_ms": ms,
                "graph_spread_ms": [ms, ms],
                "correct": True,
            }
            for name, ms in zip(order.BACKENDS, pair, strict=True)
        }
        groups[f"bcast {kind} {clips} {work}: 768/384"] = rows
    return groups


def test_the_line_compares_what_auto_takes_in_its_order() -> None:
    assert order.BACKENDS == backends.BACKENDS[:2] == ("triton", "cuda")


@pytest.mark.parametrize(
    ("forward", "training", "said"),
    [
        ((0.2, 0.1), (0.4, 0.3), "so auto should take cuda first"),
        ((0.1, 0.2), (0.3, 0.4), "so auto should take triton first"),
        ((0.1, 0.1), (0.4, 0.3), "so auto should take cuda first"),
        ((0.1, 0.101), (0.4, 0.399), "they differ by at most 2%, so triton stays first"),
        (
            (0.2, 0.1), (0.3, 0.4),
            "cuda is faster forward, triton is faster forward and backward, so triton stays first: auto has one order",
        ),
    ],
)  # fmt: skip
def test_what_both_works_say(forward: tuple[float, float], training: tuple[float, float], said: str) -> None:
    line = order.line(measured(bf16_B6_inference=forward, bf16_B6_training=training))
    assert said in line
    assert "\n" not in line


def test_every_group_with_both_counts() -> None:
    groups = measured(bf16_B6_inference=(0.2, 0.1), amp_B1_inference=(0.1, 0.2), bf16_B6_training=(0.4, 0.3))
    groups |= {"ffn temporal bf16 B6 training: 768": {order.row_of("triton"): {"median_ms": 1.0}}}
    assert order.line(groups).split("; ") == [
        "auto's order: B-CAST forward: cuda needs 1.00x of triton's time (bf16 B6 0.1 of 0.2 ms, amp B1 0.2 of 0.1 ms)",
        "forward and backward: cuda needs 0.75x of triton's time (bf16 B6 0.3 of 0.4 ms)",
        "so auto should take cuda first",
    ]


def test_times_as_launched_count_where_one_has_no_graph() -> None:
    groups = measured(bf16_B6_inference=(0.2, 0.1), bf16_B6_training=(0.4, 0.3))
    for rows in groups.values():
        del rows[order.row_of("triton")]["graph_median_ms"]
    assert "(bf16 B6 9 of 9 ms)" in order.line(groups)


def test_one_work_alone_changes_nothing() -> None:
    line = order.line(measured(bf16_B6_training=(0.4, 0.3)))
    assert "B-CAST forward: not measured with both; forward and backward: cuda needs 0.75x" in line
    assert line.endswith("triton stays first until both works are measured")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"missing": "cuda:0 is sm_80; the CUDA kernels are for sm_90 (H100, H200) alone"}, "cuda: cuda:0 is sm_80"),
        ({"failed": "RuntimeError: a launch", "median_ms": 1.0}, "cuda: RuntimeError: a launch"),
        ({"median_ms": 1.0, "correct": False}, ""),
        ({"median_ms": 1.0, "stand_in": "an emulated device"}, "cuda: an emulated device"),
        ({}, ""),
    ],
)
def test_what_is_missing_wrong_or_stood_in_for_is_no_measurement(row: dict[str, Any], why: str) -> None:
    groups = measured(bf16_B6_training=(0.4, 0.3))
    next(iter(groups.values()))[order.row_of("cuda")] = row
    line = order.line(groups)
    assert line.startswith("auto's order: of triton and cuda no pair was measured at B-CAST")
    assert why in line
    assert line.endswith("it stays as it is")


def test_it_stands_at_the_end_of_the_report() -> None:
    times = {"groups": measured(bf16_B6_inference=(0.2, 0.1), bf16_B6_training=(0.4, 0.3))}
    about = {"name": "NVIDIA H100", "capability": "sm_90"}
    found = {"cast_kernels": "0", "device": about, "correctness": [], "sanitizer": [], "broken": [], "times": times}
    lines = gpu_report.markdown(found, passed=True).rstrip().splitlines()
    assert lines[-3] == order.line(times["groups"])
    assert lines[-1] == "all is right; please send the report"


# -- rows of GPUs that lack the kernels


@pytest.mark.parametrize(("capability", "code"), [("sm_80", 0), ("sm_90", 3)])
def test_another_gpu_lacks_nothing_without_the_kernels_of_hopper(capability: str, code: int) -> None:
    left_out = {"backend": "cuda", "dtype": "bf16", "case": "one", "left_out": "cuda:0 is sm_80"}
    right = {"backend": "triton", "ok": True, "same_bits_twice": True}
    rows = {
        "cast_kernels, triton": {"median_ms": 1.0, "spread_ms": [1.0, 1.0]},
        "cast_kernels, cuda": {"missing": "cuda:0 is sm_80"},
    }
    found = {
        "device": {"name": "NVIDIA", "capability": capability}, "correctness": [right, left_out], "sanitizer": [],
        "times": {"groups": {"bcast bf16 B6 training: 768": rows}}, "broken": [],
    }  # fmt: skip
    assert gpu_check.status(found) == code
    assert ("left out", "cuda", "bf16", "one", "-", "-", "-", "cuda:0 is sm_80") in gpu_report.sections(
        found | {"correctness": [left_out]}
    )[2 if code else 1][2]


def test_rows_of_cuda_are_those_that_it_has_kernels_for() -> None:
    assert "cast_kernels, cuda" in ours("cuda", False)
    assert "cast_kernels, cuda" not in ours("cuda", False, torch.float32)
    assert "cast_kernels, cuda" not in ours("cuda", False, op="ffn")
    assert "cast_kernels, cuda" not in ours("cpu", False)
    assert [name for name in ours("cuda", True) if is_second(name)] == [
        f"cast_kernels, cuda, recompute={level}" for level in ("nothing", "cheap", "all")
    ]


def test_where_it_cannot_run_its_row_says_why() -> None:
    with pytest.raises(Unavailable, match=r"the CUDA kernels (run on cuda|are not built)"):
        options_of("cast_kernels, cuda", torch.device("cpu"))
    assert options_of("cast_kernels, triton", torch.device("cpu")) == {"backend": "triton"}


def test_the_first_rows_have_both_in_each_work_of_b_cast_and_of_the_model() -> None:
    import bench_bcast
    import bench_model

    groups = [*bench_bcast.groups("cuda", PAPER), *bench_model.groups("cuda", PAPER)]
    first = {group.name: group.of_tier("first") for group in groups if group.first}
    assert first["bcast bf16 B6 inference"] == ("eager, published code", *map(order.row_of, order.BACKENDS))
    for name, rows in first.items():
        assert order.row_of("triton") in rows, name
        assert order.row_of("cuda") in rows or name.endswith("memory amp B6"), name

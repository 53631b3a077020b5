"""The speed model's arithmetic, eager's model, and the predictions that are committed."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ptx_emulator.predict.counters import Counters
from ptx_emulator.predict.devices import DEVICES, device
from ptx_emulator.predict.model import busiest
from ptx_emulator.predict.resources import Resources
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import Argument, Launch, Recorder, offline_driver
from ptx_emulator.triton.launcher import EmulationFault, Emulator

from cast_kernels.cli import main
from cast_kernels.evidence import eager_model, model, trace
from cast_kernels.evidence import predict as predicting
from cast_kernels.evidence import prediction_report as report
from cast_kernels.evidence.cases import Case, run
from cast_kernels.evidence.corrections import Corrections
from cast_kernels.evidence.problems import PREDICTED

PREDICTIONS = Path(__file__).parent.parent / "benchmarks/predictions"
H100 = device("H100")
SMALL = Case(2, 3, 7, 64, 32, 2)
#: Triton puts strings before an entry, with braces of their own.
PTX = (
    ".global .align 1 .b8 words[2] = {97, 0};\n"
    ".entry k(.param .u64 k_param_0, .param .u64 k_param_1)\n{\nld.param.b64 %rd1, [k_param_0];\n}\n"
)


def launched(ctas: int, arch: str = "sm_90") -> Launch:
    """A launch of a kernel that uses the first of its two tensors, 3000 bytes."""
    tensors = (Argument("x", "*bf16", torch.zeros(1500, dtype=torch.bfloat16)), Argument("y", "*fp32", torch.zeros(9)))
    return Launch("k", target(arch), (ctas, 1, 1), tensors, {}, {"ptx": PTX}, SimpleNamespace(hash="k"))


def taking(ctas: int) -> Resources:
    return Resources(128, 0, 0, 0, 50_000, ctas, 0.5, "HGMMA", 1, 0, 0, 100)


@pytest.mark.parametrize(
    ("counters", "bound", "cycles"),
    [
        (Counters({"wgmma": 4096.0 * 0.92 * 1000}), "tensor", 1000),
        (Counters({"mma": 2731.0 * 0.92 * 1000}), "tensor", 1000),
        (Counters({"wgmma.tf32": 4096.0 * 0.92 * 1000}), "tensor", 2000),
        (Counters({}, shared_wavefronts=700, load_sectors=1200), "shared", 1000),
        (Counters({}, warp_instructions=8000), "issue", 1000),
    ],
)
def test_each_ceiling_of_one_cta(counters: Counters, bound: str, cycles: float) -> None:
    made = model.predict(launched(1), taking(2), [counters], 0.5, H100)
    assert made.bound_by == bound
    assert made.us == pytest.approx(1e6 * cycles / 1.6e9)


@pytest.mark.parametrize(("ctas", "on_the_busiest"), [(1, 1), (132, 1), (133, 2), (264, 2), (265, 3)])
def test_the_busiest_multiprocessor_decides(ctas: int, on_the_busiest: int) -> None:
    made = model.predict(launched(ctas), taking(2), [Counters({}, warp_instructions=4000.0)], 1.0, H100)
    assert made.issue == pytest.approx(on_the_busiest * 1e6 * 1000 / 1.6e9)
    assert made.waves == pytest.approx(ctas / 264)


def test_ctas_that_differ_fill_the_multiprocessors_in_their_order() -> None:
    """Four long ones and six short ones for four processors: 5 + 3, 5 + 3, 5 + 3, 5 + 3 and two more behind."""
    long, short = (5.0, 1.0), (2.0, 3.0)
    assert busiest([long] * 4 + [short] * 4, 4) == (7.0, 4.0)
    assert busiest([long] * 4 + [short] * 6, 4) == (9.0, 7.0)
    assert busiest([short] * 6 + [long] * 4, 4) == (9.0, 7.0)
    assert busiest([long], 4) == long


def test_each_traced_cta_stands_for_its_share_of_the_grid() -> None:
    heavy, light = (Counters({}, 0.0, 100.0, 0.0, instructions) for instructions in (8000.0, 4000.0))
    made = model.predict(launched(264), taking(1), [heavy, light], 1.0, H100)
    assert made.issue == pytest.approx(1e6 * 3000 / 1.6e9)
    assert made.l2 == pytest.approx(1e6 * 264 * 100 * 32 / 5.5e12)


def test_memory_ceilings_do_not_depend_on_the_grid() -> None:
    for ctas in (1000, 10_000):
        one = Counters({}, load_sectors=3e6 / ctas, store_sectors=1e6 / ctas)
        made = model.predict(launched(ctas), taking(2), [one], 1.0, H100)
        assert made.l2 == pytest.approx(1e6 * 4e6 * 32 / 5.5e12)
        assert made.dram_bytes == 3000  # the other tensor is a parameter that the compiler dropped
        assert made.dram == pytest.approx(1e6 * 3000 / 3.0e12)


def test_the_floor_is_a_roofline_at_the_best_instruction() -> None:
    made = model.predict(launched(132), taking(2), [Counters({"mma": 1e9 / 132})], 1.0, H100)
    best, other = H100.tensor["wgmma"], H100.tensor["mma"]
    assert best > other
    assert made.floor == pytest.approx(1e6 * 1e9 / (best * H100.efficiency * H100.clock * H100.target.processors))


def test_what_does_not_fit_is_said() -> None:
    made = model.predict(launched(1), taking(0), [Counters()], 1.0, H100)
    assert "no CTA fits" in made.why_not
    runs = [report.PhasePrediction("H100", 6, "forward", (made,))]
    assert report.failures(runs) == [f"FAIL  H100 k: {made.why_not}"]


def test_another_targets_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="compiled for sm_80; H100 is sm_90"):
        model.predict(launched(1, "sm_80"), taking(1), [Counters()], 1.0, H100)
    with pytest.raises(ValueError, match="'V100'; allowed: A100, H100, H200"):
        device("V100")


def test_every_constant_has_a_source() -> None:
    assert tuple(DEVICES) == PREDICTED
    for goal in DEVICES.values():
        for constant in (goal.clock, goal.efficiency, goal.l2, goal.dram, *goal.tensor.values()):
            assert constant.source
            assert constant.unit


@pytest.mark.parametrize("kind", eager_model.EAGER)
def test_eagers_operations_are_all_there(kind: str) -> None:
    """FLOPs of the paper's B-CAST with six clips, counted by hand: 47.4e9 forward."""
    case = Case(batch=6)
    rows, d, wide = 6 * 8 * 196, case.bottleneck, case.dim
    cls = 6 * 8
    products = 2 * (2 * rows + cls) * d * wide * 2 + 2 * rows * d * d * 4 * 2
    attention = 4 * rows * d * (8 + 196)
    forward, backward = eager_model.trace(case, kind)
    assert sum(operation.flops for operation in forward) == products + attention
    assert sum(operation.flops for operation in backward) == 2 * products + attention // 4 * 10
    streams = (2 * rows + cls) * wide * 2
    assert sum(operation.bytes for operation in forward) > 5 * streams
    assert not any("view" in operation.name or "empty" in operation.name for operation in forward)


def test_autocast_costs_kernels() -> None:
    plain, amp, amp16 = (eager_model.trace(SMALL, kind)[0] for kind in eager_model.EAGER)
    assert len(amp) > len(plain)
    assert sum(o.bytes for o in amp) > sum(o.bytes for o in amp16)  # residual sums of float32 streams
    assert eager_model.seconds(plain, H100) == pytest.approx(len(plain) * 2.5e-6)  # small ones cost a launch each


class Both(Emulator):
    """Runs each launch and traces it."""

    def __init__(self) -> None:
        super().__init__()
        self.traced: dict[str, Counter[str]] = defaultdict(Counter)

    def launch(self, launch: Launch) -> None:
        counted = trace.trace(launch, samples=1 << 30)
        self.traced[launch.kernel].update(tensor=round(counted.flops), instructions=round(counted.warp_instructions))
        with suppress(EmulationFault):  # faults are tested elsewhere; the counters are there
            super().launch(launch)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_trace_counts_what_the_emulator_executes(arch: str, tmp_path: Path) -> None:
    case = replace(SMALL, backward=arch == "sm_80")  # the other half of the kernels would take as long again
    with offline_driver(target(arch), Both(), tmp_path) as both:
        run(case, "triton", torch.bfloat16)
    assert both.runs.keys() == both.traced.keys()
    for name, runs in both.runs.items():
        traced = both.traced[name]
        assert traced["tensor"] == runs.counters["tensor_flops"]
        # A branch that the data of a run happen not to take is traced, not executed.
        assert 1.0 <= traced["instructions"] / runs.counters["warp_instructions"] < 1.05


class Corrected(Recorder):
    """Keeps each kernel's counters before and after correction."""

    def __init__(self) -> None:
        super().__init__()
        self.corrections, self.seen = Corrections(), []

    def launch(self, launch: Launch) -> None:
        traced = trace.trace(launch)
        self.seen.append((launch.kernel, traced, self.corrections.apply(launch, traced)))


def test_a_sample_in_emulation_corrects_the_trace(tmp_path: Path) -> None:
    with offline_driver(target("sm_80"), Corrected(), tmp_path) as kept:
        run(replace(SMALL, backward=False), "triton", torch.bfloat16)
    assert [name for name, _, _ in kept.seen] == ["project", "exchange"]
    for _, traced, corrected in kept.seen:
        assert corrected.tensor_flops == traced.tensor_flops
        assert corrected.load_sectors < traced.load_sectors  # 42 rows do not fill the tiles: lanes are masked
        assert corrected.warp_instructions == pytest.approx(traced.warp_instructions, rel=0.05)


def test_phases_and_totals(tmp_path: Path) -> None:
    runs = predicting.predict("A100", [SMALL], tmp_path)
    assert [run.phase for run in runs] == list(report.PHASES)
    assert [p.kernel for p in runs[0].launches] == ["cast", "project", "exchange"]  # under autocast
    assert {"weight_gradient", "project_backward"} < {p.kernel for p in runs[2].launches}
    for one in runs:
        assert one.us == pytest.approx(sum(p.us for p in one.launches))
        assert one.us >= one.floor > 0


def test_goals_are_held_against_predictions() -> None:
    found = {
        "kind": "bf16",
        "devices": {
            "H100": {"batches": [{"batch": 6, "us": {"inference": 120.0, "forward": 131.0, "backward": 250.0}}]}
        },
    }
    assert report.targets(found) == [
        "met     H100, B=6, inference: 120 us, goal 130 us",
        "missed  H100, B=6, forward: 131 us, goal 130 us",
        "met     H100, B=6, backward / forward: 1.91, goal 2.2",
    ]


FOLDERS = [f"{kind}/{level}" for kind in ("bf16", "amp") for level in ("nothing", "cheap")]


@pytest.mark.parametrize("name", FOLDERS)
def test_committed_predictions_are_labelled_and_their_table_is_theirs(name: str) -> None:
    folder = PREDICTIONS / name
    assert {path.stem for path in folder.glob("*.json")} == {"a100", "h100", "h200"}
    for path in folder.glob("*.json"):
        found = json.loads(path.read_text())
        assert found["label"] == "predicted, unvalidated: no kernel of ours has been timed"
        assert found["uncertainty"] == 0.40
        assert f"{found['kind']}/{found['recompute']}" == name
        (entry,) = found["devices"].values()
        assert [one["batch"] for one in entry["batches"]] == [1, 6, 32]
        for one in entry["batches"]:
            for phase in report.PHASES:
                assert one["us"][phase] == pytest.approx(sum(p["us"] for p in one["launches"][phase]))
                assert one["us"][phase] >= one["floor_us"][phase]
    text = (folder / "README.md").read_text()
    assert text == report.markdown(folder)
    assert "no kernel of ours has been timed" in text


def test_the_committed_prediction_under_autocast_is_what_training_runs() -> None:
    found = json.loads((PREDICTIONS / "amp/nothing/h100.json").read_text())
    assert (found["kind"], found["label"]) == ("amp", "predicted, unvalidated: no kernel of ours has been timed")
    case = Case(batch=1)
    (one,) = (b for b in found["devices"]["H100"]["batches"] if b["batch"] == 1)
    assert not any(p["why_not"] for launches in one["launches"].values() for p in launches)
    forward, _ = eager_model.trace(case, "amp")
    (eager,) = (e for e in one["eager"] if (e["kind"], e["phase"]) == ("amp", "forward"))
    assert eager["us"] == pytest.approx(1e6 * eager_model.seconds(forward, H100))
    assert eager["kernels"] == len(forward)


def test_the_level_that_is_asked_for_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Case] = []

    def record(name: object, cases: list[Case], *rest: object) -> list[object]:
        asked.extend(cases)
        return []

    monkeypatch.setattr(predicting, "predict", record)
    monkeypatch.setattr(predicting, "eager_predictions", record)
    main(["predict", "--device", "H100", "--batch", "1", "6", "--recompute", "all"])
    assert {(case.batch, case.recompute) for case in asked} == {(1, "all"), (6, "all")}


@pytest.mark.parametrize(
    "arguments", [["--device", "V100"], ["--batch", "0"], ["--batch", "some"], ["--recompute", "some"]]
)
def test_bad_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["predict", *arguments])
    assert caught.value.code == 2
    assert arguments[1] in capsys.readouterr().err

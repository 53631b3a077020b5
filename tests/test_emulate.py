"""`cast-kernels emulate`: B-CAST's forward and backward from compiled PTX, on the product's own launch path."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import engines
import pytest
import torch
from kernel_cache import KERNELS
from ptx_emulator.targets import EMULATED, target
from ptx_emulator.triton.driver import Launch
from ptx_emulator.triton.launcher import Emulator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cast_kernels.evidence import emulate as emulating
from cast_kernels.evidence.cases import KINDS, Case, compare, poisoned_memory, run
from cast_kernels.evidence.emulate import Outcome, emulate
from cast_kernels.evidence.problems import ENGINES, SIZES
from cast_kernels.evidence.useful import useful_flops
from cast_kernels.triton import tiles

TARGETS = EMULATED
SMALL = SIZES["small"][0]


def table(outcome: Outcome) -> str:
    lines = [f"{'ok  ' if e.ok else 'FAIL'} {e.name} {e.rms:.2e} (eager {e.eager_rms:.2e})" for e in outcome.errors]
    return "\n".join([outcome.fault, *lines])


@pytest.mark.parametrize("name", TARGETS)
def test_forward_and_backward_run_from_compiled_code(name: str) -> None:
    outcome = emulate(target(name), SMALL, "bf16", KERNELS)
    assert outcome.ok, table(outcome)
    assert len(outcome.errors) > 30
    assert {
        "project",
        "exchange",
        "exchange_backward",
        "attention_backward",
        "weight_gradient",
    } <= outcome.kernels.keys()
    assert all(runs.counters["warp_instructions"] > 0 for runs in outcome.kernels.values())


@pytest.mark.skipif(not engines.built(), reason="the vector machine is not built")
@pytest.mark.parametrize("name", TARGETS)
def test_the_native_engine_runs_all_of_it_alike(name: str) -> None:
    definition, native = (emulate(target(name), SMALL, "bf16", KERNELS, engine=engine) for engine in ENGINES)
    assert (definition.engine, native.engine) == ("interpreter", "native")
    assert native.errors == definition.errors, table(native)
    assert native.kernels.keys() == definition.kernels.keys()
    for kernel, runs in native.kernels.items():
        assert runs.counters == definition.kernels[kernel].counters, kernel
        assert dict(runs.interpreted) == {}, kernel


def test_a_block_without_any_key_of_a_row() -> None:
    """Its scores are the mask; a fused multiply-add must leave nothing of its product's rounding to exp2."""
    outcome = emulate(target("sm_80"), replace(SIZES["small"][4], backward=False), "bf16", KERNELS)
    assert outcome.case.bottleneck // outcome.case.heads == 16  # its factor rounds up, that of 32 channels down
    assert outcome.ok, table(outcome)


@pytest.mark.parametrize("kind", ["bf16", "amp"])
def test_tiles_for_many_rows_run_from_compiled_code_too(kind: str) -> None:
    """The other tests' few rows take sm_90's tiles for few; float32 streams have one of their own for many."""
    known = tiles.find_set("sm_90", 16, SMALL.bottleneck)
    assert known.few_rows > 0
    with tiles.trying("sm_90", 16, SMALL.bottleneck, replace(known, few={})):
        outcome = emulate(target("sm_90"), replace(SMALL, backward=False), kind, KERNELS)
    assert outcome.ok, table(outcome)


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [kind for kind in KINDS if kind != "amp16"])
@pytest.mark.parametrize("case", [*SIZES["small"], *SIZES["paper"]], ids=str)
@pytest.mark.parametrize("name", TARGETS)
def test_every_problem(name: str, case: Case, dtype: str) -> None:
    outcome = emulate(target(name), case, dtype, KERNELS)
    assert outcome.ok, table(outcome)


def test_a_wrong_value_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward's PTX with a logarithm where the softmax has its exponential."""

    def wrong(launch: Launch) -> str:
        return (
            launch.asm["ptx"]
            .replace("ex2.approx.ftz.f32", "lg2.approx.ftz.f32")
            .replace("ex2.approx.f32", "lg2.approx.f32")
        )

    monkeypatch.setattr(emulating, "Emulator", lambda engine: Emulator(wrong, engine=engine))
    outcome = emulate(target("sm_80"), replace(SMALL, backward=False), "bf16", KERNELS)
    assert not outcome.fault
    assert not outcome.ok


def test_what_is_left_unwritten_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the exchange's stores, outputs hold what new memory is filled with."""

    def silent(launch: Launch) -> str:
        lines = launch.asm["ptx"].splitlines()
        keep = launch.kernel != "exchange"
        return "\n".join(line for line in lines if keep or "st.global" not in line)

    monkeypatch.setattr(emulating, "Emulator", lambda engine: Emulator(silent, engine=engine))
    outcome = emulate(target("sm_80"), replace(SMALL, backward=False), "bf16", KERNELS)
    assert [e.rms != e.rms for e in outcome.errors] == [True, True]
    assert not outcome.ok


def test_a_fault_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_barriers(launch: Launch) -> str:
        return "\n".join(line for line in launch.asm["ptx"].splitlines() if "bar.sync" not in line)

    monkeypatch.setattr(emulating, "Emulator", lambda engine: Emulator(no_barriers, engine=engine))
    outcome = emulate(target("sm_80"), replace(SMALL, backward=False), "bf16", KERNELS)
    assert "write-read" in outcome.fault
    assert not outcome.ok


def fake(**numbers: list[float]) -> dict[str, Tensor]:
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in numbers.items()}


@pytest.mark.parametrize(
    ("ours", "ok"),
    [
        ([1.01, 2.0], True),
        ([1.019, 2.0], True),
        ([1.021, 2.0], False),  # twice eager's root mean square
        ([1.0, float("nan")], False),
        ([1.0, 2.0 + 1e-9], True),
    ],
)
def test_the_gate(ours: list[float], ok: bool) -> None:
    (error,) = compare(fake(x=ours), fake(x=[1.01, 2.0]), fake(x=[1.0, 2.0]))
    assert error.ok == ok


def test_where_nothing_errs_there_is_a_ratio() -> None:
    """A gradient that drop-path zeroed, in ours, eager and fp64."""
    for ours, ratio in ((0.0, 0.0), (1e-9, float("inf"))):
        (error,) = compare(fake(x=[ours, 0.0]), fake(x=[0.0, 0.0]), fake(x=[0.0, 0.0]))
        assert (error.ratio, error.ok) == (ratio, ratio == 0)


def counted(case: Case) -> int:
    """FLOPs of eager's products, as PyTorch counts them."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        run(case, "eager", torch.float32)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("case", [SMALL, *SIZES["small"][1:]], ids=str)
def test_useful_flops_are_those_that_pytorch_counts(case: Case) -> None:
    forward = replace(case, backward=False)
    assert sum(useful_flops(forward).values()) == counted(forward)
    kept, cheap, everything = (useful_flops(replace(case, recompute=r)) for r in ("nothing", "cheap", "all"))
    # The scores twice and dP once more than with scores kept in memory.
    again = kept["attention_backward"] * 3 // 7
    assert sum(kept.values()) - again == counted(case)
    assert kept.total() < cheap.total() < everything.total()


def test_one_wrong_element_cannot_hide() -> None:
    exact, eager, ours = torch.zeros(10000).double(), torch.full((10000,), 0.01).double(), torch.zeros(10000).double()
    ours[7] = 0.05
    (error,) = compare({"x": ours}, {"x": eager}, {"x": exact})
    assert error.rms < error.eager_rms
    assert not error.ok


def test_tensors_that_are_missing_are_named() -> None:
    with pytest.raises(ValueError, match="grad: not in all"):
        compare(fake(x=[1.0]), fake(x=[1.0], grad=[1.0]), fake(x=[1.0]))


def test_all_arithmetics_see_the_same_rounded_numbers() -> None:
    """A stream that receives nothing returns its input: float64 gets the bfloat16 numbers, not the drawn ones."""
    case = replace(SMALL, directions=("t2s",), backward=False)
    exact, eager = run(case, None, torch.bfloat16, exact=True), run(case, "eager", torch.bfloat16)
    assert torch.equal(exact["temporal"], eager["temporal"])
    assert not torch.equal(exact["temporal"], run(case, None, torch.float32)["temporal"])


def test_new_memory_is_poisoned_and_only_inside() -> None:
    with poisoned_memory():
        assert torch.empty(1000).isnan().all()
        assert torch.ones(3, dtype=torch.bfloat16).new_empty(7).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("bad", "code"), [(False, 0), (True, 1)])
def test_the_command(
    bad: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = [emulate(target("sm_80"), replace(SMALL, backward=False), "fp32", KERNELS)]
    if bad:
        outcomes[0].fault = "a race"
    monkeypatch.setattr(emulating, "emulate", lambda *_, engine: outcomes[0])
    monkeypatch.setattr(emulating, "SIZES", {"small": (SMALL,)})
    assert emulating.main(["sm_80"], ["fp32"], "small", tmp_path / "told.json") == code
    out = capsys.readouterr().out
    assert f"1 runs in emulation, {code} failed" in out
    assert ("FAIL  a race" in out) == bad
    (told,) = json.loads((tmp_path / "told.json").read_text())
    assert told["ok"] != bad
    assert told["date"]
    assert {k["kernel"] for k in told["kernels"]} == {"project", "exchange"}
    assert told["kernels"][0]["counters"]["tensor_flops"] > 0


def test_a_file_of_runs_keeps_the_others(tmp_path: Path) -> None:
    """A run takes the place of the same one: of its target, dtype, sizes and engine."""
    runs = [
        {"target": target, "dtype": "bf16", "case": {"windows": ("time", "space")}, "engine": engine, "seconds": 1}
        for target in TARGETS
        for engine in ENGINES
    ]
    for run_ in [*runs, runs[1] | {"seconds": 2}]:
        emulating.keep(run_, tmp_path / "runs.json")
    kept = json.loads((tmp_path / "runs.json").read_text())
    assert [(run_["target"], run_["engine"], run_["seconds"]) for run_ in kept] == [
        (one["target"], one["engine"], 2 if one is runs[1] else 1) for one in runs
    ]

"""The model of the CUDA C++ kernels: its arithmetic beside small cases that are counted by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from ptx_emulator.predict.devices import device

from cast_kernels.cli import main
from cast_kernels.evidence.cuda_model import design, launches, report, rows, tables, triton
from cast_kernels.evidence.cuda_model.arithmetic import USUAL, Cta, Launch, predict, usable, wait_cycles
from cast_kernels.evidence.cuda_model.attention import attention, long_tiles, warp_keys
from cast_kernels.evidence.cuda_model.problem import Choice, Sizes, useful
from cast_kernels.triton import tiles

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks/predictions/cuda"
H100 = device("H100")
SIX = Sizes(6)


def dram(kernel: str, sizes: Sizes, phase: str) -> int:
    """Bytes of one of Triton's launches, as counted from the tensors that the product launched with."""
    kind = "amp" if sizes.cast else "bf16"
    path = ROOT / f"benchmarks/predictions/{kind}/{sizes.recompute}/h100.json"
    for batch in json.loads(path.read_text())["devices"]["H100"]["batches"]:
        if batch["batch"] == sizes.batch:
            return int(sum(one["dram_bytes"] for one in batch["launches"][phase] if one["kernel"] == kernel))
    raise KeyError(kernel)


@pytest.mark.parametrize("name", ["A100", "H100", "H200"])
@pytest.mark.parametrize("stream_bytes", [2, 4])
def test_tritons_row_without_the_added_terms_is_the_committed_prediction(name: str, stream_bytes: int) -> None:
    for batch in (1, 6, 32):
        for phase in ("forward", "backward"):
            sizes = Sizes(batch, stream_bytes=stream_bytes)
            for one in triton.launches(device(name), sizes, phase, ()):
                assert one.us == pytest.approx(one.committed)


def test_each_added_term_explains_its_part_of_tritons_row() -> None:
    for phase in ("forward", "backward"):
        plain = triton.launches(H100, SIX, phase, ())
        gaps = triton.launches(H100, SIX, phase, ("gaps",))
        assert [b.us - a.us for a, b in zip(plain, gaps, strict=True)] == pytest.approx([1.0] * len(plain))
        every = triton.launches(H100, SIX, phase)
        for before, after in zip(plain, every, strict=True):
            most = max(before.us, after.parts["intake"]) + after.waits + after.spills + 1.0
            assert before.us < after.us <= most + 1e-9


def test_tritons_spills_are_those_that_the_compiler_reported() -> None:
    """`project`: 734 instructions, 8 warps, 32 lanes, 4 bytes; of 760 bytes a lane L1 holds 65,536 of 256 lanes'."""
    expected = 734 * 8 * 32 * 4 * (1 - 65536 / (760 * 256))
    assert triton.spill_bytes("project", "sm_90", "cheap", few=False, phase="forward") == pytest.approx(expected)
    assert triton.spill_bytes("weight_gradient", "sm_90", "cheap", few=False, phase="backward") == 0


@pytest.mark.parametrize("batch", [1, 6, 32])
def test_tritons_programs_are_those_of_its_tiles(batch: int) -> None:
    sizes = Sizes(batch)
    for one in triton.launches(H100, sizes, "forward"):
        tile = tiles.find("sm_90", one.name, 16, sizes.d, sizes.all_rows)
        assert one.programs == sum(-(-count // tile.rows) for count in sizes.rows.values())
        assert tile.warps == triton.warps(one.name, H100, sizes)


@pytest.mark.parametrize(("count", "per_sm", "behind"), [(132, 1, 1), (133, 1, 2), (264, 2, 2), (265, 2, 3)])
def test_whole_ctas_go_to_whole_multiprocessors(count: int, per_sm: int, behind: int) -> None:
    cta = Cta({"wgmma": 4096 * 0.92 * 10_000}, epilogue=4000)  # 10,000 cycles of tensor cores
    wait = 1000 + 4000 / 4 / 0.6
    assert wait_cycles(cta) == pytest.approx(wait)
    time = predict(Launch("one", [(count, cta)], 0, 0, per_sm=per_sm), H100)
    cycles = behind * (10_000 + wait) if per_sm == 1 else behind * 10_000 + wait
    assert time.rounds == behind
    assert time.us == pytest.approx(cycles / 1600 + 1)


def test_what_nothing_hides_is_longer_than_products() -> None:
    """Two CTAs on a multiprocessor, each alone in its wait: three of them are two behind each other."""
    cta = Cta({"wgmma": 4096 * 0.92 * 1000}, epilogue=48_000)
    wait = 1000 + 48_000 / 4 / 0.6
    time = predict(Launch("one", [(132 * 3, cta)], 0, 0, per_sm=2), H100)
    assert time.us == pytest.approx(2 * (1000 + wait) / 1600 + 1)
    late = predict(Launch("one", [(132, Cta({"wgmma": 4096.0}))], 0, 0), H100)
    assert late.bound_by == "waits"


def test_ctas_that_wait_together_hide_nothing() -> None:
    """Four CTAs, two at once: two waits behind each other instead of the last one."""
    cta = Cta({"wgmma": 4096 * 0.92 * 10_000}, epilogue=4000)
    wait = 1000 + 4000 / 4 / 0.6
    time = predict(Launch("one", [(4 * 132, cta)], 0, 0, per_sm=2), H100, replace(USUAL, hides=0.0))
    assert time.us == pytest.approx((4 * 10_000 + 2.5 * wait) / 1600 + 1)


def test_clusters_lie_inside_of_gpcs() -> None:
    assert usable(132, 1, 1) == usable(132, 2, 1) == 132
    assert usable(132, 4, 1) == 128  # two of 18 multiprocessors leave two each
    assert usable(132, 4, 2) == 264


def test_projects_cta_is_what_a_hand_counts() -> None:
    """64 rows of bf16: x W' is 768 x 384, from the ring; Q, K, V are 384 x 1152, from registers."""
    cta = rows.project(SIX, Choice()).ctas[0][1]
    weights = 2 * (768 * 384 + 384 * 1152)
    x, steps = 64 * 768 * 2, 24 + 36  # of 192 x 64 weights
    assert cta.flops == 2 * 64 * (768 * 384 + 384 * 1152)
    assert cta.shared == weights + x + steps * 192 * 64 * 2 + 24 * 64 * 64 * 2  # TMA writes; wgmma reads both sides
    table = 64 * 2 * 384 * 4  # a row of float32 keys and values for each of 64 patches
    assert cta.intake == weights + x + table
    assert cta.staged == 2 * (64 * 4 * 384 * 2 + table)


def test_bytes_of_row_kernels_are_tritons_but_for_what_the_design_changes() -> None:
    """Triton's are counted from the tensors that were launched.

    Left out of ours: CLS's rows between kernels, biases. More in ours: column sums of twice as many CTAs.
    """
    for sizes in (SIX, Sizes(32), Sizes(6, recompute="nothing"), Sizes(6, stream_bytes=4)):
        small = 0.2 * sizes.unit  # of 12 units and more
        project = rows.project(sizes, Choice())
        assert project.dram == pytest.approx(dram("project", sizes, "forward"), abs=small)
        both = launches.forward(sizes, Choice())[2:]  # O is written and read: once more than in one kernel
        assert sum(one.dram for one in both) == pytest.approx(
            dram("exchange", sizes, "forward") + 2 * sizes.unit, abs=small
        )
        rounded = sizes.wide if sizes.cast else 0  # Triton's read dy as a launch before them rounded it; ours round it
        assert rows.exchange_backward(sizes, Choice()).dram == pytest.approx(
            dram("exchange_backward", sizes, "backward") + rounded, abs=small
        )
        positions = 4 * sizes.unit + sizes.narrow / 2  # n + E, and all of dh for its rows of CLS: not stored, not read
        assert rows.project_backward(sizes, Choice()).dram == pytest.approx(
            dram("project_backward", sizes, "backward") - positions, abs=small
        )
        halves = launches.weight_gradient(sizes, Choice(parts="halves"))  # xhat for two n + E
        assert halves.dram == pytest.approx(dram("weight_gradient", sizes, "backward") - 2 * sizes.unit, abs=small)


def test_rows_that_fill_no_round_are_split_by_columns() -> None:
    """148 + 147 tiles of 64 rows: two rounds of 132, and 31 tiles that become eight clusters of four.

    `project` has 1152 columns last, three shares of 384; `exchange` 768, four of 192.
    """
    project = rows.project(SIX, Choice(split_tail=True))
    assert [count for count, _ in project.ctas] == [148, 116, 3 * 32]
    share = project.ctas[-1][1]
    assert share.flops == 2 * 64 * (768 * 384 + 384 * 1152 / 3)
    assert [count for count, _ in launches.forward(SIX, Choice(split_tail=True))[-1].ctas] == [148, 116, 4 * 32]
    by_128 = rows.project(SIX, Choice(128, 2, staggered=True, split_tail=True))
    assert [(count, cta.warps) for count, cta in by_128.ctas] == [(74, 8), (58, 8), (3 * 32, 4)]
    many = Sizes(32)  # 1,576 and 1,568 tiles: a split tail would end no sooner
    assert rows.project(many, Choice(split_tail=True)) == rows.project(many, Choice())


def test_halves_that_are_staggered_hide_each_other() -> None:
    """Of two CTAs of 10,000 cycles on one multiprocessor, the last wait of one half is left."""
    cta = Cta({"wgmma": 4096 * 0.92 * 10_000}, epilogue=8000, warps=8, staggered=True)
    time = predict(Launch("one", [(264, cta)], 0, 0), H100)
    assert time.us == pytest.approx((2 * 10_000 + 1000 + 4000 / 4 / 0.6) / 1600 + 1)
    ring = replace(cta, longest=4800, slack=4096 * 0.92 * 500)  # 2,000 cycles, of which the other half can fill 500
    longer = predict(Launch("one", [(264, ring)], 0, 0), H100)
    assert longer.us - time.us == pytest.approx(1500 / 1600)  # the last CTA's is in its wait


def test_attention_inside_of_exchange_moves_o_once() -> None:
    """A kernel of its own writes O and `exchange` reads it; inside, O is written."""
    apart = launches.forward(SIX, Choice())[2:]
    (inside,) = launches.forward(SIX, Choice(inside=("t2s", "s2t")))[2:]
    assert sum(one.dram for one in apart) - inside.dram == 2 * SIX.unit
    assert sum(one.flops for one in apart) == pytest.approx(inside.flops, rel=0.01)  # CTAs that fill a cluster


def test_a_tile_attends_whole_windows() -> None:
    """Rows 0 to 63 touch patches 0 to 195: 196 keys, four blocks. Rows 192 to 255 touch two frames: 392, seven."""
    found = long_tiles(Sizes(1))
    assert found[:4] == [256, 256, 256, 448]
    assert len(found) == -(-1568 // 64)
    long, short = (attention(Sizes(1), Choice()).ctas[i] for i in (0, -1))
    assert long[0] == 6 * found.count(448)
    by_warp = [256] * 12 + [448]  # rows 192 to 207 touch two frames
    assert long_tiles(Sizes(1), 16)[:13] == by_warp
    assert long[1].flops == 2 * 2 * 2 * 64 * warp_keys(Sizes(1)) * 32  # two products and two heads of 32 channels
    assert short[1].flops == 2 * 2 * 2 * 64 * 16 * 32


def test_parts_of_weight_gradients() -> None:
    """48 tiles over 132 CTAs: 11 CTAs for 4 tiles have 14 parts, twelve times."""
    assert launches.tiles(SIX) == 48
    assert launches.parts(SIX, Choice()) == 12 * 14
    assert launches.parts(SIX, Choice(parts="halves")) == 96


def test_designs_fit() -> None:
    for one in design.table().values():
        assert one.per_sm >= 1
        assert one.shared <= design.HOPPER.shared_limit
        assert one.per_sm * one.threads * one.registers <= 65536
        assert one.most <= 255
    assert design.row(64, 2).shared == 4 * 24_576 + 2 * 8_192 + 1024 == 115_712  # 2 x (115,712 + 1,024): all there is
    assert design.row(64, 4).shared == 3 * 24_576 + 2 * 16_384 + 1024
    assert design.row(64, 2).per_sm == 2


def test_what_a_design_spills_goes_through_l2(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 instructions of 8 warps, 128 bytes each, in 296 CTAs."""
    before = predict(rows.project(SIX, Choice()), H100)
    plain = design.row
    monkeypatch.setattr(design, "row", lambda *of: replace(plain(*of), spills=1000))
    after = predict(rows.project(SIX, Choice()), H100)
    assert after.parts["l2"] - before.parts["l2"] == pytest.approx(1e6 * 296 * 1000 * 8 * 128 / 5.5e12)


def test_more_of_anything_takes_no_less() -> None:
    for phase, make in launches.PHASES.items():
        us = [sum(predict(one, H100).us for one in make(Sizes(batch), Choice())) for batch in (1, 2, 6, 7, 32)]
        assert us == sorted(us), phase
        narrow, wide = (make(Sizes(6, stream_bytes=size), Choice()) for size in (2, 4))
        assert sum(one.dram for one in narrow) < sum(one.dram for one in wide)
        for name, worse in (("intake", 32.0), ("start", 3000.0), ("stall", 0.7), ("gap", 3e-6), ("hides", 0.0)):
            less = replace(USUAL, **{name: worse})
            for one in narrow:
                assert predict(one, H100, less).us >= predict(one, H100).us
        kept = make(Sizes(6, recompute="nothing"), Choice())
        assert (sum(one.flops for one in kept) < sum(one.flops for one in narrow)) == (phase == "backward")


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_no_time_is_below_the_floor(phase: str) -> None:
    for name in report.DEVICES:
        for batch in (1, 6, 32):
            sizes = Sizes(batch)
            us = sum(predict(one, device(name)).us for one in launches.PHASES[phase](sizes, Choice()))
            assert us > report.floor(sizes, phase, device(name))


def test_useful_work_is_what_a_hand_counts() -> None:
    """One clip: 1,576 and 1,568 rows; forward has x and y, ten matrices, xhat, O and log-sum-exp."""
    moved, flops = useful(Sizes(1), "forward")
    streams, matrices = 2 * 3144 * 768 * 2, 2 * (2 * 768 * 384 + 4 * 384 * 384) * 2
    assert moved == streams + matrices + 3144 * 384 * 2 + 2 * 1568 * 384 * 2 + 2 * 1568 * 12 * 4
    linear = 2 * (3144 * 2 * 768 * 384 + 2 * 1568 * 4 * 384 * 384)
    assert flops == linear + 2 * 2 * 1568 * (8 + 196) * 384


def test_the_committed_tables_are_the_models() -> None:
    kinds, levels = list(report.KINDS), ["cheap", "nothing"]
    now = report.collect(report.DEVICES, (1, 6, 32), levels, kinds)
    for name in report.DEVICES:
        written = json.loads((FOLDER / f"{name.lower()}.json").read_text())
        again = json.loads(json.dumps({**now, "devices": {name: now["devices"][name]}}))
        assert written == again, "run cast-kernels predict --cuda --folder benchmarks/predictions/cuda"
    assert (FOLDER / "README.md").read_text() == tables.markdown(FOLDER)


def test_the_command_prints_it_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--device", "H200", "--batch", "6", "--kind", "bf16", "--recompute", "cheap", "--folder", str(tmp_path))
    assert main(["predict", "--cuda", *asked]) == 0
    printed = capsys.readouterr().out
    assert report.LABEL in printed
    (run, _) = json.loads((tmp_path / "h200.json").read_text())["devices"]["H200"]["runs"]
    assert f"H200, bf16, cheap, B=6, forward, designed: {run['us']['designed']:.0f} us" in printed
    assert (tmp_path / "README.md").read_text() == tables.markdown(tmp_path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--device", "A100"), "is of H100 and H200; --device has A100"),
        (("--kind", "fp16"), "is of bf16 and amp; --kind is fp16"),
        (("--recompute", "all"), "is of cheap and nothing; --recompute is all"),
        (("--model",), "compiles and counts nothing; leave out --model"),
        (("--batch", "5"), "no prediction of Triton's kernels for 5 clips on H100; there are 1, 6, 32"),
    ],
)
def test_the_command_says_what_it_has_no_model_of(
    options: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "--cuda", *options]) == 2
    assert reason in capsys.readouterr().err


def test_the_page_shows_what_the_tables_have() -> None:
    page = (ROOT / "docs/cuda.md").read_text()
    for run in json.loads((FOLDER / "h100.json").read_text())["devices"]["H100"]["runs"]:
        if (run["kind"], run["recompute"]) == ("bf16", "cheap"):
            triton_us = (run["triton"]["us"], run["triton"]["committed_us"])
            shown = (*run["us"].values(), run["floor_us"], *triton_us)
            assert f"| {run['phase']} | {run['batch']} | {' | '.join(f'{us:.0f}' for us in shown)} |" in page

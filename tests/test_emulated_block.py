"""A block's training step whose kernels run from compiled GPU code, and the file that says what it erred."""

from __future__ import annotations

import json
from pathlib import Path

import emulated_block
import engines
import pytest
from emulated_block import DTYPES, PUBLISHED, RESULTS, Step, emulated_step
from ptx_emulator.targets import EMULATED
from test_emulated_training import KERNELS

from cast.model.config import CASTConfig
from cast_kernels.evidence.cases import Error
from cast_kernels.evidence.problems import ENGINES

ENGINE = ENGINES[1] if engines.built() else ENGINES[0]
SMALL = CASTConfig(image_size=32, num_frames=4, embed_dim=64, num_heads=2, mlp_ratio=2.0, drop_path=0.5)


def check(step: Step) -> None:
    assert step.fault == ""
    wrong = [(e.name, e.ratio, e.worst, e.eager_worst) for e in step.errors if not e.ok]
    assert wrong == []
    names = [e.name for e in step.errors]
    # Of four adapters of two layers, of the exchange, of both inputs.
    assert len([name for name in names if name.startswith("grad.")]) == 4 * 4 + 28 + 2
    assert {"spatial", "temporal", "update", "grad.spatial", "grad.temporal"} <= set(names)
    assert step.kernels.keys() >= KERNELS


def test_a_small_block_runs_from_compiled_code() -> None:
    check(emulated_step("sm_80", "amp", ENGINE, SMALL))


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EMULATED)
def test_a_block_at_full_width_runs_from_compiled_code(name: str, dtype: str) -> None:
    check(emulated_step(name, dtype, ENGINE))


def test_the_file_has_a_right_step_of_each_kind_at_the_published_size() -> None:
    rows = json.loads(RESULTS.read_text())
    assert [(row["target"], row["dtype"]) for row in rows] == [(name, kind) for name in EMULATED for kind in DTYPES]
    assert (PUBLISHED.embed_dim, PUBLISHED.num_patches, PUBLISHED.exchange_frames) == (768, 196, 8)
    for row in rows:
        assert (row["ok"], row["fault"]) == (True, "")
        assert row["kernels"].keys() >= KERNELS
        for name, (rms, eager_rms, *_) in row["errors"].items():
            assert rms <= 2 * eager_rms, (row["target"], row["dtype"], name)


def test_a_step_with_a_wrong_tensor_is_not_right() -> None:
    right, wrong = Error("x", 1.0, 1.0, 1.0, 1.0, 0.0), Error("y", 3.0, 1.0, 3.0, 1.0, 0.0)
    steps = [Step([right], {}, 1.0), Step([right, wrong], {}, 1.0), Step([right], {}, 1.0, "a race")]
    rows = [emulated_block.row_of("sm_80", "bf16", ENGINE, step) for step in steps]
    assert [(row["ok"], row["worst ratio"]) for row in rows] == [(True, 1.0), (False, 3.0), (False, 1.0)]


def test_the_rows_of_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads(RESULTS.read_text())
    file = tmp_path / "block.json"
    file.write_text(RESULTS.read_text())
    monkeypatch.setattr(emulated_block, "RESULTS", file)
    monkeypatch.setattr(
        emulated_block, "emulated_step", lambda *_: Step([Error("x", 3.0, 1.0, 3.0, 1.0, 0.0)], {}, 1.0)
    )
    assert emulated_block.main(["sm_90", "amp"]) == 1
    after = json.loads(file.read_text())
    assert [row for row in after if (row["target"], row["dtype"]) != ("sm_90", "amp")] == [*before[:2], before[3]]
    assert [row["ok"] for row in after] == [True, True, False, True]
    with pytest.raises(SystemExit, match="sm_70 is none of"):
        emulated_block.main(["sm_70"])

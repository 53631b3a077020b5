"""`cast-kernels compile --ptxas`: the same PTX through other assemblers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from ptx_emulator.predict.resources import listing, resources
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import Launch, Recorder, offline_driver
from triton_kernels import product, scale

from cast_kernels.assemblers import assembler, release, version_of
from cast_kernels.cli import main
from cast_kernels.evidence import reassemble
from cast_kernels.evidence.reassemble import (
    Assembled,
    RefusedError,
    _lowered,
    assemble,
    compare,
    differences,
    read,
    render,
    summary,
)

ROOT = Path(__file__).parent.parent
#: Beside Triton's own, where there is one.
INSTALLED = Path("/usr/local/cuda-13.0/bin/ptxas")
#: What newer ones make of kernels: the committed comparison.
COMMITTED = ROOT / "benchmarks/evidence/assemblers.json"
#: Targets and dtypes that it has at least.
COMPARED = {(name, dtype) for name in ("sm_80", "sm_90") for dtype in ("bf16", "fp16", "amp")}


def launched(name: str, products: bool = True) -> Launch:
    with offline_driver(target(name), Recorder()) as recorder:
        if products:
            product(torch.zeros(256, 512).bfloat16(), torch.zeros(512, 256).bfloat16(), warps=8)
        else:
            scale(torch.zeros(300), 2.0)
    (record,) = recorder.records.values()
    return record.first


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100"])
def launch(request: pytest.FixtureRequest) -> Launch:
    return launched(request.param)


def own(launch: Launch) -> str:
    return assembler(int(launch.target.arch)).path


@pytest.mark.skipif(release(triton.__version__) < (3, 8), reason="an older Triton gives its ptxas other options")
def test_tritons_own_makes_what_triton_made(launch: Launch) -> None:
    cubin, _ = assemble(launch.asm["ptx"], own(launch))
    assert listing(cubin) == listing(launch.asm["cubin"])


def test_a_row_is_what_triton_compiled(launch: Launch) -> None:
    row = read(launch, "bf16", own(launch), True)
    used = resources(launch.asm, launch.metadata.shared, launch.metadata.num_warps, launch.target)
    assert row.registers == used.registers
    assert (row.spills, row.loop_spills, row.instructions) == (used.spills, used.loop_spills, used.instructions)
    assert row.shared_bytes == used.shared_bytes
    assert row.kinds[used.tensor_core] == used.tensor_core_count
    assert row.kinds.get("LDGSTS", 0) == used.async_copies
    assert (row.refused, row.failures) == ("", ())


@pytest.mark.skipif(not INSTALLED.exists(), reason=f"there is no {INSTALLED}")
def test_the_installed_toolkits_makes_the_same_kinds(launch: Launch) -> None:
    """13.0 is older than the PTX that Triton writes for sm_100: its version is lowered."""
    first, second = read(launch, "bf16", own(launch), True), read(launch, "bf16", str(INSTALLED), False)
    assert second.refused == ""
    assert second.ptxas.startswith("13.0.")
    for kind in ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS"):
        assert first.kinds.get(kind) == second.kinds.get(kind)
    assert second.loop_spills == 0


@pytest.mark.parametrize(
    ("named", "known", "becomes"),
    [("8.8", (12, 8, 93), "8.7"), ("8.8", (12, 9, 86), "8.8"), ("9.3", (13, 0, 88), "9.0"), ("8.8", (13, 5), "8.8")],
)
def test_a_newer_version_of_ptx_is_lowered(named: str, known: tuple[int, ...], becomes: str) -> None:
    assert _lowered(f"//\n.version {named}\n.target sm_90a\n", known) == f"//\n.version {becomes}\n.target sm_90a\n"
    assert _lowered("no header", known) == "no header"
    assert _lowered(f".version {named}", ()) == f".version {named}"


def test_what_is_refused_says_why() -> None:
    path = triton.knobs.nvidia.ptxas.path
    with pytest.raises(RefusedError, match=r"kernel\.ptx, line 3; fatal"):
        assemble(".version 8.0\n.target sm_80\n.visible .entry k( {\n", path)
    bad = replace(launched("sm_80", products=False), asm={"ptx": ".version 8.0\n.target sm_80\n nonsense"})
    row = read(bad, "fp32", path, False)
    assert "kernel.ptx, line 3" in row.refused
    assert row.registers == 0


def row(ptxas: str = "1.0", **changes: object) -> Assembled:
    made = Assembled("sm_90", "bf16", "k", "M=1", ptxas, ptxas == "1.0", "", 32, 2, 0, 1024, 100, {"HGMMA": 4})
    return replace(made, **changes)  # type: ignore[arg-type]


def test_differences_are_of_kinds_and_of_spills_inside_loops() -> None:
    same, other = row("2.0", registers=40, spills=9), row("3.0", kinds={"HMMA": 8}, loop_spills=2)
    assert list(differences([row(), same, other, row("4.0", refused="no")])) == [
        "sm_90 bf16 k [M=1] 3.0: HGMMA 4 -> 0, HMMA 0 -> 8, spills inside loops 0 -> 2"
    ]
    assert list(differences([row(refused="no"), other])) == []


def test_a_summary_leaves_out_what_was_refused() -> None:
    cells = summary([row(), row(kernel="l", refused="no"), row(kernel="m", failures=("bad",))], ["HGMMA"])
    assert cells == ["1.0 (Triton's)", "3", "1", "32", "4", "0", "1024", "200", "8", "1"]
    assert render([row(), row("2.0")]).row_count == 2


@pytest.mark.parametrize(("changes", "status"), [({}, 0), ({"refused": "error"}, 1), ({"failures": ("bad",)}, 1)])
def test_the_exit_code_and_the_json(
    changes: dict[str, object],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = []
    monkeypatch.setattr(reassemble, "compare", lambda *given: asked.append(given) or [row(), row("2.0", **changes)])
    out = tmp_path / "rows.json"
    arguments = ["compile", "--target", "sm_90", "--dtype", "bf16", "--ptxas", "/one", "/two", "--json", str(out)]
    assert main(arguments) == status
    assert [entry["ptxas"] for entry in json.loads(out.read_text())] == ["1.0", "2.0"]
    assert asked == [("sm_90", "bf16", "paper", ["/one", "/two"], None)]
    text = capsys.readouterr().out
    assert f"2 kernels assembled, {status} refused or with a defect" in text
    assert ("FAIL  sm_90 k [M=1] bf16 by 2.0: " in text) == bool(status)


def test_wrong_choices_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "--target", "gfx942", "--ptxas", "x"]) == 2
    assert "assembled by LLVM" in capsys.readouterr().err
    assert main(["compile", "--target", "sm_80", "--dtype", "bf16", "--ptxas", str(tmp_path)]) == 2
    assert "is no ptxas" in capsys.readouterr().err
    assert main(["compile", "--cache", "--ptxas", "x"]) == 2
    assert "leave out --ptxas" in capsys.readouterr().err


def test_one_release_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = launched("sm_80", products=False)
    record = type("Record", (), {"first": first})
    monkeypatch.setattr(reassemble, "launched", lambda *_: {"one": (record, [])})
    path = triton.knobs.nvidia.ptxas.path
    rows = list(compare("sm_80", "fp32", "step", [path, triton.knobs.nvidia.ptxas_blackwell.path]))
    assert [entry.ptxas for entry in rows] == [version_of(path), version_of(triton.knobs.nvidia.ptxas_blackwell.path)]
    assert [entry.triton for entry in rows] == [True, False]


def test_the_committed_comparison_has_no_defect() -> None:
    """On sm_90 all assemble `attention_backward` of 128 rows with serialised wgmmas, which costs time alone."""
    told = [Assembled(**entry) for entry in json.loads(COMMITTED.read_text())]
    groups = {(entry.target, entry.dtype) for entry in told}
    assert groups >= COMPARED
    assert [entry for entry in told if entry.refused] == []
    for group in groups:
        own = [entry for entry in told if (entry.target, entry.dtype) == group]
        releases = {entry.ptxas for entry in own}
        assert len(releases) == 5
        kernels = {version: [(e.kernel, e.tile) for e in own if e.ptxas == version] for version in releases}
        assert len(set(map(tuple, kernels.values()))) == 1, "each assembles the same kernels"
        assert [entry.ptxas for entry in own if entry.triton] == ["12.9.86"] * len(own[::5])
        failing = [(entry.kernel, *entry.failures) for entry in own if entry.failures]
        serialised = ("attention_backward", "ptxas reports C7515: wgmmas are serialised, or waits added")
        assert failing == (5 * [serialised] if group[0] == "sm_90" else [])


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100"])
def test_every_assembler_at_hand_makes_the_same_of_a_training_step(name: str) -> None:
    """In bf16, by Triton's two and by the installed toolkit's; others are asked for on the command line."""
    paths = [
        path
        for path in (triton.knobs.nvidia.ptxas.path, triton.knobs.nvidia.ptxas_blackwell.path, str(INSTALLED))
        if Path(path).exists()
    ]
    rows = list(compare(name, "bf16", "step", paths))
    assert len(rows) >= 2 * 20
    assert [entry for entry in rows if entry.refused] == []
    tensor_cores = {
        version: [
            sum(n for kind, n in entry.kinds.items() if kind.endswith("MMA"))
            for entry in rows
            if entry.ptxas == version
        ]
        for version in {entry.ptxas for entry in rows}
    }
    assert len({tuple(counts) for counts in tensor_cores.values()}) == 1

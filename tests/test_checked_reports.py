"""What `python -m ptx_emulator run` takes and tells, option by option, in this process; and what a checker refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ptx_emulator
import pytest
import torch
import triton
import triton.language as tl
from ptx_emulator import Fault, command
from ptx_emulator.targets import target
from ptx_emulator.triton import Checker, checking
from ptx_emulator.triton.checker import at, shortened
from ptx_emulator.triton.driver import refuse_unsupported
from ptx_emulator.triton.program import DeviceAsCpu
from test_examples import example
from triton_kernels import product_kernel, scale, scale_kernel

from cast_kernels.versions import release


@triton.jit
def total_kernel(x, y, BLOCK: tl.constexpr):
    tl.store(y, tl.sum(tl.load(x + tl.arange(0, BLOCK))))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command on a program of this text, in a folder of its own -> its exit status."""
    monkeypatch.chdir(tmp_path)

    def command_of(code: str, *words: str, name: str = "program.py") -> int:
        (tmp_path / name).write_text(code)
        return command.main(["run", *words])

    return command_of


# --- what it takes ---------------------------------------------------------------------------------------------------

LAUNCH = "from triton_kernels import scale; import torch; scale(torch.ones(9), 2.0)"


def test_every_option_of_the_emulator_reaches_it(run: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    own = ptx_emulator.launch
    monkeypatch.setattr(ptx_emulator, "launch", lambda kernel, **given: seen.append(given) or own(kernel, **given))
    assert run(LAUNCH, "program.py") == 0
    assert run(LAUNCH, "--target", "sm_80", "--landing", "early", "program.py", "--seed=5", "--no-checks") == 0
    told = [tuple(given[name] for name in ("target", "landing", "seed", "checks")) for given in seen]
    assert told == [("sm_90", "late", None, True), ("sm_80", "early", 5, False)]


def test_compiled_kernels_are_kept_where_it_says(run: Callable[..., int], tmp_path: Path) -> None:
    assert run(LAUNCH, "program.py", "--cache", "kept") == 0
    assert list((tmp_path / "kept").rglob("scale_kernel.ptx"))


def test_words_behind_the_program_are_its_own() -> None:
    _, parser = command._parsers()
    for words, expected in (
        ("--seed 3 a.py b --seed 4", ("--seed 3", "a.py", "b --seed 4")),
        ("a.py --seed 3 -- --seed 4", ("--seed 3", "a.py", "--seed 4")),
        ("-m a.b --first c", ("-m a.b --first", "", "c")),
        ("--target=sm_80 a.py --json=x.json b", ("--target=sm_80 --json=x.json", "a.py", "b")),
    ):
        own, script, theirs = command.split(words.split(), parser)
        assert (" ".join(own), script, " ".join(theirs)) == expected


def test_a_module_is_found_from_here(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = sys.argv, sys.path[:]
    assert run("import sys; print(sys.argv)", "-m", "a_module_of_here", "x", name="a_module_of_here.py") == 0
    assert capsys.readouterr().out == f"['{tmp_path}/a_module_of_here.py', 'x']\n"
    assert (sys.argv, sys.path) == before


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [("sys.exit('enough')", 1, "enough\n"), ("sys.exit()", 0, ""), ("sys.exit(5)", 5, ""), ("", 0, "")],
)
def test_the_exit_status_is_the_programs(
    run: Callable[..., int], code: str, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"import sys\n{code}", "program.py") == status
    assert capsys.readouterr().err.startswith(f"{said}ptx_emulator: 0 kernels, 0 launches on sm_90")


@pytest.mark.parametrize(("words", "status"), [([], 2), (["walk"], 2), (["--help"], 0), (["run", "--help"], 0)])
def test_without_a_command_there_is_help(words: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(words)
    assert stop.value.code == status
    told = capsys.readouterr()
    assert "usage: python -m ptx_emulator" in told.out + told.err


def test_cuda_is_read_as_the_cpu_in_every_place() -> None:
    x, gpu = torch.ones(2), torch.device("cuda", 0)
    with DeviceAsCpu():
        for made in (
            torch.zeros(3, device="cuda:1"), torch.zeros(3, device=gpu), x.to("cuda"), x.cuda(),
            x.to(gpu), x.to(torch.device("cuda")), torch.tensor([1.0], device="cuda"),
        ):  # fmt: skip
            assert made.device == torch.device("cpu")
        assert torch.zeros(3, device="meta").device.type == "meta"


# --- what it tells ---------------------------------------------------------------------------------------------------

WRONG = """
import torch
from triton_kernels import scale_kernel
for n in (128, 129, 130):
    scale_kernel[(2,)](torch.ones(128), torch.ones(256), 2.0, n, BLOCK=128)
"""


def test_the_report_in_text_and_as_json(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(WRONG, "program.py", "--json", "told.json", "--landing", "early", "--no-checks", "word", "--x") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[2].split()[:2] == ["scale_kernel", "3"]
    assert lines[2].endswith(" 1"), "findings of the kernel"
    assert "1. MemoryFault in scale_kernel" in lines
    assert "     launched by program.py:5 in <module>, the first of 2 launches that show it" in lines
    assert "     grid (2, 1, 1), 128 threads, BLOCK=128, num_warps=4, num_stages=3" in lines
    assert "     the launch ended there: what it had not written yet is missing" in lines
    assert lines[-1] == "ptx_emulator: 1 finding"
    told = json.loads(Path("told.json").read_text())
    assert 0 < told.pop("seconds") < 100
    (kernel,), (found,) = told.pop("kernels"), told.pop("findings")
    assert told == {
        "program": "program.py", "arguments": ["word", "--x"], "status": 1, "target": "sm_90", "landing": "early",
        "seed": None, "checks": False, "all_configs": False, "lane_order": False, "notes": [], "noted": {},
    }  # fmt: skip
    assert (kernel["kernel"], kernel["launches"], kernel["ctas"]) == ("scale_kernel", 3, 2)
    assert 0 < kernel["seconds"] < 100
    assert kernel["counters"]["global_load_bytes"] == 4 * 128
    assert (found["grid"], found["threads"], found["constants"]["BLOCK"]) == ([2, 1, 1], 128, "128")
    assert found["places"] == [{"file": "program.py", "line": 5, "function": "<module>"}]
    assert found["ended"]


def test_all_configs_and_the_seed_are_told(run: Callable[..., int]) -> None:
    assert run("", "program.py", "--json", "told.json", "--all-configs", "--seed", "7", "--landing", "random") == 0
    told = json.loads(Path("told.json").read_text())
    assert (told["all_configs"], told["seed"], told["landing"], told["program"]) == (True, 7, "random", "program.py")


def test_a_race_counts_each_launch_once_and_goes_without_the_checks() -> None:
    """Several pairs of instructions of two lines are one finding."""
    kernel = example("one_tile_for_sum_and_dot").product_and_sums
    x, w, product, sums = (
        torch.ones(64, 256).bfloat16(),
        torch.ones(256, 64).bfloat16(),
        torch.zeros(64, 64),
        torch.zeros(64),
    )
    for checks in (True, False):
        with checking(Checker(target("sm_90"), checks=checks)) as checker:
            for _ in range(2):
                kernel[(1,)](x, w, product, sums, 256, SUM=True, M=64, N=64, K=32)
        kinds = {found.kind: (found.launches, found.ended) for found in checker.findings}
        assert kinds.get("write to an operand of a pending wgmma") == ((2, False) if checks else None)
        assert not kinds or checks


@pytest.mark.skipif(release(triton.__version__) < (3, 8), reason="one warp writes the sum")
def test_notes_are_told_once_and_are_no_findings() -> None:
    x, y = torch.ones(64), torch.zeros(1)
    with checking("sm_80") as checker:
        for _ in range(2):
            total_kernel[(1,)](x, y, BLOCK=64, num_warps=4)
    assert y.item() == 64
    assert checker.findings == []
    (note,) = [note for note in checker.notes if "write-write of the same value" in note]
    assert note.startswith("total_kernel: write-write of the same value, in shared memory (")
    assert f"note: {note}" in checker.text().splitlines()
    assert checker.as_json()["notes"] == checker.notes


def test_where_a_note_is() -> None:
    fault = Fault("kind", "st.shared [a];", "ld.shared [b];", 3, (0, 1), 0, 0)
    assert at(fault) == ": st.shared [a];"
    assert at(replace(fault, line="f.py:3", other_line="f.py:3")) == " (f.py:3)"
    assert at(replace(fault, line="f.py:3", other_line="f.py:4")) == " (f.py:3 and f.py:4)"


def test_long_constants_are_shortened() -> None:
    assert shortened("x" * 40) == "x" * 40
    assert shortened("x" * 41) == "x" * 37 + "..."


# --- what it refuses, and chooses ------------------------------------------------------------------------------------


def test_a_checker_is_of_a_target_that_is_executed() -> None:
    with pytest.raises(ValueError, match="'sm_86'; the emulator executes sm_80 and sm_90"):
        Checker(target("sm_86"))


def test_a_benchmark_is_refused() -> None:
    with checking("sm_80"), pytest.raises(RuntimeError, match=r"leave triton\.testing\.do_bench out"):
        triton.testing.do_bench(lambda: scale(torch.ones(9), 2.0))


def test_what_the_driver_cannot_give_a_kernel_is_refused() -> None:
    metadata = SimpleNamespace(name="k")
    refuse_unsupported(SimpleNamespace(signature={"x": "*fp32", "pair": ("i32", "i32")}), metadata)
    with pytest.raises(NotImplementedError, match=r"k takes a tensor descriptor \(d\): .*; use pointers"):
        refuse_unsupported(SimpleNamespace(signature={"x": "*fp32", "d": "tensordesc_im2col<fp32[64]>"}), metadata)


def test_a_grid_of_nothing_launches_nothing() -> None:
    with checking("sm_80") as checker:
        scale_kernel[(0,)](torch.ones(9), torch.ones(9), 2.0, 9, BLOCK=16)
    assert checker.runs == {}


def test_the_driver_tells_what_a_kernel_takes() -> None:
    with checking("sm_80"):
        made = scale_kernel.warmup(torch.ones(9), torch.ones(9), 2.0, 9, BLOCK=16, grid=(1,))
        made._init_handles()
        assert 4 < made.n_regs < 256
        assert triton.runtime.driver.active.utils.get_device_properties(0)["multiprocessor_count"] == 108


def test_of_configurations_the_first_that_fits_is_taken() -> None:
    """The first asks for 196 KiB of shared memory, where sm_80 has 163."""
    configs = [triton.Config({"BM": 64, "BK": bk, "STAGES": 4}) for bk in (128, 32, 16)]
    tuned = triton.autotune(configs, key=["k"])(product_kernel)
    a, b, c = torch.ones(64, 256).bfloat16(), torch.ones(256, 64).bfloat16(), torch.zeros(64, 64)
    wide = torch.ones(256, 256).bfloat16()
    with checking("sm_80") as checker:
        tuned[(1,)](a, wide, torch.zeros(64, 256), 64, 256, N=256)
        scale_kernel[(1,)](b.flatten()[:9], c.flatten(), 2.0, 9, BLOCK=16)
    (note,) = checker.notes
    assert "autotuned over 3 configurations: the first that fits was executed, the others were not" in note
    assert "BK=32" in note
    assert checker.runs["product_kernel"].launches == 1
    assert f"note: {note}" in checker.text().splitlines()
    assert checker.as_json()["notes"] == [note]

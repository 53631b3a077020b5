"""`python -m ptx_emulator run`: what a program's own kernels do wrong is told, and else the program runs as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = """
import sys, torch, triton, triton.language as tl

@triton.jit
def moved(x, y, n, OFF: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at + OFF, mask=at < n) + 1, mask=at < n)

def move(n, off, device="cpu"):
    x = torch.arange(n, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    moved[(triton.cdiv(n, 128),)](x, y, n, OFF=off, BLOCK=128)
    return x, y
"""


class Ran:
    """A run of the command."""

    def __init__(self, folder: Path, code: str, *words: str, **environment: str) -> None:
        (folder / "program.py").write_text(KERNELS + code)
        out = folder / "report.json"
        out.unlink(missing_ok=True)
        paths = os.pathsep.join([str(ROOT / "tools"), str(folder)])
        done = subprocess.run(
            [sys.executable, "-m", "ptx_emulator", "run", "--json", str(out), *words],
            cwd=folder, env=os.environ | {"PYTHONPATH": paths} | environment, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip
        self.status, self.out, self.err = done.returncode, done.stdout, done.stderr
        self.told: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}


def test_a_program_without_a_fault_runs_as_it_is(tmp_path: Path) -> None:
    code = "x, y = move(300, 0)\nassert torch.equal(y, x + 1)\nprint(__name__, sys.argv, sys.path[0])\nsys.exit(7)\n"
    ran = Ran(tmp_path, code, "program.py", "--target", "sm_80", "a", "--target", "b")
    assert ran.out == f"__main__ ['program.py', 'a', '--target', 'b'] {tmp_path}\n"
    assert ran.status == ran.told["status"] == 7
    assert ran.told["findings"] == ran.told["notes"] == []
    assert not ran.told["lane_order"]
    (kernel,) = ran.told["kernels"]
    assert (kernel["kernel"], kernel["launches"], kernel["ctas"]) == ("moved", 1, 3)
    assert ran.err.splitlines()[-1] == "ptx_emulator: nothing found"


def test_findings_are_collected_and_the_program_goes_on(tmp_path: Path) -> None:
    code = "for n in (300, 200):\n    move(n, 1)\nmove(100, -1)\nprint('end')\n"
    ran = Ran(tmp_path, code, "--target", "sm_90", "--lane-order", "program.py")
    assert (ran.status, ran.out) == (1, "end\n")
    assert ran.told["lane_order"]
    first, second = ran.told["findings"]
    assert (first["kind"], first["kernel"], first["launches"], first["ended"]) == ("MemoryFault", "moved", 2, True)
    assert "byte 1200 of 'x', which has 1200" in first["message"]
    assert "(program.py:7)" in first["message"], "the kernel's line"
    lines = (KERNELS + code).splitlines()
    assert [lines[place["line"] - 1].strip() for place in first["places"]] == [
        "moved[(triton.cdiv(n, 128),)](x, y, n, OFF=off, BLOCK=128)", "move(n, 1)",
    ]  # fmt: skip
    assert "byte -4 of 'x'" in second["message"]
    assert "1. MemoryFault in moved" in ran.err
    assert "ptx_emulator: 2 findings" in ran.err


def test_an_exception_stays_one_and_the_report_comes_too(tmp_path: Path) -> None:
    ran = Ran(tmp_path, "move(300, 1)\nraise KeyError('mine')\n", "program.py")
    assert ran.status == 1
    trace = ran.err.partition("ptx_emulator:")[0]
    trace = trace[trace.index("Traceback (most recent call last):\n  File ") :]  # Triton 3.9 warns before it
    assert "ptx_emulator" not in trace
    assert trace.endswith("KeyError: 'mine'\n")
    assert len(ran.told["findings"]) == 1


def test_the_first_finding_can_end_it(tmp_path: Path) -> None:
    ran = Ran(tmp_path, "move(300, 1)\nprint('end')\n", "program.py", "--first")
    assert (ran.status, ran.out) == (1, "")
    assert "EmulationFault: moved on sm_90, grid (3, 1, 1): MemoryFault" in ran.err


def test_a_module_runs(tmp_path: Path) -> None:
    ran = Ran(tmp_path, "move(300, 1)\nprint(sys.argv[1:], __name__)\n", "-m", "program", "--seed", "3", "word")
    assert (ran.status, ran.out) == (1, "['word'] __main__\n")
    assert ran.told["seed"] == 3
    assert [place["function"] for place in ran.told["findings"][0]["places"]] == ["move", "<module>"]


TUNED = """
tuned = triton.autotune([triton.Config({"BLOCK": n}) for n in (64, 128)], key=["n"])(moved)
x, y = torch.arange(300.0), torch.empty(300)
for _ in range(2):
    tuned[lambda sizes: (triton.cdiv(300, sizes["BLOCK"]),)](x, y, 300, OFF=0)
assert torch.equal(y, x + 1)
"""


@pytest.mark.parametrize("every", [False, True])
def test_an_autotuned_kernel_has_its_first_configuration_or_all(tmp_path: Path, every: bool) -> None:
    """Only what the program launches, or each configuration once before it."""
    ran = Ran(tmp_path, TUNED, *(["--all-configs"] if every else []), "program.py")
    assert ran.status == 0, ran.err
    (note,) = ran.told["notes"]
    assert "autotuned over 2 configurations" in note
    assert "BLOCK=64" in note
    assert ran.told["noted"] == {"autotuned kernel": 1}
    assert "\nnotes: 1 autotuned kernel\n" in ran.err
    assert ran.told["kernels"][0]["launches"] == (4 if every else 2)


def test_a_program_that_wants_a_gpu_is_told_what_to_do(tmp_path: Path) -> None:
    code = "x, y = move(300, 0, 'cuda')\nassert torch.equal(y, x.cuda() + 1)\n"
    ran = Ran(tmp_path, code, "program.py")
    assert ran.status == 1
    assert "get_active_torch_device()" in ran.err
    assert "--device-as-cpu" in ran.err
    assert Ran(tmp_path, code, "--device-as-cpu", "program.py").status == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give SCRIPT.py or -m MODULE"),
        (("missing.py",), "no file missing.py: give the path of a Python script, or -m MODULE"),
        (("program.py", "--target", "sm_70"), "invalid choice: 'sm_70'"),
        (("--strange", "program.py"), "unrecognized arguments: --strange"),
        (("--landing", "random", "program.py"), "--landing random draws from a seed: add --seed 0"),
        (("--seed", "x", "program.py"), "'x' is no whole number of at least 0"),
        (("--json", "no/such/report.json", "program.py"), "there is no folder no/such"),
    ],
)
def test_bad_usage_is_refused(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    ran = Ran(tmp_path, "print('it ran')\n", *words)
    assert (ran.status, ran.out) == (2, "")
    assert said in ran.err


def test_the_interpreter_is_refused(tmp_path: Path) -> None:
    ran = Ran(tmp_path, "", "program.py", TRITON_INTERPRET="1")
    assert ran.status == 2
    assert "TRITON_INTERPRET is set" in ran.err


def test_a_lock_between_ctas_is_passed_on(tmp_path: Path) -> None:
    """As in Triton's lesson on layer normalisation: CTAs that try for it do not keep its holder from running."""
    code = """
@triton.jit
def added(x, y, lock, N: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(x + tl.program_id(0) * N + at)
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(y + at, tl.load(y + at) + value)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)

x, y, lock = torch.ones(8, 256), torch.zeros(256), torch.zeros(1, dtype=torch.int32)
added[(8,)](x, y, lock, 256)
print(y.unique().tolist(), lock.item())
"""
    ran = Ran(tmp_path, code, "program.py")
    assert (ran.status, ran.out) == (0, "[8.0] 0\n"), ran.err


def test_the_core_needs_neither_torch_nor_triton() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['triton'] = None\n"
        "import ptx_emulator, ptx_emulator.command, ptx_emulator.targets, ptx_emulator_pytest\n"
        "sys.exit(ptx_emulator.command.main(['run', '-m', 'nothing']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT / "tools")}, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "torch and triton not installed; `run` needs both" in done.stderr

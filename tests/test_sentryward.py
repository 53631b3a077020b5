"""SentryWard, a verifier of PTX that knows nothing of ours, on our kernels for sm_100: a second opinion.

It proves of every schedule what the emulator sees in the schedules that it runs, and it knows `tcgen05`, which the
emulator does not. docs/ptxas.md says what it can say of which kernel.
"""

from __future__ import annotations

import json
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import Launch, Recorder, offline_driver

from cast_kernels.evidence.cases import Case, run
from cast_kernels.evidence.experts import ExpertCase, run_expert

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(find_spec("sentryward") is None, reason="SentryWard is not installed: pip install sentryward"),
]
#: Kernels of which it proves every schedule free of races, within seconds. Others are too large for it, or not in its
#: reach: docs/ptxas.md.
PROVEN = ("activate", "activate_backward", "norm", "sum_parts")
SECONDS = 120


@pytest.fixture(scope="module")
def launches() -> dict[str, Launch]:
    """Name -> the first launch of each kernel of a small B-CAST and a small FFN, forward and backward."""
    found: dict[str, Launch] = {}
    with offline_driver(target("sm_100"), Recorder()) as recorder:
        run(Case(1, 2, 5, 64, 32, 2), "triton", torch.bfloat16)
        run_expert(ExpertCase(20, 64, 96, 32), torch.bfloat16)
    for record in recorder.records.values():
        found.setdefault(record.first.kernel, record.first)
    return found


def verdict(launch: Launch, folder: Path, ptx: str) -> dict[str, Any]:
    """What SentryWard says of PTX at a launch's grid and numbers. Addresses and tensors it takes as unknown."""
    header = ptx.split(".visible .entry")[1].split("{")[0]
    kinds = re.findall(r"\.param \.(\w+)", header)
    numbers = [
        {"parameter": place, "type": kinds[place], "value": one.value}
        for place, one in enumerate(launch.arguments)
        if not one.type.startswith("*")
    ]
    given = {
        "schema": "spverify.kernel-input/v1",
        "launch": {
            "grid_dim": list(launch.ctas), "block_dim": [launch.threads, 1, 1],
            "dynamic_shared_bytes": launch.metadata.shared,
        },
        "arguments": numbers,
    }  # fmt: skip
    code, configuration = folder / "kernel.ptx", folder / "input.json"
    code.write_text(ptx)
    configuration.write_text(json.dumps(given))
    verify = import_module("sentryward").verify
    found: dict[str, Any] = verify(code, input=configuration, timeout_seconds=SECONDS, memory_limit_mib=4096)
    return found


@pytest.mark.parametrize("name", PROVEN)
def test_no_schedule_has_a_race(name: str, launches: dict[str, Launch], tmp_path: Path) -> None:
    found = verdict(launches[name], tmp_path, launches[name].asm["ptx"])
    assert found["checks"]["synchronization"] == "passed", found["diagnostics"]
    assert found["checks"]["memory"] == "passed", found["diagnostics"]
    assert found["result"] == "race_free"


def test_ctas_that_write_the_same_rows_race(launches: dict[str, Launch], tmp_path: Path) -> None:
    """Which the emulator does not look for: races in global memory."""
    launch = launches["norm"]
    assert launch.ctas[0] > 1
    wrong, changes = re.subn(r"(mov\.u32\s+%r\d+), %ctaid\.x;", r"\1, 0;", launch.asm["ptx"])
    assert changes == 1
    found = verdict(launch, tmp_path, wrong)
    assert found["result"] == "potential_race"
    assert found["checks"]["memory"] == "failed"
    assert {race["region"]["address_space"] for race in found["races"]} == {"global"}

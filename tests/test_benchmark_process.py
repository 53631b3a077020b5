"""What the benchmarks take beside time: memory, in a process of its own, and a limit."""

from __future__ import annotations

import contextlib
import mmap
import signal
import sys
import time
from pathlib import Path

import pytest
from measure import Unavailable, peak_memory, time_limit
from peak_memory import measure_apart

import cast

TINY = cast.CASTConfig(
    image_size=32, patch_size=16, num_frames=4, embed_dim=32, depth=2, num_heads=2, heads={"verb": 97, "noun": 300}
)


def test_peak_memory_sees_an_allocation_that_is_gone_again() -> None:
    def run() -> None:
        with mmap.mmap(-1, 96 << 20) as area:  # malloc could hand out pages that are resident already
            area[::4096] = bytes(len(area) // 4096)

    seen = peak_memory(run)
    assert 90 < seen["peak_mib"] - seen["before_mib"] < 400
    assert peak_memory(lambda: None)["peak_mib"] - seen["before_mib"] < 60


def test_training_memory_is_measured_in_a_process_of_its_own() -> None:
    seen = measure_apart("tiny", 2, {"backend": "eager", "depth": 1})
    assert 50 < seen["before_mib"] < seen["peak_mib"]


def test_a_process_that_fails_is_a_missing_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho first >&2\necho 'MemoryError: too much' >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(Unavailable, match=r"^MemoryError: too much$"):
        measure_apart("tiny", 2, {})


def test_time_limit_stops_a_loop_and_gives_the_timer_back() -> None:
    def loop() -> None:
        while time.monotonic() - began < 60:  # or the loop would end by itself, which is no error
            with contextlib.suppress(Exception):  # as a compiler's handler for ordinary errors might
                sum(range(1000))

    before = signal.getsignal(signal.SIGALRM)
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"the loop was stopped after 0 s"), time_limit(0.05, "the loop"):
        loop()
    assert signal.getsignal(signal.SIGALRM) is before

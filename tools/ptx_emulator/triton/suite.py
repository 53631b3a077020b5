"""`pytest --ptx-target`: a suite's kernels run on the emulator, and a finding fails the test that launched it."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import ExitStack
from typing import Any

import pytest

from ptx_emulator.targets import target
from ptx_emulator.triton.checker import Checker, Finding, checking, counted


def begin(config: pytest.Config) -> None:
    """Let the suite's launches run on the emulator until pytest ends.

    Raises:
        pytest.UsageError: the options contradict each other, or kernels would be interpreted.
    """
    landing, seed = config.getoption("ptx_landing"), config.getoption("ptx_seed")
    if landing == "random" and seed is None:
        raise pytest.UsageError("--ptx-landing random draws from a seed: add --ptx-seed 0")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise pytest.UsageError("TRITON_INTERPRET is set, so kernels would be interpreted, not compiled; unset it")
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        return  # the processes of pytest-xdist run the tests, each with this plugin
    checker = Checker(
        target(config.getoption("ptx_target")),
        landing,
        seed,
        all_configs=config.getoption("ptx_all_configs"),
        lane_order=config.getoption("ptx_lane_order"),
    )
    config.pluginmanager.register(Suite(checker), "ptx_emulator_suite")


class Suite:
    """The hooks. Findings are collected over a phase of a test; then the phase fails, whatever the test says.

    Args:
        checker: takes the launches.
    """

    def __init__(self, checker: Checker) -> None:
        self.checker: Checker = checker
        self.found: int = 0
        self._open = ExitStack()
        self._open.enter_context(checking(checker))

    def pytest_unconfigure(self) -> None:
        """Triton gets its own driver back."""
        self._open.close()

    def pytest_report_header(self) -> str:
        """A line of the head."""
        return f"ptx_emulator: kernels are compiled for {self.checker.target.name} and executed on the CPU"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Fixtures."""
        return (yield from self._phase(item, "setup"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """The test."""
        return (yield from self._phase(item, "call"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """The ends of fixtures."""
        return (yield from self._phase(item, "teardown"))

    def _phase(self, item: pytest.Item, when: str) -> Generator[None, Any, Any]:
        self.checker.script = str(item.path)
        try:
            result = yield
        except BaseException as error:
            text = self._report()
            if text and isinstance(error, pytest.skip.Exception):
                pytest.fail(text, pytrace=False)
            if text:
                item.add_report_section(when, "ptx_emulator", text)
            raise
        text = self._report()
        if text:
            pytest.fail(text, pytrace=False)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Generator[None, Any, Any]:
        """Launches of a module's own: a finding is an error of its collection."""
        self.checker.script = str(getattr(collector, "path", ""))
        report = yield
        text = self._report()
        if text:
            report.outcome, report.longrepr, report.result = "failed", text, []
        return report

    def _report(self) -> str:
        """What was found since the last call, for a terminal."""
        found = self.checker.taken()
        self.found += len(found)
        return "\n\n".join(map(_told, found))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """What ran."""
        launches = sum(runs.launches for runs in self.checker.runs.values())
        terminalreporter.section("ptx_emulator")
        terminalreporter.line(
            f"{counted(len(self.checker.runs), 'kernel')}, {counted(launches, 'launch', 'launches')} on "
            f"{self.checker.target.name}: {counted(self.found, 'finding')}"
        )
        for line in self.checker.noted_lines():
            terminalreporter.line(line)


def _told(finding: Finding) -> str:
    return "\n".join(finding.lines())

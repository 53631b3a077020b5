"""The session's report: filled by the benchmarks, shown at the end."""

from __future__ import annotations

import shlex

import pytest
from report import Report

_KEY = pytest.StashKey[Report]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_KEY] = Report()


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Report:
    return request.config.stash[_KEY]


def pytest_terminal_summary(config: pytest.Config) -> None:
    if config.stash[_KEY].groups:
        config.stash[_KEY].show(shlex.join(["pytest", *config.invocation_params.args]))

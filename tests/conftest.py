"""Starts what takes minutes on one core before the first test, so that it runs beside the others."""

from __future__ import annotations

import subprocess

import pytest
from interpreter_process import FOLDER, start_interpreted

_PROCESS = pytest.StashKey[subprocess.Popen[str]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the interpreter's tests if the one that waits for them is to run."""
    wanted = any(item.name == "test_kernels_in_the_interpreter" for item in session.items)
    if wanted and not session.config.option.collectonly:
        session.config.stash[_PROCESS] = start_interpreted(str(FOLDER))


@pytest.fixture
def interpreted(request: pytest.FixtureRequest) -> subprocess.Popen[str]:
    """The process that runs tests/interpreted."""
    return request.config.stash[_PROCESS]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """An interrupted run leaves no process behind."""
    process = session.config.stash.get(_PROCESS, None)
    if process is not None and process.poll() is None:
        process.kill()

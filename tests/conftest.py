"""How the tests share two cores: with `pytest -n 2` a file stays in one process, and the longest files come first.

Without `-n`, what takes minutes on one core starts before the first test, so that it runs beside the others.
"""

from __future__ import annotations

import os
import subprocess

import pytest
from interpreter_process import FOLDER, start_interpreted

if "PYTEST_XDIST_WORKER" in os.environ:
    # A process a core: threads of its own would only wait for each other's.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

_PROCESS = pytest.StashKey[subprocess.Popen[str]]()

#: Files of a minute or more, longest first: begun last, one of them would run alone at the end.
LONGEST = ("test_triton_interpreter", "test_emulated_training", "test_emulated_launches", "test_demo_run")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Keep a file's tests in one process and in our order, since their fixtures are per file."""
    if getattr(config.option, "numprocesses", None):
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, where processes share them."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the interpreter's tests if the one that waits for them is to run in this very process."""
    wanted = any(item.name == "test_kernels_in_the_interpreter" for item in session.items)
    if wanted and not session.config.option.collectonly and "PYTEST_XDIST_WORKER" not in os.environ:
        session.config.stash[_PROCESS] = start_interpreted(str(FOLDER))


@pytest.fixture
def interpreted(request: pytest.FixtureRequest) -> subprocess.Popen[str]:
    """The process that runs tests/interpreted."""
    stash = request.config.stash
    if _PROCESS not in stash:
        stash[_PROCESS] = start_interpreted(str(FOLDER))
    return stash[_PROCESS]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """An interrupted run leaves no process behind."""
    process = session.config.stash.get(_PROCESS, None)
    if process is not None and process.poll() is None:
        process.kill()

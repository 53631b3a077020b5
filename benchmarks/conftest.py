"""Options of a run, the order of its rows by worth, and the report at the end."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from groups import SIZES, Row
from report import RESULTS, Report, RowsError, replay
from session import Session, device_of
from variants import is_ours

from cast_kernels.cli import minutes

_KEY = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cast_kernels benchmarks")
    group.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto",
                    help="whose rows are measured; auto: the GPU's where there is one")  # fmt: skip
    group.addoption("--tier", choices=("first", "full"), default="first",
                    help="on a GPU: the rows of most worth (first, at most 60), or all")  # fmt: skip
    group.addoption("--minutes", type=minutes, default=float("inf"), metavar="M",
                    help="begin no group of rows once so many minutes have passed")  # fmt: skip
    group.addoption("--rows", type=Path, default=RESULTS, metavar="FILE",
                    help=f"where rows are kept as they come, as JSON ({RESULTS})")  # fmt: skip
    group.addoption("--resume", action="store_true", help="measure what --rows does not hold yet, on the same GPU")
    group.addoption("--sizes", choices=sorted(SIZES), default="paper",
                    help="of the problems; small rehearses a run, its figures mean nothing")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    given = config.option
    device, command = device_of(given.device), shlex.join(["pytest", *map(str, config.invocation_params.args)])
    try:
        report = Report(given.rows, command, device, given.sizes)
        session = Session(device, SIZES[given.sizes], given.minutes, report, given.resume)
        if given.resume:
            report.load(session.gpu())
    except RowsError as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[_KEY] = session


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `row` runs once for each row that its file declares for the device."""
    if "row" not in metafunc.fixturenames:
        return
    session = metafunc.config.stash[_KEY]
    tier = metafunc.config.option.tier if session.device == "cuda" else "full"
    groups = metafunc.module.groups(session.device, session.sizes)
    metafunc.parametrize("row", [Row(g, name) for g in groups for name in g.of_tier(tier)], ids=str)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU, sort rows by worth, and deselect files with `CPU_ONLY` unless they are named.

    Files without rows for the device are deselected too.
    """
    on_gpu = config.stash[_KEY].device == "cuda"
    named = {
        *re.findall(r"\w+", config.option.keyword),
        *(_subject(Path(arg.partition("::")[0])) for arg in config.args),
    }
    idle = [
        item
        for item in items
        if (on_gpu and getattr(item.module, "CPU_ONLY", False) and _subject(item.path) not in named)  # type: ignore[attr-defined]
        or ("row" in getattr(item, "fixturenames", ()) and not _row(item))
    ]
    items[:] = [item for item in items if item not in idle]
    config.hook.pytest_deselected(items=idle)
    if on_gpu:
        items.sort(key=lambda item: row.group.worth if (row := _row(item)) else 1 << 30)


def _subject(path: Path) -> str:
    """`host` of `bench_host.py`."""
    return path.stem.removeprefix("bench_")


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[_KEY].select([row for item in session.items if (row := _row(item))])


def _row(item: pytest.Item) -> Row | None:
    found = item.callspec.params.get("row") if hasattr(item, "callspec") else None
    return found if isinstance(found, Row) else None  # a test without rows has pytest's own mark here


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Session:
    return request.config.stash[_KEY]


@pytest.fixture(scope="session")
def report(bench: Session) -> Report:
    return bench.report


@pytest.fixture
def measure(bench: Session, benchmark: Any) -> Callable[[Row], None]:
    """Measure a row with its group, pass it to pytest-benchmark; skip it if it cannot run, fail it if it is wrong."""

    def run(row: Row) -> None:
        found = bench.row(row)
        benchmark.group = row.group.name
        replay(benchmark, found)
        if "failed" in found:
            pytest.fail(f"{row.name}: {found['failed']}", pytrace=False)
        if "missing" in found:
            pytest.skip(found["missing"])
        if is_ours(row.name) and not found.get("correct", True):  # a peer that misses the bound only loses its speed-up
            where, ratio = found["worst_tensor"], found["worst_error_over_eager"]
            pytest.fail(f"{row.name}: the error of {where} is {ratio:.2f} times eager's", pytrace=False)

    return run


def pytest_terminal_summary(config: pytest.Config) -> None:
    if config.stash[_KEY].report.groups:
        config.stash[_KEY].report.show()

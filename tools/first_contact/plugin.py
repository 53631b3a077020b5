"""pytest's part of the rows: reports the benchmarks' names, starts and results.

`pytest -p first_contact.plugin`. Rows that an earlier process began are skipped. If the GPU becomes unusable, the
process ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cast_kernels.gpu.rows import MODES
from first_contact.rows import BROKEN, Rows

_KEY = pytest.StashKey[Rows]()
_TOLD = pytest.StashKey[bool]()
#: A row's figures in a summary; its samples are in the benchmarks' own file.
FIGURES = (
    *(f"{mode}{figure}" for figure in ("median_ms", "spread_ms", "speedup", "speedup_spread") for mode in MODES),
    "predicted_ms", "worst_error_over_eager", "worst_tensor", "peak_mib", "kept_mib", "gflops",
    "of_ceiling", "of_copy", "no_graph", "stand_in",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_KEY] = Rows()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    rows = config.stash[_KEY]
    rows.plan(_name(item) for item in items)
    begun = [item for item in items if _name(item) in rows.begun]
    items[:] = [item for item in items if item not in begun]
    config.hook.pytest_deselected(items=begun)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.config.stash[_KEY].begin(_name(item))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.when == "call" or (report.when == "setup" and not report.passed):
        item.config.stash[_KEY].end(_name(item), **_found(item, report))
        _tell_ceilings(item)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    session = getattr(item, "funcargs", {}).get("bench")
    if session is not None and session.broken:
        pytest.exit(session.broken, returncode=BROKEN)


def _tell_ceilings(item: pytest.Item) -> None:
    """Report the GPU and its ceilings once, as soon as they are known."""
    report = getattr(item.funcargs.get("bench"), "report", None)
    if report is not None and report.about_device and not item.config.stash.get(_TOLD, False):
        item.config.stash[_TOLD] = True
        item.config.stash[_KEY].end("the GPU and its ceilings", None, **report.about_device, **report.ceilings)


def _name(item: pytest.Item) -> str:
    return item.callspec.id if hasattr(item, "callspec") else item.name


def _found(item: pytest.Item, report: pytest.TestReport) -> dict[str, Any]:
    row = _row(item) if report.when == "call" else {}
    figures = {name: row[name] for name in FIGURES if name in row}
    figures |= {f"{mode}samples": len(row[f"{mode}all_ms"]) for mode in MODES if f"{mode}all_ms" in row}
    if report.passed:
        return {"ok": None if "stand_in" in row else True, **figures}
    why = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    if report.skipped:
        return {"ok": None, "why_not": why, "late": "not begun" in why}
    return {"ok": False, "why_not": why.strip().splitlines()[-1] if why.strip() else "failed", **figures}


def _row(item: pytest.Item) -> dict[str, Any]:
    """The row's figures in the benchmarks' session; it has measured the row by now."""
    session, row = item.funcargs.get("bench"), item.funcargs.get("row")
    try:
        return dict(session.row(row)) if session is not None and row is not None else {}
    except Exception:  # the report has the earlier error
        return {}

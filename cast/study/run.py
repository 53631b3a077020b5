"""A study from its data to its tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as Printed

from cast.demo.run import machine
from cast.ground.files import write_json
from cast.study.data import prepare
from cast.study.jobs import Job, Settings, ensemble_metrics, finished, run_job
from cast.study.models import needed_experts
from cast.study.results import METRICS, table_results, tally
from cast.study.tables import StudyPlan

Result = dict[str, Any]


def run(plan: StudyPlan, out: Path, seeds: int, workers: int, settings: Settings, console: Console) -> Result:
    """See :func:`cast.study.main`; returns the content of study.json."""
    began = time.perf_counter()
    with _bars(console) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        data = prepare(out / "data", settings.sizes, settings.pictures, settings.config.image_size, show)
        names = plan.trained()
        experts = sorted({name for model in names for name in needed_experts(plan.models[model])})
        stages = [
            [Job(name, seed) for seed in range(seeds) for name in experts],
            # Seed by seed, so that a stopped run has whole tables of fewer seeds.
            [Job(name, seed, plan.models[name]) for seed in range(seeds) for name in names],
        ]
        results: dict[tuple[str, int], Result] = {}
        done, total = 0, sum(map(len, stages))
        work = partial(run_job, out=out, settings=settings, data=data)
        with _pool(workers) as pool:
            for jobs in stages:
                for job, result in _all(work, jobs, out, settings, pool):
                    done += 1
                    show("trainings", done, total)
                    if job.model is not None:
                        results[job.name, job.seed] = result
                    bars.console.print(_line(job, result), highlight=False, markup=False)
    runs = {key: result["metrics"] for key, result in results.items()}
    for name, model in plan.models.items():
        if model.members and all((member, 0) in runs for member in model.members):
            for seed in range(seeds):
                members = [Job(member, seed, plan.models[member]) for member in model.members]
                runs[name, seed] = ensemble_metrics(members, out, data)
    tables = {table.name: table_results(table, runs, range(seeds), plan) for table in plan.tables}
    study = {
        "tables": tables,
        "models": {name: _about(name, plan, results, seeds) for name in names},
        "seeds": seeds,
        "settings": settings.to_dict(),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "training_seconds": round(sum(result["seconds"] for result in results.values()), 1),
        "seconds_of_this_run": round(time.perf_counter() - began, 1),
    }
    write_json(out / "study.json", study)
    for table in tables.values():
        print_table(console, table)
    return study


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes for trainings, or None for this process. After an error no further training starts."""
    if workers == 1:
        yield None
        return
    # Forking a process with threads (PyTorch's) can deadlock the child.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _all(
    work: Callable[[Job], Result], jobs: Sequence[Job], out: Path, settings: Settings, pool: ProcessPoolExecutor | None
) -> Iterator[tuple[Job, Result]]:
    """Every job and its result: first those of earlier runs, then the others in the order in which they finish."""
    todo = []
    for job in jobs:
        result = finished(job, out, settings)
        if result is None:
            todo.append(job)
        else:
            yield job, result
    if pool is None:
        yield from ((job, work(job)) for job in todo)
        return
    futures = {pool.submit(work, job): job for job in todo}
    for future in as_completed(futures):
        yield futures[future], future.result()


def _about(name: str, plan: StudyPlan, results: dict[tuple[str, int], Result], seeds: int) -> Result:
    own = [results[name, seed] for seed in range(seeds)]
    return {
        "open": plan.models[name].open,
        "parameters": own[0]["parameters"],
        "training_seconds": [round(result["seconds"], 1) for result in own],
        "last_epoch": [result["history"][-1] for result in own],
    }


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _line(job: Job, result: Result) -> str:
    last = {name: value for name, value in result["history"][-1].items() if name != "epoch"}
    figures = result.get("metrics", last)
    shown = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
    return f"{job.name}, seed {job.seed}: {shown}  ({result['seconds']:.0f} s)"


def print_table(console: Console, table: Result) -> None:
    """The paper's figures beside ours, and the numbers of orderings by verdict."""
    printed = Printed(title=escape(f"{table['source']}: {table['title']}"))
    printed.add_column("")
    for who in ("paper", "miniature"):
        for metric in METRICS:
            printed.add_column(f"{who}\n{metric}", justify="right")
    for row in table["rows"]:
        paper = [f"{row['paper'][m]:.1f}" if row["paper"] else "-" for m in METRICS]
        if "mean" in row:
            own = [f"{row['mean'][m]:.1f} ± {row['spread'][m]:.1f}" for m in METRICS]
        else:
            own = ["not run", "", ""]
        printed.add_row(escape(row["label"]), *paper, *own)
    console.print(printed)
    for metric, counts in tally(table["orderings"]).items():
        console.print(f"  {metric}: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()), highlight=False)
    for reason in _reasons(table["rows"]):
        console.print(f"  {reason}", highlight=False, markup=False)


def _reasons(rows: Iterable[Result]) -> list[str]:
    return [f"not run: {row['label']}: {row['not_run']}" for row in rows if row.get("not_run")]

"""Faults in what measures: the timer, the groups of a GPU, and what is told of them."""

from __future__ import annotations

from faults.base import fault

TIMER, TIMER_TEST = "cast_kernels/gpu/timing.py", "tests/test_timing.py"
COMPARE, BENCHMARKS_TEST = "benchmarks/compare.py", "tests/test_benchmarks.py"
TABLES_TEST = "tests/test_benchmark_tables.py"
SESSION, REHEARSAL_TEST = "benchmarks/session.py", "tests/test_rehearsal.py"

FAULTS = [
    fault("a slow row has one sample", TIMER_TEST, (TIMER, "FEWEST = 3", "FEWEST = 1")),
    fault("a speed-up of medians, not of rounds", TIMER_TEST,
          (TIMER, "Spread.of([base / other for base, other in zip(baseline, others, strict=True)])",
           "Spread.of([statistics.median(baseline) / other for other in others])")),
    fault("rows are timed one behind the other", TIMER_TEST,
          (TIMER, "    seen = [first] * slow + [one_of_each(repeats) for _ in range(rounds - slow)]\n",
           "    rest = {name: [elapsed(steps[name], repeats[name]) for _ in range(rounds - slow)] for name in steps}\n"
           "    seen = [first] * slow + [{name: rest[name][i] for name in rest} for i in range(rounds - slow)]\n")),
    fault("a cold cache is warm", TIMER_TEST, (TIMER, "        machine.flush_cache()\n", "")),
    fault("a wrong row has a speed-up", f"{BENCHMARKS_TEST} -k speedup",
          (COMPARE, 'if baseline in seen and row.get("correct", True):', "if baseline in seen:")),
    fault("a row that raises ends its group", f"{BENCHMARKS_TEST} -k raises",
          (COMPARE, "        except Exception as error:\n            self.lose(",
           "        except Unavailable as error:\n            self.lose(")),
    fault("a figure without its spread", f"{TABLES_TEST} -k spread",
          ("cast_kernels/gpu/rows.py", 'return f"{text(row[key])} ({low}..{high})"',
           "return text(row[key])")),
    fault("a stand-in's time is shown", f"{TABLES_TEST} -k spread",
          ("cast_kernels/gpu/rows.py", 'if "stand_in" in row:\n            line', "if not row:\n            line")),
    fault("another GPU's prediction", f"{TABLES_TEST} -k prediction",
          ("benchmarks/prediction.py", 'found["constants"]["multiprocessors"] == gpu["multiprocessors"]', "found")),
    fault("a resumed run measures again", f"{REHEARSAL_TEST} -k resumed",
          (SESSION, "dict(self.report.known(group.title)) if self.resume else {}", "{}")),
    fault("a group is begun after its time", f"{REHEARSAL_TEST} -k without_time",
          (SESSION, "if self.seconds_left() < LEAST_SECONDS", "if self.seconds_left() < -1e9")),
    fault("a fault is told as a failed row alone", f"{REHEARSAL_TEST} -k after_a_fault",
          (SESSION, "self.broken = self.report.broken = str(error)", "self.broken = str(error)")),
    fault("a fault is a refused tile", "tests/test_tune.py -k fault",
          ("cast_kernels/gpu/tune.py", "                require_usable(machine)  # raises", "                # or")),
    fault("equal bits of PyTorch's attention demanded", "tests/test_gpu_check.py -k equal_bits",
          ("cast_kernels/gpu/check.py", 'return backend != "cpu" and isinstance', "return False and isinstance")),
    fault("a row that failed passes", "tests/test_gpu_check.py -k what_a_row_means",
          ("cast_kernels/gpu/check.py", 'any("failed" in row for _, row in rows)', "any(())")),
]  # fmt: skip

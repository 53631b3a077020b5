"""The command `python -m ptx_emulator run SCRIPT.py`: a program's kernels, executed and checked without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from ptx_emulator import SHARED_LIMIT

COMMANDS = ("run",)
LANDINGS = ("early", "late", "random")
_EPILOG = """
The command's own options stand before SCRIPT.py (or -m MODULE) or right behind it. The first word behind it that is no
such option begins the program's own arguments. -- ends the command's options and is not handed on.

Exit status: 1 after a finding, 2 after bad usage, otherwise the program's own.
"""


def main(words: Sequence[str]) -> int:
    """Run one command and return the exit status."""
    parser, run = _parsers()
    if not words or words[0] not in COMMANDS:
        parser.parse_args(words)  # --help, or bad usage
        parser.error("which command? `run SCRIPT.py` is the one")
    own, program, theirs = split(words[1:], run)
    options = run.parse_args(own)
    if options.module is None and not program:
        run.error("which program? give SCRIPT.py or -m MODULE")
    if options.module is None and not Path(program).is_file():
        run.error(f"no file {program}: give the path of a Python script, or -m MODULE")
    if options.landing == "random" and options.seed is None:
        run.error("--landing random draws from a seed: add --seed 0")
    if options.json and not options.json.parent.is_dir():
        run.error(f"--json {options.json}: there is no folder {options.json.parent}")
    lacking = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if lacking:
        print(f"ptx_emulator run: error: {' and '.join(lacking)} not installed; `run` needs both", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        run.error("TRITON_INTERPRET is set, so kernels would be interpreted, not compiled; unset it")
    return _run(options, program, theirs)


def _run(options: Namespace, program: str, theirs: list[str]) -> int:
    """Run the program, print the report, and return the exit status."""
    from ptx_emulator.targets import target
    from ptx_emulator.triton.checker import Checker
    from ptx_emulator.triton.program import run_program

    checker = Checker(
        target(options.target),
        options.landing,
        options.seed,
        not options.no_checks,
        options.first,
        options.all_configs,
        lane_order=options.lane_order,
    )
    status = run_program(checker, options.module, program, theirs, options.cache, options.device_as_cpu)
    print(checker.text(), file=sys.stderr)
    status = 1 if checker.findings else status
    if options.json:
        told = {"program": options.module or program, "arguments": theirs, "status": status} | checker.as_json()
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    return status


def _parsers() -> tuple[ArgumentParser, ArgumentParser]:
    parser = ArgumentParser(prog="python -m ptx_emulator", description=__doc__.split(": ", 1)[1].capitalize())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    run = commands.add_parser(
        "run", help="run a program that launches Triton or Gluon kernels on CPU tensors",
        description="Run a program that launches Triton or Gluon kernels on CPU tensors: each launch is compiled for "
        "the target and executed on the CPU. Races, accesses out of bounds or misaligned, deadlocks and reads of what "
        "has not arrived are reported behind the program's output, on stderr.",
        usage="python -m ptx_emulator run [options] (SCRIPT.py | -m MODULE) [options] [ARGS ...]",
        epilog=_EPILOG, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    run.add_argument("--target", choices=tuple(SHARED_LIMIT), default="sm_90", help="architecture (sm_90)")
    run.add_argument("-m", dest="module", metavar="MODULE", help="run a module, as python's -m does")
    run.add_argument("--json", type=Path, metavar="FILE", help="also write the report here, as JSON")
    run.add_argument("--first", action="store_true", help="end the launch of the first finding with an exception")
    run.add_argument("--all-configs", action="store_true", help="execute each configuration of an autotuned kernel")
    run.add_argument("--landing", choices=LANDINGS, default="late", help="when asynchronous copies land (late)")
    run.add_argument("--seed", type=_number, metavar="N", help="draw the order of warps; without: program order")
    run.add_argument("--no-checks", action="store_true", help="leave out races and data in flight: faster")
    run.add_argument(
        "--lane-order", action="store_true", help="also find lanes of a warp that exchange without meeting"
    )
    run.add_argument("--device-as-cpu", action="store_true", help='read "cuda" in calls of PyTorch as "cpu"')
    run.add_argument("--cache", type=Path, metavar="FOLDER", help="compiled kernels are kept here (Triton's own cache)")
    return parser, run


def _number(text: str) -> int:
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} is no whole number of at least 0")
    return int(text)


def split(words: Sequence[str], parser: ArgumentParser) -> tuple[list[str], str, list[str]]:
    """The command's own words, the script ("" with -m), and the program's own words."""
    takes_value = {name: action.nargs != 0 for action in parser._actions for name in action.option_strings}
    own: list[str] = []
    script, left = "", list(words)
    while left:
        word = left[0]
        name = word.partition("=")[0]
        if word == "--":
            return own, script, left[1:]
        if name in takes_value:
            count = 2 if takes_value[name] and "=" not in word else 1
            own += left[:count]
            left = left[count:]
        elif script or "-m" in own:
            break
        elif word.startswith("-"):
            own.append(left.pop(0))  # which the parser refuses
        else:
            script = left.pop(0)
    return own, script, left

"""The command `cast-kernels`. Imports stay inside the functions: --help loads the names of choices, and no tool.

The standard library parses the options: a bare machine with a GPU and PyTorch has no other parser.
"""

from __future__ import annotations

import json as json_module
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

#: Of the benchmarks.
TIERS = ("first", "full")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 1 when a gate fails. Bad usage exits with 2."""
    name = ""
    try:
        options = _parser().parse_args(arguments)
        name = options.command
        return COMMANDS[name][2](options)
    except ValueError as error:  # an environment variable that names no choice
        print(f"cast-kernels: {error}", file=sys.stderr)
        return 2
    except (ImportError, RuntimeError, OSError) as error:  # no Triton, disassembler or emulator; no place to write
        print(f"{' '.join(('cast-kernels', *name.split()))}: error: {error}", file=sys.stderr)
        return 1


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="cast-kernels", description="Fused kernels for two-stream video transformers.")
    commands = parser.add_subparsers(dest="command", required=True, title="commands", metavar="COMMAND")
    for name, (help_line, add_options, _) in COMMANDS.items():
        description = help_line[0].upper() + help_line[1:] + "."
        add_options(commands.add_parser(name, help=help_line, description=description, allow_abbrev=False))
    return parser


def _info_options(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _info(options: Namespace) -> int:
    from cast_kernels import info

    if options.json:
        print(json_module.dumps(info.collect(), indent=2))
    else:
        info.show()
    return 0


def _compile_options(parser: ArgumentParser) -> None:
    from cast_kernels.evidence.cases import KINDS
    from cast_kernels.evidence.problems import COMPILED, PROBLEMS

    _add_choices(parser, "--target", COMPILED, None, "architectures")
    _add_choices(parser, "--dtype", KINDS, None, "dtypes, amp for autocast")
    parser.add_argument("--problems", choices=PROBLEMS, help="one step, the paper's size (by default), or every kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the tables as JSON")
    parser.add_argument(
        "--ptxas", nargs="+", metavar="PATH",
        help="assemble the same PTX with these too, and compare; nothing else is checked then",
    )  # fmt: skip
    parser.add_argument(
        "--cache", nargs="?", const="", type=str, metavar="FOLDER",
        help="keep compiled kernels here for next time; without a folder, check nothing and fill Triton's own cache "
        "with the kernels that a CAST-B launches on this machine's GPU, or on --target",
    )  # fmt: skip
    parser.add_argument(
        "--cuda", action="store_true",
        help="check the kernels of csrc/cuda instead, as the build compiled them; --ptxas names one other assembler",
    )  # fmt: skip


def _compile(options: Namespace) -> int:
    if options.cuda:
        return _compile_cuda(options)
    from cast_kernels.evidence.cases import DTYPES
    from cast_kernels.evidence.problems import ASSEMBLED, GATED

    if options.cache == "":
        from cast_kernels.evidence import warm

        if options.ptxas:
            raise ValueError(
                "--cache without a folder compiles for this machine's GPU; give it one, or leave out --ptxas"
            )

        if strange := [name for name in options.dtype or () if name not in DTYPES]:
            raise ValueError(
                f"--cache fills for autocast to a dtype, one of {', '.join(DTYPES)}; --dtype has {strange[0]}"
            )
        return warm.main(options.target, options.dtype)
    from cast_kernels.evidence import compile as compiling

    targets, dtypes = options.target or GATED, options.dtype or (*DTYPES, "amp")
    cache, problems = Path(options.cache) if options.cache else None, options.problems or "paper"
    if options.ptxas:
        from cast_kernels.evidence import reassemble

        targets = options.target or ASSEMBLED
        return reassemble.main(targets, dtypes, problems, options.ptxas, options.json, cache)
    return compiling.main(targets, dtypes, problems, options.json, cache)


def _compile_cuda(options: Namespace) -> int:
    given = [name for name in ("target", "dtype", "problems", "cache") if getattr(options, name) is not None]
    if given:
        raise ValueError(f"compile --cuda checks the build's own kernels; leave out --{given[0]}")
    if options.ptxas and len(options.ptxas) > 1:
        raise ValueError(f"compile --cuda takes one assembler, not {len(options.ptxas)}")
    from cast_kernels.evidence import cuda_compile

    return cuda_compile.main(options.ptxas[0] if options.ptxas else None, options.json)


def _emulate_options(parser: ArgumentParser) -> None:
    from cast_kernels.evidence.cases import KINDS
    from cast_kernels.evidence.problems import EMULATED, ENGINES, PLANTED, SIZES

    _add_choices(parser, "--target", EMULATED, EMULATED, "architectures")
    _add_choices(parser, "--dtype", KINDS, ("amp", "bf16"), "dtypes, amp for autocast")
    parser.add_argument("--size", choices=SIZES, default="small", help="problems to run")
    parser.add_argument(
        "--engine", choices=ENGINES,
        help="executes the kernels: the interpreter is the definition, native is compiled code with equal results; "
        "by default native if it is built",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write errors and counters as JSON")
    parser.add_argument("--mutants", action="store_true", help="plant faults in the PTX instead, and see them caught")
    parser.add_argument(
        "--every", type=_positive, default=1, metavar="N", help="with --mutants: each N-th fault of a kernel alone"
    )
    parser.add_argument(
        "--planted", nargs="+", choices=PLANTED, metavar="NAME",
        help=f"with --mutants: problems whose kernels get faults, out of {', '.join(PLANTED)}",
    )  # fmt: skip


def _emulate(options: Namespace) -> int:
    given = {"every": options.every > 1, "planted": options.planted}
    if not options.mutants and (named := [name for name, is_given in given.items() if is_given]):
        raise ValueError(f"emulate --{named[0]} is of planted faults; add --mutants, or leave it out")
    from cast_kernels.evidence import emulate, mutant_table

    if options.mutants:
        return mutant_table.main(
            options.target, options.dtype, options.json, options.engine, options.every, options.planted
        )
    return emulate.main(options.target, options.dtype, options.size, options.json, options.engine)


def _predict_options(parser: ArgumentParser) -> None:
    from cast_kernels import Recompute
    from cast_kernels.evidence.cases import KINDS, STREAMS
    from cast_kernels.evidence.problems import PREDICTED

    _add_choices(parser, "--device", PREDICTED, None, "GPUs (all)")
    parser.add_argument("--batch", nargs="+", type=_positive, default=[1, 6, 32], metavar="B", help="clips")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all of it as JSON")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="also write a JSON a GPU and README.md here")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep compiled kernels here for the next time")
    parser.add_argument("--emulate", action="store_true", help="count some programs of each kernel in the emulator")
    parser.add_argument(
        "--recompute", choices=[level.value for level in Recompute],
        help="how much backward computes again (nothing, as auto chooses on these GPUs)",
    )  # fmt: skip
    parser.add_argument("--kind", choices=KINDS, help="dtypes (amp, as `cast train` runs)")
    parser.add_argument(
        "--model", action="store_true", help="a whole CAST-B instead, beside eager and torch.compile: takes minutes"
    )
    parser.add_argument(
        "--cuda", action="store_true",
        help="the CUDA C++ kernels by arithmetic instead, beside Triton's: compiles nothing, needs a checkout",
    )  # fmt: skip
    _add_choices(
        parser, "--streams", STREAMS, None, "with --model: dtypes of the residual streams under autocast (all)"
    )


def _predict(options: Namespace) -> int:
    if options.cuda:
        return _predict_cuda(options)
    if options.model and options.kind not in (None, "amp"):
        raise ValueError(f"predict --model is of autocast to bf16 alone; leave out --kind {options.kind}, or --model")
    if options.model and options.emulate:
        raise ValueError("predict --model emulates nothing; leave out --emulate, or --model")
    if options.streams and not options.model:
        raise ValueError("predict --streams is of the whole model's residual streams; add --model, or leave it out")
    from cast_kernels.evidence import predict, whole_model
    from cast_kernels.evidence.cases import STREAMS
    from cast_kernels.evidence.problems import PREDICTED

    devices = options.device or list(PREDICTED)
    if options.model:
        return whole_model.main(
            devices, options.batch, options.json, options.folder, options.cache,
            options.recompute or "nothing", options.streams or tuple(STREAMS),
        )  # fmt: skip
    return predict.main(
        devices, options.batch, options.json, options.folder, options.cache, options.emulate,
        options.recompute or "nothing", options.kind or "amp",
    )  # fmt: skip


def _predict_cuda(options: Namespace) -> int:
    from cast_kernels.evidence.cuda_model import report

    if options.model or options.emulate or options.streams or options.cache:
        raise ValueError("predict --cuda compiles and counts nothing; leave out --model, --emulate, --streams, --cache")
    if options.kind not in (None, *report.KINDS):
        raise ValueError(f"predict --cuda is of {' and '.join(report.KINDS)}; --kind is {options.kind}")
    if options.recompute == "all":
        raise ValueError("predict --cuda is of cheap and nothing; --recompute is all")
    if strange := [name for name in options.device or () if name not in report.DEVICES]:
        raise ValueError(f"predict --cuda is of {' and '.join(report.DEVICES)}; --device has {strange[0]}")
    return report.main(
        options.device or report.DEVICES, options.batch, options.json, options.folder,
        [options.recompute] if options.recompute else ["cheap", "nothing"],
        [options.kind] if options.kind else list(report.KINDS),
    )  # fmt: skip


def _gpu_check_options(parser: ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="report as JSON (gpu-check-NAME.json)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="report as Markdown (gpu-check-NAME.md)")
    parser.add_argument("--quick", action="store_true", help="one problem, and at most five minutes of benchmarks")
    parser.add_argument("--tier", choices=TIERS, help="of the benchmarks: the rows of most worth (first), or all")
    parser.add_argument("--minutes", type=minutes, metavar="M", help="begin no group of benchmarks after so many")


def _gpu_check(options: Namespace) -> int:
    from cast_kernels.gpu import check

    return check.main(options.json, options.report, options.quick, options.tier, options.minutes)


def _tune_options(parser: ArgumentParser) -> None:
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table here, as Python")


def _tune(options: Namespace) -> int:
    from cast_kernels.gpu import tune

    return tune.main(options.write)


def _positive(text: str) -> int:
    """A whole number above zero, as an option's value."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return number


def minutes(text: str) -> float:
    """Minutes, more than none, as an option's value."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not minutes > 0:
        raise ArgumentTypeError(f"{text!r} is not a number above zero")
    return minutes


def _add_choices(
    parser: ArgumentParser, name: str, allowed: Collection[str], default: Sequence[str] | None, what: str
) -> None:
    parser.add_argument(
        name, nargs="+", choices=allowed, default=default and list(default), metavar=name.strip("-").upper(),
        help=f"{what}, out of {', '.join(allowed)}",
    )  # fmt: skip


#: Name -> help, options, function.
COMMANDS: dict[str, tuple[str, Callable[[ArgumentParser], None], Callable[[Any], int]]] = {
    "info": ("what was built, what was not and why, and what runs here", _info_options, _info),
    "compile": (
        "compile every kernel without a GPU, and check its registers, memory and instructions",
        _compile_options,
        _compile,
    ),
    "emulate": ("run the compiled kernels on the CPU and check their results", _emulate_options, _emulate),
    "predict": (
        "predict the least time of the kernels on a GPU, without one",
        _predict_options,
        _predict,
    ),
    "gpu-check": ("check and time everything on the GPU of this machine", _gpu_check_options, _gpu_check),
    "tune": ("measure tiles on the GPU of this machine, and write their table", _tune_options, _tune),
}


if __name__ == "__main__":
    sys.exit(main())

"""The command `cast`. One function is one subcommand.

A function's parameters become the options, its docstring the help. Positional-only parameters are positional, `bool`
ones are switches. `*arguments` takes all words unchanged, for a command with its own parser. Imports stay inside the
functions, so that `cast --help` does not load PyTorch.
"""

from __future__ import annotations

import argparse
import codecs
import errno
import inspect
import io
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from cast.ground.optional import MissingExtraError


def predict(
    video: str,
    /,
    checkpoint: list[str] | str,
    top: int = 5,
    json: bool = False,
    sampling: Literal["uniform", "dense"] | None = None,
    every: int = 0,
    window: int = 64,
    batch: int = 6,
    trust_pickle: bool = False,
    timeout: float = 30.0,
    graphs: bool = False,
) -> None:
    """Name the action in a video, in a folder of videos, or in a stream.

    A file is tested with all views of the published protocol; every frame is decoded exactly. The answer is the mean of
    the model's probabilities over these views. A folder gives a line of JSON for each video, a stream a line for each
    guess. Files that cannot be read are named, and then the exit code is 1. Files of a folder that are no videos are
    named too.

    Args:
        video: any file that FFmpeg reads, or a folder of its frames; a folder of videos; a camera such as /dev/video0,
            an address, or - for a pipe
        checkpoint: directory of a training or of save_pretrained, name or file of a published model, or repository of
            the Hub; several as [A,B] answer as one, by the mean of their probabilities
        top: how many guesses to show
        json: for one video print JSON instead of a table
        sampling: of frames, uniform as for EPIC-Kitchens and Something-Something, or dense as for Kinetics. Without it
            as the model was trained. A model that does not say gets uniform
        every: frames between two guesses about a stream. With a number above 0 a file is read as a stream too; 0 stands
            for 16 frames of a camera
        window: frames of a stream that a guess looks back on
        batch: clips in a forward pass
        trust_pickle: let a checkpoint's file run code while it loads; only if you trust its author
        timeout: seconds in which a stream must open, and in which each next picture must come; 0 waits without an end
        graphs: replay CUDA graphs, so that the host launches no single kernels; needs a GPU
    """
    from cast.predict import main

    main(video, checkpoint, top, json, sampling, every, window, batch, trust_pickle, timeout, graphs)


def export(
    checkpoint: str,
    /,
    format: Literal["torch", "onnx", "torch-cuda"] = "torch",
    out: Path | None = None,
    trust_pickle: bool = False,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Write a model as a program that runs without this package, or with its kernels on a GPU.

    The program takes any number of clips at a time. Its answers are compared with the model's before its file appears.
    A program that answers otherwise is not written. A program for a GPU is compared only where there is a GPU.

    Args:
        checkpoint: directory of a training or of save_pretrained, name or file of a published model, or repository of
            the Hub
        format: what loads the program. torch: torch.export.load; onnx: ONNX Runtime; torch-cuda: torch.export.load
            beside the package cast_kernels, on a GPU. Writing it needs no GPU
        out: the file; without it the checkpoint's name with .pt2 or .onnx, in the working directory
        trust_pickle: let a checkpoint's file run code while it loads; only if you trust its author
        precision: of weights and products, for torch-cuda; the others have float32
    """
    from cast.export import main

    main(checkpoint, format, out, trust_pickle, precision)


def evaluate(
    checkpoint: list[Path],
    dataset: Path,
    /,
    out: Path = Path("runs/evaluation"),
    split: str = "val",
    sampling: Literal["uniform", "dense"] | None = None,
    views: int = 0,
    crops: int = 3,
    batch_size: int = 12,
    workers: int = 2,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    baselines: dict[str, Path] | None = None,
    log: Path | None = None,
    format: Literal["jsonl", "parquet"] = "jsonl",
    sls: tuple[int, int, int] | None = None,
    trust_pickle: bool = False,
) -> None:
    """Test a model on a data set with the published multi-view protocol, and report.

    Writes predictions, metrics.json and report.html. Run it under torchrun or accelerate launch to share the videos
    among processes; the results are the same. A run that was killed goes on where it was.

    Args:
        checkpoint: directory of a training or of save_pretrained, name or file of a published model, repository of the
            Hub, or predictions to report on; several models answer as one, by the mean of their probabilities
        dataset: directory, YAML file with a data section, or annotation file
        out: directory of the results
        split: train, val or test
        sampling: of frames, uniform or dense. Without it as the model was trained. Where the model does not say, as the
            data set says
        views: temporal views; 0 takes the published number, 2 (uniform sampling) or 5 (dense)
        crops: spatial crops of each view
        batch_size: clips in a forward pass
        workers: decoding processes of each process; 0 decodes between forward passes
        dtype: of the model's arithmetic
        baselines: other models' predictions on the same videos, as --baselines.NAME FILE
        log: the training's JSONL log, for the report's learning curves; log.jsonl beside the checkpoint if there is one
        format: of the predictions' file
        sls: also write EPIC-Kitchens-100's submission, with these supervision levels, as [pretraining,labels,data]
        trust_pickle: let a checkpoint's file run code while it loads; only if you trust its author
    """
    from cast.evaluation.run import Options, main

    options = Options(
        split, sampling, views, crops, batch_size, workers, dtype, baselines or {}, log, format, sls, trust_pickle
    )
    main(checkpoint, dataset, out, options)


def demo(out: Path | None = None, seeds: int = 1, quick: bool = False) -> None:
    """Make a small data set of videos, train CAST on it, compare it with its experts, write a report.

    The demo downloads nothing and needs no GPU. A run that was killed goes on where it was when it is started again.

    Args:
        out: directory for videos, checkpoints, metrics.json and report.html; runs/demo, or runs/demo-quick with --quick
        seeds: how many times to train, each with another seed
        quick: fewer classes, clips and frames: a report in one to three minutes
    """
    from cast.demo import main

    main(out=out, seeds=seeds, quick=quick)


def train(*arguments: str) -> None:
    """Train CAST by a recipe, on one GPU or on many.

    cast train RECIPE [key=value ...] [--resume] [--print_config]; cast train --help explains every setting.

    Args:
        arguments: a recipe, overrides and switches, read by the recipe's own parser
    """
    from cast.training.command import main

    main(arguments)


def pretrain(*arguments: str) -> None:
    """Pre-train a temporal expert on your own videos, without labels.

    cast pretrain RECIPE [key=value ...] [--resume] [--print_config]; cast pretrain --help explains every setting.

    Args:
        arguments: a recipe, overrides and switches, read by the recipe's own parser
    """
    from cast.pretrain.command import main

    main(arguments)


def study(rows: list[str], /, out: Path = Path("runs/study"), seeds: int = 3, workers: int = 1) -> None:
    """Train the rows of the paper's ablation tables on the demo's videos, and print them beside the paper's figures.

    The study downloads nothing and needs no GPU. The same command does not train finished rows again.

    Args:
        rows: table1a to table1h, table5, table7, table8, all, or YAML files like the package's study/rows.yaml
        out: directory for data, results, study.json and checkpoints
        seeds: how many times to train each row, each with another seed
        workers: trainings at a time, each on one core
    """
    from cast.study import main

    main(rows, out, seeds, workers)


def data(
    action: Literal["check"],
    dataset: Path,
    /,
    root: Path | None = None,
    workers: int = 0,
    out: Path | None = None,
    every_frame: bool = False,
) -> None:
    """Check a data set before training on it.

    The check reads every annotation and probes every video in parallel. It prints the videos that are missing, empty,
    undecodable or too short, with the lines that name them; then the exit code is 1. It writes the skip list that
    training reads. Lines that a person added to this list, with a fault of another name, stay.

    Args:
        action: what to do
        dataset: a directory with train.csv or val.csv, a YAML file with a data section, or an annotation file
        root: directory of the data set, where dataset is not it
        workers: processes that probe; 0 for one per core
        out: where to write the skip list, if not to skip.csv in the data set's directory
        every_frame: decode every frame, since training may take any; slow. Without it those that validation takes
    """
    from cast.video.check import main

    main(dataset, root, workers or None, out, every_frame)


_BATCH = "lower optim.micro_batch (the steps stay those of optim.total_batch)"
#: Advice when a device's memory is full, by command.
_MEMORY = {
    "train": f"{_BATCH}, or give run.recompute=all",
    "pretrain": _BATCH,
    "evaluate": "lower --batch_size, or take --dtype bfloat16",
    "predict": "lower --batch",
}

#: In the order in which a user needs them.
COMMANDS: tuple[Callable[..., None], ...] = (demo, data, pretrain, train, evaluate, predict, export, study)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 after an error, 130 after an interrupt. Bad usage exits with 2."""
    _print_anything()
    words = sys.argv[1:] if arguments is None else list(arguments)
    own = {command.__name__: command for command in COMMANDS if "rest" in _kinds(command).values()}
    if words and words[0] in own:
        return _run(words[0], lambda: own[words[0]](*words[1:]))
    parser, commands = _parser()
    namespace = parser.parse_args(words)
    command = commands[namespace.subcommand]
    options = namespace[namespace.subcommand].as_dict()
    positional = [options.pop(name) for name, kind in _kinds(command).items() if kind == "positional"]
    return _run(namespace.subcommand, lambda: command(*positional, **options))


def _print_anything() -> None:
    """Escape characters that the terminal's encoding lacks, in names of files and classes, instead of raising."""

    def escape(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
        return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4)), error.end

    codecs.register_error("cast-json", escape)  # a line of JSON stays valid
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="cast-json")


def _run(name: str, command: Callable[[], None]) -> int:
    try:
        command()
    except (ValueError, OSError, MissingExtraError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = "; free space where the command writes, or name another place (--out), and give it again" if full else ""
        print(f"cast {name}: error: {error}{cure}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        text = _explained(name, error)
        if text is None:
            raise
        print(f"cast {name}: error: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"cast {name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _explained(name: str, error: RuntimeError) -> str | None:
    """One line for an error that the user can fix; None for a fault of the program."""
    from torch import OutOfMemoryError  # imported late: a raised error means that both are loaded

    from cast.video.workers import WorkerError

    if isinstance(error, WorkerError):
        return str(error)
    if isinstance(error, OutOfMemoryError):
        said = ". ".join(str(error).split(". ")[:2])  # the requested memory, without PyTorch's statistics after it
        return f"{said}; {_MEMORY.get(name, 'free memory on the device')}"
    return None


class _Help(DefaultHelpFormatter):
    """Help with defaults, without the types that jsonargparse also prints."""

    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.option_strings and action.nargs != 0 and not action.required
        show = told and action.default is not None  # without a default the text describes the behaviour
        return f"{action.help} (default: %(default)s)" if show else action.help or ""


def _parser() -> tuple[ArgumentParser, dict[str, Callable[..., None]]]:
    parser = ArgumentParser(
        prog="cast",
        description="CAST, the two-stream video transformer: from a video file to an action.",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"cast {_version()}")
    subcommands = parser.add_subcommands(required=True, title="commands", metavar="COMMAND")
    for command in COMMANDS:
        help_text = parse_docstring(inspect.getdoc(command) or "").short_description
        own = _command_parser(command)
        subcommands.add_subcommand(command.__name__, own, help=help_text)
        own.prog = f"cast {command.__name__}"  # without jsonargparse's "[options]"; none follow
    return parser, {command.__name__: command for command in COMMANDS}


def _command_parser(command: Callable[..., None]) -> ArgumentParser:
    docstring = parse_docstring(inspect.getdoc(command) or "")
    helps = {parameter.arg_name: parameter.description for parameter in docstring.params}
    parser = ArgumentParser(description=docstring.description, formatter_class=_Help)
    kinds, parameters = _kinds(command), inspect.signature(command, eval_str=True).parameters
    for name, kind in kinds.items():
        if kind == "positional":
            annotation = parameters[name].annotation
            choices: dict[str, Any] = {"choices": get_args(annotation)} if get_origin(annotation) is Literal else {}
            metavar = "|".join(choices["choices"]) if choices else name.upper()
            several = "+" if get_origin(annotation) is list else None
            parser.add_argument(name, metavar=metavar, nargs=several, help=helps[name], **choices)
    options = [name for name, kind in kinds.items() if kind == "option"]
    chosen = {name: words for name in options if (words := _words(parameters[name].annotation))}
    parser.add_function_arguments(
        command, as_group=False, skip={name for name in kinds if name not in options or name in chosen}
    )
    for name, words in chosen.items():  # jsonargparse's error about a wrong word would show Python's types
        parser.add_argument(f"--{name}", choices=words, default=parameters[name].default, help=helps[name])
    for name, kind in kinds.items():
        if kind == "switch":
            names = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
            parser.add_argument(*names, dest=name, action="store_true", help=helps[name])
    return parser


def _words(annotation: Any) -> tuple[str, ...]:
    """The words of `Literal[...]` or `Literal[...] | None`; none for another type."""
    literals = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal]
    return get_args(literals[0]) if literals else ()


def _kinds(command: Callable[..., None]) -> dict[str, Literal["positional", "switch", "option", "rest"]]:
    kinds: dict[str, Any] = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            kinds[name] = "positional"
        elif parameter.kind is parameter.VAR_POSITIONAL:
            kinds[name] = "rest"
        else:
            kinds[name] = "switch" if parameter.annotation is bool else "option"
    return kinds


def _version() -> str:
    try:
        return metadata.version("cast-kernels")
    except metadata.PackageNotFoundError:
        return "(not installed: run from its source tree)"


if __name__ == "__main__":
    sys.exit(main())

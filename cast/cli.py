"""The command `cast`. One function is one subcommand.

A function's parameters become the options, its docstring the help: positional-only parameters are positional,
`bool` ones are switches; `*arguments` takes all words as they are, for a command with a parser of its own. Imports
stay inside the functions, so that `cast --help` need not load PyTorch.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from cast.optional import MissingExtraError


def predict(
    video: str,
    /,
    checkpoint: str,
    top: int = 5,
    json: bool = False,
    sampling: Literal["uniform", "dense"] = "uniform",
    every: int = 0,
    window: int = 64,
    batch: int = 6,
) -> None:
    """Name the action in a video, in a folder of videos, or in a stream.

    Of files it takes all views of the published test protocol, every frame decoded exactly, and averages the model's
    probabilities over them. A folder gives a line of JSON for each video, a stream one for each guess. Files that
    can't be read are named, and the exit code is then 1.

    Args:
        video: any file that FFmpeg reads; a folder; a camera such as /dev/video0, an address, or - for a pipe
        checkpoint: directory that save_pretrained wrote, name of a published model, or repository of the Hub
        top: how many guesses to show
        json: for one video print JSON instead of a table
        sampling: frames as for EPIC-Kitchens and Something-Something (uniform) or Kinetics (dense)
        every: frames between guesses about a stream; unless 0, a file is read as a stream too. 0 is 16 for cameras
        window: frames of a stream that a guess looks back on
        batch: clips in a forward pass
    """
    from cast.predict import main

    main(video, checkpoint, top, json, sampling, every, window, batch)


def export(checkpoint: str, /, format: Literal["torch", "onnx"] = "torch", out: Path | None = None) -> None:
    """Write a model as a program that runs without this package.

    The program takes any number of clips at a time. Before its file appears, its answers are compared with the model's;
    a file that answers otherwise is not written.

    Args:
        checkpoint: directory that save_pretrained wrote, name of a published model, or repository of the Hub
        format: for torch.export.load (torch) or ONNX Runtime (onnx)
        out: the file; without it the checkpoint's name with .pt2 or .onnx, in the working directory
    """
    from cast.export import main

    main(checkpoint, format, out)


def demo(out: Path = Path("runs/demo"), seeds: int = 1) -> None:
    """Make a small data set of videos, train CAST on it, compare it with its experts, write a report.

    Downloads nothing and needs no GPU. A run that was killed goes on where it was when it is started again.

    Args:
        out: directory for videos, checkpoints, metrics.json and report.html
        seeds: how many times to train, each with another seed
    """
    from cast.demo import main

    main(out=out, seeds=seeds)


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


COMMANDS: tuple[Callable[..., None], ...] = (train, pretrain, predict, export, demo)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 after an error, 130 after an interrupt. Bad usage exits with 2."""
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


def _run(name: str, command: Callable[[], None]) -> int:
    try:
        command()
    except (ValueError, OSError, MissingExtraError) as error:
        print(f"cast {name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"cast {name}: interrupted", file=sys.stderr)
        return 130
    return 0


class _Help(DefaultHelpFormatter):
    """Help with defaults, without the types that jsonargparse also prints."""

    def _get_help_string(self, action: argparse.Action) -> str:
        show = action.option_strings and action.nargs != 0 and not action.required
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
        subcommands.add_subcommand(command.__name__, _command_parser(command), help=help_text)
    return parser, {command.__name__: command for command in COMMANDS}


def _command_parser(command: Callable[..., None]) -> ArgumentParser:
    docstring = parse_docstring(inspect.getdoc(command) or "")
    helps = {parameter.arg_name: parameter.description for parameter in docstring.params}
    parser = ArgumentParser(description=docstring.description, formatter_class=_Help)
    kinds = _kinds(command)
    for name, kind in kinds.items():
        if kind == "positional":
            parser.add_argument(name, metavar=name.upper(), help=helps[name])
    parser.add_function_arguments(
        command, as_group=False, skip={name for name, kind in kinds.items() if kind != "option"}
    )
    for name, kind in kinds.items():
        if kind == "switch":
            parser.add_argument(f"--{name}", action="store_true", help=helps[name])
    return parser


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

"""From `RECIPE key=value ...` to typed settings; an error about a misspelt key names the right spelling."""

from __future__ import annotations

import difflib
from argparse import ArgumentError
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from cast.ground.files import parse_yaml

Settings = TypeVar("Settings")

#: Directories of recipes: beside the package in a source tree, inside it when installed.
_HOMES = (Path(__file__).parents[2] / "recipes", Path(__file__).parents[1] / "recipes")


@dataclass(frozen=True)
class Command(Generic[Settings]):
    """A parsed command line.

    Args:
        recipe: the file; its stem names the run.
        settings: of the recipe, with the overrides.
        switches: flags such as `--resume` that were given.
        yaml: the complete settings, as a recipe.
    """

    recipe: Path
    settings: Settings
    switches: frozenset[str]
    yaml: str


def find_recipe(what: str) -> Path:
    """A recipe's file: a path, or a name such as `ek100`, `recipes/ek100.yaml` or `rows/lateral` of the package's own.

    Raises:
        FileNotFoundError: there is none; the message names close ones and all.
    """
    path = Path(what)
    if path.is_file():
        return path
    names = {found.stem: found for home in reversed(_HOMES) for found in sorted(home.glob("**/*.yaml"))}
    known = names.get(path.stem)
    if known is not None and path.with_suffix("") in _spellings(known):
        return known
    close = difflib.get_close_matches(path.stem, names, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise FileNotFoundError(f"no recipe {what!r}: there is no such file. {hint}By name there are {', '.join(names)}")


def _spellings(recipe: Path) -> Iterator[Path]:
    """The names of a recipe of the package: `lateral`, `rows/lateral`, `recipes/rows/lateral`."""
    parts = recipe.with_suffix("").parts
    begin = len(parts) - 1 - parts[::-1].index("recipes")
    yield from (Path(*parts[i:]) for i in range(begin, len(parts)))


def parse(
    kind: type[Settings], arguments: Sequence[str], command: str, description: str, switches: Mapping[str, str]
) -> Command[Settings]:
    """Read a recipe and its overrides.

    Args:
        kind: dataclass of the settings, of dataclasses.
        arguments: a recipe, overrides as `key=value` or `--key=value`, switches.
        command: name of the command in messages.
        description: one sentence for its help.
        switches: flags and their help.

    Raises:
        SystemExit: 2 after bad usage, which is printed; 0 after `--help` or `--print_config`.
    """
    parser = _parser(kind, command, description, switches)
    if not arguments or {"-h", "--help"} & set(arguments):
        parser.print_help()
        raise SystemExit(0 if arguments else 2)
    given = {argument.removeprefix("--") for argument in arguments if argument.startswith("--") and "=" not in argument}
    wanted = frozenset(given & switches.keys())
    rest = [argument for argument in arguments if argument not in {f"--{name}" for name in (*switches, "print_config")}]
    recipes = [argument for argument in rest if "=" not in argument and not argument.startswith("-")]
    overrides = [argument for argument in rest if argument not in recipes]
    if len(recipes) != 1:
        parser.error(f"name one recipe, then overrides as key=value; got {' '.join(recipes) or 'none'}")
    namespace, recipe = _read(parser, recipes[0], overrides)
    if "print_config" in given:
        print(parser.dump(namespace, skip_unset=False), end="")
        raise SystemExit(0)
    try:
        settings = kind(**parser.instantiate(namespace).as_dict())
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    return Command(recipe, settings, wanted, parser.dump(namespace, skip_unset=False))


def load_recipe(kind: type[Settings], what: str, *overrides: str) -> Settings:
    """A recipe as settings, from Python.

    Args:
        kind: dataclass of the settings.
        what: path or name of the recipe.
        overrides: such as "optim.lr=1e-4".

    Raises:
        ValueError: a key that no setting has, or a value of another type.
    """
    parser = _parser(kind, "recipe", "", {})
    parser.exit_on_error = False
    try:
        namespace, _ = _read(parser, what, overrides)
    except ArgumentError as error:
        raise ValueError(str(error)) from None
    return kind(**parser.instantiate(namespace).as_dict())


def _parser(kind: type[Any], command: str, description: str, switches: Mapping[str, str]) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"cast {command}",
        usage=f"cast {command} RECIPE [key=value ...] [--print_config]"
        + "".join(f" [--{switch}]" for switch in switches),
        description=description,
        formatter_class=DefaultHelpFormatter,
        epilog="".join(f"--{switch}: {text}. " for switch, text in switches.items())
        + "--print_config: print the whole recipe with its overrides, and stop.",
    )
    parser.add_class_arguments(kind, as_group=False)
    return parser


def _read(parser: ArgumentParser, what: str, overrides: Sequence[str]) -> tuple[Namespace, Path]:
    """The recipe's values with the overrides on top."""
    known = [action.dest for action in parser._actions]
    try:
        recipe = find_recipe(what)
        content = _content(parser, recipe, known, ())
    except OSError as error:
        parser.error(str(error))
    options = [f"--{override.removeprefix('--')}" for override in overrides]
    for option in options:
        key, equals, _ = option.removeprefix("--").partition("=")
        _check(parser, key, known, "the command line")
        if not equals:
            parser.error(f"{key} has no value: write {key}=VALUE")
    namespace = parser.parse_object(content, defaults=True)
    return parser.parse_args(options, namespace=namespace), recipe


def _content(parser: ArgumentParser, recipe: Path, known: Sequence[str], above: tuple[Path, ...]) -> dict[str, Any]:
    """A recipe's values. Missing ones come from the recipe in its key `base`."""
    if recipe in above:
        parser.error(f"{above[-1]} has the base {recipe}, which is based on it")
    try:
        content = parse_yaml(recipe.read_text(encoding="utf-8")) or {}
    except UnicodeDecodeError as error:
        parser.error(f"{recipe} is no text in UTF-8: {error}")
    except yaml.YAMLError as error:
        parser.error(f"{recipe} is no YAML: {' '.join(str(error).split())}")
    if not isinstance(content, dict):
        parser.error(f"{recipe} holds a {type(content).__name__}; a recipe has sections such as data: and optim:")
    base = content.pop("base", None)
    for key in _keys(content):
        _check(parser, key, known, str(recipe))
    if base is None:
        return content
    if not isinstance(base, str):
        parser.error(f"{recipe} has the base {base!r}; it must be a recipe's name or file")
    return _over(_content(parser, find_recipe(base), known, (*above, recipe)), content)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of both; values of `above` replace those of `below`."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = _over(under, value) if isinstance(value, Mapping) and isinstance(under, Mapping) else value
    return merged


def _keys(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _keys(value, f"{name}.")
        else:
            yield name


def _check(parser: ArgumentParser, key: str, known: Sequence[str], where: str) -> None:
    """Stop at an unknown key. Inside a setting that is a mapping, every key is allowed."""
    parts = key.split(".")
    groups = {name for name in known if any(other.startswith(f"{name}.") for other in known)}
    ancestors = {".".join(parts[:n]) for n in range(1, len(parts))}
    if key in known or any(name in known and name not in groups for name in ancestors):
        return
    parser.error(f"{where} sets {key}, which is no setting: {_hint(parser, key, known, groups)}")


def _hint(parser: ArgumentParser, key: str, known: Sequence[str], groups: Collection[str]) -> str:
    """The probable setting. If no name is similar, all names of the section: learning_rate does not look like lr."""
    section, _, name = key.rpartition(".")
    settings = [setting for setting in known if setting not in groups]
    beside = {setting.rpartition(".")[2]: setting for setting in settings if setting.rpartition(".")[0] == section}
    if section and (alike := difflib.get_close_matches(name, beside, 1)):
        return f"did you mean {beside[alike[0]]}?"
    if elsewhere := [setting for setting in settings if setting.rpartition(".")[2] == name]:
        return f"did you mean {elsewhere[0]}?"
    if alike := difflib.get_close_matches(key, known, 1, 0.75):
        return f"did you mean {alike[0]}?"
    if section and beside:
        return f"{section} has {', '.join(beside)}"
    return f"{parser.prog} --help names them all"

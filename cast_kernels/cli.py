"""The command `cast-kernels`."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Bad usage exits with 2."""
    parser = ArgumentParser(prog="cast-kernels", description="Fused kernels for two-stream video transformers.")
    info = ArgumentParser(description="Show what was built, what was not and why, and what runs here.")
    info.add_argument("--json", action="store_true", help="print JSON instead of a table")
    commands = parser.add_subcommands(required=True, title="commands", metavar="COMMAND")
    commands.add_subcommand("info", info, help="what was built, what was not and why, and what runs here")
    options = parser.parse_args(arguments)
    from cast_kernels import info as report  # loads torch, which --help need not wait for

    try:
        if options.info.json:
            print(json_module.dumps(report.collect(), indent=2))
        else:
            report.show()
    except ValueError as error:  # an environment variable that names no choice
        print(f"cast-kernels: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The oldest torch and Triton that the package runs with. docs/versions.md says which were run, and how.

Importing this module refuses an older torch, which would otherwise fail somewhere else with another message.
"""

from __future__ import annotations

import re

import torch

#: The oldest release of each package that the tests were run with. pyproject.toml asks for torch in the same words.
OLDEST = {"torch": (2, 10), "triton": (3, 6)}

#: The first Triton that fences asynchronous copies off from wgmma and tcgen05, as PTX's memory model asks. With older
#: ones the emulator reports every such kernel of sm_90; GPUs have run such code for years, which proves nothing.
FENCED_TRITON = (3, 7, 1)


def release(version: str) -> tuple[int, ...]:
    """The numbers in front: of "2.11.0+cu130", or of "2.10.0a0+git1234", which counts as 2.10.0; none of "git"."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def too_old(package: str, version: str) -> str:
    """Why the package's version is refused and which would do; "" if it is new enough or names no release.

    Args:
        package: a key of :data:`OLDEST`.
        version: as the package gives it.
    """
    if not release(version) or release(version) >= OLDEST[package]:
        return ""
    needed = ".".join(map(str, OLDEST[package]))
    return f"{package} {version} is too old: cast_kernels needs {needed} or newer; pip install '{package}>={needed}'"


if too_old("torch", torch.__version__):
    raise ImportError(too_old("torch", torch.__version__))

"""The ptxas that turns Triton's PTX into machine code, and the releases with known defects.

Triton ships one for GPUs before Blackwell and another for those from sm_100 on, and takes others from TRITON_PTXAS_PATH
and TRITON_PTXAS_BLACKWELL_PATH. :data:`DEFECTS` lists all known defects; a release that it does not judge is unknown,
not good.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

#: Numbers of a release, as many as are known: (12, 9) is any 12.9, (12, 9, 86) that build alone.
Release = tuple[int, ...]


class Defect(NamedTuple):
    """One way in which some releases of ptxas assemble wrongly.

    A release between a bad one and the first right one is not judged, unless somebody examined it.
    """

    name: str
    architectures: tuple[int, int]  # the first and the last
    bad: tuple[Release, ...]  # seen to have it
    right: tuple[Release, ...]  # seen to be without it
    fixed: Release | None  # said to be without it, this one and all later ones
    what: str
    source: str
    ours: str  # whether this package's kernels have it

    def judge(self, release: Release) -> str:
        """ "bad", "right" or "unknown"."""
        if any(release[: len(known)] == known for known in self.bad):
            return "bad"
        if any(release[: len(known)] == known for known in self.right):
            return "right"
        return "right" if self.fixed is not None and release >= self.fixed else "unknown"


_TRITON = "https://github.com/triton-lang/triton"
_LOOKED_FOR = "`cast-kernels compile` looks for it in the machine code of every kernel for sm_90, and fails on it"

DEFECTS = (
    Defect(
        name="registers of a wgmma are reused too early",
        architectures=(90, 90),
        bad=((12, 8, 93), (12, 9, 86), (13, 0, 88), (13, 1, 115)),
        right=((13, 3, 33), (13, 5, 37)),
        fixed=(13, 3),
        what="writes into a fragment of A that an asynchronous wgmma may still read: products come out wrong",
        source=f"{_TRITON}/issues/9433 and {_TRITON}/pull/11781, which refers to NVIDIA's release notes of CUDA 13.3; "
        "these releases by their code for the kernel in tests/test_wgmma_registers.py",
        ours=_LOOKED_FOR,
    ),
    Defect(
        name="packed additions of 16 bits lose a constant",
        architectures=(90, 90),
        bad=((12, 9, 86),),
        right=((13, 3, 33),),
        fixed=None,
        what="of two add.s16x2 with the same constant the second adds 0 to its low half",
        source=f"{_TRITON}/issues/11581",
        ours="`cast-kernels compile` looks for them in the PTX of every kernel for sm_90, and fails on them",
    ),
    Defect(
        name="stores to shared memory are lost",
        architectures=(89, 90),
        bad=((12, 9),),
        right=(),
        fixed=(13, 0),
        what="where LLVM lowers the stores itself, parts of fp8 products stay zero",
        source=f"{_TRITON}/pull/9756, {_TRITON}/pull/10787 and https://github.com/pytorch/pytorch/issues/188841",
        ours="Triton 3.7 and 3.8.0 write these stores in inline assembly, their way around it",
    ),
    Defect(
        name="shared memory is written at wrong addresses",
        architectures=(90, 90),
        bad=((12, 8, 93), (13, 0, 88)),
        right=((13, 1, 80),),
        fixed=None,
        what="of two kernels of gated linear attention, 12.8.93 gets one wrong, and both releases write outside of "
        "shared memory in the other; the pattern is not published",
        source="https://github.com/fla-org/flash-linear-attention/pull/1262, measured on an H20 with identical PTX",
        ours="not known: there is no pattern to look for",
    ),
    Defect(
        name="max(|x|, y) of integers becomes max(x, y)",
        architectures=(100, 109),
        bad=((12, 8), (13, 0), (13, 1), (13, 3)),
        right=(),
        fixed=None,
        what="fuses neg, max and max into one VIMNMX3 that drops the negated operand",
        source=f"https://github.com/pytorch/pytorch/issues/190973 and {_TRITON}/pull/11032",
        ours="`cast-kernels compile` looks for VIMNMX3 in the machine code of every kernel for sm_100, and fails on it",
    ),
    Defect(
        name="registers are stale behind nested divergent branches",
        architectures=(0, 999),
        bad=((12, 8), (12, 9), (13, 0), (13, 1), (13, 2)),
        right=(),
        fixed=(13, 3),
        what="leaves out convergence of one of two nested levels at which a warp's threads part",
        source="NVIDIA's release notes of CUDA 13.3, as "
        "https://oracore.dev/en/news/cuda-toolkit-13-3-fixes-nested-divergence-bug-en reports them",
        ours="not known: the code that lacks the instruction does not show where it should be",
    ),
)  # fmt: skip


class Verdict(NamedTuple):
    """The judgement of :data:`DEFECTS` on a release for an architecture."""

    word: str  # "known bad", "unknown", "no known defect"
    defects: tuple[Defect, ...]  # of this release
    unjudged: tuple[Defect, ...]  # unknown for this release


class Assembler(NamedTuple):
    """The ptxas for one architecture."""

    path: str  # "" if there is none
    version: str  # its release, "12.9.86", or why it is unknown
    variable: str  # environment variable that names another one


def release(version: str) -> Release:
    """ "12.9.86" -> (12, 9, 86); () for another text."""
    return tuple(map(int, version.split("."))) if re.fullmatch(r"\d+\.\d+(\.\d+)*", version) else ()


def judge(version: str, architecture: int) -> Verdict:
    """The verdict on a release of ptxas for an architecture.

    Args:
        version: "12.9.86"; a text that is no release is unknown.
        architecture: 90 for sm_90.
    """
    concerned = [d for d in DEFECTS if d.architectures[0] <= architecture <= d.architectures[1]]
    numbers = release(version)
    verdicts = [(defect, defect.judge(numbers) if numbers else "unknown") for defect in concerned]
    has = tuple(defect for defect, word in verdicts if word == "bad")
    unjudged = tuple(defect for defect, word in verdicts if word == "unknown")
    return Verdict("known bad" if has else "unknown" if unjudged else "no known defect", has, unjudged)


@cache
def version_of(path: str) -> str:
    """The release that a ptxas reports, or why it is unknown."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    found = re.search(r"\bV(\d+\.\d+\.\d+)\b", done.stdout)
    return found[1] if found and not done.returncode else f"unknown: {path} --version names none"


def checked(path: str) -> str:
    """The release of a ptxas that the user named.

    Raises:
        ValueError: it is none.
    """
    found = version_of(path)
    if not release(found):
        raise ValueError(
            f"{path} is no ptxas: its version is {found}; name the program ptxas of a CUDA toolkit, from its folder bin"
        )
    return found


def assembler(architecture: int) -> Assembler:
    """The ptxas that Triton takes for an architecture, chosen as Triton chooses it.

    Raises:
        ImportError: there is no Triton.
    """
    import triton  # noqa: F401  (its absence must not read as that of the backend)
    from triton.backends.nvidia.compiler import get_ptxas

    try:
        path = str(get_ptxas(architecture).path)
    except (AttributeError, RuntimeError) as error:
        return Assembler("", f"unknown: {error}", "")
    variables = [variable for variable, known in _tools().items() if known == path] or [""]
    return Assembler(path, version_of(path), variables[-1 if architecture >= 100 else 0])


def describe(architecture: int) -> dict[str, Any]:
    """The assembler for an architecture and the verdict on it, ready for JSON."""
    try:
        found = assembler(architecture)
    except ImportError as error:
        found = Assembler("", f"unknown: {error}", "")
    verdict = judge(found.version, architecture)
    told: dict[str, Any] = {
        "architecture": f"sm_{architecture}", "path": found.path, "version": found.version, "verdict": verdict.word,
        "defects": [
            {"name": d.name, "what": d.what, "source": d.source, "our_kernels": d.ours} for d in verdict.defects
        ],
        "not_judged": [defect.name for defect in verdict.unjudged],
    }  # fmt: skip
    if verdict.word == "known bad":
        told["remedy"] = _remedy(found, architecture)
    return told


def line(told: Mapping[str, Any]) -> str:
    """The result of :func:`describe` in one line, with the defects by name."""
    about = f"{told['version']} for {told['architecture']}"
    if told["path"]:
        about += f", {told['path']}"
    names = [defect["name"] for defect in told["defects"]]
    if names:
        return f"{about}: KNOWN BAD: {'; '.join(names)}. {told['remedy']}"
    unjudged = f", nothing is known of it: {'; '.join(told['not_judged'])}" if told["not_judged"] else ""
    return f"{about}: {told['verdict']}{unjudged}"


def _remedy(found: Assembler, architecture: int) -> str:
    """How to use another installed assembler, or how to get one."""
    for path in _tools().values():
        if judge(version_of(path), architecture).word != "known bad":
            return f"To use another one, {version_of(path)}: export {found.variable}={path}"
    return (
        "To use another one: pip install --no-deps --target FOLDER nvidia-cuda-nvcc, then export "
        f"{found.variable}=FOLDER/nvidia/cu13/bin/ptxas"
    )


def _tools() -> dict[str, str]:
    """Variable -> path of each ptxas that this Triton knows."""
    import triton

    found = {}
    for name in ("ptxas", "ptxas_blackwell"):
        try:
            found[f"TRITON_{name.upper()}_PATH"] = getattr(triton.knobs.nvidia, name).path
        except (AttributeError, RuntimeError):
            continue
    return found

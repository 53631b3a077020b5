"""What a release says of itself in several files agrees."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import cast_kernels

ROOT = Path(__file__).parent.parent


def test_every_file_has_the_same_version_and_author() -> None:
    version = cast_kernels.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert project["dynamic"] == ["version"]
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == version
    (author,) = yaml.safe_load((ROOT / "CITATION.cff").read_text())["authors"]
    of_the_site = f"the {author['name'].removeprefix('The ')}"
    assert f'author = "CAST kernels", "{of_the_site}"' in (ROOT / "docs/conf.py").read_text()
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    released = f"[{version}] - "
    assert headings[0] == "Unreleased" or headings[0].startswith(released), headings[0]
    if headings[0] == "Unreleased" and not any(heading.startswith(released) for heading in headings):
        changes = (ROOT / "CHANGELOG.md").read_text()
        assert f"This will be {version}" in changes
        kinds = set(re.findall(r"^### (\w+)", changes, re.M))
        assert kinds == {"Added", "Security"}, "nobody has a version in which something could be changed or mended"


def test_pythons_are_the_same_wherever_they_are_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(project["project"]["classifiers"]))
    wheels = project["tool"]["cibuildwheel"]["build"].split()
    assert wheels == [f"cp{python.replace('.', '')}-*" for python in named]
    tests = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["tests"]
    assert tests["strategy"]["matrix"]["python"] == named
    assert project["project"]["requires-python"] == f">={named[0]}"


def test_a_hooks_tools_are_those_that_are_installed_for_tests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = {re.match(r"[\w-]+", need)[0] for need in project["optional-dependencies"]["test"]}  # type: ignore[index]
    for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]:
        assert repository["repo"] == "local", "a hook from elsewhere needs a network"
        assert {hook["entry"].split()[0] for hook in repository["hooks"]} <= installed


def test_a_hook_looks_at_every_kind_of_file_that_ci_looks_at() -> None:
    kinds = {".py": "python", ".pyi": "pyi", ".ipynb": "jupyter"}
    command = [sys.executable, "-m", "ruff", "check", "--show-files", str(ROOT)]
    looked_at = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split("\n")
    found = {kinds[suffix] for line in looked_at if (suffix := Path(line).suffix) in kinds}
    assert found >= {"python", "jupyter"}
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["id"]: set(hook.get("types_or", ())) for hook in local["hooks"]}
    assert found <= hooks["ruff"]
    assert found | {"markdown"} <= hooks["ruff-format"]


def test_what_formats_is_of_one_version() -> None:
    """Another one may format otherwise, and then a change that is right fails the checks."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test"]
    for name in ("ruff", "clang-format"):
        (versions,) = (need.removeprefix(name) for need in needs if re.fullmatch(rf"{name}\W.*", need))
        least, below = re.fullmatch(r">=([\d.]+),<([\d.]+)", versions).groups()  # type: ignore[union-attr]
        *same, last = map(int, least.split("."))
        assert [*same, last + 1] == [*map(int, below.split("."))], f"{name}{versions} is more than one version"
        assert metadata.version(name).startswith(f"{least}."), f"{name} {metadata.version(name)} formatted this tree"


def test_hosted_ci_runs_what_a_contributor_runs() -> None:
    """But for what prepares the machine, and clang-format, which tests/test_format.py runs."""
    own = (ROOT / ".ci/run").read_text().splitlines()
    (installed,) = (number for number, line in enumerate(own) if line.startswith("pip install"))
    hosted = []
    for name in ("lint", "tests"):
        (job,) = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())["jobs"].values()
        hosted += [step["run"] for step in job["steps"] if "run" in step]
    commands = [line for line in hosted if not line.startswith(("pip install", "sudo apt-get", "clang-format"))]
    assert sorted(commands) == sorted(own[installed + 1 :])


def test_bug_reports_ask_for_a_command_that_exists() -> None:
    from cast_kernels.cli import COMMANDS

    forms = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 4
    for form in forms:
        asked = set(re.findall(r"cast-kernels ([a-z]+(?:-[a-z]+)*)", form.read_text()))
        assert "info" in asked
        assert asked <= set(COMMANDS), form.name


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", ".github/workflows/*.yml"),
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/[!c]*.yml"),
        ("github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("citation-file-format", "CITATION.cff"),
    ],
)
def test_files_that_others_read_are_valid(schema: str, files: str) -> None:
    """By the published schemas, which the package check-jsonschema has with it; shell commands are text to them."""
    found = [str(path) for path in sorted(ROOT.glob(files))]
    assert found
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *found]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr

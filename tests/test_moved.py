"""Modules that moved are found by their old names, with a warning that says the new one."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from importlib import import_module

import pytest
import rooms

from cast._moved import MOVED


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_name_is_the_new_module_and_warns(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert old not in rooms.modules()
    assert new in rooms.modules()
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"the module {old} is now {new}$") as told:
        found = import_module(old)
    assert found is import_module(new)
    assert told[0].filename == __file__ or "importlib" in told[0].filename
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert import_module(old) is found  # the second time nothing is said
        import_module(new)


def test_a_packages_modules_are_the_same_by_either_name() -> None:
    """Python would find their files below the package's path, and make every class a second time."""
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import cast.weights.source as old\n"
        "import cast.model.weights.source as new\n"
        "from cast.weights.clip import read_clip\n"
        "assert old is new and read_clip.__module__ == 'cast.model.weights.clip'\n"
        "import cast\n"
        "assert cast.hub is cast.model.hub\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=rooms.ROOT, check=True)


def test_every_way_of_importing_an_old_name_works() -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import cast.evaluation.protocol as protocol\n"
        "from cast.evaluation import protocol as again\n"
        "from cast.evaluation.protocol import Protocol\n"
        "import cast.evaluation\n"
        "assert protocol is again is cast.evaluation.protocol\n"
        "assert Protocol is cast.evaluation.Protocol\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=rooms.ROOT, check=True)


def test_a_pickle_of_before_the_move_is_read() -> None:
    from cast.video.views import Protocol

    before = pickle.dumps(Protocol(size=32), protocol=0).replace(b"cast.video.views", b"cast.evaluation.protocol")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pickle.loads(before) == Protocol(size=32)


def test_what_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"cast\.attic"):
        import_module("cast.attic")


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("cast.baselines.streams", "Stream", "ExpertStream"),
        ("cast.evaluation.published", "Published", "PublishedResult"),
        ("cast.model.zoo", "Published", "PublishedModel"),
        ("cast.study.tables", "Plan", "StudyPlan"),
        ("cast.video.augment", "Plan", "AugmentPlan"),
    ],
)
def test_an_old_name_of_a_class_gives_it_with_a_warning(module: str, old: str, new: str) -> None:
    home = import_module(module)
    with pytest.warns(DeprecationWarning, match=rf"{module}\.{old} is now {new}"):
        assert getattr(home, old) is getattr(home, new)
    with pytest.raises(AttributeError, match="has no attribute 'Never'"):
        home.Never  # noqa: B018

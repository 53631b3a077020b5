"""The notebook: its committed outputs are of its code as it is, tell nothing of a machine, and come again."""

from __future__ import annotations

import base64
import re
import socket
from pathlib import Path
from types import ModuleType

import pytest
from test_examples import example

nbformat = pytest.importorskip("nbformat")

#: Home directories, places of files, memory addresses.
_PLACES = re.compile(r"(?<![\w.])/[a-z]+/[\w./-]+|0x[0-9a-f]{6,}")


@pytest.fixture(scope="module")
def command() -> ModuleType:
    return example("execute_notebook")


@pytest.fixture(scope="module")
def committed(command: ModuleType):
    return nbformat.read(command.NOTEBOOK, as_version=4)


def shape(notebook) -> list[list[str]]:
    """Of each code cell what kinds of outputs it has, and its printed text with numbers left out.

    What a cell that is tagged `machine` prints differs from one machine to another.
    """
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            kinds = [output.get("name") or " ".join(sorted(output["data"])) for output in cell.outputs]
            if "machine" not in cell.metadata.get("tags", ()):
                # Answers and figures are of the training, whose last bits differ from one processor to another.
                kinds += [re.sub(r"[\d.]+|left|right|up|down|[ ,]", "", o.text) for o in cell.outputs if "text" in o]
            found.append(kinds)
    return found


def text(notebook) -> str:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(
        output["text"] if "text" in output else str(output["data"].get("text/plain")) for output in outputs
    )


def test_the_outputs_are_of_this_code(command: ModuleType, committed) -> None:
    assert committed.metadata["source_hash"] == command.source_hash(committed), (
        "first_look.ipynb has other code than its outputs: run python examples/execute_notebook.py"
    )
    nbformat.validate(committed)
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def test_the_outputs_name_no_machine(committed) -> None:
    said = text(committed)
    assert not _PLACES.search(said), _PLACES.search(said)
    assert socket.gethostname() not in said
    assert all("execution" not in cell.metadata for cell in committed.cells)
    assert _PLACES.search("File /home/someone/cast/model.py, line 3")


def test_there_are_pictures_and_the_exchange_s_numbers(committed) -> None:
    pictures = [
        base64.b64decode(output["data"]["image/png"])
        for cell in committed.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 3
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 2000 for picture in pictures)
    difference = re.search(r"largest difference: (\S+) of the largest", text(committed))
    assert difference is not None
    assert float(difference[1]) < 1e-5
    assert re.search(r"eager \d+ ms, fused \d+ ms; threads: \d+", text(committed))


def test_its_links_lead_somewhere(command: ModuleType, committed) -> None:
    said = "\n".join(cell.source for cell in committed.cells if cell.cell_type == "markdown")
    links = dict(re.findall(r"\[([^]]+)\]\(([^)]+)\)", said))
    assert links["Performance"] == "../docs/performance.md"
    assert [link for link in links.values() if not (command.NOTEBOOK.parent / link).is_file()] == []


def test_its_text_says_of_the_noun_what_its_output_shows(committed) -> None:
    """The text calls the noun not learned yet, at a chance of 10 percent."""
    found = re.findall(r"step 100: .* noun ([\d.]+) %, verb ([\d.]+) %", text(committed))
    assert any("The noun is not yet" in cell.source for cell in committed.cells)
    (noun, verb) = map(float, found[0])
    assert noun < 20 < 80 < verb


@pytest.mark.slow
def test_it_executes_and_says_the_same_again(command: ModuleType, committed, tmp_path: Path) -> None:
    again = command.execute(nbformat.read(command.NOTEBOOK, as_version=4), tmp_path)
    assert shape(again) == shape(committed)
    assert again.metadata == committed.metadata
    assert not _PLACES.search(text(again))
    before = nbformat.read(command.NOTEBOOK, as_version=4)
    assert before == committed  # executing alone writes nothing

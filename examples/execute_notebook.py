"""Execute first_look.ipynb and write its outputs into it; a test compares them with new outputs.

pip install -e '.[examples]'
python examples/execute_notebook.py
"""

import argparse
import hashlib
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
NOTEBOOK = HERE / "first_look.ipynb"


def source_hash(notebook: NotebookNode) -> str:
    """A hash of the code. Outputs with another hash belong to other code."""
    code = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """A copy with new outputs, without times and places.

    Args:
        notebook: cells to execute.
        folder: the cells' working directory, which receives their files.

    Raises:
        CellExecutionError: a cell failed.
    """
    done = nbformat.from_dict(notebook)
    paths = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]  # this checkout's own code
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(done, timeout=600, kernel_name="python3", coalesce_streams=True, resources=where)
    client.execute(env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
    for cell in done.cells:
        cell.metadata.pop("execution", None)  # times
    done.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "source_hash": source_hash(done),
    }
    return done


def main(words: list[str] | None = None) -> None:
    """Execute and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/first-look"), help="for what the cells write")
    args = parser.parse_args(words)
    args.folder.mkdir(parents=True, exist_ok=True)
    notebook = execute(nbformat.read(NOTEBOOK, as_version=4), args.folder)
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK.name}: {len(notebook.cells)} cells, source {notebook.metadata['source_hash']}")


if __name__ == "__main__":
    main()

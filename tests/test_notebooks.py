"""The notebooks run from top to bottom, and what is saved of them reads well without a kernel.

nbval compares their outputs (``pytest --nbval-lax notebooks/``), but lets a cell that ends in UsageError pass; nbclient
does not.
"""

from __future__ import annotations

import re
import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 300_000  # bytes; what GitHub still draws at once
SECONDS_A_CELL = 240  # to tell one that hangs; a machine that does much else takes minutes to start Ray
MACHINE = re.compile(r"/(?:work|tmp|root|home|Users|private|var/folders)/|[A-Z]:\\\\")
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell: Any) -> list[str]:
    """Return everything that a cell put out, as plain text and as html."""
    return [
        str(text)
        for output in cell.outputs
        for text in (*output.get("data", {}).values(), output.get("text", ""), *output.get("traceback", []))
    ]


def kinds(cell: Any) -> list[str]:
    """Return which kinds of output a cell put out, in order; what was printed may come in pieces."""
    return [kind for kind, _ in groupby(output.output_type for output in cell.outputs)]


def execute(notebook: Any, folder: Path) -> Any:
    """Run the cells in a kernel of their own, and return them with what they put out."""
    client = NotebookClient(
        notebook,
        timeout=SECONDS_A_CELL,
        kernel_name="python3",
        store_widget_state=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    return notebook


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.slow
@every_notebook
def test_it_runs(path: Path, tmp_path: Path) -> None:
    """Every error is raised, UsageError too, and so is a cell that hangs."""
    shutil.copy(path, tmp_path)
    saved, done = read(path), execute(read(tmp_path / path.name), tmp_path)
    for before, after in zip(code_cells(saved), code_cells(done), strict=True):
        assert kinds(before) == kinds(after), f"saved without its outputs: {after.source}"


@every_notebook
def test_what_is_saved_needs_no_kernel(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert path.stat().st_size <= LARGEST
    assert "widgets" not in notebook.metadata
    assert notebook.metadata.kernelspec.name == "python3"
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "not saved after running from top to bottom"
    mimes = {mime for cell in code_cells(notebook) for output in cell.outputs for mime in output.get("data", {})}
    assert "text/html" in mimes
    living = [mime for mime in mimes if mime.startswith(("application/", "text/javascript"))]
    assert not living, "take these out of the outputs: where no kernel runs they show nothing, or errors"


@every_notebook
def test_no_error_and_no_noise_is_saved(path: Path) -> None:
    outputs = [output for cell in code_cells(read(path)) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]


@every_notebook
def test_it_names_no_folder_of_a_machine(path: Path) -> None:
    for cell in read(path).cells:
        for text in (cell.source, *(texts(cell) if cell.cell_type == "code" else [])):
            assert not MACHINE.search(text), text


@every_notebook
def test_what_it_links_to_is_there_and_is_served(path: Path) -> None:
    """Jupyter's server gives out no file of a hidden folder: a picture in one is broken in Lab and on Binder."""
    for cell in read(path).cells:
        for link in re.findall(r"\]\(([^):#]+)\)", cell.source) if cell.cell_type == "markdown" else ():
            assert (path.parent / link).is_file(), link
            hidden = [part for part in Path(link).parts if part.startswith(".") and part != ".."]
            assert not hidden, f"{link} is not served"


@every_notebook
def test_progress_is_saved_at_its_end(path: Path) -> None:
    """A display that was saved at some percentage would stay there for ever."""
    shown = [text for cell in code_cells(read(path)) for text in texts(cell)]
    ends = [text for text in shown if re.search(r"\bdone · ([\d,]+) of \1 images", text)]
    assert len(ends) == 2 * sum("extract " in c.source and "quiet" not in c.source for c in magics(read(path)))
    assert not [text for text in shown if re.search(r"\d+ (s|min|h) left", text)]


def magics(notebook: Any) -> list[Any]:
    """Return the cells that run %extract or %%extract."""
    return [cell for cell in code_cells(notebook) if re.search(r"^(?!\s*#).*%extract ", cell.source, re.MULTILINE)]


# A kernel as Run All has it: what fails stops it, in one line.

MISSING = """import pandas as pd
%load_ext nbfeat
photos = pd.DataFrame({"path": ["one.jpg", "two.jpg"]})"""
FAILING = "%extract photos MobileNet --alpha 0.25 --size 32 --weights random --images path"


def failure(*sources: str, folder: Path) -> Any:
    """Run cells of which one must fail, and return what it put out."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (*sources, "1 + 1")])
    with pytest.raises(CellExecutionError):
        execute(notebook, folder)
    *_, failed, after = notebook.cells
    assert after.execution_count is None, "the cell after the one that failed was run"
    return failed


@pytest.mark.slow
def test_bad_usage_stops_a_notebook(tmp_path: Path) -> None:
    failed = failure(MISSING, "%extract nosuch ResNet50", folder=tmp_path)
    [output] = failed.outputs
    assert output.output_type in {"error", "stream"}
    assert "'nosuch' is not defined in this notebook. Dataframes here: photos." in "".join(texts(failed))
    assert "Traceback" not in "".join(texts(failed))


@pytest.mark.slow
def test_failing_work_is_told_in_one_line(tmp_path: Path) -> None:
    failed = failure(MISSING, FAILING, folder=tmp_path)
    *_, error = failed.outputs
    assert error.output_type == "error"
    assert error.ename == "ExtractionError"
    [line] = error.traceback
    assert line.startswith("ExtractionError: None of the 2 images could be read. one.jpg: no such file")
    assert "\n" not in line
    assert [text for text in texts(failed) if "failed · 2 of 2 images" in text], "progress does not say that it failed"


@pytest.mark.slow
def test_the_whole_traceback_is_shown_where_it_is_wanted(tmp_path: Path) -> None:
    failed = failure(MISSING, "%config ExtractMagics.short_errors = False", FAILING, folder=tmp_path)
    *_, error = failed.outputs
    assert len(error.traceback) > 3
    assert "extraction.py" in "".join(error.traceback)


@pytest.mark.slow
def test_an_interrupt_stops_a_notebook_in_one_line(tmp_path: Path) -> None:
    """What the stop button does: SIGINT to the kernel, here while the second cell is at work."""
    interrupt = """import os, signal, threading, numpy
images = numpy.random.default_rng(0).integers(0, 255, (40_000, 16, 16, 3), dtype="uint8")
photos = pd.DataFrame({"path": list(images)})
threading.Timer(6, os.kill, (os.getpid(), signal.SIGINT)).start()
"""
    failed = failure(MISSING, interrupt + FAILING.replace("32", "96"), folder=tmp_path)
    *_, error = failed.outputs
    [line] = error.traceback
    assert re.fullmatch(
        r"KeyboardInterrupt: photos is unchanged; [\d,]+ of 40,000 images are saved. Run the cell again to continue.",
        line,
    )

"""The documentation is true: its code runs, its links lead somewhere, its table is the code's, its English is plain.

``python -m tests.test_docs`` writes the table of options into the guide.
"""

from __future__ import annotations

import doctest
import inspect
import io
import json
import re
import tokenize
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib import pyplot as plt
from PIL import Image

import nbfeat
from nbfeat.backbones.catalog import CATALOG, backbones
from nbfeat.extraction.options import BLOCK_OPTIONS, OPTIONS
from tests.conftest import ROOT

GUIDE = ROOT / "notebooks" / "guide"
OTHERS = ("README.md", "nbfeat/SKILL.md", ".github/llms.txt", ".github/CONTRIBUTING.md")
PAGES = sorted([*GUIDE.glob("*.md"), *(path for name in OTHERS if (path := ROOT / name).is_file())])
OWN = (".github", "binder", "nbfeat", "notebooks", "tests")  # an environment may lie next to them
LINKED = sorted({*PAGES, *ROOT.glob("*.md"), *(path for folder in OWN for path in (ROOT / folder).rglob("*.md"))})
REAL = GUIDE / "your-own-network.md"  # its subject is a network that is really built, which takes seconds
BLOCK = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
TABLE = re.compile(r"(?<=<!-- options: python -m tests\.test_docs writes this table -->\n).*?(?=\n<!-- end)", re.DOTALL)
MOST_LINES, MOST_WORDS = 250, 1_800  # of the README
FORBIDDEN = (  # what sounds translated, or is vague
    r"(?i:\banew\b)", r"\bof which\b", r"\bas above\b", r"(?i:\bleav(?:e|ing)\b[^.;:]{1,40}\baway\b)",
    r"(?i:\bwhatever\b)", r"\b(?:is|are|was|were) no\b(?! longer\b| more\b| choice\b)",
    r"\bha(?:s|ve) no [\w' ]{1,40} that\b",
    r"\bby now\b", r"\bin hand\b", r"\bunasked\b", r"\bcannot be had\b", r"\bnumbers without end\b",
    r"\bothers than\b", r"\bby address\b",
    # For "if": a clause, so that a comma has to follow.
    r"(?:^|[.!?] )(?:Of|Where) (?:the|an?|all|one|several|two|it|its|they|there|that|no|every|each|files)\b[^.:|]*,",
)  # fmt: skip


def blocks(page: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the first line, the info string and the code of each block of Python."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        if found[1] == "python":
            yield text.count("\n", 0, found.start()) + 2, found[2].strip(), found[3]


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in a folder with photos/cat and photos/dog, six small photographs in each."""
    generator = np.random.default_rng(0)
    for name, color in (("cat", (200, 90, 40)), ("dog", (40, 90, 200))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(1, 7):
            pixels = color + generator.normal(0, 40, (6, 8, 3)).repeat(12, 0).repeat(12, 1)
            image = Image.fromarray(pixels.clip(0, 255).astype("uint8"))
            image.save(tmp_path / "photos" / name / f"{number}.jpg")
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("Agg")
    known = dict(CATALOG)  # pages register networks
    yield tmp_path
    CATALOG.clear()
    CATALOG.update(known)
    plt.close("all")


def run_page(page: Path, shell: InteractiveShell) -> None:
    """Run the Python blocks of a page from top to bottom, as cells of one notebook."""
    shell.reset(new_session=False)
    photos = nbfeat.folder("photos")
    photos["split"] = np.where(np.arange(len(photos)) % 3, "train", "test")
    shell.user_ns.update(nbfeat=nbfeat, np=np, pd=pd, photos=photos)
    for line, info, code in blocks(page):
        if info:
            assert re.fullmatch(r"skip: \w.{5,}", info), f"{page.name}:{line}: say why it is skipped, not {info!r}"
            continue
        for cell in re.split(r"^(?=%%)", code, flags=re.MULTILINE):  # a cell magic is the first line of its cell
            with capture_output():
                outcome = shell.run_cell(cell)
            if error := outcome.error_before_exec or outcome.error_in_exec:
                pytest.fail(f"{page.name}:{line}: {type(error).__name__}: {error}\n\n{cell}", pytrace=False)
    for callback in list(shell.events.callbacks["post_run_cell"]):
        if isinstance(panel := getattr(callback, "__self__", None), nbfeat.Panel):
            panel.close()


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if page != REAL], ids=name)
@pytest.mark.usefixtures("here", "fake_network")
def test_the_code_of_a_page_runs(page: Path, shell: InteractiveShell) -> None:
    """Every network is pretended, so that nothing is built or downloaded."""
    run_page(page, shell)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=name)
@pytest.mark.usefixtures("here")
def test_it_runs_with_the_networks_that_it_names(page: Path, shell: InteractiveShell) -> None:
    """Published weights are drawn at random, so that nothing is downloaded; layers and widths are the real ones."""
    for known, backbone in CATALOG.items():
        if backbone.default_weights == "imagenet":
            CATALOG[known] = replace(backbone, default_weights="random")
    run_page(page, shell)


def table_of_options() -> str:
    rows = ["| option | of | meaning | default |", "|---|---|---|---|"]
    for option in OPTIONS:
        spelling = ", ".join(option.flags) + ("" if option.switch else f" {option.metavar}")
        scope = "block" if option in BLOCK_OPTIONS else "run"
        choices = ": " + " ".join(f"`{choice}`" for choice in option.choices) if option.choices else ""
        rows.append(f"| `{spelling}` | {scope} | {option.help}{choices} | {option.default} |")
    return "\n".join(rows)


def test_the_guide_has_the_table_of_options() -> None:
    found = TABLE.search((GUIDE / "options.md").read_text(encoding="utf-8"))
    assert found is not None
    assert found[0] == table_of_options(), "write it again: python -m tests.test_docs"


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if not re.match(r"[a-z]+:", link):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{link} does not exist"
            assert not anchor or anchor in anchors(target), f"{link}: {target.name} has no such heading"


def test_the_guide_lists_every_page_and_notebook() -> None:
    links = set(LINK.findall(prose(GUIDE / "README.md")))
    pages = {page.name for page in GUIDE.glob("*.md")} - {"README.md"}
    assert pages | {f"../{path.name}" for path in GUIDE.parent.glob("*.ipynb")} <= links


def test_the_readme_is_read_in_one_sitting() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    assert len(text.split()) <= MOST_WORDS


def public() -> Iterator[tuple[str, Any]]:
    """Yield every public object, and its public methods and properties."""
    for known in nbfeat.__all__:
        thing = backbones if known == "backbones" else getattr(nbfeat, known)
        yield known, thing
        kind = thing if isinstance(thing, type) else type(thing)
        for member in dir(kind):
            own = getattr(inspect.getattr_static(kind, member), "fget", None) or getattr(kind, member, None)
            if member[0] != "_" and str(getattr(own, "__module__", "")).startswith("nbfeat."):
                yield f"{known}.{member}", own


@pytest.mark.usefixtures("here")
def test_the_examples_of_public_names_run(shell: InteractiveShell) -> None:
    shell.reset(new_session=False)  # a panel needs a shell
    photos = nbfeat.folder("photos")
    names = {
        "nbfeat": nbfeat,
        "np": np,
        "pd": pd,
        "photos": photos,
        "result": nbfeat.extract(photos, "EfficientNetLite0"),
    }
    said, runner = io.StringIO(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for where, thing in public():
        example = doctest.DocTestParser().get_doctest(inspect.getdoc(thing) or "", dict(names), where, None, None)
        runner.run(example, out=said.write)
    assert runner.failures == 0, said.getvalue()


def texts() -> Iterator[tuple[str, str]]:
    """Yield what people read, after where it stands."""
    for path in sorted((ROOT / "nbfeat").rglob("*.py")):
        with path.open("rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type in {tokenize.STRING, tokenize.COMMENT} or "FSTRING" in tokenize.tok_name[token.type]:
                    yield f"{name(path)}:{token.start[0]}", token.string
    for page in LINKED:
        yield from ((name(page), text) for text in page.read_text(encoding="utf-8").split("\n\n"))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        yield from ((name(path), "".join(cell["source"])) for cell in cells if cell["cell_type"] == "markdown")


def test_the_english_is_plain() -> None:
    found = []
    for where, text in texts():
        line = " ".join(re.sub(r"^#+ (.*)$", r"\1:", text, flags=re.MULTILINE).split())  # headings end
        found += [f"{where}: {hit[0]}" for hit in re.finditer("|".join(FORBIDDEN), line)]
    assert not found, "\n".join(found)


if __name__ == "__main__":
    options = GUIDE / "options.md"
    options.write_text(TABLE.sub(lambda _: table_of_options(), options.read_text(encoding="utf-8")), encoding="utf-8")

"""The house in order: which way imports run, what importing costs, what the README says."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import nbfeat
from nbfeat.backbones.catalog import CATALOG
from nbfeat.jupyter import grammar
from tests.conftest import ROOT

PACKAGE = ROOT / "nbfeat"
ROOMS = ("leaves", "images", "backbones", "inference", "cache", "parquet", "extraction", "explore", "jupyter")
LEAVES = {"errors", "paths", "isolation", "html"}
HEAVY = {"keras", "tensorflow", "openvino", "torch", "jax"}
NOTEBOOK = {"IPython", "ipywidgets", "traitlets"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


HEIGHTS = {"leaves": 0, "images": 1, "backbones": 1, "inference": 2, "cache": 2, "parquet": 2, "extraction": 3}
# Arrows against the order that are still to be turned, as (from, to).
STILL_OPEN = {
    ("cache", "extraction"),
    ("inference", "extraction"),
}


def layer_of(name: str) -> int:
    part = name.split(".")[1] if "." in name else ""
    return 0 if part in LEAVES else HEIGHTS.get(part, ROOMS.index(part)) if part in ROOMS else len(ROOMS)


def imports(path: Path, *, top_only: bool = False) -> list[str]:
    """Return the modules that a file names, in function bodies too, and those imported by their names as text."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: list[str] = []
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found += [str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)]
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    mine = layer_of("nbfeat." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    for name in imports(path):
        if name.startswith("nbfeat.") and mine < len(ROOMS):
            rooms = (path.relative_to(PACKAGE).parts[0], name.split(".")[1])
            assert layer_of(name) <= mine or rooms in STILL_OPEN, f"{path.name} imports {name} against the arrows"
            assert mine > 0 or name == "nbfeat.errors" or layer_of(name) < mine, f"the leaf {path.name} imports {name}"
        if mine < ROOMS.index("jupyter"):
            assert name.partition(".")[0] not in NOTEBOOK, f"{path.name} imports {name}"
    for name in imports(path, top_only=True):
        assert name.partition(".")[0] not in HEAVY, f"{path.name} imports {name} at module level"


def test_modules_are_of_a_size_to_be_read() -> None:
    long = {path.name: len(path.read_text().splitlines()) for path in modules()}
    # The one loop and its result are one class, which is read as a whole.
    assert {name for name, lines in long.items() if lines > 450} <= {"extraction.py"}


def test_importing_nbfeat_imports_nothing_heavy() -> None:
    code = "import sys, nbfeat; print(' '.join(name for name in sys.modules if '.' not in name))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {*HEAVY, "pandas", "numpy", "PIL", "ipywidgets", "IPython", "sklearn"}


def test_every_public_name_can_be_had_and_says_what_it_is() -> None:
    for name in nbfeat.__all__:
        assert getattr(nbfeat, name).__doc__, name
    assert set(nbfeat.__all__) <= set(dir(nbfeat))
    with pytest.raises(AttributeError, match="nosuch"):
        nbfeat.nosuch  # noqa: B018 - to see it fail


def test_the_package_that_is_a_function_lists_the_catalog() -> None:
    assert list(nbfeat.backbones("VGG*").index) == ["VGG16", "VGG19"]  # type: ignore[operator]  # a module that can be called


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_the_table_of_options() -> None:
    assert grammar.markdown() in readme(), "put the output of nbfeat.jupyter.grammar.markdown() into the README"


def test_the_readme_names_every_room() -> None:
    tree = readme().split("nbfeat/\n├")[1].split("```")[0]
    assert [room for room in (*LEAVES, *ROOMS[1:]) if room not in tree] == []


def test_the_readme_names_every_backbone_family() -> None:
    text = readme()
    for backbone in CATALOG.values():
        assert backbone.family.removesuffix("V2").removesuffix("V3") in text, backbone.name


def test_only_what_belongs_at_the_top_is_there() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {name.partition("/")[0] for name in tracked.stdout.splitlines()}
    allowed = {"pyproject.toml", "README.md", "LICENSE", "nbfeat", "notebooks", "tests", "binder"}
    assert {name for name in top if not name.startswith(".")} <= allowed


def test_notebooks_are_saved_with_outputs_and_without_widgets() -> None:
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        assert "widgets" not in notebook["metadata"]
        assert any(cell.get("outputs") for cell in notebook["cells"])
        assert path.stat().st_size < 300_000

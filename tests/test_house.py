"""The house in order: which way imports run, what importing costs, what the pages about it name."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

import nbfeat
from nbfeat.backbones.catalog import CATALOG
from tests.conftest import ROOT

PACKAGE = ROOT / "nbfeat"
LEAVES = ("errors", "paths", "isolation", "html")
# Rooms of one floor do not import each other, but those of the floors below.
FLOORS = (
    LEAVES,
    ("images", "backbones"),
    ("inference", "cache", "parquet"),
    ("extraction",),
    ("explore",),
    ("jupyter",),
)
ROOMS = tuple(room for floor in FLOORS[1:] for room in floor)
LINES, MODULE, FUNCTION, NOQAS = 14_000, 450, 40, 40
HEAVY = {"keras", "tensorflow", "openvino", "torch", "jax"}
NOTEBOOK = {"IPython", "ipywidgets", "traitlets"}
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def imports(name: str, *, top_only: bool = False) -> set[str]:
    """Return what a module imports, in function bodies and for types alone too, and by names as text."""
    found: set[str] = set()
    for node in TREES[name].body if top_only else ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = {f"{node.module}.{alias.name}" for alias in node.names} & SOURCES.keys()
            found |= modules | (set() if len(modules) == len(node.names) else {node.module})
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found |= {str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)}
    return found - {name}


def place(name: str) -> tuple[int, str]:
    """Return the floor and the room of a module; what lies at the top of the package is above all."""
    room = [*name.split("."), ""][1]
    return next((number, room) for number, rooms in enumerate((*FLOORS, (room,))) if room in rooms)


@pytest.mark.parametrize("name", SOURCES)
def test_imports_run_one_way(name: str) -> None:
    floor, room = place(name)
    for other in imports(name):
        if other in SOURCES and other != "nbfeat" and floor < len(FLOORS):
            below, its_room = place(other)
            assert below < floor or room == its_room or (floor == 0 and other == "nbfeat.errors"), f"imports {other}"
        if floor < len(FLOORS) - 1:
            assert other.partition(".")[0] not in NOTEBOOK, f"imports {other}"
    for other in imports(name, top_only=True):
        assert other.partition(".")[0] not in HEAVY, f"imports {other} at module level"


def test_no_module_imports_itself_by_way_of_others() -> None:
    reached = {name: imports(name) & SOURCES.keys() for name in SOURCES}
    for middle in SOURCES:
        for name in SOURCES:
            if middle in reached[name]:
                reached[name] |= reached[middle]
    assert [name for name in SOURCES if name in reached[name]] == []


def test_everything_is_of_a_size_to_be_read() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in SOURCES.items()}
    assert sum(lines.values()) <= LINES
    assert {name: count for name, count in lines.items() if count > MODULE} == {}
    long = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body and (body[-1].end_lineno or 0) - body[0].lineno >= FUNCTION:
                    long[f"{name}.{node.name}"] = body[-1].end_lineno
    assert long == {}


def test_lint_is_waved_away_seldom_and_with_a_reason() -> None:
    lines = [line for path in SOURCES.values() for line in path.read_text(encoding="utf-8").splitlines()]
    waved = [line for line in lines if "# noqa" in line]
    assert len(waved) <= NOQAS
    assert [line for line in waved if " - " not in line.partition("# noqa")[2]] == []


@pytest.mark.parametrize(
    ("module", "light"),
    [("nbfeat", ()), ("nbfeat.backbones.catalog", ()), ("nbfeat.images.sources", ("numpy", "PIL"))],
)
def test_importing_imports_nothing_heavy(module: str, light: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*(name for name in sys.modules if '.' not in name))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {*HEAVY, *NOTEBOOK, "pandas", "numpy", "PIL", "sklearn"} - {*light}
    assert not {*loaded} & heavy


def test_every_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.split(r"[\s<>=!\[;]", one)[0].lower().replace("-", "_") for group in groups for one in group}
    aliases = {"PIL": "pillow", "sklearn": "scikit_learn", "IPython": "ipython"}
    imported = {name.partition(".")[0] for source in SOURCES for name in imports(source)} - sys.stdlib_module_names
    missing = {aliases.get(name, name) for name in imported} - declared - {"nbfeat"}
    assert missing == {"umap", "yarl", "psutil"}  # the user's to install, a part of aiohttp, a part of Ray


def test_every_public_name_can_be_had_and_says_what_it_is() -> None:
    for name in nbfeat.__all__:
        assert getattr(nbfeat, name).__doc__, name
    assert set(nbfeat.__all__) == set(dir(nbfeat))
    with pytest.raises(AttributeError, match="nosuch"):
        nbfeat.nosuch  # noqa: B018 - to see it fail


def test_the_package_that_is_a_function_lists_the_catalog() -> None:
    assert list(nbfeat.backbones("VGG*").index) == ["VGG16", "VGG19"]  # type: ignore[operator]  # a module that can be called


def test_the_page_for_contributors_names_every_room() -> None:
    page = ROOT / ".github" / "CONTRIBUTING.md"
    tree = page.read_text(encoding="utf-8").split("nbfeat/\n├")[1].split("```")[0]
    assert [room for room in (*LEAVES, *ROOMS) if room not in tree] == []


def test_the_guide_names_every_backbone_family() -> None:
    text = (ROOT / "notebooks" / "guide" / "networks.md").read_text(encoding="utf-8")
    for backbone in CATALOG.values():
        assert backbone.family.removesuffix("V2").removesuffix("V3") in text, backbone.name


def test_only_what_belongs_at_the_top_is_there() -> None:
    if not (ROOT / ".git").exists() or not shutil.which("git"):  # an exported tree may lie in a checkout of others
        pytest.skip("not a git checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    top = {name.partition("/")[0] for name in tracked.stdout.splitlines()}
    allowed = {"pyproject.toml", "README.md", "LICENSE", "nbfeat", "notebooks", "tests", "binder"}
    assert {name for name in top if not name.startswith(".")} <= allowed


def test_notebooks_are_saved_with_outputs_and_without_widgets() -> None:
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        assert "widgets" not in notebook["metadata"]
        assert any(cell.get("outputs") for cell in notebook["cells"])
        assert path.stat().st_size < 300_000

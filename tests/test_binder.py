"""What Binder would make of the repository: the plan that repo2docker prints, and what is prepared in the image."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from packaging.specifiers import SpecifierSet

import nbfeat
from tests import binder_check
from tests.conftest import ROOT
from tests.test_notebooks import execute, read

BINDER, QUICKSTART = ROOT / "binder", ROOT / "notebooks" / "01_quickstart.ipynb"
BUILT = ("networks", "layers")  # folders of a home, of what child processes build
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
pytestmark = pytest.mark.skipif(not BINDER.is_dir(), reason="binder/ is not part of the source distribution")


@pytest.fixture(scope="module")
def plan() -> tuple[list[str], str]:
    """Return the lines of the Dockerfile that repo2docker would build, and what it says beside it."""
    if importlib.util.find_spec("repo2docker") is None:
        pytest.skip("repo2docker is not installed: pip install '.[test]'")
    command = [sys.executable, "-m", "repo2docker", "--no-build", "--debug", "."]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines(), ran.stderr


def where(lines: list[str], pattern: str) -> int:
    """Return the number of the one line that `pattern` is found in."""
    [at] = [number for number, line in enumerate(lines) if re.search(pattern, line)]
    return at


def test_the_image_has_the_python_that_is_asked_for(plan: tuple[list[str], str]) -> None:
    version = (BINDER / "runtime.txt").read_text().strip().removeprefix("python-")
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)
    assert f"python={version}\n" in plan[1]


def test_the_package_is_installed_after_it_was_copied(plan: tuple[list[str], str]) -> None:
    """`pip install -r` of a file that names the repository, before the repository is there, ends the build."""
    lines, _ = plan
    copy = where(lines, r"^COPY .* src/ \$\{REPO_DIR\}/$")
    assert copy < where(lines, r"^RUN .*/pip install .*-r \"binder/requirements.txt\"")


def test_networks_are_prepared_last_by_the_user_of_the_image(plan: tuple[list[str], str]) -> None:
    lines, _ = plan
    prepared = where(lines, r"^RUN \./binder/postBuild$")
    assert prepared > where(lines, r"^RUN .*/pip install")
    assert [line for line in lines[:prepared] if line.startswith("USER ")][-1] == "USER ${NB_USER}"


def prepare(home: Path, monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    """Run what prepares the image for `home`, which is the one in use then, and return what it says."""
    monkeypatch.setenv("NBFEAT_HOME", str(home))
    ran = subprocess.run(
        [sys.executable, BINDER / "postBuild"], env={**os.environ, **variables},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    return ran.stdout


def built(home: Path) -> list[Path]:
    """Return all that was built and is kept."""
    return sorted(path for name in BUILT for path in (home / name).iterdir())


@pytest.mark.slow
def test_the_quickstart_builds_nothing_even_where_nothing_can_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    nowhere = dict.fromkeys(("https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    said = prepare(home, monkeypatch, KERAS_HOME=str(tmp_path / "keras"), **nowhere).splitlines()
    assert len(said) == 2
    assert said[0].startswith("MobileNet --alpha 0.25 is not prepared, and will be ")
    assert re.search(r"could not be downloaded [^.]*\.$", said[0])
    assert {folder.name for folder in home.iterdir()} == set(BUILT), "features of noise are kept"
    before = built(home)
    execute(read(QUICKSTART), tmp_path)
    assert built(home) == before


@pytest.mark.slow
@pytest.mark.usefixtures("shared_data")
def test_a_pretrained_network_is_prepared_where_its_weights_are_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = prepare(tmp_path / "home", monkeypatch)
    assert "not prepared" not in said
    kept = nbfeat.storage.networks
    [pretrained] = kept[kept["backbone"] == "MobileNet"].to_dict("records")
    assert (pretrained["alpha"], pretrained["weights"]) == (0.25, "imagenet")


def test_the_repository_is_copied_as_it_is_published_without_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    for name in (".git/config", ".github/llms.txt", ".venv/x", "nbfeat/__init__.py", "nbfeat/__pycache__/x.pyc"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for name in (".gitignore", "binder/postBuild"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    monkeypatch.setattr(binder_check, "ROOT", root)
    monkeypatch.setattr(binder_check, "DATA", tmp_path / "nosuch")
    monkeypatch.setenv("PATH", "")
    image = binder_check.copied(tmp_path / "image")
    found = {path.relative_to(image).as_posix() for path in image.rglob("*") if path.is_file()}
    assert found == {".github/llms.txt", ".gitignore", "binder/postBuild", "nbfeat/__init__.py"}
    assert os.access(image / "binder" / "postBuild", os.X_OK)


def test_the_badges_open_the_quickstart_of_this_repository() -> None:
    links = re.findall(r"https://mybinder\.org/v2/[^)\s]+", (ROOT / "README.md").read_text(encoding="utf-8"))
    opened = set()
    for link in map(urlsplit, links):
        assert link.path == f"/v2/gh/{urlsplit(PROJECT['urls']['Source']).path.strip('/')}/HEAD"
        [path] = parse_qs(link.query)["urlpath"]
        face, _, notebook = re.fullmatch(r"(lab/tree|notebooks)(/)(.*)", path).groups()  # type: ignore[union-attr]
        assert (ROOT / notebook).is_file()
        opened.add(face)
    assert opened == {"lab/tree", "notebooks"}

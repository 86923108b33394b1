"""What surrounds the package: what is installed of it, workflows, forms, the changelog, what assistants read."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import nbfeat
from tests import messages
from tests.conftest import INSTALLED, ROOT

GITHUB = ROOT / ".github"
yaml = pytest.importorskip("yaml")  # moto brings it
SKIPS = ROOT / ".ci" / "skips"
needs_ci = pytest.mark.skipif(
    not SKIPS.is_file() or os.name != "posix", reason=".ci/ is for Linux, and not part of the source distribution"
)
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of every file of a package, but for what Python compiled."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_what_ci_tests_is_installed_and_complete() -> None:
    """`.ci/run` sets the variable. Without it, the checkout may be what is tested."""
    assert INSTALLED or not os.environ.get("NBFEAT_TEST_WHEEL")
    assert files(Path(nbfeat.__file__).parent) == files(ROOT / "nbfeat")


def test_child_processes_import_what_is_tested_wherever_they_run(tmp_path: Path) -> None:
    code = "import nbfeat, tests.messages; print(nbfeat.__file__, tests.messages.__file__, sep='\\n')"
    for folder in (ROOT, tmp_path):
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == [nbfeat.__file__, messages.__file__]


@pytest.mark.slow
def test_the_wheel_is_small_and_has_every_file_and_the_terms(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="no hatchling here: pip install '.[test]'")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run([*pip, str(ROOT)], check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    assert wheel.stat().st_size < 1_000_000
    shutil.unpack_archive(wheel, tmp_path, "zip")
    found = files(tmp_path / "nbfeat")
    assert found == files(ROOT / "nbfeat")
    data = {"SKILL.md", "backbones/catalog.csv", "jupyter/panel/panel.css", "py.typed"}
    assert data <= found.keys()
    metadata = next(tmp_path.glob("*.dist-info"))
    assert "License-Expression: Apache-2.0\n" in (metadata / "METADATA").read_text()
    assert [path.name for path in (metadata / "licenses").iterdir()] == ["LICENSE"]


def test_ci_runs_the_same_script_on_every_python_that_is_supported() -> None:
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    first, end = map(int, re.findall(r"3\.(\d+)", needs))
    jobs = read(GITHUB / "workflows" / "ci.yml")["jobs"]
    assert jobs["linux"]["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in range(first, end)]
    assert {"run": ".ci/run"} in jobs["linux"]["steps"]


def test_the_oldest_versions_are_tested_too() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for needed in [*project["dependencies"], *extras["remote"], *extras["samples"]]:
        # Of weights, whose hash is in the catalog, there is one version.
        pattern = r"[\w-]+-pytorch-model==[\d.]+|[\w-]+>=[\d.]+"
        assert re.fullmatch(pattern, needed), f"{needed}: say which is the oldest version"
    steps = read(GITHUB / "workflows" / "ci.yml")["jobs"]["floors"]["steps"]
    compiled, installed = (step["run"] for step in steps if "floors.txt" in step.get("run", ""))
    assert "--resolution lowest" in compiled
    assert "--constraint" in installed


@needs_ci
@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("root may write everywhere", True),
        ("no jax here: pip install '.[jax]'", True),
        ("no test data at /a b/data: set NBFEAT_TEST_DATA to a folder that has them", True),
        ("This CPU doesn't support bfloat16: OpenVINO would use f32 instead. Use `precision='float32'`.", True),
        ("this CPU does not compute in float32", False),
        ("no moto here: pip install '.[test]'", False),
        ("root may write everywhere, or not", False),
    ],
)
def test_a_skip_for_a_reason_that_is_not_expected_fails(tmp_path: Path, reason: str, *, expected: bool) -> None:
    log, line = tmp_path / "log", f"SKIPPED [2] tests/cache/test_cache.py:466: {reason}"
    log.write_text(f"SKIPPED [1] tests/test_house.py:151: not a git checkout\n{line}\n1 passed, 3 skipped in 1.00s\n")
    done = subprocess.run([SKIPS, log], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0 if expected else 1, "")
    complaint = [] if expected else ["", "Skipped for a reason that .ci/skips does not expect:", line]
    assert done.stdout.splitlines()[2:] == [line, *complaint]


@needs_ci
def test_a_log_without_skips_is_accepted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("1 passed in 1.00s\n")
    done = subprocess.run([SKIPS, log], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "none"


@pytest.mark.parametrize("path", sorted((GITHUB / "workflows").glob("*.yml")), ids=lambda path: path.name)
def test_workflows_may_only_read_and_end_in_time(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 120
        assert all(re.search(r"@v\d+$", step["uses"]) for step in job["steps"] if "uses" in step)


@pytest.mark.parametrize("path", [form for form in FORMS if form.stem != "config"], ids=lambda path: path.name)
def test_issue_forms_are_short_and_say_what_github_needs(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "body"} <= form.keys()
    assert len(form["body"]) <= 3
    assert len({part["id"] for part in form["body"]}) == len(form["body"])
    assert all(part["attributes"]["label"] for part in form["body"])


def test_the_changelog_has_what_is_coming_and_this_version() -> None:
    heads = re.findall(r"^## (.+)$", (GITHUB / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heads[0] == "[Unreleased]"
    assert heads[1].startswith(nbfeat.__version__)


def test_the_skill_says_when_to_use_it() -> None:
    before, head, _ = (ROOT / "nbfeat" / "SKILL.md").read_text(encoding="utf-8").split("---\n", 2)
    front = yaml.safe_load(head)
    assert (before, front["name"]) == ("", "nbfeat")
    assert 100 < len(front["description"]) <= 1024

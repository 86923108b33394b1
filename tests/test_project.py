"""What surrounds the package: workflows, forms for issues, the changelog, and what assistants read."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import nbfeat
from tests.conftest import ROOT

GITHUB = ROOT / ".github"
yaml = pytest.importorskip("yaml")  # moto brings it
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_ci_runs_the_same_script_on_every_python_that_is_supported() -> None:
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    first, end = map(int, re.findall(r"3\.(\d+)", needs))
    jobs = read(GITHUB / "workflows" / "ci.yml")["jobs"]
    assert jobs["linux"]["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in range(first, end)]
    assert {"run": ".ci/run"} in jobs["linux"]["steps"]


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

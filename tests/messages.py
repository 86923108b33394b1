"""What every message that refuses something promises: one line, printable, that ends with the next step."""

from __future__ import annotations

import re

_VERBS = (
    "bring call change check choose close compare delete drop extract flatten free give install keep leave let lists "
    "make move name needs? pass put remove rename rerun restore run say select set takes? try update use write"
)
_STEP = re.compile(
    rf"""
    Did\ you\ mean\ .+\?$
    | ^Relative\ paths\ start
    | \bmust\ be\ .+,\ not\b
    | ^(?:Columns\ that\ look\ like\ images|Its\ columns):  # to choose from
    | (?i:\b(?:{_VERBS.replace(" ", "|")})\b)
    """,
    re.VERBOSE,
)


def assert_says_what_to_do(text: str) -> None:
    """Assert that a message is one printable line whose last sentence is a next step."""
    assert text.splitlines() == [text]
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", text)
    assert text[-1] in ".?", text
    last = re.split(r"(?<=[.?]) (?=[A-Z%])", text)[-1]
    assert _STEP.search(last), text

"""What every message that refuses something promises: one line, printable, that ends with the next step."""

from __future__ import annotations

import re

_STEP = re.compile(
    r"""
    Did\ you\ mean\ .+\?$
    | \b(?:Choose|Write|Name|Use|Give|Make|Check|Try|Install|Extract|Close|Keep|Run|Leave|Free|Set|Delete|Update|Compare|Take|Bring|Let|Rename|Relative\ paths\ start)\b
    | ^(?:Columns\ that\ look\ like\ images|Its\ columns):  # to choose from
    | \b(?:leave|move|take[s]?|needs?|use|name|make|choose|give|write|remove|set|install|update|delete|free|run|lists?|say)\b
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

"""Values of the notebook, put in for ``$name`` and ``{expression}`` in the words of a magic; and how to avoid that."""

from __future__ import annotations

import re
from typing import Any

from IPython.utils.text import DollarFormatter

from nbfeat.errors import RequestError

# What DollarFormatter takes for a name: not between single quotes.
_DOLLAR = re.compile(r"(.*?)\$(\$?[\w.]+)(?=([^']*'[^']*')*[^']*$)")


def expand(text: str, names: dict[str, Any]) -> str:
    """Put values in for ``$name`` and ``{expression}``; ``$$`` and ``{{ }}`` are literal, unknown names an error."""
    if "$" not in text and "{" not in text:
        return text
    try:
        return str(DollarFormatter().vformat(text, (), names))
    except Exception as error:  # an expression of the user's: whatever it raises is about it
        reason = f"{type(error).__name__}: {error}"
        raise RequestError(
            f"{text.strip()!r} could not be expanded ({reason}). Write $$ or {{{{ }}}} for plain signs."
        ) from error


def literal(text: str) -> str:
    """Write `text` so that `expand` gives it back, whatever signs it holds.

    >>> literal("costs $price"), literal("plain")
    ('costs $$price', 'plain')
    """
    if "$" not in text and "{" not in text:
        return text
    pieces = re.split(r"(?<=[{}])", text)  # as string.Formatter takes text apart at braces, and finds $name in each
    return "".join(re.sub(r"([{}])", r"\1\1", _DOLLAR.sub(r"\1$$\2", piece)) for piece in pieces)

"""What can go wrong: NbfeatError and its kinds. Each message names the value, and ends with the next step."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_NOT_PRINTABLE = re.compile(r"[^\S ]|[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class NbfeatError(Exception):
    """Anything that nbfeat raises on purpose."""

    def __str__(self) -> str:
        """Return the message, whatever signs are in the values that it quotes, on one line."""
        return printable(super().__str__())


class RequestError(NbfeatError, ValueError):
    """What was asked for cannot be: an unknown name, a clash, a bad value; nothing was started."""


class WeightsError(NbfeatError):
    """Weights could not be downloaded or read, or do not fit the network."""


class NetworkError(NbfeatError):
    """A network could not be built, exported, compiled or run."""


class ExtractionError(NbfeatError):
    """A run could not give a result: every image failed, memory would not do, it is not finished."""


class ImageError(NbfeatError):
    """One image could not be read; its message is the reason shown in `failures`."""


def printable(text: str) -> str:
    """Return `text` on one line, printable everywhere: other signs as Python writes them."""
    return _NOT_PRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def near(word: str, known: Iterable[str]) -> str:
    """Return "Did you mean A or B?" for the names most like `word`, or an empty string."""
    by_fold = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), by_fold, n=3, cutoff=0.6)
    return f"Did you mean {listing((by_fold[name] for name in close), 'or')}?" if close else ""


def listing(names: Iterable[str], joint: str = "and") -> str:
    """Join names as a sentence does: "a", "a and b", "a, b and c"."""
    *head, last = list(names) or [""]
    return f"{', '.join(head)} {joint} {last}" if head else last


def sentences(*parts: str) -> str:
    """Join sentences with spaces, leaving out empty ones."""
    return " ".join(part for part in parts if part)


def format_bytes(size: float) -> str:
    """Write a number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit in {"bytes", "kB"} else f"{size:,.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"

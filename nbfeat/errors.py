"""What can go wrong: NbfeatError and its kinds. Each message names the value, and ends with the next step."""

from __future__ import annotations

import difflib
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

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


class Refused(Exception):  # noqa: N818 - it is the reason why, before it has the file's name
    """Why a file is not read: a clause without its name, then the next step where it is not that of its kind."""


def damaged(what: str) -> Refused:
    """Refuse a file that is not as it was written."""
    return Refused(what, "Download it again.")


def quote(text: str | bytes, most: int = 60) -> str:
    """Return text from a file in quotes on one line, in ASCII, cut after `most` characters."""
    line = ascii(text[:most] if isinstance(text, str) else text[:most].decode("latin-1"))
    return f"{line[:-1]}...{line[-1]}" if len(text) > most else line


@contextmanager
def refusing(path: Path, kind: str, advice: str = "Download it again.") -> Iterator[None]:
    """Turn what goes wrong over the file at `path` into a WeightsError: "`path` cannot be read as `kind`: …"."""
    cause: Exception | None = None
    try:
        # Opening a pipe waits for its other end for ever, and reading a device may do anything.
        if stat.S_ISREG(path.stat().st_mode):
            yield
            return
        reason = "it is not a file. Check the path."
    except Refused as refused:
        reason = ". ".join((*refused.args, advice)[:2])
    except WeightsError:
        raise
    except Exception as error:
        cause, text = error, quote(getattr(error, "strerror", None) or str(error), 200)[1:-1]
        reason = f"it is damaged beyond reading ({type(error).__name__}: {text}). Download it again."
        if isinstance(error, MemoryError):
            reason = "there is not enough memory for it. Close other notebooks and try again."
        elif isinstance(error, OSError | ValueError):  # ValueError: a NUL in the path
            reason = f"{text}. Check the path, or download the file again."
    raise WeightsError(f"{path.name} cannot be read as {kind}: {reason}") from cause

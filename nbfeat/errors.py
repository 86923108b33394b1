"""The exceptions, and helpers for messages: each names the value and ends with the next step."""

import difflib
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_NOT_PRINTABLE = re.compile(r"[^\S ]|[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class NbfeatError(Exception):
    """Anything that nbfeat raises on purpose."""

    def __str__(self) -> str:
        """Return the message on one printable line, even if it quotes strange values."""
        return printable(super().__str__())


class RequestError(NbfeatError, ValueError):
    """The request is invalid: an unknown name, a name clash or a bad value. Nothing was started."""


class WeightsError(NbfeatError):
    """Weights couldn't be downloaded or read, or don't fit the network."""


class NetworkError(NbfeatError):
    """A network couldn't be built, exported, compiled or run."""


class DiskFullError(NetworkError):
    """The disk had no room for a network."""


class ExtractionError(NbfeatError):
    """A run has no result: every image failed, memory ran out, or it isn't finished."""


class ImageError(NbfeatError):
    """One image couldn't be read; the message is its reason in `failures`."""


def printable(text: str, escaped: re.Pattern[str] = _NOT_PRINTABLE) -> str:
    """Return `text` on one line; unprintable characters, or others to be `escaped`, are written as in Python."""
    return escaped.sub(lambda found: ascii(found[0])[1:-1], text)


def near(word: str, known: Iterable[str]) -> str:
    """Return "Did you mean A or B?" with the known names most similar to `word`, or an empty string."""
    by_fold = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), by_fold, n=3, cutoff=0.6)
    return f"Did you mean {listing((by_fold[name] for name in close), 'or')}?" if close else ""


def listing(names: Iterable[str], joint: str = "and") -> str:
    """Join names as in a sentence: "a", "a and b", "a, b and c"."""
    *head, last = list(names) or [""]
    return f"{', '.join(head)} {joint} {last}" if head else last


def first_line(error: Exception, at: int = 0) -> str:
    """Return the first line of an error's message, or the one at another place, cut to 400 characters; or its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[at].rstrip(".")[:400]


def sentences(*parts: str) -> str:
    """Join sentences with spaces, leaving out empty ones."""
    return " ".join(part for part in parts if part)


def format_bytes(size: float) -> str:
    """Format a number of bytes, e.g. "1.5 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit in {"bytes", "kB"} else f"{size:,.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


class Refused(Exception):  # noqa: N818 - a reason, to which `refusing` adds the name of the file
    """Why a file isn't read: a clause without its name and, optionally, the next step."""


def damaged(what: str) -> Refused:
    """Refuse a file that is damaged."""
    return Refused(what, "Download it again.")


def quote(text: str | bytes, most: int = 60) -> str:
    """Return text from a file in quotes, on one line, in ASCII, truncated to `most` characters."""
    line = ascii(text[:most] if isinstance(text, str) else text[:most].decode("latin-1"))
    return f"{line[:-1]}...{line[-1]}" if len(text) > most else line


@contextmanager
def refusing(path: Path, kind: str, advice: str = "Download it again.") -> Iterator[None]:
    """Turn errors in the block into a WeightsError: "`path` cannot be read as `kind`: …"."""
    cause: Exception | None = None
    try:
        if stat.S_ISREG(path.stat().st_mode):  # opening a pipe can block forever, and reading a device can do anything
            yield
            return
        reason = "it isn't a regular file. Check the path."
    except Refused as refused:
        reason = ". ".join((*refused.args, advice)[:2])
    except WeightsError:
        raise
    except Exception as error:
        cause, text = error, quote(getattr(error, "strerror", None) or str(error), 200)[1:-1]
        reason = f"it is corrupt ({type(error).__name__}: {text}). Download it again."
        if isinstance(error, MemoryError):
            reason = "not enough memory. Close other notebooks and try again."
        elif isinstance(error, OSError | ValueError):  # ValueError: a NUL in the path
            reason = f"{text}. Check the path, or download the file again."
    raise WeightsError(f"{path.name} cannot be read as {kind}: {reason}") from cause

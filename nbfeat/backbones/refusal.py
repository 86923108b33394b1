"""Why a file of weights is not read: sentences with its name, and nothing of it on more than one line."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nbfeat.errors import WeightsError

DAMAGE = "it is damaged beyond reading"


class Refused(Exception):  # noqa: N818 - it is the reason why, before it has the file's name
    """Why a file is not read: a clause without its name, and the next step."""


def damaged(what: str) -> Refused:
    """Make the refusal of a file that is not as it was written."""
    return Refused(f"{what}. Download it again.")


def quote(text: str | bytes, most: int = 60) -> str:
    """Return text from a file in quotes on one line, in ASCII, cut after `most` characters.

    >>> shown("weights" * 100, 7)
    "'weights...'"
    """
    line = ascii(text[:most] if isinstance(text, str) else text[:most].decode("latin-1"))
    return f"{line[:-1]}...{line[-1]}" if len(text) > most else line


@contextmanager
def refusing(path: Path, kind: str) -> Iterator[None]:
    """Turn what goes wrong over the file at `path` into a WeightsError: "`path` cannot be read as `kind`: …"."""
    cause: Exception | None = None
    try:
        # Opening a pipe waits for its other end for ever, and reading a device may do anything.
        if stat.S_ISREG(path.stat().st_mode):
            yield
            return
        reason = "it is not a file. Check the path."
    except Refused as refused:
        reason = str(refused)
    except MemoryError as error:
        cause, reason = error, "there is not enough memory for it. Close other notebooks and try again."
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        cause, reason = error, f"{_line(error)}. Check the path, or download the file again."
    except (ArithmeticError, LookupError, RuntimeError, TypeError) as error:
        cause, reason = error, f"{DAMAGE} ({type(error).__name__}: {_line(error)}). Download it again."
    raise WeightsError(f"{path.name} cannot be read as {kind}: {reason}") from cause


def _line(error: Exception) -> str:
    return quote(getattr(error, "strerror", None) or str(error), 200)[1:-1]

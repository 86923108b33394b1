"""What is in the folder of a dataset: which parts are there, of which request, and what is refused."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from typing import Any

from nbfeat.errors import RequestError, listing
from nbfeat.extraction.recipe import Recipe
from nbfeat.parquet.location import LOCK, Shelf
from nbfeat.parquet.piece import FORMAT, RAW, ForeignError, Piece, changed, look

MANIFEST = ".nbfeat.json"
SHOWN = 3
_PART = re.compile(rf"(?:{re.escape(RAW)}/)?part-\d{{5,}}\.parquet")
_HALF = re.compile(rf"(?:{re.escape(RAW)}/)?\.(?:part-\d{{5,}}\.parquet|{re.escape(MANIFEST)})-[0-9a-f]{{8}}")
_ANOTHER = "Write to another folder, or start anew in this one with --replace (replace=True)."


@dataclass(slots=True)
class Survey:
    """What was found; at first, nothing."""

    made: str = field(default_factory=lambda: secrets.token_hex(8))
    chunk: int | None = None  # rows in each part, once that is decided
    replaces: bool = False  # whether parts of another request may be removed
    parts: dict[int, Piece] = field(default_factory=dict)  # finished ones
    raw: dict[int, Piece] = field(default_factory=dict)  # those that are to be normalized still
    useless: list[str] = field(default_factory=list)  # names of files to remove: halves, and what is replaced

    @property
    def first(self) -> Piece | None:
        """One of the parts, to tell by what made them."""
        return next(iter([*self.parts.values(), *self.raw.values()]), None)

    @property
    def is_finished(self) -> bool:
        """Whether all parts are there."""
        return bool(self.parts) and len(self.parts) == next(iter(self.parts.values())).about.of


def survey(shelf: Shelf, request: Mapping[str, Any], *, replace: bool) -> Survey:
    """Look at what is there, before a run for `request`.

    With `replace`, what another request left, or what is finished, is to be made anew; an unfinished one goes on.

    Raises
    ------
    RequestError
        Where the folder has other files, or parts of another request that are not to be replaced.
    """
    sizes = shelf.sizes([RAW])
    names = sorted(name for name in sizes if _PART.fullmatch(name))
    halves = [name for name in sizes if _HALF.fullmatch(name)]
    if foreign := [name for name in sizes if name not in {*names, *halves, MANIFEST, LOCK}]:
        raise _foreign(shelf, foreign)
    manifest = _manifest(shelf) if MANIFEST in sizes and names else None
    found = _looked_at(shelf, names, told=manifest is not None)
    first = next((piece for piece in found.values() if piece), None)
    if not names:  # what another run was about to write is no matter
        return Survey(useless=halves)
    there = manifest or {**_told(first), "replaces": False}
    if difference := _difference(there["request"], request):
        if not replace:
            raise refusal(shelf, difference)
        return Survey(replaces=True, useless=[*halves, *names])
    result = _sorted(shelf, there, found)
    result.useless += halves
    if result.is_finished and replace and manifest is None:
        return Survey(replaces=True, useless=[*halves, *names])
    return result


def write_manifest(shelf: Shelf, found: Survey, request: Mapping[str, Any]) -> None:
    """Say in the folder what is going to be there, before the first part is."""
    values = {"format": FORMAT, "made": found.made, "chunk": found.chunk, "replaces": found.replaces}
    with shelf.writing(MANIFEST) as sink:
        sink.write(json.dumps({**values, "request": request}).encode())


def refusal(shelf: Shelf, difference: str) -> RequestError:
    """Return the error of a folder that holds something else than what is asked for."""
    return RequestError(f"{shelf.shown} has features of another request: {difference}. {_ANOTHER}")


def _manifest(shelf: Shelf) -> dict[str, Any]:
    kinds = {"format": int, "made": str, "chunk": int, "replaces": bool, "request": dict}
    try:
        with shelf.opened(MANIFEST) as file:
            values = json.loads(file.read())
        fits = all(type(values[name]) is kind for name, kind in kinds.items()) and values["chunk"] > 0
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise changed(shelf, MANIFEST) from error
    if not fits:
        raise changed(shelf, MANIFEST)
    if values["format"] != FORMAT:
        raise RequestError(
            f"{shelf.shown} was begun by a newer nbfeat. Go on with that version, or write to another folder."
        )
    return {name: values[name] for name in kinds}


def _looked_at(shelf: Shelf, names: Sequence[str], *, told: bool) -> dict[str, Piece | None]:
    """Return what each part says of itself, None for a damaged one; where none says anything, none may be ours."""
    found: dict[str, Piece | None] = {}
    recipes: dict[tuple[str, bool], Recipe] = {}  # one for all files of a dataset, as what was learned may be large
    for name in names:
        try:
            piece = look(shelf, name)
        except ForeignError as error:
            raise _foreign(shelf, [name]) from error
        if piece is not None:
            recipe = recipes.setdefault((piece.about.made, piece.about.raw), piece.recipe)
            piece = replaced(piece, recipe=recipe)
        found[name] = piece
    if names and not told and not any(found.values()):
        raise _foreign(shelf, names)
    return found


def _sorted(shelf: Shelf, there: Mapping[str, Any], found: Mapping[str, Piece | None]) -> Survey:
    """Sort the parts into those that belong here, and those that a damage or an earlier dataset left."""
    result = Survey(there["made"], there["chunk"], replaces=there["replaces"])
    for name, piece in found.items():
        if piece is None:
            result.useless.append(name)
        elif _told(piece) == {key: there[key] for key in ("made", "chunk", "request")}:
            left = there["request"]["rows"] - piece.about.number * there["chunk"]
            if piece.rows != min(there["chunk"], left):
                raise changed(shelf, name)
            (result.raw if piece.about.raw else result.parts)[piece.about.number] = piece
        elif there["replaces"]:
            result.useless.append(name)
        else:
            raise changed(shelf, name)
    return result


def _told(piece: Piece | None) -> dict[str, Any]:
    assert piece is not None
    return {"made": piece.about.made, "chunk": piece.about.chunk, "request": piece.about.request}


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Say what of two requests differs first; an empty string where nothing does."""
    if there == here:
        return ""
    try:
        return _first_difference(there, here)
    except (LookupError, TypeError, ValueError, AttributeError):  # it comes from a file
        return "it cannot be read"


def _first_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    was, now = there["blocks"], here["blocks"]
    if was != now:
        return f"they are of {_blocks(was)}, and {_blocks(now)} is asked for"
    if there["rows"] != here["rows"]:
        return f"they are of {there['rows']:,} rows, and the frame has {here['rows']:,}"
    for what, sentence in (("images", "other images"), ("columns", "other values")):
        if there[what] != here[what]:
            return _of_columns(dict(there[what]), dict(here[what]), sentence)
    if there["like"] != here["like"]:
        return "they repeat another result, or none"
    return "their normalizations were learned from other rows (--fit-on)"


def _of_columns(there: Mapping[str, str], here: Mapping[str, str], sentence: str) -> str:
    if gone := [name for name in there if name not in here]:
        return f"they have a column {gone[0]}, and the frame has none"
    if come := [name for name in here if name not in there]:
        return f"they have no column {come[0]}, and the frame has one"
    other = next((name for name in here if there[name] != here[name]), "")
    return f"column {other} has {sentence} by now" if other else "the columns are in another order"


def _blocks(blocks: Any) -> str:
    shown = [f"`{block[0]}`" + (f" of {block[1]}" if len(blocks) > 1 else "") for block in blocks]
    more = [f"{len(shown) - SHOWN:,} more"] if len(shown) > SHOWN else []
    return listing([*shown[:SHOWN], *more])


def _foreign(shelf: Shelf, names: Sequence[str]) -> RequestError:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return RequestError(
        f"{shelf.shown} has files that are not of a dataset of nbfeat: {', '.join(names[:SHOWN])}{more}. Name a folder "
        "that is empty or not there yet."
    )


def finished(shelf: Shelf) -> list[Piece]:
    """Return the parts of a dataset in their order.

    Raises
    ------
    RequestError
        Where some are missing, or there is no dataset.
    """
    sizes = shelf.sizes([RAW])
    names = sorted(name for name in sizes if _PART.fullmatch(name) and not name.startswith(RAW))
    if not names and MANIFEST not in sizes:
        raise RequestError(f"There is no dataset of nbfeat in {shelf.shown}: no part-00000.parquet. Check the path.")
    found = _looked_at(shelf, names, told=MANIFEST in sizes)
    pieces = {piece.about.number: piece for piece in found.values() if piece and not piece.about.raw}
    first = next(iter(pieces.values()), None)
    if first is None or MANIFEST in sizes or len(pieces) != first.about.of:
        there = f"{len(pieces):,} of {first.about.of:,} files" if first else "no file yet"
        raise RequestError(
            f"{shelf.shown} is not finished: {there}. Run again what writes it, which goes on from there."
        )
    if odd := [piece for piece in pieces.values() if _told(piece) != _told(first)]:
        raise changed(shelf, odd[0].about.name)
    return [pieces[number] for number in range(len(pieces))]

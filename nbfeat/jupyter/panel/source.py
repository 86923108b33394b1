"""The panel's image source: the dataframe, its image column, thumbnails and missing files."""

from __future__ import annotations

import os
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from keyword import iskeyword
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipywidgets import Dropdown

from nbfeat.errors import ImageError, NbfeatError, RequestError
from nbfeat.explore.gallery import encoded
from nbfeat.extraction.request import check_frame
from nbfeat.html import Html, escape
from nbfeat.images.sources import is_missing, likely_columns, name_of, path_of, possible_columns, read_thumbnail, spread
from nbfeat.jupyter import grammar
from nbfeat.jupyter.job import in_background
from nbfeat.jupyter.panel.widgets import DEFAULT, LABELS, Choice, Kit, labelled, offer
from nbfeat.paths import absolute

if TYPE_CHECKING:
    import pandas as pd

THUMBNAILS = 12
SIDE = 128  # pixels of a thumbnail, drawn at half its size to be sharp on high-density screens; 3 kB each
MOST_COLUMNS = 60  # to offer: nobody scrolls through more
SHORT = 30  # characters of an offered name
ALL_ROWS = ("all rows", DEFAULT)
FEW = 6  # most values of a column for choosing rows
PAUSE = 0.1  # seconds, to let the panel draw or another column be chosen
LOOKED_AT = 1000  # rows to look at for such columns


class Source:
    """The chosen frame and its image column."""

    def __init__(self, kit: Kit, names: Callable[[], Mapping[str, Any]]) -> None:
        self._kit, self._names = kit, names
        self.frame = kit.make(Dropdown, description="Dataframe", tooltip="A dataframe of this notebook")
        self.images = kit.make(Dropdown, description=LABELS["images"], tooltip="Column of image paths, bytes or arrays")
        fits = "Rows used to fit standard, minmax, whiten and PCA: choose your training rows"
        self.rows = kit.make(Dropdown, description=LABELS["fit_on"], options=[ALL_ROWS], tooltip=fits)
        self.strip, self.missing = kit.html("strip"), kit.html("missing")
        self.box = kit.part("Images", kit.box("fields", self.frame, self.images, self.rows), self.strip, self.missing)
        self._frame: Callable[[], pd.DataFrame | None] = lambda: None  # whose images are shown (weak)
        self._seen: tuple[object, ...] = ()  # what else those images depend on; a new object for each look
        kit.on_choice(self._chose, self.frame, self.images, self.rows)

    @property
    def chosen(self) -> pd.DataFrame | None:
        """The chosen frame, as it is now."""
        return self._names().get(self.frame.value) if self.frame.value else None

    @property
    def given(self) -> dict[str, Any]:
        """The run options chosen here."""
        images = {"images": [str(column) for column in self.images.value]} if self.images.value else {}
        return {**images, **({"fit_on": self.rows.value} if self.rows.value else {})}

    def refresh(self, chosen: str | None = None) -> None:
        """Read the notebook's frames and the columns of the chosen one again."""
        with self._kit.filling():
            frames = grammar.frames_in(self._names())
            offer(self.frame, frame_choices(frames))
            if chosen is not None:
                self.frame.value = chosen
            frame = frames.get(self.frame.value or "")
            offer(self.images, [] if frame is None else image_choices(frame))
            if frame is not None:
                offer(self.rows, [ALL_ROWS, *((query, query) for query in queries(frame))])
        self._look(frame)

    def has_news(self) -> bool:
        """Return whether a frame was made, resized, deleted or reassigned since the last refresh."""
        offered = list(self.frame.options)
        return frame_choices(grammar.frames_in(self._names())) != offered or self.chosen is not self._frame()

    def _chose(self, widget: Any) -> None:
        if widget is self.frame:
            self.refresh()
        elif widget is self.images:
            self._look(self.chosen)
        self._kit.changed()

    def _look(self, frame: pd.DataFrame | None) -> None:
        """Show the images of the column, unless they are already shown."""
        columns = list(self.images.value or ())
        root = absolute(self._kit.settings().get("root", ""))
        seen = (0 if frame is None else len(frame), *map(str, columns), root)
        if frame is not None and self._frame() is frame and seen == self._seen:
            return
        self._frame, self._seen = (lambda: None) if frame is None else weakref.ref(frame), seen
        try:
            if frame is None:
                raise RequestError("This notebook doesn't have a dataframe yet. Make one with a column of image paths.")
            check_frame(frame)
            values = [value for column in columns for value in frame[column].tolist()]
        except (NbfeatError, KeyError) as error:
            text = escape(labelled(str(error)))
            self.strip.value, self.missing.value = "", text if frame is None else f"⚠ {text}"
            return
        missing = sum(map(is_missing, values))
        self.missing.value = _counted(len(values), missing, None)
        in_background("look", self._read, values, missing, root, seen)  # files may be on a slow disk

    def _read(self, values: Sequence[object], missing: int, root: Path, seen: object) -> None:
        """Draw some images, then count missing files; stop if another look has started."""
        time.sleep(PAUSE)
        if seen is not self._seen:
            return
        strip, lost = "".join(thumbnail(values[place], root) for place in spread(len(values), THUMBNAILS)), 0
        with self._kit.turn():
            if seen is self._seen:
                self.strip.value = strip
        for value in values:
            if seen is not self._seen:
                return
            lost += is_lost(value, root)
        with self._kit.turn():
            if seen is self._seen:
                self.missing.value = _counted(len(values), missing, lost)


def frame_to_open(given: Any, names: Mapping[str, Any]) -> str | None:
    """Return the name of the requested frame, or of the first one with images."""
    frames = grammar.frames_in(names)
    if given is None:
        return next((name for name, frame in frames.items() if likely_columns(frame)), next(iter(frames), None))
    known = grammar.frame_called(given, names) if isinstance(given, str) else given
    check_frame(known)
    named = [name for name, frame in frames.items() if frame is known]
    if not named:
        raise RequestError("The panel needs a dataframe that has a name. Give it one first: photos = …")
    return given if isinstance(given, str) and given in named else named[0]


def frame_choices(frames: Mapping[str, pd.DataFrame]) -> list[Choice]:
    """Return the frames to choose from, with their sizes."""
    return [(f"{name} · {len(frame):,} × {frame.shape[1]:,}", name) for name, frame in frames.items()]


def image_choices(frame: pd.DataFrame) -> list[Choice]:
    """Return the columns to choose from: those that look like images, all of these combined, then others."""
    labels = [str(label) for label in frame.columns]
    # The written cell must be able to name it on one line.
    can_be_named = {label for label, count in Counter(labels).items() if count == len(label.splitlines()) == 1}
    usable = [place for place in possible_columns(frame) if labels[place] in can_be_named]
    likely = [place for place in likely_columns(frame) if place in usable]
    short = [label if len(label) <= SHORT else label[: SHORT - 1] + "…" for label in labels]
    choices: list[Choice] = [(short[place], (frame.columns[place],)) for place in likely]
    if len(likely) > 1:
        choices.append((" + ".join(short[place] for place in likely), tuple(frame.columns[likely])))
    others = [place for place in usable if place not in likely][: MOST_COLUMNS - len(choices)]
    return [*choices, *((f"{short[place]} (doesn't look like images)", (frame.columns[place],)) for place in others)]


def queries(frame: pd.DataFrame) -> list[str]:
    """Return queries on columns with few values, such as ``split == 'train'``."""
    found: list[str] = []
    some = frame.iloc[:: max(1, len(frame) // LOOKED_AT)]
    labels = Counter(frame.columns)
    for place, label in enumerate(frame.columns):
        if not isinstance(label, str) or not label.isidentifier() or iskeyword(label) or labels[label] > 1:
            continue
        kind = getattr(frame.dtypes.iloc[place], "kind", "O")
        if kind == "b":
            found.append(label)
        elif kind == "O" and len(found) < MOST_COLUMNS:
            values = {value if isinstance(value, str) else "" for value in some.iloc[:, place].tolist()}
            if 1 < len(values) <= FEW and all(value.replace("_", "").isalnum() for value in values):
                found += [f"{label} == {value!r}" for value in sorted(values)]
    return found


def thumbnail(value: object, root: Path) -> Html:
    """Draw a thumbnail, or a sign whose tooltip says why the image can't be read."""
    name = escape(name_of(value))
    try:
        url, _ = encoded(read_thumbnail(value, SIDE, root))
    except ImageError as error:
        title = f"{name}: {escape(error)}"
        return Html(f'<span class="nbfeat-lost" role="img" title="{title}" aria-label="{name}">✕</span>')
    return Html(f'<img src="{url}" alt="{name}" title="{name}">')


def is_lost(value: object, root: Path) -> bool:
    """Return whether the file of a path is missing."""
    try:
        path = path_of(value, root)
        return path is not None and not os.path.exists(path)
    except (ImageError, ValueError):
        return False


def _counted(images: int, missing: int, lost: int | None) -> str:
    """Return how many images there are and how many are missing; `lost` is None while checking files."""
    parts = [f"{images:,} image{'s' if images != 1 else ''}"]
    parts += [f"⚠ {missing:,} without a value"] if missing else []
    if lost is None:
        parts.append("checking files …")
    elif lost:
        parts.append(f"⚠ {lost:,} file{'s' if lost != 1 else ''} not found")
    return " · ".join(parts if len(parts) > 1 else [*parts, "none missing"])

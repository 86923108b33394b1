"""The panel's source: which dataframe, which column, what the images look like, how many are missing."""

from __future__ import annotations

import base64
import io
import os
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from keyword import iskeyword
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipywidgets import Dropdown
from PIL import Image

from nbfeat.errors import ImageError, NbfeatError, RequestError
from nbfeat.extraction.request import check_frame
from nbfeat.html import Html, escape
from nbfeat.images.resize import PixelSpec
from nbfeat.images.sources import is_missing, likely_columns, name_of, path_of, possible_columns, read_pixels, spread
from nbfeat.jupyter import grammar
from nbfeat.jupyter.job import in_background
from nbfeat.jupyter.panel.widgets import DEFAULT, LABELS, Choice, Kit, labelled, offer

if TYPE_CHECKING:
    import pandas as pd

THUMBNAILS = 12
SIDE = 96  # pixels of a thumbnail, drawn at two thirds: sharp on dense screens, 2 kB each
MOST_COLUMNS = 60  # offered: more than that nobody looks through
SHORT = 30  # characters of a name that is offered
ALL_ROWS = ("all rows", DEFAULT)
FEW = 6  # values of a column that rows can be chosen by
PAUSE = 0.1  # seconds, in which the panel is drawn, or another column is chosen
LOOKED_AT = 1000  # rows, to find such columns


class Source:
    """Which frame of `names` and which of its columns."""

    def __init__(self, kit: Kit, names: Callable[[], Mapping[str, Any]]) -> None:
        self._kit, self._names = kit, names
        self.frame = kit.make(Dropdown, description="Dataframe", tooltip="A dataframe of this notebook")
        holds = "The column that holds paths, bytes or arrays of images"
        self.images = kit.make(Dropdown, description=LABELS["images"], tooltip=holds)
        learns = "Rows that standard, minmax, whiten and components learn from: name those you train on"
        self.rows = kit.make(Dropdown, description=LABELS["fit_on"], options=[ALL_ROWS], tooltip=learns)
        self.strip, self.missing = kit.html("strip"), kit.html("missing")
        fields = kit.box("fields", self.frame, self.images, self.rows)
        self.box = kit.part("Images", fields, self.strip, self.missing)
        self._frame: Callable[[], pd.DataFrame | None] = lambda: None  # whose images are shown, held weakly
        self._seen: tuple[object, ...] = ()  # what else those images depend on, a new object for each look at them
        kit.on_choice(self._chose, self.frame, self.images, self.rows)

    @property
    def chosen(self) -> pd.DataFrame | None:
        """The frame that is chosen, as it is now."""
        return self._names().get(self.frame.value) if self.frame.value else None

    @property
    def given(self) -> dict[str, Any]:
        """The options of the run that are chosen here."""
        images = {"images": [str(column) for column in self.images.value]} if self.images.value else {}
        return {**images, **({"fit_on": self.rows.value} if self.rows.value else {})}

    def refresh(self, chosen: str | None = None) -> None:
        """Look at the notebook again: which frames there are, and what is in the one that is chosen."""
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
        """Tell whether a frame was made, resized or deleted since the last refresh, or the one that is chosen bound."""
        offered = list(self.frame.options)
        return frame_choices(grammar.frames_in(self._names())) != offered or self.chosen is not self._frame()

    def _chose(self, widget: Any) -> None:
        if widget is self.frame:
            self.refresh()
        elif widget is self.images:
            self._look(self.chosen)
        self._kit.changed()

    def _look(self, frame: pd.DataFrame | None) -> None:
        """Show what is in the column, unless that is what is shown already."""
        columns = list(self.images.value or ())
        root = Path(self._kit.settings().get("root", "")).expanduser().absolute()
        seen = (0 if frame is None else len(frame), *map(str, columns), root)
        if frame is not None and self._frame() is frame and seen == self._seen:
            return
        self._frame, self._seen = (lambda: None) if frame is None else weakref.ref(frame), seen
        try:
            if frame is None:
                raise RequestError("There is no dataframe in this notebook yet. Make one with a column of image paths.")
            check_frame(frame)
            values = [value for column in columns for value in frame[column].tolist()]
        except (NbfeatError, KeyError) as error:
            text = escape(labelled(str(error)))
            self.strip.value, self.missing.value = "", text if frame is None else f"⚠ {text}"
            return
        missing = sum(map(is_missing, values))
        self.missing.value = _counted(len(values), missing, None)
        # Files may be on a slow disk: the panel does not wait for them.
        in_background("look", self._read, values, missing, root, seen)

    def _read(self, values: Sequence[object], missing: int, root: Path, seen: object) -> None:
        """Draw some of the images, then count the files that are not there; nothing once another look has begun."""
        time.sleep(PAUSE)
        if seen is not self._seen:
            return
        strip, lost = "".join(thumbnail(values[place], root) for place in spread(len(values), THUMBNAILS)), 0
        if seen is self._seen:
            self.strip.value = strip
        for value in values:
            if seen is not self._seen:
                return
            lost += not is_missing(value) and is_lost(value, root)
        if seen is self._seen:
            self.missing.value = _counted(len(values), missing, lost)


def frame_to_open(asked: Any, names: Mapping[str, Any]) -> str | None:
    """Return the name of the frame that is asked for; of the first one with images where none is."""
    frames = grammar.frames_in(names)
    if asked is None:
        return next((name for name, frame in frames.items() if likely_columns(frame)), next(iter(frames), None))
    known = grammar.frame_called(asked, names) if isinstance(asked, str) else asked
    check_frame(known)
    named = [name for name, frame in frames.items() if frame is known]
    if not named:
        raise RequestError("The panel binds features to the name of a dataframe. Give it one first: photos = …")
    return asked if isinstance(asked, str) and asked in named else named[0]


def frame_choices(frames: Mapping[str, pd.DataFrame]) -> list[Choice]:
    """Return the frames that can be chosen, each with its size."""
    return [(f"{name} · {len(frame):,} × {frame.shape[1]:,}", name) for name, frame in frames.items()]


def image_choices(frame: pd.DataFrame) -> list[Choice]:
    """Return the columns that can be chosen: those that look like images, all of these together, then others."""
    labels = [str(label) for label in frame.columns]
    # The cell has to name it, on one line.
    can_be_named = {label for label, count in Counter(labels).items() if count == len(label.splitlines()) == 1}
    usable = [place for place in possible_columns(frame) if labels[place] in can_be_named]
    likely = [place for place in likely_columns(frame) if place in usable]
    short = [label if len(label) <= SHORT else label[: SHORT - 1] + "…" for label in labels]
    choices: list[Choice] = [(short[place], (frame.columns[place],)) for place in likely]
    if len(likely) > 1:
        choices.append((" + ".join(short[place] for place in likely), tuple(frame.columns[likely])))
    others = [place for place in usable if place not in likely][: MOST_COLUMNS - len(choices)]
    return [*choices, *((f"{short[place]} (no images, it seems)", (frame.columns[place],)) for place in others)]


def queries(frame: pd.DataFrame) -> list[str]:
    """Return what chooses rows by a column of few values, such as ``split == 'train'``."""
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
    """Draw one image small, or a sign in its place that says why it cannot be read."""
    name = escape(name_of(value))
    try:
        pixels = read_pixels(value, [PixelSpec(SIDE, "crop")], root)[0]
    except ImageError as error:
        title = f"{name}: {escape(error)}"
        return Html(f'<span class="nbfeat-lost" role="img" title="{title}" aria-label="{name}">✕</span>')
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "WEBP", quality=75)
    address = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
    return Html(f'<img src="{address}" alt="{name}" title="{name}">')


def is_lost(value: object, root: Path) -> bool:
    """Tell whether a path leads to nothing."""
    try:
        path = path_of(value, root)
        return path is not None and not os.path.exists(path)
    except (ImageError, ValueError):
        return False


def _counted(images: int, missing: int, lost: int | None) -> str:
    """Say how many images there are, and how many of them are missing; `lost` is None while files are looked for."""
    parts = [f"{images:,} image{'s' if images != 1 else ''}"]
    parts += [f"⚠ {missing:,} without a value"] if missing else []
    if lost is None:
        parts.append("looking for the files …")
    elif lost:
        parts.append("⚠ 1 file is not there" if lost == 1 else f"⚠ {lost:,} files are not there")
    return " · ".join(parts if len(parts) > 1 else [*parts, "none missing"])

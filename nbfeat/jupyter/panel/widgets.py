"""The panel's widgets: one for each option of the table, labelled, choices only; and the style of all of them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import ipywidgets as widgets

from nbfeat.extraction.options import BLOCK_OPTIONS, Option
from nbfeat.jupyter import grammar

Choice = tuple[str, Any]  # what is shown, and what is meant by it
STYLE = files("nbfeat.jupyter.panel").joinpath("panel.css").read_text(encoding="utf-8")

# What the panel offers of options that take more; the written code takes all of it.
OFFERED = {
    "components": (2, 8, 16, 32, 50, 64, 100, 128, 256, 512),
    "size": (32, 64, 96, 112, 128, 160, 192, 224, 256, 299, 331, 384, 448, 512),
    "batch_size": (1, 4, 8, 16, 32, 64, 128, 256),
    "device": ("cpu", "gpu"),
}
DEFAULT = ""  # chosen where an option is not written; None is what a Dropdown has where nothing is chosen
LABELS = {option.name: option.name.capitalize() for option in BLOCK_OPTIONS} | {
    "normalize": "Normalization", "components": "Components (PCA)", "images": "Image column",
    "fit_on": "Fit normalization on", "batch_size": "Batch size", "no_cache": "Ignore the cache",
    "allow_remote": "Fetch images from URLs",
    "device": "Device", "precision": "Precision",
    "replace": "Overwrite columns of the same names", "size": "Image size", "resize": "Fitting",
}  # fmt: skip


class Kit:
    """Makes the widgets of one panel, labelled, and of classes that the style knows.

    They share one layout and a style for each kind: that is a third of the models and messages. `settings` returns the
    user's own defaults as they are now; `changed` is called after each choice.
    """

    def __init__(self, settings: Callable[[], Mapping[str, Any]], changed: Callable[[], None]) -> None:
        self.settings, self.changed = settings, changed
        self._lock = threading.RLock()
        self._is_filling = False
        self._layout = widgets.Layout()
        self._styles: dict[type, Any] = {}
        self._made = weakref.WeakSet[Any]()

    def make(self, kind: type, name: str = "", **traits: Any) -> Any:
        """Return a widget whose class in the style is `name`."""
        traits |= {"style": self._styles[kind]} if kind in self._styles else {}
        made = kind(layout=self._layout, _dom_classes=(f"nbfeat-{name}",) if name else (), **traits)
        if made.has_trait("style"):
            self._styles[kind] = made.style
        self._made.add(made)
        return made

    def html(self, name: str, value: str = "") -> widgets.HTML:
        """Return a piece of html."""
        return self.make(widgets.HTML, name, value=value)

    def button(self, text: str, name: str, tooltip: str, pressed: Callable[[], object]) -> widgets.Button:
        """Return a button that calls `pressed`."""
        made = self.make(widgets.Button, name, description=text, tooltip=tooltip)

        def click(_: widgets.Button) -> None:
            with self.turn():
                pressed()

        made.on_click(click)
        return made

    def box(self, name: str, *children: Any) -> widgets.Box:
        """Return a box; how it lays things out, the style says."""
        return self.make(widgets.Box, name, children=children)

    def part(self, title: str, *children: Any) -> widgets.Box:
        """Return a part of the panel under a heading."""
        return self.box("part", self.html("heading", f"<h4>{title}</h4>"), *children)

    def on_choice(self, chosen: Callable[[Any], object], *of: Any) -> None:
        """Call `chosen` with a widget of which somebody chose another value."""

        def change(event: Mapping[str, Any]) -> None:
            with self.turn():
                if not self._is_filling:
                    chosen(event["owner"])

        for widget in of:
            widget.observe(change, "value")

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Go on while others wait: clicks come from two threads, that of the cells too, steps from the one that works.

        Afterwards, clicks are answered while a cell runs. ipykernel 7.4 takes clicks on a widget in the thread that
        last published on it, which for one that a cell has made or changed is the thread of the cells; before that and
        after, it is the front end's choice, which is another thread.
        """
        with self._lock:
            yield
            for widget in self._made:
                if widget.comm is not None:
                    vars(widget.comm).pop("_reply_subshell_id", None)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Change widgets, which nobody chose."""
        with self.turn():
            self._is_filling = True
            try:
                yield
            finally:
                self._is_filling = False

    def close(self) -> None:
        """Take all widgets out of memory, those that are shown only at times, too, and what they share."""
        for one in (*self._made, self._layout, *self._styles.values()):
            one.close()


class OptionWidgets(dict[str, Any]):
    """A widget for each option of a table, by its name."""

    def __init__(self, kit: Kit, table: Iterable[Option]) -> None:
        super().__init__()
        self._table, self._settings = {option.name: option for option in table}, kit.settings
        for name, option in self._table.items():
            label = {"description": LABELS[name], "tooltip": option.help}
            if option.switch:
                self[name] = kit.make(widgets.Checkbox, indent=False, **label)
            elif name == "prefix":
                self[name] = kit.make(widgets.Text, continuous_update=False, **label)
            else:
                self[name] = kit.make(widgets.Dropdown, options=self._choices(name), **label)
        kit.on_choice(lambda _: kit.changed(), *self.values())

    @property
    def given(self) -> dict[str, Any]:
        """The options that were chosen, defaults left out."""
        return {name: one.value for name, one in self.items() if one.value not in (DEFAULT, None, False)}

    def refresh(self, **choices: Iterable[Any]) -> None:
        """Offer the defaults of now, and other `choices` of the options that have none of their own."""
        for name, option in self._table.items():
            if name in choices or option.choices or name in OFFERED:
                offer(self[name], self._choices(name, choices.get(name)))

    def _choices(self, name: str, choices: Iterable[Any] | None = None) -> list[Choice]:
        """Return what a Dropdown offers: the default first, which writes nothing, then the other choices."""
        option, settings = self._table[name], self._settings()
        default = settings.get(name, option.default)
        first = f"{default} (your setting)" if name in settings else str(default)
        choices = choices or option.choices or OFFERED.get(name, ())
        return [(first, DEFAULT), *((str(choice), choice) for choice in choices if str(choice) != str(default))]


def labelled(message: str) -> str:
    """Name the options of a message as their widgets are labelled; those that the panel lacks keep the cell's way."""

    def spell(name: str, value: str) -> str:
        if (label := LABELS.get("no_cache" if name == "cache" else name)) is None:
            return grammar.flag(name, value)
        return f"“{label}”" if value in {"", "True", "False"} else f"“{label}” {value}"

    return grammar.respelled(message, spell)


def offer(dropdown: widgets.Dropdown, options: Sequence[Choice]) -> None:
    """Change what a Dropdown offers, and keep what is chosen where it is still offered."""
    if list(dropdown.options) != list(options):
        kept, values = dropdown.value, [value for _, value in options]
        dropdown.options = options
        dropdown.value = kept if kept in values else next(iter(values), None)


def tree(widget: Any) -> Iterator[Any]:
    """Walk through a widget and all within it."""
    yield widget
    for child in getattr(widget, "children", ()):
        yield from tree(child)

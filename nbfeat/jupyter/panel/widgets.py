"""The panel's widgets: one labeled widget per option, and their shared style."""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import ipywidgets as widgets

from nbfeat.extraction.options import BLOCK_OPTIONS, Option
from nbfeat.jupyter import grammar

Choice = tuple[str, Any]  # label and value
STYLE = files("nbfeat.jupyter.panel").joinpath("panel.css").read_text(encoding="utf-8")

OFFERED = {  # choices for options that accept other values in code
    "components": (2, 8, 16, 32, 50, 64, 100, 128, 256, 512),
    "size": (32, 64, 96, 112, 128, 160, 192, 224, 256, 299, 331, 384, 448, 512),
    "batch_size": (1, 4, 8, 16, 32, 64, 128, 256),
    "device": ("cpu", "gpu"),
}
DEFAULT = ""  # the option is not written; None means that a Dropdown has no choice
LABELS = {option.name: option.name.capitalize() for option in BLOCK_OPTIONS} | {
    "normalize": "Normalization", "components": "Components (PCA)", "images": "Image column",
    "fit_on": "Fit normalization on", "batch_size": "Batch size", "no_cache": "Ignore the cache", "device": "Device",
    "allow_remote": "Fetch images from URLs", "replace": "Overwrite columns with the same names", "size": "Image size",
    "precision": "Precision", "into": "New dataframe",
}  # fmt: skip


class Kit:
    """Makes the widgets of one panel; they share one layout and one style per type, to save messages."""

    def __init__(self, settings: Callable[[], Mapping[str, Any]], changed: Callable[[], None]) -> None:
        self.settings, self.changed = settings, changed  # the user's defaults; called after each choice
        self._lock = threading.RLock()
        self._is_filling = False
        self._layout = widgets.Layout()
        self._styles: dict[type, Any] = {}
        self._made = weakref.WeakSet[Any]()

    def make(self, kind: type, name: str = "", **traits: Any) -> Any:
        """Return a widget with the CSS class `name`."""
        traits |= {"style": self._styles[kind]} if kind in self._styles else {}
        made = kind(layout=self._layout, _dom_classes=(f"nbfeat-{name}",) if name else (), **traits)
        if made.has_trait("style"):
            self._styles[kind] = made.style
        self._made.add(made)
        return made

    def html(self, name: str, value: str = "") -> widgets.HTML:
        """Return an HTML widget."""
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
        """Return a box, laid out by the style sheet."""
        return self.make(widgets.Box, name, children=children)

    def part(self, title: str, *children: Any) -> widgets.Box:
        """Return a section of the panel with a heading."""
        return self.box("part", self.html("heading", f"<h4>{title}</h4>"), *children)

    def fold(self, title: str, *children: Any) -> widgets.Box:
        """Return a button that shows and hides `children`, hidden at first; the style sheet does it, without Python."""
        return self.box("folded", self.make(widgets.ToggleButton, "fold", description=title), self.box("in", *children))

    def on_choice(self, chosen: Callable[[Any], object], *of: Any) -> None:
        """Call `chosen` with the widget when the user changes its value."""

        def change(event: Mapping[str, Any]) -> None:
            with self.turn():
                if not self._is_filling:
                    chosen(event["owner"])

        for widget in of:
            widget.observe(change, "value")

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the lock: clicks arrive in two threads and steps in a third."""
        with self._lock:
            yield
            # ipykernel 7.4 handles clicks in the thread that last published here, which may be busy with a cell.
            for widget in self._made:
                if widget.comm is not None:
                    vars(widget.comm).pop("_reply_subshell_id", None)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Change widgets without reporting the changes as choices."""
        with self.turn():
            self._is_filling = True
            try:
                yield
            finally:
                self._is_filling = False

    def close(self) -> None:
        """Free all widgets, hidden ones included, and what they share."""
        for one in (*self._made, self._layout, *self._styles.values()):
            one.close()


class OptionWidgets(dict[str, Any]):
    """One widget per option of a table, by name."""

    def __init__(self, kit: Kit, table: Iterable[Option]) -> None:
        super().__init__()
        self._table, self._settings = {option.name: option for option in table}, kit.settings
        for name, option in self._table.items():
            label = {"description": LABELS[name], "tooltip": option.help}
            if option.switch:
                self[name] = kit.make(widgets.Checkbox, indent=False, **label)
            elif name in {"prefix", "into"}:  # any text
                self[name] = kit.make(widgets.Text, continuous_update=False, **label)
            else:
                self[name] = kit.make(widgets.Dropdown, options=self._choices(name), **label)
        kit.on_choice(lambda _: kit.changed(), *self.values())

    @property
    def given(self) -> dict[str, Any]:
        """The chosen options, without defaults."""
        return {name: one.value for name, one in self.items() if one.value not in (DEFAULT, None, False)}

    def refresh(self, **choices: Iterable[Any]) -> None:
        """Offer the current defaults, and `choices` for options without fixed ones."""
        for name, option in self._table.items():
            if name in choices or option.choices or name in OFFERED:
                offer(self[name], self._choices(name, choices.get(name)))

    def _choices(self, name: str, choices: Iterable[Any] | None = None) -> list[Choice]:
        """Return the choices of a Dropdown, the default (which is not written) first."""
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
    """Change the choices of a Dropdown, keeping the current one if still offered."""
    if list(dropdown.options) != list(options):
        kept, values = dropdown.value, [value for _, value in options]
        dropdown.options = options
        dropdown.value = kept if kept in values else next(iter(values), None)


def tree(widget: Any) -> Iterator[Any]:
    """Yield a widget and all its descendants."""
    yield widget
    for child in getattr(widget, "children", ()):
        yield from tree(child)

"""The panel's widgets: one for each option of the table, labelled, choices only; and the style of all of them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import ipywidgets as widgets

from nbfeat.backbones.backbone import Backbone
from nbfeat.extraction.options import Option

Choice = tuple[str, Any]  # what is shown, and what is meant by it

# What the panel offers of options that take any number; the written code takes all of them.
NUMBERS = {
    "components": (2, 8, 16, 32, 50, 64, 100, 128, 256, 512),
    "size": (32, 64, 96, 112, 128, 160, 192, 224, 256, 299, 331, 384, 448, 512),
    "batch_size": (1, 4, 8, 16, 32, 64, 128, 256),
}
DEVICES = ("cpu", "gpu")
DEFAULT = ""  # chosen where an option is not written; None is what a Dropdown has where nothing is chosen
LABELS = {
    "normalize": "Normalization", "components": "Components (PCA)", "images": "Image column",
    "fit_on": "Normalization learns from", "batch_size": "Batch size", "no_cache": "Compute every image again",
    "allow_remote": "Fetch images by address",
    "replace": "Overwrite columns of the same names", "size": "Image size", "resize": "Fitting",
}  # fmt: skip


class Kit:
    """Makes the widgets of one panel, labelled, and of classes that the style knows.

    They share one layout and a style for each kind: that is a third of the models and messages. Clicks come from the
    thread of the cells and from one of the front end's, steps from the one that works: whoever has `turn` goes on.
    """

    def __init__(self) -> None:
        self.turn = threading.RLock()
        self._is_filling = False
        self._layout = widgets.Layout()
        self._styles: dict[type, Any] = {}
        self._made = weakref.WeakSet[Any]()

    def make(self, kind: type, name: str = "", **traits: Any) -> Any:
        """Return a widget whose class in the style is `name`."""
        if kind in self._styles:
            traits["style"] = self._styles[kind]
        made = kind(layout=self._layout, _dom_classes=(f"nbfeat-{name}",) if name else (), **traits)
        if made.has_trait("style"):
            self._styles[kind] = made.style
        self._made.add(made)
        return made

    def option(self, option: Option, settings: Mapping[str, Any]) -> Any:
        """Return a widget that chooses a value of `option`; `settings` are the defaults that were set for it."""
        told = {"description": LABELS.get(option.name, option.name.capitalize()), "tooltip": option.help}
        if option.switch:
            return self.make(widgets.Checkbox, indent=False, **told)
        if option.name == "prefix":
            return self.make(widgets.Text, continuous_update=False, **told)
        return self.dropdown(options=with_default(option, settings), **told)

    def dropdown(self, **traits: Any) -> widgets.Dropdown:
        """Return a Dropdown."""
        return self.make(widgets.Dropdown, **traits)

    def html(self, name: str, value: str = "") -> widgets.HTML:
        """Return a piece of html."""
        return self.make(widgets.HTML, name, value=value)

    def heading(self, text: str) -> widgets.HTML:
        """Return the heading of a part of the panel."""
        return self.html("heading", f"<h4>{text}</h4>")

    def button(self, text: str, name: str, tooltip: str, pressed: Callable[[], object]) -> widgets.Button:
        """Return a button that calls `pressed`."""
        made = self.make(widgets.Button, name, description=text, tooltip=tooltip)

        def click(_: widgets.Button) -> None:
            with self.turn:
                pressed()

        made.on_click(click)
        return made

    def on_choice(self, widget: Any, chosen: Callable[[Any], object]) -> None:
        """Call `chosen` with a widget of which somebody chose another value."""

        def change(_: Mapping[str, Any]) -> None:
            with self.turn:
                if not self._is_filling:
                    chosen(widget)

        widget.observe(change, "value")

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Change widgets, which nobody chose."""
        with self.turn:
            before, self._is_filling = self._is_filling, True
            try:
                yield
            finally:
                self._is_filling = before

    def box(self, name: str, children: Sequence[Any]) -> widgets.Box:
        """Return a box; how it lays things out, the style says."""
        return self.make(widgets.Box, name, children=tuple(children))

    def fold(self, title: str, child: Any) -> widgets.Accordion:
        """Return `child` under a title that opens and closes it; closed at first."""
        return self.make(widgets.Accordion, "fold", children=(child,), titles=(title,), selected_index=None)

    def close(self) -> None:
        """Take all widgets out of memory, those that are shown only at times, too, and what they share."""
        for one in (*self._made, self._layout, *self._styles.values()):
            one.close()


def with_default(option: Option, settings: Mapping[str, Any], choices: Iterable[Any] | None = None) -> list[Choice]:
    """Return what a Dropdown offers: the default first, which writes nothing, then the other choices."""
    if choices is None:
        choices = option.choices or NUMBERS.get(option.name) or (DEVICES if option.name == "device" else ())
    default = settings.get(option.name, option.default)
    shown = f"{default} (your setting)" if option.name in settings else str(default)
    return [(shown, DEFAULT), *((str(choice), choice) for choice in choices if str(choice) != str(default))]


def offer(dropdown: widgets.Dropdown, options: Sequence[Choice]) -> None:
    """Change what a Dropdown offers, and keep what is chosen where it is still offered."""
    if list(dropdown.options) == list(options):
        return
    kept = dropdown.value
    dropdown.options = options
    values = [value for _, value in options]
    dropdown.value = kept if kept in values else values[0] if values else None


def obey(options: Mapping[str, Any], table: Iterable[Option], settings: Mapping[str, Any]) -> None:
    """Show other defaults in the widgets of options that have choices of their own."""
    for option in table:
        if option.choices or option.name in {*NUMBERS, "device"}:
            offer(options[option.name], with_default(option, settings))


def chosen(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that were chosen in widgets of options, defaults left out."""
    values = {name: widget.value for name, widget in options.items()}
    return {name: value for name, value in values.items() if value not in (DEFAULT, None) and value is not False}


def weights_of(backbone: Backbone) -> list[str]:
    """Return the weights that can be chosen by name."""
    if backbone.is_user_model:
        return []
    return list(dict.fromkeys(["bundled" if backbone.bundled else "imagenet", "random"]))


def style() -> str:
    """Return the style, every rule of which stays within the panel."""
    return f"<style>{files('nbfeat.jupyter').joinpath('panel.css').read_text(encoding='utf-8')}</style>"


def answer_at_once(root: Any) -> None:
    """Let clicks be answered while a cell runs.

    ipykernel 7.4 takes clicks on a widget in the thread that last published on it, which for one that a cell has made
    or changed is the thread of the cells; before that and after, it is the front end's choice, which is another thread.
    """
    for widget in (root, *descendants(root)):
        vars(widget.comm).pop("_reply_subshell_id", None) if widget.comm is not None else None


def close(root: Any) -> None:
    """Take a widget, and all in it, off the screen and out of memory."""
    for widget in (*descendants(root), root):
        widget.close()


def descendants(widget: Any) -> Iterable[Any]:
    """Walk through all widgets within `widget`."""
    for child in getattr(widget, "children", ()):
        yield child
        yield from descendants(child)

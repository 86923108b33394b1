"""The panel's feature blocks: a card for each, which says its columns and their memory before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ipywidgets as widgets

from nbfeat.backbones.catalog import CATALOG, find
from nbfeat.errors import NbfeatError, format_bytes
from nbfeat.extraction import memory
from nbfeat.extraction.columns import names, prefix_of
from nbfeat.extraction.networks import expected_width
from nbfeat.extraction.options import BLOCK_OPTIONS, FeatureBlock, quoted, spelled
from nbfeat.html import escape
from nbfeat.inference.layers import layer_names
from nbfeat.jupyter.panel.widgets import DEFAULT, Kit, chosen, close, obey, offer, weights_of, with_default

FIRST = "MobileNetV2"  # light, and usual
SHOWN = ("layer", "pooling", "normalize", "components", "prefix")  # the others are folded away
OPTIONS = {option.name: option for option in BLOCK_OPTIONS}


class Card:
    """One block: its backbone and its options. `changed` is called after each choice."""

    def __init__(
        self, kit: Kit, settings: Mapping[str, Any], changed: Callable[[], None], removed: Callable[[Card], None]
    ) -> None:
        self.settings, self._kit, self._changed = settings, kit, changed
        self.backbone = kit.make(
            widgets.Combobox,
            value=str(settings.get("backbone", FIRST)),
            options=list(CATALOG),
            ensure_option=True,
            continuous_update=False,
            description="Backbone (type to search)",
            placeholder=f"one of {len(CATALOG)} networks",
            tooltip="Clear it to see all, or type a part of a name",
        )
        self.options = {name: kit.option(option, settings) for name, option in OPTIONS.items()}
        self.remove = kit.button("Remove", "quiet", "Remove this block", lambda: removed(self))
        self.expected = kit.html("expected")
        more = kit.box("fields", [self.options[name] for name in OPTIONS if name not in SHOWN])
        shown = kit.box("fields", [self.backbone, *(self.options[name] for name in SHOWN)])
        line = kit.box("line", [self.expected, self.remove])
        self.box = kit.box("block", [shown, line, kit.fold("More options", more)])
        self._offer()
        for widget in (self.backbone, *self.options.values()):
            kit.on_choice(widget, self._chose)

    @property
    def given(self) -> dict[str, Any]:
        """The options that were chosen."""
        return chosen(self.options)

    @property
    def text(self) -> str:
        """The block's line of the cell."""
        return " ".join([quoted(self.backbone.value), *spelled(BLOCK_OPTIONS, self.given)])

    def tell(self, rows: int) -> int:
        """Show which columns the block will make of `rows` images and what memory they take; return how many."""
        defaults = {name: value for name, value in self.settings.items() if name in OPTIONS}
        try:
            block = FeatureBlock.parse(self.text, defaults)[0]
            column, expected = find(block.backbone).column, expected_width(block)
        except NbfeatError:  # which is told elsewhere
            self.expected.value = ""
            return 0
        prefix = prefix_of(block, column)
        self.options["prefix"].placeholder = prefix_of(replace(block, prefix=None), column)
        if expected is None:
            self.expected.value = f"<b>width</b> is known once it runs · <code>{escape(prefix)}_0000 …</code>"
            return 0
        width, is_exact = expected
        first, *_, last = names(prefix, max(width, 2))
        size, free = 4 * rows * width, memory.free_bytes()
        about = "" if is_exact else "about "
        warning = ""
        if free is not None and size > memory.SHARE * free:
            warning = f" <b>⚠ more than half of the {format_bytes(free)} of free memory</b>"
        self.expected.value = (
            f"<b>{about}{width:,} columns</b> · {about}{format_bytes(size)}{warning} · "
            f"<code>{escape(first)} … {escape(last.rpartition('_')[2])}</code>"
        )
        return width

    def obey(self, settings: Mapping[str, Any]) -> None:
        """Take other defaults."""
        self.settings = settings
        self._offer()
        obey(self.options, BLOCK_OPTIONS, settings)

    def _chose(self, widget: Any) -> None:
        if widget is self.backbone:
            self._offer()
        self._changed()

    def _offer(self) -> None:
        """Offer the layers, multipliers and weights that the backbone has."""
        backbone = CATALOG.get(self.backbone.value)
        if backbone is None:
            return
        with self._kit.filling():
            channels = {layer.name: layer.channels for layer in backbone.layers}
            layers = [
                (f"{name} · {channels[name]:,}" if channels.get(name) else name, name) for name in layer_names(backbone)
            ]
            end = f"the end · {backbone.width:,}" if backbone.width else "the end"
            offer(self.options["layer"], [(end, DEFAULT), *layers])
            for name, choices in (("alpha", backbone.alphas), ("weights", weights_of(backbone))):
                offer(self.options[name], with_default(OPTIONS[name], self.settings, choices))
            self.options["alpha"].disabled = not backbone.alphas


class Blocks:
    """All blocks of a panel, at least one."""

    def __init__(self, kit: Kit, settings: Mapping[str, Any], changed: Callable[[], None]) -> None:
        self.settings, self._kit, self._changed = settings, kit, changed
        self.cards: list[Card] = []
        self.more = kit.button("Add a block", "quiet", "Another network, layer or pooling, in the same pass", self.add)
        self.total = kit.html("expected")
        self._cards = kit.box("blocks", [])
        line = kit.box("line", [self.more, self.total])
        self.box = kit.box("part", [kit.heading("Feature blocks"), self._cards, line])
        self.add()

    def add(self) -> Card:
        """Add a block: of the last one's backbone, cut at the next customary layer before the end."""
        card = Card(self._kit, self.settings, self._changed, self.remove)
        if self.cards:
            name = card.backbone.value = self.cards[-1].backbone.value
            taken = {one.options["layer"].value for one in self.cards if one.backbone.value == name}
            layers = [layer.name for layer in CATALOG[name].layers[:-1]] if name in CATALOG else []
            card.options["layer"].value = next((layer for layer in reversed(layers) if layer not in taken), DEFAULT)
        self.cards.append(card)
        self._draw()
        return card

    def remove(self, card: Card) -> None:
        """Take a block away, unless it is the last one."""
        if len(self.cards) > 1 and card in self.cards:
            self.cards.remove(card)
            self._draw()
            close(card.box)

    def obey(self, settings: Mapping[str, Any]) -> None:
        """Take other defaults."""
        self.settings = settings
        for card in self.cards:
            card.obey(settings)

    def tell(self, rows: int, columns: int) -> None:
        """Show what each block will give of `rows` rows and `columns` image columns, and all of them."""
        width = columns * sum([card.tell(rows * columns) for card in self.cards])
        self.total.value = f"{width:,} new columns · {format_bytes(4 * rows * width)}" if len(self.cards) > 1 else ""

    def _draw(self) -> None:
        for card in self.cards:
            card.remove.disabled = len(self.cards) == 1
        self._cards.children = [card.box for card in self.cards]
        self._changed()

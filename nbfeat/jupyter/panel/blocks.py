"""The panel's feature blocks: one card each, showing its columns and memory before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import ipywidgets as widgets

from nbfeat.backbones.catalog import CATALOG, find
from nbfeat.backbones.weights import downloaded
from nbfeat.errors import NbfeatError, format_bytes
from nbfeat.extraction import columns
from nbfeat.extraction.options import BLOCK_OPTIONS, FeatureBlock, column_names, column_prefix, quoted, spelled
from nbfeat.html import escape
from nbfeat.inference.layers import expected_width, layer_names
from nbfeat.jupyter.panel.widgets import DEFAULT, Kit, OptionWidgets, offer, tree

FIRST = "EfficientNetLite0"  # it needs no download
ALWAYS_SHOWN = ("layer", "pooling", "normalize", "components", "prefix")  # the others are under "More options"


class Card:
    """One block: its backbone and its options."""

    def __init__(self, kit: Kit, removed: Callable[[Card], None]) -> None:
        self._kit = kit
        self.backbone = kit.make(
            widgets.Combobox, value=str(kit.settings().get("backbone", FIRST)), continuous_update=False,
            description="Backbone (type to search)", placeholder=f"one of {len(CATALOG)} networks",
            tooltip="Clear to see all, or type part of a name",
        )  # fmt: skip
        self.options = OptionWidgets(kit, BLOCK_OPTIONS)
        self.remove = kit.button("Remove", "quiet", "Remove this block", lambda: removed(self))
        self.expected = kit.html("expected")
        more = kit.box("fields", *(widget for name, widget in self.options.items() if name not in ALWAYS_SHOWN))
        fold = kit.fold("More options", more)
        fields = kit.box("fields", self.backbone, *(self.options[name] for name in ALWAYS_SHOWN))
        self.box = kit.box("block", fields, kit.box("line", self.expected, self.remove), fold)
        self.refresh()
        kit.on_choice(lambda _: self.refresh(), self.backbone)
        kit.on_choice(lambda _: kit.changed(), self.backbone)

    @property
    def text(self) -> str:
        """The block's line of the cell."""
        return " ".join([quoted(self.backbone.value), *spelled(BLOCK_OPTIONS, self.options.given)])

    def expect(self, rows: int) -> int:
        """Show the columns and memory the block needs for `rows` images; return the number of columns."""
        defaults = {name: value for name, value in self._kit.settings().items() if name in self.options}
        try:
            block = FeatureBlock.parse(self.text, defaults)[0]
            backbone = find(block.backbone)
            column, expected = backbone.column, (block.components, True) if block.components else None
            expected = expected or expected_width(backbone, block.cut, alpha=block.alpha, size=block.size)
        except NbfeatError:  # shown elsewhere
            self.expected.value = ""
            return 0
        prefix = column_prefix(block, column)
        self.options["prefix"].placeholder = column_prefix(replace(block, prefix=None), column)
        if expected is None:
            self.expected.value = f"<b>width</b> unknown until it runs · <code>{escape(prefix)}_0000 …</code>"
            return 0
        width, is_exact = expected
        first, *_, last = column_names(prefix, max(width, 2))
        size, free = 4 * rows * width, columns.free_bytes()
        about, warning = "" if is_exact else "about ", ""
        if free is not None and size > columns.SHARE * free:
            warning = f" <b>⚠ more than half of the {format_bytes(free)} of free memory</b>"
        self.expected.value = (
            f"<b>{about}{width:,} columns</b> · {about}{format_bytes(size)}{warning} · "
            f"<code>{escape(first)} … {escape(last.rpartition('_')[2])}</code>"
        )
        return width

    def refresh(self) -> None:
        """Offer the backbones, this one's layers, multipliers and weights, and the current defaults."""
        here, labels = downloaded(CATALOG.values()), dict[str, str]()
        for name, one in CATALOG.items():
            size = f" · {one.parameters / 1e6:.1f} M parameters · width {one.width:,}" if one.parameters else ""
            mark = (" · installed" if one.requirement else " · downloaded") if name in here else ""
            labels[name] = f"{name}{size}{mark}"
        names = {text.casefold(): name for name, label in labels.items() for text in (name, label)}
        with self._kit.filling():  # chosen with its size, or typed in any case
            self.backbone.value = names.get(self.backbone.value.casefold(), self.backbone.value)
        self.backbone.options = [*labels.values()]
        backbone = CATALOG.get(self.backbone.value)
        if backbone is None:
            self.options.refresh()
            return
        channels = {layer.name: f" · {layer.channels:,}" for layer in backbone.layers if layer.channels}
        layers = [(name + channels.get(name, ""), name) for name in layer_names(backbone)]
        end = f"the end · {backbone.width:,}" if backbone.width else "the end"
        weights = [] if backbone.is_user_model else ["imagenet", "random"]
        with self._kit.filling():
            offer(self.options["layer"], [(end, DEFAULT), *layers])
            self.options.refresh(alpha=backbone.alphas, weights=weights)
            self.options["alpha"].disabled = not backbone.alphas


class Blocks:
    """The blocks of a panel, at least one."""

    def __init__(self, kit: Kit) -> None:
        self._kit, self.cards = kit, [Card(kit, self.remove)]
        self.more = kit.button("Add a block", "quiet", "Another network, layer or pooling in the same pass", self.add)
        self.total = kit.html("expected")
        self._cards = kit.box("blocks")
        self.box = kit.part("Feature blocks", self._cards, kit.box("line", self.more, self.total))
        self._draw()

    def add(self) -> Card:
        """Add a block with the last backbone, cut at the last customary layer not used yet."""
        card = Card(self._kit, self.remove)
        name = card.backbone.value = self.cards[-1].backbone.value
        taken = {one.options["layer"].value for one in self.cards if one.backbone.value == name}
        layers = [layer.name for layer in CATALOG[name].layers[:-1]] if name in CATALOG else []
        card.options["layer"].value = next((layer for layer in reversed(layers) if layer not in taken), DEFAULT)
        self.cards.append(card)
        self._draw()
        self._kit.changed()
        return card

    def remove(self, card: Card) -> None:
        """Remove a block, unless it is the only one."""
        if len(self.cards) > 1 and card in self.cards:
            self.cards.remove(card)
            self._draw()
            self._kit.changed()
            for widget in list(tree(card.box)):
                widget.close()

    def expect(self, rows: int, columns: int) -> None:
        """Show the expected columns of each block, and their total, for `rows` rows and `columns` image columns."""
        width = columns * sum([card.expect(rows * columns) for card in self.cards])
        self.total.value = f"{width:,} new columns · {format_bytes(4 * rows * width)}" if len(self.cards) > 1 else ""

    def _draw(self) -> None:
        for card in self.cards:
            card.remove.disabled = len(self.cards) == 1
        self._cards.children = [card.box for card in self.cards]

"""The panel's options of the run: batch, device, precision, and what is kept or overwritten."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nbfeat.jupyter.grammar import RUN_OPTIONS
from nbfeat.jupyter.panel.widgets import Kit, chosen, obey

# The others are chosen elsewhere in the panel, or need free text, which is what the grammar is for.
OFFERED = [
    option
    for option in RUN_OPTIONS
    if option.name in {"batch_size", "device", "precision", "allow_remote", "no_cache", "replace"}
]


class RunOptions:
    """A widget for each option of the run that is chosen here; `changed` is called after each choice."""

    def __init__(self, kit: Kit, settings: Mapping[str, Any], changed: Callable[[], None]) -> None:
        self.options = {option.name: kit.option(option, settings) for option in OFFERED}
        fields = [self.options[option.name] for option in OFFERED if not option.switch]
        switches = [self.options[option.name] for option in OFFERED if option.switch]
        self.box = kit.box("part", [kit.heading("Run"), kit.box("fields", fields), kit.box("line", switches)])
        for widget in self.options.values():
            kit.on_choice(widget, lambda _: changed())

    def obey(self, settings: Mapping[str, Any]) -> None:
        """Take other defaults."""
        obey(self.options, OFFERED, settings)

    @property
    def given(self) -> dict[str, Any]:
        """The options that were chosen."""
        return chosen(self.options)

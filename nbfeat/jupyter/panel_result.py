"""The panel's result: the report, the images that failed, a scatter and a comparison, each one click away."""

from __future__ import annotations

from nbfeat.features.extraction import Extraction
from nbfeat.jupyter.panel_widgets import box, html


class Result:
    """What came of a run; empty before the first."""

    def __init__(self) -> None:
        self.report = html("report")
        self.box = box("part", [self.report])

    def show(self, extraction: Extraction) -> None:
        """Show what `extraction` gave."""
        self.report.value = extraction._repr_html_()

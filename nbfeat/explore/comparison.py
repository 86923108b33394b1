"""Comparison: what `compare` found, as a table, in words and as a plot."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nbfeat.errors import format_bytes, listing
from nbfeat.explore.plots import axes, colors, plain
from nbfeat.extraction.options import FeatureBlock
from nbfeat.extraction.report import briefly, title_of
from nbfeat.html import Html, paragraph, table, text_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

TIED_SHOWN = 3
MANY = "0.5"  # the color of all points where there are more networks than colors
TITLE_WIDTH = 62  # characters
LEGEND_COLUMNS = 3
WIDTH, LETTER, HEAD_HEIGHT, ROW_HEIGHT, LEGEND_BELOW = 5.5, 0.085, 1.7, 0.5, 0.5  # inches


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Comparison:
    """The blocks of a result by cross-validated score, best first. It shows itself as a table; `plot()` draws it.

    The table has a row for each block, by prefix: ``block`` as %extract takes it, ``score`` (mean over folds),
    ``spread`` (its standard deviation over folds), ``width`` (features per image), ``images_per_second`` and ``bytes``
    (of the features of all rows). The folds are the same for all blocks, so that ``scores`` (blocks × folds) can be
    compared fold by fold.
    """

    table: pd.DataFrame
    scores: pd.DataFrame
    best: str  # the best block, as %extract takes it
    target: str
    score: str  # its name
    setting: str  # model, folds, rows
    notes: tuple[str, ...]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw every fold's score, and each block's mean with its spread, best on top.

        Parameters
        ----------
        ax
            Where to draw; by default a new figure of pyplot's, which a notebook shows at the end of the cell.
        """
        import matplotlib as mpl
        import seaborn as sns

        longest = max(map(len, self.table.index))
        ax = axes(ax, WIDTH + LETTER * longest, HEAD_HEIGHT + ROW_HEIGHT * len(self.table))
        networks = {prefix: _network(text) for prefix, text in self.table["block"].items()}
        palette = colors(networks.values())
        points = self.scores.rename_axis("prefix").reset_index().melt("prefix", value_name="value")
        points["network"] = [networks[prefix] for prefix in points["prefix"]]
        told = {"data": points, "x": "value", "y": "prefix", "order": list(self.table.index), "ax": ax}
        look: dict[str, object] = {"hue": "network", "palette": palette} if palette else {"color": MANY}
        sns.stripplot(**told, **look, jitter=False, size=7, alpha=0.75)
        ink = mpl.rcParams["text.color"]
        sns.pointplot(
            **told, errorbar="sd", linestyle="none", color=ink, marker="D", markersize=5, err_kws={"linewidth": 1.5}
        )
        self._explain(ax, ink)
        return ax

    def _explain(self, ax: Axes, ink: str) -> None:
        """Name axes and colors."""
        from matplotlib.lines import Line2D
        from matplotlib.transforms import offset_copy

        ax.set_yticks(range(len(self.table)), [plain(name) for name in self._names()])
        ax.set(xlabel=plain(f"{self.score} of each fold"), ylabel="")
        title = [f"{self.score}: {self.target} from the features of each block", self.setting]
        ax.set_title(
            plain("\n".join(textwrap.fill(line, TITLE_WIDTH) for line in title)), loc="left", fontsize="medium"
        )
        ax.grid(visible=True, axis="x", alpha=0.3)
        ax.set_axisbelow(True)
        handles, labels = ax.get_legend_handles_labels()
        found = dict(zip(labels, handles, strict=True))
        found["mean ± standard deviation"] = Line2D([], [], color=ink, marker="D", markersize=5, linewidth=1.5)
        below = offset_copy(ax.transAxes, ax.get_figure(root=True), y=-LEGEND_BELOW, units="inches")
        ax.legend(
            list(found.values()), [plain(name) for name in found], loc="upper right", bbox_to_anchor=(1, 0),
            bbox_transform=below, ncols=LEGEND_COLUMNS, frameon=False, borderaxespad=0,
        )  # fmt: skip

    def _names(self) -> list[str]:
        """Return what the axis says of each block."""
        names = []
        for prefix, row in self.table.iterrows():
            rate = _rate(row.get("images_per_second", np.nan))
            names.append(f"{prefix}\n{row['width']:,} wide" + ("" if rate is None else f", {rate:,} images/s"))
        return names

    def __repr__(self) -> str:
        """Return the table and the notes as text."""
        head, rows = self._rows()
        drawn = "\n".join("  " + line for line in text_table(rows, head).splitlines())
        return "\n".join([self._heading(), drawn, *self.notes])

    def _repr_html_(self) -> str:
        head, rows = self._rows()
        unbroken = [[_unbroken(cell) for cell in row] for row in rows]
        notes = [paragraph(note) for note in self.notes]
        return Html(
            "".join(
                [
                    paragraph(self._heading(), strong=True),
                    table(unbroken, [str(_unbroken(name)) for name in head]),
                    *notes,
                ]
            )
        )

    def _heading(self) -> str:
        return f"{self.target}: {self.score} of {self.setting}"

    def _rows(self) -> tuple[list[str], list[list[object]]]:
        """Return the head and the rows of the table as people read it."""
        head = ["features", f"{self.score} ± sd", "width", "images/s", "memory", "block"]
        rows: list[list[object]] = []
        for prefix, row in self.table.iterrows():
            spread = "" if np.isnan(row["spread"]) else f" ± {row['spread']:.3f}"
            speed = [_rate(row["images_per_second"]) or "?"] if "images_per_second" in row else []
            (block,) = FeatureBlock.parse(row["block"])
            rows.append(
                [
                    prefix,
                    f"{row['score']:.3f}{spread}",
                    row["width"],
                    *speed,
                    format_bytes(row["bytes"]),
                    briefly(block),
                ]
            )
        return [name for name in head if name != "images/s" or "images_per_second" in self.table], rows


def sorted_best_first(scores: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    """Return blocks × folds, the best mean first."""
    import pandas as pd

    ordered = sorted(scores, key=lambda prefix: float(np.mean(scores[prefix])), reverse=True)
    folds = [f"fold {number + 1}" for number in range(len(scores[ordered[0]]))]
    return pd.DataFrame([scores[prefix] for prefix in ordered], index=ordered, columns=folds)


def verdict(scores: pd.DataFrame, name: str) -> str:
    """Say whether the first block is clearly the best: by more than its lead varies from fold to fold."""
    if len(scores) == 1:
        return ""
    leads = scores.iloc[0] - scores.iloc[1:]
    if scores.shape[1] == 1:
        return "One fold does not tell how much scores vary: take more before choosing."
    means, spreads = leads.mean(axis=1), leads.std(axis=1, ddof=1)
    best, second = scores.index[:2]
    lead = f"{means.iloc[0]:.3f} ± {spreads.iloc[0]:.3f} of {name} from fold to fold"
    tied = [str(prefix) for prefix in means.index[means <= spreads]]
    if not tied:
        return f"{best} is best: it leads {second} by {lead}."
    more = [f"{len(tied) - TIED_SHOWN:,} more"] if len(tied) > TIED_SHOWN else []
    named = listing([str(best), *tied[:TIED_SHOWN], *more])
    return f"No clear winner between {named}: {best} leads {second} by {lead}."


def _network(text: str) -> str:
    """Name the network of a block."""
    (block,) = FeatureBlock.parse(text)
    return title_of(block) + ("" if block.alpha is None else f" {block.alpha:g}")


def _rate(value: float) -> float | None:
    """Round a speed to the two digits that a short measurement can tell; None where there is none."""
    if np.isnan(value):
        return None
    return round(float(f"{value:.2g}")) if value >= 10 else float(f"{value:.2g}")


def _unbroken(cell: object) -> object:
    """Keep a score and its spread in one line."""
    return cell.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}") if isinstance(cell, str) else cell

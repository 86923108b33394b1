"""Which backbone, which layer, is best: the cross-validated score of every block, as a table, in words and plotted."""

from __future__ import annotations

import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nbfeat.errors import RequestError, format_bytes, listing
from nbfeat.explore import gallery
from nbfeat.explore.gallery import axes, colors, plain
from nbfeat.explore.scoring import column_of, folds_of, read_task, scorer_of, scores_of, selected, written
from nbfeat.extraction.extraction import Extraction
from nbfeat.extraction.options import FeatureBlock
from nbfeat.extraction.report import briefly, title_of
from nbfeat.html import table, text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


ROWS = 5000  # a support-vector machine's time grows with their square: 5,000 take minutes, 20,000 hours
TIED_SHOWN = 3
MANY = "0.5"  # the color of all points where there are more networks than colors
TITLE_WIDTH = 62  # characters
LEGEND_COLUMNS = 3
WIDTH, LETTER, HEAD_HEIGHT, ROW_HEIGHT, LEGEND_BELOW = 5.5, 0.085, 1.7, 0.5, 0.5  # inches


def compare(
    result: Extraction,
    target: object,
    model: object = "svm",
    *,
    cv: object = 5,
    groups: object = None,
    scoring: object = None,
    rows: int | None = ROWS,
    speed: bool = True,
) -> Comparison:
    """Score every block of a result by cross-validation, best first.

    Each block is scored on the same rows in the same folds. What a block's normalization learns is learned from the
    training rows of each fold alone, whatever `fit_on` was.

    Parameters
    ----------
    result
        A finished Extraction.
    target
        What to predict: a column of the frame, or one value for each row. Text, booleans and categories are classes;
        fractions are a quantity; whole numbers are classes where they are 20 or fewer. Rows without one are left out.
    model
        ``"svm"``: ``SVC(C=10)``, or for a quantity ``SVR(C=10)`` of the standardized target; ``"logistic"``:
        LogisticRegression, or for a quantity RidgeCV; both after StandardScaler. ``"forest"``: a random forest, seeded.
        Or any estimator or pipeline of scikit-learn, which is cloned for each fold; a classifier or regressor decides
        what the target is.
    cv
        How many folds, shuffled (seeded), classes in proportion; or a splitter of scikit-learn. PredefinedSplit is of
        the rows of the frame.
    groups
        A column, or one value for each row: rows of one group are never on both sides of a fold.
    scoring
        A name or scorer of scikit-learn; by default the model's own: accuracy, or R² for a quantity.
    rows
        At most so many rows are scored, drawn with the classes in proportion (seeded); None for all.
    speed
        Measure images per second, about a second a block.

    Returns
    -------
    Comparison
        ``.table``, ``.scores`` (blocks × folds), ``.best`` and ``.plot()``.

    Examples
    --------
    >>> result = nbfeat.extract(photos, "ResNet50 --layer conv4_block6_out,conv5_block3_out")  # doctest: +SKIP
    >>> nbfeat.compare(result, "label")  # doctest: +SKIP
    >>> nbfeat.compare(result, "label").plot()  # doctest: +SKIP
    """
    if not isinstance(result, Extraction):
        raise RequestError(f"compare takes what %extract or nbfeat.extract returned, not {type(result).__name__}.")
    made = set(result.columns)
    frame = result.frame.loc[:, [column not in made for column in result.frame.columns]]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        wanted, estimator = read_task(frame, target, model)
        name, scorer = scorer_of(estimator, scoring)
        matrices, ok, recomputed = _matrices(result)
        grouping = None if groups is None else column_of(frame, groups, "group")
        chosen, left_out = selected(wanted, ok, grouping, rows, cv)
        folds, how_split = folds_of(cv, chosen, grouping, len(frame))
        scores = {
            part.prefix: scores_of(part.block, part.prefix, matrices[part.prefix], chosen, folds, estimator, scorer)
            for part in result.parts
        }
    overview, ordered = _tables(result, scores, speed=speed)
    shares = [len(test) / len(train) for train, test in folds]
    notes = [
        verdict(ordered, name, float(np.mean(shares))),
        *left_out,
        chosen.note,
        recomputed,
        *_about(result, warned, speed=speed),
    ]
    setting = f"{written(estimator)}, {how_split}, {chosen}"
    best = overview["block"].iloc[0]
    return Comparison(overview, ordered, best, chosen.name, name, setting, tuple(filter(None, notes)))


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

        Without `ax` it is drawn on a new figure of pyplot's, which a notebook shows at the end of the cell.
        """
        import matplotlib as mpl
        import seaborn as sns

        longest = max(map(len, self.table.index))
        ax = axes(ax, WIDTH + LETTER * longest, HEAD_HEIGHT + ROW_HEIGHT * len(self.table))
        blocks = {prefix: FeatureBlock.parse(text)[0] for prefix, text in self.table["block"].items()}
        alphas = {prefix: "" if block.alpha is None else f" {block.alpha:g}" for prefix, block in blocks.items()}
        networks = {prefix: title_of(block) + alphas[prefix] for prefix, block in blocks.items()}
        palette = colors(networks.values())
        points = self.scores.rename_axis("prefix").reset_index().melt("prefix", value_name="value")
        points["network"] = points["prefix"].map(networks)
        where = {"data": points, "x": "value", "y": "prefix", "order": list(self.table.index), "ax": ax}
        look: dict[str, object] = {"hue": "network", "palette": palette} if palette else {"color": MANY}
        sns.stripplot(**where, **look, jitter=False, size=7, alpha=0.75)
        ink = mpl.rcParams["text.color"]
        mean = {"linestyle": "none", "color": ink, "marker": "D", "markersize": 5}
        sns.pointplot(**where, **mean, errorbar="sd", err_kws={"linewidth": 1.5})
        self._label(ax, ink)
        return ax

    def _label(self, ax: Axes, ink: str) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.transforms import offset_copy

        rates = self.table.get("images_per_second", [np.nan] * len(self.table))
        names = [
            f"{prefix}\n{width:,} wide" + ("" if np.isnan(rate) else f", {_rounded(rate):,} images/s")
            for prefix, width, rate in zip(self.table.index, self.table["width"], rates, strict=True)
        ]
        ax.set_yticks(range(len(self.table)), [plain(name) for name in names])
        ax.set(xlabel=plain(f"{self.score} of each fold"), ylabel="")
        lines = f"{self.score}: {self.target} from the features of each block", self.setting
        title = "\n".join(textwrap.fill(line, TITLE_WIDTH) for line in lines)
        ax.set_title(plain(title), loc="left", fontsize="medium")
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

    def __repr__(self) -> str:
        heading, head, rows = self._read(" ± ")
        return gallery.text(heading, text_table(rows, head), *self.notes)

    def _repr_html_(self) -> str:
        heading, head, rows = self._read("\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
        return gallery.page(heading, table(rows, head), *self.notes)

    def _read(self, sign: str) -> tuple[str, list[str], list[list[object]]]:
        """Return the heading, and the head and the rows of the table, as people read them."""
        speed = ["images/s"] if "images_per_second" in self.table else []
        head = ["features", f"{self.score}{sign}sd", "width", *speed, "memory", "block"]
        rows: list[list[object]] = []
        for prefix, row in self.table.iterrows():
            score = f"{row['score']:.3f}" + ("" if np.isnan(row["spread"]) else f"{sign}{row['spread']:.3f}")
            rate = [_rounded(row["images_per_second"])] if speed else []
            block = briefly(FeatureBlock.parse(row["block"])[0])
            rows.append([prefix, score, row["width"], *rate, format_bytes(row["bytes"]), block])
        return f"{self.target}: {self.score} of {self.setting}", head, rows


def verdict(scores: pd.DataFrame, name: str, test_share: float) -> str:
    """Say whether the first block leads significantly (5 %) by the corrected resampled t-test.

    Folds share training rows, so their variance is corrected by `test_share`, test rows ÷ training rows (Nadeau and
    Bengio, Inference for the generalization error, Machine Learning 52, 2003).
    """
    from scipy.stats import t

    if len(scores) == 1:
        return ""
    if scores.shape[1] == 1:
        return "One fold does not tell how much scores vary: take more before choosing."
    leads = scores.iloc[0] - scores.iloc[1:]
    means, spreads = leads.mean(axis=1), leads.std(axis=1, ddof=1)
    best, second = scores.index[:2]
    lead = f"{means.iloc[0]:.3f} ± {spreads.iloc[0]:.3f} of {name} from fold to fold"
    count = scores.shape[1]
    needed = t.ppf(0.95, count - 1) * np.sqrt(1 / count + test_share) * spreads
    tied = [str(prefix) for prefix in means.index[means <= needed]]
    if not tied:
        return f"{best} is best: it leads {second} by {lead}."
    more = [f"{len(tied) - TIED_SHOWN:,} more"] if len(tied) > TIED_SHOWN else []
    named = listing([str(best), *tied[:TIED_SHOWN], *more])
    return f"No clear winner between {named}: {best} leads {second} by {lead}."


def _rounded(rate: float) -> float | str:
    """Round a speed to the two digits that a short measurement can tell."""
    if np.isnan(rate):
        return "?"
    return round(float(f"{rate:.2g}")) if rate >= 10 else float(f"{rate:.2g}")


def _matrices(result: Extraction) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.bool_], str]:
    """Return features before what their normalization learned, the rows that have all of them, and what to say."""
    learned = [part for part in result.parts if part.block.is_learned]
    found = {part.prefix: result[part.prefix].to_numpy() for part in result.parts if part not in learned}
    if not learned:
        return found, result.ok.to_numpy(), ""
    before = result.before_normalization().run()
    raw = {(part.block, part.column): part for part in before.parts}
    for part in learned:
        same = raw[replace(part.block, normalize="none", components=None), part.column]
        if part.network and same.network and part.network.weights.sha256 != same.network.weights.sha256:
            name, prefix = part.block.backbone, part.prefix
            raise RequestError(f"The weights of {name} are others than when {prefix} was extracted: extract it again.")
        found[part.prefix] = before[same.prefix].to_numpy()
    again = f"{before.computed:,} images, which the cache did not have."
    note = f"Features before normalization were computed again for {again}" if before.computed else ""
    return found, result.ok.to_numpy() & before.ok.to_numpy(), note


def _tables(result: Extraction, scores: Mapping[str, list[float]], *, speed: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return what is known of each block, and the scores of blocks × folds; the best mean first."""
    parts = sorted(result.parts, key=lambda part: float(np.mean(scores[part.prefix])), reverse=True)
    prefixes, widths = [part.prefix for part in parts], [len(part.names) for part in parts]
    names = [f"fold {number}" for number, _ in enumerate(scores[prefixes[0]], 1)]
    folds = pd.DataFrame([scores[prefix] for prefix in prefixes], index=prefixes, columns=names)
    # Each source of features is measured once: parts of one source differ in normalization alone.
    sources = {part.source: part for part in parts}
    rates = {source: result.speed_of(part) for source, part in sources.items() if speed}
    columns = {
        "block": [str(part.block) for part in parts],
        "score": folds.mean(axis=1),
        "spread": folds.std(axis=1, ddof=1),
        "width": widths,
        **({"images_per_second": [rates[part.source] for part in parts]} if speed else {}),
        "bytes": [4 * width * len(result.frame) for width in widths],
    }
    return pd.DataFrame(columns, index=prefixes), folds


def _about(result: Extraction, warned: Sequence[warnings.WarningMessage], *, speed: bool) -> Iterator[str]:
    """Say what was learned anew, what scikit-learn warned of, and what the speed is."""
    if learned := [part.prefix for part in result.parts if part.block.is_learned]:
        yield f"{listing(learned)}: normalization learned in each fold, from its training rows alone."
    if warned:
        counts = Counter(warning.category.__name__ for warning in warned)
        first = str(warned[0].message).strip().splitlines()[0]
        yield f"Warnings: {listing(f'{count:,} × {name}' for name, count in counts.items())}. The first: {first}"
    if speed:
        yield (
            "images/s: from file to features, each block alone, without the cache, measured just now on up to 64 of "
            f"the images ({listing(result.engines)}, {result.precision})."
        )

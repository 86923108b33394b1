"""compare: the cross-validated score of every feature block, as a table, a verdict and a plot."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nbfeat.errors import RequestError, format_bytes, listing
from nbfeat.explore import gallery
from nbfeat.explore.gallery import axes, colors, plain
from nbfeat.explore.scoring import column_of, copies_in, folds_of, read_task, scorer_of, scores_of, selected, written
from nbfeat.extraction.extraction import Extraction
from nbfeat.extraction.options import FeatureBlock
from nbfeat.extraction.report import briefly, title_of
from nbfeat.html import table, text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS = 5000  # an SVM's training time grows quadratically: 5,000 rows take minutes, 20,000 take hours
TIED_SHOWN = 3
MANY = "0.5"  # gray, for all points if there are more networks than colors
TITLE_WIDTH = 62  # characters
LEGEND_COLUMNS = 3
WIDTH, LETTER, HEAD_HEIGHT, ROW_HEIGHT, LEGEND_BELOW = 5.5, 0.085, 1.7, 0.5, 0.5  # inches


def compare(
    result: Extraction, target: object, model: object = "svm", *, cv: object = 5, groups: object = None,
    scoring: object = None, rows: int | None = ROWS, speed: bool = True,
) -> Comparison:  # fmt: skip
    """Score every feature block of a result by cross-validation, best first.

    All blocks are scored on the same rows and folds. Normalization is fitted again in each fold, on its training rows
    only, regardless of `fit_on`.

    Parameters
    ----------
    result : Extraction
        A finished extraction.
    target : str or array-like
        What to predict: a column of the frame, or one value per row. Text, booleans and categories are classes;
        fractions are a quantity; whole numbers are classes if they have at most 20 distinct values. Rows without a
        target are left out.
    model : {"svm", "forest", "logistic"} or estimator, default "svm"
        ``"svm"`` is ``SVC(C=10)``, or for a quantity ``SVR(C=10)`` on the standardized target; ``"logistic"`` is
        LogisticRegression, or for a quantity RidgeCV; both follow a StandardScaler. ``"forest"`` is a seeded random
        forest. A scikit-learn estimator or pipeline is cloned for each fold; a classifier treats the target as
        classes, a regressor as a quantity.
    cv : int or splitter, default 5
        The number of folds (shuffled with a fixed seed, stratified for classes), or a scikit-learn splitter. A
        PredefinedSplit must cover all rows of the frame.
    groups : str or array-like, optional
        A column, or one value per row: rows of one group are never on both sides of a fold. By default, copies of an
        image (rows with equal features) are a group.
    scoring : str or callable, optional
        A scikit-learn scorer or its name. By default the model's own: accuracy, or R² for a quantity.
    rows : int or None, default 5000
        The most rows to score, sampled in proportion to the classes with a fixed seed; None for all.
    speed : bool, default True
        Also measure images per second, which takes about a second per block.

    Returns
    -------
    Comparison
        The scores as a table, which a notebook shows; ``.plot()`` draws them.

    Raises
    ------
    RequestError
        If the target, the model or the folds don't fit the data.

    Examples
    --------
    >>> nbfeat.compare(result, "label", cv=3, speed=False).best
    'EfficientNetLite0'
    """
    if not isinstance(result, Extraction):
        kind = type(result).__name__
        raise RequestError(f"`result` must be an Extraction, not {kind}. Pass what `nbfeat.extract` returned.")
    made = set(result.columns)
    frame = result.frame.loc[:, [column not in made for column in result.frame.columns]]
    wanted, estimator = read_task(frame, target, model)
    name, scorer = scorer_of(estimator, scoring)
    matrices, ok, recomputed = _matrices(result)
    grouping = None if groups is None else column_of(frame, groups, "group")
    chosen, left_out = selected(wanted, ok, grouping, rows, cv)
    if groups is None:
        grouping, copies = copies_in(matrices.values(), chosen, cv)
        left_out.append(copies)
    folds, how_split = folds_of(cv, chosen, grouping, len(frame))
    stopped: list[bool] = []  # whether each fit used up its iterations; to record warnings would affect all threads

    def watched(model: Any, *data: object) -> object:
        last = getattr(model, "steps", [("", model)])[-1][1]
        done = np.array(getattr(last, "n_iter_", 0), float).max()  # NaN where a solver has none; boosting does all
        stopped.append(0 < (getattr(last, "max_iter", None) or 0) <= done and not hasattr(last, "do_early_stopping_"))
        return scorer(model, *data)

    scores = {
        part.prefix: scores_of(part.block, part.prefix, matrices[part.prefix], chosen, folds, estimator, watched)
        for part in result.parts
    }
    overview, ordered = _tables(result, scores, speed=speed)
    share = float(np.mean([len(test) / len(train) for train, test in folds]))
    notes = [verdict(ordered, name, share), *left_out, chosen.note, recomputed, *_about(result, stopped, speed=speed)]
    setting = f"{written(estimator)}, {how_split}, {chosen}"
    best = overview["block"].iloc[0]
    return Comparison(overview, ordered, best, chosen.name, name, setting, tuple(filter(None, notes)))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Comparison:
    """The feature blocks of a result by cross-validated score, best first; a notebook shows the table.

    Attributes
    ----------
    table : DataFrame
        One row per block, indexed by prefix: ``block`` in the words of %extract, ``score`` (mean over folds),
        ``spread`` (standard deviation over folds), ``width`` (features per image), ``images_per_second``, and
        ``bytes`` (memory for the features of all rows).
    scores : DataFrame
        Blocks × folds. All blocks share the same folds, so they can be compared fold by fold.
    best : str
        The best block, in the words of %extract.
    target, score, setting : str
        The names of the target and of the score; the model, folds and rows in words.
    notes : tuple of str
        The verdict, what was left out, and how speed was measured.
    """

    table: pd.DataFrame
    scores: pd.DataFrame
    best: str
    target: str
    score: str
    setting: str
    notes: tuple[str, ...]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot every fold's score and each block's mean ± standard deviation, best on top.

        Parameters
        ----------
        ax : Axes, optional
            Where to draw; by default a new pyplot figure.

        Returns
        -------
        Axes
            The axes that were drawn on.
        """
        import matplotlib as mpl
        import seaborn as sns

        ax = axes(ax, WIDTH + LETTER * max(map(len, self.table.index)), HEAD_HEIGHT + ROW_HEIGHT * len(self.table))
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
        from matplotlib.transforms import ScaledTranslation

        rates = self.table.get("images_per_second", [np.nan] * len(self.table))
        names = [
            f"{prefix}\n{width:,} wide" + ("" if np.isnan(rate) else f", {_rounded(rate):,} images/s")
            for prefix, width, rate in zip(self.table.index, self.table["width"], rates, strict=True)
        ]
        ax.set_yticks(range(len(self.table)), [plain(name) for name in names])
        ax.set(xlabel=plain(f"{self.score} of each fold"), ylabel="")
        lines = f"{self.score} of predicting {self.target} from each block", self.setting
        title = "\n".join(textwrap.fill(line, TITLE_WIDTH) for line in lines)
        ax.set_title(plain(title), loc="left", fontsize="medium")
        ax.grid(visible=True, axis="x", alpha=0.3)
        ax.set_axisbelow(True)
        handles, labels = ax.get_legend_handles_labels()
        found = dict(zip(labels, handles, strict=True))
        found["mean ± standard deviation"] = Line2D([], [], color=ink, marker="D", markersize=5, linewidth=1.5)
        below = ax.transAxes + ScaledTranslation(0, -LEGEND_BELOW, ax.figure.dpi_scale_trans)
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
        """Return the heading, column names and rows of the displayed table."""
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
    """Say whether the first block leads significantly (5 %) by the corrected resampled t-test."""
    # Folds share training rows, so their variance is corrected by `test_share`, test rows ÷ training rows (Nadeau and
    # Bengio, Inference for the generalization error, Machine Learning 52, 2003).
    from scipy.stats import t

    if len(scores) == 1:
        return ""
    if scores.shape[1] == 1:
        return "A single fold doesn't show how much scores vary. Use more folds before choosing."
    leads = scores.iloc[0] - scores.iloc[1:]
    means, spreads = leads.mean(axis=1), leads.std(axis=1, ddof=1)
    best, second = scores.index[:2]
    lead = f"{means.iloc[0]:.3f} ± {spreads.iloc[0]:.3f} {name} across folds"
    needed = t.ppf(0.95, len(scores.T) - 1) * np.sqrt(1 / len(scores.T) + test_share) * spreads
    tied = [str(prefix) for prefix in means.index[means <= needed]]
    if not tied:
        return f"{best} is best: it leads {second} by {lead}."
    more = [f"{len(tied) - TIED_SHOWN:,} more"] if len(tied) > TIED_SHOWN else []
    named = listing([str(best), *tied[:TIED_SHOWN], *more])
    return f"No clear winner between {named}: {best} leads {second} by {lead}."


def _rounded(rate: float) -> float | str:
    """Round a speed to two digits, the precision of a short measurement."""
    if np.isnan(rate):
        return "?"
    return round(float(f"{rate:.2g}")) if rate >= 10 else float(f"{rate:.2g}")


def _matrices(result: Extraction) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.bool_], str]:
    """Return features before fitted normalization, a mask of the rows that have them all, and a note."""
    learned = [part for part in result.parts if part.block.is_learned]
    found = {part.prefix: result[part.prefix].to_numpy() for part in result.parts if part not in learned}
    if not learned:
        return found, result.ok.to_numpy(), ""
    before = result.before_normalization().run()
    raw = {(part.block, part.column): part for part in before.parts}
    for part in learned:
        same = raw[replace(part.block, normalize="none", components=None), part.column]
        weights = {one.network.prepared.weights.sha256 for one in (part, same) if one.network}
        if len(weights) > 1:
            name, prefix = part.block.backbone, part.prefix
            raise RequestError(f"The weights of {name} have changed since {prefix} was extracted. Extract it again.")
        found[part.prefix] = before[same.prefix].to_numpy()
    note = f"Features before normalization were recomputed for {before.computed:,} images that were not in the cache."
    return found, result.ok.to_numpy() & before.ok.to_numpy(), note if before.computed else ""


def _tables(result: Extraction, scores: Mapping[str, list[float]], *, speed: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a table with one row per block, and the scores (blocks × folds); the best mean first."""
    parts = sorted(result.parts, key=lambda part: float(np.mean(scores[part.prefix])), reverse=True)
    prefixes, widths = [part.prefix for part in parts], [len(part.names) for part in parts]
    names = [f"fold {number}" for number, _ in enumerate(scores[prefixes[0]], 1)]
    folds = pd.DataFrame([scores[prefix] for prefix in prefixes], index=prefixes, columns=names)
    sources = {part.source: part for part in parts}  # measured once; their parts differ only in normalization
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


def _about(result: Extraction, stopped: list[bool], *, speed: bool) -> Iterator[str]:
    """Yield notes on fitted normalization, fits that may not have converged, and how speed was measured."""
    if learned := [part.prefix for part in result.parts if part.block.is_learned]:
        yield f"{listing(learned)}: normalization was fitted in each fold, on its training rows only."
    if any(stopped):
        yield f"{sum(stopped):,} of {len(stopped):,} fits may not have converged. Use a model with a higher `max_iter`."
    if speed:
        yield (
            "images/s: from file to features, one block at a time, without the cache, measured just now on up to 64 "
            f"images ({listing(result.engines)}, {result.precision})."
        )

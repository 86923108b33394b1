"""A dataset: a folder of Parquet files with the features of one frame; begin to write one, and read one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbfeat.errors import RequestError, format_bytes
from nbfeat.extraction import columns
from nbfeat.extraction.columns import attach, place
from nbfeat.extraction.packed import Failure, pack
from nbfeat.extraction.recipe import Recipe
from nbfeat.parquet.carried import FAILURE, carried, digest_of_images
from nbfeat.parquet.location import Shelf
from nbfeat.parquet.piece import Piece, changed, columns_of, matrices_of

if TYPE_CHECKING:
    import pandas as pd

    from nbfeat.extraction.extraction import Extraction
    from nbfeat.extraction.result import Result
    from nbfeat.extraction.run import Run
    from nbfeat.parquet.chunks import Chunks

_SAMPLE = (
    "Extract a sample of the rows without --parquet, and repeat it on all: --like sample --parquet {shown}; or leave "
    "--components away."
)


def begun(
    extraction: Extraction,
    path: str | Path,
    frame: pd.DataFrame,
    run: Run,
    fit_on: NDArray[np.bool_] | None,
    *,
    replace: bool,
) -> Chunks:
    """Return the work of an `extraction` that writes to `path`; nothing is written yet.

    Raises
    ------
    RequestError
        Where it cannot be, or the folder holds something else.
    """
    from nbfeat.parquet.chunks import Chunks

    shelf, parts, repeats = Shelf.at(path), extraction.parts, extraction.repeats
    learned = [part for part in parts if part.block.is_learned and not repeats]
    if any(part.block.components for part in learned):
        raise RequestError(
            "--components learns from all rows at once, which --parquet never has. " + _SAMPLE.format(shown=shelf.shown)
        )
    if learned and not len(frame):
        raise RequestError(
            f"--normalize {learned[0].block.normalize} has no rows to learn from: the frame is empty. Leave it away, "
            "or extract features of some images first."
        )
    columns = list(dict.fromkeys(part.column for part in parts))
    own = carried(frame, images=columns, prefixes=[part.prefix for part in parts], replace=replace)
    fit_on = fit_on if learned else None
    request: dict[str, Any] = {
        "rows": len(frame),
        "blocks": [[str(part.block), str(part.column), part.prefix] for part in parts],
        "images": [[str(column), digest_of_images(extraction.images_in(column), run.root)] for column in columns],
        "columns": own.digests(),
        "fit_on": None if fit_on is None else hashlib.sha256(np.packbits(fit_on).tobytes()).hexdigest(),
        "like": None if repeats is None else _digest(repeats),
    }
    told = lambda: extraction.recipe
    return Chunks(shelf, run, parts, own, request, fit_on=fit_on, told=told, starts_anew=replace)


def _digest(recipe: Recipe) -> str:
    """Return what tells this recipe from any that gives other features."""
    return hashlib.sha256(pack(Recipe(recipe.parts, {}), []).encode()).hexdigest()


def is_dataset(path: object) -> bool:
    """Tell whether `path` can be that of a dataset: a folder that is there, or an address."""
    return "://" in str(path) or Path(str(path)).expanduser().is_dir()


def read_recipe(path: str | Path) -> Recipe:
    """Read what it takes to repeat the features of a dataset, none of its rows."""
    return _pieces(Shelf.at(path))[0].recipe


def read(path: str | Path, frame: pd.DataFrame | None) -> Result:
    """Read a dataset whole, or its features beside the rows of `frame`."""
    import pandas as pd

    shelf = Shelf.at(path)
    pieces = _pieces(shelf)
    recipe = Recipe(pieces[0].recipe.parts, pieces[0].recipe.told, shelf.name)
    matrices = _matrices(shelf, pieces, recipe)
    own = _own(shelf, pieces, recipe, index_only=frame is not None)
    features = [
        pd.DataFrame(matrix, index=own.index, columns=part.names, copy=False)
        for part, matrix in zip(recipe.parts, matrices, strict=True)
    ]
    starts = np.cumsum([0, *(piece.rows for piece in pieces)])
    failures = [
        Failure(int(start) + one.position, *one[1:])
        for start, piece in zip(starts, pieces, strict=False)
        for one in piece.failures
    ]
    table = pd.DataFrame(failures, columns=list(Failure._fields))
    table.index = own.index.take(table["position"].to_numpy(int))
    from nbfeat.extraction.result import Result

    result = Result(pd.concat([own, *features], axis=1), table, recipe)
    return result if frame is None else attached(result, frame)


def attached(result: Result, frame: pd.DataFrame) -> Result:
    """Return the features of a result beside the columns of `frame`, whose rows are the same."""
    if not frame.index.equals(result.frame.index):
        here, there = f"{len(frame):,} rows", f"{len(result.frame):,} rows"
        why = f"it has {here}, and {result.fitted.source} {there}" if here != there else "its index is another"
        raise RequestError(
            f"The frame is not the one that {result.fitted.source} was made of: {why}. Leave frame= away."
        )
    places = [place(frame, part.prefix, len(part.names), replace=False) for part in result.fitted.parts]
    blocks = [result[part.prefix].set_axis(frame.index) for part in result.fitted.parts]
    from nbfeat.extraction.result import Result

    return Result(attach(frame, blocks, places), result.failures.set_axis(_index(frame, result)), result.fitted)


def _index(frame: pd.DataFrame, result: Result) -> pd.Index:
    return frame.index.take(result.failures["position"].to_numpy(int))


def _pieces(shelf: Shelf) -> list[Piece]:
    """Return the parts of a finished dataset in their order."""
    from nbfeat.parquet.survey import finished

    return finished(shelf)


def _matrices(shelf: Shelf, pieces: Sequence[Piece], recipe: Recipe) -> list[NDArray[np.float32]]:
    rows, width = sum(piece.rows for piece in pieces), sum(len(part.names) for part in recipe.parts)
    size, free = 4 * rows * width, columns.free_bytes()
    if free is not None and size > columns.SHARE * free:
        raise RequestError(
            f"{shelf.shown} has {rows:,} rows × {width:,} features, {format_bytes(size)}, more than half of the "
            f"{format_bytes(free)} of free memory. Take what you need of it with polars.scan_parquet, DuckDB or "
            "pyarrow.dataset, or file by file with pandas.read_parquet."
        )
    matrices = [np.empty((rows, len(part.names)), np.float32) for part in recipe.parts]
    start = 0
    for piece in pieces:
        for matrix, some in zip(matrices, matrices_of(shelf, piece, recipe), strict=True):
            if len(some) != piece.rows:
                raise changed(shelf, piece.about.name)
            matrix[start : start + piece.rows] = some
        start += piece.rows
    return matrices


def _own(shelf: Shelf, pieces: Sequence[Piece], recipe: Recipe, *, index_only: bool) -> pd.DataFrame:
    """Read the columns that were given; of them, perhaps those of the index alone."""
    import pyarrow as pa
    from pyarrow import parquet

    made = {part.prefix for part in recipe.parts} | {FAILURE}
    first = pieces[0].about.name
    with shelf.opened(first) as file, parquet.ParquetFile(file) as opened:
        schema = opened.schema_arrow
    try:
        described: Mapping[str, Any] = schema.pandas_metadata or {}
        index = [name for name in described.get("index_columns", []) if isinstance(name, str)]
        names = [name for name in schema.names if name not in made and (name in index or not index_only)]
        if names:
            table = pa.concat_tables([columns_of(shelf, piece.about.name, names) for piece in pieces])
        else:
            table = pa.table({"": pa.nulls(sum(piece.rows for piece in pieces))})
        found: pd.DataFrame = table.replace_schema_metadata(schema.metadata).to_pandas()
    except RequestError:
        raise
    except (pa.ArrowException, ValueError, TypeError, LookupError, AttributeError) as error:
        raise changed(shelf, first) from error
    return found.iloc[:, :0] if index_only or not names else found

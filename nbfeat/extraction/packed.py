"""A Recipe and its failures as one text, and back: JSON, arrays as base64; whatever is read is checked first."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable
from dataclasses import fields
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbfeat.backbones.weights import Loaded
from nbfeat.errors import RequestError, format_bytes, listing
from nbfeat.extraction.normalize import Normalizer
from nbfeat.extraction.options import FeatureBlock
from nbfeat.extraction.recipe import PartRecipe, Recipe
from nbfeat.inference.engines import PRECISIONS
from nbfeat.parquet.result_file import AGAIN, Failure

FORMAT = 1  # raised whenever what older versions of nbfeat read would mean something else
LARGEST = 64_000_000  # bytes; readers of Parquet refuse 100 million in one entry of the footer


class UnreadableError(ValueError):
    """The text is not what `pack` writes; its message says what of it."""


def pack(recipe: Recipe, failures: Iterable[Failure]) -> str:
    """Write a recipe and failures as text.

    Raises
    ------
    RequestError
        Where it is too long for a footer, naming what takes most.
    """
    parts, lost = [_packed(part) for part in recipe.parts], list(failures)
    text = json.dumps({"format": FORMAT, "recipe": dict(recipe.told), "parts": parts, "failures": lost})
    if len(text) > LARGEST:
        sizes = {part["prefix"]: len(json.dumps(part)) for part in parts}
        largest = max(sizes, key=lambda prefix: sizes[prefix])
        raise RequestError(
            f"What {listing(sizes)} learned and {len(lost):,} failures take {format_bytes(len(text))} "
            f"({largest}: {format_bytes(sizes[largest])}), more than the {format_bytes(LARGEST)} that a Parquet file "
            f"should carry beside its columns. Use fewer --components, or --pooling avg; or write result.frame without "
            "the recipe: result.frame.to_parquet(path)."
        )
    return text


def unpack(text: bytes | str, source: str) -> tuple[Recipe, list[Failure]]:
    """Read what `pack` wrote, from the file `source`.

    Raises
    ------
    RequestError
        Where anything of it is not so: nothing of a text from elsewhere is taken on trust.
    """
    try:
        whole = json.loads(text)
        _check_format(whole["format"])
        parts = tuple(map(_unpacked, whole["parts"]))
        _expect(bool(parts) and len({part.prefix for part in parts}) == len(parts), "the prefixes of its blocks")
        told = whole["recipe"]
        _expect(isinstance(told, dict) and _are(told["engines"], str), "its engines")
        return Recipe(parts, told, source), [Failure.read(values) for values in whole["failures"]]
    except UnreadableError as error:
        reason = str(error)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = f"what it says of its features cannot be read ({type(error).__name__})"
    way = "Install that version to read it." if "newer" in reason else AGAIN
    raise RequestError(f"{source} cannot be read as a result of nbfeat: {reason}. {way}")


def _check_format(number: object) -> None:
    _expect(type(number) is int and number > 0, "its format")
    if number != FORMAT:
        raise UnreadableError(f"it was written by a newer nbfeat (format {number}, this one reads {FORMAT})")


def _packed(part: PartRecipe) -> dict[str, Any]:
    arrays = {field.name: getattr(part.normalizer, field.name) for field in fields(Normalizer)}
    unit_length = arrays.pop("unit_length")
    return {
        "block": str(part.block),
        "images": str(part.column),
        "prefix": part.prefix,
        "width": part.width,
        "weights": {"name": part.weights.name, "sha256": part.weights.sha256},
        "key_fields": dict(part.key_fields),
        "unit_length": unit_length,
        "arrays": {name: _text_of(array) for name, array in arrays.items() if array is not None},
    }


def _unpacked(values: dict[str, Any]) -> PartRecipe:
    blocks = FeatureBlock.parse(values["block"])
    prefix, width, column, key_fields = values["prefix"], values["width"], values["images"], values["key_fields"]
    _expect(len(blocks) == 1 and _are([prefix, column], str), "one of its blocks")
    _expect(type(width) is int and width > 0, "the width of a block")
    weights = Loaded(**values["weights"])
    _expect(_are([weights.name, weights.sha256], str) and isinstance(key_fields, dict), "the weights of a block")
    _expect(key_fields["precision"] in PRECISIONS, "the precision of a block")
    normalizer = _normalizer(blocks[0], width, values["unit_length"], values["arrays"])
    return PartRecipe(blocks[0], column, prefix, width, weights, key_fields, normalizer)


def _normalizer(block: FeatureBlock, width: int, unit_length: object, arrays: dict[str, Any]) -> Normalizer:
    """Read what a block learned; the arrays are those that `normalize.learn` makes for it, and of its width."""
    shapes: dict[str, tuple[int, ...]] = {}
    if block.normalize in {"standard", "minmax"}:
        shapes.update(shift=(width,), stretch=(width,))
    if block.components is not None:
        shapes.update(center=(width,), axes=(block.components, width))
    _expect(unit_length is (block.normalize == "l2"), f"the normalization of `{block}`")
    _expect(arrays.keys() == shapes.keys(), f"what `{block}` learned")
    read = {name: _array_of(arrays[name], shape, f"{name} of `{block}`") for name, shape in shapes.items()}
    return Normalizer(unit_length=block.normalize == "l2", **read)


def _text_of(array: NDArray[np.floating[Any]]) -> dict[str, Any]:
    data = np.ascontiguousarray(array, "<f4").tobytes()
    return {"shape": list(array.shape), "float32": base64.b64encode(data).decode("ascii")}


def _array_of(values: dict[str, Any], shape: tuple[int, ...], what: str) -> NDArray[np.float32]:
    _expect(values["shape"] == list(shape), f"the shape of {what}")
    try:
        data = base64.b64decode(values["float32"], validate=True)
    except binascii.Error:
        data = b""
    _expect(len(data) == 4 * prod(shape), f"the numbers in {what}")
    return np.frombuffer(data, "<f4").astype(np.float32).reshape(shape)


def _are(values: Iterable[object], kind: type) -> bool:
    return all(isinstance(value, kind) for value in values)


def _expect(fits: bool, what: str) -> None:
    if not fits:
        raise UnreadableError(f"{what} cannot be what nbfeat wrote")

"""Feature blocks convert to text and back; the grammar reads cells or says what is wrong with them."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as some

import nbfeat
from nbfeat import Extraction, FeatureBlock, RequestError
from nbfeat.backbones.backbone import SCALINGS
from nbfeat.extraction.options import (
    BLOCK_OPTIONS,
    NORMALIZES,
    OPTIONS,
    POOLINGS,
    RUN_OPTIONS,
    quoted,
    spelled,
    split_words,
)
from nbfeat.images.resize import INTERPOLATIONS, RESIZES
from nbfeat.inference.engines.base import PRECISIONS
from nbfeat.jupyter import grammar
from tests.messages import assert_says_what_to_do

WORD = some.text(some.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1)
TEXT = some.text(
    some.characters(codec="utf-8", exclude_characters="\n\r\0\x85\u2028\u2029\x0b\x0c\x1c\x1d\x1e"), min_size=1
)


def maybe(values: some.SearchStrategy[Any]) -> some.SearchStrategy[Any]:
    return some.none() | values


BLOCKS = some.builds(
    FeatureBlock,
    backbone=WORD.filter(lambda word: not word.startswith("-")),
    layer=maybe(WORD.filter(lambda word: "," not in word)),
    pooling=maybe(some.sampled_from(POOLINGS)),
    normalize=some.sampled_from([how for how in NORMALIZES if how != "whiten"]),
    components=maybe(some.integers(1, 10_000)),
    weights=maybe(TEXT),
    alpha=maybe(some.floats(0, 4, exclude_min=True)),
    scaling=maybe(some.sampled_from(SCALINGS)),
    size=maybe(some.integers(1, 4096)),
    resize=some.sampled_from(RESIZES),
    interpolation=some.sampled_from(INTERPOLATIONS),
    prefix=maybe(TEXT),
)


WHITENED = some.builds(partial(replace, normalize="whiten"), BLOCKS, components=some.integers(1, 10_000))
ANYTHING = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@ANYTHING
@given(BLOCKS | WHITENED)
def test_a_block_reads_back_from_its_text(block: FeatureBlock) -> None:
    assert FeatureBlock.parse(str(block)) == (block,)


@ANYTHING
@given(some.lists(TEXT))
def test_quoted_words_read_back(words: list[str]) -> None:
    assert split_words(" ".join(map(quoted, words))) == words


@ANYTHING
@given(some.text())
def test_any_line_is_read_or_refused_with_a_sentence(line: str) -> None:
    try:
        assert FeatureBlock.parse(line)
    except RequestError as error:
        assert_says_what_to_do(str(error))


@ANYTHING
@given(some.text(), some.none() | some.text())
def test_any_cell_is_read_or_refused_with_a_sentence(line: str, body: str | None) -> None:
    try:
        grammar.read(line, body, {})
    except RequestError as error:
        assert_says_what_to_do(str(error))


def test_backslashes_and_signs_are_plain_and_comments_go() -> None:
    assert split_words(r"VGG16 --prefix a#b -w C:\new\x.h5   # a comment 'open") == [
        "VGG16", "--prefix", "a#b", "-w", r"C:\new\x.h5",
    ]  # fmt: skip
    assert split_words("'a # b' \"it's\"") == ["a # b", "it's"]


def test_a_request_reads_back_from_its_text() -> None:
    cell = (
        "%%extract photos --images path --images 'the back' --root 'a b' --quiet\nResNet50\nVGG16 --layer block4_pool"
    )
    head, body = cell.removeprefix("%%extract ").split("\n", 1)
    request = grammar.read(head, body, {})
    assert request is not None
    line = " ".join(["%%extract", request.frame, *spelled(RUN_OPTIONS, request.run)])
    assert "\n".join([line, *map(str, request.blocks)]) == cell
    assert request.for_extraction == {"images": ["path", "the back"], "root": "a b"}
    assert [block.backbone for block in request.blocks] == ["ResNet50", "VGG16"]


def test_the_first_line_is_the_default_of_lines_that_do_not_say_otherwise() -> None:
    request = grammar.read("photos ResNet50 -p max -n l2", "-l conv4_block6_out\nVGG16 -p avg", {"normalize": "minmax"})
    assert request is not None
    assert [str(block) for block in request.blocks] == [
        "ResNet50 --layer conv4_block6_out --pooling max --normalize l2",
        "VGG16 --pooling avg --normalize l2",
    ]


def test_a_blank_body_is_the_line_magic() -> None:
    request = grammar.read("photos ResNet50", "\n   \n# nothing\n", {})
    assert request is not None
    assert [block.backbone for block in request.blocks] == ["ResNet50"]


@pytest.mark.parametrize(
    ("line", "body", "words"),
    [
        ("", None, "needs a dataframe and a backbone"),
        ("photos", None, "No backbone was named"),
        ("frames['train'] VGG16", None, r"train = frames\['train'\]"),
        ("photos VGG16 ResNet50", None, "takes one backbone"),
        ("photos VGG16 --pool max", None, "Unknown option --pool. Did you mean --pooling"),
        ("photos VGG16 --pooling", None, "expected one argument"),
        ("photos VGG16 --prefix 'open", None, "Unclosed quotation mark"),
        ("photos VGG16 --into 2x", None, "`into` must be a variable name"),
        ("photos VGG16 --into class", None, "`into` must be a variable name, not 'class'"),
        ("photos VGG16 --size 0", None, "whole number from 1"),
        ("photos VGG16 --alpha x", None, "width multiplier"),
        ("photos", "import os", "one feature block per line"),
        ("photos", "x = 3", "one feature block per line"),
        ("photos", "print(1)", "one feature block per line"),
        ("photos", "VGG16 -i path", "-i applies to the whole run"),
        ("photos", "VGG16 --quiet", "--quiet applies to the whole run"),
    ],
)
def test_what_a_cell_cannot_mean_gets_one_clear_line(line: str, body: str | None, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        grammar.read(line, body, {})


def test_the_semicolon_that_silences_is_not_part_of_the_last_word() -> None:
    request = grammar.read("photos ResNet50;", None, {})
    assert request is not None
    assert request.blocks[0].backbone == "ResNet50"


def test_the_table_of_options_is_what_every_face_has() -> None:
    names = [field.name for field in dataclasses.fields(FeatureBlock)]
    assert names == ["backbone", *(option.name for option in BLOCK_OPTIONS)]
    parameters = set(inspect.signature(Extraction).parameters)
    assert set(inspect.signature(nbfeat.extract).parameters) == parameters
    run = {option.name: option for option in RUN_OPTIONS}
    assert parameters - set(run) == {"frame", "blocks", "defaults", "cache"}
    assert set(run) - parameters == {"no_cache", "into", "quiet", "help"}
    assert run["precision"].choices == ("auto", *PRECISIONS)
    for option in OPTIONS:
        assert option.flag in grammar.usage()


def test_the_transformer_has_the_same_options_or_a_block_says_them() -> None:
    parameters = inspect.signature(nbfeat.ImageFeatures).parameters
    run = {"images", "precision", "device", "batch_size", "allow_remote", "cache"}
    block = {"layer", "pooling", "normalize", "components", "weights"}
    assert set(parameters) == {"blocks", "on_failure", *run, *block}
    assert block <= {option.name for option in BLOCK_OPTIONS}
    of_extraction = inspect.signature(Extraction).parameters
    assert of_extraction["cache"].default is None  # True, unless files are written; a transformer never writes any
    for name in run - {"cache"}:
        assert parameters[name].default == of_extraction[name].default, name
    for option in BLOCK_OPTIONS:
        if option.name in block:
            default = parameters[option.name].default
            assert default is None or default == option.default, option.name
            assert not option.choices or default in option.choices


def test_no_two_options_share_a_spelling() -> None:
    spellings = [flag for option in OPTIONS for flag in option.flags]
    assert len(spellings) == len(set(spellings))

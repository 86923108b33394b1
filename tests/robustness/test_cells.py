"""Any cell is understood, or refused in a sentence with a next step."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, strategies as some
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

from nbfeat import Extraction
from nbfeat.extraction.options import OPTIONS
from tests.messages import assert_says_what_to_do
from tests.robustness.tries import Trials, tries

pytestmark = [pytest.mark.usefixtures("fake_network"), pytest.mark.slow, pytest.mark.robustness]
FLAGS = [flag for option in OPTIONS for flag in option.flags if flag != "--on"]  # which takes seconds to import
VALUES = sorted(
    {choice for option in OPTIONS for choice in option.choices if choice != "ray"}
    | {"path", "label", "photos", "In", "_", "nosuch", "ResNet50", "resnet50", "VGG16", "my.keras", "x.h5", "a,b"}
    | {"1", "0", "-1", "2.5", "nan", "inf", "1e400", "٣", ",", "''", '"', "'", "#", ";", "-", "--", "--=", "(", "\\"}
    | {"9" * 400, "9" * 5000, "\"split == 'train'\"", "split == 'train'", "# a comment", "import os", "a\xa0b", "gpu:1"}
    | {"$nosuch", "$name", "{name}", "{", "}", "{{", "{1/0}", "$$", "{name!r:>5}", "path > 3", "train.parquet", "dir/"}
    | {"\u2028", "\x1b[31m", "\ud800", "s3://bucket/key", "file:///x", "~nobody/", "cpu"}
)  # fmt: skip
WORD = (
    some.sampled_from(FLAGS)
    | some.sampled_from(VALUES)
    | some.builds("{}={}".format, some.sampled_from(FLAGS), some.sampled_from(VALUES))
    | some.text(max_size=6)
)
WORDS = some.lists(WORD, max_size=6).map(" ".join)
STARTS = ["photos VGG16 ", "photos ", "photos MobileNet --images path ", ""]
LINE = some.builds(str.__add__, some.sampled_from(STARTS), WORDS)
BLOCK = some.builds(str.__add__, some.sampled_from(["VGG16 ", ""]), WORDS)
BODY = some.none() | some.lists(BLOCK, max_size=3).map("\n".join)


class ReachedError(Exception):
    """Everything was understood, and work would begin."""


def assert_is_shown_as_one_line(error: UsageError) -> None:
    assert type(error) is UsageError, "IPython prints tracebacks of all others"


@tries(400)
@given(line=LINE, body=BODY)
def test_any_cell_is_understood_or_refused_with_a_next_step(
    shell: InteractiveShell, trials: Trials, line: str, body: str | None
) -> None:
    photos = pd.DataFrame({"path": ["a.png"], "label": ["x"], "split": ["train"]})
    shell.user_ns |= {"photos": photos, "name": "VGG16"}

    def steps(_: Extraction) -> Iterator[Any]:
        raise ReachedError

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(Extraction, "steps", steps)
        try:
            if body is None:
                shell.run_line_magic("extract", line)
            else:
                shell.run_cell_magic("extract", line, body)
        except UsageError as error:
            assert_is_shown_as_one_line(error)
            assert_says_what_to_do(str(error))
            trials["refused cells"] += 1
        except ReachedError:
            trials["cells"] += 1


@pytest.mark.parametrize("word", ["a(", "b]", "2nd", "it's", "'''", "?", "0x", "a\\"])
def test_words_that_are_no_python_are_words(shell: InteractiveShell, photos: pd.DataFrame, word: str) -> None:
    for end in ("", ";", " # :(", " # ;", "; # as well"):
        block = f'MobileNet --size 32 --prefix "{word}"{end}'
        shell.user_ns["photos"] = photos
        found = [
            shell.run_line_magic("extract", f"photos --quiet {block}"),
            shell.run_cell_magic("extract", "photos -q", block),
        ]
        assert f"{word}_0000" in shell.user_ns["photos"]
        assert [one is None for one in found] == [end.startswith(";")] * 2, "silenced by a semicolon alone"

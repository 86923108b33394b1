"""Messages name an option as each face does: Python's parameter, the magic's flag, the panel's label."""

from __future__ import annotations

import pytest

from nbfeat.jupyter import grammar
from nbfeat.jupyter.panel.widgets import labelled


@pytest.mark.parametrize(
    ("message", "in_a_cell", "in_the_panel"),
    [
        ("Use `size=224`.", "Use --size 224.", "Use “Image size” 224."),
        ("Drop `fit_on`.", "Drop --fit-on.", "Drop “Fit normalization on”."),
        ("Set `allow_remote=True`.", "Set --allow-remote.", "Set “Fetch images from URLs”."),
        ("Set `cache=False`.", "Set --no-cache.", "Set “Ignore the cache”."),
        ("Pass `pooling='max'` or `root=FOLDER`.", "Pass --pooling max or --root FOLDER.",
         "Pass “Pooling” max or --root FOLDER."),
        ("Call `nbfeat.layers('VGG16')`; rows=10, `path`.",) * 3,
    ],
)  # fmt: skip
def test_messages_name_options_as_each_face_does(message: str, in_a_cell: str, in_the_panel: str) -> None:
    assert grammar.respelled(message) == in_a_cell
    assert labelled(message) == in_the_panel

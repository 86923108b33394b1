"""What the tests of backbones share."""

from __future__ import annotations

from typing import Any

import pytest

from tests import keras_child

LITES = ("EfficientNetLite0:224", "EfficientNetLite1:240", "EfficientNetLite2:260")
BUILT = ("AlexNet:224", "GoogLeNet:224", "GoogLeNet:15", *LITES)


@pytest.fixture(scope="session")
def structures() -> dict[str, Any]:
    """Return what `keras_child` tells of the networks that are written here."""
    return keras_child.run("structures", *BUILT, backend="openvino")

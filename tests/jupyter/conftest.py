"""What tests of the notebook's faces share: a shell with a small frame in it."""

from __future__ import annotations

import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell


@pytest.fixture
def notebook(shell: InteractiveShell, photos: pd.DataFrame) -> InteractiveShell:
    """Return a shell that knows nothing but a frame called photos."""
    shell.reset(new_session=False)
    shell.user_ns["photos"] = photos
    return shell

"""What hostile trials share."""

from __future__ import annotations

import pytest

from tests.robustness.tries import Trials


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> Trials:
    """Return a counter of trials by outcome, which the summary of the tests adds up."""
    found = Trials()
    request.node.user_properties.append(("trials", found))
    return found

"""What hostile trials share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.robustness.tries import Trials


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> Iterator[Trials]:
    """Yield a counter of trials by outcome, which the summary of the tests adds up."""
    yield (found := Trials())
    request.node.user_properties.append(("trials", dict(found)))  # xdist sends plain dicts alone

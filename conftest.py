"""Every test leaves the register of troubles as it was, the doctest of `diagnostics.trouble` too."""

import pytest


@pytest.fixture(autouse=True)
def _no_new_troubles():
    from rmsprop_jax.diagnostics._finding import TROUBLES

    before = dict(TROUBLES)
    yield
    TROUBLES.clear()
    TROUBLES.update(before)

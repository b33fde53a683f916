"""Rank promotion is an error in every test but the examples'; `strict` makes dtype promotion one too.

Not everywhere: Optax's schedules promote dtypes.
"""

import jax
import pytest

pytest.register_assert_rewrite("helpers")  # so that its assertions show the values, too


@pytest.fixture(autouse=True)
def no_rank_promotion(request):
    is_example = request.path.name.startswith("test_example")
    with jax.numpy_rank_promotion("allow" if is_example else "raise"):
        yield


@pytest.fixture
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def configured(name, value):
    before = jax.config.values[name]
    jax.config.update(name, value)
    yield
    jax.config.update(name, before)


@pytest.fixture
def optimized():
    """As users compile, for sums to 1e-6: `make test-all` optimizes less."""
    yield from configured("jax_disable_most_optimizations", False)


@pytest.fixture
def x64():
    yield from configured("jax_enable_x64", True)

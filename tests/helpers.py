"""What the tests share: options, accumulators, a training step, and a look at what XLA makes of it."""

import contextlib
import inspect
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import monitoring

from rmsprop_jax import accumulators, rounding

# Options, and what tests are parametrised by -------------------------------------------------------------

FORMS = {  # of rmsprop
    "plain": {},
    "outside": {"eps_in_sqrt": False},
    "corrected": {"bias_correction": True},
    "momentum": {"momentum": 0.9},
    "lr_after_momentum": {"momentum": 0.9, "lr_in_momentum": False},
    "centered": {"centered": True},
    "centered_momentum": {"centered": True, "momentum": 0.9},
    "weight_decay": {"momentum": 0.9, "weight_decay": 1e-4},
}
FLAGS = [  # of scale_by_rms, in every combination
    {"centered": centered, "eps_in_sqrt": eps_in_sqrt, "bias_correction": bias_correction}
    for centered, eps_in_sqrt, bias_correction in itertools.product([False, True], repeat=3)
]


def forms(*names):
    """Those of FORMS."""
    return {name: FORMS[name] for name in names}


def each(**values):
    """A test's parametrisation by the values of a dictionary, named by its keys: `@each(form=FORMS)`."""
    ((argument, named),) = values.items()
    return pytest.mark.parametrize(argument, named.values(), ids=named)


def quick(cases, some):
    """The cases, values or tuples of them, all but some marked slow: those have each value at least once."""

    def marked(case):
        return pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.slow)

    return [case if case in some else marked(case) for case in cases]


def first_argument(function):
    return next(iter(inspect.signature(function).parameters))


# Six gradients of three elements: any numbers but those that are not finite.
GRADIENTS = hnp.arrays(
    np.float32, (6, 3), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
)

# Accumulators --------------------------------------------------------------------------------------------

ACCUMULATORS = [*accumulators.NAMED]  # by their names, the only place in which the tests look them up
SMALL = [name for name in ACCUMULATORS if name != "float32"]
CODES = [name for name in SMALL if accumulators.NAMED[name].elementwise]


@dataclass(frozen=True)
class Float16Root(accumulators.Codes):
    """An accumulator of one's own, as the module shows it."""

    def encode(self, nu, threshold):
        return rounding.to_dtype(jnp.sqrt(nu), jnp.float16, threshold)

    def decode(self, codes):
        return jnp.square(codes.astype(jnp.float32))


def unkeyed(nu):
    """The parameters' tree out of a state's `nu`, without the accumulator's name, for one array each."""
    ((name, tree),) = nu.items() if isinstance(nu, dict) and len(nu) == 1 else [(None, nu)]
    return tree if name in {a.name for a in map(accumulators.resolve, EVERY_CODE)} else nu


EVERY_CODE = [*CODES, Float16Root(), accumulators.Uint8(-40)]
EVERY_SMALL = [*EVERY_CODE, *[name for name in SMALL if name not in CODES], accumulators.Factored(2)]


def each_accumulator(accumulators):
    """A test's parametrisation by accumulators, whether they are names or objects."""
    return pytest.mark.parametrize("accumulator", accumulators, ids=str)


def each_accumulator_and_form(some, forms):
    """By both, but for centred ones of accumulators that refuse them."""

    def fits(accumulator, form):
        return accumulators.resolve(accumulator).elementwise or not form.get("centered")

    pairs = [
        (accumulator, name) for accumulator in some for name, form in forms.items() if fits(accumulator, form)
    ]
    return pytest.mark.parametrize(
        ("accumulator", "form"),
        [pytest.param(accumulator, forms[name], id=f"{accumulator}-{name}") for accumulator, name in pairs],
    )


# Training ------------------------------------------------------------------------------------------------


def step_of(tx, apply_updates=optax.apply_updates):
    """The function that takes one step: `params, state = step(params, state, grads)`."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates), state

    return step


def donated_step(tx):
    """The same compiled, for parameters and a state that are overwritten in place."""
    return jax.jit(step_of(tx), donate_argnums=(0, 1))


def assert_the_second_step_compiles_nothing(tx, params):
    """Nor do the third and the fourth, with gradients of the parameters' dtypes."""
    step, grads = donated_step(tx), jax.tree.map(jnp.copy, params)
    with compilations() as events:
        params, state = step(params, tx.init(params), grads)
        assert events  # the listener hears the first
        events.clear()
        for _ in range(3):
            params, state = step(params, state, grads)
    assert events == []


def scanned(tx, gradients):
    """The last state and all updates, for gradients along the first axis of an array."""
    return jax.lax.scan(lambda state, g: tx.update(g, state)[::-1], tx.init(gradients[0]), gradients)


def scanned_each(txs):
    """The same for several at once, compiled: a program for each would take four times as long."""
    return jax.jit(lambda gradients: [scanned(tx, gradients) for tx in txs])


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


def assert_trees_close(a, b, rtol):
    """Of any dtypes, which chex wants to be equal."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol), a, b)


# What XLA makes of it ------------------------------------------------------------------------------------


def arrays(dtype=jnp.float32):
    """Parameters of a few shapes, as shapes alone; the smallest has 512 elements."""
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in [(512, 512), (512,), (2048, 128)]]


def compiled_step(tx, params):
    return donated_step(tx).lower(params, jax.eval_shape(tx.init, params), params).compile()


def copies(compiled):
    """The lines of a compiled program that copy arrays, not scalars."""
    return [line for line in compiled.as_text().splitlines() if " copy(" in line and "[]" not in line]


def assert_in_place(compiled, temporary):
    """Outputs live in donated arguments, nothing is copied, and temporaries have fewer bytes than that."""
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < temporary
    assert copies(compiled) == []
    assert memory.alias_size_in_bytes >= memory.output_size_in_bytes - 1024


def assert_equal_leaves_are_lowered_once(tx):
    def lowered(leaves):
        params = [jax.ShapeDtypeStruct((64,), jnp.float32)] * leaves
        return len(jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params)).as_text())

    per_leaf = (lowered(40) - lowered(20)) / 20
    rule = lowered(2) - 2 * per_leaf
    assert per_leaf < rule / 2


@contextlib.contextmanager
def compilations(stage="backend_compile"):
    """A list that grows with every compilation; for `stage="compile"`, with tracing and lowering too."""
    events = []

    def listen(event, duration, **_):
        if stage in event:
            events.append(event)

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        monitoring.unregister_event_duration_listener(listen)

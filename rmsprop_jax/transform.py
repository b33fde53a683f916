"""RMSProp's rule on a tree of parameters, as an Optax transformation: `scale_by_rms`.

The rule itself is in `_rule.py`.
"""

import itertools

import jax
import jax.numpy as jnp
import optax

from rmsprop_jax import _checks, accumulators
from rmsprop_jax._dtypes import dtype_of, full_like, is_array_like, real, wide
from rmsprop_jax._export import register_optax_states
from rmsprop_jax._leaves import flatten_matching, leaf_name, leaf_numbers
from rmsprop_jax._rule import Settings, Transformation, rule
from rmsprop_jax._states import ScaleByRmsState, is_ours, refusal

__all__ = ["scale_by_rms"]


def scale_by_rms(
    decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    initial_scale: jax.typing.ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    centered: bool = False,
    accumulator: accumulators.Name | accumulators.Accumulator = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Divides gradients by the root of the running mean of their squares.

    .. math::
      \nu_t &= \beta \nu_{t-1} + (1-\beta) |g_t|^2 \\
      u_t &= g_t / \sqrt{\nu_t + \epsilon} \quad\text{or}\quad g_t / (\sqrt{\nu_t} + \epsilon)

    The arithmetic is float32, or float64 for 64-bit gradients, and the updates come back in the
    gradients' dtypes. A zero gradient gives a zero update, also with ``eps=0``. A finite gradient, however
    large, leaves finite state and a finite update, not centred at most ``1 / sqrt(1 - decay)``; NaN and
    infinite gradients give NaN updates, for :func:`optax.apply_if_finite` to see.

    Args:
      decay: :math:`\beta`, in [0, 1): 0.9 remembers about 10 updates, 0.999 about 1,000.
      eps: :math:`\epsilon`, at least 0; in units of the squared gradient when `eps_in_sqrt`, else of the
        gradient.
      initial_scale: value of :math:`\nu_0`, at least 0. TensorFlow 1 starts from 1, PyTorch from 0.
      eps_in_sqrt: whether `eps` is added under the root or to the root.
      bias_correction: whether :math:`\nu_t` is divided by :math:`1 - \beta^t`, as in Adam, so that the
        first updates are not up to :math:`1/\sqrt{1-\beta}` times too large.
      centered: whether :math:`\nu` is the variance, the second moment about the running mean (Graves, 2013).
      accumulator: how :math:`\nu` is stored between updates: "float32" (float64 for 64-bit parameters),
        "bfloat16", "uint8" (half and a quarter of the memory, rounded without bias), "factored" (next to
        nothing, the means of a matrix's rows and columns) or one of your own, see
        :mod:`rmsprop_jax.accumulators`. Centred, :math:`\mu` stays float32, and "factored" is refused.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` with state :class:`ScaleByRmsState`, which has its
      settings as an attribute.

    Raises:
      ValueError: when it is built, for a concrete hyper-parameter out of range, an array
        hyper-parameter of less than float32, or `bias_correction` from an `initial_scale` that is not 0;
        in ``init``, for parameters that are not floating or complex; in ``update``, for gradients
        whose tree, shape or dtype does not fit the state, naming the leaf, and for a state that was made
        under another setting.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import scale_by_rms
      >>> tx = scale_by_rms(decay=0.9)
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(jnp.array([10.0, 1.0]), state)
      >>> print([f"{u:.4f}" for u in updates], state.nu)
      ['3.1623', '3.1623'] [10.   0.1]

    References:
      Tieleman and Hinton, `Lecture 6.5: RMSProp
      <https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf>`_, 2012

      Graves, `Generating Sequences With Recurrent Neural Networks
      <https://arxiv.org/abs/1308.0850>`_, 2013
    """
    settings = Settings(decay, eps, eps_in_sqrt, bias_correction, centered, accumulator)
    stored_by = settings.accumulator
    accumulators.check_centered(stored_by, settings.centered)
    initial_scale = _checks.precise_number("initial_scale", initial_scale)
    if bias_correction and isinstance(initial_scale, float) and initial_scale != 0:
        raise ValueError(f"Invalid {initial_scale=}: bias_correction corrects a start from 0.")

    def init_fn(params):
        register_optax_states()
        dtypes = jax.tree_util.tree_map_with_path(_accumulator_dtype, params)
        leaf = itertools.count()

        def start(p, dtype):
            where = accumulators.thresholds_of(next(leaf), 0)
            return stored_by.init(p, initial_scale, real(dtype), where)

        nu = jax.tree.map(start, params, dtypes)
        mu = jax.tree.map(lambda p, dtype: full_like(p, 0, dtype), params, dtypes) if centered else None
        count = jnp.zeros([], jnp.int32)
        return ScaleByRmsState(count, nu, mu, accumulator=accumulators.unnamed(stored_by))

    def update_fn(updates, state, params=None, *, rms_rows=None, **extra_args):
        del params, extra_args
        grads, treedef, nus, mus = _flatten_as_stored(updates, state, settings)
        count = _incremented(state.count)
        now = count if bias_correction or stored_by.rounds else None
        rows = [None] * len(nus) if rms_rows is None else treedef.flatten_up_to(rms_rows)
        places = list(zip(leaf_numbers(nus), rows, strict=True)) if stored_by.rounds else [None] * len(nus)
        results = [
            (None, nu, mu) if g is None else rule(g, nu, mu, place, now, settings)
            for g, nu, mu, place in zip(grads, nus, mus, places, strict=True)
        ]
        us, nus, mus = zip(*results, strict=True) if results else ((), (), ())
        state = state._replace(
            count=count, nu=treedef.unflatten(nus), mu=treedef.unflatten(mus) if centered else None
        )
        return treedef.unflatten(us), state

    return Transformation(init_fn, update_fn, settings, ["centered"] if centered else [])


# Jitted for eager callers: one dispatch instead of five. Inlined under an outer jit.
_incremented = jax.jit(optax.safe_increment, inline=True)


def _flatten_as_stored(grads, state, settings):
    """`flatten_matching` of gradients and a state, which has to be one that `settings` make.

    Raises:
      ValueError: for a state of another setting, naming both and what converts it.
    """
    if not is_ours(state):
        raise ValueError(refusal(state))
    if settings.centered != (state.mu is not None) and jax.tree.leaves(state.nu):
        raise ValueError(f"Invalid state: it was initialised with centered={not settings.centered}.")
    leaves, treedef, nus, mus = flatten_matching(grads, state.nu, state.mu)
    accumulator = settings.accumulator
    is_told = state.accumulator == accumulators.unnamed(accumulator)
    for g, nu in zip(leaves, nus, strict=True):
        if g is not None and not (is_told and accumulator.fits(nu)):
            found, expected = state.accumulator or accumulators.kind_of(nu), accumulators.title(accumulator)
            raise ValueError(
                f"Invalid state: its nu is stored as {found}, this optimizer stores it as {expected}. "
                f"accumulators.convert(state, {expected!r}, source={found!r}) converts it, with another "
                "source where a file did not say what its codes are."
            )
    for g, mu in zip(leaves, mus, strict=True):
        if g is not None and mu is not None and wide(dtype_of(mu)) != dtype_of(mu):
            raise ValueError(f"Invalid state: its mu is stored as {dtype_of(mu)}, expected float32 at least.")
    return leaves, treedef, nus, mus


def _accumulator_dtype(path, param):
    if not is_array_like(param):
        raise ValueError(
            f"Parameter {leaf_name(path)!r} is {param!r}, expected an array. "
            "eqx.filter(model, eqx.is_inexact_array) or optax.masked leave such leaves out."
        )
    dtype = dtype_of(param)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"Parameter {leaf_name(path)!r} has dtype {dtype}, expected floating or complex. "
            "optax.masked or optax.partition leave such parameters out."
        )
    return wide(dtype)

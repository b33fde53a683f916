"""RMSProp's rule on a tree of parameters, as an Optax transformation: `scale_by_rms`.

The rule itself is in `_rule.py`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rmsprop_jax import _checks, accumulators
from rmsprop_jax._dtypes import dtype_of, is_array_like, is_wide, real, wide
from rmsprop_jax._parts import Transformation
from rmsprop_jax._rule import Settings, rule
from rmsprop_jax._tree import (
    ScaleByRmsState,
    fitted_box,
    is_box,
    is_none,
    is_ours,
    leaf_name,
    leaf_numbers,
    refusal,
    tree_mismatch,
    unboxed,
)
from rmsprop_jax._xla import full_like
from rmsprop_jax.accumulators._base import nu_of, stored_like

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
        dtypes = jax.tree_util.tree_map_with_path(_accumulator_dtype, params)
        leaves = zip(jax.tree.leaves(params), jax.tree.leaves(dtypes), strict=True)
        stored = [
            stored_by.init(p, initial_scale, real(dtype), accumulators.thresholds_of(leaf, 0))
            for leaf, (p, dtype) in enumerate(leaves)
        ]
        mu = jax.tree.map(lambda p, dtype: full_like(p, 0, dtype), params, dtypes) if centered else None
        return ScaleByRmsState(jnp.zeros([], jnp.int32), _initial_nu(stored_by, params, stored), mu)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        grads, treedef, trees, nus, mus = _flatten_as_stored(updates, state, settings)
        count = _incremented(state.count)
        now = count if bias_correction or stored_by.rounds else None
        numbers = leaf_numbers([nu[0] for nu in nus]) if stored_by.rounds else [None] * len(nus)
        results = [
            (None, nu, mu) if g is None else rule(g, nu, mu, number, now, settings)
            for g, nu, mu, number in zip(grads, nus, mus, numbers, strict=True)
        ]
        us, nus, mus = zip(*results, strict=True) if results else ((), (), ())
        nu = nu_of(stored_by, trees, nus)
        mu = treedef.unflatten(mus) if centered else None
        return treedef.unflatten(us), ScaleByRmsState(count, nu, mu)

    return Transformation(init_fn, update_fn, settings, ["centered"] if centered else [])


# Jitted for eager callers: one dispatch instead of five. Inlined under an outer jit.
_incremented = jax.jit(optax.safe_increment, inline=True)


def _initial_nu(accumulator, params, stored):
    """`nu` from the stored arrays of each parameter; Flax's boxes name no axis that a mean is over."""
    nu = nu_of(accumulator, [params] * (len(accumulator.parts) or 1), stored)
    if not accumulator.parts:
        return nu
    fit = partial(jax.tree.map, fitted_box, is_leaf=is_box)
    return accumulator.joined(tuple(fit(tree, params) for tree in accumulator.trees(nu)))


def _flatten_as_stored(grads, state, settings):
    """Flattens gradients and state together: leaves and treedef, `nu`'s trees, and leaves of `nu` and `mu`.

    Raises:
      ValueError: for a state of another setting, naming both and the call that converts it, and for gradients
        that do not fit the state, naming the first leaf.
    """
    if not is_ours(state):
        raise ValueError(refusal(state))
    if settings.centered != (state.mu is not None) and jax.tree.leaves(state.nu):
        raise ValueError(f"Invalid state: it was initialised with centered={not settings.centered}.")
    accumulator = settings.accumulator
    treedef: Any
    leaves, treedef = jax.tree.flatten(grads, is_leaf=is_none)
    if (trees := accumulator.trees(state.nu)) is None:
        raise ValueError(_of_another(state, accumulator))
    try:
        nus = [_flatten_up_to(treedef, grads, tree) for tree in trees]
        mus = [None] * len(leaves) if state.mu is None else treedef.flatten_up_to(state.mu)
    except ValueError:
        raise ValueError(_of_another(state, accumulator) or tree_mismatch(grads, trees[0])) from None
    nus = list(zip(*nus, strict=True))
    for index, of_leaf in enumerate(zip(leaves, nus, mus, strict=True)):
        if of_leaf[0] is not None and (problem := _mismatch(accumulator, *of_leaf)) is not None:
            path, _ = jax.tree_util.tree_leaves_with_path(grads, is_leaf=is_none)[index]
            raise ValueError(_of_another(state, accumulator) or problem.format(repr(leaf_name(path))))
    return leaves, treedef, trees, nus, mus


def _flatten_up_to(treedef, grads, tree):
    try:
        return treedef.flatten_up_to(tree)
    except ValueError:  # Flax's boxes, which differ where their axes' names do
        treedef = jax.tree.structure(unboxed(grads), is_leaf=is_none)
        return treedef.flatten_up_to(unboxed(tree))


def _of_another(state, accumulator):
    """The error for a state whose `nu` another accumulator stores, None where it is this one."""
    found = accumulators.stored_by(state).name
    if found == accumulator.name:
        return None
    return (
        f"Invalid state: {found!r} stores its nu, this optimizer has accumulator={accumulator.name!r}. "
        f"accumulators.convert(state, {accumulator.name!r}) converts it."
    )


def _mismatch(accumulator, g, nu, mu):
    """The error for a leaf, with {} for its name; None if it fits. Eager updates ask for each leaf."""
    shape, dtype = getattr(g, "shape", ()), dtype_of(g)
    expected = stored_like(accumulator, shape)
    for x, y in zip(nu, expected, strict=True):
        if getattr(x, "shape", None) != y.shape:
            return _shape_mismatch(accumulator, shape, nu, expected)
        if x.dtype != y.dtype and not (is_wide(x.dtype) and is_wide(y.dtype)):
            return (
                f"Invalid state: the nu of {{}} has dtype {x.dtype}, {accumulator.name!r} stores {y.dtype}. "
                "Restore it in the dtypes of tx.init(params)."
            )
    if dtype == jax.dtypes.float0:
        return (
            "Gradient {} has dtype float0: its parameter is not differentiable. optax.masked leaves it out."
        )
    if not jnp.issubdtype(dtype, jnp.inexact):
        return f"Gradient {{}} has dtype {dtype}, expected floating or complex."
    if mu is not None and jnp.iscomplexobj(g) and not jnp.iscomplexobj(mu):
        return f"Gradient {{}} has dtype {dtype}, the state was initialised for real gradients."
    if mu is not None and wide(mu.dtype) != mu.dtype:
        return f"Invalid state: the mu of {{}} has dtype {mu.dtype}, expected float32 at least."
    return None


def _shape_mismatch(accumulator, shape, found, expected):
    shapes = [getattr(x, "shape", "None" if x is None else "a subtree") for x in found]
    if accumulator.elementwise:
        return f"Gradient {{}} has shape {shape}, the state was initialised for {shapes[0]}."
    return (
        f"Gradient {{}} has shape {shape}, for which {accumulator.name!r} stores arrays of shapes "
        f"{[x.shape for x in expected]}, the state has {shapes}. A state that jax.vmap(tx.init) made takes "
        "jax.vmap(tx.update)."
    )


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

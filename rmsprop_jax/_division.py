"""Divisions whose derivatives are finite wherever the quotients are, and the derivative of rounding."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from rmsprop_jax._dtypes import times


@jax.custom_jvp
def divided(g: jax.Array, nu: jax.Array, settings: Any) -> jax.Array:
    """The update: g / sqrt(nu + eps), or g / (sqrt(nu) + eps) where not `settings.eps_in_sqrt`."""
    return times(g, _inverse_root(nu, settings))


def _inverse_root(nu, settings):
    # At least the smallest normal number under the root, so that no gradient is 0 / 0 or 1 / 0.
    tiny, eps = jnp.finfo(nu.dtype).tiny, jnp.asarray(settings.eps, nu.dtype)
    if settings.eps_in_sqrt:
        return jax.lax.rsqrt(jnp.maximum(nu + eps, tiny))
    return 1 / (jnp.sqrt(jnp.maximum(nu, tiny)) + eps)


@divided.defjvp
def _divided_jvp(primals, tangents):
    """d(g * s) = s * dg - g * s * (-ds / s): in this form no factor overflows where another is zero."""
    g, nu, settings = primals
    dg, dnu, dsettings = tangents
    tiny, eps, one = jnp.finfo(nu.dtype).tiny, jnp.asarray(settings.eps, nu.dtype), jnp.ones_like(nu)
    deps = jnp.zeros_like(eps) if isinstance(settings.eps, float) else dsettings.eps.astype(nu.dtype)
    scale = divided(one, nu, settings)
    if settings.eps_in_sqrt:
        falls = jnp.where(nu + eps > tiny, 0.5 * ((dnu + deps) * scale) * scale, 0)
    else:
        inverse_root = divided(one, nu, replace(settings, eps=0.0, eps_in_sqrt=True))
        falls = (jnp.where(nu > tiny, 0.5 * dnu * inverse_root, 0) + deps) * scale
    u = divided(g, nu, settings)
    return u, times(dg, scale) - times(u, falls)


@jax.custom_jvp
def quotient(x: jax.Array, mean: jax.Array) -> jax.Array:
    """x / mean for x >= 0; where the mean of x is 0, x itself, which is 0."""
    return x / jnp.where(mean == 0, 1, mean)


@quotient.defjvp
def _quotient_jvp(primals, tangents):
    """(dx - x / mean * dmean) / mean: nothing is squared, so that nothing overflows."""
    (x, mean), (dx, dmean) = primals, tangents
    out = quotient(x, mean)
    return out, quotient(dx - out * dmean, mean)


@jax.custom_jvp
def straight_through(rounded: jax.Array, x: jax.Array) -> jax.Array:
    """`rounded`, with the derivative of `x`: in the mean, unbiased rounding is the identity."""
    return rounded


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return straight_through(*primals), tangents[1].astype(primals[0].dtype)

r"""What the optimizer does to each layer, measured while it trains, and what to change.

One line in the training program measures every `every` updates, inside the compiled step::

    tx = diagnostics.watch(rmsprop(1e-3, decay=0.99), every=10)

and after training, or at any time during it, on the host::

    history = diagnostics.history(state)       # of Flax NNX: diagnostics.history(optimizer.opt_state)
    print(*diagnostics.advise(history, losses), sep="\n")
    diagnostics.plot(history, "diagnostics.png")
    wandb.log(diagnostics.latest(state))       # or any other logger of numbers by name

In a chain, `watch` goes around :func:`rmsprop_jax.rmsprop` itself, so that it sees the gradients that the
accumulators see: ``optax.chain(optax.clip_by_global_norm(1.0), watch(rmsprop(...)))``. Optax's own
`optax.snapshot` and `optax.monitor` see what passes one place in a chain; these figures need the gradients,
the updates and the accumulators of one step together. :func:`measure` takes them from any loop or
`jax.lax.scan`.

A layer here is a leaf of the parameters' tree, by its path as :func:`rmsprop_jax.interop.paths` has it.
"""

from rmsprop_jax.diagnostics._figures import Measurement
from rmsprop_jax.diagnostics._measure import measure
from rmsprop_jax.diagnostics._plot import plot
from rmsprop_jax.diagnostics._run import Finding, Run
from rmsprop_jax.diagnostics._troubles import TROUBLES, advise
from rmsprop_jax.diagnostics._watch import WatchState, history, latest, watch

__all__ = [
    "TROUBLES",
    "Finding",
    "Measurement",
    "Run",
    "WatchState",
    "advise",
    "history",
    "latest",
    "measure",
    "plot",
    "watch",
]

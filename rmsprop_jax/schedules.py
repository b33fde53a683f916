"""Warm-up matched to the accumulator's memory.

The first updates of RMSProp divide by an accumulator that has seen few gradients: too noisy an estimate, and
from a zero start too small a one, by a factor of up to 1/sqrt(1 - decay). The accumulator remembers about
1/(1 - decay) updates, and a linear warm-up over twice that many is enough:

    learning_rate_t = min(1, t / steps) * learning_rate,   steps = 2 / (1 - decay),   t = 1, 2, ...
"""

import jax
import optax

from rmsprop_jax import _checks

__all__ = ["warmup"]


def warmup(
    learning_rate: optax.ScalarOrSchedule, decay: float = 0.9, steps: int | None = None
) -> optax.Schedule:
    """A linear warm-up over the accumulator's memory, which then hands over to `learning_rate`.

    Update t = 1, 2, ..., `steps` has the learning rate ``t / steps * peak``: the first is not zero, and
    update `steps` has the full one.

    Args:
      learning_rate: what comes after the warm-up: a number, or a schedule, which starts at its own step 0
        when the warm-up ends. The peak of the warm-up is the number, or the schedule's value at step 0.
      decay: the decay of the accumulator that is warmed up, a Python number in [0, 1).
      steps: length of the warm-up in updates, at least 0 (no warm-up). By default ``2 / (1 - decay)``,
        rounded: 20 for decay 0.9, 200 for 0.99, 2,000 for 0.999 (Ma and Yarats, 2019).

    Returns:
      An :class:`optax.Schedule`: a function from the number of updates so far to a float32 scalar.

    Raises:
      ValueError: for a concrete `learning_rate`, `decay` or `steps` out of range.

    Example:
      >>> import optax
      >>> from rmsprop_jax import rmsprop, warmup
      >>> schedule = warmup(optax.cosine_decay_schedule(1e-2, decay_steps=1000), decay=0.9)
      >>> [round(float(schedule(count)), 5) for count in (0, 9, 19, 20, 520, 1020)]
      [0.0005, 0.005, 0.01, 0.01, 0.005, 0.0]
      >>> tx = rmsprop(schedule, decay=0.9)

    References:
      Ma and Yarats, `On the adequacy of untuned warmup for adaptive optimization
      <https://arxiv.org/abs/1910.04209>`_, 2019
    """
    learning_rate = _checks.learning_rate("learning_rate", learning_rate)
    if not callable(learning_rate):
        learning_rate = optax.constant_schedule(learning_rate)
    memory = 1 / (1 - _checks.number("decay", decay, below=1))
    if steps is None:
        steps = round(2 * float(memory))
    steps = _checks.whole_number("steps", steps)
    if steps == 0:
        return learning_rate

    fraction = optax.linear_schedule(1 / steps, 1.0, steps - 1) if steps > 1 else optax.constant_schedule(1.0)
    joined = optax.join_schedules([lambda count: fraction(count) * learning_rate(0), learning_rate], [steps])

    def schedule(count):
        with jax.numpy_dtype_promotion("standard"):  # Optax's schedules rely on it
            return joined(count)

    return schedule

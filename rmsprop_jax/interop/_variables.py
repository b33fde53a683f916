"""Which variable of a Keras optimizer is what, by its path or by its place in a file.

{"rmsprop/sequential_dense_kernel_velocity": ..., "rmsprop/iteration": ..., "rmsprop/learning_rate": ...}
{"optimizer/vars/0": ..., "optimizer/vars/1": ..., ...}

The first has the paths of the model's variables with "_" for "/"; the second, of `.keras` and `.weights.h5`
files, has neither names nor kinds. `LossScaleOptimizer` has variables of its own around the RMSprop's.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

LABELS = {"E[g^2]": "velocity", "E[g]": "average_gradient", "b": "momentum"}

_OTHERS = (
    *("adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw"),
    *("ftrl", "lamb", "lion", "muon", "nadam", "sgd"),
)
_STORED = re.compile(r"optimizer/(inner_optimizer/)?vars/(\d+)")


class Variables(NamedTuple):
    """The variables of one RMSprop.

    Attributes:
      places: the key in the dictionary of each array, by (the model's variable, what).
      iteration: the key of the number of updates, None if there is none.
      learning_rate: that of the learning rate.
    """

    places: Mapping[tuple[str, str], str]
    iteration: str | None
    learning_rate: str | None

    @property
    def known(self) -> list[str]:
        """The model's variables, those of a path with "_" for "/" where that is all there is."""
        return list(dict.fromkeys(name for name, _ in self.places))

    def find(self, name: str) -> str | None:
        """Which of `known` a path is."""
        known = set(self.known)
        return next((x for x in (name, name.replace("/", "_")) if x in known), None)


def variables_of(
    arrays: Mapping[str, Any],
    order: Sequence[str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Variables:
    """The RMSprop's variables among `arrays`, which may have others.

    Args:
      arrays: by their paths, or their places in a file.
      order: the paths of the model's trainable variables, for places.
      config: the RMSprop's own, for places.

    Raises:
      ValueError: for the variables of another optimizer, of two of them, or that do not say what they are.
    """
    if any(_STORED.fullmatch(key) for key in arrays):
        return _stored(arrays, order, config)
    found: dict[str, dict[tuple[str, str], str]] = {}
    for key in arrays:
        optimizer, _, end = key.rpartition("/")
        for what, label in LABELS.items():
            if end.endswith(f"_{label}"):
                found.setdefault(optimizer, {})[end.removesuffix(f"_{label}"), what] = key
    found = {o: places for o, places in found.items() if any(what == "E[g^2]" for _, what in places)}
    names = [o for o in found if _kind(o) not in _OTHERS]
    if not names:
        keys = ", ".join(map(repr, list(arrays)[:4])) or "nothing"
        of = f"those of {' and '.join(map(repr, found))}" if found else f"{keys}, ..."
        raise ValueError(
            f"Invalid variables: they are {of}, expected {{v.path: v.numpy() for v in optimizer.variables}} "
            "of a built RMSprop, such as 'rmsprop/dense_kernel_velocity'."
        )
    if len(names) > 1:
        raise ValueError(
            f"Invalid variables: they are of several optimizers, {' and '.join(map(repr, names))}."
        )
    (own,) = names
    prefix = f"{own}/" if own else ""
    iteration, learning_rate = (
        key if (key := prefix + end) in arrays else None for end in ("iteration", "learning_rate")
    )
    return Variables(found[own], iteration, learning_rate)


def rmsprop_config(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The arguments of the RMSprop in ``keras.optimizers.serialize(optimizer)``, or these themselves.

    Raises:
      ValueError: for another optimizer.
    """
    if config is None:
        return None
    inner = config
    while isinstance(inner.get("config"), Mapping) or isinstance(inner.get("inner_optimizer"), Mapping):
        name = inner.get("class_name")
        inner = inner["config"] if isinstance(inner.get("config"), Mapping) else inner["inner_optimizer"]
        if name not in (None, "RMSprop", "LossScaleOptimizer"):
            raise ValueError(f"Invalid config: it is that of {name}, expected RMSprop's.")
    if "rho" not in inner:
        raise ValueError(
            f"Invalid config: it has {', '.join(map(repr, inner))}, expected RMSprop's, with 'rho'."
        )
    return inner


def _kind(optimizer):
    return re.sub(r"_\d+$", "", optimizer.rpartition("/")[2])


def _stored(arrays, order, config):
    """The variables by their places: iteration, learning rate, then one of each kind for each in `order`."""
    matches = [match for key in arrays if (match := _STORED.fullmatch(key))]
    inner = [match for match in matches if match[1]]  # the outer one repeats these
    keys = {int(match[2]): match[0] for match in inner or matches}
    if sorted(keys) != list(range(len(keys))) or len(keys) < 2:
        raise ValueError(f"Invalid file: it has an optimizer with the variables {sorted(keys)}.")
    own = 1 if isinstance((config or {}).get("learning_rate"), Mapping) else 2  # a schedule is no variable
    if len(keys) <= own:
        raise ValueError("Invalid file: its optimizer has not been built, there are no accumulators in it.")
    if order is None:
        raise ValueError(
            "Keras' file counts the optimizer's variables and does not name them: "
            "pass order=[v.path for v in model.trainable_variables]."
        )
    kinds = _kinds(config) if config is not None else ["E[g^2]"]
    if len(keys) != own + len(kinds) * len(order):
        advice = "" if config is not None else "; its configuration, a .keras file's or config=, says which"
        raise ValueError(
            f"Its optimizer has {len(keys) - own} variables, expected {len(kinds)} for each of the "
            f"{len(order)} in order{advice}."
        )
    places = {
        (name, what): keys[own + kind * len(order) + number]
        for kind, what in enumerate(kinds)
        if what is not None
        for number, name in enumerate(order)
    }
    return Variables(places, keys[0], keys[1] if own == 2 else None)


def _kinds(config):
    """What Keras makes for each of the model's variables, in its order; None for what is not carried over."""
    kinds: list[str | None] = []
    if config.get("use_ema"):
        kinds.append(None)
    if config.get("gradient_accumulation_steps"):
        kinds.append(None)
    kinds.append("E[g^2]")
    if config.get("momentum"):
        kinds.append("b")
    if config.get("centered"):
        kinds.append("E[g]")
    return kinds

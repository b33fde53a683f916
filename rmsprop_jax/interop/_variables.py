"""Which variable of a Keras or TensorFlow optimizer is what, by its name or by its place in a file.

=======================  ===================================================================================
Keras 3                  rmsprop/net_fc_kernel_velocity, with "_" for the "/" of the variable's path
Keras 2, since 2.11      RMSprop/velocity/fc/kernel:0
Keras 2, legacy          RMSprop/fc/kernel/rms:0
TensorFlow checkpoint    layer_with_weights-0/kernel/.OPTIMIZER_SLOT/optimizer/rms/.ATTRIBUTES/VARIABLE_VALUE
tf.compat.v1             fc/kernel/RMSProp, fc/kernel/RMSProp_1
`.keras`, .weights.h5    optimizer/vars/0, optimizer/vars/1: neither names nor kinds
TensorFlow checkpoint    optimizer/_variables/1/.ATTRIBUTES/VARIABLE_VALUE: likewise
=======================  ===================================================================================
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rmsprop_jax.interop._arrays import as_numpy, whole_number
from rmsprop_jax.interop._carry import Source, buffer_factor
from rmsprop_jax.interop._moments import Moments

_END = re.compile(r"(:0|/\.ATTRIBUTES/VARIABLE_VALUE)$")
_WORDS = {
    **dict.fromkeys(("velocity", "rms", ""), "square"),
    **dict.fromkeys(("average_gradient", "mg", "_1"), "mean"),
    **dict.fromkeys(("momentum", "_2"), "buffer"),
}
_NAMED = (
    r"(?:(?P<optimizer>.+)/)?(?P<name>[^/]+)_(?P<word>velocity|average_gradient|momentum)",
    r"(?P<optimizer>[^/]+)/(?P<word>velocity|average_gradient|momentum)/(?P<name>.+)",
    r"(?P<name>.+)/\.OPTIMIZER_SLOT/(?P<optimizer>.+)/(?P<word>rms|mg|momentum)",
    r"(?P<optimizer>(?:training/)?[^/]+)/(?P<name>.+)/(?P<word>rms|mg|momentum)",
    r"(?P<name>.+)/(?P<optimizer>RMSProp)(?P<word>|_1|_2)",
)
_COUNTED = re.compile(r"(?P<optimizer>optimizer/(?:inner_optimizer/)?)(?:vars|_variables)/(?P<number>\d+)")
_OTHERS = (
    *("adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw"),
    *("ftrl", "lamb", "lion", "muon", "nadam", "sgd"),
)


class KerasSource(Source):
    """The variables of one RMSprop among `variables`, which may have others.

    Args:
      variables: by their names, or their places in a file.
      order: the paths of the model's trainable variables, for places.
      config: the RMSprop's own, for places.
      learning_rate: of the next step, by default the variable's.
      lr_in_momentum: whether the learning rate is in our momentum buffer.

    Attributes:
      names: the keys in `variables`, by the model's variable.
      iteration: that of the number of updates, None if there is none.
      rate: the learning rate of the next step, None where it is not known.

    Raises:
      ValueError: for the variables of another optimizer, of two of them, or that do not say what they are.
    """

    labels = Moments("velocity", "average_gradient", "momentum")

    def __init__(
        self,
        variables: Mapping[str, Any],
        order: Sequence[str] | None = None,
        config: Mapping[str, Any] | None = None,
        rate: Any = None,
        lr_in_momentum: bool = True,
    ) -> None:
        short = {_END.sub("", key): key for key in variables}
        if matches := [match for key in short if (match := _COUNTED.fullmatch(key))]:
            found, iteration, own_rate = _counted(matches, short, order, config)
        else:
            found, iteration, own_rate = _named(short, config)
            if iteration == "global_step":  # tf.compat.v1 makes a buffer in any case
                self.spare = ("buffer",)
        self.names = {name: Moments(*(short.get(key) for key in keys)) for name, keys in found.items()}
        self.iteration = short.get(iteration)
        self.rate = variables[short[own_rate]] if rate is None and own_rate in short else rate
        self._variables, self._lr_in_momentum = variables, lr_in_momentum

    @property
    def count(self) -> int | None:
        return None if self.iteration is None else whole_number(self._variables[self.iteration], "iteration")

    def find(self, name: str) -> str | None:
        short = _END.sub("", name)
        return next((x for x in (name, short, short.replace("/", "_")) if x in self.names), None)

    def arrays(self, name: str) -> Moments:
        return Moments(*(None if key is None else self._variables[key] for key in self.names[name]))

    def factor(self, name: str) -> float:
        return buffer_factor(True, self._lr_in_momentum, None if self.rate is None else as_numpy(self.rate))


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
        if name not in (None, "RMSprop", "Custom>RMSprop", "LossScaleOptimizer"):
            raise ValueError(f"Invalid config: it is that of {name}, expected RMSprop's.")
    if "rho" not in inner:
        raise ValueError(
            f"Invalid config: it has {', '.join(map(repr, inner))}, expected RMSprop's, with 'rho'."
        )
    return inner


def _named(short, config):
    """The keys by names: of each of the model's variables, of the iteration and of the learning rate."""
    found: dict[str, dict[str, Moments]] = {}
    for pattern in _NAMED:
        for match in filter(None, (re.fullmatch(pattern, key) for key in short)):
            of_name = found.setdefault(match["optimizer"] or "", {})
            moments = of_name.get(match["name"], Moments())
            of_name[match["name"]] = moments._replace(**{_WORDS[match["word"]]: match[0]})
        found = {o: names for o, names in found.items() if any(m.square for m in names.values())}
        if own := [o for o in found if _kind(o) not in _OTHERS]:
            break
    if len(own) != 1:
        raise ValueError(_not_one(short, found, own, config))
    names = found[own[0]]
    if pattern == _NAMED[-1]:
        if not any(m.buffer for m in names.values()):  # not centred, its first word is the buffer's
            names = {name: Moments(m.square, None, m.mean) for name, m in names.items()}
        return names, "global_step", None
    prefix = f"{own[0]}/" if own[0] else ""
    iterations = [prefix + "iteration", prefix + "iter", prefix + "_iterations", "iteration"]
    rates = [prefix + "learning_rate", prefix + "_learning_rate", "learning_rate"]
    return names, *(next((key for key in keys if key in short), None) for keys in (iterations, rates))


def _not_one(short, found, own, config):
    """What to say of variables that are not those of one RMSprop."""
    if own:
        return f"Invalid variables: they are of several optimizers, {' and '.join(map(repr, own))}."
    if config is not None and "decay" in config:
        return (
            "Invalid file: a .keras file of Keras 2 does not hold the variables of its legacy optimizers: "
            "save the model as .h5, which does."
        )
    keys = ", ".join(map(repr, list(short)[:4])) or "nothing"
    of = f"those of {' and '.join(map(repr, found))}" if found else f"{keys}, ..."
    return (
        f"Invalid variables: they are {of}, expected {{v.path: v.numpy() for v in optimizer.variables}} "
        "of a built RMSprop, such as 'rmsprop/dense_kernel_velocity'."
    )


def _kind(optimizer):
    return re.sub(r"_\d+$", "", optimizer.rpartition("/")[2]).lower()


def _counted(matches, short, order, config):
    """The keys by places: iteration, learning rate, then one of each kind for each in `order`."""
    config = config or {}
    matches = [match for match in matches if "inner" in match["optimizer"]] or matches  # which repeat them
    keys = {int(match["number"]): match[0] for match in matches}
    places = sorted(keys)
    iteration, rate = (matches[0]["optimizer"] + end for end in ("_iterations", "_learning_rate"))
    if iteration in short:  # a TensorFlow checkpoint's, beside the places
        first, own = places[0], 0
    else:  # a schedule is no variable, and in Keras 2 no learning rate is
        first, own = 0, 1 if isinstance(config.get("learning_rate"), Mapping) or _is_keras2(config) else 2
        iteration, rate = keys.get(0), keys.get(1) if own == 2 else None
    if places != list(range(first, first + len(keys))) or len(keys) < own:
        raise ValueError(f"Invalid file: it has an optimizer with the variables {places}.")
    slots = [keys[place] for place in places[own:]]
    if not slots:
        raise ValueError("Invalid file: its optimizer has not been built, there are no accumulators in it.")
    if order is None:
        raise ValueError(
            "Keras' file counts the optimizer's variables and does not name them: "
            "pass order=[v.path for v in model.trainable_variables]."
        )
    fields = _fields(config)
    if len(slots) != len(fields) * len(order):
        advice = "" if config else "; its configuration, a .keras file's or config=, says which"
        raise ValueError(
            f"Its optimizer has {len(slots)} variables, expected {len(fields)} for each of the "
            f"{len(order)} in order{advice}."
        )
    columns = zip(*(slots[i * len(order) : (i + 1) * len(order)] for i in range(len(fields))), strict=True)
    found = (dict(zip(fields, column, strict=True)) for column in columns)
    moments = (Moments(*map(of_one.get, Moments._fields)) for of_one in found)
    return dict(zip(order, moments, strict=True)), iteration, rate


def _is_keras2(config):
    return "decay" in config or "is_legacy_optimizer" in config


def _fields(config):
    """What Keras makes for each of the model's variables, in its order, also what is not carried over."""
    made = {
        "ema": config.get("use_ema"),
        "accumulated": config.get("gradient_accumulation_steps"),
        "square": True,
        "buffer": config.get("momentum"),
        "mean": config.get("centered"),
    }
    return [field for field, is_made in made.items() if is_made]

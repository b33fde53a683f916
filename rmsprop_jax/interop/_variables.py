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
from rmsprop_jax.interop._carry import buffer_factor
from rmsprop_jax.interop._match import Source
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
_COUNTED = re.compile(r"(?P<optimizer>.+/)(?:(?<=optimizer/)vars|_variables)/(?P<number>\d+)")
_OTHERS = (
    *("adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw"),
    *("ftrl", "lamb", "lion", "muon", "nadam", "sgd"),
)


class KerasSource(Source):
    """The variables of one RMSprop among `variables`, which may have others.

    `order`, the paths of the model's trainable variables, and `config`, the RMSprop's own, are for variables
    that have no names. `names` has the keys in `variables` for each of the model's variables, `iteration` is
    the key of the number of updates, and `rate` the next step's learning rate, as given or the variable's.
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
        matches = list(filter(None, map(_COUNTED.fullmatch, short)))
        found = _counted(matches, short, order, config or {}) if matches else _named(short, config or {})
        names, iteration, own_rate, self.spare = found
        self.names = {name: Moments(*map(short.get, keys)) for name, keys in names.items()}
        self.iteration = short.get(iteration)
        self.rate = variables.get(short.get(own_rate, "")) if rate is None else rate
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


def _named(short, config):
    """The keys by names: of each of the model's variables, of the iteration and of the learning rate."""
    found: dict = next(filter(None, (_matching(pattern, short) for pattern in _NAMED)), {})
    own = [optimizer for optimizer in found if _kind(optimizer) not in _OTHERS]
    if len(own) != 1:
        raise ValueError(_not_one(short, found, own, config))
    names, prefix = found[own[0]], own[0] and f"{own[0]}/"
    if own[0] == "RMSProp":  # tf.compat.v1's, which has a buffer in any case
        return _in_order(names), "global_step", None, ("buffer",)
    iterations = prefix + "iteration", prefix + "iter", prefix + "_iterations", "iteration"
    rates = prefix + "learning_rate", prefix + "_learning_rate"
    return names, *(next(filter(short.__contains__, keys), None) for keys in (iterations, rates)), ()


def _in_order(names):
    """With the buffer as the last, which stands for the mean where there is none."""
    if any(m.buffer for m in names.values()):
        return names
    return {name: Moments(m.square, None, m.mean) for name, m in names.items()}


def _matching(pattern, short):
    """The keys that a pattern fits: by optimizer with second moments, the model's variable and field."""
    found: dict[str, dict[str, Moments]] = {}
    for match in filter(None, (re.fullmatch(pattern, key) for key in short)):
        names = found.setdefault(match["optimizer"] or "", {})
        moments = names.get(match["name"], Moments())
        names[match["name"]] = moments._replace(**{_WORDS[match["word"]]: match[0]})
    return {o: names for o, names in found.items() if any(m.square for m in names.values())}


def _not_one(short, found, own, config):
    """What to say of variables that are not those of one RMSprop."""
    if own:
        return _several(own)
    if "decay" in config:
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


def _several(optimizers):
    return f"Invalid variables: they are of several optimizers, {' and '.join(map(repr, optimizers))}."


def _kind(optimizer):
    return re.sub(r"_\d+$", "", optimizer.rpartition("/")[2]).lower()


def _counted(matches, short, order, config):
    """The keys by places: one of each kind for each in `order`, the iteration and the learning rate."""
    slots, *heads = _layout(matches, short, config)
    if not slots:
        raise ValueError("Invalid file: its optimizer has not been built, there are no accumulators in it.")
    if order is None:
        raise ValueError(
            "Keras' file counts the optimizer's variables and does not name them: "
            "pass order=[v.path for v in model.trainable_variables]."
        )
    # What Keras makes for each of the model's variables, in its order, also what is not carried over.
    made = {
        "ema": config.get("use_ema"),
        "accumulated": config.get("gradient_accumulation_steps"),
        "square": True,
        "buffer": config.get("momentum"),
        "mean": config.get("centered"),
    }
    fields, count = [field for field, is_made in made.items() if is_made], len(order)
    if len(slots) != len(fields) * count:
        advice = "" if config else "; its configuration, a .keras file's or config=, says which"
        raise ValueError(
            f"Its optimizer has {len(slots)} variables, expected {len(fields)} for each of the "
            f"{count} in order{advice}."
        )
    of_field = {field: slots[i * count : (i + 1) * count] for i, field in enumerate(fields)}
    columns = (of_field.get(field, [None] * count) for field in Moments._fields)
    return dict(zip(order, map(Moments, *columns), strict=True)), *heads, ()


def _layout(matches, short, config):
    """The keys of the arrays, in their order, of the iteration and of the learning rate."""
    optimizers = sorted({match["optimizer"] for match in matches}, key=len)
    optimizer = optimizers[-1]  # those around it repeat its variables
    if not all(map(optimizer.startswith, optimizers)):
        raise ValueError(_several(optimizers))
    keys = {int(match["number"]): match[0] for match in matches if match["optimizer"] == optimizer}
    places = sorted(keys)
    heads = list(filter(short.__contains__, (f"{optimizer}_iterations", f"{optimizer}_learning_rate")))
    if places != list(range(places[0], places[0] + len(keys))) or (places[0] and not heads):
        raise ValueError(f"Invalid file: it has an optimizer with the variables {places}.")
    # Where they have no names they come first. A schedule is no variable, and in Keras 2 no learning rate is.
    own = 0 if heads else 2 - _is_without_rate(config)
    slots = [keys[place] for place in places]
    return slots[own:], *[*heads, *slots[:own], None, None][:2]


def _is_without_rate(config):
    is_keras2 = "decay" in config or "is_legacy_optimizer" in config
    return is_keras2 or isinstance(config.get("learning_rate"), Mapping)

"""Optimizer state in from PyTorch, Keras and Optax, and out to them.

A run that is carried over goes on as if nothing had happened: the accumulators, the momentum buffer and the
number of updates move, with what differs between the frameworks,

    ===========  =============================  =======================  ====================================
    what         here                           PyTorch, timm            Keras
    ===========  =============================  =======================  ====================================
    nu           E[g^2]                         square_avg               velocity
    nu, centred  E[g^2] - E[g]^2                square_avg, grad_avg     velocity, average_gradient
    mu           E[g]                           grad_avg                 average_gradient
    trace        -(learning rate in b), or b    momentum_buffer, b       momentum, the learning rate in b
    count        updates so far                 step                     iteration
    ===========  =============================  =======================  ====================================

`from_torch` and `from_keras` take a state that ``init`` made and return it with all of these replaced;
`to_torch` and `to_keras` do the same for the other framework's state. The accumulators are found by their
type, so the optimizer may be any chain or wrapper of Optax's around :func:`rmsprop_jax.rmsprop`.

Accumulators of :mod:`rmsprop_jax.accumulators` are decoded on the way out and encoded on the way in, those of
each state by its own.

**Names.** `names` maps the other framework's parameter names to paths in the parameters' tree, such as
``{"fc.bias": "fc/bias", "fc.weight": ("fc/kernel", (1, 0))}``: the keys and indices on the way to the leaf,
joined by "/" (:func:`paths` lists them), and for an array that is laid out differently the axes to transpose
theirs with, as in :func:`jax.numpy.transpose`. Parameters it does not list are not carried over.
:func:`params_from` carries the parameters over by the same mapping. Flax NNX's variables hold their array as
`value`, which is no part of the path; leaves that are no arrays, such as an Equinox module's functions, have
none.

A tree of which two leaves have one path, such as ``{"a": {"b": x}, "a/b": y}``, is refused, naming both.

**In part.** A new head, a frozen layer: with ``strict=False`` a parameter that has no state there (it was
never stepped), or no name in `names`, keeps what is in the tree already, and a parameter there that has no
place here is left behind. A :class:`Report` of both goes to ``report=``; without, it is logged, to
``logging.getLogger("rmsprop_jax.interop")``, where `strict` is False or `order` alone says in which of
several groups arrays of one shape are. It says too whose accumulators start anew beside a count that goes on,
by which `bias_correction` and schedules go; a part of :func:`optax.partition` in which all is new keeps its
own count.

**With its hyper-parameters.** :func:`resume_torch` and :func:`resume_keras` also build the optimizer, from
what the other framework's says of itself.

**Out of a file.** In place of a dictionary every function takes the path of a file: `.safetensors`; PyTorch's
`.pt`, `.pth`, `.ckpt` and `.bin`, by ``torch.load(weights_only=True)``, where PyTorch is installed; the
`.keras` and `.h5` of Keras 3 and 2, where h5py is. Nothing in a file is unpickled or executed. TensorFlow's
checkpoints become dictionaries first, see :func:`from_keras`.

**From an older version.** :func:`upgrade` takes states that older versions of this package saved.
"""

import rmsprop_jax.interop._pickled  # noqa: F401  # where pickle.load finds the classes of older versions
from rmsprop_jax.interop._carry import params_from
from rmsprop_jax.interop._files import Tensors
from rmsprop_jax.interop._keras import from_keras, resume_keras, to_keras
from rmsprop_jax.interop._match import Report
from rmsprop_jax.interop._names import Names, paths
from rmsprop_jax.interop._optax import from_optax, to_optax
from rmsprop_jax.interop._resume import resume_torch
from rmsprop_jax.interop._torch import from_torch, to_torch
from rmsprop_jax.interop._upgrade import upgrade

__all__ = [
    "Names",
    "Report",
    "Tensors",
    "from_keras",
    "from_optax",
    "from_torch",
    "params_from",
    "paths",
    "resume_keras",
    "resume_torch",
    "to_keras",
    "to_optax",
    "to_torch",
    "upgrade",
]

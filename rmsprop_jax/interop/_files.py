"""Arrays out of files, by their names there. Nothing is unpickled but by PyTorch's `weights_only`.

=============================  ==========================================================================
.safetensors                   safetensors
.pt, .pth, .ckpt, .bin, .tar   PyTorch's, by ``torch.load(weights_only=True)``: tensors and plain values
.keras, .h5, .hdf5             Keras', by h5py: of a `.keras` file the weights in it, and its JSON
=============================  ==========================================================================

A file that is cut or altered is refused as far as its format has checksums (`.keras` and PyTorch's do) or
its reader finds out. `.h5` has none, and some that are altered keep the HDF5 library busy for ever.
"""

import importlib
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Tensors = Mapping[str, Any] | str | os.PathLike[str]

_TORCH = (".pt", ".pth", ".ckpt", ".bin", ".tar")
_HDF5 = (".h5", ".hdf5")


def load(tensors: Tensors) -> Mapping[str, Any]:
    """The dictionary itself, or the contents of a file; ImportError without the package that reads it."""
    if not isinstance(tensors, str | os.PathLike):
        return tensors
    path = os.fspath(tensors)
    reader = _reader(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"No such file: {path!r}.")
    try:
        return reader(path)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # readers of cut and altered files raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"Invalid file: {path!r} cannot be read: {reason:.1000}.") from error


def keras_config(tensors: Tensors) -> Mapping[str, Any] | None:
    """The ``{"class_name": ..., "config": ...}`` of the optimizer in a `.keras` or `.h5` file, or None."""
    path = os.fspath(tensors) if isinstance(tensors, str | os.PathLike) else ""
    config = None
    try:
        if path.endswith(".keras"):
            with zipfile.ZipFile(path) as archive:
                compiled = json.loads(archive.read("config.json")).get("compile_config") or {}
            config = compiled.get("optimizer")
        elif path.endswith(_HDF5):
            with _package("h5py", path).File(path, "r") as file:
                config = json.loads(file.attrs.get("training_config", "{}")).get("optimizer_config")
    except (ImportError, FileNotFoundError):
        raise
    except Exception as error:
        raise ValueError(f"Invalid file: the configuration in {path!r} cannot be read: {error}") from error
    return config if isinstance(config, Mapping) else None


def _reader(path):
    if os.path.isdir(path):
        if not os.path.exists(os.path.join(path, "saved_model.pb")):
            raise ValueError(
                f"Invalid file: {path!r} is a directory. One of torch.distributed.checkpoint becomes a file "
                "by torch.distributed.checkpoint.format_utils.dcp_to_torch_save."
            )
        raise ValueError(_tensorflow(path, "SavedModel", os.path.join(path, "variables", "variables")))
    if (prefix := re.sub(r"\.(index|data-\d+-of-\d+)$", "", path)) != path or os.path.exists(f"{path}.index"):
        raise ValueError(_tensorflow(path, "checkpoint", prefix))
    readers: dict[str, Callable[[str], Any]] = {".safetensors": _safetensors, ".keras": _keras}
    readers |= dict.fromkeys(_TORCH, _torch) | dict.fromkeys(_HDF5, _hdf5)
    if reader := readers.get(os.path.splitext(path)[1]):
        return reader
    raise ValueError(
        f"Invalid file: {path!r}, expected a dictionary of arrays or a file that ends with .safetensors, "
        f"{', '.join(_TORCH)}, .keras or .h5."
    )


def _package(name, path):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"To read {path!r}, {name.partition('.')[0]} has to be installed.") from error


def _safetensors(path):
    return _package("safetensors.numpy", path).load_file(path)


def _tensorflow(path, kind, prefix):
    return (
        f"Invalid file: {path!r} is a TensorFlow {kind}. Make a dictionary of it, and pass that:\n"
        f"  reader = tf.train.load_checkpoint({prefix!r})\n"
        "  shapes = reader.get_variable_to_shape_map()\n"
        "  variables = {name: reader.get_tensor(name) for name in shapes}"
    )


def _torch(path):
    torch = _package("torch", path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        names = set(re.findall(r"GLOBAL (\S+)", str(error)))
        if not names:
            raise ValueError(str(error).rpartition("WeightsUnpickler error: ")[2]) from error
        if hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint") and zipfile.is_zipfile(path):
            names |= set(torch.serialization.get_unsafe_globals_in_checkpoint(path))  # since 2.6
        found = ", ".join(sorted(names))
        raise ValueError(
            f"it has {found} in it, and no more than tensors and plain values is loaded. If you trust it: "
            f"torch.serialization.add_safe_globals([{found}]) first, or pass "
            "torch.load(path, weights_only=False) in its place"
        ) from None


def _keras(path):
    with zipfile.ZipFile(path) as archive:
        return _hdf5(io.BytesIO(archive.read("model.weights.h5")), path)


def _hdf5(file, path=None):
    """Every array by its name: that of Keras, where the file has it, or its place in the file."""
    h5py = _package("h5py", path or file)
    arrays: dict[str, np.ndarray] = {}
    with h5py.File(file, "r") as root:
        names = {}

        def name_weights(place, node):
            for weight in node.attrs.get("weight_names", []) if isinstance(node, h5py.Group) else []:
                weight = weight.decode() if isinstance(weight, bytes) else str(weight)
                names[f"{place}/{weight}"] = weight

        def read(place, node):
            if not isinstance(node, h5py.Dataset):
                return
            name = names.get(place, place)
            if name in arrays:
                raise ValueError(f"it has {name!r} twice")
            arrays[name] = _values(place, node)

        # It follows neither soft nor external links.
        root.visititems(name_weights)
        root.visititems(read)
        if missing := [place for place, name in names.items() if name not in arrays]:
            raise ValueError(f"it has no {missing[0]!r}")
    return arrays


def _values(place, dataset):
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"the values of {place!r} are in another file")
    values = dataset[()]
    if dataset.attrs.get("dtype") == "bfloat16":
        import ml_dtypes

        return np.asarray(values).view(ml_dtypes.bfloat16).astype(np.float32)
    return values

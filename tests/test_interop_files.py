"""What is read out of files, and what is said of those that are cut, altered or of another kind."""

import argparse
import io
import json
import pickle
import zipfile
from collections import defaultdict
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmsprop_jax import conventions, interop

PARAMS = {"fc": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}}
NAMES = {"fc.weight": ("fc/kernel", (1, 0)), "fc.bias": "fc/bias"}
KERAS_NAMES = {"net/fc/kernel": "fc/kernel", "net/fc/bias": "fc/bias"}
KERAS_CONFIG = {"name": "rmsprop", "learning_rate": 0.1, "rho": 0.9, "momentum": 0.9, "centered": False}
GROUP = {"lr": 0.1, "alpha": 0.99, "eps": 1e-8, "momentum": 0.9, "centered": False, "weight_decay": 0}


def importorskip(name):
    return pytest.importorskip(name, reason=f"{name} is not installed: make peers")


def arrays():
    rng = np.random.default_rng(0)
    return {
        name: {what: rng.random(shape, np.float32) for what in ("square_avg", "momentum_buffer")}
        for name, shape in (("fc.weight", (3, 5)), ("fc.bias", (3,)))
    }


def state_dict(named=True):
    state = {i: {"step": np.float32(7), **entry} for i, entry in enumerate(arrays().values())}
    names = {"param_names": list(NAMES)} if named else {}
    return {"state": state, "param_groups": [{**GROUP, "foreach": None, "params": [0, 1], **names}]}


def torch_file(path):
    torch = importorskip("torch")
    tensors = jax.tree.map(lambda x: torch.from_numpy(np.array(x)), state_dict()["state"])
    torch.save({"state": tensors, "param_groups": state_dict()["param_groups"]}, path)


def safetensors_file(path):
    flat = {f"state.{n}.{what}": x for n, entry in arrays().items() for what, x in entry.items()}
    steps = {f"state.{n}.step": np.float32(7) for n in NAMES}
    settings = {**GROUP, "maximize": 0}
    groups = {f"param_groups.{n}.{k}": np.asarray(v) for n in NAMES for k, v in settings.items()}
    importorskip("safetensors.numpy").save_file(
        {k: np.asarray(x) for k, x in (flat | steps | groups).items()}, path
    )


def stored(file):
    values = arrays().values()
    order = [7, np.float32(0.1), *(e["square_avg"] for e in values), *(e["momentum_buffer"] for e in values)]
    with importorskip("h5py").File(file, "w") as root:
        for i, x in enumerate(order):
            root[f"optimizer/vars/{i}"] = np.asarray(x).T
        root["layers/fc/vars/0"] = np.ones((5, 3))


def keras_file(path):
    weights = io.BytesIO()
    stored(weights)
    config = {"class_name": "RMSprop", "config": KERAS_CONFIG}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps({"compile_config": {"optimizer": config}}))
        archive.writestr("model.weights.h5", weights.getvalue())


def h5_file(path):
    with importorskip("h5py").File(path, "w") as root:
        group = root.create_group("optimizer_weights")
        values = {"rmsprop/iteration": np.int32(7), "rmsprop/learning_rate": np.float32(0.1)}
        for name, entry in arrays().items():
            end = {"fc.weight": "net_fc_kernel", "fc.bias": "net_fc_bias"}[name]
            values[f"rmsprop/{end}_velocity"] = entry["square_avg"].T
            values[f"rmsprop/{end}_momentum"] = entry["momentum_buffer"].T
        for name, value in values.items():
            group[name] = value
        group.attrs["weight_names"] = list(values)
        config = {"optimizer_config": {"class_name": "RMSprop", "config": KERAS_CONFIG}}
        root.attrs["training_config"] = json.dumps(config)


def read_torch(path):
    return interop.resume_torch(path, PARAMS, NAMES)[1]


def read_keras(path):
    return interop.resume_keras(path, PARAMS, KERAS_NAMES, order=list(KERAS_NAMES))[1]


FILES = {
    "optimizer.pt": (torch_file, read_torch),
    "optimizer.safetensors": (safetensors_file, read_torch),
    "model.keras": (keras_file, read_keras),
    "model.h5": (h5_file, read_keras),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_holds_what_the_dictionary_does(name, tmp_path):
    write, read = FILES[name]
    write(tmp_path / name)
    expected = interop.resume_torch(state_dict(), PARAMS, NAMES)[1]
    state = read(str(tmp_path / name))
    for field in ("nu", "count"):
        chex.assert_trees_all_equal(getattr(of_rms(state), field), getattr(of_rms(expected), field))


def of_rms(state):
    return next(x for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "nu")) if hasattr(x, "nu"))


@pytest.mark.filterwarnings("ignore")  # zipfile's and PyTorch's, of what the file is
@pytest.mark.parametrize("name", FILES)
def test_cut_and_altered_files_give_an_error_or_a_whole_state(name, tmp_path):
    write, read = FILES[name]
    write(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    structure = jax.tree.structure(read(tmp_path / name))
    rng, errors = np.random.default_rng(0), 0
    for trial in range(120):
        data = bytearray(whole)
        # An altered .h5 can keep the HDF5 library itself busy for ever; a .keras file has checksums.
        if trial % 3 == 0 or name.endswith(".h5"):
            data = data[: rng.integers(len(data))]
        elif trial % 3 == 1:
            for place in rng.integers(len(data), size=8):
                data[place] = rng.integers(256)
        else:
            start, length = rng.integers(len(data)), rng.integers(1, 200)
            data[start : start + length] = bytes(length) if trial % 2 else b""
        (tmp_path / name).write_bytes(data)
        try:
            state = read(tmp_path / name)
        except ValueError:
            errors += 1
        else:  # what was hit was a number, or nothing that is read
            assert jax.tree.structure(state) == structure
            chex.assert_tree_all_finite(of_rms(state).count)
    assert errors > 30


class Executed(Exception):  # noqa: N818
    pass


def executed():
    raise Executed


class Payload:
    def __reduce__(self):
        return executed, ()


def test_nothing_in_a_file_is_executed(tmp_path):
    torch = importorskip("torch")
    torch.save({"state": {}, "param_groups": [], "extra": Payload()}, tmp_path / "optimizer.pt")
    for name, write in (
        ("optimizer.pt", lambda path: None),
        ("optimizer.bin", lambda path: path.write_bytes(pickle.dumps(Payload()))),
    ):
        write(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}' cannot be read"):
            interop.from_torch(tmp_path / name, conventions.torch().init(PARAMS), PARAMS, NAMES)


class Own:
    pass


REFUSED = {  # what a checkpoint had beside its tensors, and what is said of it
    "argparse.Namespace": lambda torch: argparse.Namespace(lr=0.1),
    "numpy._core.multiarray.scalar, numpy.dtype": lambda torch: np.float64(3),
    "numpy._core.multiarray._reconstruct, numpy.dtype, numpy.ndarray": lambda torch: np.random.get_state(),
    "pathlib.PosixPath": lambda torch: Path("run"),
    f"{__name__}.Own": lambda torch: Own(),
    "builtins.list, collections.defaultdict": lambda torch: defaultdict(list),
    "torch.nn.modules.linear.Linear": lambda torch: torch.nn.Linear(2, 2),
}


@pytest.mark.skipif(np.__version__ < "2", reason="NumPy 1 names its classes otherwise")
@pytest.mark.parametrize(
    ("found", "is_zip"), [*((found, True) for found in REFUSED), ("pathlib.PosixPath", False)]
)
def test_what_stands_in_the_way_of_a_safe_load_is_named(found, is_zip, tmp_path):
    torch = importorskip("torch")
    run = {"state": {}, "param_groups": [], "extra": REFUSED[found](torch)}
    torch.save(run, tmp_path / "run.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=r"run\.pt' cannot be read") as error:
        interop.from_torch(tmp_path / "run.pt", None, PARAMS, NAMES)
    message = str(error.value)
    assert f"add_safe_globals([{found}])" in message
    assert "torch.load(path, weights_only=False)" in message
    assert message.isprintable()


def test_values_in_another_file_are_not_read(tmp_path):
    h5py = importorskip("h5py")
    (tmp_path / "secret").write_bytes(bytes(60))
    with h5py.File(tmp_path / "model.h5", "w") as root:
        external = [(tmp_path / "secret", 0, 60)]
        root.create_dataset("rmsprop/fc_velocity", (15,), "f4", external=external)
    with pytest.raises(ValueError, match="the values of 'rmsprop/fc_velocity' are in another file"):
        interop.params_from(tmp_path / "model.h5", PARAMS, NAMES)


@pytest.mark.parametrize(
    ("name", "package"),
    [("a.pt", "torch"), ("a.safetensors", "safetensors"), ("a.keras", "h5py"), ("a.h5", "h5py")],
)
def test_a_package_that_is_missing_is_named(name, package, tmp_path, monkeypatch):
    importorskip("h5py")
    (keras_file if name == "a.keras" else h5_file)(tmp_path / name)
    for module in (package, f"{package}.numpy"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=f"To read .*{name}', {package} has to be installed"):
        interop.params_from(tmp_path / name, PARAMS, NAMES)


def adam():
    entry = {"step": 7, "exp_avg": np.zeros(3), "exp_avg_sq": np.zeros(3)}
    return {"state": {0: entry, 1: entry}, "param_groups": state_dict()["param_groups"]}


WRONG = {
    "the state alone": (lambda: state_dict()["state"], "it is the 'state' of an optimizer alone, with 0, 1"),
    "without groups": (
        lambda: {"state": state_dict()["state"]},
        r"an optimizer's state without param_groups, expected optimizer\.state_dict\(\)",
    ),
    "the groups alone": (lambda: state_dict()["param_groups"], r"it is a dictionary with 'lr', 'alpha'"),
    "a model": (lambda: {"fc.weight": np.ones(3)}, "a dictionary of arrays, with 'fc.weight', as a model's"),
    "nested": (
        lambda: {"epoch": 3, "run": {"optim": state_dict()}},
        r"a dictionary with 'epoch', 'run', expected .*: pass optimizer_state\['run'\]\['optim'\]\.",
    ),
    "two optimizers": (
        lambda: {"optimizer_states": [state_dict(), state_dict()]},
        r"a list of 2, expected .*: pass optimizer_state\['optimizer_states'\]\[0\] or ",
    ),
    "an empty dictionary": (dict, "it is an empty dictionary"),
    "no step": (lambda: {**state_dict(), "state": {}}, "it is empty, its optimizer has not taken a step"),
    "Adam": (adam, "it is Adam's, with 'step', 'exp_avg', 'exp_avg_sq', expected RMSprop's"),
    "SGD": (
        lambda: {**state_dict(), "state": {0: {"momentum_buffer": np.ones(3)}}},
        "it is that of another optimizer, with 'momentum_buffer'",
    ),
    "Adadelta": (
        lambda: {**state_dict(), "state": {0: {"square_avg": np.ones(3), "acc_delta": np.ones(3)}}},
        "it is Adadelta's",
    ),
    "an odd step": (
        lambda: {**state_dict(), "state": {0: {"step": np.nan, "square_avg": np.ones(3)}}},
        "Invalid step: nan, expected a whole number",
    ),
    "no array": (
        lambda: {**state_dict(), "state": {0: {"step": 1, "square_avg": "x"}, 1: {"square_avg": {}}}},
        r"'fc\.weight' has a square_avg of type .*, which is no array of numbers",
    ),
    "a list": (lambda: {"state": [], "param_groups": []}, "its 'state' is no dictionary of dictionaries"),
    "a group of nothing": (lambda: {"state": {}, "param_groups": [3]}, "no list of groups with 'params'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_rmsprop_state_is_told_in_a_sentence(what):
    theirs, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        interop.from_torch(theirs(), conventions.torch().init(PARAMS), PARAMS, NAMES)

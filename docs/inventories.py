"""Where the names of other projects that the pages refer to are documented.

Sphinx usually downloads each project's inventory of all its names. The few that are used are listed here
instead, so that the site builds without a network, and a new reference is a line.
"""

import zlib

# {project: (where its documentation is, {name: (role, page)})}
PROJECTS = {
    "python": (
        "https://docs.python.org/3/",
        {
            "ImportError": ("exception", "library/exceptions.html"),
            "ValueError": ("exception", "library/exceptions.html"),
        },
    ),
    "jax": (
        "https://docs.jax.dev/en/latest/",
        {
            name: ("function", f"_autosummary/{name}.html")
            for name in ("jax.numpy.transpose", "jax.value_and_grad")
        },
    ),
    "numpy": (
        "https://numpy.org/doc/stable/",
        {"numpy.ndarray": ("class", "reference/generated/numpy.ndarray.html")},
    ),
    "optax": (
        "https://optax.readthedocs.io/en/latest/",
        {
            "optax.GradientTransformationExtraArgs": ("class", "api/transformations.html"),
            "optax.Schedule": ("class", "api/optimizer_schedules.html"),
            "optax.adamw": ("function", "api/optimizers.html"),
            "optax.apply_if_finite": ("function", "api/optimizer_wrappers.html"),
            "optax.contrib.split_real_and_imaginary": ("function", "api/contrib.html"),
            "optax.inject_hyperparams": ("function", "api/optimizer_schedules.html"),
            "optax.partition": ("function", "api/combining_optimizers.html"),
            "optax.rmsprop": ("function", "api/optimizers.html"),
        },
    ),
    "flax": (
        "https://flax.readthedocs.io/en/latest/",
        {"flax.nnx.optimizer.Optimizer": ("class", "api_reference/flax.nnx/training/optimizer.html")},
    ),
    "matplotlib": (
        "https://matplotlib.org/stable/",
        {"matplotlib.figure.Figure": ("class", "api/figure_api.html")},
    ),
}


def mapping(folder):
    """`intersphinx_mapping`, after the inventories are written into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for project, (url, names) in PROJECTS.items():
        path = folder / f"{project}.inv"
        path.write_bytes(_inventory(project, names))
        found[project] = (url, str(path))
    return found


def _inventory(project, names):
    """Sphinx's format: four lines, and the compressed names with role, priority, place and title."""
    head = [
        "# Sphinx inventory version 2",
        f"# Project: {project}",
        "# Version: ",
        "# The remainder of this file is compressed using zlib.",
    ]
    body = [f"{name} py:{role} 1 {page}#$ -" for name, (role, page) in sorted(names.items())]
    return "\n".join([*head, ""]).encode() + zlib.compress("\n".join([*body, ""]).encode())

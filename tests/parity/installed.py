"""The other frameworks, where they are installed; a test that needs one that is not is skipped."""

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import warnings

import pytest


def package(name):
    """The module of that name, whose import may warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name.split('.')[0]} is not installed: make peers")


def module(distribution, folder, name):
    """One module of an installed distribution without the packages around it, which import much more."""
    try:
        path = importlib.metadata.distribution(distribution).locate_file(folder)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed: make peers")
    parent = f"_{folder.replace('/', '_')}"
    if parent not in sys.modules:
        spec = importlib.machinery.ModuleSpec(parent, loader=None, is_package=True)
        spec.submodule_search_locations = [str(path)]
        sys.modules[parent] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{parent}.{name}")

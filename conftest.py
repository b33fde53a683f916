"""What all tests and doctests share: compiled programs kept on disk and not in memory."""

import collections
import ctypes
import gc
import os

import jax
import pytest

# glibc keeps what is freed: after four files a worker had 740 MB where it needs 270. Others lack it.
malloc_trim = getattr(ctypes.CDLL(None) if os.name == "posix" else None, "malloc_trim", lambda pad: 0)
LARGEST_CACHE = 2**30  # bytes
LONGEST = ("test_sharding.py", "test_multi_process.py", "test_examples.py")


def pytest_addoption(parser):
    parser.addoption("--cases", type=int, help="of a test with more parameters the first ones and the last")
    parser.addoption("--unoptimized", action="store_true", help="compile in half the time, to slower code")


def configure(name, value):
    """JAX in this process, and in those that tests start."""
    os.environ.setdefault(name.upper(), str(value))
    jax.config.update(name, value)


def pytest_configure(config):
    """Programs are compiled once for all workers, for the processes that tests start, and for the next run.

    `make clean`, or pytest's `--cache-clear`, empties the cache; JAX compiles what another version wrote.
    """
    if config.option.unoptimized:
        configure("jax_disable_most_optimizations", True)
        if jax.__version_info__ < (0, 11, 1):  # XLA has had its older code for CPUs until then
            os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false " + os.environ.get("XLA_FLAGS", "")
    if not hasattr(config, "cache"):  # -p no:cacheprovider
        return
    folder = config.cache.mkdir("jax")
    if not hasattr(config, "workerinput") and sum(x.stat().st_size for x in folder.iterdir()) > LARGEST_CACHE:
        for path in folder.iterdir():
            path.unlink()
    configure("jax_compilation_cache_dir", str(folder))
    configure("jax_persistent_cache_min_compile_time_secs", 0)


def pytest_collection_modifyitems(config, items):
    """The longest files begin first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if cases := config.option.cases:
        of_tests = collections.defaultdict(list)
        for item in items:
            of_tests[item.path, getattr(item, "originalname", item.name)].append(item)
        left_out = {item for same in of_tests.values() for item in same[cases - 1 : -1]}
        config.hook.pytest_deselected(items=[*left_out])
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """A file's programs go with it: all of them together would take gigabytes."""
    result = yield
    if nextitem is None or nextitem.path != item.path:
        jax.clear_caches()
        gc.collect()
        gc.freeze()  # what is left are modules: with other frameworks' a collection takes a second
        malloc_trim(0)
    return result

"""The house: who may import whom, how long a file may be, and that the import itself does nothing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rmsprop_jax

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rmsprop_jax"
FILES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(path):
    """The package's own modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            module = name.removeprefix("rmsprop_jax.")
            if module != name and module in FILES:
                yield module


def layers():
    """CONTRIBUTING.md's table, from the ground up: a file imports only from lines above its own."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", text, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    return {module: int(number) for number, cell in rows for module in re.findall(r"`([\w.]+)`", cell)}


def test_every_file_has_its_layer():
    assert set(layers()) == {name for name in FILES if not name.endswith("__init__")}


@pytest.mark.parametrize("name", FILES)
def test_imports_run_downwards(name):
    of = layers()
    own = of.get(name, max(of.values()) + 1)  # an __init__ hands names on, and stands above its folder
    above = [module for module in imports(FILES[name]) if of.get(module, own + 1) >= own]
    if name.endswith("__init__"):
        above = [module for module in above if module in of and of[module] > own]
    assert not above


def test_no_file_is_long():
    """300 lines, but for the catalogue of conventions."""
    everything = [
        path
        for folder in ("rmsprop_jax", "tests", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*.py")
    ]
    lines = {path.name: len(path.read_text().splitlines()) for path in everything}
    assert {name for name, count in lines.items() if count > 300} <= {"conventions.py"}


def test_every_public_module_says_what_is_public():
    for name in rmsprop_jax.__all__:
        module = getattr(rmsprop_jax, name)
        if type(module).__name__ == "module":
            assert all(hasattr(module, public) for public in module.__all__)


def test_the_import_starts_no_backend():
    """Or `jax.distributed.initialize` and `jax_num_cpu_devices` would come too late."""
    program = (
        "import jax, rmsprop_jax\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "assert jax.device_count() == 3\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"JAX_PLATFORMS": "cpu", "PATH": ""})

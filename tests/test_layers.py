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


def imports(name):
    """The package's own modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for imported in (imported.removeprefix("rmsprop_jax.") for imported in names):
            yield from {imported, f"{imported}.__init__"} & FILES.keys()


def floors():
    """CONTRIBUTING.md's table: the line of each file, or of its folder; the package itself is above all."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    lines = re.findall(r"^\| (\d+) \| (.*?) \|", text, re.MULTILINE)
    assert [int(number) for number, _ in lines] == list(range(1, len(lines) + 1))
    of = {place: int(number) for number, cell in lines for place in re.findall(r"`([\w./]+)`", cell)}
    assert set(of) == {f"{name.split('.')[0]}/" if "." in name else name for name in FILES} - {"__init__"}
    return {name: of.get(name, of.get(f"{name.split('.')[0]}/", len(lines) + 1)) for name in FILES}


@pytest.mark.parametrize("name", FILES)
def test_imports_run_downwards(name):
    of = floors()
    assert not [imported for imported in imports(name) if of[imported] > of[name]]


def test_there_is_no_circle():
    below = {name: set(imports(name)) for name in FILES}
    while free := [name for name, imported in below.items() if not imported & below.keys()]:
        for name in free:
            del below[name]
    assert not below


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

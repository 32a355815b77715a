"""Importing costs nothing, asks nobody, and finds every public name."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jtl
from jtl.recipes import settings

ROOT = Path(__file__).parent.parent

# Any attempt to reach another machine ends the process, also where the caller would swallow an exception.
GUARD = """
import os, sys
def guard(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print("network:", event, args, file=sys.stderr, flush=True)
        os._exit(99)
sys.addaudithook(guard)
"""


def _run(code, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"} | environment
    command = [sys.executable, "-c", GUARD + code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def _printed(code, **environment):
    result = _run(code, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_guard_sees_a_connection():
    assert _run("import socket; socket.socket().connect(('127.0.0.1', 9))").returncode == 99


def test_importing_jtl_imports_nothing_but_the_standard_library():
    code = """
before = set(sys.modules)
import jtl
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names)))
"""
    assert _printed(code) == "['jtl']"


def test_importing_every_file_asks_nobody():
    code = """
import importlib, pkgutil, jtl
names = [found.name for found in pkgutil.walk_packages(jtl.__path__, "jtl.")]
for name in names:
    if name not in ("jtl.__main__", "jtl.data.rotten_tomatoes"):  # the latter imports tensorflow_datasets
        importlib.import_module(name)
print(len(names))
"""
    assert int(_printed(code)) == len(list((ROOT / "jtl").rglob("*.py"))) - 1


def test_every_public_name_resolves_and_is_listed():
    for name in jtl.__all__:
        assert getattr(jtl, name) is not None
    assert set(jtl.__all__) <= set(dir(jtl))
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        _ = jtl.trainer


def test_type_checkers_and_the_lazy_table_see_the_same_names():
    tree = ast.parse((ROOT / "jtl" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    lazy = dict.fromkeys(jtl._MODULES, "jtl") | {name: f"jtl.{module}" for name, module in jtl._NAMES.items()}
    assert seen == lazy
    assert len(jtl.__all__) == len(set(jtl.__all__))


COMMANDS = [name.lower() for name in ("Quickstart", "Finetune", "Models", "Inspect")]


@pytest.mark.parametrize(
    "command", [[], *([name] for name in COMMANDS)], ids=lambda command: " ".join(command) or "jtl"
)
def test_help_imports_no_framework_and_asks_nobody(command):
    code = f"""
from jtl import cli
try:
    cli.main({[*command, "--help"]})
except SystemExit as end:
    heavy = {{"jax", "flax", "numpy", "transformers", "huggingface_hub", "tensorflow_datasets"}} & set(sys.modules)
    print("end", end.code, sorted(heavy))
"""
    assert _printed(code).endswith("end 0 []")


def test_help_names_every_setting():
    for command in (settings.Finetune, settings.Quickstart):
        text = _printed(f"from jtl import cli; cli.main(['{command.__name__.lower()}', '--help'])", COLUMNS="200")
        for field in command.__dataclass_fields__:
            assert f"--{field.replace('_', '-')}" in text

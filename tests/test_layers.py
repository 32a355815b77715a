"""The house rules that a reader can see in the source: who imports whom, and what is nowhere used."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "jtl").rglob("*.py"))

# From the bottom up. A file imports from its own package and from tiers below its own.
TIERS = (
    ("typing", "errors", "labels", "activations"),
    ("plots", "compiling"),
    ("tree",),
    ("losses", "heads"),
    ("metrics",),
    ("rules", "quantized"),
    ("masks", "modes", "schedule"),
    ("state", "interop"),
    ("transforms",),
    ("step",),
    ("objective", "boundary", "mixout", "surgery", "soups", "auditing", "precision", "memory"),
    ("augment", "pairs"),
    ("weights",),
    ("models",),
    ("pretrained", "checkpoint", "strategies", "peft", "generation"),
    ("export",),
    ("data", "parallel"),
    ("cache",),
    ("runs",),
    ("loop", "sweeps", "rates"),
    ("stopping", "overfitting", "comparing"),
    ("report",),
    ("recipes",),
    ("cli",),
    ("__main__",),
)
TIER = {unit: height for height, tier in enumerate(TIERS) for unit in tier}

# What files may import as they are imported; everything else waits for the function that needs it.
FRAMEWORK = {"jax", "flax", "optax"}
LIGHT = {"numpy", "ml_dtypes", "safetensors", "rich", "tyro"}
WITHOUT_FRAMEWORK = ("errors", "cli", "__main__", "data", "weights", "recipes/settings")
EXCEPTIONS = {
    "data/rotten_tomatoes.py": {"tensorflow_datasets"},  # a dataset builder, imported when it is registered
    "weights/convert.py": {"jax"},  # the step from arrays of a file to arrays of a device
}

# Import names that differ from the names of the distributions that pyproject.toml declares.
DISTRIBUTION = {
    "orbax": "orbax-checkpoint",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "scipy": "jax",
}  # scipy is a requirement of jax


def _name(file):
    return file.relative_to(ROOT / "jtl").as_posix()


def _unit(file):
    return _name(file).split("/")[0].removesuffix(".py")


def _imports(tree):
    """Each imported module with the name taken from it, and whether the import runs with the file."""
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, id(node) not in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from ((node.module, alias.name, id(node) not in late) for alias in node.names)


def _parsed(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def _units(tree):
    """The parts of jtl that a file imports; the name `jtl` alone is the lazy top, which reaches all of them."""
    for module, name, _ in _imports(tree):
        package, _, rest = module.partition(".")
        if package == "jtl":
            yield rest.split(".")[0] or name or "jtl"


def test_the_table_of_tiers_names_every_part():
    assert {_unit(file) for file in FILES} - {"__init__"} == set(TIER)


@pytest.mark.parametrize("file", [file for file in FILES if _unit(file) != "__init__"], ids=_name)
def test_imports_go_downwards(file):
    unit = _unit(file)
    allowed = {unit, *(other for other in TIER if TIER[other] < TIER[unit])}
    if unit == "recipes":
        allowed.add("jtl")
    assert set(_units(_parsed(file))) <= allowed


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_a_file_imports_at_its_top_only_what_is_light_or_its_subject(file):
    name = _name(file)
    bare = any(name == f"{part}.py" or name.startswith((f"{part}/", f"{part}.")) for part in WITHOUT_FRAMEWORK)
    allowed = LIGHT | EXCEPTIONS.get(name, set()) | (set() if bare else FRAMEWORK)
    found = {module.split(".")[0] for module, _, early in _imports(_parsed(file)) if early}
    assert found - set(sys.stdlib_module_names) - {"jtl"} <= allowed


def test_every_import_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    user = [line for name, lines in extras.items() if name not in ("test", "torch") for line in lines]
    lines = [*project["dependencies"], *user]
    declared = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in lines}
    found = {module.split(".")[0] for file in FILES for module, _, _ in _imports(_parsed(file))}
    foreign = found - set(sys.stdlib_module_names) - {"jtl"}
    assert {DISTRIBUTION.get(name, name).replace("-", "_") for name in foreign} <= declared
    assert not {"torch", "tensorflow"} & foreign


def test_one_file_knows_of_orbax():
    found = {
        _name(file) for file in FILES for module, _, _ in _imports(_parsed(file)) if module.split(".")[0] == "orbax"
    }
    assert found == {"checkpoint.py"}


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_no_file_outgrows_a_room(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_nothing_runs_foreign_code_and_no_mistake_is_an_assertion(file):
    """Called names and arguments, not words: a docstring may speak of what it refuses."""
    tree = _parsed(file)
    modules = {module.split(".")[0] for module, _, _ in _imports(tree)}
    assert not modules & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: an assert vanishes under -O"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "eval", "exec", "compile", "__import__"), f"line {node.lineno}"
            for keyword in node.keywords:
                if keyword.arg in ("allow_pickle", "trust_remote_code"):
                    assert ast.unparse(keyword.value) == "False", f"line {node.lineno}"


SCRIPTS = sorted(file for folder in ("experiments", "benchmarks", "examples") for file in (ROOT / folder).rglob("*.py"))


def test_scripts_use_the_public_library_alone():
    import jtl

    for file in SCRIPTS:
        tree = _parsed(file)
        for module, name, _ in _imports(tree):
            if module.split(".")[0] == "jtl":
                public = module.split(".")[1:2] or ([name] if name else [])
                assert set(public) <= {*jtl.__all__, "cli"}, f"{file}: {module}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                assert not private, f"{file}, line {node.lineno}: {node.attr}"

"""Who may import whom, and what every module owes its readers. Read from the source by `ast`; nothing is imported."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("jaxlib_ext", "models", "algorithms", "experiments")
MAY_IMPORT = {
    "jaxlib_ext": {"jaxlib_ext"},
    "models": {"models", "jaxlib_ext"},
    "algorithms": {"algorithms", "jaxlib_ext"},
    "experiments": {"experiments", "algorithms", "models", "jaxlib_ext"},
}
OUTSIDE = {"jaxlib_ext": {"jax", "numpy", "chex"}, "algorithms": {"jax", "numpy", "chex", "optax"}}  # beside the standard library
LIBRARY = ("jaxlib_ext", "models", "algorithms")
MODULES = {
    ".".join(("janax", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for layer in LAYERS
    for path in sorted((ROOT / layer).rglob("*.py"))
    if "_namespace" not in path.parts
} | {"janax": ROOT / "jaxlib_ext" / "_namespace" / "__init__.py"}
PACKAGES = {name: path for name, path in MODULES.items() if path.name == "__init__.py"}


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`; imports inside functions count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for statement in node.orelse:
                yield statement
                yield from runtime_nodes(statement)
        else:
            yield node
            yield from runtime_nodes(node)


def imported(tree: ast.Module, module: str, *, package: bool = False) -> set[str]:
    """Absolute dotted names that the module imports; `from a import b` gives a.b, which may be a module or something in it."""
    names = set()
    for node in runtime_nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + package]
                base = ".".join([*above, base] if base else above)
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif (
            isinstance(node, ast.Call)
            and node.args
            and ast.unparse(node.func) in ("import_module", "importlib.import_module", "__import__")
        ):
            argument = node.args[0]
            names |= {argument.value} if isinstance(argument, ast.Constant) else set()
    return names


def import_faults(source: str, module: str, *, package: bool = False) -> list[str]:
    """Imports against the direction of the layers, or of what a layer does without."""
    layer = [*module.split("."), ""][1]
    if not layer:
        return []
    faults = []
    for name in sorted(imported(ast.parse(source), module, package=package)):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top == "janax" and target in LAYERS and target not in MAY_IMPORT[layer]:
            faults.append(f"{module} imports {name}: {layer} may import {', '.join(sorted(MAY_IMPORT[layer]))}")
        elif top in LAYERS:
            faults.append(f"{module} imports {name}: write janax.{name}")
        elif top != "janax" and top not in sys.stdlib_module_names and top not in OUTSIDE.get(layer, {top}):
            faults.append(f"{module} imports {name}: {layer} uses {', '.join(sorted(OUTSIDE[layer]))} only")
    return faults


def public_names(tree: ast.Module) -> list[str] | None:
    """`__all__`, if it is there as a literal."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets):
            return ast.literal_eval(node.value)
    return None


def reader_faults(source: str, module: str) -> list[str]:
    """Missing docstrings and `__all__`, and what a library layer does not do: print, log, leave."""
    tree = ast.parse(source)
    faults = [] if ast.get_docstring(tree) else [f"{module} has no docstring"]
    public = public_names(tree)
    private = module.rpartition(".")[2].startswith("_")
    if public is None and not private and len(tree.body) > 1:  # a docstring alone offers nothing
        faults.append(f"{module} has no __all__")
    public = public or []
    faults += [f"{module}.__all__ names {name} twice" for name in sorted(set(public)) if public.count(name) > 1]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name in public and not ast.get_docstring(node):
            faults.append(f"{module}.{node.name} is public and has no docstring")
    if any(module.startswith(f"janax.{layer}") for layer in LIBRARY):
        called = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        faults += [
            f"{module}:{node.lineno} prints" for node in called if ast.unparse(node.func) in ("print", "jax.debug.print", "debug.print")
        ]
        faults += [
            f"{module}:{node.lineno} leaves" for node in called if ast.unparse(node.func) in ("exit", "quit", "sys.exit", "os._exit")
        ]
        faults += [f"{module} logs" for name in imported(tree, module) if name.partition(".")[0] == "logging"]
    return faults


def lazy_names(source: str) -> list[str] | None:
    """The modules that a package loads on first use, or None if it is not of that kind."""
    tree = ast.parse(source)
    public = public_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "_lazy_modules":
            listed = ast.unparse(node.args[1])
            return {"__all__": public, "__all__[1:]": (public or [])[1:]}[listed]
    return None


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    assert import_faults(MODULES[module].read_text(), module, package=module in PACKAGES) == []


@pytest.mark.parametrize("module", MODULES)
def test_modules_say_what_they_are_and_offer(module):
    assert reader_faults(MODULES[module].read_text(), module) == []


def test_lazy_packages_list_their_modules():
    lazy = {name: listed for name, path in PACKAGES.items() if (listed := lazy_names(path.read_text())) is not None}
    there = {
        package: sorted(
            name.rpartition(".")[2]
            for name in MODULES
            if name.rpartition(".")[0] == package and not name.rpartition(".")[2].startswith("_")
        )
        for package in lazy
    }
    assert {package: sorted(listed) for package, listed in lazy.items()} == there
    assert set(lazy) >= {"janax", "janax.jaxlib_ext", "janax.models", "janax.algorithms"}


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("janax.algorithms.x", "from janax.models import dit", "janax.algorithms.x imports janax.models.dit: algorithms may import"),
        ("janax.algorithms.x", "from janax import models", "imports janax.models"),
        ("janax.algorithms.x", "import janax.experiments.cli as c", "imports janax.experiments.cli"),
        ("janax.algorithms.x", "def f():\n    from janax.models import dit", "imports janax.models.dit"),
        ("janax.algorithms.x", "import importlib\nimportlib.import_module('janax.models.dit')", "imports janax.models.dit"),
        ("janax.algorithms.x", "from ..models import dit", "imports janax.models.dit"),
        ("janax.algorithms.x", "from .. import models", "imports janax.models"),
        ("janax.algorithms.x", "import flax.nnx", "algorithms uses chex, jax, numpy, optax only"),
        ("janax.algorithms.x", "if TYPE_CHECKING:\n    pass\nelse:\n    import flax", "imports flax"),
        ("janax.jaxlib_ext.x", "import optax", "jaxlib_ext uses chex, jax, numpy only"),
        ("janax.jaxlib_ext.x", "from janax.algorithms import bdia", "jaxlib_ext may import jaxlib_ext"),
        ("janax.models.x", "from janax.algorithms import bdia", "models may import jaxlib_ext, models"),
        ("janax.experiments.x", "from models import dit", "write janax.models.dit"),
    ],
)
def test_a_wrong_import_is_found(module, source, fault):
    (found,) = import_faults(source, module)
    assert fault in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "janax.algorithms.x",
            "import math, jax.numpy as jnp\nfrom janax.jaxlib_ext import checks\nfrom janax.algorithms.bdia import grid\nimport optax",
        ),
        ("janax.algorithms.x", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from janax.models import dit"),
        ("janax.algorithms.x", "from . import bdia\nfrom janax import _lazy_modules"),
        ("janax.experiments.x", "import rich\nfrom janax.models import dit\nfrom janax.algorithms import bdia"),
    ],
)
def test_a_right_import_passes(module, source):
    assert import_faults(source, module) == []


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("janax.experiments.x", "__all__ = []", "has no docstring"),
        ("janax.experiments.x", '"""Doc."""\nx = 1', "has no __all__"),
        ("janax.experiments.x", '"""Doc."""\n__all__ = ["f"]\ndef f(): ...', "x.f is public and has no docstring"),
        ("janax.experiments.x", '"""Doc."""\n__all__ = ["F"]\nclass F: ...', "x.F is public and has no docstring"),
        ("janax.experiments.x", '"""Doc."""\n__all__ = ["a", "a"]', "names a twice"),
        ("janax.models.x", '"""Doc."""\n__all__ = []\ndef _f(x):\n    print(x)', "x:4 prints"),
        ("janax.algorithms.x", '"""Doc."""\n__all__ = []\njax.debug.print("x")', "x:3 prints"),
        ("janax.jaxlib_ext.x", '"""Doc."""\n__all__ = []\nimport logging', "logs"),
        ("janax.models.x", '"""Doc."""\n__all__ = []\nsys.exit(1)', "x:3 leaves"),
    ],
)
def test_a_careless_module_is_found(module, source, fault):
    (found,) = reader_faults(source, module)
    assert fault in found


def test_a_careful_module_passes():
    source = '"""Doc with print(x)."""\n__all__ = ["f"]\ndef f():\n    """Does."""\ndef _g(): ...'
    assert reader_faults(source, "janax.models.x") == []
    assert reader_faults('"""Doc."""', "janax.experiments") == []
    assert reader_faults('"""Doc."""\n__all__ = []\nprint(1)', "janax.experiments.x") == []


def test_the_list_of_a_lazy_package_is_read():
    source = '__all__ = ["a", "b"]\n__getattr__, __dir__ = _lazy_modules(__name__, {})'
    assert lazy_names(source.format("__all__")) == ["a", "b"] and lazy_names(source.format("__all__[1:]")) == ["b"]
    assert lazy_names('__all__ = ["a"]') is None

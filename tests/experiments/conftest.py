"""The toy experiment as a module, and as a command in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

_TOY = Path(__file__).with_name("toy.py")


@pytest.fixture(scope="session")
def toy():
    """tests/experiments/toy.py."""
    spec = importlib.util.spec_from_file_location("toy", _TOY)
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def start():
    """Starts `janax ARGUMENTS` for the toy experiment, on one CPU device."""

    def start(*arguments, cwd):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, str(_TOY), *map(str, arguments)]
        return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start

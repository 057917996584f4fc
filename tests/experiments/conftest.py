"""The toy experiment as a module, and as a command in processes of its own."""

import importlib.util
import os
import socket
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


def _popen(command, cwd, environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "JAX_", "JANAX_"))}
    command = [sys.executable, *map(str, command)]
    environment = inherited | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="session")
def start():
    """Starts a command, by default `janax` for the toy experiment, on one CPU device or more."""

    def start(*arguments, cwd, devices=1, script=(_TOY,), **environment):
        return _popen([*script, *arguments], cwd, environment | {"JAX_NUM_CPU_DEVICES": str(devices)})

    return start


@pytest.fixture
def pair():
    """Starts a command, by default `janax` for the toy experiment, in two processes of four CPU devices that meet on loopback."""
    running = []

    def pair(*arguments, cwd, script=(_TOY,), more=()):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        shared = {"JAX_NUM_CPU_DEVICES": "4", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", "JAX_COORDINATOR_ADDRESS": address}
        for i in range(2):
            own = {"JANAX_NUM_PROCESSES": "2", "JANAX_PROCESS_ID": str(i)}
            running.append(_popen([*script, *arguments, *(more if i == 1 else ())], cwd, shared | own))
        return running[-2:]

    yield pair
    for process in running:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A directory in Hugging Face's layout: a random decoder of two layers, a tokenizer of 300 tokens and a chat template."""
    import jax
    import transformers

    from janax.experiments import text
    from janax.models import loading, transformer

    where = tmp_path_factory.mktemp("model")
    trained = text.train_tokenizer(["a few words to merge, and a few more words"], 300)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|endoftext|>")
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer.save_pretrained(where)
    config = transformer.TransformerConfig(
        vocab_size=len(tokenizer), max_length=512, width=32, depth=2, heads=2, kv_heads=1, head_width=16, hidden=48, tied=True
    )
    params = jax.tree.map(lambda x: 3 * x, transformer.init(config, jax.random.key(0)))  # far from uniform
    loading.save_transformer(where, config, params)
    return where

"""Decoders that train, whole or through adapters: what `janax run lm` and `janax distill` have in common.

model = decoders.load("smollm2", mesh, "model.weights")
net = decoders.network(model.config, model.params, LoraConfig(rank=8))
state = training.fit(loss_fn, net.init, batches, decoders.make_optimizer(...), config.train, rules=net.rules, frozen=net.frozen, ...)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from janax.experiments import training
from janax.experiments.config import LoraConfig, OptimizerConfig
from janax.experiments.errors import UserError
from janax.jaxlib_ext import sharding
from janax.models import loading, lora, transformer

__all__ = ["Network", "decays", "load", "make_optimizer", "network", "place_rows"]


class Network(NamedTuple):
    """What trains: the trained tree (all parameters, or adapters) and how to make the decoder's parameters of it.

    Attributes:
      config: The decoder.
      init: (key, frozen) -> trained tree.
      params_of: (trained tree, frozen) -> parameters of the decoder.
      rules: Placement of the trained tree.
      frozen: The loaded weights, from which training starts or on which adapters sit; None if it starts from random ones.
    """

    config: transformer.TransformerConfig
    init: Callable[..., Any]
    params_of: Callable[..., Any]
    rules: sharding.Rules
    frozen: Any


def load(name: str, mesh: Any, field: str, *, dtype: str | None = None) -> loading.Model:
    """A language model by name or directory, sharded as it is read; `field` is what messages call it.

    Raises:
      UserError: if it cannot be loaded.
    """
    try:
        return loading.load(name, shardings=lambda tree: sharding.shardings(tree, transformer.SHARDING_RULES, mesh), dtype=dtype)
    except ValueError as error:
        raise UserError(f"{field}: {error}") from error


def network(config: transformer.TransformerConfig, weights: Any, adapters: LoraConfig) -> Network:
    """The decoder, trained whole (from `weights`, or random ones if None) or through adapters.

    Raises:
      UserError: if the decoder cannot have such adapters.
    """
    if not adapters.rank:
        return Network(config, functools.partial(_start, config), _itself, transformer.SHARDING_RULES, weights)
    try:
        init = functools.partial(lora.init, config, rank=adapters.rank, targets=adapters.targets)
        jax.eval_shape(init, jax.random.key(0))
    except ValueError as error:
        raise UserError(f"lora: {error}") from error

    def merge(trained: Any, frozen: Any) -> Any:
        return lora.merge(config, frozen, trained, scale=adapters.alpha / adapters.rank)

    return Network(config, lambda key, frozen=None: init(key), merge, lora.SHARDING_RULES, weights)


def _start(config: transformer.TransformerConfig, key: jax.Array, frozen: Any = None) -> Any:
    """Parameters in the compute dtype: bfloat16 ones have a float32 copy in the optimizer's state."""
    params = transformer.init(config, key) if frozen is None else frozen
    return jax.tree.map(lambda x: jnp.asarray(x, config.dtype), params)


def _itself(trained: Any, frozen: Any = None) -> Any:
    del frozen
    return trained


def make_optimizer(config: OptimizerConfig, adapters: LoraConfig, *, num_steps: int, dtype: str) -> Any:
    """The configured optimizer, which decays matrices only and keeps a float32 copy of parameters that train in bfloat16."""
    optimizer = training.make_optimizer(config, num_steps=num_steps, mask=decays)
    return training.with_master_weights(optimizer) if dtype == "bfloat16" and not adapters.rank else optimizer


def decays(params: Any) -> Any:
    """Weight decay for matrices: kernels, embeddings and adapters; not norms, biases or learned positions."""

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        del leaf
        return sharding.path_string(path).rsplit("/", 1)[-1] in ("kernel", "table", "a", "b")

    return jax.tree_util.tree_map_with_path(decays, params)


def place_rows(batch: Any, mesh: Any) -> Any:
    """A tree of host arrays with their rows over the mesh's batch axis."""
    return sharding.place(batch, jax.tree.map(lambda _: jax.sharding.NamedSharding(mesh, sharding.batch_spec(mesh)), batch))

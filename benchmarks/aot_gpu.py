"""Compiles a small and a bigger decoder's training step for pods that are not there, and prints what they need.

    python benchmarks/aot_gpu.py                                  one host of 1, 2, 4 and 8 H100 (needs the extra `aot-gpu`)
    python benchmarks/aot_gpu.py h100:2x8 v5e:16x16 --size small  any topologies that `aot.topology_devices` knows

The batch per device is constant. Parameters and momentum are sharded over all devices and gathered layer by layer, so that arguments
shrink as devices are added; with `--replicated` every device holds all of them, and nothing but the collectives should change.
"""

import argparse
import json
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: do not look for accelerators
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import dataclasses

import jax
import jax.numpy as jnp
import jaxlib

from janax.jaxlib_ext import aot, sharding


@dataclasses.dataclass(frozen=True)
class Size:
    """A decoder: layers, width, heads, vocabulary, tokens per sequence, sequences per device."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    tokens: int
    batch_per_device: int


SIZES = {
    "small": Size(layers=4, width=512, heads=8, vocabulary=4096, tokens=512, batch_per_device=8),
    "bigger": Size(layers=24, width=2048, heads=16, vocabulary=32768, tokens=1024, batch_per_device=4),
}


def norm(x):
    """Root-mean-square normalisation over the last axis."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def block(x, w, *, heads):
    """One pre-norm decoder block: causal attention and a feed-forward layer of four times the width."""
    b, t, d = x.shape
    q, k, v = jnp.split((norm(x) @ w["qkv"]).reshape(b, t, heads, 3 * d // heads), 3, axis=-1)
    scores = jnp.einsum("bqhe,bkhe->bhqk", q, k, preferred_element_type=jnp.float32) / (d // heads) ** 0.5
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool))[None, None], scores, -1e30)
    mixed = jnp.einsum("bhqk,bkhe->bqhe", jax.nn.softmax(scores).astype(x.dtype), v).reshape(b, t, d)
    x = x + mixed @ w["out"]
    return x + jax.nn.gelu(norm(x) @ w["up"]) @ w["down"]


def program(size: Size, devices, *, replicated: bool = False):
    """The training step of a decoder over one mesh axis, and the mesh."""
    mesh = sharding.make_mesh({"data": len(devices)}, devices)
    d, l, v = size.width, size.layers, size.vocabulary
    shapes = {"qkv": (l, d, 3 * d), "out": (l, d, d), "up": (l, d, 4 * d), "down": (l, 4 * d, d), "embed": (v, d)}
    rules = ((r".*", jax.P()),) if replicated else ((r"embed", jax.P("data")), (r".*", jax.P(None, "data")))

    def loss(params, tokens):
        embed = params["embed"].astype(jnp.bfloat16)
        blocks = {name: w for name, w in params.items() if name != "embed"}

        def body(x, w):
            return block(x, {name: leaf.astype(jnp.bfloat16) for name, leaf in w.items()}, heads=size.heads), None

        x, _ = jax.lax.scan(jax.checkpoint(body), sharding.constrain_batch(embed[tokens]), blocks)
        logits = sharding.constrain_batch(norm(x) @ embed.T).astype(jnp.float32)[:, :-1]
        target = jnp.arange(v)[None, None] == tokens[:, 1:, None]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(target, logits, 0.0), axis=-1))

    def step(params, momentum, tokens):
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, gradient)
        return jax.tree.map(lambda p, m: p - 0.01 * m, params, momentum), momentum, value

    placed = sharding.shardings({name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}, rules, mesh)
    params = {name: jax.ShapeDtypeStruct(s, jnp.float32, sharding=placed[name]) for name, s in shapes.items()}
    whole = jax.NamedSharding(mesh, jax.P())
    batch = jax.NamedSharding(mesh, jax.P("data"))
    tokens = jax.ShapeDtypeStruct((size.batch_per_device * len(devices), size.tokens), jnp.int32, sharding=batch)
    return aot.Program("decoder step", step, (params, params, tokens), out_shardings=(placed, placed, whole), donate_argnums=(0, 1)), mesh


def main() -> None:
    """Prints one analysis per size and topology."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topologies", nargs="*", default=["h100:1x1", "h100:1x2", "h100:1x4", "h100:1x8"])
    parser.add_argument("--size", choices=[*SIZES, "all"], default="all")
    parser.add_argument("--replicated", action="store_true", help="parameters whole on every device")
    parser.add_argument("--json", metavar="FILE", help="also write the analyses there")
    options = parser.parse_args()
    print(f"jax {jax.__version__}, jaxlib {jaxlib.__version__}")
    analyses = []
    for name in SIZES if options.size == "all" else [options.size]:
        for topology in options.topologies:
            built, mesh = program(SIZES[name], aot.topology_devices(topology), replicated=options.replicated)
            analysis = aot.analyse(built._replace(name=f"{name} decoder, {topology}"), aot.chip_of(topology), mesh=mesh)
            print(analysis.text(), flush=True)
            analyses.append(analysis.as_dict())
    if options.json:
        with open(options.json, "w") as file:
            json.dump(analyses, file, indent=1)


if __name__ == "__main__":
    main()

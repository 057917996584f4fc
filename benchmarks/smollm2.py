"""SmolLM2-135M in float32 against transformers + torch: decode, prefill, a training step; and, within janax, scoring behind a shared prefix.

    janax fetch smollm2
    python benchmarks/smollm2.py [--cases decode-1 decode-16 prefill train prefix] [--repeats 5] [--threads 2]

The peer gets the same weights, `generate` with greedy decoding and a static cache, `torch.no_grad`, SDPA attention; its logits are compared
with ours first. Bars: decode at least 1.3 times the peer's tokens per second alone and 1.5 times in a batch of 16; prefill of 512 tokens and
a training step of 4 x 512 in no more time; scoring 16 targets behind one prefix of 400 tokens at least 4 times as fast as unshared. (How
busy refilled slots are does not depend on the model: tests/jaxlib_ext/test_sampling.py.)
"""

import argparse
import dataclasses
import functools
import os
import sys
import tempfile

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads sleep at barriers instead of taking the cores from others

import jax
import jax.numpy as jnp
import numpy as np
from harness import alternate, environment, seconds, show

from janax.jaxlib_ext import fused, sampling
from janax.models import loading, transformer

CASES = ("decode-1", "decode-16", "prefill", "train", "prefix")
NEW_TOKENS = 64


def compiled(fn, *args, **options):
    return jax.jit(fn, **options).lower(*args).compile()


class Peer:
    """transformers + torch with our weights."""

    def __init__(self, config: transformer.TransformerConfig, params, threads: int):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        with tempfile.TemporaryDirectory() as directory:
            loading.save_transformer(directory, config, params)
            self.model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa", dtype=torch.float32).eval()

    def logits(self, tokens):
        with self.torch.no_grad():
            return self.model(self.torch.from_numpy(tokens)).logits[:, -1].numpy()

    def decode(self, tokens, cache: str | None):
        with self.torch.no_grad():
            options = {} if cache is None else {"cache_implementation": cache}
            out = self.model.generate(
                self.torch.from_numpy(tokens),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                pad_token_id=0,
                **options,
            )
            return out.numpy()[:, tokens.shape[1] :]

    def prefill(self, tokens):
        with self.torch.no_grad():
            return self.model(self.torch.from_numpy(tokens), logits_to_keep=1).logits.numpy()

    def train(self, tokens):
        batch = self.torch.from_numpy(tokens).long()
        optimizer = self.torch.optim.SGD(self.model.parameters(), lr=0.0)

        def step():
            optimizer.zero_grad()
            loss = self.model(batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        self.model.train()
        return step


def decode(config, params, peer: Peer, batch: int, repeats: int):
    """Prompts of 64 tokens, 64 new ones, greedy; the seconds hold the prefill of both."""
    prompts = np.random.default_rng(batch).integers(3, 40000, (batch, 64))
    cache = transformer.init_cache(config, batch, 128)
    greedy = sampling.SamplingParams(temperature=0.0)
    run = functools.partial(sampling.generate, transformer.decode_fn(config), sampling=greedy, max_new_tokens=NEW_TOKENS)
    lengths = np.full(batch, 64, np.int32)
    ours = compiled(run, params, jax.random.key(0), cache, prompts.astype(np.int32), lengths)
    call = lambda: ours(params, jax.random.key(0), cache, prompts.astype(np.int32), lengths)  # noqa: E731
    same = float(np.mean(np.asarray(call().tokens) == peer.decode(prompts, None)))
    kinds = {kind: seconds(lambda kind=kind: peer.decode(prompts, kind)) for kind in (None, "static")}
    best = min(kinds, key=lambda kind: kinds[kind])  # whichever cache is the faster one
    row = alternate(call, lambda: peer.decode(prompts, best), repeats=repeats)
    speed = batch * NEW_TOKENS / row["ours_seconds"]
    return row | {"speed_ratio": 1 / row["ratio"], "tokens_per_second": speed, "peer_cache": str(best), "same_tokens": same}


def prefill(config, params, peer: Peer, repeats: int):
    tokens = np.random.default_rng(0).integers(3, 40000, (1, 512))
    cache = transformer.init_cache(config, 1, 512)
    ours = compiled(functools.partial(transformer.decode, config), params, cache, tokens.astype(np.int32))
    difference = float(np.abs(np.asarray(ours(params, cache, tokens.astype(np.int32))[0]) - peer.logits(tokens)).max())
    row = alternate(lambda: ours(params, cache, tokens.astype(np.int32)), lambda: peer.prefill(tokens), repeats=repeats)
    return row | {"largest_difference_of_logits": difference}


def train(config, params, peer: Peer, repeats: int):
    """Loss, gradients of all parameters and a plain update in place (rate 0, so that every repeat does the same).

    XLA takes its temporaries anew in every call, and for gigabytes the first touch of each page counts: layers are scanned, elementwise work is
    made again instead of kept, and GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment (of both) helps further.
    """
    tokens = np.random.default_rng(0).integers(3, 40000, (4, 512))

    def loss(params, tokens):
        h = transformer.hidden(config, params, tokens)[:, :-1]
        weights = jnp.ones(h.shape[:2], jnp.float32)
        return fused.weighted_nll(h, transformer.output_embedding(config, params), tokens[:, 1:], weights, transposed=True) / weights.size

    def step(params, tokens):
        value, gradients = jax.value_and_grad(loss)(params, tokens)
        return value, jax.tree.map(lambda p, g: p - 0.0 * g, params, gradients)

    ours = compiled(step, params, tokens.astype(np.int32), donate_argnums=0)
    theirs = peer.train(tokens)
    memory = ours.memory_analysis().temp_size_in_bytes / 2**20
    held = [jnp.zeros(()), jax.tree.map(jnp.copy, params)]

    def update():
        held[:] = ours(held[1], tokens.astype(np.int32))
        return held

    row = alternate(update, theirs, repeats=repeats)
    value = float(held[0])
    return row | {"loss": value, "peer_loss": theirs(), "temporaries_mib": round(memory)}


def prefix(config, params, repeats: int):
    """log P(target | context) of 16 targets of 16 tokens: the context read once, or in every row."""
    rng = np.random.default_rng(0)
    context, targets = rng.integers(3, 40000, (1, 400)).astype(np.int32), rng.integers(3, 40000, (16, 16)).astype(np.int32)

    def scored(h, params, targets):
        return jnp.sum(fused.token_log_probs(h, transformer.unembed(config, params), targets), axis=1)

    def shared(params, context, targets):
        _, held = transformer.extend(config, params, transformer.init_cache(config, 1, 400), context[:, :-1])
        rows = jnp.concatenate([jnp.broadcast_to(context[:, -1:], (16, 1)), targets[:, :-1]], axis=1)
        h, _ = transformer.extend(config, params, sampling.branch(held, num_branches=16, capacity=16), rows, prefix=held)
        return scored(h, params, targets)

    def unshared(params, context, targets):
        rows = jnp.concatenate([jnp.broadcast_to(context, (16, 400)), targets], axis=1)
        return scored(transformer.hidden(config, params, rows)[:, 399:-1], params, targets)

    ours, plain = (compiled(fn, params, context, targets) for fn in (shared, unshared))
    difference = float(np.abs(np.asarray(ours(params, context, targets)) - np.asarray(plain(params, context, targets))).max())
    row = alternate(lambda: ours(params, context, targets), lambda: plain(params, context, targets), repeats=repeats)
    return row | {"speed_ratio": 1 / row["ratio"], "largest_difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401

        model = loading.load("smollm2")
    except ImportError as error:
        print(f"skipped: {error.name} is not installed; pip install torch==2.13.0", file=sys.stderr)
        return
    except ValueError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return
    config, params = model.config, transformer.unstack_layers(model.params)
    peer = Peer(config, model.params, arguments.threads)
    for case in arguments.cases:
        if case.startswith("decode"):
            row = decode(config, params, peer, int(case.partition("-")[2]), arguments.repeats)
        elif case == "prefill":
            row = prefill(config, params, peer, arguments.repeats)
        elif case == "train":
            row = train(dataclasses.replace(config, remat="dots"), model.params, peer, arguments.repeats)
        else:
            row = prefix(config, params, arguments.repeats)
        show("smollm2", {case: row})
    show("smollm2", {"environment": environment("torch", "transformers"), "threads": arguments.threads, "dtype": "float32"})


if __name__ == "__main__":
    main()

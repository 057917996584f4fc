"""Adapters: shapes, the identity at the start, merging against the product by hand, PEFT's layout, errors."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from janax.models import lora, transformer

CONFIG = transformer.TransformerConfig(
    vocab_size=48, max_length=32, width=32, depth=2, heads=4, kv_heads=2, head_width=8, hidden=48, tied=True
)


def adapters(targets=lora.TARGETS, rank=3):
    fresh = jax.jit(functools.partial(lora.init, CONFIG, rank=rank, targets=targets))(jax.random.key(1))
    return jax.tree.map(lambda x: np.asarray(x) + 0.1 * np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32), fresh)


@pytest.fixture(scope="module")
def params():
    return jax.jit(functools.partial(transformer.init, CONFIG))(jax.random.key(0))


def test_a_fresh_adapter_changes_nothing(params):
    fresh = functools.partial(lora.init, CONFIG, rank=4, targets=lora.TARGETS)
    merged = jax.jit(lambda params, key: lora.merge(CONFIG, params, fresh(key), scale=2.0))(params, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_merging_by_hand(params):
    """Every projection in Hugging Face's orientation, [outputs inputs]: W + scale B A, layer by layer."""
    ours, scale = adapters(), 0.7
    merged = jax.jit(lambda params, ours: lora.merge(CONFIG, params, ours, scale=scale))(params, ours)
    d = CONFIG.width

    def matrices(tree, layer):
        qkv, out, gate, up, down = (np.asarray(tree["blocks"][name]["kernel"][layer]) for name in ("qkv", "out", "gate", "up", "down"))
        return {
            "q_proj": qkv[:, :2].reshape(-1, d),  # two queries per key-value head
            "k_proj": qkv[:, 2].reshape(-1, d),
            "v_proj": qkv[:, 3].reshape(-1, d),
            "o_proj": out.reshape(d, -1),
            "gate_proj": gate,
            "up_proj": up,
            "down_proj": down,
        }

    for layer in range(CONFIG.depth):
        before, after = matrices(params, layer), matrices(merged, layer)
        for target in lora.TARGETS:
            delta = scale * np.asarray(ours[target]["b"][layer]) @ np.asarray(ours[target]["a"][layer])
            np.testing.assert_allclose(after[target], before[target] + delta, rtol=0, atol=1e-6, err_msg=target)


def test_gradients_reach_the_adapters_alone(params):
    tokens = jnp.arange(12).reshape(2, 6)

    def loss(ours):
        return jnp.mean(jnp.square(transformer.hidden(CONFIG, lora.merge(CONFIG, params, ours, scale=0.5), tokens)))

    gradients = jax.jit(jax.grad(loss))(adapters(("q_proj", "down_proj")))
    assert set(gradients) == {"q_proj", "down_proj"}
    assert all(float(jnp.abs(leaf).max()) > 0 and bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradients))


def test_a_peft_directory_comes_back_bit_for_bit(tmp_path):
    ours = adapters(("v_proj", "gate_proj"))
    lora.save_peft(tmp_path, CONFIG, ours, alpha=12.0, base="some-model")
    again, scale = lora.load_peft(tmp_path, CONFIG)
    jax.tree.map(np.testing.assert_array_equal, again, ours)
    assert scale == 4.0
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["r"] == 3 and settings["target_modules"] == ["v_proj", "gate_proj"]
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.1.mlp.gate_proj.lora_A.weight"].shape == (3, 32)
    assert tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"].shape == (16, 3)


def test_what_is_refused(tmp_path, params):
    with pytest.raises(ValueError, match="'targets' is 'c_attn'"):
        lora.init(CONFIG, jax.random.key(0), rank=2, targets=("c_attn",))
    with pytest.raises(ValueError, match="'rank' is 0"):
        lora.init(CONFIG, jax.random.key(0), rank=0)
    with pytest.raises(ValueError, match="stacked layers"):
        lora.merge(CONFIG, transformer.unstack_layers(params), adapters(), scale=1.0)
    with pytest.raises(ValueError, match=r"lora\.merge \(q_proj\): 'a' has shape"):
        lora.merge(CONFIG, params, {"q_proj": {"a": jnp.zeros((2, 3, 5)), "b": jnp.zeros((2, 32, 3))}}, scale=1.0)
    with pytest.raises(ValueError, match="no such file"):
        lora.load_peft(tmp_path, CONFIG)
    lora.save_peft(tmp_path, CONFIG, adapters(("q_proj",)), alpha=3.0)
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight")
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.lora_B\.weight' is missing"):
        lora.load_peft(tmp_path, CONFIG)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a complete adapter"):
        lora.load_peft(tmp_path, CONFIG)

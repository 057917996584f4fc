import dataclasses
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from janax.jaxlib_ext import sharding
from janax.models import dit, loading

GOLDEN = Path(__file__).parents[1] / "golden" / "dit"  # made by tests/golden/make_dit.py with diffusers 0.42.1 and torch 2.13.0
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def checkpoint(tmp_path):
    return Path(shutil.copytree(GOLDEN, tmp_path / "dit"))


def _random_params(config):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: dit.init(config, key), jax.random.key(0))
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


def _edit(checkpoint, **changes):
    content = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**content, **changes}))


def _edit_tensors(checkpoint, edit):
    tensors = safetensors.numpy.load_file(checkpoint / WEIGHTS)
    edit(tensors)
    safetensors.numpy.save_file(tensors, checkpoint / WEIGHTS)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_agrees_with_diffusers(scan_layers):
    config, params = loading.load_dit(GOLDEN)
    config = dataclasses.replace(config, scan_layers=scan_layers)
    data = np.load(GOLDEN / "io.npz")
    assert config.block_embedders and config.learn_sigma and config.mlp_norm_eps == 1e-5
    z, expected = (data[name].transpose(0, 2, 3, 1) for name in ("z", "expected"))
    actual = jax.jit(lambda *args: dit.output(config, *args))(params, z, data["t"], data["labels"])
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_round_trip_with_embedders_of_its_own_is_exact(tmp_path):
    config, params = loading.load_dit(GOLDEN)
    loading.save_dit(tmp_path, config, params)
    theirs, ours = (safetensors.numpy.load_file(directory / WEIGHTS) for directory in (GOLDEN, tmp_path))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


def test_round_trip_with_shared_embedders_is_exact(tmp_path):
    config = dit.DiTConfig(image_size=4, channels=2, patch_size=1, width=8, depth=3, heads=2, num_classes=4)
    params = _random_params(config)
    loading.save_dit(tmp_path / "new", config, params)
    loading.save_dit(tmp_path / "new", config, params)  # over an older one
    again, loaded = loading.load_dit(tmp_path / "new")
    assert again == config
    chex.assert_trees_all_equal(loaded, params)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["config.json", WEIGHTS]


def test_one_different_embedder_is_noticed(tmp_path):
    config = dit.DiTConfig(image_size=4, channels=2, patch_size=1, width=8, depth=3, heads=2, num_classes=4)
    loading.save_dit(tmp_path, config, _random_params(config))

    def edit(tensors):
        tensors["transformer_blocks.2.norm1.emb.timestep_embedder.linear_2.bias"][3] += 1

    _edit_tensors(tmp_path, edit)
    again, params = loading.load_dit(tmp_path)
    assert again == dataclasses.replace(config, block_embedders=True)
    np.testing.assert_array_equal(params["embedders"]["time_out"]["bias"][:, 3] - params["embedders"]["time_out"]["bias"][0, 3], [0, 0, 1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_read_as_float32(checkpoint, dtype):
    _edit_tensors(checkpoint, lambda tensors: tensors.update({name: x.astype(jnp.dtype(dtype)) for name, x in tensors.items()}))
    _, params = loading.load_dit(checkpoint)
    _, expected = loading.load_dit(GOLDEN)
    chex.assert_trees_all_equal(params, jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), expected))


def test_placed_as_read(mesh):
    if mesh is None:
        pytest.skip("needs a mesh")
    _, expected = loading.load_dit(GOLDEN)
    _, params = loading.load_dit(GOLDEN, shardings=lambda tree: sharding.shardings(tree, dit.SHARDING_RULES, mesh))
    assert params["blocks"]["expand"]["kernel"].sharding.spec == jax.P(None, "data", "model")
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, expected))


def test_settings_of_older_files_are_accepted(checkpoint):
    _edit(checkpoint, _class_name="Transformer2DModel", num_vector_embeds=None, only_cross_attention=False)
    table = dit.position_embedding(4, 16)[None]
    _edit_tensors(checkpoint, lambda tensors: tensors.update({"pos_embed.pos_embed": table}))
    loading.load_dit(checkpoint)
    _edit_tensors(checkpoint, lambda tensors: tensors.update({"pos_embed.pos_embed": table + 0.1}))
    with pytest.raises(ValueError, match=r"'pos_embed\.pos_embed' is not the fixed"):
        loading.load_dit(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "'_class_name' is 'UNet2DModel', expected 'DiTTransformer2DModel'"),
        ({"activation_fn": "geglu"}, "'activation_fn' is 'geglu', only 'gelu-approximate' is supported"),
        ({"attention_bias": False}, "'attention_bias' is False"),
        ({"norm_elementwise_affine": True}, "'norm_elementwise_affine' is True"),
        ({"dropout": 0.1}, "'dropout' is 0.1"),
        ({"out_channels": 4}, r"'out_channels' is 4, expected 'in_channels' \(3\) or twice that"),
        ({"num_layers": "2"}, "'num_layers' is '2', expected an integer"),
        ({"patch_size": 3}, "config.json: DiTConfig: 'image_size' 8 must be a multiple of 'patch_size' 3"),
        ({"num_layers": 3}, "safetensors: tensor 'transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.weight' is missing"),
        ({"num_layers": 1}, r"tensor 'transformer_blocks.1.attn1.to_k.bias' \(and \d+ more\) is not part of the architecture"),
        ({"num_embeds_ada_norm": 6}, r"embedding_table.weight' has shape \(6, 16\), expected \(7, 16\)"),
    ],
)
def test_unsupported_or_inconsistent_config(checkpoint, changes, message):
    _edit(checkpoint, **changes)
    with pytest.raises(ValueError, match=message):
        loading.load_dit(checkpoint)


def test_broken_files(checkpoint):
    weights = checkpoint / WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{WEIGHTS}: not a complete safetensors file"):
        loading.load_dit(checkpoint)
    weights.write_bytes(b"")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        loading.load_dit(checkpoint)
    weights.write_bytes(whole)
    _edit_tensors(checkpoint, lambda tensors: tensors.update({"proj_out_2.bias": np.zeros(24, np.int32)}))
    with pytest.raises(ValueError, match=r"'proj_out_2\.bias' has dtype I32, expected one of F32, F16, BF16"):
        loading.load_dit(checkpoint)
    weights.unlink()
    with pytest.raises(ValueError, match=f"{WEIGHTS}: no such file"):
        loading.load_dit(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        loading.load_dit(checkpoint)
    (checkpoint / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        loading.load_dit(checkpoint)


def test_what_the_layout_cannot_hold(tmp_path):
    config, params = loading.load_dit(GOLDEN)
    with pytest.raises(ValueError, match="'frequency_shift' 1, got 0"):
        loading.save_dit(tmp_path, dataclasses.replace(config, frequency_shift=0), params)
    with pytest.raises(ValueError, match="'mlp_ratio' 4, got 2"):
        loading.save_dit(tmp_path, dataclasses.replace(config, mlp_ratio=2), params)
    with pytest.raises(ValueError, match=r"save_dit: parameter .* has shape"):
        loading.save_dit(tmp_path, dataclasses.replace(config, depth=3), params)
    assert not list(tmp_path.iterdir())

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from janax.jaxlib_ext import sharding
from janax.models import loading, presets, transformer
from janax.models.loading import entries

GOLDEN = Path(__file__).parents[1] / "golden" / "transformer"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir())
WEIGHTS = "model.safetensors"


@pytest.fixture
def checkpoint(tmp_path):
    return Path(shutil.copytree(GOLDEN / "llama3", tmp_path / "llama3"))


def _edit(checkpoint, *, drop=(), **changes):
    content = json.loads((checkpoint / "config.json").read_text())
    content = {name: value for name, value in {**content, **changes}.items() if name not in drop}
    (checkpoint / "config.json").write_text(json.dumps(content))


def _edit_tensors(checkpoint, edit):
    tensors = safetensors.numpy.load_file(checkpoint / WEIGHTS)
    edit(tensors)
    safetensors.numpy.save_file(tensors, checkpoint / WEIGHTS)


def _split(checkpoint):
    """Into three files and an index, as large checkpoints are published."""
    tensors = safetensors.numpy.load_file(checkpoint / WEIGHTS)
    places = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for place in set(places.values()):
        safetensors.numpy.save_file({name: tensors[name] for name in tensors if places[name] == place}, checkpoint / place)
    (checkpoint / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (checkpoint / WEIGHTS).unlink()


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_exact(family, tmp_path):
    config, params = loading.load_transformer(GOLDEN / family)
    loading.save_transformer(tmp_path / "new", config, params)
    loading.save_transformer(tmp_path / "new", config, transformer.unstack_layers(params))  # over an older one
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["config.json", WEIGHTS]
    theirs, ours = (safetensors.numpy.load_file(directory / WEIGHTS) for directory in (GOLDEN / family, tmp_path / "new"))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
    again, loaded = loading.load_transformer(tmp_path / "new")
    assert again == config
    chex.assert_trees_all_equal(loaded, params)
    kept = ("model_type", "architectures", "num_hidden_layers", "n_layer", "layer_types", "tie_word_embeddings", "query_pre_attn_scalar")
    before, after = (json.loads((directory / "config.json").read_text()) for directory in (GOLDEN / family, tmp_path / "new"))
    assert {name: before[name] for name in kept if name in before} == {name: after[name] for name in kept if name in before}


@pytest.mark.parametrize("config", [presets.SMOLLM2_135M, presets.QWEN2_5_7B, presets.LLAMA_3_1_8B])
def test_presets_are_expressible(config, tmp_path):
    small = dataclasses.replace(config, vocab_size=8, width=4, heads=config.kv_heads, head_width=2, hidden=4, depth=1)
    params = jax.eval_shape(lambda key: transformer.init(small, key), jax.random.key(0))
    loading.save_transformer(tmp_path, small, jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), params))
    assert loading.load_transformer(tmp_path)[0] == small


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_dtype_of_the_file_is_kept(checkpoint, tmp_path, dtype):
    _edit_tensors(checkpoint, lambda tensors: tensors.update({name: x.astype(jnp.dtype(dtype)) for name, x in tensors.items()}))
    config, params = loading.load_transformer(checkpoint)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    loading.save_transformer(tmp_path / "new", config, params)
    theirs, ours = (safetensors.numpy.load_file(directory / WEIGHTS) for directory in (checkpoint, tmp_path / "new"))
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].tobytes() == tensor.tobytes(), name
    _, wide = loading.load_transformer(checkpoint, dtype="float32")
    chex.assert_trees_all_equal(wide, jax.tree.map(lambda x: x.astype(jnp.float32), params))
    _edit_tensors(checkpoint, lambda tensors: tensors.update({"model.layers.1.self_attn.k_proj.weight": np.zeros((16, 32), np.float32)}))
    with pytest.raises(
        ValueError, match=r"'model.layers.1.self_attn.k_proj.weight' is float32 and others of the parameter 'blocks/qkv/kernel'"
    ):
        loading.load_transformer(checkpoint)


@pytest.mark.parametrize("family", ["llama3", "gpt2", "gemma2"])
@pytest.mark.parametrize("axes", [{"data": 4, "model": 2}, {"data": 1, "model": 8}, {"data": 2, "model": 1, "other": 4}])
def test_sharded_equals_unsharded(family, axes, tmp_path):
    checkpoint = Path(shutil.copytree(GOLDEN / family, tmp_path / family))
    _split(checkpoint)
    mesh = sharding.make_mesh(axes)
    config, expected = loading.load_transformer(GOLDEN / family)
    again, params = loading.load_transformer(checkpoint, shardings=lambda tree: sharding.shardings(tree, transformer.SHARDING_RULES, mesh))
    assert again == config
    for leaf, spec in zip(
        jax.tree.leaves(params),
        jax.tree.leaves(sharding.specs(params, transformer.SHARDING_RULES, mesh), is_leaf=lambda x: isinstance(x, jax.P)),
    ):
        assert leaf.sharding == jax.NamedSharding(mesh, spec)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, expected))
    loading.save_transformer(tmp_path / "again", config, params)
    chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, loading.load_transformer(tmp_path / "again")[1]), jax.tree.map(np.asarray, expected)
    )


def test_any_slice_of_any_entry():
    """Random ranges of parameters of all kinds equal the ranges of the whole, and read no more of the file's rows than they must."""
    rng = np.random.default_rng(0)
    tensors = {
        **{f"{i}.{n}.weight": rng.standard_normal((m * 4, 6), np.float32) for i in range(3) for n, m in (("q", 4), ("k", 2))},
        "c.weight": rng.standard_normal((6, 24), np.float32),
        "c.bias": rng.standard_normal(24, np.float32),
    }

    class Memory:
        path, names = Path("memory"), frozenset(tensors)

        def shape(self, name):
            return tensors[name].shape

        def get(self, name, index):
            return tensors[name][index].copy()

    family = [
        entries.linear(("a",), {"{}.q": (2, 2, 4), "{}.k": (2, 1, 4)}, (6,), axis=1, layers=3),
        entries.linear(("b",), {"{}.q": (1, 4, 4)}, (2, 3), out_first=False, layers=3),
        entries.linear(("c",), {"c#q": (2, 1, 4), "c#k": (2, 1, 4), "c#v": (2, 1, 4)}, (6,), axis=1, in_first_file=True),
        entries.bias(("c",), {"c#q": (2, 1, 4), "c#k": (2, 1, 4), "c#v": (2, 1, 4)}, axis=1),
    ]
    for entry in family:
        whole = entry.read(Memory(), [(0, size) for size in entry.shape], None)
        assert whole.shape == entry.shape
        for _ in range(20):
            ranges = [tuple(sorted(rng.choice(size + 1, 2, replace=False))) for size in entry.shape]
            expected = whole[tuple(slice(*span) for span in ranges)]
            np.testing.assert_array_equal(entry.read(Memory(), ranges, None), expected)
    a, c, b = (entry.read(Memory(), [(0, size) for size in entry.shape], None) for entry in (family[0], family[2], family[3]))
    np.testing.assert_array_equal(a[1, 1, 0], tensors["1.q.weight"][8:12])  # second group's first query head
    np.testing.assert_array_equal(a[1, 1, 2], tensors["1.k.weight"][4:8])
    np.testing.assert_array_equal(c[1, 1], tensors["c.weight"][:, 8 + 4 : 8 + 8].T)
    np.testing.assert_array_equal(b[1, 2], tensors["c.bias"][16 + 4 : 16 + 8])


def test_a_load_holds_little_more_than_its_shards(tmp_path):
    config = dataclasses.replace(presets.LM_SMALL, vocab_size=40_000, width=512, hidden=4096, depth=8)
    params = jax.eval_shape(lambda key: transformer.init(config, key), jax.random.key(0))
    loading.save_transformer(tmp_path, config, jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), params))
    script = """
import resource, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
from janax.jaxlib_ext import sharding
from janax.models import loading, transformer
mesh = sharding.make_mesh({"data": 2, "model": 2})
place = lambda tree: sharding.shardings(tree, transformer.SHARDING_RULES, mesh)
jax.block_until_ready(jax.device_put(1.0))
transformer.check_params  # modules are loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config, params = loading.load_transformer(sys.argv[1], shardings=place if sys.argv[2] == "sharded" else None)
jax.block_until_ready(params)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""
    largest = 40_000 * 512 * 4
    for how in ("sharded", "whole"):
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path), how], capture_output=True, text=True, check=True)
        peak, size = map(int, done.stdout.split())
        assert peak < size + 1.2 * largest, how


# Spellings of configurations.


@pytest.mark.parametrize(
    ("family", "drop", "changes"),
    [
        (
            "llama3",
            ("rope_parameters",),
            {
                "rope_theta": 500000.0,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            },
        ),
        ("llama2", ("rope_parameters", "num_key_value_heads", "head_dim", "mlp_bias"), {"rope_scaling": None}),
        ("llama_linear", ("rope_parameters",), {"rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("qwen2", ("layer_types",), {}),
        ("gemma2", ("layer_types", "rope_parameters", "attn_bias"), {"rope_theta": 10000.0}),
        (
            "gemma3",
            ("rope_parameters",),
            {"rope_theta": 1e6, "rope_local_base_freq": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
        ("gpt_neo", ("attention_layers",), {}),
    ],
)
def test_older_spellings(family, drop, changes, tmp_path):
    checkpoint = Path(shutil.copytree(GOLDEN / family, tmp_path / family))
    _edit(checkpoint, drop=drop, **changes)
    assert loading.load_transformer(checkpoint)[0] == loading.load_transformer(GOLDEN / family)[0]


def test_windows_by_rule(tmp_path):
    checkpoint = Path(shutil.copytree(GOLDEN / "gemma3", tmp_path / "gemma3"))
    _edit(checkpoint, drop=("layer_types",), sliding_window_pattern=2)
    assert loading.load_transformer(checkpoint)[0].sliding == (True, False, True, False)
    _edit(checkpoint, drop=("sliding_window_pattern",))
    config = loading.load_transformer(checkpoint)[0]
    assert config.sliding == () and config.window == 5  # the sixth would be the first that does not slide
    checkpoint = Path(shutil.copytree(GOLDEN / "mistral", tmp_path / "mistral"))
    _edit(checkpoint, sliding_window=None)
    assert loading.load_transformer(checkpoint)[0].window is None


def test_buffers_and_names_of_older_files(tmp_path):
    checkpoint = Path(shutil.copytree(GOLDEN / "gpt2", tmp_path / "gpt2"))
    config, expected = loading.load_transformer(GOLDEN / "gpt2")

    def edit(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 128, 128), np.float32)
        tensors["lm_head.weight"] = tensors["wte.weight"].copy()

    _edit_tensors(checkpoint, edit)
    again, params = loading.load_transformer(checkpoint)
    assert again == config
    chex.assert_trees_all_equal(params, expected)


# What is wrong with it.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
            "the architecture 'MambaForCausalLM' is not supported, expected one",
        ),
        (
            {"architectures": ["LlamaForTokenClassification"]},
            "'LlamaForTokenClassification' is not supported, .* LlamaForCausalLM, Mistral",
        ),
        ({"model_type": None, "architectures": None}, "the architecture None is not supported"),
        ({"hidden_size": None}, "config.json: 'hidden_size' is missing"),
        ({"vocab_size": "64"}, "config.json: 'vocab_size' is '64', expected an integer"),
        ({"hidden_act": "relu"}, "config.json: 'hidden_act' is 'relu', expected one of 'silu'"),
        ({"attention_bias": 1}, "'attention_bias' is 1, expected true or false"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'rope_type' is 'yarn', expected one of 'default', 'linear', 'llama3'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "config.json: 'factor' is missing"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_factor' is 0.5, only 1.0 is supported"),
        ({"rope_parameters": 3}, "'rope_parameters' is 3, expected an object"),
        ({"num_key_value_heads": 3}, "config.json: TransformerConfig: 'heads' 4 must be a multiple of 'kv_heads' 3"),
        ({"num_hidden_layers": 3}, "tensor 'model.layers.2.input_layernorm.weight' is missing, expected shape"),
        ({"num_hidden_layers": 1}, r"tensor 'model.layers.1.input_layernorm.weight' \(and 8 more\) is not part of the architecture"),
        ({"vocab_size": 65}, r"model.safetensors: tensor 'model.embed_tokens.weight' has shape \(64, 32\), expected \(65, 32\)"),
        ({"tie_word_embeddings": "no"}, "'tie_word_embeddings' is 'no', expected true or false"),
    ],
)
def test_unsupported_or_inconsistent_config(checkpoint, changes, message):
    _edit(checkpoint, **changes)
    with pytest.raises(ValueError, match=message) as error:
        loading.load_transformer(checkpoint)
    assert str(checkpoint) in str(error.value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "qwen2",
            {"layer_types": ["full_attention"]},
            "'layer_types' is .*, expected 'sliding_attention' or 'full_attention' for each of 3",
        ),
        ("gemma3", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True, only False is supported"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx' is True"),
        ("gpt_neo", {"attention_layers": ["global"]}, "'attention_layers' is .*, expected 'global' or 'local' for each of 2 layers"),
        ("gpt_neo", {"attention_layers": None, "attention_types": 3}, "'attention_types' is 3, expected"),
    ],
)
def test_unsupported_variants(family, changes, message, tmp_path):
    checkpoint = Path(shutil.copytree(GOLDEN / family, tmp_path / family))
    _edit(checkpoint, **changes)
    with pytest.raises(ValueError, match=message):
        loading.load_transformer(checkpoint)


def test_broken_files(checkpoint):
    weights = checkpoint / WEIGHTS
    whole = weights.read_bytes()
    for part, why in (
        (whole[: len(whole) // 2], r"tensor 'model\..*' ends at byte \d+ of \d+"),
        (whole[:40], "header"),
        (b"", "header is cut short"),
    ):
        weights.write_bytes(part)
        with pytest.raises(ValueError, match=f"{WEIGHTS}: not a complete safetensors file.*{why}"):
            loading.load_transformer(checkpoint)
    weights.write_bytes(whole[:8] + b"x" + whole[9:])
    with pytest.raises(ValueError, match=r"not a complete safetensors file .the header is damaged"):
        loading.load_transformer(checkpoint)
    weights.write_bytes(whole)
    _edit_tensors(checkpoint, lambda tensors: tensors.update({"model.norm.weight": np.zeros(32, np.int64)}))
    with pytest.raises(ValueError, match=r"model.safetensors: tensor 'model\.norm\.weight' has dtype I64, expected one of F32, F16, BF16"):
        loading.load_transformer(checkpoint)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors: no such file"):
        loading.load_transformer(checkpoint)
    with pytest.raises(ValueError, match=r"config.json: no such file"):
        loading.load_transformer(checkpoint.parent)


def test_broken_indices(checkpoint):
    _split(checkpoint)
    index = checkpoint / f"{WEIGHTS}.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**places, "model.norm.weight": places["model.embed_tokens.weight"]}}))
    with pytest.raises(
        ValueError, match=r"of-00003.safetensors: tensor 'model.norm.weight' is missing, which model.safetensors.index.json says"
    ):
        loading.load_transformer(checkpoint)
    index.write_text(json.dumps({"weight_map": {**places, "model.norm.weight": "../model.safetensors"}}))
    with pytest.raises(ValueError, match=r"index.json: expected 'weight_map', from names of tensors to names of files"):
        loading.load_transformer(checkpoint)
    index.write_text(json.dumps({"weight_map": places}))
    (checkpoint / places["model.norm.weight"]).unlink()
    with pytest.raises(ValueError, match=r"model-0000\d-of-00003.safetensors: no such file"):
        loading.load_transformer(checkpoint)


def test_what_no_layout_holds(tmp_path):
    config, params = loading.load_transformer(GOLDEN / "gemma3")
    with pytest.raises(ValueError, match=r"save_transformer: no supported architecture is like this config \(llama, mistral"):
        loading.save_transformer(tmp_path, dataclasses.replace(config, embedding_scale=1.0), params)
    with pytest.raises(ValueError, match=r"save_transformer: parameter .* has shape"):
        loading.save_transformer(tmp_path, dataclasses.replace(config, hidden=50), params)
    assert not list(tmp_path.iterdir())
    loading.save_transformer(tmp_path, dataclasses.replace(config, dtype="bfloat16", remat="full", scan_layers=False), params)
    assert loading.load_transformer(tmp_path)[0] == config

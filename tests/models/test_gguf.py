"""The reader of GGUF files, on small files written here byte by byte and decoded here number by number."""

import math
import struct
import sys

import numpy as np
import pytest
from reference.gguf import write as write_file

from janax.models import gguf

HEADS, KV_HEADS, HEAD_DIM, WIDTH, HIDDEN, VOCAB = 4, 2, 8, 32, 64, 96
F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, BF16 = 0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 30

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": HIDDEN,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 100000.0,
    "llama.rope.dimension_count": HEAD_DIM,
    "tokenizer.ggml.tokens": ["a", "é", "<s>"],
    "tokenizer.ggml.scores": [0.5, 1.5, -2.0],
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": False,
}


def write(path, tensors, metadata=METADATA, **options):
    return write_file(path, tensors, metadata, **options)


# Decoders of a block, written one number at a time from the definitions of the formats.


def half(content, start):
    return struct.unpack_from("<e", content, start)[0]


def one_q4_0(content):
    packed = content[2:]
    return [half(content, 0) * ((packed[i % 16] >> (4 if i >= 16 else 0) & 15) - 8) for i in range(32)]


def one_q4_1(content):
    packed = content[4:]
    return [half(content, 0) * (packed[i % 16] >> (4 if i >= 16 else 0) & 15) + half(content, 2) for i in range(32)]


def fifth(content, start, i):
    return (struct.unpack_from("<I", content, start)[0] >> i & 1) * 16


def one_q5_0(content):
    packed = content[6:]
    return [half(content, 0) * ((packed[i % 16] >> (4 if i >= 16 else 0) & 15) + fifth(content, 2, i) - 16) for i in range(32)]


def one_q5_1(content):
    packed = content[8:]
    return [
        half(content, 0) * ((packed[i % 16] >> (4 if i >= 16 else 0) & 15) + fifth(content, 4, i)) + half(content, 2) for i in range(32)
    ]


def one_q8_0(content):
    return [half(content, 0) * q for q in struct.unpack("<32b", content[2:])]


def six_bits(packed, j):
    """Scale and minimum of part j of a K block."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    return packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4


def one_k(content, *, fifth_bit):
    found = []
    for i in range(256):
        part, k = divmod(i, 32)
        packed = content[48:] if fifth_bit else content[16:]
        q = packed[part // 2 * 32 + k] >> (4 if part % 2 else 0) & 15
        q += 16 * (content[16 + k] >> part & 1) if fifth_bit else 0
        scale, minimum = six_bits(content[4:16], part)
        found.append(half(content, 0) * scale * q - half(content, 2) * minimum)
    return found


def one_q6_k(content):
    found = []
    for i in range(256):
        part, k = divmod(i % 128, 32)
        low = content[i // 128 * 64 + part % 2 * 32 + k] >> (4 if part >= 2 else 0) & 15
        high = content[128 + i // 128 * 32 + k] >> 2 * part & 3
        scale = struct.unpack_from("<b", content, 192 + i // 16)[0]
        found.append(half(content, 208) * scale * (low + 16 * high - 32))
    return found


BLOCKS = {  # type -> (weights, bytes, places of half-precision numbers, decoder)
    Q4_0: (32, 18, (0,), one_q4_0),
    Q4_1: (32, 20, (0, 2), one_q4_1),
    Q5_0: (32, 22, (0,), one_q5_0),
    Q5_1: (32, 24, (0, 2), one_q5_1),
    Q8_0: (32, 34, (0,), one_q8_0),
    Q4_K: (256, 144, (0, 2), lambda content: one_k(content, fifth_bit=False)),
    Q5_K: (256, 176, (0, 2), lambda content: one_k(content, fifth_bit=True)),
    Q6_K: (256, 210, (208,), one_q6_k),
}


def random_tensor(rng, shape, kind):
    """(shape, type, bytes) and the values of a random tensor."""
    if kind in (F32, F16):
        value = rng.standard_normal(shape).astype("<f4" if kind == F32 else "<f2")
        return (shape, kind, value.tobytes()), value.astype(np.float32)
    if kind == BF16:
        bits = rng.standard_normal(shape).astype("<f4").view("<u4") >> 16
        return (shape, kind, bits.astype("<u2").tobytes()), (bits << 16).view("<f4")
    weights, size, halves, decode = BLOCKS[kind]
    blocks = rng.integers(0, 256, (math.prod(shape) // weights, size), np.uint8)
    for start in halves:
        blocks[:, start : start + 2] = rng.normal(0, 0.1, (len(blocks), 1)).astype("<f2").view(np.uint8)
    values = np.array([decode(bytes(block)) for block in blocks], np.float64)
    return (shape, kind, blocks.tobytes()), values.reshape(shape)


@pytest.fixture
def checkpoint(tmp_path):
    """A file with one Llama layer, and the tensors in it under the stored names."""
    rng = np.random.default_rng(0)
    layout = {
        "token_embd.weight": ((VOCAB, WIDTH), Q8_0),
        "output_norm.weight": ((WIDTH,), F32),
        "blk.0.attn_norm.weight": ((WIDTH,), F32),
        "blk.0.attn_q.weight": ((HEADS * HEAD_DIM, WIDTH), Q4_1),
        "blk.0.attn_k.weight": ((KV_HEADS * HEAD_DIM, WIDTH), F16),
        "blk.0.attn_v.weight": ((KV_HEADS * HEAD_DIM, WIDTH), BF16),
        "blk.0.attn_output.weight": ((WIDTH, HEADS * HEAD_DIM), Q4_0),
        "blk.0.ffn_norm.weight": ((WIDTH,), F32),
        "blk.0.ffn_gate.weight": ((HIDDEN, WIDTH), Q5_0),
        "blk.0.ffn_up.weight": ((HIDDEN, WIDTH), Q5_1),
        "blk.0.ffn_down.weight": ((WIDTH, HIDDEN), Q4_1),
    }
    made = {name: random_tensor(rng, shape, kind) for name, (shape, kind) in layout.items()}
    stored = {name: tensor for name, (tensor, _) in made.items()}
    return write(tmp_path / "tiny.gguf", stored), stored, {name: value for name, (_, value) in made.items()}


def split_halves(value, heads):
    """Rows from interleaved rotary pairs to halves, one head and pair at a time."""
    result, size = np.empty_like(value), len(value) // heads
    for head in range(heads):
        for k in range(size // 2):
            result[head * size + k] = value[head * size + 2 * k]
            result[head * size + size // 2 + k] = value[head * size + 2 * k + 1]
    return result


def test_names_shapes_and_values(checkpoint):
    path, _, values = checkpoint
    layer = "model.layers.0."
    expected = {
        "model.embed_tokens.weight": values["token_embd.weight"],
        "model.norm.weight": values["output_norm.weight"],
        layer + "input_layernorm.weight": values["blk.0.attn_norm.weight"],
        layer + "self_attn.q_proj.weight": split_halves(values["blk.0.attn_q.weight"], HEADS),
        layer + "self_attn.k_proj.weight": split_halves(values["blk.0.attn_k.weight"], KV_HEADS),
        layer + "self_attn.v_proj.weight": values["blk.0.attn_v.weight"],
        layer + "self_attn.o_proj.weight": values["blk.0.attn_output.weight"],
        layer + "post_attention_layernorm.weight": values["blk.0.ffn_norm.weight"],
        layer + "mlp.gate_proj.weight": values["blk.0.ffn_gate.weight"],
        layer + "mlp.up_proj.weight": values["blk.0.ffn_up.weight"],
        layer + "mlp.down_proj.weight": values["blk.0.ffn_down.weight"],
    }
    with gguf.GgufFile(path) as file:
        assert file.names == set(expected)
        for name, value in expected.items():
            assert file.shape(name) == value.shape
            found = file.get(name)
            assert found.dtype == np.float32 and found.flags.writeable
            np.testing.assert_allclose(found, value, rtol=1e-6, atol=1e-6, err_msg=name)


def test_rotary_embeddings_agree(checkpoint):
    """Scores of interleaved rotary embeddings on the stored rows are those of split halves on the returned ones."""
    path, _, values = checkpoint
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5, WIDTH))
    angles = np.arange(5)[:, None] * 100000.0 ** -(np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    turn = np.cos(angles) + 1j * np.sin(angles)

    def scores(q, k, pairs):
        q, k = ((x @ w[:HEAD_DIM].T)[:, pairs] for w in (q, k))  # the first head of each, as [t pair 2]
        q, k = ((one[..., 0] + 1j * one[..., 1]) * turn for one in (q, k))
        return (q @ k.conj().T).real

    stored = scores(values["blk.0.attn_q.weight"], values["blk.0.attn_k.weight"], np.arange(HEAD_DIM).reshape(-1, 2))
    with gguf.GgufFile(path) as file:
        q, k = (file.get(f"model.layers.0.self_attn.{kind}_proj.weight") for kind in "qk")
    np.testing.assert_allclose(scores(q, k, np.arange(HEAD_DIM).reshape(2, -1).T), stored, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_a_part_is_the_part_of_the_whole(checkpoint, name, monkeypatch):
    with gguf.GgufFile(checkpoint[0]) as file:
        whole = file.get(name)
        for index in (..., slice(3, 17), (slice(3, 17),), (slice(5, None), slice(4, 20)), (slice(0, 0),), (slice(None, None, -3),)):
            index = index[: whole.ndim] if isinstance(index, tuple) else index
            np.testing.assert_array_equal(file.get(name, index), whole[index])
        monkeypatch.setattr(gguf, "_CHUNK", 100)  # several pieces
        np.testing.assert_array_equal(file.get(name), whole)


def test_config(checkpoint):
    with gguf.GgufFile(checkpoint[0]) as file:
        config = file.config
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,  # exactly, although the file holds a float32
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    assert config == expected


def test_metadata(checkpoint):
    with gguf.GgufFile(checkpoint[0]) as file:
        assert file.metadata["tokenizer.ggml.tokens"] == ["a", "é", "<s>"]
        assert file.metadata["tokenizer.ggml.scores"] == [0.5, 1.5, -2.0]
        assert file.metadata["tokenizer.ggml.add_bos_token"] is False
        assert file.architecture == "llama"


def test_a_separate_head_and_llama3_scaling(checkpoint, tmp_path):
    _, stored, _ = checkpoint
    frequencies = 100000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    factors = []
    for frequency in frequencies:  # factor 8 beyond wavelengths of 8192, 1 below 2048, between them linear in the number of turns
        length = 2 * math.pi / frequency
        smooth = (8192 / length - 1) / 3
        factors.append(8.0 if length > 8192 else 1.0 if length < 2048 else 1 / ((1 - smooth) / 8 + smooth))
    assert len({round(factor, 3) for factor in factors}) > 1
    extra = {
        "output.weight": stored["token_embd.weight"],
        "rope_freqs.weight": ((len(factors),), F32, np.array(factors, "<f4").tobytes()),
    }
    with gguf.GgufFile(write(tmp_path / "x.gguf", stored | extra)) as file:
        assert file.config["tie_word_embeddings"] is False and "lm_head.weight" in file.names
        assert not any("rope" in name for name in file.names)
        scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        assert file.config["rope_scaling"] == {"rope_type": "llama3", **scaling}
    extra["rope_freqs.weight"] = ((4,), F32, np.array([1, 2, 3, 4], "<f4").tobytes())
    with (
        gguf.GgufFile(write(tmp_path / "y.gguf", stored | extra)) as file,
        pytest.raises(ValueError, match=r"y\.gguf: tensor 'rope_freqs\.weight' is not the scaling of Llama 3"),
    ):
        _ = file.config


def test_qwen2_rows_stay_as_they_are(tmp_path):
    tensor, value = random_tensor(np.random.default_rng(0), (32, WIDTH), F32)
    bias, bias_value = random_tensor(np.random.default_rng(1), (32,), F32)
    metadata = {name.replace("llama", "qwen2"): "qwen2" if entry == "llama" else entry for name, entry in METADATA.items()}
    tensors = {"token_embd.weight": tensor, "blk.0.attn_q.weight": tensor, "blk.0.attn_q.bias": bias}
    with gguf.GgufFile(write(tmp_path / "x.gguf", tensors, metadata)) as file:
        np.testing.assert_array_equal(file.get("model.layers.0.self_attn.q_proj.weight"), value)
        np.testing.assert_array_equal(file.get("model.layers.0.self_attn.q_proj.bias"), bias_value)
        assert file.config["architectures"] == ["Qwen2ForCausalLM"] and file.config["model_type"] == "qwen2"


def test_biases_of_llama_queries_follow_their_rows(tmp_path):
    bias, value = random_tensor(np.random.default_rng(1), (HEADS * HEAD_DIM,), F32)
    embedding, _ = random_tensor(np.random.default_rng(1), (VOCAB, WIDTH), F32)
    with gguf.GgufFile(write(tmp_path / "x.gguf", {"token_embd.weight": embedding, "blk.0.attn_q.bias": bias})) as file:
        found = file.get("model.layers.0.self_attn.q_proj.bias")
        np.testing.assert_array_equal(found, split_halves(value, HEADS))
        np.testing.assert_array_equal(file.get("model.layers.0.self_attn.q_proj.bias", slice(2, 9)), found[2:9])
        assert file.config["attention_bias"] is True


def test_gpt2_matrices_are_turned(tmp_path):
    tensor, value = random_tensor(np.random.default_rng(0), (3 * WIDTH, WIDTH), Q8_0)
    embedding, _ = random_tensor(np.random.default_rng(1), (VOCAB, WIDTH), F32)
    metadata = {
        "general.architecture": "gpt2",
        "gpt2.block_count": 1,
        "gpt2.context_length": 64,
        "gpt2.embedding_length": WIDTH,
        "gpt2.feed_forward_length": HIDDEN,
        "gpt2.attention.head_count": HEADS,
        "gpt2.attention.layer_norm_epsilon": 1e-5,
    }
    with gguf.GgufFile(write(tmp_path / "x.gguf", {"token_embd.weight": embedding, "blk.0.attn_qkv.weight": tensor}, metadata)) as file:
        name = "transformer.h.0.attn.c_attn.weight"
        assert file.names == {"transformer.wte.weight", name} and file.shape(name) == (WIDTH, 3 * WIDTH)
        np.testing.assert_allclose(file.get(name), value.T, rtol=1e-6)
        np.testing.assert_allclose(file.get(name, (slice(4, 9), slice(10, 50))), value.T[4:9, 10:50], rtol=1e-6)
        assert file.config["n_positions"] == 64 and file.config["layer_norm_epsilon"] == 1e-5


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_type_of_block(tmp_path, kind):
    tensor, value = random_tensor(np.random.default_rng(kind), (6, 512), kind)
    with gguf.GgufFile(write(tmp_path / "x.gguf", {"token_embd.weight": tensor})) as file:
        np.testing.assert_allclose(file.get("model.embed_tokens.weight"), value, rtol=1e-5, atol=1e-5)
        found = file.read_stored("token_embd.weight")
    package = pytest.importorskip("gguf")
    raw = np.frombuffer(tensor[2], np.uint8)
    np.testing.assert_array_equal(found.ravel(), package.quants.dequantize(raw, package.GGMLQuantizationType(kind)))


def test_rare_types_are_left_to_the_package(tmp_path, monkeypatch):
    package = pytest.importorskip("gguf")
    raw = np.zeros((4, 2, 84), np.uint8)
    raw[..., :64] = np.random.default_rng(0).integers(0, 256, (4, 2, 64))
    raw[..., 81] = raw[..., 83] = 0x30  # scales of order 0.1
    path = write(tmp_path / "x.gguf", {"token_embd.weight": ((4, 512), 10, raw.tobytes())})
    with gguf.GgufFile(path) as file:
        expected = package.quants.dequantize(raw.reshape(4, -1), package.GGMLQuantizationType.Q2_K)
        np.testing.assert_array_equal(file.get("model.embed_tokens.weight", slice(1, 3)), expected[1:3])
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    with (
        gguf.GgufFile(path) as file,
        pytest.raises(ValueError, match=r"x\.gguf: tensor 'token_embd\.weight' is Q2_K, which needs: pip install 'janax\[gguf\]'"),
    ):
        _ = file.names


def test_a_file_that_is_not_gguf(tmp_path):
    path = tmp_path / "x.gguf"
    with pytest.raises(ValueError, match=r"x\.gguf: no such file"):
        gguf.GgufFile(path)
    for content in (b"", b"GG", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        assert not gguf.is_gguf(path)
        with pytest.raises(ValueError, match=r"x\.gguf: not a GGUF file \(it does not begin with 'GGUF'\)"):
            gguf.GgufFile(path)


@pytest.mark.parametrize(("version", "endian", "message"), [(1, "<", "version 1"), (9, "<", "version 9"), (3, ">", "big endian")])
def test_other_versions(tmp_path, version, endian, message):
    with pytest.raises(ValueError, match=f"a GGUF file of {message}, expected version 2 or 3, little endian"):
        gguf.GgufFile(write(tmp_path / "x.gguf", {}, version=version, endian=endian))


def test_a_truncated_file_names_the_tensor(checkpoint):
    path, _, _ = checkpoint
    content = path.read_bytes()
    path.write_bytes(content[:-32])
    with pytest.raises(
        ValueError, match=r"tiny\.gguf: tensor 'blk\.0\.ffn_down\.weight' ends at byte \d+, but the file has \d+; fetch it again"
    ):
        gguf.GgufFile(path)
    for length in (4, 7, 8, 23, 24, 40, 200, 600):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"tiny\.gguf: the header is damaged or cut short; fetch the file again"):
            gguf.GgufFile(path)


def test_damaged_headers(tmp_path, checkpoint):
    path, _, _ = checkpoint
    content = path.read_bytes()
    place = content.index(b"llama.block_count") + len(b"llama.block_count")
    path.write_bytes(content[:place] + struct.pack("<I", 77) + content[place + 4 :])
    with pytest.raises(ValueError, match=r"tiny\.gguf: 'llama\.block_count' is metadata of the unknown type 77"):
        gguf.GgufFile(path)
    path.write_bytes(content.replace("é".encode(), b"\xff\xfe"))
    with pytest.raises(ValueError, match="the header is damaged"):
        gguf.GgufFile(path)
    with pytest.raises(ValueError, match=r"tensor 'a' has the unknown type 99; known are F32, F16, "):
        gguf.GgufFile(write(tmp_path / "x.gguf", {"a": ((32,), 99, bytes(128))}))
    with pytest.raises(ValueError, match=r"tensor 'a' has shape \(2, 33\), which blocks of Q8_0 do not fill"):
        gguf.GgufFile(write(tmp_path / "x.gguf", {"a": ((2, 33), Q8_0, bytes(128))}))


def test_what_is_not_supported(tmp_path, checkpoint):
    _, stored, _ = checkpoint

    def config(**changes):
        metadata = {**METADATA, **{name.replace("__", "."): value for name, value in changes.items()}}
        metadata = {name: value for name, value in metadata.items() if value is not None}
        with gguf.GgufFile(write(tmp_path / "x.gguf", stored, metadata)) as file:
            return file.names, file.config

    for changes, message in (
        ({"general__architecture": "mamba"}, r"architecture 'mamba' is not supported, expected one of llama, qwen2"),
        ({"general__architecture": None}, r"metadata 'general\.architecture' is missing"),
        ({"llama__block_count": None}, r"metadata 'llama\.block_count' is missing"),
        ({"llama__block_count": "one"}, r"metadata 'llama\.block_count' is one, expected an integer"),
        ({"llama__rope__freq_base": "high"}, r"metadata 'llama\.rope\.freq_base' is high, expected a number"),
        ({"llama__expert_count": 8}, r"metadata 'llama\.expert_count' is 8, which is not supported"),
        ({"llama__rope__scaling__type": "yarn"}, r"metadata 'llama\.rope\.scaling\.type' is 'yarn', which is not supported"),
        ({"llama__rope__dimension_count": 4}, r"rope\.dimension_count' is 4, only the head's size \(8\) is supported"),
        ({"llama__attention__head_count": 5}, r"tensor 'attn_q' of a layer has 32 rows, which 5 heads do not share evenly"),
    ):
        with pytest.raises(ValueError, match=rf"x\.gguf: {message}|x\.gguf: .*{message}"):
            config(**changes)
    _, found = config(llama__rope__scaling__type="linear", llama__rope__scaling__factor=2.0)
    assert found["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_asking_for_what_is_not_there(checkpoint):
    with gguf.GgufFile(checkpoint[0]) as file:
        for ask in (file.get, file.shape):
            with pytest.raises(ValueError, match=r"tiny\.gguf: tensor 'lm_head\.weight' is missing"):
                ask("lm_head.weight")
        with pytest.raises(ValueError, match=r"tiny\.gguf: tensor 'x' is missing"):
            file.read_stored("x")
    with pytest.raises(ValueError, match=r"tensor 'output_norm\.weight' was asked for after the file was closed"):
        file.get("model.norm.weight")


def test_a_tensor_of_no_known_name_keeps_it(tmp_path, checkpoint):
    _, stored, _ = checkpoint
    with gguf.GgufFile(write(tmp_path / "x.gguf", stored | {"blk.0.extra.weight": stored["output_norm.weight"]})) as file:
        assert "blk.0.extra.weight" in file.names

"""SmolLM2-135M-Instruct beside torch: weights, tokens, logits, log-probabilities and the greedy continuation.

The weights are those that `janax fetch smollm2` keeps in the cache; without them these tests are skipped. What is expected was computed by
torch and transformers in float32 (tests/golden/make_smollm2.py says how, the versions are in the file).
"""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janax.models import cache, gguf, tokenizers

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "smollm2.npz")
PROMPTS = range(5)  # prose with digits, code, several languages, 207 tokens, a chat


def _missing():
    try:
        cache.smollm2_path()
    except ValueError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(_missing()), reason=_missing())


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.load_tokenizer(cache.smollm2_path())


@pytest.fixture(scope="module")
def model():
    from janax.models import loading

    return loading.load("smollm2")


def expected(name, i):
    return GOLDEN[f"{name}_{i}"]


def stored(name):
    return json.loads(str(GOLDEN[name]))


def test_decoded_weights_are_equal_to_the_bit():
    with gguf.GgufFile(cache.smollm2_path()) as file:
        assert len(file.names) == 272 and sum(np.prod(file.shape(name)) for name in file.names) == 134_515_008
        for name, digest in stored("digests").items():
            assert hashlib.sha256(file.get(name).tobytes()).hexdigest() == digest, name


def test_tokens_of_texts(tokenizer):
    for text, tokens in zip(stored("texts"), stored("text_tokens"), strict=True):
        assert tokenizer(text).input_ids == tokens, text
        assert tokenizer.decode(tokens) == text


def test_tokens_of_prompts_and_of_a_chat(tokenizer):
    for i, prompt in enumerate(stored("prompts")):
        assert tokenizer(prompt).input_ids == expected("tokens", i).tolist()
    ids = tokenizer.apply_chat_template(stored("chat"), add_generation_prompt=True, return_dict=False)
    assert ids == expected("tokens", len(stored("prompts"))).tolist()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 2, 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("i", PROMPTS)
def test_logits_and_log_probabilities(model, i):
    tokens = jnp.asarray(expected("tokens", i))[None]
    logits = jax.jit(model.logits_fn)(model.params, tokens)[0]
    last, indices = logits[-1], expected("indices", i)
    np.testing.assert_allclose(last[indices], expected("logits", i), rtol=0, atol=2e-3)
    np.testing.assert_allclose(jax.nn.logsumexp(last), expected("logsumexp", i), rtol=0, atol=2e-3)
    largest = jax.lax.top_k(last, 64)[1]
    np.testing.assert_allclose(np.sort(last[largest]), np.sort(expected("logits", i)[:64]), rtol=0, atol=2e-3)
    log_probs = jax.nn.log_softmax(logits[:-1])[jnp.arange(tokens.shape[1] - 1), tokens[0, 1:]]
    np.testing.assert_allclose(log_probs, expected("log_probs", i), rtol=0, atol=5e-4)


@pytest.mark.slow
def test_logits_are_hidden_states_times_the_unembedding(model):
    tokens = jnp.asarray(expected("tokens", 0))[None]
    product = model.hidden_fn(model.params, tokens)[0, -1] @ model.unembed(model.params)
    np.testing.assert_allclose(product[expected("indices", 0)], expected("logits", 0), rtol=0, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("i", PROMPTS)
def test_greedy_continuation(model, i):
    """Without a cache, in a row of fixed length: what is behind a token does not reach it. No margin in the file is below 0.02."""
    prompt, greedy = expected("tokens", i), expected("greedy", i)
    row = np.zeros(len(prompt) + len(greedy), np.int32)
    row[: len(prompt)] = prompt

    @jax.jit
    def next_token(params, row, position):
        hidden = jax.lax.dynamic_index_in_dim(model.hidden_fn(params, row[None])[0], position, keepdims=False)
        return jnp.argmax(hidden @ model.unembed(params))

    for position in range(len(prompt), len(row)):
        row[position] = next_token(model.params, row, position - 1)
    np.testing.assert_array_equal(row[len(prompt) :], greedy)
    assert expected("margins", i).min() > 0.02


@pytest.mark.slow
def test_the_tokenizer_comes_with_the_model(model):
    assert model.tokenizer("a   7").input_ids == [81, 333, 39]

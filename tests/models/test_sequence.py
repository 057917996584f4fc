import dataclasses
import functools
import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janax.jaxlib_ext import kmers, sharding
from janax.models import encoder, loading, presets, sequence
from janax.models.sequence import AMINO_ACIDS, DNA, Batch

SIZES = {"width": 16, "depth": 1, "heads": 2, "hidden": 24, "max_length": 12, "scan_layers": False}
KMERS = dataclasses.replace(sequence.DNA_KMERS, config=dataclasses.replace(presets.DNA_KMERS, **SIZES))
FRAMED = dataclasses.replace(sequence.DNABERT_3, config=dataclasses.replace(presets.DNABERT_3, **SIZES))
RESIDUES = dataclasses.replace(sequence.ESM2_8M, config=dataclasses.replace(presets.ESM2_8M, **SIZES))
MODELS = {"kmers": KMERS, "framed": FRAMED, "residues": RESIDUES}

_jit = functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
_features = functools.partial(_jit, static_argnames="both_strands")(sequence.features)


@functools.cache
def _params(name):
    return jax.tree.map(lambda x: 5 * np.asarray(x), _jit(encoder.init)(MODELS[name].config, jax.random.key(0)))


def _letters(name, rows=4, length=8):
    return np.random.default_rng(3).integers(0, len(MODELS[name].alphabet.letters), (rows, length)).astype(np.int32)


def _one_hot(letters, v):
    return np.eye(v, dtype=np.float32)[letters]


# Alphabets.


def test_published_vocabularies():
    kmers = sequence.DNABERT_3.alphabet
    assert (kmers.k, kmers.vocab_size, kmers.pad, kmers.unknown, kmers.start, kmers.end, kmers.mask) == (3, 69, 0, 1, 2, 3, 4)
    theirs = {letter: i for i, letter in enumerate("ATCG")}
    for number, run in enumerate(itertools.product(DNA, repeat=3)):
        i, j, k = (theirs[letter] for letter in run)
        assert kmers.ids[number] == 5 + 16 * i + 4 * j + k
    protbert, esm = sequence.PROTBERT.alphabet, sequence.ESM2_650M.alphabet
    assert (protbert.vocab_size, sorted(protbert.ids), protbert.unknown) == (30, list(range(5, 25)), 25)
    assert (protbert.ids[0], protbert.ids[AMINO_ACIDS.index("L")], protbert.ids[-1]) == (6, 5, 20)  # A, L, Y
    assert (esm.vocab_size, sorted(esm.ids), esm.unknown, esm.mask) == (33, list(range(4, 24)), 24, 32)
    assert (esm.start, esm.pad, esm.end) == (0, 1, 2)
    assert sequence.DNA_LETTERS.alphabet.ids == (5, 7, 8, 6)  # A, C, G, T among A, T, C, G
    assert not sequence.DNA_KMERS.alphabet.framed and kmers.framed
    assert kmers.complement == (3, 2, 1, 0) and esm.complement is None
    assert {hash(model) for model in MODELS.values()}


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (sequence.DNABERT_3, 86e6),
        (sequence.PROTBERT, 420e6),
        (sequence.ESM2_650M, 651e6),
        (sequence.DNA_KMERS, 76e3),
        (sequence.DNA_LETTERS, 0.55e6),
        (sequence.PROTEIN_SMALL, 0.58e6),
    ],
)
def test_sizes(model, count):
    shapes = jax.eval_shape(lambda key: encoder.init(model.config, key), jax.random.key(0))
    assert abs(sum(x.size for x in jax.tree.leaves(shapes)) / count - 1) < 0.01


def test_sequences_become_tokens():
    letters, lengths = sequence.encode(KMERS.alphabet, ["AGGTATCA", "ttacg", "ACNGT"])
    np.testing.assert_array_equal(lengths, [8, 5, 5])
    np.testing.assert_array_equal(letters, [[0, 2, 2, 3, 0, 3, 1, 0], [3, 3, 0, 1, 2, 4, 4, 4], [0, 1, 4, 2, 3, 4, 4, 4]])
    place = {token: i for i, token in enumerate(sequence.DNABERT_VOCABULARY)}
    words = [[place[text[i : i + 3]] for i in range(len(text) - 2)] for text in ("AGGTATCA", "TTACG")]
    bare = sequence.tokenize(KMERS.alphabet, letters, lengths)
    np.testing.assert_array_equal(bare.tokens, [words[0], [*words[1], 0, 0, 0], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(bare.mask, np.asarray(bare.tokens) != 0)
    np.testing.assert_array_equal(bare.segment_ids, np.asarray(bare.tokens) != 0)
    framed = sequence.tokenize(FRAMED.alphabet, letters, lengths)
    np.testing.assert_array_equal(framed.tokens[:2], [[2, *words[0], 3], [2, *words[1], 3, 0, 0, 0]])
    np.testing.assert_array_equal(framed.mask[:2], [[0, 1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(framed.segment_ids[1], [1, 1, 1, 1, 1, 0, 0, 0])
    whole = sequence.tokenize(FRAMED.alphabet, letters[:1])
    assert whole.segment_ids is None
    np.testing.assert_array_equal(whole.tokens, framed.tokens[:1])
    np.testing.assert_array_equal(whole.mask, framed.mask[:1])
    protein, _ = sequence.encode(RESIDUES.alphabet, ["MUX"])
    np.testing.assert_array_equal(sequence.tokenize(RESIDUES.alphabet, protein).tokens, [[0, 20, 24, 24, 2]])


def test_soft_kmers():
    rows = np.random.default_rng(0).dirichlet(np.ones(4), (2, 5))
    expected = np.zeros((2, 3, 64))
    for b, l, i, j, k in itertools.product(range(2), range(3), range(4), range(4), range(4)):
        expected[b, l, 16 * i + 4 * j + k] = rows[b, l, i] * rows[b, l + 1, j] * rows[b, l + 2, k]
    np.testing.assert_allclose(kmers.soft_kmers(rows, k=3), expected, rtol=1e-6)
    np.testing.assert_allclose(kmers.soft_kmers(rows[0], k=1), rows[0], rtol=1e-6)
    with pytest.raises(ValueError, match=r"soft_kmers: 'rows' has shape \(2, 5, 4\), expected \[... l v\] with l of at least k=6"):
        kmers.soft_kmers(rows, k=6)


@pytest.mark.parametrize("name", MODELS)
def test_rows_become_the_tokens_they_stand_for(name, strict):
    alphabet, lengths = MODELS[name].alphabet, np.array([8, 5, 3, 7], np.int32)
    letters, v = _letters(name), len(MODELS[name].alphabet.letters)
    rows = _one_hot(letters, v)
    for given in (None, lengths):
        hard = sequence.tokenize(alphabet, letters, given)
        for soft_rows in (rows, kmers.soft_kmers(rows, k=alphabet.k)):
            soft = sequence.tokenize(alphabet, soft_rows, given)
            np.testing.assert_array_equal(soft.tokens, _one_hot(np.asarray(hard.tokens), alphabet.vocab_size))
            chex.assert_trees_all_equal(soft[1:], hard[1:])


def test_reverse_complements():
    letters, lengths = sequence.encode(KMERS.alphabet, ["AGGTATCA", "TTACG", "ACNGT"])
    other = np.asarray(sequence.reverse_complement(KMERS.alphabet, letters, lengths))
    back = ["".join((DNA + "N")[i] for i in row[:n]) for row, n in zip(other, lengths)]
    assert back == ["TGATACCT", "CGTAA", "ACNGT"]
    np.testing.assert_array_equal(sequence.reverse_complement(KMERS.alphabet, letters[:1]), other[:1])
    rows = _one_hot(letters[:1], 4)
    swapped = sequence.reverse_complement(KMERS.alphabet, rows)
    np.testing.assert_array_equal(swapped, _one_hot(other[:1], 4))
    soft = np.random.default_rng(0).dirichlet(np.ones(4), (2, 8)).astype(np.float32)
    for given in (None, np.array([8, 6], np.int32)):
        turned = sequence.reverse_complement(KMERS.alphabet, kmers.soft_kmers(soft, k=3), given)
        expected = kmers.soft_kmers(sequence.reverse_complement(KMERS.alphabet, soft, given), k=3)
        for row, wanted, n in zip(turned, expected, (6, 6) if given is None else (6, 4)):
            np.testing.assert_allclose(row[:n], wanted[:n], rtol=1e-5)
    with pytest.raises(ValueError, match="reverse_complement: letters 'ACDEFGHIKLMNPQRSTVWY' have no complements"):
        sequence.reverse_complement(RESIDUES.alphabet, letters)


# Features.


@pytest.mark.parametrize("name", MODELS)
def test_features_are_the_mean_over_letters(name):
    model, params, letters = MODELS[name], _params(name), _letters(name)
    tokens = sequence.tokenize(model.alphabet, letters).tokens
    h = np.asarray(_jit(encoder.hidden)(model.config, params, tokens))
    expected = (h[:, 1:-1] if model.alphabet.framed else h).mean(axis=1)
    phi = _features(model, params, letters)
    np.testing.assert_allclose(phi, expected, atol=1e-5)
    np.testing.assert_allclose(_features(model, params, letters[1]), expected[1], atol=1e-5)
    rows = _one_hot(letters, len(model.alphabet.letters))
    np.testing.assert_allclose(_features(model, params, rows), phi, atol=2e-6)
    np.testing.assert_allclose(_features(model, params, rows[2]), phi[2], atol=2e-6)
    np.testing.assert_allclose(_features(model, params, kmers.soft_kmers(rows, k=model.alphabet.k)), phi, atol=2e-6)


@pytest.mark.parametrize("name", ["framed", "residues"])
def test_what_is_behind_a_sequence_does_not_matter(name):
    model, params, letters = MODELS[name], _params(name), _letters(name)
    short = _features(model, params, letters[:, :6])
    lengths = np.full(4, 6, np.int32)
    np.testing.assert_allclose(_features(model, params, letters, lengths), short, atol=1e-5)
    rows = _one_hot(letters, len(model.alphabet.letters))
    np.testing.assert_allclose(_features(model, params, rows, lengths), short, atol=1e-5)


def test_both_strands_have_the_features_of_their_pair():
    letters = _letters("kmers")
    other = np.asarray(sequence.reverse_complement(KMERS.alphabet, letters))
    phi, turned = (_features(KMERS, _params("kmers"), x, both_strands=True) for x in (letters, other))
    np.testing.assert_allclose(phi, turned, atol=1e-5)
    each = [np.asarray(_features(KMERS, _params("kmers"), x)) for x in (letters, other)]
    assert np.max(np.abs(each[0] - each[1])) > 0.1
    np.testing.assert_allclose(phi, (each[0] + each[1]) / 2, atol=1e-5)
    rows = _one_hot(letters, 4)
    np.testing.assert_allclose(_features(KMERS, _params("kmers"), rows, both_strands=True), phi, atol=2e-6)


@_jit
def _slope(model, params, rows, direction):
    def value(size):
        return jnp.sum(jnp.sin(sequence.features(model, params, rows + size * direction)))

    return jax.grad(value)(0.0), (value(2e-4) - value(-2e-4)) / 4e-4


@pytest.mark.parametrize("name", ["kmers", "residues"])
def test_gradient_in_letters_agrees_with_finite_differences(name):
    v = len(MODELS[name].alphabet.letters)
    rng = np.random.default_rng(0)
    rows, direction = rng.dirichlet(np.ones(v), (4, 8)).astype(np.float32), rng.standard_normal((4, 8, v), np.float32)
    slope, difference = _slope(MODELS[name], _params(name), rows, direction)
    np.testing.assert_allclose(slope, difference, rtol=1e-2, atol=5e-2)  # rounding 1e-5 of the sum / 4e-4, plus O(step^2)


def test_vmap_equals_the_batch():
    letters = _letters("framed")
    run = _jit(lambda model, params, x: jax.vmap(sequence.features_fn(model), (None, 0))(params, x))
    np.testing.assert_allclose(run(FRAMED, _params("framed"), letters), _features(FRAMED, _params("framed"), letters), atol=1e-5)


def test_features_are_traced_once():
    run = jax.jit(chex.assert_max_traces(lambda params, x: sequence.features(KMERS, params, x), n=1))
    for i in range(10):
        run(_params("kmers"), (_letters("kmers") + i) % 4)


def test_same_numbers_on_a_mesh(mesh):
    params, letters, rows = _params("framed"), _letters("framed"), _one_hot(_letters("framed"), 4)
    lengths = np.full(4, 8, np.int32)
    targets = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    expected = np.asarray(_features(FRAMED, params, letters))
    readout = sequence.init_readout(FRAMED, 3)
    if mesh is not None:
        params = sharding.place(params, sharding.shardings(params, encoder.SHARDING_RULES, mesh))
        letters, rows, lengths, targets = (jax.device_put(x, jax.P("data")) for x in (letters, rows, lengths, targets))
    for x, given in ((letters, None), (rows, None), (letters, lengths)):
        np.testing.assert_allclose(_features(FRAMED, params, x, given), expected, atol=1e-5)
    loss, info = _masked(FRAMED, params, Batch(letters, lengths), jax.random.key(0), 3)
    assert info["weight"] == 12 and 0 < loss < 10
    loss, _ = _jit(sequence.regression_loss)(FRAMED, {"encoder": params, "readout": readout}, Batch(letters, None, targets))
    np.testing.assert_allclose(loss, np.mean(np.square(np.asarray(targets))), rtol=1e-6)


# Losses.


@functools.partial(jax.jit, static_argnums=(0, 4, 5), compiler_options={"xla_backend_optimization_level": 0})
def _masked(model, params, batch, key, span=1, num_spans=1):
    return sequence.masked_loss(model, params, batch, key, span=span, num_spans=num_spans)


def test_the_masked_loss_of_a_network_that_knows_nothing():
    params = {**_params("kmers"), "embed": {**_params("kmers")["embed"], "tokens": np.zeros((69, 16), np.float32)}}
    with jax.debug_key_reuse(True):
        loss, info = _masked(KMERS, params, Batch(_letters("kmers")), jax.random.key(1), 3)
    np.testing.assert_allclose(loss, np.log(69), rtol=1e-6)  # logits are all the bias, 0
    assert info["weight"] == 12 and info["accuracy"] == 0


def test_the_masked_loss_hides_spans():
    """With an unembedding that copies the token it is shown, what is not masked would be known: what is masked is taken for [MASK]."""
    identity = np.zeros((69, 80), np.float32)
    identity[:, :69] = np.eye(69)
    config = dataclasses.replace(KMERS.config, width=80, depth=1, hidden=1)
    shapes = jax.eval_shape(lambda key: encoder.init(config, key), jax.random.key(0))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    for norm in (params["embed"]["norm"], params["blocks"]["attention_norm"], params["blocks"]["mlp_norm"], params["head"]["norm"]):
        norm["scale"] += 1
    params["embed"]["tokens"], params["head"]["dense"]["kernel"] = identity, np.eye(80, dtype=np.float32)
    model, letters = dataclasses.replace(KMERS, config=config), _letters("kmers", 64)
    tokens = sequence.tokenize(model.alphabet, letters).tokens
    np.testing.assert_array_equal(jnp.argmax(_jit(encoder.logits)(config, params, tokens), axis=-1), tokens)
    for span, num_spans, weight in ((3, 1, 192), (1, 6, 384)):
        _, info = _masked(model, params, Batch(letters), jax.random.key(0), span, num_spans)
        assert info["weight"] == weight and info["accuracy"] == 0
    _, info = _masked(model, params, Batch(letters, np.repeat(np.array([3, 4, 5, 8], np.int32), 16)), jax.random.key(0), 3)
    assert info["weight"] == 16 * (0 + 0 + 3 + 3)  # three and four letters make no span of three 3-mers


def test_spans_begin_anywhere():
    """Over many draws each of the four places for a span of three in six tokens is as likely as the others."""
    letters = np.zeros((4096, 8), np.int32)
    letters[:, 2] = 1  # AAC ACA CAA AAA AAA AAA: the token AAC is masked only with the first span
    bias = np.zeros(69, np.float32)
    bias[KMERS.alphabet.ids[1]] = 100.0  # and is what the network always says
    params = _params("kmers")
    params = {**params, "embed": {**params["embed"], "tokens": np.zeros((69, 16), np.float32)}, "head": {**params["head"], "bias": bias}}
    _, info = _masked(KMERS, params, Batch(letters), jax.random.key(0), 3)
    assert abs(float(info["accuracy"]) * 12 - 1) < 0.1  # one of three tokens in a quarter of the rows; standard deviation 0.027


def test_the_regression_loss():
    letters, rng = _letters("kmers", 6), np.random.default_rng(0)
    targets = rng.standard_normal((6, 3)).astype(np.float32)
    targets[0, 1] = np.nan
    readout = {"kernel": rng.standard_normal((16, 3)).astype(np.float32), "bias": rng.standard_normal(3).astype(np.float32)}
    params = {"encoder": _params("kmers"), "readout": readout}
    phi = np.asarray(_features(KMERS, _params("kmers"), letters))
    error = np.square(phi @ readout["kernel"] + readout["bias"] - targets)
    step = _jit(jax.value_and_grad(sequence.regression_loss, argnums=1, has_aux=True))
    (loss, info), grads = step(KMERS, params, Batch(letters, None, targets))
    np.testing.assert_allclose(loss, np.nanmean(error), rtol=1e-5)
    assert info["weight"] == 17
    spread = np.nansum(np.square(targets - np.nanmean(targets, axis=0)))
    np.testing.assert_allclose(info["r2"], 1 - np.nansum(error) / spread, rtol=1e-4)
    expected = 2 * phi.T @ np.nan_to_num(phi @ readout["kernel"] + readout["bias"] - targets) / 17
    np.testing.assert_allclose(grads["readout"]["kernel"], expected, rtol=1e-4, atol=1e-4)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(grads))
    assert np.any(grads["encoder"]["embed"]["tokens"])


# Loading.


@pytest.mark.parametrize("name", MODELS)
def test_directories_make_the_round_trip(name, tmp_path):
    model, params = MODELS[name], _params(name)
    sequence.save(tmp_path, model, params)
    again, loaded = sequence.load(tmp_path, model.alphabet.letters, framed=model.alphabet.framed)
    assert again == dataclasses.replace(model, config=dataclasses.replace(model.config, scan_layers=True))
    chex.assert_trees_all_equal(loaded, params)


@pytest.mark.parametrize(
    ("published", "letters"), [(sequence.DNABERT_3, DNA), (sequence.PROTBERT, AMINO_ACIDS), (sequence.ESM2_650M, AMINO_ACIDS)]
)
def test_published_layouts(published, letters, tmp_path):
    vocabulary = {69: sequence.DNABERT_VOCABULARY, 30: sequence.PROTBERT_VOCABULARY, 33: sequence.ESM2_VOCABULARY}
    config = dataclasses.replace(published.config, **SIZES)
    shapes = jax.eval_shape(lambda key: encoder.init(config, key), jax.random.key(0))
    params = jax.tree.map(lambda x: np.random.default_rng(0).standard_normal(x.shape, np.float32), shapes)
    loading.save_encoder(tmp_path, config, params)
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary[config.vocab_size]))  # as published: no line break at the end
    model, loaded = sequence.load(tmp_path, letters)
    assert model.alphabet == published.alphabet
    chex.assert_trees_all_equal(loaded, params)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(ValueError, match=r"there is no vocab.txt and no tokenizer.json"):
        sequence.load(tmp_path, letters)
    entries = {token: i for i, token in enumerate(vocabulary[config.vocab_size]) if token != "[MASK]"}
    added = [{"id": 4, "content": "[MASK]"}] if "[MASK]" in vocabulary[config.vocab_size] else []
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": entries}, "added_tokens": added}))
    assert sequence.load(tmp_path, letters)[0].alphabet == published.alphabet
    other = AMINO_ACIDS if letters == DNA else DNA
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.*: alphabet: 'vocabulary' of .* tokens lacks '"):
        sequence.load(tmp_path, other + "+")


def test_vocabulary_errors(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\nA\nA\n")
    with pytest.raises(ValueError, match=r"vocab.txt: token 'A' stands there twice"):
        loading.load_vocabulary(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": [["A", 0.0]]}}))
    with pytest.raises(ValueError, match=r'tokenizer.json: the model is "Unigram", expected one with a vocabulary of words'):
        loading.load_vocabulary(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"A": 0}}, "added_tokens": [{"id": 0, "content": "B"}]}))
    with pytest.raises(ValueError, match=r"id 0 stands for 'A' and for 'B'"):
        loading.load_vocabulary(tmp_path)
    with pytest.raises(ValueError, match=r"save_vocabulary: token 'a b' holds white space"):
        loading.save_vocabulary(tmp_path, ["a b"])
    with pytest.raises(ValueError, match=r"save_vocabulary: a token stands in 'vocabulary' twice"):
        loading.save_vocabulary(tmp_path, ["a", "a"])
    loading.save_vocabulary(tmp_path, ["a", "", "b", ""])
    assert loading.load_vocabulary(tmp_path) == ("a", "", "b", "")


def test_alphabet_errors():
    with pytest.raises(ValueError, match="alphabet: 'vocabulary' of 68 tokens lacks 'GGG' and 0 more runs"):
        sequence.alphabet(sequence.DNABERT_VOCABULARY[:-1], DNA)
    with pytest.raises(ValueError, match=r"alphabet: 'vocabulary' has no token for 'mask', expected one of \[MASK\], <mask>"):
        sequence.alphabet(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *DNA), DNA)
    with pytest.raises(ValueError, match="lacks any run of 4 letters of 'ACGT'"):
        sequence.alphabet(sequence.DNABERT_VOCABULARY, DNA, k=4)
    with pytest.raises(ValueError, match="Alphabet: 'letters' is 'AA', expected different letters"):
        dataclasses.replace(KMERS.alphabet, letters="AA")
    with pytest.raises(ValueError, match=r"Alphabet: 'ids' has 64 entries, expected v\^k with v=4 and k=2"):
        dataclasses.replace(KMERS.alphabet, k=2)
    with pytest.raises(ValueError, match="Alphabet: 'start' is 2 and 'end' None, expected both or neither"):
        dataclasses.replace(KMERS.alphabet, start=2)
    with pytest.raises(ValueError, match="Alphabet: 'mask' holds 69, expected tokens below 'vocab_size' 69"):
        dataclasses.replace(KMERS.alphabet, mask=69)
    with pytest.raises(ValueError, match="SequenceModel: the network has 33 tokens, the alphabet 69"):
        dataclasses.replace(KMERS, config=RESIDUES.config)
    with pytest.raises(ValueError, match="SequenceModel: 'mask_token' of the network is 5, the alphabet's 32"):
        dataclasses.replace(RESIDUES, config=dataclasses.replace(RESIDUES.config, mask_token=5))


def test_argument_errors():
    params, letters = _params("kmers"), _letters("kmers")
    with pytest.raises(ValueError, match=r"encode: 'texts' has lengths \[2\], expected at least one text, of 3 letters or more each"):
        sequence.encode(KMERS.alphabet, ["AC"])
    with pytest.raises(ValueError, match=r"tokenize: 'x' has shape \(4, 2\), expected numbers of letters \[b l\] with l of at least 3"):
        sequence.features(KMERS, params, letters[:, :2])
    with pytest.raises(ValueError, match=r"'x' has dtype float32 and shape \(4, 8, 5\), expected .* \[b l 4\] or \[b l-2 64\]"):
        sequence.features(KMERS, params, np.ones((4, 8, 5), np.float32))
    with pytest.raises(ValueError, match=r"tokenize: 'lengths' has shape \(3,\), expected \[b\] with b=4 from 'x'"):
        sequence.features(KMERS, params, letters, np.ones(3, np.int32))
    with pytest.raises(ValueError, match="tokenize: 'lengths' has dtype float32, expected integers"):
        sequence.features(KMERS, params, letters, np.ones(4, np.float32))
    with pytest.raises(ValueError, match="features: 'x' makes 18 tokens, the network has positions for 12"):
        sequence.features(KMERS, params, np.zeros((1, 20), np.int32))
    with pytest.raises(ValueError, match="masked_loss: 'letters' has dtype float32, expected integer numbers"):
        sequence.masked_loss(KMERS, params, Batch(_one_hot(letters, 4)), jax.random.key(0))
    with pytest.raises(ValueError, match="masked_loss: 'span' 3 and 'num_spans' 5 do not fit sequences with 4 places for a span"):
        sequence.masked_loss(KMERS, params, Batch(letters), jax.random.key(0), span=3, num_spans=5)
    tree = {"encoder": params, "readout": sequence.init_readout(KMERS, 3)}
    with pytest.raises(ValueError, match=r"regression_loss: 'targets' has shape \(4, 2\), expected \[b m\] with m=3 from 'kernel'"):
        sequence.regression_loss(KMERS, tree, Batch(letters, None, np.ones((4, 2), np.float32)))

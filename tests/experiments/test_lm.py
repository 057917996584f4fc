"""Text, packing and the language-model experiment on a few hundred documents."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import rich.console

from janax.experiments import lm, text, training
from janax.experiments import session as sessions
from janax.experiments.config import TrainConfig
from janax.experiments.errors import UserError
from janax.experiments.metrics import read_rows
from janax.models import loading, lora

ENCODE = lambda t: [ord(c) % 50 + 1 for c in t]  # noqa: E731


def documents(lengths):
    return [text.Document(("x" * length,), (True,)) for length in lengths]


def test_docstrings_are_real_text_without_an_import():
    found = text.docstrings("optax")
    assert len(found) > 100 and len(set(found)) == len(found)
    assert all(len(one) > 150 for one in found)
    assert text.docstrings("optax") == found
    assert text.fingerprint(found) == text.fingerprint(list(found)) != text.fingerprint(found[1:])


def test_a_package_that_is_not_there():
    with pytest.raises(UserError, match="'no_such_package', which is not installed"):
        text.docstrings("no_such_package")


def test_packing_keeps_every_token_once():
    lengths = np.random.default_rng(0).integers(1, 40, 60)
    rows = text.pack(documents(lengths), ENCODE, 0, 32)
    # document of n characters: n tokens and the end, all of which something predicts
    assert int(rows.mask.sum()) == int(np.sum(lengths + 1))
    assert not rows.mask[:, 0].any() and not rows.mask[rows.segment_ids == 0].any()
    starts = np.diff(rows.segment_ids, axis=1) != 0
    assert not (rows.mask[:, 1:] & starts).any()  # a segment's first token is context
    assert (rows.segment_ids > 0).mean() > 0.9


def test_a_long_document_is_cut_with_its_context():
    ids = list(range(1, 71))
    rows = text.pack([text.Document(("a",), (True,))], lambda t: ids, 0, 32)
    pieces = sorted((tuple(t[s > 0].tolist()), tuple(m[s > 0].tolist())) for t, s, m in zip(rows.tokens, rows.segment_ids, rows.mask))
    whole = sorted(pieces, key=lambda piece: piece[0][1])
    assert [piece[0][0] for piece in whole] == [0, 31, 62]
    assert [token for piece in whole for token in piece[0][1:]] == [*ids, 0]
    assert all(mask == (False, *(True,) * (len(mask) - 1)) for _, mask in whole)


def test_only_completions_are_trained_on():
    rows = text.pack([text.Document(("question", "answer"), (False, True))], ENCODE, 0, 32)
    np.testing.assert_array_equal(np.flatnonzero(rows.mask[0]), np.arange(9, 16))  # 0, 8 of the question, 6 of the answer, the end


def test_batches_are_a_function_of_seed_and_position():
    rows = text.pack(documents([30] * 20), ENCODE, 0, 32)
    rows = rows._replace(tokens=np.arange(20, dtype=np.int32)[:, None] + np.zeros((1, 32), np.int32))
    batch = text.batches(rows, 6, seed=3)
    one_pass = np.concatenate([batch(i)["tokens"][:, 0] for i in range(3)])
    assert len(set(one_pass.tolist())) == 18
    np.testing.assert_array_equal(batch(1)["tokens"], text.batches(rows, 6, seed=3)(1)["tokens"])
    assert not np.array_equal(batch(0)["tokens"], batch(3)["tokens"])
    with pytest.raises(UserError, match=r"fewer than train\.batch_size 21"):
        text.batches(rows, 21, seed=0)


def test_reading_files(tmp_path):
    (tmp_path / "a.txt").write_text("plain text")
    lines = [{"text": "one"}, {"prompt": "p", "completion": "c"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = text.read_documents(tmp_path)
    assert [document.pieces for document in found] == [("plain text",), ("one",), ("p", "c")]
    assert found[2].trained == (False, True)
    (tmp_path / "c.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(UserError, match=r"c\.jsonl:1 holds chat messages"):
        text.read_documents(tmp_path / "c.jsonl")
    (tmp_path / "d.jsonl").write_text('{"txet": "misspelt"}\n')
    with pytest.raises(UserError, match=r"d\.jsonl:1 holds none of"):
        text.read_documents(tmp_path / "d.jsonl")
    (tmp_path / "e.jsonl").write_text("not json\n")
    with pytest.raises(UserError, match=r"e\.jsonl:1 is not JSON"):
        text.read_documents(tmp_path / "e.jsonl")
    with pytest.raises(UserError, match=r"holds no \.txt or \.jsonl file"):
        text.read_documents(tmp_path / "nothing")


def test_the_tokenizer_splits_digits_and_comes_back():
    tokenizer = text.train_tokenizer(text.docstrings("optax")[:100], 512)
    sample = "Update 1234 of\n  the parameters"
    assert tokenizer.decode(tokenizer.encode(sample).ids) == sample
    assert tokenizer.encode("1234").tokens == ["1", "2", "3", "4"]
    assert tokenizer.token_to_id("<|endoftext|>") == 0


CONFIG = dataclasses.replace(
    lm.SMOKE,
    text=lm.TextConfig(packages=("flax",), max_documents=60, vocab_size=400, sequence_length=32),
    num_samples=1,
    sample_tokens=4,
    train=TrainConfig(num_steps=12, batch_size=8, checkpoint_every=6, log_every=3),
)


def open_session(config, tmp_path):
    return sessions.open_session("lm", config, tmp_path / "run", console=rich.console.Console(quiet=True), signals=False)


@pytest.mark.slow
def test_the_experiment_runs_and_reports(tmp_path):
    with open_session(CONFIG, tmp_path) as session:
        results = lm.run(CONFIG, session)
    assert [claim.id for claim in results.claims] == ["lm-1"]
    assert (session.workdir / "text" / "tokenizer.json").exists() and (session.workdir / "figures" / "loss.png").exists()
    rows = [json.loads(line) for line in (session.workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] < 1.2 * np.log(400)
    assert any("held_out" in row for row in rows)


def test_programs_are_the_training_step_prefill_and_decode():
    config = dataclasses.replace(
        CONFIG, programs=("train", "prefill", "decode"), serve=lm.ServeConfig(batch_size=8, cache_length=64, prompt_length=16)
    )
    programs = list(lm.programs(config, jax.devices()))
    assert [program.name.split(" (")[0] for program in programs] == ["training step", "prefill", "decode"]
    for program in programs:
        jax.jit(program.fn, in_shardings=program.in_shardings).lower(*program.args)


def test_adapters_need_weights(tmp_path):
    config = dataclasses.replace(CONFIG, lora=lm.LoraConfig(rank=4))
    with open_session(config, tmp_path) as session, pytest.raises(UserError, match=r"lora\.rank needs model\.weights"):
        lm.run(config, session)


@pytest.mark.slow
def test_adapters_of_a_loaded_model_on_chats(tmp_path, tiny_model):
    """Tuning on what the assistant says, over eight devices; the adapter comes back, and the base is as it was."""
    talk = [{"role": "user", "content": "a few words"}, {"role": "assistant", "content": "and a few more words to merge"}]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"messages": talk}) for _ in range(20)))
    config = dataclasses.replace(
        CONFIG,
        text=lm.TextConfig(path=str(file), sequence_length=64),
        model=lm.ModelConfig(weights=str(tiny_model)),
        lora=lm.LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "down_proj")),
        optimizer=dataclasses.replace(CONFIG.optimizer, learning_rate=2e-2),
    )
    before = (tiny_model / "model.safetensors").read_bytes()
    with open_session(config, tmp_path) as session:
        lm.run(config, session)
    losses = [row["loss"] for row in read_rows(session.workdir / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    adapters, scale = lora.load_peft(session.workdir / "adapter-seed0", loading.load(tiny_model).config)
    assert set(adapters) == {"q_proj", "down_proj"} and scale == 2.0
    assert float(np.abs(adapters["q_proj"]["b"]).max()) > 0
    assert (tiny_model / "model.safetensors").read_bytes() == before


def test_only_what_the_assistant_says_counts(tiny_model):
    tokenizer = loading.load(tiny_model).tokenizer
    talk = [{"role": "user", "content": "words"}, {"role": "assistant", "content": "more"}, {"role": "user", "content": "few"}]
    document = text.render_chat(tokenizer, talk)
    assert "".join(document.pieces) == tokenizer.apply_chat_template(talk, tokenize=False)
    assert [piece for piece, trained in zip(document.pieces, document.trained) if trained] == ["more\n"]


def test_the_rate_of_steps_that_are_dispatched_ahead(monkeypatch):
    """Nine calls at once, then a wait of two seconds: five steps a second, not thousands."""
    clock = iter(np.cumsum([2.0 if i % 10 == 0 else 1e-4 for i in range(60)]))
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(clock))
    timed = training.TimedBatches(lambda position: position, 10)
    assert [timed(position) for position in range(20)] == list(range(20)) and timed.rate() is None
    for position in range(20, 60):
        timed(position)
    assert timed.rate() == pytest.approx(5.0, rel=1e-2)

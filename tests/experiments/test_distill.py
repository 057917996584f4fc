"""`janax distill` with a tiny random teacher and a smaller student of another width and depth."""

import dataclasses
import json
import os
import signal
import time
import types
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janax.experiments import cli, decoders, text
from janax.experiments.config import LoraConfig, TrainConfig
from janax.experiments.distill import config as distill_config
from janax.experiments.distill import corpus, objective
from janax.experiments.distill.config import Config
from janax.experiments.errors import UserError
from janax.experiments.metrics import read_rows
from janax.jaxlib_ext import divergence
from janax.models import loading, lora, transformer

WORDS = ("a", "few", "words", "to", "merge", "and", "more", "of")


def lines(count):
    rng = np.random.default_rng(0)
    say = lambda n: " ".join(rng.choice(WORDS, n))  # noqa: E731
    return [{"prompt": say(3) + ":", "completion": " " + say(int(rng.integers(4, 12)))} for _ in range(count)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines(120)))
    return file


@pytest.fixture(scope="module")
def tiny_student(tmp_path_factory, tiny_model):
    """One narrow layer with more embeddings than the tokenizer has tokens, and no tokenizer files."""
    where = tmp_path_factory.mktemp("student")
    size = loading.load(tiny_model).config.vocab_size
    config = transformer.TransformerConfig(
        vocab_size=size, max_length=128, width=16, depth=1, heads=2, kv_heads=2, head_width=8, hidden=32, tied=False
    )
    loading.save_transformer(where, config, jax.jit(lambda key: transformer.init(config, key))(jax.random.key(1)))
    return where


@pytest.fixture
def distill(tiny_model, tiny_student, data, tmp_path, capsys):
    """`code, out, err = distill(*options)`, by default of the tiny student into tmp_path/out."""

    def call(*options, **named):
        places = {"teacher": tiny_model, "student": tiny_student, "data": data, "out": tmp_path / "out"} | named
        arguments = [str(x) for name, value in places.items() for x in (f"--{name}", value)]
        code = cli.main(["distill", *arguments, *SMALL, *map(str, options)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


SMALL = (
    *("--sequence-length", "48", "--max-new-tokens", "8", "--held-out-share", "0.2"),
    *("--train.batch-size", "8", "--train.checkpoint-every", "4", "--train.log-every", "2"),
    *("--optimizer.warmup-steps", "0", "--optimizer.learning-rate", "2e-2"),
)
ON_POLICY = ("--on-policy-share", "1", "--train.num-steps", "8", "--lora.rank", "2", "--divergence", "js", "--beta", "0.3")


def test_a_student_comes_closer_and_is_saved(distill, tiny_model, tmp_path, capsys):
    code, said, err = distill("--train.num-steps", "20", "--label-weight", "0.1", "--temperature", "2", "--tau-squared")
    assert code == 0, err
    out = tmp_path / "out"
    record = json.loads((out / "report.json").read_text())
    assert (
        record["divergence"]["change"]["high"] < 0
        and record["divergence"]["after"]["value"] < 0.8 * record["divergence"]["before"]["value"]
    )
    assert record["losses"][0]["last"] < record["losses"][0]["first"] and record["tokens"] > 100
    assert "held-out forward_kl" in said and "tokens a second" in said and f"try: janax generate --model {out}" in said
    assert "the student has no tokenizer and takes the teacher's" in err
    assert "| held-out forward_kl |" in (out / "report.md").read_text()
    rows = read_rows(out / "run" / "metrics.jsonl")
    assert rows[-1]["step"] == 20 and all("held_out" in row for row in rows if row["step"] % 4 == 0)

    model, teacher = loading.load(out), loading.load(tiny_model)
    assert model.config.width == 16 and model.tokenizer is not None
    assert model.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
    assert model.tokenizer.chat_template == teacher.tokenizer.chat_template
    assert teacher.tokenizer.eos_token_id in model.stop_tokens
    before = jax.config.jax_compilation_cache_dir
    assert cli.main(["generate", "--model", str(out), "--prompt", "a few", "--max-tokens", "4"]) == 0
    jax.config.update("jax_compilation_cache_dir", before)
    assert capsys.readouterr().out.startswith("a few")

    code, said, _ = distill("--train.num-steps", "20", "--label-weight", "0.1", "--temperature", "2", "--tau-squared")
    assert code == 0 and "is finished; its report is" in said
    code, _, err = distill("--train.num-steps", "21", "--label-weight", "0.1", "--temperature", "2", "--tau-squared")
    assert code == 2 and f"--out {out} holds a run with train.num_steps 20, not 21; set it back to resume, choose another --out" in err


@pytest.fixture(scope="module")
def reference(tiny_model, tiny_student, data, tmp_path_factory):
    """Adapters trained on the student's own completions, in one go."""
    out = tmp_path_factory.mktemp("reference") / "out"
    places = ("--teacher", tiny_model, "--student", tiny_student, "--data", data, "--out", out)
    assert cli.main(["distill", *map(str, places), *SMALL, *ON_POLICY]) == 0
    return out


def test_adapters_learn_from_the_students_own_completions(reference, tiny_student):
    record = json.loads((reference / "report.json").read_text())
    assert record["divergence"]["change"]["high"] < 0
    model = loading.load(tiny_student)
    adapters, scale = lora.load_peft(reference, model.config)
    merged = loading.load(reference / "merged")
    expected = lora.merge(model.config, model.params, adapters, scale=scale)
    for ours, theirs in zip(jax.tree.leaves(merged.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert merged.tokenizer is not None and (reference / "tokenizer.json").exists()


@pytest.mark.slow
def test_stopped_and_resumed_it_ends_in_the_same_bits(distill, reference, tmp_path, monkeypatch):
    batch_of = corpus.Batches.__call__

    def interrupted(self, position):
        if position == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_of(self, position)

    monkeypatch.setattr(corpus.Batches, "__call__", interrupted)
    code, said, err = distill(*ON_POLICY)
    assert code == 0 and not said and "the state is saved; the same command resumes: janax distill" in err
    monkeypatch.undo()
    code, _, err = distill(*ON_POLICY)
    assert code == 0 and "resuming at step" in err
    assert (tmp_path / "out" / "run" / "metrics.jsonl").read_text() == (reference / "run" / "metrics.jsonl").read_text()
    for name in ("adapter_model.safetensors", "merged/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (reference / name).read_bytes()


@pytest.mark.slow
def test_killed_and_resumed_it_ends_in_the_same_bits(start, tiny_model, tiny_student, data, tmp_path):
    """kill -9 in a process of its own, on batches of both kinds."""

    def command(out):
        places = ("--teacher", tiny_model, "--student", tiny_student, "--data", data, "--out", out)
        return start(
            *("distill", *places, *SMALL, "--on-policy-share", "0.5", "--train.num-steps", "40"),
            cwd=tmp_path,
            script=("-m", "janax.experiments.cli"),
        )

    process = command(tmp_path / "killed")
    metrics, deadline = tmp_path / "killed" / "run" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and '"step": 10,' in metrics.read_text()):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    for out in ("killed", "whole"):
        process = command(tmp_path / out)
        assert process.wait(timeout=240) == 0, process.communicate()
    assert metrics.read_text() == (tmp_path / "whole" / "run" / "metrics.jsonl").read_text()
    assert (tmp_path / "killed" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def make_objective(config, teacher, student):
    net = decoders.network(student.config, student.params, config.lora)
    return objective.Objective(config, net, teacher.config, teacher.stop_tokens), {"student": student.params, "teacher": teacher.params}


CONFIG = Config(
    teacher="t",
    student="s",
    data=Path("d"),
    sequence_length=48,
    max_new_tokens=8,
    train=TrainConfig(num_steps=8, batch_size=8, checkpoint_every=4, log_every=2),
)


@pytest.mark.parametrize(
    ("kind", "parameters", "label_weight"), [("forward_kl", {}, 0.5), ("js", {"beta": 0.3}, 0.0), ("renyi", {"alpha": 0.5}, 0.0)]
)
def test_the_loss_is_the_mean_divergence_of_full_logits(tiny_model, tiny_student, kind, parameters, label_weight):
    config = dataclasses.replace(CONFIG, divergence=kind, temperature=1.5, tau_squared=True, label_weight=label_weight, **parameters)
    teacher, student = loading.load(tiny_model), loading.load(tiny_student)
    goal, frozen = make_objective(config, teacher, student)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, teacher.config.vocab_size, (2, 12))
    rows = {"tokens": tokens, "segment_ids": np.ones((2, 12), np.int32), "mask": rng.random((2, 12)) < 0.6}
    empty = {"prompts": np.zeros((2, 0), np.int32), "prompt_lengths": np.zeros(2, np.int32)}
    value, info = jax.jit(objective.loss_fn(goal))(student.params, rows | empty, jax.random.key(0), frozen)

    logits, theirs = (jax.jit(one.logits_fn)(one.params, tokens)[:, :-1] for one in (student, teacher))
    counts = rows["mask"][:, 1:]
    each = divergence.per_token(kind, logits, theirs, temperature=1.5, **parameters)
    expected = np.mean(np.asarray(each)[counts]) * 1.5**2
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[:, 1:, None], axis=2)[..., 0]
    assert float(info["weight"]) == counts.sum()
    assert float(value) == pytest.approx(expected + label_weight * nll[counts].mean(), rel=1e-4)


def test_completions_follow_their_prompts(tiny_model):
    """At temperature zero the rows are the model's own greedy continuations, whatever the padding."""
    model = loading.load(tiny_model)
    goal, _ = make_objective(dataclasses.replace(CONFIG, sampling_temperature=0.0), model, model)
    lengths = np.array([3, 6], np.int32)
    prompts = np.random.default_rng(0).integers(1, 250, (2, 6)).astype(np.int32)
    rows = jax.jit(lambda *a: objective.completed(goal, *a))(model.params, prompts, lengths, jax.random.key(0))
    logits = jax.jit(model.logits_fn)(model.params, rows["tokens"], rows["segment_ids"])
    arrays = (rows["tokens"], rows["segment_ids"], rows["mask"], lengths, prompts, logits)
    for tokens, segments, mask, length, prompt, scores in zip(*map(np.asarray, arrays), strict=True):
        sampled = np.flatnonzero(mask)
        assert sampled[0] == length and np.array_equal(sampled, np.arange(length, length + len(sampled)))
        np.testing.assert_array_equal(tokens[:length], prompt[:length])
        np.testing.assert_array_equal(tokens[sampled], scores[sampled - 1].argmax(axis=1))
        np.testing.assert_array_equal(segments, np.arange(len(segments)) < length + len(sampled))
        assert len(sampled) == 8 or tokens[sampled[-1]] in model.stop_tokens


def test_batches_of_both_kinds():
    encode = lambda words: [len(word) for word in words.split()]  # noqa: E731
    documents = [text.Document((line["prompt"], line["completion"]), (False, True)) for line in lines(60)]
    prompts = np.arange(60, dtype=np.int32)[:, None] + np.zeros((1, 20), np.int32)
    data = corpus.Corpus(text.pack(documents, encode, 0, 48), None, prompts, np.full(60, 20, np.int32), "")
    batches = corpus.Batches(dataclasses.replace(CONFIG, on_policy_share=0.25), data)
    given = [batches(position) for position in range(60)]
    sampled = [batch for batch in given if batch["prompts"].shape[1]]
    assert 8 <= len(sampled) <= 22
    assert all(batch["prompts"].shape == (8, 32) and batch["tokens"].shape == (8, 0) for batch in sampled)
    assert all(batch["tokens"].shape == (8, 48) for batch in given if not batch["prompts"].shape[1])
    assert batches.given == 60 and batches.positions == (60 - len(sampled)) * 8 * 48 + len(sampled) * 8 * 40
    again = corpus.Batches(dataclasses.replace(CONFIG, on_policy_share=0.25), data)(5)
    assert all(np.array_equal(again[name], given[5][name]) for name in again)
    only = corpus.Batches(dataclasses.replace(CONFIG, on_policy_share=1.0), data)
    assert len({int(x) for position in range(7) for x in only(position)["prompts"][:, 0]}) == 56  # no prompt twice in a pass
    with pytest.raises(UserError, match=r"there are 4 prompts, fewer than train\.batch_size 8"):
        corpus.Batches(dataclasses.replace(CONFIG, on_policy_share=1.0), data._replace(prompts=prompts[:4]))


def test_rows_are_kept_until_the_data_change(tiny_model, data, tmp_path):
    tokenizer = loading.load(tiny_model).tokenizer
    file = tmp_path / "data.jsonl"
    file.write_text(data.read_text())
    config = dataclasses.replace(CONFIG, data=file, on_policy_share=0.5)
    session = types.SimpleNamespace(workdir=tmp_path / "run", is_main=True, say=lambda message: None)
    first, again = (corpus.prepare(config, session, tokenizer) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first[:4]), jax.tree.leaves(again[:4]), strict=True))
    assert first.example == again.example and len(first.prompts) == 114
    first_prompt = first.prompts[0, : first.prompt_lengths[0]].tolist()
    assert first_prompt[0] == tokenizer.eos_token_id and tokenizer.decode(first_prompt[1:]).endswith(":")
    file.write_text(data.read_text() + json.dumps({"text": "one more"}))
    with pytest.raises(UserError, match="has changed since this run began; choose another"):
        corpus.prepare(config, session, tokenizer)


def test_every_divergence_can_be_named():
    assert set(typing.get_args(distill_config.Divergence)) == set(divergence.NAMES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "renyi"}, "alpha must be a number with divergence renyi, got None; try --alpha 0.5"),
        ({"alpha": 0.3}, "alpha must be left out with divergence forward_kl, got 0.3"),
        ({"divergence": "skew_kl", "alpha": 1.0}, r"alpha must be in \[0, 1\) with divergence skew_kl"),
        ({"beta": 0.3}, "beta must be left out with divergence forward_kl"),
        ({"divergence": "js", "beta": 1.0}, r"beta must be in \(0, 1\), got 1.0; try 0.5, or --divergence forward_kl or reverse_kl"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"on_policy_share": 1.5}, "on_policy_share must be between 0 and 1"),
        ({"on_policy_share": 1.0, "max_new_tokens": 48}, r"max_new_tokens must be below sequence_length \(48\)"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **options)


def other_tokenizer(tmp_path, tiny_model):
    import transformers

    model = loading.load(tiny_model)
    loading.save_transformer(tmp_path / "other", model.config, model.params)
    trained = text.train_tokenizer(["something else to merge, altogether"], 290)
    transformers.PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|endoftext|>").save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_mistakes_are_one_sentence(distill, tiny_model, tmp_path, data):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    (tmp_path / "config_only").mkdir()
    (tmp_path / "config_only" / "config.json").write_text((tiny_model / "config.json").read_text())
    broken, texts, few = (tmp_path / f"{name}.jsonl" for name in ("broken", "texts", "few"))
    broken.write_text('{"text": "one"}\n{"text": "two"\n')
    texts.write_text("".join(json.dumps({"text": "a few words"}) + "\n" for _ in range(20)))
    few.write_text("".join(json.dumps(line) + "\n" for line in lines(4)))
    cases = [
        ((), {"data": tmp_path / "nothing.jsonl"}, "nothing.jsonl: no such file; give a .jsonl file"),
        ((), {"data": broken}, "broken.jsonl:2 is not JSON"),
        ((), {"data": few}, "fewer than train.batch_size 8"),
        ((), {"teacher": "nowhere"}, "--teacher nowhere: 'nowhere' is neither a directory"),
        ((), {"student": tmp_path / "empty"}, "empty/config.json: no such file"),
        ((), {"teacher": tmp_path / "config_only", "student": tmp_path / "config_only"}, "model.safetensors: no such file"),
        ((), {"student": other_tokenizer(tmp_path, tiny_model)}, "have different vocabularies"),
        ((), {"out": tmp_path / "full"}, "full is not empty and holds no run of janax distill; choose another directory"),
        (("--on-policy-share", "1"), {"data": texts}, "on_policy_share 1.0 needs prompts, and --data"),
        (("--on-policy-share", "1", "--max-new-tokens", "46"), {}, "no prompt in --data"),
        (("--sequence-length", "200"), {}, "sequence_length must be at most 128, the longest text of the student, got 200"),
        (("--divergence", "rkl"), {}, "invalid choice 'rkl' for argument '--divergence'"),
        (("--lora.rank", "2", "--lora.targets", "head"), {}, "lora: "),
        (("--alfa", "0.3"), {}, "there is no field --alfa; did you mean"),
    ]
    for options, places, message in cases:
        code, said, err = distill(*options, **places)
        complaints = [line for line in err.splitlines() if not line.startswith("distill: ")]
        assert code == 2 and not said, (message, err)
        assert len(complaints) == 1 and complaints[0].startswith("janax: ") and message in complaints[0], err
        assert "--workdir" not in err
    assert [entry.name for entry in (tmp_path / "full").iterdir()] == ["letter.txt"]


def test_what_has_to_be_given(capsys):
    assert cli.main(["distill", "--teacher", "smollm2"]) == 2
    assert capsys.readouterr().err == "janax: distill needs --student, --data, --out; see `janax distill --help`\n"


def test_adapters_start_as_the_student(tiny_model):
    model = loading.load(tiny_model)
    net = decoders.network(model.config, model.params, LoraConfig(rank=2))
    merged = net.params_of(net.init(jax.random.key(0), net.frozen), net.frozen)
    assert all(jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(model.params), strict=True))

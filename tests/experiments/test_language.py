"""`janax generate`, `score` and `chat` on a tiny random model with a tokenizer of its own, beside the plain network."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janax.experiments import cli, language
from janax.experiments.errors import UserError
from janax.models import loading


@pytest.fixture(autouse=True)
def cache_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("JANAX_CACHE", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def model(tiny_model):
    return loading.load(tiny_model)


def greedy(model, tokens, count):
    """The continuation token by token, without a cache."""
    logits, tokens = jax.jit(model.logits_fn), list(tokens)
    for _ in range(count):
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(jnp.argmax(logits(model.params, padded)[0, len(tokens) - 1])))
        if tokens[-1] in model.stop_tokens:
            break
    return tokens


def test_generate_continues_a_prompt(tiny_model, model, capsys):
    arguments = ["generate", "--model", str(tiny_model), "--prompt", "a few", "--temperature", "0", "--max-tokens", "12"]
    assert cli.main(arguments) == 0
    start = model.tokenizer.encode("a few", add_special_tokens=False)
    tokens = greedy(model, start, 12)
    assert capsys.readouterr().out == "a few" + model.tokenizer.decode(tokens[len(start) :], skip_special_tokens=True) + "\n"


@pytest.mark.slow
def test_several_samples_and_the_same_seed(tiny_model, capsys):
    arguments = ["generate", "--model", str(tiny_model), "--prompt", "words", "--num-samples", "3", "--max-tokens", "6"]
    runs = []
    for seed in ("1", "1", "2"):
        assert cli.main([*arguments, "--seed", seed]) == 0
        runs.append(capsys.readouterr().out)
    assert runs[0] == runs[1] != runs[2]
    assert runs[0].count("--- ") == 3


def test_a_stop_string_ends_the_text_before_it(tiny_model, model, capsys):
    arguments = ["generate", "--model", str(tiny_model), "--prompt", "a few", "--temperature", "0", "--max-tokens", "12"]
    cli.main(arguments)
    whole = capsys.readouterr().out.removeprefix("a few").rstrip("\n")
    stop = whole[len(whole) // 2]
    cli.main([*arguments, "--stop", stop])
    assert capsys.readouterr().out == "a few" + whole[: whole.index(stop)] + "\n"


def test_score_is_the_sum_of_log_probabilities(tiny_model, model, capsys):
    targets = [" words", " to merge", " more"]
    arguments = ["score", "--model", str(tiny_model), "--context", "a few", "--json", "--target", *targets]
    assert cli.main(arguments) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    context = model.tokenizer.encode("a few", add_special_tokens=False)
    for target, row in zip(targets, rows, strict=True):
        ids = model.tokenizer.encode(target, add_special_tokens=False)
        log_p = jax.nn.log_softmax(model.logits_fn(model.params, np.array([context + ids]))[0])
        expected = sum(float(log_p[len(context) + i - 1, token]) for i, token in enumerate(ids))
        assert row["tokens"] == len(ids) and row["target"] == target
        assert row["sum"] == pytest.approx(expected, abs=1e-4)
        assert row["mean"] == pytest.approx(expected / len(ids), abs=1e-4)


def test_score_reads_a_file_and_a_text_without_context(tiny_model, model, capsys, tmp_path):
    lines = [{"context": "a", "target": " few"}, {"target": "words"}, {"context": "a", "target": " few more"}]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert cli.main(["score", "--model", str(tiny_model), "--file", str(file), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["target"] for row in rows] == [" few", "words", " few more"]
    ids = model.tokenizer.encode("words", add_special_tokens=False)
    log_p = jax.nn.log_softmax(model.logits_fn(model.params, np.array([[model.tokenizer.eos_token_id, *ids]]))[0])
    assert rows[1]["sum"] == pytest.approx(sum(float(log_p[i, token]) for i, token in enumerate(ids)), abs=1e-4)


def test_a_chat_keeps_what_it_has_read(tiny_model, model, capsys, monkeypatch):
    """The second answer, behind a cache that holds the first turn, is that of a model that reads everything anew."""
    monkeypatch.setattr("sys.stdin", io.StringIO("a few words\nmore\n\n"))
    arguments = ["chat", "--model", str(tiny_model), "--temperature", "0", "--max-tokens", "8", "--context", "256"]
    assert cli.main(arguments) == 0
    answers = capsys.readouterr().out
    messages, expected = [], ""
    for line in ("a few words", "more"):
        messages.append({"role": "user", "content": line})
        prompt = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        start = model.tokenizer.encode(prompt, add_special_tokens=False)
        answer = model.tokenizer.decode(greedy(model, start, 8)[len(start) :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    assert answers == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "nowhere"], "--model nowhere: 'nowhere' is neither a directory"),
        (["generate", "--temprature", "1"], "there is no field --temprature; did you mean --temperature?"),
        (["generate", "--top-p", "0"], "top_p must be in (0, 1], got 0.0"),
        (["score"], "target must be texts, or a --file, and not both"),
        (["score", "--file", "nothing.jsonl"], "--file nothing.jsonl cannot be read"),
        (["chat", "--context", "5"], "context must be at least 128, got 5"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("x"))
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1


def test_too_long_a_prompt(tiny_model):
    options = language.GenerateOptions(model=str(tiny_model), prompt="words " * 600, max_tokens=4)
    with pytest.raises(UserError, match="this model was made for 512"):
        language.generate(options)

"""Tokenizers rebuilt from GGUF metadata, on a vocabulary of some three hundred tokens."""

import json
import subprocess
import sys

import pytest
from reference import gguf

from janax.models import tokenizers

TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPACE, NEWLINE = "Ġ", "Ċ"  # as GPT-2 writes the bytes 32 and 10
MERGES = [f"{SPACE} {SPACE}", f"{SPACE * 2} {SPACE}", f"{NEWLINE} {NEWLINE}", f"{SPACE} 7", "1 2", f"{SPACE} a", "a b", "Ã ©"]


def alphabet():
    """The 256 characters that stand for bytes: printable Latin ones for themselves, the others moved up beyond them."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in kept] + [chr(256 + i) for i in range(256 - len(kept))]


VOCABULARY = [*SPECIAL, *alphabet(), *(merge.replace(" ", "") for merge in MERGES)]


@pytest.fixture
def metadata():
    return {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": VOCABULARY,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(VOCABULARY) - 3),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


@pytest.fixture
def load(metadata, tmp_path):
    def call(**changes):
        changed = metadata | {f"tokenizer.{name}": value for name, value in changes.items()}
        present = {name: value for name, value in changed.items() if value is not None}
        return tokenizers.load_tokenizer(gguf.write(tmp_path / "x.gguf", {}, present))

    return call


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a   7", ["a", SPACE * 3, "7"]),  # not "  " and " 7": the digit is cut off before the spaces are looked at
        ("a   b", ["a", SPACE * 2, SPACE, "b"]),  # GPT-2's expression leaves the last space to the word
        ("a 7", ["a", SPACE, "7"]),
        ("\n\n7", [NEWLINE * 2, "7"]),
        ("\n\nb", [NEWLINE, NEWLINE, "b"]),
        ("121", ["1", "2", "1"]),
        ("ab a", ["ab", SPACE + "a"]),
        ("a", ["a"]),  # no space in front
        ("é", ["Ã©"]),
        ("<|im_start|>7<|im_end|>", ["<|im_start|>", "7", "<|im_end|>"]),
        ("", []),
    ],
)
def test_digits_are_cut_off_first(load, text, expected):
    tokenizer = load()
    assert pieces(tokenizer, text) == expected
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    ("rule", "text", "expected"),
    [
        ("gpt-2", "a   7", ["a", SPACE * 2, SPACE + "7"]),
        ("gpt-2", "121", ["12", "1"]),
        (None, "121", ["12", "1"]),  # files without the key are from before there was another rule
        ("qwen2", "a   7", ["a", SPACE * 2, SPACE, "7"]),
        ("qwen2", "121", ["1", "2", "1"]),
        ("qwen2", "e\u0301", ["Ã©"]),  # composed first
        ("llama-bpe", "121", ["12", "1"]),
        ("llama-bpe", "e\u0301", ["e", "Ì", "ģ"]),
    ],
)
def test_other_rules(load, rule, text, expected):
    assert pieces(load(**{"ggml.pre": rule}), text) == expected


def test_special_tokens_and_chat(load):
    tokenizer = load()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 2, 2, 0)
    assert len(tokenizer) == len(VOCABULARY) and tokenizer.model_max_length == 512
    chat = [{"role": "user", "content": "a   7"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>user\na   7<|im_end|>\n"
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    assert ids[0] == 1 and tokenizer.decode(ids, skip_special_tokens=True) == "user\na   7\n"


def test_a_token_in_front_where_the_file_asks_for_it(load):
    assert pieces(load(**{"ggml.add_bos_token": True}), "ab") == ["<|im_start|>", "ab"]


def test_user_defined_tokens_are_found_but_not_special(load):
    kinds = [3, 3, 3] + [1] * (len(VOCABULARY) - 4) + [4]
    tokenizer = load(**{"ggml.token_type": kinds, "ggml.tokens": [*VOCABULARY[:-1], "<mine>"], "ggml.merges": MERGES[:-1]})
    assert pieces(tokenizer, "a<mine>a") == ["a", "<mine>", "a"]
    assert tokenizer.decode(tokenizer("<mine>").input_ids, skip_special_tokens=True) == "<mine>"


@pytest.mark.parametrize("kind", [None, "GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_directory_keeps_the_rules_of_its_tokenizer_json(load, tmp_path, kind):
    """Whatever class its configuration names: SmolLM's directories say GPT2Tokenizer, whose own rules leave digits with the spaces."""
    tokenizer = load()
    tokenizer.save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    config.pop("tokenizer_class")
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(config if kind is None else {**config, "tokenizer_class": kind}))
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    again = tokenizers.load_tokenizer(tmp_path / "hf")
    assert pieces(again, "a   7\n\n12") == pieces(tokenizer, "a   7\n\n12") == ["a", SPACE * 3, "7", NEWLINE * 2, "1", "2"]
    assert (again.bos_token, again.eos_token, again.chat_template) == (tokenizer.bos_token, tokenizer.eos_token, TEMPLATE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ggml.model": "llama"}, r"x\.gguf: metadata 'tokenizer\.ggml\.model' is 'llama', only 'gpt2' \(byte-level BPE\) is supported"),
        ({"ggml.model": None}, r"x\.gguf: metadata 'tokenizer\.ggml\.model' is None"),
        ({"ggml.merges": None}, r"x\.gguf: metadata 'tokenizer\.ggml\.merges' is missing"),
        (
            {"ggml.pre": "bloom"},
            r"x\.gguf: byte_level_bpe: pre-tokenizer 'bloom' is not supported, expected one of gpt-2, llama-bpe, qwen2",
        ),
    ],
)
def test_what_a_file_lacks(load, changes, message):
    with pytest.raises(ValueError, match=message):
        load(**changes)


def test_what_a_directory_lacks(tmp_path):
    with pytest.raises(ValueError, match="absent: no such file or directory"):
        tokenizers.load_tokenizer(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no tokenizer that transformers can read; is tokenizer\.json there\?"):
        tokenizers.load_tokenizer(tmp_path)
    for content in ("{", "{}", '{"version": "1.0", "model": 3}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="no tokenizer that transformers can read"):
            tokenizers.load_tokenizer(tmp_path)


def test_importing_loads_no_library_and_using_says_nothing(metadata, tmp_path):
    path = gguf.write(tmp_path / "x.gguf", {}, metadata)
    script = """
import sys
from janax.models import tokenizers
assert not {"transformers", "tokenizers", "jinja2", "jax"} & set(sys.modules), sorted(sys.modules)
tokenizers.load_tokenizer(sys.argv[1])
"""
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

"""Makes tests/golden/smollm2.npz: what SmolLM2-135M-Instruct computes in float32 by torch and transformers, and its tokens.

Run with torch 2.13.0, transformers 5.23.0, tokenizers 0.23.3 and gguf 0.19.0 (the versions used are stored in the file), on the file that
`janax fetch smollm2` keeps:

    python tests/golden/make_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf [--save DIRECTORY]

No code of janax takes part. The package gguf decodes the weights; the rows of queries and keys are put back into Hugging Face's order; the
model is transformers' LlamaForCausalLM with its plain attention. The tokenizer is built from the vocabulary and merges in the file with the
library tokenizers, its pre-tokenizer being Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]): that
of SmolLM2's published tokenizer.json, which transformers' own conversion of GGUF files does not rebuild. --save writes weights and tokenizer as
a directory in Hugging Face's layout.

For every prompt i the file holds: tokens_i; log_probs_i, of each token but the first given those before it; greedy_i, 32 tokens, the
end-of-text token treated like any other; margins_i, by how much the greedy token's logit leads the next best; at the last position of the
prompt logsumexp_i, and the logits_i at indices_i: the 64 largest, then 64 drawn at random. Of the tokenizer: texts (JSON) and text_tokens. digests
(JSON) are the SHA-256 of the float32 bytes of the embedding and of the tensors of the first and the last layer, under Hugging Face's names.
"""

import argparse
import hashlib
import importlib.metadata
import json
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

OUTPUT = Path(__file__).parent / "smollm2.npz"
NUM_GREEDY, NUM_LOGITS = 32, 64

CHAT = [{"role": "user", "content": "A box holds 12 rows of 24 eggs; 35 are broken. How many are whole?"}]
PROMPTS = [
    "In 1969, after a flight of 384400 km, two people walked on the Moon. The capital of France is",
    'def mean(values):\n    """Arithmetic mean; 0.0 for an empty list."""\n    total = 0\n    for i in range(len(values)):\n        total +=',
    "Good morning means: Guten Morgen, buenos días, доброе утро, おはようございます, 早上好, καλημέρα, صباح الخير, bonjour 😀. In Italian one says",
    "The harbour of the small town opens to the north, and in winter the wind comes straight from the sea. Fishing boats leave at four in the "
    "morning and come back around noon, when the market on the quay is busiest. Most of the catch is herring; cod has become rare, and the old "
    "people say that in their youth one could walk across the bay on the backs of the fish. Behind the quay there are three streets of "
    "wooden houses, painted red, yellow and white, and a school with 47 children. The teacher, who came from the capital nine years ago, keeps "
    "a record of the weather: temperature at 7:00, 14:00 and 21:00, wind, clouds, and the day on which the first swallow is seen. Her notes "
    "show that spring comes eleven days earlier than in the journals that a priest left in the church a century before. When a newspaper asked "
    "her what the most important lesson of these notes was, she answered that",
]
TEXTS = [
    "Hello, world!",
    " leading and trailing ",
    "a   7",
    "a   b",
    "\n\n\n7",
    "x\n\n\n  \n12  3",
    "tab\t\t9\tx",
    "1234567890",
    "3.14159, 2,718 and 6.02e23",
    "It's we'll they'VE I'm don't",
    "for (int i = 0; i < 10; ++i) {\n    sum[i] += 2 * i;\n}\n",
    "Größe façade naïve Zoë",
    "日本語のテキスト 2024年",
    "Привет, мир! 42 раза",
    "العربية ١٢٣",
    "½ ² Ⅷ ③ 12½",
    "😀😃 👩‍💻 5️⃣",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n",
    "a<|endoftext|>b <file_sep> 1",
    "\r\n\r\n 1\r\n",
    " \u00a0\u200b7",
    "",
]


def stored(path):
    """Metadata values and decoded tensors under the file's own names."""
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32) for tensor in reader.tensors}
    return metadata, tensors


def hugging_face(tensors):
    """The state of LlamaForCausalLM."""
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        **{f"attn_{kind}": f"self_attn.{kind}_proj" for kind in "qkv"},
        "attn_output": "self_attn.o_proj",
        **{f"ffn_{kind}": f"mlp.{kind}_proj" for kind in ("gate", "up", "down")},
    }
    state = {"model.embed_tokens.weight": tensors.pop("token_embd.weight"), "model.norm.weight": tensors.pop("output_norm.weight")}
    for name, value in tensors.items():
        _, layer, kind, _ = name.split(".")
        if kind in ("attn_q", "attn_k"):
            heads = len(value) // 64
            value = value.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(heads * 64, 576)
        state[f"model.layers.{layer}.{names[kind]}.weight"] = np.ascontiguousarray(value)
    return {name: torch.from_numpy(value) for name, value in state.items()}


def build_model(tensors):
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict(hugging_face(tensors), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    return model


def build_tokenizer(metadata):
    vocabulary = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in vocabulary[:17]])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=metadata["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )


@torch.no_grad()
def measure(model, tokens, rng):
    output = model(torch.tensor([tokens]), use_cache=True)
    logits = output.logits[0]
    log_probs = torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    last = logits[-1]
    indices = np.concatenate([torch.topk(last, NUM_LOGITS).indices.numpy(), rng.choice(len(last), NUM_LOGITS, replace=False)])
    greedy, margins = [], []
    for _ in range(NUM_GREEDY):
        best = torch.topk(output.logits[0, -1], 2)
        greedy.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        output = model(best.indices[None, :1], past_key_values=output.past_key_values, use_cache=True)
    return {
        "tokens": np.array(tokens, np.int32),
        "log_probs": log_probs.numpy(),
        "indices": indices.astype(np.int32),
        "logits": last.numpy()[indices],
        "logsumexp": torch.logsumexp(last, -1).numpy(),
        "greedy": np.array(greedy, np.int32),
        "margins": np.array(margins, np.float32),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    metadata, tensors = stored(options.gguf)
    tokenizer, model = build_tokenizer(metadata), build_model(tensors)
    if options.save:
        model.save_pretrained(options.save)
        tokenizer.save_pretrained(options.save)
    chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    rng = np.random.default_rng(0)
    content = {}
    for i, tokens in enumerate([*(tokenizer(prompt).input_ids for prompt in PROMPTS), chat]):
        found = measure(model, tokens, rng)
        content |= {f"{name}_{i}": value for name, value in found.items()}
        print(len(tokens), "tokens; smallest margin", found["margins"].min(), repr(tokenizer.decode(found["greedy"])))
    digests = {
        name: hashlib.sha256(value.numpy().tobytes()).hexdigest()
        for name, value in model.state_dict().items()
        if name.startswith(("model.embed_tokens.", "model.layers.0.", "model.layers.29."))
    }
    text_tokens = [tokenizer(text).input_ids for text in TEXTS]
    packages = (torch, transformers, tokenizers)
    versions = [*(f"{package.__name__} {package.__version__}" for package in packages), f"gguf {importlib.metadata.version('gguf')}"]
    np.savez_compressed(
        OUTPUT,
        prompts=json.dumps(PROMPTS),
        chat=json.dumps(CHAT),
        texts=json.dumps(TEXTS),
        text_tokens=json.dumps(text_tokens),
        digests=json.dumps(digests),
        versions=np.array(versions),
        **content,
    )
    print(OUTPUT, OUTPUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()

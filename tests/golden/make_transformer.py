"""Makes tests/golden/transformer: a tiny random model of every family in Hugging Face's layout, with what transformers computes of it.

Run with torch 2.13.0 and transformers 5.23.0 (the versions used are stored in the files): python tests/golden/make_transformer.py
Every weight is random, norms and biases too, so that nothing is trivially one or zero; windows and original context lengths are short
enough to matter within the 48 tokens of the inputs. Expected values: float32 logits with eager attention, and 32 greedy tokens.

The weights are mild (kernels of gain 1.1), so that float32 itself is within 1e-5. With gain 1.5 and larger norms logits reach 13 and the
public float32 code is up to 5e-5 off its own float64: three such models, NAME_strong, hold both, and a bar can be derived from them.
"""

from pathlib import Path

import numpy as np
import torch
import transformers

DIRECTORY = Path(__file__).parent / "transformer"
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 128}
GROUPED = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500000.0,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}

FAMILIES = {
    "llama2": transformers.LlamaConfig(**(GROUPED | {"num_key_value_heads": 4}), rms_norm_eps=1e-5),
    "llama3": transformers.LlamaConfig(**GROUPED, rope_parameters=LLAMA3, rms_norm_eps=1e-5),
    "llama_linear": transformers.LlamaConfig(
        **GROUPED, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}, attention_bias=True, mlp_bias=True
    ),
    "smollm2": transformers.LlamaConfig(
        **(GROUPED | {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 24}),
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    ),
    "mistral": transformers.MistralConfig(**GROUPED, sliding_window=6, head_dim=12),
    "qwen2": transformers.Qwen2Config(
        **(GROUPED | {"num_hidden_layers": 3}), use_sliding_window=True, sliding_window=5, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen3": transformers.Qwen3Config(**GROUPED, head_dim=16),
    "gemma2": transformers.Gemma2Config(
        **GROUPED, head_dim=12, sliding_window=5, query_pre_attn_scalar=10, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **(GROUPED | {"num_hidden_layers": 4}),
        head_dim=12,
        sliding_window=5,
        query_pre_attn_scalar=10,
        rope_parameters=GEMMA3_ROPE,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": transformers.GPT2Config(vocab_size=64, n_positions=128, n_embd=32, n_layer=2, n_head=4),
    "gpt_neo": transformers.GPTNeoConfig(
        vocab_size=64,
        max_position_embeddings=128,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=48,
        attention_types=[[["global", "local"], 1]],
        window_size=5,
    ),
}


def greedy(model: torch.nn.Module, tokens: torch.Tensor, steps: int) -> tuple[torch.Tensor, float]:
    """The continuation without a cache, and by how much the best token led at the closest call."""
    closest = float("inf")
    for _ in range(steps):
        best = model(tokens, use_cache=False).logits[:, -1].topk(2)
        closest = min(closest, float((best.values[:, 0] - best.values[:, 1]).min()))
        tokens = torch.cat([tokens, best.indices[:, :1]], dim=1)
    return tokens[:, -steps:], closest


@torch.no_grad()
def strong(name: str, seed: int) -> None:
    """A model whose rounding errors are large, with the public code's float32 and float64 logits."""
    torch.manual_seed(seed)
    config = FAMILIES[name]
    config._attn_implementation = "eager"
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for path, parameter in model.named_parameters():
        centre = 1.0 if parameter.ndim == 1 and not path.endswith("bias") else 0.0
        scale = 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
        if path in ("model.norm.weight", "transformer.ln_f.weight"):
            centre, scale = 0.0, 1.5
        parameter.copy_(centre + scale * torch.randn(parameter.shape))
    where = DIRECTORY / f"{name}_strong"
    model.save_pretrained(where)
    (where / "generation_config.json").unlink(missing_ok=True)
    tokens = torch.randint(0, config.vocab_size, (2, 48))
    single = model(tokens, use_cache=False).logits.numpy()
    double = model.double()(tokens, use_cache=False).logits.numpy()
    versions = np.array([f"transformers {transformers.__version__}", f"torch {torch.__version__}"])
    np.savez(where / "io.npz", tokens=tokens.numpy().astype(np.int32), logits=single, double=double, versions=versions)
    print(f"{name}_strong: largest logit {np.abs(double).max():.1f}, float32 off by {np.abs(single - double).max():.1e}")


@torch.no_grad()
def main() -> None:
    for seed, (name, config) in enumerate(FAMILIES.items()):
        torch.manual_seed(seed)
        config._attn_implementation = "eager"
        config.bos_token_id = config.eos_token_id = config.pad_token_id = None
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for path, parameter in model.named_parameters():
            scale = 1.1 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1 if path.endswith("bias") else 0.3
            centre = 1.0 if path.endswith(("norm.weight", "layernorm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0
            centre = 0.0 if name.startswith("gemma") else centre  # stored around zero
            if path in ("model.norm.weight", "transformer.ln_f.weight"):  # of both signs, lest tied models repeat the last token for ever
                centre, scale = centre - 1, 0.8
            parameter.copy_(centre + scale * torch.randn(parameter.shape))
        model.save_pretrained(DIRECTORY / name)
        (DIRECTORY / name / "generation_config.json").unlink(missing_ok=True)

        tokens = torch.randint(0, config.vocab_size, (2, 48))
        continuation, lead = greedy(model, tokens[:, :16], 32)
        np.savez(
            DIRECTORY / name / "io.npz",
            tokens=tokens.numpy().astype(np.int32),
            logits=model(tokens, use_cache=False).logits.numpy(),
            continuation=continuation.numpy().astype(np.int32),
            versions=np.array([f"transformers {transformers.__version__}", f"torch {torch.__version__}"]),
        )
        size = sum(path.stat().st_size for path in (DIRECTORY / name).iterdir()) // 1000
        print(f"{name:13s} {type(model).__name__:20s} logits rms {float(model(tokens).logits.square().mean().sqrt()):.2f}, ", end="")
        print(f"closest greedy lead {lead:.1e}, {len(set(continuation.flatten().tolist()))} different tokens, {size} kB")


if __name__ == "__main__":
    main()
    for number, family in enumerate(("llama3", "gpt_neo", "qwen2")):
        strong(family, number)

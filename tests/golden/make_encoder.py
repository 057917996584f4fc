"""Makes tests/golden/encoder: tiny random BERT, RoBERTa and ESM-2 in Hugging Face's layout, inputs, and the float32 outputs of transformers.

Run with torch 2.13.0 and transformers 5.23.0 (the versions used are stored in the files): python tests/golden/make_encoder.py
Every parameter is random, norms, biases and the rows of padding too, so nothing is zero, one or equal by chance.
"""

from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import transformers

DIRECTORY = Path(__file__).parent / "encoder"
LENGTHS = (12, 7, 10, 3)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56, "attn_implementation": "eager"}
VOCAB, MASK = 40, 4
TIED = ("decoder.weight", "decoder.bias")


def models() -> dict[str, transformers.PreTrainedModel]:
    bert = transformers.BertConfig(vocab_size=VOCAB, max_position_embeddings=16, **SIZES)
    roberta = transformers.RobertaConfig(
        vocab_size=VOCAB, max_position_embeddings=18, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5, **SIZES
    )
    esm = transformers.EsmConfig(
        vocab_size=VOCAB,
        max_position_embeddings=16,
        pad_token_id=1,
        mask_token_id=MASK,
        token_dropout=True,
        emb_layer_norm_before=False,
        position_embedding_type="rotary",
        layer_norm_eps=1e-5,
        **SIZES,
    )
    return {
        "bert": transformers.BertForPreTraining(bert),
        "roberta": transformers.RobertaForMaskedLM(roberta),
        "esm2": transformers.EsmForMaskedLM(esm),
    }


def main() -> None:
    for seed, (name, model) in enumerate(models().items()):
        torch.manual_seed(seed)
        model.config.architectures = [type(model).__name__]
        model.eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(torch.randn(parameter.shape) * (0.4 if parameter.ndim < 2 else parameter.shape[1] ** -0.5))
                if key.lower().endswith(("norm.weight", "norm_after.weight")):
                    parameter.add_(1)
        # The published names; `model.save_pretrained` of this version of transformers would rename ESM's norms.
        tensors = {key: x for key, x in model.state_dict().items() if not key.endswith(TIED)}
        model.config.save_pretrained(DIRECTORY / name)
        safetensors.torch.save_file(tensors, DIRECTORY / name / "model.safetensors", metadata={"format": "pt"})

        padding = model.config.pad_token_id
        tokens = torch.randint(5, VOCAB, (len(LENGTHS), max(LENGTHS)))
        tokens[torch.rand(tokens.shape) < 0.2] = MASK
        mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
        tokens = torch.where(mask == 1, tokens, padding)
        inputs = {"input_ids": tokens, "attention_mask": mask}
        if name == "bert":
            inputs["token_type_ids"] = (torch.arange(max(LENGTHS)) >= 4).long().expand(tokens.shape).contiguous()
        with torch.no_grad():
            inner = model.base_model(**inputs)
            outputs = model(**inputs)
        arrays = {key: value.numpy().astype(np.int32) for key, value in inputs.items()}
        arrays["hidden"] = inner.last_hidden_state.numpy()
        arrays["logits"] = (outputs.prediction_logits if name == "bert" else outputs.logits).numpy()
        if name == "bert":
            arrays["pooled"] = inner.pooler_output.numpy()
        versions = np.array([f"transformers {transformers.__version__}", f"torch {torch.__version__}"])
        np.savez_compressed(DIRECTORY / name / "io.npz", versions=versions, **arrays)
        print(name, {key: float(np.sqrt(np.mean(np.square(arrays[key])))) for key in ("hidden", "logits")}, int((tokens == MASK).sum()))


if __name__ == "__main__":
    main()

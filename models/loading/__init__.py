"""Weights from and to the directory layouts of public checkpoints, slice by slice straight into sharded arrays.

    model = loading.load("smollm2")                    # or a directory, or a GGUF file: config, params, tokenizer and callables
    config, params = loading.load_transformer("SmolLM2-135M")
    place = lambda tree: sharding.shardings(tree, transformer.SHARDING_RULES, mesh)
    config, params = loading.load_transformer("Llama-3.1-8B", shardings=place, dtype="bfloat16")
    loading.save_transformer(directory, config, params)
    config, params = loading.load_dit("DiT-XL-2-256/transformer")

Where to read what:
  files         sources of named tensors: safetensors, in one file or several with an index
  entries       how tensors make up parameters; reading, checking, placing and writing, the same for all families
  model         a language model with tokenizer and callables, by name, directory or GGUF file
  transformer   Hugging Face's decoder language models          dit   diffusers' DiT
  encoder       Hugging Face's BERT, RoBERTa and ESM         vocabulary   the tokens of such a directory
"""

from janax.models.loading.dit import load_dit, save_dit
from janax.models.loading.encoder import load_encoder, save_encoder
from janax.models.loading.entries import Shardings
from janax.models.loading.files import Source
from janax.models.loading.model import Model, load
from janax.models.loading.transformer import load_transformer, read_transformer, save_transformer
from janax.models.loading.vocabulary import load_vocabulary, save_vocabulary

__all__ = [
    "Model",
    "Shardings",
    "Source",
    "load",
    "load_dit",
    "load_encoder",
    "load_transformer",
    "load_vocabulary",
    "read_transformer",
    "save_dit",
    "save_encoder",
    "save_transformer",
    "save_vocabulary",
]

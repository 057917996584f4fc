"""Published architectures and small ones that train on a laptop; change a field with `dataclasses.replace`."""

import dataclasses

from janax.models.dit import DiTConfig
from janax.models.encoder import EncoderConfig
from janax.models.transformer import RopeScaling, TransformerConfig
from janax.models.unet import UNetConfig

__all__ = [
    "BERT_BASE",
    "DIT_DIGITS",
    "DIT_S_2",
    "DIT_XL_2",
    "DNABERT_3",
    "DNA_KMERS",
    "DNA_LETTERS",
    "ESM2_8M",
    "ESM2_650M",
    "LLAMA_3_1_8B",
    "LM_SMALL",
    "PROTBERT",
    "PROTEIN_SMALL",
    "QWEN2_5_7B",
    "ROBERTA_BASE",
    "SMOLLM2_135M",
    "UNET_CIFAR10",
    "UNET_DIGITS",
]

DIT_XL_2 = DiTConfig(image_size=32, channels=4, patch_size=2, width=1152, depth=28, heads=16, num_classes=1000, learn_sigma=True)
"""DiT-XL/2 on the 32x32x4 latents of 256x256 images, 675 million parameters (arXiv:2212.09748, table 1)."""

DIT_S_2 = DiTConfig(image_size=32, channels=4, patch_size=2, width=384, depth=12, heads=6, num_classes=1000, learn_sigma=True)
"""DiT-S/2 on the same latents, 33 million parameters."""

DIT_DIGITS = DiTConfig(image_size=8, channels=1, patch_size=2, width=96, depth=3, heads=4, num_classes=10)
"""A DiT for 8x8 digits, 0.56 million parameters: a minute or two of training on two CPU cores."""

UNET_CIFAR10 = UNetConfig(
    image_size=32, channels=3, width=128, multipliers=(2, 2, 2), blocks=4, attention_resolutions=(16,), num_classes=10
)
"""DDPM++ for 32x32 images as trained by EDM (arXiv:2206.00364, table 7), 56 million parameters."""

UNET_DIGITS = UNetConfig(
    image_size=8, channels=1, width=32, multipliers=(1, 2), blocks=1, attention_resolutions=(4,), num_classes=10, groups=8
)
"""A U-Net for 8x8 digits, 0.75 million parameters."""

SMOLLM2_135M = TransformerConfig(
    vocab_size=49152,
    max_length=8192,
    width=576,
    depth=30,
    heads=9,
    kv_heads=3,
    head_width=64,
    hidden=1536,
    tied=True,
    rope_theta=100_000.0,
)
"""SmolLM2-135M (arXiv:2502.02737), 135 million parameters."""

QWEN2_5_7B = TransformerConfig(
    vocab_size=152_064,
    max_length=32_768,
    width=3584,
    depth=28,
    heads=28,
    kv_heads=4,
    head_width=128,
    hidden=18_944,
    norm_eps=1e-6,
    qkv_bias=True,
    rope_theta=1_000_000.0,
)
"""Qwen2.5-7B-Instruct (arXiv:2412.15115), 7.6 billion parameters."""

LLAMA_3_1_8B = TransformerConfig(
    vocab_size=128_256,
    max_length=131_072,
    width=4096,
    depth=32,
    heads=32,
    kv_heads=8,
    head_width=128,
    hidden=14_336,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling(kind="llama3", factor=8.0),
)
"""Llama-3.1-8B (arXiv:2407.21783), 8 billion parameters."""

LM_SMALL = TransformerConfig(vocab_size=4096, max_length=512, width=192, depth=4, heads=6, kv_heads=2, head_width=32, hidden=512, tied=True)
"""A decoder for a vocabulary of 4096, 2.4 million parameters: it learns from a few megabytes of text on a laptop."""

BERT_BASE = EncoderConfig(vocab_size=30_522, max_length=512, width=768, depth=12, heads=12, hidden=3072, token_types=2, pooler=True)
"""BERT base, uncased (arXiv:1810.04805), 110 million parameters."""

ROBERTA_BASE = EncoderConfig(
    vocab_size=50_265,
    max_length=512,
    width=768,
    depth=12,
    heads=12,
    hidden=3072,
    norm_eps=1e-5,
    position_offset=2,
    token_types=1,
)
"""RoBERTa base (arXiv:1907.11692), 125 million parameters."""

ESM2_8M = EncoderConfig(
    vocab_size=33,
    max_length=1026,
    width=320,
    depth=6,
    heads=20,
    hidden=1280,
    norm="pre",
    norm_eps=1e-5,
    embedding_norm=False,
    final_norm=True,
    positions="rope",
    mask_token=32,
)
"""ESM-2 for proteins (doi:10.1126/science.ade2574), 8 million parameters."""

ESM2_650M = dataclasses.replace(ESM2_8M, width=1280, depth=33, hidden=5120)
"""The same with 650 million parameters."""

DNABERT_3 = EncoderConfig(vocab_size=69, max_length=512, width=768, depth=12, heads=12, hidden=3072, token_types=2)
"""DNABERT for the 64 3-mers of DNA (doi:10.1093/bioinformatics/btab083), 86 million parameters."""

PROTBERT = EncoderConfig(vocab_size=30, max_length=40_000, width=1024, depth=30, heads=16, hidden=4096, token_types=2)
"""ProtBERT for proteins (arXiv:2007.06225), 420 million parameters."""

DNA_KMERS = EncoderConfig(vocab_size=69, max_length=8, width=64, depth=2, heads=4, hidden=128, scan_layers=False)
"""For the 3-mers of up to ten letters of DNA, 76 thousand parameters: a minute or two of training on two CPU cores."""

DNA_LETTERS = EncoderConfig(vocab_size=9, max_length=16, width=128, depth=4, heads=4, hidden=256, scan_layers=False)
"""For up to 16 single letters of DNA, 0.55 million parameters."""

PROTEIN_SMALL = EncoderConfig(vocab_size=25, max_length=256, width=128, depth=4, heads=4, hidden=256)
"""For proteins of up to 256 residues, 0.58 million parameters."""

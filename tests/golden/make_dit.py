"""Makes tests/golden/dit: a tiny random DiT in diffusers' layout, inputs, and the float32 output of diffusers.

Run with torch 2.13.0 and diffusers 0.42.1 (the versions used are stored in the file): python tests/golden/make_dit.py
Every weight is random, the adaLN weights too, and every block has embedders of its own, so nothing is trivially zero or equal.
"""

from pathlib import Path

import diffusers
import numpy as np
import torch

DIRECTORY = Path(__file__).parent / "dit"


def main() -> None:
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        out_channels=6,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.2 if parameter.ndim < 2 else 0.6 * parameter[0].numel() ** -0.5))
    model.save_pretrained(DIRECTORY)

    z = torch.randn(4, 3, 8, 8)
    t = torch.tensor([0.0, 1.0, 250.5, 999.0])
    labels = torch.tensor([0, 3, 4, 5])  # 5 is the null class
    with torch.no_grad():
        expected = model(z, t, labels).sample
    np.savez(
        DIRECTORY / "io.npz",
        z=z.numpy(),
        t=t.numpy(),
        labels=labels.numpy(),
        expected=expected.numpy(),
        versions=np.array([f"diffusers {diffusers.__version__}", f"torch {torch.__version__}"]),
    )
    print("output rms", float(expected.square().mean().sqrt()))


if __name__ == "__main__":
    main()

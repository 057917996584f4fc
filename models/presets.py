"""Published architectures and small ones that train on a laptop; change a field with `dataclasses.replace`."""

from janax.models.dit import DiTConfig
from janax.models.unet import UNetConfig

__all__ = ["DIT_DIGITS", "DIT_S_2", "DIT_XL_2", "UNET_CIFAR10", "UNET_DIGITS"]

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

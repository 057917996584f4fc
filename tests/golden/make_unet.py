"""Makes tests/golden/unet: tiny DDPM++ networks with random parameters, inputs, and their outputs by a second implementation in float64.

Run with torch 2.13.0 (the version used is stored in the files): python tests/golden/make_unet.py
The network is written here once more, with torch's functions and channels first, from its description: DDPM++ of Song et al.,
arXiv:2011.13456, as Karras et al., arXiv:2206.00364, use it (table 7, without dropout and augmentation) and precondition it (table 1). It
asks for its parameters by the names of janax's tree while it runs, and the first request draws them; so the files hold a tree that janax,
which refuses missing and superfluous parameters, has to share. Nothing is zero or one as it would be after initialisation.

Free in the description, and here as in janax: how a parameter is laid out, which includes that cosines come before sines, and the number of
groups of a group norm, which EDM's code sets to min(32, channels / 4).
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

DIRECTORY = Path(__file__).parent / "unet"
SIGMA_DATA = 0.5
CONFIGS: dict[str, dict[str, Any]] = {
    "conditional": {
        "image_size": 4,
        "channels": 2,
        "width": 4,
        "multipliers": [1, 2],
        "blocks": 2,
        "attention_resolutions": [4],
        "num_classes": 3,
        "groups": 2,
        "heads": 2,
    },
    "three_levels": {
        "image_size": 8,
        "channels": 1,
        "width": 4,
        "multipliers": [2, 1, 2],
        "blocks": 1,
        "attention_resolutions": [8, 2],
        "num_classes": 0,
        "groups": 2,
        "heads": 1,
    },
}


class Parameters:
    """Random parameters, made when they are first asked for: kernels keep sizes, biases and scales are some 0.3 off 0 and 1."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.arrays: dict[str, np.ndarray] = {}

    def __call__(self, path: str, *shape: int, inputs: int = 0) -> torch.Tensor:
        if path not in self.arrays:
            draw = self.rng.standard_normal(shape)
            draw = draw / math.sqrt(inputs) if inputs else 0.3 * draw + path.endswith("scale")
            self.arrays[path] = draw.astype(np.float32)
        array = self.arrays[path]
        if array.shape != shape:
            raise ValueError(f"{path} is asked for with shapes {array.shape} and {shape}")
        return torch.from_numpy(array).double()


class Reference:
    """F(z; t) for z [b c h w], t [b] and labels [b], all float64."""

    def __init__(self, config: dict[str, Any], params: Parameters):
        self.config, self.params = config, params

    def dense(self, path: str, x: torch.Tensor, outputs: int) -> torch.Tensor:
        kernel = self.params(f"{path}/kernel", x.shape[1], outputs, inputs=x.shape[1])
        return functional.linear(x, kernel.T, self.params(f"{path}/bias", outputs))

    def conv(self, path: str, x: torch.Tensor, outputs: int, side: int) -> torch.Tensor:
        inputs = x.shape[1]
        kernel = self.params(f"{path}/kernel", side, side, inputs, outputs, inputs=side * side * inputs)
        return functional.conv2d(x, kernel.permute(3, 2, 0, 1), self.params(f"{path}/bias", outputs), padding=side // 2)

    def norm(self, path: str, x: torch.Tensor) -> torch.Tensor:
        channels = x.shape[1]
        scale, bias = self.params(f"{path}/scale", channels), self.params(f"{path}/bias", channels)
        return functional.group_norm(x, self.config["groups"], scale, bias, eps=1e-6)

    def attention(self, path: str, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        heads = self.config["heads"]
        tokens = self.norm(f"{path}/norm", x).flatten(2).mT  # [b hw c]
        kernel = self.params(f"{path}/qkv/kernel", c, 3, heads, c // heads, inputs=c)
        bias = self.params(f"{path}/qkv/bias", 3, heads, c // heads)
        q, k, v = ((tokens @ kernel[:, j].flatten(1) + bias[j].flatten()).reshape(b, h * w, heads, -1).transpose(1, 2) for j in range(3))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        kernel = self.params(f"{path}/projection/kernel", heads, c // heads, c, inputs=c)
        out = mixed @ kernel.flatten(0, 1) + self.params(f"{path}/projection/bias", c)
        return out.mT.reshape(b, c, h, w)

    def block(self, path: str, x: torch.Tensor, outputs: int, *, resample: str = "", attention: bool = False) -> torch.Tensor:
        """BigGAN-type residual block; the sums are rescaled by 1/sqrt(2)."""

        def resized(x: torch.Tensor) -> torch.Tensor:
            if resample == "down":
                return functional.avg_pool2d(x, 2)
            return functional.interpolate(x, scale_factor=2, mode="nearest") if resample else x

        h = self.conv(f"{path}/conv_0", resized(functional.silu(self.norm(f"{path}/norm_0", x))), outputs, 3)
        h = h + self.dense(f"{path}/embedding", self.embedding, outputs)[:, :, None, None]
        h = self.conv(f"{path}/conv_1", functional.silu(self.norm(f"{path}/norm_1", h)), outputs, 3)
        project = resample or x.shape[1] != outputs
        x = resized(x)
        x = (h + (self.conv(f"{path}/skip", x, outputs, 1) if project else x)) / math.sqrt(2)
        return (x + self.attention(f"{path}/attention", x)) / math.sqrt(2) if attention else x

    def embed(self, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        width, classes = self.config["width"], self.config["num_classes"]
        rates = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2 - 1))
        angles = t[:, None] * rates
        embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
        if classes:
            one_hot = functional.one_hot(labels, classes + 1)[:, :classes].double()  # the label after the last is no label
            embedding = embedding + self.dense("label", one_hot * math.sqrt(classes), width)
        for layer in ("time_0", "time_1"):
            embedding = functional.silu(self.dense(layer, embedding, 4 * width))
        return embedding

    def __call__(self, z: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        config = self.config
        widths = [config["width"] * multiplier for multiplier in config["multipliers"]]
        attended = [config["image_size"] >> level in config["attention_resolutions"] for level in range(len(widths))]
        self.embedding = self.embed(t, labels)

        x = self.conv("conv_in", z, config["width"], 3)
        kept = [x]
        for level, width in enumerate(widths):
            if level > 0:
                x = self.block(f"down/level_{level}_down", x, x.shape[1], resample="down")
                kept.append(x)
            for index in range(config["blocks"]):
                x = self.block(f"down/level_{level}_block_{index}", x, width, attention=attended[level])
                kept.append(x)
        x = self.block("middle_0", x, x.shape[1], attention=True)
        x = self.block("middle_1", x, x.shape[1])
        for level in range(len(widths) - 1, -1, -1):
            if level < len(widths) - 1:
                x = self.block(f"up/level_{level}_up", x, x.shape[1], resample="up")
            for index in range(config["blocks"] + 1):
                x = torch.cat([x, kept.pop()], dim=1)
                x = self.block(f"up/level_{level}_block_{index}", x, widths[level], attention=attended[level] and index == config["blocks"])
        if kept:
            raise ValueError(f"{len(kept)} feature maps were not used")
        return self.conv("conv_out", functional.silu(self.norm("norm_out", x)), config["channels"], 3)


def main() -> None:
    torch.set_num_threads(1)
    DIRECTORY.mkdir(exist_ok=True)
    for name, config in CONFIGS.items():
        rng = np.random.default_rng(1)
        sigma = np.array([0.01, 0.4, 3.0, 80.0], np.float32)
        x, noise = rng.standard_normal((2, len(sigma), config["image_size"], config["image_size"], config["channels"]))
        z = (SIGMA_DATA * x + sigma[:, None, None, None] * noise).astype(np.float32)
        labels = np.arange(len(sigma)) % (config["num_classes"] + 1)

        params = Parameters()
        s = torch.from_numpy(sigma).double()
        wide, per_image = torch.from_numpy(z).double().permute(0, 3, 1, 2), s[:, None, None, None]
        total = per_image**2 + SIGMA_DATA**2
        network = Reference(config, params)(wide / total.sqrt(), s.log() / 4, torch.from_numpy(labels))
        denoised = SIGMA_DATA**2 / total * wide + per_image * SIGMA_DATA / total.sqrt() * network
        path = DIRECTORY / f"{name}.npz"
        np.savez_compressed(
            path,
            allow_pickle=False,
            config=np.array(json.dumps(config | {"sigma_data": SIGMA_DATA})),
            z=z,
            sigma=sigma,
            labels=labels,
            denoised=denoised.permute(0, 2, 3, 1).numpy(),
            versions=np.array([f"torch {torch.__version__}"]),
            **{f"params/{path}": array for path, array in params.arrays.items()},
        )
        count = sum(array.size for array in params.arrays.values())
        print(f"{path.name}: {count} parameters, {path.stat().st_size / 1024:.0f} KB, rms of F {float(network.square().mean().sqrt()):.2f}")


if __name__ == "__main__":
    main()

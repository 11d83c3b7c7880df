"""Writes a tiny CogVideoX checkpoint in PyTorch format, to try training without downloading anything.

    python tools/tiny_checkpoint.py --out tiny_cogvideox/
    python tools/convert_torch.py --init-from tiny_cogvideox/ --hce tiny --out weights/

Its networks are random, but for the VAE: that one's weights are set by hand so that a latent is the mean
colour of 8x8 pixels and up to 4 frames, which is as much as its 4 channels can hold without training.
"""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from animecolor_jax import cli, preset
from animecolor_jax.convert.export import export_checkpoint
from animecolor_jax.networks import abstract, initial_leaves
from animecolor_jax.tokenizer import Tokenizer
from animecolor_jax.weights import WeightsWriter

SPREAD = 2.0  # of a latent, in units of its colour in [-1, 1]
LARGE = 100.0  # of constant channels, beside which colours do not change a group's variance
SMALL_LOGVAR = -12.0


def color_vae(config):
    """{name: array} of a VAE whose latents are (red, green, blue, their mean) of what they cover.

    Colours x go through as pairs of channels (x, -x): silu(y) - silu(-y) = y makes the last non-linearity
    vanish, constant channels of LARGE and -LARGE in the same group the normalisation before it; residual
    branches are zero. The decoder's last norm is shifted by the latents themselves, and nothing else reaches
    the pixels.
    """
    leaves = {name: np.zeros(leaf.shape, np.float32) for name, leaf in abstract("vae", config).items()}
    pairs = np.concatenate([np.eye(3), -np.eye(3)], axis=1)  # [3, 6]
    leaves["encoder/conv_in/kernel"][2, 1, 1, :, :6] = pairs
    leaves["encoder/conv_in/bias"][6:8] = LARGE, -LARGE
    for name, leaf in leaves.items():
        if name.endswith("conv_shortcut/kernel") and name.startswith("encoder"):
            leaf[0, 0, 0, :8, :8] = np.eye(8)
        elif name.endswith("downsample/kernel"):
            leaf[:2, :2, :8, :8] = np.eye(8) / 4
    group = config.block_out_channels[-1] // config.norm_num_groups
    leaves["encoder/norm_out/scale"][:6] = LARGE * np.sqrt(2 / group)  # the deviation of a group
    mean = np.concatenate([np.eye(3), np.full((3, 1), 1 / 3)], axis=1)  # [3, 4]
    leaves["encoder/conv_out/kernel"][2, 1, 1, :6, :4] = SPREAD * np.concatenate([mean, -mean])
    leaves["encoder/conv_out/bias"][config.latent_channels :] = SMALL_LOGVAR
    leaves["decoder/norm_out/conv_b/kernel"][0, 0, 0, :3, :6] = pairs / SPREAD
    leaves["decoder/conv_out/kernel"][2, 1, 1, :6] = pairs.T
    return leaves


def write(out, seed):
    """Writes the checkpoint; returns what `export_checkpoint` does."""
    tiny = preset("tiny")
    plain = dataclasses.replace(tiny.denoiser, in_channels=tiny.denoiser.out_channels)
    random = {"denoiser": plain, "text_encoder": tiny.text_encoder, "image_encoder": tiny.image_encoder}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights"
        with WeightsWriter(weights) as writer:
            for number, (name, config) in enumerate(random.items()):
                leaves, note = initial_leaves(name, config, seed + number), {"initialised": f"seed {seed}"}
                writer.component(name, config, abstract(name, config), leaves, note)
            leaves, note = color_vae(tiny.vae), {"initialised": "by hand, mean colours"}
            writer.component("vae", tiny.vae, abstract("vae", tiny.vae), leaves.items(), note)
            writer.scheduler(tiny.scheduler, {"initialised": "defaults"})
            Tokenizer.save_byte_level(writer.tokenizer_directory)
        return export_checkpoint(weights, out)


@dataclass
class Arguments:
    """Write a tiny CogVideoX checkpoint to try training with."""

    out: Path
    """Folder to make, in the format of diffusers."""
    seed: int = 0
    """Of the random networks."""
    json: bool = False
    """Print one JSON object as the last line."""


def run(args):
    """Writes it."""
    report = write(args.out, args.seed)
    print(f"{', '.join(report['components'])}: {report['parameters']:,} parameters")
    return report, True


if __name__ == "__main__":
    cli.main(run, Arguments)

"""The weights directory that stage 1 starts from: trained VAE and encoders, a fresh denoiser and HCE."""

import dataclasses

import numpy as np

from animecolor_jax.networks import abstract, initial_leaves
from animecolor_jax.tokenizer import Tokenizer
from animecolor_jax.weights import Inference, WeightsWriter

NEW = ("denoiser", "hce")
SKETCH_FREE = 0  # what the sketch's input channels start at, as in the paper


def write_base(out, model_config, recipe, trained, scaling_factor):
    """Writes it.

    Args:
        model_config: AnimeColorConfig of the preset. recipe: MiniConfig.
        trained: {"vae", "text_encoder", "image_encoder": {name: array}}.
        scaling_factor: of the VAE's latents.
    """
    configs = {
        "vae": dataclasses.replace(model_config.vae, scaling_factor=scaling_factor),
        **{name: getattr(model_config, name) for name in ("text_encoder", "image_encoder", *NEW)},
    }
    steps = dict.fromkeys(("text_encoder", "image_encoder"), recipe.encoders.steps)
    steps["vae"] = recipe.autoencoder.steps
    with WeightsWriter(out) as writer:
        for number, (name, config) in enumerate(configs.items()):
            if name in NEW:
                seed = recipe.seed + number
                leaves, note = dict(initial_leaves(name, config, seed)), {"initialised": f"seed {seed}"}
            else:
                note = {"trained": {"stage": name, "steps": steps[name], "seed": recipe.seed}}
                leaves = trained[name]
            if name == "denoiser":
                leaves["patch_embed/kernel"][:, :, config.out_channels :] = SKETCH_FREE
            specs = abstract(name, config)
            writer.component(name, config, specs, ((leaf, np.asarray(leaves[leaf])) for leaf in specs), note)
        writer.scheduler(model_config.scheduler, {"initialised": "defaults"})
        writer.inference(inference(model_config, recipe))
        Tokenizer.save_byte_level(writer.tokenizer_directory)


def inference(model_config, recipe):
    """How the weights are best called: as their scores were made."""
    vae, score = model_config.vae, recipe.score
    return Inference(
        steps=score.steps, guidance=score.guidance, window=recipe.clips.frames,
        overlap=4 * max(1, recipe.clips.frames // 12), size=(vae.sample_height, vae.sample_width),
    )  # fmt: skip

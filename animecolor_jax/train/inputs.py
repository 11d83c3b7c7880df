"""Batches -> what the loss reads: precomputed arrays as they are, the rest encoded on the devices."""

import functools
import io

import numpy as np

from animecolor_jax import loading, pipeline, sketch
from animecolor_jax.encoding import COMPONENTS, Encoder, component_hash
from animecolor_jax.errors import InputError
from data_pipeline import records
from data_pipeline.examples import EMPTY_TEXT

LATENTS = ("video_mean", "video_logvar", "sketch", "reference_mean", "reference_logvar")
IMAGE = ("image_summary", "image_features")


def needed(stage):
    """Of latents, text and image, what a stage reads."""
    return ("latents", "text", *(["image"] if "hce" in stage.conditions else []))


def open_precomputed(path, weights, stage, wanted):
    """The precomputed records of a dataset that hold `wanted`, as far as the stage reads it; None for none.

    Raises:
        InputError: there are none that the weights' encoders made.
    """
    names = needed(stage)
    wanted = [name for name in names if name in wanted]
    if not wanted:
        return None
    present = [name for name in COMPONENTS.values() if getattr(weights.config, name) is not None]
    encoded = records.open_encoded(path, {name: component_hash(weights, name) for name in present}, wanted)
    there = [name for name in names if name in encoded.info["what"]]
    if there != wanted:
        raise InputError(
            f"{', '.join(wanted)} only, but what was precomputed holds {', '.join(there)}",
            where="precomputed",
            expected="all of that, or nothing",
            fix=f"--precomputed {' '.join(there)}, or precompute less",
        )
    return encoded


class Inputs:
    """Makes the inputs of `step.clip_losses` from batches on the devices.

    Attributes:
        on_the_fly: which of latents, text, image are encoded for every batch.
        tokenize: for `training_batches` and `evaluation_batches`; None where text is precomputed.
    """

    def __init__(self, sources, stage, encoded, dtype, mesh):
        """
        Args:
            sources: train.sources.Sources; its base has the encoders.
            stage: StageConfig.
            encoded: from `open_precomputed`.
            dtype: of the encoders. mesh: shares out the clips.

        Raises:
            InputError: the weights lack an encoder that is needed.
        """
        self.encoded, self._needed = encoded, needed(stage)
        there = () if encoded is None else encoded.info["what"]
        self.on_the_fly = tuple(name for name in self._needed if name not in there)
        sources.base.require(*(COMPONENTS[name] for name in self.on_the_fly))
        self.encoder, self._config = Encoder(sources.base, dtype=dtype, mesh=mesh), sources.model_config
        self.tokenize = None
        if "text" in self.on_the_fly:
            self.tokenize = functools.partial(pipeline.tokenize, self._config, self.encoder.tokenizer)

    def __call__(self, batch):
        """{name: array} as `step.clip_losses` wants it, of a batch of `dataset.Batches` on the devices."""
        inputs = {}
        if "latents" in self.on_the_fly:
            lines = batch["sketch"] if "sketch" in batch else sketch.xdog(batch["video"])
            inputs |= self.encoder.latents(batch["video"], lines, batch["reference"])
        else:
            inputs |= {name: batch[name] for name in LATENTS}
        text = "text" in self.on_the_fly
        inputs["text"] = self.encoder.token_text(batch["tokens"]) if text else batch["text"]
        if "image" in self.on_the_fly:
            inputs |= self.encoder.image(batch["reference"])
        elif "image" in self._needed:
            inputs |= {name: batch[name] for name in IMAGE}
        return inputs

    def empty_text(self):
        """What the text encoder makes of "", [1, L, D] on the host: guidance's other branch."""
        if "text" in self.on_the_fly:
            ids = self.tokenize([""] * self.encoder.num_shares)
            return loading.to_host(self.encoder.token_text(ids))[:1]
        values = np.load(io.BytesIO(self.encoded.storage.read(EMPTY_TEXT)), allow_pickle=False)
        return records.decode_bits(values)[None]

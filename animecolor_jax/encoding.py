"""The frozen networks that training looks through: clips, captions and references in, arrays out.

Used batch by batch, while training or once before it (`precompute`). Axes: B clips, T frames, H W height and
width, K reference candidates, C latent channels, t h w frames and sides in latents, L tokens, N patches.
"""

import functools
import hashlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from animecolor_jax import denoise, pipeline, sharding
from animecolor_jax.config import config_to_dict
from animecolor_jax.errors import InputError
from animecolor_jax.tokenizer import FILES, Tokenizer

COMPONENTS = {"latents": "vae", "text": "text_encoder", "image": "image_encoder"}
RUNTIME_FIELDS = ("dtype", "attention")  # of a component's config: how it is computed, not what


class Encoder:
    """VAE, text encoder and image encoder of a weights directory; each is loaded when it is first needed.

    Results are JAX arrays in the compute dtype. On a mesh every device takes its share of the clips, so that
    their number must be a multiple of `num_shares`.

    Args:
        weights: `Weights`.
        dtype: of parameters and computation, or None for as stored.
        mesh: a mesh whose axes `data` and `fsdp` share the clips (`fsdp` the parameters as well), or None.
    """

    def __init__(self, weights, *, dtype="bfloat16", mesh=None):
        self.weights, self.dtype, self.mesh = weights, dtype, mesh

    @property
    def num_shares(self):
        """Into how many parts a batch is divided."""
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @functools.cached_property
    def vae(self):
        """The VAE."""
        return self._load("vae")

    @functools.cached_property
    def text_encoder(self):
        """The T5 encoder."""
        return self._load("text_encoder")

    @functools.cached_property
    def image_encoder(self):
        """RADIO."""
        return self._load("image_encoder")

    @functools.cached_property
    def tokenizer(self):
        """The text encoder's tokenizer."""
        return Tokenizer.load(self.weights.directory / "tokenizer")

    def latents(self, frames, sketches, references):
        """What the VAE makes of clips; nothing is multiplied by the scaling factor yet.

        Args:
            frames: [B, T, H, W, 3] uint8; sketches: [B, T, H, W] uint8, 0 for lines.
            references: [B, K, H, W, 3] uint8.

        Returns:
            {"video_mean", "video_logvar", "sketch" (the mode): [B, t, h, w, C],
            "reference_mean", "reference_logvar": [B, K, h, w, C]}; log-variances are not clamped
            (`models.vae.posterior` does).

        Raises:
            InputError: other dtypes or shapes, or frames or a size that the VAE cannot encode.
        """
        batch, length, height, width, _ = _check("frames", frames, (None, None, None, None, 3))
        _check("sketches", sketches, (batch, length, height, width))
        _check("references", references, (batch, None, height, width, 3))
        video = self._run(denoise.encode_video, self.vae, frames)
        lines = self._run(denoise.encode_video, self.vae, sketches[..., None].repeat(3, axis=-1))
        # One candidate after the other, as single images are encoded too: one program for all.
        images = [references[:, k, None] for k in range(references.shape[1])]
        encoded = [self._run(denoise.encode_video, self.vae, image) for image in images]
        colors = jnp.concatenate(encoded, axis=1)
        mean, logvar = jnp.split(video, 2, axis=-1)
        reference_mean, reference_logvar = jnp.split(colors, 2, axis=-1)
        return {
            "video_mean": mean,
            "video_logvar": logvar,
            "sketch": jnp.split(lines, 2, axis=-1)[0],
            "reference_mean": reference_mean,
            "reference_logvar": reference_logvar,
        }

    def text(self, captions):
        """B captions -> {"text": [B, L, D]}; padding takes part, as in the pipeline.

        Raises:
            InputError: a caption is no text, or the tokenizer belongs to another text encoder.
        """
        return {"text": self.token_text(pipeline.tokenize(self.weights.config, self.tokenizer, captions))}

    def token_text(self, ids):
        """Token ids [B, L] int32, of `pipeline.tokenize` -> [B, L, D]."""
        return self._run(denoise.encode_text, self.text_encoder, ids)

    def image(self, references):
        """References [B, K, H, W, 3] uint8 -> {"image_summary": [B, K, S], "image_features": [B, K, N, E]}.

        Raises:
            InputError: another dtype or shape.
        """
        _check("references", references, (None, None, None, None, 3))
        candidates = [
            self._run(denoise.encode_image, self.image_encoder, references[:, k] / np.float32(255))
            for k in range(references.shape[1])
        ]
        summary, features = (jnp.stack(x, 1) for x in zip(*candidates, strict=True))
        return {"image_summary": summary, "image_features": features}

    def _load(self, name):
        return self.weights.load(name, dtype=self.dtype, mesh=self.mesh)

    def _run(self, encode, network, batch):
        """`encode(network, batch)`, the batch shared out over the mesh."""
        if self.mesh is None:
            return encode(network, batch)
        with jax.set_mesh(self.mesh):
            return encode(network, jax.device_put(batch, NamedSharding(self.mesh, P(("data", "fsdp")))))


def _check(name, array, shape):
    """The array's shape; InputError unless it is uint8 and of that shape, None standing for any size."""
    fits = len(array.shape) == len(shape) and all(
        wanted in (None, size) for size, wanted in zip(array.shape, shape, strict=True)
    )
    if array.dtype != np.uint8 or not fits:
        raise InputError(
            f"{array.dtype} of shape {list(array.shape)}",
            where=name,
            expected=f"uint8 of shape {list(shape)}, None for any size",
        )
    return array.shape


def local_mesh(text=""):
    """The mesh of this process's own devices that `Encoder` uses; None for a single device.

    Args:
        text: "data=4", "data=2,fsdp=2"; empty for all devices side by side, each with all parameters.

    Raises:
        InputError: not such a text, another axis, or more devices than this process has.
    """
    sizes = sharding.parse_mesh(text) or {"data": jax.local_device_count()}
    if not sizes.keys() <= {"data", "fsdp"}:
        raise InputError(
            f"{text!r}",
            where="--mesh",
            expected="the axes data and fsdp only: clips are shared out, not cut",
            fix="for example --mesh data=4",
        )
    if math.prod(sizes.values()) == 1:
        return None
    return sharding.make_mesh(**sizes, devices=jax.local_devices())


def component_hash(weights, name):
    """Hash of all that decides what a network computes, but for the dtype; 32 hex digits.

    That is its safetensors file and its config, and for the text encoder also the tokenizer and the number of
    tokens that the denoiser reads. Reads all of the file.

    Args:
        weights: `Weights`. name: "vae", "text_encoder" or "image_encoder".

    Raises:
        InputError: the weights lack it.
    """
    weights.require(name)
    config = config_to_dict(getattr(weights.config, name))
    facts = {"config": {key: value for key, value in config.items() if key not in RUNTIME_FIELDS}}
    files = [weights.directory / f"{name}.safetensors"]
    if name == "text_encoder":
        weights.require("denoiser")
        facts["text_length"] = weights.config.denoiser.text_length
        files += [weights.directory / "tokenizer" / file for file in (*FILES, "tokenizer_config.json")]
    for path in files:
        if path.exists():
            with path.open("rb") as file:
                facts[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

"""The real programs with descriptions of their arrays in place of arrays, ready to be compiled.

Sizes are those of one clip: T H W latents of F frames of pixels.
"""

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from animecolor_jax import denoise, flops, loading, params, quantization, sharding
from animecolor_jax.config import COMPONENTS
from animecolor_jax.errors import InputError
from animecolor_jax.models.animecolor import AnimeColor
from animecolor_jax.models.vae import decode_slices, encode_slices
from animecolor_jax.networks import creator, described
from animecolor_jax.sampling import make_sampler
from animecolor_jax.train import state
from animecolor_jax.train.optimizer import make_optimizer
from animecolor_jax.train.parts import Parts
from animecolor_jax.train.step import Objective, input_shapes, make_train_step
from data_pipeline.shapes import latent_frames

MODEL = ("denoiser", "lcg", "hce")


class Clip(NamedTuple):
    """What is trained on or coloured."""

    frames: int
    height: int
    width: int

    def latents(self, vae):
        """(T, H, W) of its latents."""
        multiple = vae.spatial_compression
        if self.frames % 4 != 1 or self.height % (2 * multiple) or self.width % (2 * multiple):
            raise InputError(
                f"{self.frames} frames of {self.height}x{self.width}", where="--frames, --size",
                expected=f"4k + 1 frames, sides multiples of {2 * multiple}", fix="such as 49 and 480x720",
            )  # fmt: skip
        return latent_frames(self.frames), self.height // multiple, self.width // multiple


class Program(NamedTuple):
    """What is to be compiled.

    Attributes:
        name: of the program. lower: function of nothing -> `jax.stages.Lowered`.
        flops: model FLOPs of one call, all devices together.
        dtype: of its arithmetic.
        resident: bytes of each device that are taken besides, by parameters that the program does not read.
    """

    name: str
    lower: object
    flops: float
    dtype: str
    resident: int = 0


def train(config, model_config, clip, mesh):
    """The step of a training run.

    Args:
        config: TrainConfig. model_config: AnimeColorConfig.
    """
    parts = Parts(config, model_config)
    sharding.check_mesh(mesh, parts.configs)
    loading.rows_of_host(mesh, config.data.batch_size)
    loading.rows_of_host(mesh, config.data.batch_size // config.optimizer.accumulate)
    optimizer = make_optimizer(config.optimizer, config.steps, parts.trained)
    held = state.abstract(parts, optimizer, config, mesh)
    of_trained, of_opt_state = state.state_shardings(optimizer, held.trainable, mesh)
    placed = of_trained, of_opt_state, None if held.ema is None else of_trained
    objective = Objective(parts, model_config.scheduler, model_config.vae.scaling_factor)
    step = make_train_step(objective, optimizer, config.optimizer, placed)
    latents, references = clip.latents(model_config.vae), config.data.view.num_references
    batch, placed_inputs = config.data.batch_size, loading.batch_sharding(mesh)
    inputs = {
        name: jax.ShapeDtypeStruct((batch, *shape), jnp.bfloat16, sharding=placed_inputs)
        for name, shape in input_shapes(config.stage, model_config, latents, references).items()
    }
    work = flops.train_step(
        config.stage, model_config, latents, config.data.batch_size, references, trained=parts.trained
    )

    def lower():
        return step.lower(held.trainable, held.opt_state, held.ema, held.frozen, inputs, held.key, held.step)

    return [Program(f"train {config.stage.name}", lower, work, config.compute.dtype)]


class Colouring:
    """The programs of colouring, each network in `dtype` and placed by the one rule table.

    Args:
        offload: whether networks that a program does not use wait in the host's memory.
        quantize: one of `quantization.MODES`.
    """

    def __init__(self, model_config, clip, mesh, dtype="bfloat16", offload=False, quantize=None):
        quantization.check_mode(quantize)
        self.config, self.clip, self.mesh, self.dtype = model_config, clip, mesh, dtype
        self.offload, self.quantize = offload, quantize
        self.latents = clip.latents(model_config.vae)

    def leaves(self, name):
        """{name: description} of a network's parameters."""
        return described(name, getattr(self.config, name), self.dtype, self.mesh, self.quantize)

    def network(self, name):
        """A module of descriptions."""
        config = dataclasses.replace(getattr(self.config, name), dtype=self.dtype)
        graph, _ = params.abstract(creator(name, config))
        return nnx.merge(graph, params.unflatten(self.leaves(name)))

    def beside(self, turn, read):
        """Bytes on each device of parameters that a program leaves unread.

        Args:
            turn: networks that are on the devices with it where the others are offloaded.
            read: regex of the names, NETWORK/NAME, that it reads.
        """
        return sum(
            sharding.bytes_on_device(leaf)
            for name in (turn if self.offload else COMPONENTS)
            for leaf_name, leaf in self.leaves(name).items()
            if not re.fullmatch(read, f"{name}/{leaf_name}")
        )

    def array(self, shape, dtype=None):
        """A description that every device holds whole."""
        return jax.ShapeDtypeStruct(shape, dtype or self.dtype, sharding=NamedSharding(self.mesh, P()))

    def rows(self, frame):
        """A description of frames [B, H, W, C] as `sharding.share_rows` lays them out."""
        shared = self.latents[1] % self.mesh.shape["context"] == 0
        placed = NamedSharding(self.mesh, P(None, "context") if shared else P())
        return jax.ShapeDtypeStruct(frame.shape, frame.dtype, sharding=placed)

    def whole(self, tree):
        """Descriptions of arrays as `array`."""
        return jax.tree.map(lambda x: self.array(x.shape, x.dtype), tree)

    def denoise(self):
        """One step of the loop, of one clip, with text guidance."""
        config, channels = self.config, self.config.vae.latent_channels
        model = AnimeColor(*(self.network(name) for name in MODEL))
        sharding.check_mesh(self.mesh, {"denoiser": config.denoiser, "lcg": config.lcg, "hce": config.hce})
        conditions = self.whole(jax.eval_shape(denoise.make_conditions, model, *self.reference()))
        latents = self.array((1, *self.latents, channels))
        tables = make_sampler("ddim", 50, config.scheduler)
        history = self.array((tables.mix.shape[1] - 1, *latents.shape), jnp.float32)
        rope = denoise.rotary_table(config.denoiser, self.latents)
        layout = denoise.Layout.of([0], self.latents[0])
        text = self.array((2, config.denoiser.text_length, config.denoiser.text_dim))
        table = jax.tree.map(jnp.asarray, (rope, tables, layout.weights, layout.index))
        rope, tables, weights, index = self.whole(table)
        work = flops.denoising_step(config, self.latents)

        def lower():
            return denoise.denoise_step.lower(
                model, latents, history, latents, text, conditions, rope, tables,
                self.array((), jnp.float32), self.array((), jnp.int32), None, weights, index,
                dtype=self.dtype, mesh=self.mesh,
            )  # fmt: skip

        beside = self.beside(MODEL, r"denoiser/.*|hce/cross_attn/(q|out|norm2)/.*")
        return [Program("denoising step", lower, work, self.dtype, beside)]

    def reference(self):
        """What the conditions are made of: latents, summary and features of one reference."""
        hce, shape = self.config.hce, (1, 1, *self.latents[1:], self.config.vae.latent_channels)
        patches = flops.image_patches(self.config, self.latents[1:])
        summary, features = (1, 1, hce.summary_dim), (1, 1, patches, hce.feature_dim)
        return [self.array(shape) for shape in (shape, summary, features)]

    def conditions(self):
        """What is made of the reference once per clip."""
        model, work = AnimeColor(*map(self.network, MODEL)), flops.conditions(self.config, self.latents[1:])
        of_lcg = r"lcg/(patch_embed|text_embed|time_embed|blocks)/.*"
        of_hce = r"hce/(qformer|cross_attn/(kv|norm1))/.*"
        beside = self.beside(MODEL, rf"{of_lcg}|{of_hce}|denoiser/blocks/attn/(k|v|k_norm)/.*")

        def lower():
            return denoise.make_conditions.lower(model, *self.reference())

        return [Program("conditions", lower, work, self.dtype, beside)]

    def image(self):
        """Image encoder, one reference."""
        encoder, size = self.network("image_encoder"), (self.clip.height, self.clip.width)
        pixels = self.array((1, *size, 3), jnp.float32)
        beside = self.beside(["image_encoder"], "image_encoder/.*")
        rest = flops.radio(self.config.image_encoder, size), self.dtype, beside
        return [Program("image encoder", lambda: denoise.encode_image.lower(encoder, pixels), *rest)]

    def encode(self):
        """VAE, the first chunk of a clip and the following."""
        slices = encode_slices(self.clip.frames, self.config.vae)
        shapes = [(1, part.stop - part.start, self.clip.height, self.clip.width, 3) for part in slices]
        work = [flops.vae_encode_chunk(self.config.vae, shape[1:4]) for shape in shapes]
        return self._chunks("en", denoise.encode_chunk, shapes, jnp.float32, work)

    def decode(self):
        """VAE, the first chunk of latents and the following."""
        slices = decode_slices(self.latents[0], self.config.vae)
        channels = self.config.vae.latent_channels
        shapes = [(1, part.stop - part.start, *self.latents[1:], channels) for part in slices]
        work = [flops.vae_decode_chunk(self.config.vae, shape[1:4]) for shape in shapes]
        return self._chunks("de", denoise.decode_chunk, shapes, self.dtype, work)

    def _chunks(self, part, function, shapes, dtype, work):
        vae = self.network("vae")
        first, later = self.array(shapes[0], dtype), shapes[1:]
        beside = self.beside(["vae"], f"vae/{part}coder/.*")
        name, rest = f"VAE {part}code", (self.dtype, beside)
        found = [Program(f"{name}, first chunk", lambda: function.lower(vae, first, None), work[0], *rest)]
        if later:
            cache = jax.tree.map(self.rows, jax.eval_shape(function, vae, first, None)[1])
            chunk = self.array(later[0], dtype)
            text = f"{name}, each of {len(later)} chunks after it"
            found.append(Program(text, lambda: function.lower(vae, chunk, cache), work[1], *rest))
        return found

    def text(self):
        """Text encoder, prompt and negative prompt."""
        encoder, length = self.network("text_encoder"), self.config.denoiser.text_length
        ids = self.array((2, length), jnp.int32)
        work = 2 * flops.t5(self.config.text_encoder, length)
        beside = self.beside(["text_encoder"], "text_encoder/.*")
        return [
            Program("text encoder", lambda: denoise.encode_text.lower(encoder, ids), work, self.dtype, beside)
        ]

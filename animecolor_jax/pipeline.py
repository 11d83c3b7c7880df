"""Sketch + reference + prompt -> coloured video."""

import contextlib
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from animecolor_jax import canvas, denoise
from animecolor_jax.config import CONFIG_CLASSES, AnimeColorConfig
from animecolor_jax.errors import InputError
from animecolor_jax.loading import to_host
from animecolor_jax.models.animecolor import AnimeColor
from animecolor_jax.models.vae import decode_slices, encode_slices
from animecolor_jax.offload import Offloaded, copy_to, is_needed, on_devices, structure
from animecolor_jax.platforms import device_memory
from animecolor_jax.sampling import dynamic_guidance_scale, init_state, make_sampler
from animecolor_jax.tokenizer import Tokenizer
from animecolor_jax.weights import Inference, Weights

NEGATIVE_PROMPT = (
    "The video is not of a high quality, it has a low resolution. Watermark present in each frame. The "
    "background is solid. Strange body and strange trajectory. Distortion. "
)


class Noise(NamedTuple):
    """All randomness of a run, so that it can be repeated elsewhere.

    Attributes:
        reference: [K, 1, h, w, C] for the sampled latents of K references.
        latents: [T, h, w, C] initial latents.
    """

    reference: np.ndarray
    latents: np.ndarray


class Plan(NamedTuple):
    """A run as far as it can be known without a network.

    Attributes:
        ids: [2 or 1, L] int32, the negative prompt first.
        frames: [F, H, W, 3] uint8, the clip on its canvas; images: [K, H, W, 3] uint8, the references.
        starts: first frames of the windows; length: frames of one window.
        layout: how the windows share the clip's latents; latent_shape: (h, w, C) of one.
        noise: `Noise` over the windows, or None where it is yet to be drawn.
    """

    ids: np.ndarray
    frames: np.ndarray
    images: np.ndarray
    starts: list[int]
    length: int
    layout: denoise.Layout
    latent_shape: tuple[int, int, int]
    noise: Noise | None


def make_plan(
    config, tokenizer, sketch, references, *, prompt="", negative_prompt=NEGATIVE_PROMPT, num_steps=50,
    guidance_scale=6.0, sampler="ddim", noise=None, window=49, overlap=16, strict_reference=False,
):
    """Checks everything about a run that needs no network, and brings clip and references onto the canvas.

    Args:
        config: `AnimeColorConfig` with denoiser, vae, text_encoder and scheduler.
        tokenizer: prompts, length -> ids.
        others: as of `Pipeline.__call__`; references is a list.

    Raises:
        InputError: numbers, prompts or noise that the model or the clip cannot take.
    """
    make_sampler(sampler, num_steps, config.scheduler)
    if not 0 <= guidance_scale < float("inf"):
        raise InputError(
            f"{guidance_scale}", where="guidance_scale", expected="a finite number of at least 0",
            fix="the official script uses 6; 1 means no guidance",
        )
    ids = tokenize(config, tokenizer, [negative_prompt, prompt] if guidance_scale > 1 else [prompt])
    limit = None if config.denoiser.rope else config.denoiser.sample_frames
    if limit is not None and window > limit:
        raise InputError(
            f"windows of {window} frames", where="--window",
            expected=f"at most {limit}, the model's position table", fix=f"use --window {limit}",
        )
    starts = canvas.windows(canvas.padded_length(len(sketch)), window, overlap)
    if strict_reference:
        size = canvas.strict_canvas(references[0].shape[:2])
        frames = canvas.resize_video_bilinear(sketch[: canvas.strict_frame_count(len(sketch))], size)
        images = np.stack([canvas.resize_exact(image, size) for image in references])
        starts = [0]
        if limit is not None and len(frames) > limit:
            raise InputError(
                f"{len(frames)} frames in one window", where="--strict-reference",
                expected=f"at most {limit}, the model's position table",
                fix="leave out --strict-reference, or shorten the clip",
            )
    else:
        multiple = config.vae.spatial_compression * config.denoiser.patch_size
        size = canvas.fit_size(*sketch.shape[1:3], multiple)
        frames = canvas.pad_length(canvas.pad_frames(sketch, size))
        images = np.stack([canvas.fit_reference(image, size) for image in references])
    length = len(frames) if len(starts) == 1 else window
    layout = denoise.Layout.of(starts, (length - 1) // config.vae.temporal_compression + 1)
    latent_shape = (*(side // config.vae.spatial_compression for side in size), config.vae.latent_channels)
    noise = None if noise is None else _fit_noise(noise, len(images), layout, latent_shape)
    return Plan(ids, frames, images, starts, length, layout, latent_shape, noise)


def tokenize(config, tokenizer, texts):
    """Texts -> ids [B, L] int32; InputError where the text encoder knows fewer tokens than the tokenizer."""
    ids, known = np.asarray(tokenizer(texts, config.denoiser.text_length)), config.text_encoder.vocab_size
    if ids.max() >= known:
        raise InputError(
            f"token {ids.max()} in {texts}, the text encoder knows {known}",
            where="tokenizer", expected="the tokenizer of this text encoder",
            fix="convert again with --source tokenizer=PATH of the same checkpoint",
        )
    return ids


class Pipeline:
    """Everything that colours a clip. Load it once, call it for every clip.

    Attributes:
        seconds: how long the stages of the last call took, {"encode", "denoise", "decode"}.

    Example:
        pipeline = Pipeline.load("weights/")
        video = pipeline(sketch, reference, prompt="...", key=jax.random.key(43))
    """

    def __init__(
        self, model, vae, text_encoder, image_encoder, tokenizer, scheduler, mesh=None, inference=None
    ):
        """inference: `weights.Inference`, the numbers that calls leave out; None for its defaults."""
        self.model, self.vae, self.inference = model, vae, inference or Inference()
        self.text_encoder, self.image_encoder = text_encoder, image_encoder
        self.tokenizer, self.scheduler, self.mesh = tokenizer, scheduler, mesh
        self.seconds, self._last = {}, {}

    @classmethod
    def load(cls, directory, *, dtype=None, mesh=None, attention="auto", offload="auto", quantize=None):
        """Reads a weights directory.

        Args:
            dtype: of parameters and computation, default as stored.
            mesh: a `sharding.make_mesh`, or None for one device.
            attention: backend of `models.attention`.
            offload: "yes" keeps networks in the host's memory while others compute, "no" does not, "auto"
                does where they take more than half of a GPU's or TPU's memory.
            quantize: "int8" keeps the matrices of the blocks so, and computes as before (`quantization`).

        Raises:
            InputError: not a weights directory, or one that lacks a network; without LCG or HCE the reference
                would have no effect through that path, so both are required. See `quantization.check_mode`.
        """
        use_compilation_cache()
        weights = Weights(directory)
        weights.require(*CONFIG_CLASSES)
        tokenizer = Tokenizer.load(weights.directory / "tokenizer")

        device = jax.local_devices()[0] if mesh is None else mesh.local_devices[0]
        limit = None if device.platform == "cpu" else device_memory(device)  # else the host's itself
        taken = 0 if limit is None else weights.bytes_on_device(dtype, mesh, quantize)
        offloads = is_needed(offload, taken, limit, jax.process_count() > 1)
        keep = Offloaded if offloads else lambda network: network

        def load(name, **overrides):
            return weights.load(name, dtype=dtype, mesh=mesh, quantize=quantize, **overrides)

        encoders = {name: keep(load(name)) for name in ("text_encoder", "vae", "image_encoder")}
        model = keep(AnimeColor(
            load("denoiser", attention=attention), lcg=load("lcg", attention=attention), hce=load("hce")
        ))  # fmt: skip
        return cls(
            model, tokenizer=tokenizer, scheduler=weights.config.scheduler, mesh=mesh,
            inference=weights.inference, **encoders,
        )  # fmt: skip

    def copy_to(self, device):
        """A pipeline of the same networks on another device."""
        networks = [copy_to(each, device) for each in (
            self.model, self.vae, self.text_encoder, self.image_encoder
        )]  # fmt: skip
        return Pipeline(*networks, self.tokenizer, self.scheduler, inference=self.inference)

    @property
    def dtype(self):
        """Compute dtype of the denoiser, and of the latents between steps."""
        return structure(self.model).denoiser.config.dtype

    @property
    def config(self):
        """`AnimeColorConfig` of what `make_plan` asks for."""
        return AnimeColorConfig(
            denoiser=structure(self.model).denoiser.config, vae=structure(self.vae).config,
            text_encoder=structure(self.text_encoder).config, scheduler=self.scheduler,
        )

    def __call__(
        self, sketch, reference, *, prompt="", negative_prompt=NEGATIVE_PROMPT, num_steps=None,
        guidance_scale=None, dynamic_guidance=False, sampler="ddim", key=None, noise=None, window=None,
        overlap=None, strict_reference=False, step_cache=0.0, progress=None,
    ):
        """Colours a clip. Steps, guidance, window and overlap are by default what the weights name.

        Args:
            sketch: [T, H, W, 3] uint8, dark lines on white, any size and length.
            reference: [H, W, 3] uint8, or a list of several references.
            prompt, negative_prompt: text; the negative one is used if guidance_scale > 1.
            num_steps, sampler: see `sampling.make_sampler`.
            guidance_scale: 1 means no guidance. dynamic_guidance: let it rise with the step.
            key: `jax.random.key`, default 43; the same key repeats a run bit for bit on the same device.
            noise: `Noise` to use in place of random numbers.
            window, overlap: frames; a longer clip is coloured in overlapping windows.
            strict_reference: treat sizes as the official script does: the reference sets the canvas, the clip
                is stretched to it and cut to 4k+1 frames, at most 49.
            step_cache: how much the timestep's embedding may change before the denoiser's blocks run again
                (`denoise.steps_to_run`); 0 runs them in every step, which alone is exact.
            progress: show progress bars; default: if stderr is a terminal.

        Returns:
            [T, H, W, 3] uint8 of exactly the sketch's size and length (not with strict_reference).

        Raises:
            InputError: numbers, prompts or noise that the model or the clip cannot take, see `make_plan`.
            NonFiniteError: the latents became infinite or not a number.
        """
        denoise.check_step_cache(step_cache, sampler)
        references = reference if isinstance(reference, list | tuple) else [reference]
        key = jax.random.key(43) if key is None else key
        num_steps, guidance_scale, window, overlap = self.inference.filled(
            steps=num_steps, guidance=guidance_scale, window=window, overlap=overlap
        ).values()
        plan = make_plan(
            self.config, self.tokenizer, sketch, references, prompt=prompt, negative_prompt=negative_prompt,
            num_steps=num_steps, guidance_scale=guidance_scale, sampler=sampler, noise=noise, window=window,
            overlap=overlap, strict_reference=strict_reference,
        )
        show = sys.stderr.isatty() if progress is None else progress
        self.seconds = {}
        stage = partial(_stage, seconds=self.seconds, show=show)
        chunks = len(plan.starts) * len(encode_slices(plan.length, self.config.vae))
        with self._on_mesh(), stage("encode", 3 + chunks) as bar:
            text = self._encoded("text", plan.ids)
            bar.update()
            summary, features = self._encoded("image", plan.images)
            bar.update()
            reference_key, latents_key, step_key = jax.random.split(key, 3)
            noise = plan.noise or Noise(
                jax.random.normal(reference_key, (len(references), 1, *plan.latent_shape)),
                plan.layout.spread(latents_key, plan.latent_shape),
            )
            with on_devices(self.vae) as vae:
                moments = denoise.encode_video(vae, plan.images[:, None], bar)  # [K, 1, h, w, 2C]
                windows = [plan.frames[None, start : start + plan.length] for start in plan.starts]
                windows = jnp.concatenate([denoise.encode_video(vae, window, bar) for window in windows])
                lines = denoise.sketch_latents(vae, windows)
                colors = denoise.reference_latents(vae, moments, noise.reference)[:, 0]  # [K, h, w, C]
        with self._on_mesh(), on_devices(self.model) as model:
            conditions = denoise.make_conditions(model, colors[None], summary[None], features[None])
            calls = make_sampler(sampler, num_steps, self.scheduler).num_calls
            with stage("denoise", calls) as bar:
                latents = self.denoise(
                    noise.latents, lines, text, conditions, plan.layout, num_steps=num_steps, sampler=sampler,
                    guidance_scale=guidance_scale, dynamic_guidance=dynamic_guidance, key=step_key,
                    step_cache=step_cache, bar=bar,
                )
        del conditions, lines, text, moments, windows  # decoding needs the memory
        latents = plan.layout.join(latents)
        with self._on_mesh(), stage("decode", len(decode_slices(latents.shape[1], self.config.vae))) as bar:
            video = self.decode(latents, bar)
        return video if strict_reference else canvas.crop(video, *sketch.shape[1:3])[: len(sketch)]

    def _encoded(self, what, array):
        """What the encoder of "text" makes of ids, or that of an "image" of pixels [K, H, W, 3]; where they
        are the last ones, what it made then: clips of a film share prompts and references, and an offloaded
        encoder would come and go for each."""
        encoder = self.text_encoder if what == "text" else self.image_encoder
        kept = self._last.get(what)
        if kept is None or kept[0] is not encoder or not np.array_equal(kept[1], array):
            with on_devices(encoder) as network:
                if what == "text":
                    made = denoise.encode_text(network, jnp.asarray(array))
                else:
                    made = denoise.encode_image(network, jnp.asarray(array) / 255)
            kept = self._last[what] = encoder, array, made
        return kept[2]

    def _on_mesh(self):
        """Context in which kernels that XLA cannot partition find the mesh."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def denoise(
        self, latents, sketch, text, conditions, layout, *, num_steps, sampler="ddim", guidance_scale=6.0,
        dynamic_guidance=False, key=None, step_cache=0.0, bar=None,
    ):
        """The denoising loop, over all windows at once.

        Args:
            latents: [W, T, h, w, C] standard normal, equal where windows overlap.
            sketch: likewise, scaled latents.
            text: [2 or 1, L, D]. conditions: from `denoise.make_conditions`. layout: `denoise.Layout`.
            key: for samplers that draw noise. step_cache: as of `__call__`.

        Returns:
            [W, T, h, w, C].

        Raises:
            NonFiniteError: at the first step after which a latent is not finite.
        """
        tables = make_sampler(sampler, num_steps, self.scheduler)
        rope = denoise.rotary_table(structure(self.model).denoiser.config, latents.shape[1:4])
        latents = (jnp.asarray(latents) * tables.init_noise_sigma).astype(self.dtype)
        state, finite = init_state(tables, latents), []
        with on_devices(self.model) as model:
            if self.mesh is None:  # where they stay: else the second step would be compiled anew
                device = jax.tree.leaves(model)[0].sharding
                latents, state = jax.device_put((latents, state), device)
            runs, residual = np.ones(tables.num_calls, bool), None
            if step_cache:
                runs = denoise.steps_to_run(model.denoiser, tables, step_cache)
            for i in range(tables.num_calls):
                noise, scale = None, guidance_scale
                if tables.draws_noise:
                    noise = layout.spread(jax.random.fold_in(key, i), latents.shape[2:])
                if dynamic_guidance:
                    scale = dynamic_guidance_scale(guidance_scale, i, tables.num_calls)
                latents, state, ok, kept = denoise.denoise_step(
                    model, latents, state, sketch, text, conditions, rope, tables, scale, i, noise,
                    layout.weights, layout.index, None if runs[i] else residual, dtype=self.dtype,
                    mesh=self.mesh, keep=bool(step_cache and runs[i]),
                )
                residual = kept if runs[i] else residual
                finite.append(ok)
                if i:  # one step behind, so that the device always has the next one to do
                    self._check_finite(finite[i - 1], i - 1, sampler)
                if bar is not None:
                    bar.update()
        self._check_finite(finite[-1], tables.num_calls - 1, sampler)
        return latents

    def _check_finite(self, finite, step, sampler):
        if not bool(finite):
            raise NonFiniteError(
                f"latents are not finite after step {step} of {sampler} in {self.dtype}: the weights are "
                "damaged, or the dtype is too narrow (float16 overflows: use bfloat16 or float32)"
            )

    def decode(self, latents, bar=None):
        """[1, t, h, w, C] scaled latents -> [T, H, W, 3] uint8, chunk by chunk."""
        video, cache = [], None
        with on_devices(self.vae) as vae:
            for part in decode_slices(latents.shape[1], vae.config):
                chunk, cache = denoise.decode_chunk(vae, latents[:, part], cache)
                video.append(to_host(jnp.round(chunk[0] * 255).astype(jnp.uint8)))
                if bar is not None:
                    bar.update()
        return np.concatenate(video)


def use_compilation_cache():
    """Lets compiled programs outlive the process, unless JAX's own setting or variable says where already."""
    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(cache / "animecolor_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # of many small ones it adds up


class NonFiniteError(FloatingPointError):
    """A latent became infinite or not a number."""


@contextlib.contextmanager
def _stage(name, total, seconds, show):
    """A progress bar around one stage, whose duration goes into `seconds`."""
    began = time.perf_counter()
    with tqdm(total=total, desc=name, disable=not show) as bar:
        yield bar
    seconds[name] = time.perf_counter() - began


def _fit_noise(noise, num_references, layout, latent_shape):
    """The given noise as arrays laid out over the windows."""
    wanted = {"reference": (num_references, 1, *latent_shape), "latents": (layout.total, *latent_shape)}
    for name, shape in wanted.items():
        got = tuple(getattr(noise, name).shape)
        if got != shape:
            raise InputError(
                f"{name} noise has shape {got}", where="--noise",
                expected=f"{shape} (latents are channel-last here)",
                fix="record it at the size of this clip's canvas",
            )
    if len(layout.index) > 1:
        raise InputError(
            f"the clip needs {len(layout.index)} windows", where="--noise",
            expected="a clip that fits one window",
            fix="leave --noise away, or shorten the clip",
        )
    return Noise(jnp.asarray(noise.reference, jnp.float32), jnp.asarray(noise.latents, jnp.float32)[None])

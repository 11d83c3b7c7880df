"""Colouring a clip, whole and each part of it apart.

Functions of a `sizes.Size` that return lines of the report, as of `benchmarks.compare`; those of parts with
what they take: "tflop" by kind of product, and "read_gb" of weights.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from animecolor_jax import benchmarks, denoise, flops
from animecolor_jax.loading import to_host
from animecolor_jax.models.vae import decode_slices
from animecolor_jax.offload import Offloaded
from animecolor_jax.pipeline import Pipeline
from animecolor_jax.sampling import make_sampler

FIRST_CALL = "more in the first call"
ENCODERS = ("vae", "text_encoder", "image_encoder")


def clip(size):
    """The pipeline's call, all networks on the device."""
    return _calls(size, lambda network: network, "clip, exact")


def clip_offloaded(size):
    """The same, networks waiting in the host's memory for their turn."""
    return _calls(size, Offloaded, "clip, networks offloaded")


def clip_step_cache(size):
    """The same with the blocks left out of steps."""
    denoiser = size.network("denoiser")
    sampler = make_sampler("ddim", size.steps, size.model.scheduler)
    runs = denoise.steps_to_run(denoiser, sampler, size.step_cache).sum()
    del denoiser  # the pipeline has its own, with the same weights
    name = f"clip, blocks in {runs} of {size.steps} steps"
    return _calls(size, lambda network: network, name, step_cache=size.step_cache)


def _calls(size, keep, name, **options):
    """The first call of the pipeline, and the second with its stages."""
    encoders = {part: keep(size.network(part)) for part in ENCODERS}
    vocabulary, rng = size.model.text_encoder.vocab_size, np.random.default_rng(0)

    def tokenizer(texts, length):
        return rng.integers(vocabulary, size=(len(texts), length))

    pipeline = Pipeline(
        keep(size.animecolor()), tokenizer=tokenizer, scheduler=size.model.scheduler, **encoders
    )
    seconds = []
    for _ in range(2):  # of other clips, prompts and references: the pipeline keeps what it last encoded
        sketch = rng.integers(256, size=(*size.clip, 3), dtype=np.uint8)
        reference = rng.integers(256, size=(*size.clip[1:], 3), dtype=np.uint8)
        began = time.perf_counter()
        video = pipeline(sketch, reference, num_steps=size.steps, guidance_scale=6.0, **options)
        seconds.append(time.perf_counter() - began)
    assert video.shape == sketch.shape
    lines = {name: seconds[1]} | {f"{name}: {stage}": took for stage, took in pipeline.seconds.items()}
    lines[f"{name}: {FIRST_CALL}"] = seconds[0] - seconds[1]
    shape = f"{size.text}, {size.steps} steps"
    return [benchmarks.compare(line, shape, [took], dtype=size.dtype) for line, took in lines.items()]


def text(size):
    """Prompt and negative prompt."""
    encoder, length = size.network("text_encoder"), size.model.denoiser.text_length
    ids = jax.random.randint(jax.random.key(0), (2, length), 0, size.model.text_encoder.vocab_size)
    work = 2 * flops.t5(size.model.text_encoder, length)
    return _part(size, "text encoder", encoder, lambda: denoise.encode_text(encoder, ids), products=work)


def image(size):
    """One reference."""
    encoder, pixels = size.network("image_encoder"), jnp.abs(size.normal(0, 1, *size.clip[1:], 3))
    pixels = pixels.astype(jnp.float32)
    work = flops.radio(size.model.image_encoder, size.clip[1:])
    run = lambda: denoise.encode_image(encoder, pixels)  # noqa: E731
    return _part(size, "image encoder", encoder, run, products=work)


def vae_encode(size):
    """The line art of the clip, and the reference."""
    vae, rng = size.network("vae"), np.random.default_rng(0)
    frames = rng.integers(256, size=(1, *size.clip, 3), dtype=np.uint8)
    parts = frames[:, :1], frames
    work = sum(flops.vae_encode(size.model.vae, part.shape[1:4]) for part in parts)

    def run():
        return [denoise.encode_video(vae, part) for part in parts]

    return _part(size, "VAE encode", vae, run, convolutions=work)


def conditions(size):
    """Bank and colour tokens of one reference."""
    model, given = size.animecolor(), _reference(size)
    work = flops.conditions(size.model, size.latents[1:])
    run = lambda: denoise.make_conditions(model, *given)  # noqa: E731
    return _part(size, "LCG and HCE", (model.lcg, model.hce), run, products=work)


def step(size):
    """One denoising step, of a loop of several."""
    model, config = size.animecolor(), size.model.denoiser
    run, calls = animecolor_loop(size, model), size.loop_steps
    tokens = config.text_length + flops.tokens_of(config, size.latents)
    keys = tokens + flops.tokens_of(config, (1, *size.latents[1:]))
    attention = 2 * config.num_layers * flops.attention(tokens, keys, config.dim)
    products = flops.denoising_step(size.model, size.latents) - attention
    work = {"attention": attention, "products": products}
    return _part(size, "denoising step", model.denoiser, run, calls, **work)


def vae_decode(size):
    """The latents of the clip, to the host."""
    vae, latents = size.network("vae"), size.normal(0, 1, *size.latents, size.model.vae.latent_channels)

    def run():
        cache = None
        for part in decode_slices(size.latents[0], size.model.vae):
            chunk, cache = denoise.decode_chunk(vae, latents[:, part], cache)
            to_host(jnp.round(chunk[0] * 255).astype(jnp.uint8))

    work = flops.vae_decode(size.model.vae, size.latents)
    return _part(size, "VAE decode", vae, run, convolutions=work)


def animecolor_loop(size, model):
    """Function of nothing that runs `loop_steps` steps of AnimeColor with guidance."""
    made = denoise.make_conditions(model, *_reference(size))
    latents, text, sampler = loop_inputs(size)
    return lambda: benchmarks.denoise_loop(model, latents, latents, text, made, sampler)


def loop_inputs(size):
    """Latents, text and sampler of a denoising loop with guidance."""
    config = size.model.denoiser
    sampler = make_sampler("ddim", size.loop_steps, size.model.scheduler)
    latents = size.normal(1, 1, *size.latents, config.out_channels)
    return latents, size.normal(2, 2, config.text_length, config.text_dim), sampler


def _reference(size):
    """What the conditions are made of: latents, summary and features of one reference."""
    hce, patches = size.model.hce, flops.image_patches(size.model, size.latents[1:])
    image = size.normal(3, 1, 1, *size.latents[1:], size.model.denoiser.out_channels)
    return image, size.normal(4, 1, 1, hce.summary_dim), size.normal(5, 1, 1, patches, hce.feature_dim)


def _part(size, name, network, run, calls=1, **work):
    """The lines of a part that reads all of `network`: its seconds, and how much more its first call takes.

    Args:
        run: function of nothing that does it `calls` times. work: FLOPs of one time by kind of product.
    """
    began = time.perf_counter()
    jax.block_until_ready(run())
    first = time.perf_counter() - began
    ours = benchmarks.alternate({"ours": lambda: jax.block_until_ready(run())}, size.repeats)["ours"]
    line = benchmarks.compare(name, size.text, ours, dtype=size.dtype, calls=calls)
    line["tflop"] = {kind: flop / 1e12 for kind, flop in work.items()}
    line["read_gb"] = sum(leaf.nbytes for leaf in jax.tree.leaves(network)) / 1e9
    more = [first - sum(ours) / len(ours)]
    return [line, benchmarks.compare(f"{name}: {FIRST_CALL}", size.text, more, dtype=size.dtype)]

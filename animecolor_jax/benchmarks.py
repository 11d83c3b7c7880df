"""What tools/benchmark.py measures. Both sides run in one process, warmed up, alternating; PyTorch is
imported only where a comparison asks for it."""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from animecolor_jax import denoise, flops
from animecolor_jax.config import HCEConfig, SchedulerConfig, TransformerConfig, VAEConfig
from animecolor_jax.convert.transformer import config_to_torch as transformer_to_torch
from animecolor_jax.convert.vae import config_to_torch as vae_to_torch
from animecolor_jax.errors import InputError
from animecolor_jax.models.animecolor import AnimeColor, Conditions
from animecolor_jax.networks import fresh
from animecolor_jax.sampling import init_state, make_sampler

# Shapes that the project's aims are stated for: latents (T, H, W), or frames of pixels for the VAE.
SMALL_DIT = TransformerConfig(
    num_layers=8, num_heads=8, text_dim=1024, sample_height=30, sample_width=48, sample_frames=17
)
SMALL_VAE = VAEConfig(block_out_channels=(32, 64, 64, 128))
CPU_CLIP, CPU_STEPS = (5, 30, 48), 4
RADIO_TOKENS = 15 * 24 // 2
CLIP_2B, BANK_2B, COLORS_2B = 17550, 1350, 32


def alternate(sides, repeats):
    """Times functions in turn.

    Args:
        sides: {name: function that returns when its work is done}. repeats: rounds after a warm-up of each.

    Returns:
        {name: seconds of each round}.
    """
    for run in sides.values():
        run()
    seconds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def result(name, shape, sides, repeats, unit="s", dtype="float32"):
    """One line of the report of sides "ours" and, if there is one, "theirs"."""
    return compare(name, shape, **alternate(sides, repeats), unit=unit, dtype=dtype)


def compare(name, shape, ours, theirs=None, *, unit="s", dtype="float32", calls=1):
    """One line of the report: medians, and the median of the ratios theirs / ours round by round.

    Args:
        ours, theirs: seconds of each round. calls: how many of what is reported a round consists of.
    """
    ratio = None
    if theirs is not None:
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    return {
        "name": name,
        "shape": shape,
        "dtype": dtype,
        "unit": unit,
        "ours": statistics.median(ours) / calls,
        "theirs": None if theirs is None else statistics.median(theirs) / calls,
        "ratio": ratio,
    }


def compiled(function, *args):
    """Function of nothing that runs the jitted `function` to its end."""
    run = jax.jit(function)
    return lambda: jax.block_until_ready(run(*args))


def normal(seed, *shape):
    """Standard normal float32 array."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def torch_device():
    """Where PyTorch is to run: on the kind of device that JAX has; InputError where it cannot."""
    import torch

    if jax.default_backend() == "cpu":
        return "cpu"
    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        raise InputError(
            f"PyTorch {torch.__version__} without a {jax.default_backend().upper()}", where="--against",
            expected="PyTorch with CUDA where JAX runs on a GPU", fix="install another build of PyTorch",
        )  # fmt: skip
    return "cuda"


def to_torch(array):
    """A JAX array as PyTorch's, of the same dtype and on the same kind of device."""
    import torch

    values = torch.tensor(np.asarray(array.astype(jnp.float32)))
    return values.to(torch_device(), getattr(torch, str(array.dtype)))


def wait_for_torch():
    """Returns when PyTorch's device has done all work."""
    import torch

    if torch_device() == "cuda":
        torch.cuda.synchronize()


def torch_transformer(config, dtype="float32", device="cpu"):
    """diffusers' transformer of the same size, random weights."""
    import torch
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    values = {key: value for key, value in transformer_to_torch(config).items() if not key.startswith("_")}
    with torch.device(device):
        return CogVideoXTransformer3DModel(**values).to(getattr(torch, dtype)).eval()


def forward(against, repeats):
    """One forward pass of a plain diffusion transformer."""
    frames, height, width = CPU_CLIP
    config = SMALL_DIT
    latents, text = normal(0, 1, *CPU_CLIP, 16), normal(1, 1, config.text_length, config.text_dim)
    model = fresh("denoiser", config, 0)
    sides = {"ours": compiled(lambda m, *xs: m(*xs), model, latents, text, jnp.array([500]))}
    if against == "torch":
        import torch

        theirs = torch_transformer(config)
        arrays = torch.tensor(np.asarray(latents.transpose(0, 1, 4, 2, 3))), torch.tensor(np.asarray(text))

        def run():
            with torch.inference_mode():
                theirs(*arrays, torch.tensor([500]), return_dict=False)

        sides["theirs"] = run
    tokens = frames * height * width // 4 + config.text_length
    return [result("DiT forward", f"8 blocks x 512, {tokens} tokens", sides, repeats)]


def vae(against, repeats):
    """Encoding and decoding 9 frames of 128x192 at quarter width."""
    model = fresh("vae", SMALL_VAE, 0)
    video, latents = normal(0, 1, 9, 128, 192, 3), normal(1, 1, 3, 16, 24, 16)
    sides = {
        "VAE encode": {"ours": compiled(lambda m, x: m.encode(x), model, video)},
        "VAE decode": {"ours": compiled(lambda m, x: m.decode(x), model, latents)},
    }
    if against == "torch":
        import torch
        from diffusers import AutoencoderKLCogVideoX

        values = {key: value for key, value in vae_to_torch(SMALL_VAE).items() if not key.startswith("_")}
        theirs = AutoencoderKLCogVideoX(**values).eval()
        theirs.num_sample_frames_batch_size = SMALL_VAE.encode_chunk

        def run(method, x):
            array = torch.tensor(np.asarray(x.transpose(0, 4, 1, 2, 3)))

            def call():
                with torch.inference_mode():
                    method(array)

            return call

        sides["VAE encode"]["theirs"] = run(theirs.encode, video)
        sides["VAE decode"]["theirs"] = run(theirs.decode, latents)
    return [result(name, "9x128x192, channels 32-128", pair, repeats) for name, pair in sides.items()]


def denoise_loop(model, latents, sketch, text, conditions, sampler, rebuild=None):
    """All steps with guidance; `rebuild` makes the conditions anew in every step, as if nothing were
    cached."""
    layout = denoise.Layout.of([0], latents.shape[1])
    rope = denoise.rotary_table(model.denoiser.config, latents.shape[1:4])
    step = denoise.denoise_step if rebuild is None else _uncached_step
    state = init_state(sampler, latents)
    latents = jnp.array(latents, model.denoiser.config.dtype)  # the step donates its argument
    for i in range(sampler.num_calls):
        latents, state, *_ = step(
            model,
            latents,
            state,
            sketch,
            text,
            conditions if rebuild is None else rebuild,
            rope,
            sampler,
            6.0,
            i,
            None,
            layout.weights,
            layout.index,
            dtype=model.denoiser.config.dtype,
        )
    return jax.block_until_ready(latents)


@jax.jit
def _conditions(model, reference):
    return model.conditions(*reference)


def _uncached_step(model, latents, state, sketch, text, reference, *rest, dtype):
    """Bank keys and values, colour tokens and their keys and values once more, the LCG's pass left
    out: the official code caches that as well."""
    bank, summary, features = reference
    conditions = _project(model, bank, summary, features)
    return denoise.denoise_step(model, latents, state, sketch, text, conditions, *rest, dtype=dtype)


@jax.jit
def _project(model, bank, summary, features):
    return Conditions(
        model.denoiser.project_bank(bank), model.hce.key_value(model.color_tokens(summary, features))
    )


def denoising(against, repeats):
    """The denoising loop with guidance: plain CogVideoX against PyTorch, AnimeColor cached against
    uncached."""
    sampler = make_sampler("ddim", CPU_STEPS, SchedulerConfig())
    latents, text = normal(0, 1, *CPU_CLIP, 16), normal(1, 2, SMALL_DIT.text_length, SMALL_DIT.text_dim)
    shape = f"{CPU_STEPS} steps, guidance, {'x'.join(map(str, CPU_CLIP))} latents"
    if against == "uncached":
        return [_animecolor_loop(latents, text, sampler, shape, repeats), flops_2b()]
    model = AnimeColor(fresh("denoiser", SMALL_DIT, 0))
    nothing, empty = Conditions(None, None), jnp.zeros((1, *CPU_CLIP, 0))
    sides = {"ours": lambda: denoise_loop(model, latents, empty, text, nothing, sampler)}
    if against == "torch":
        theirs = torch_transformer(SMALL_DIT)
        sides["theirs"] = torch_loop(theirs, latents, text, CPU_STEPS, SchedulerConfig())
    return [result("plain CogVideoX denoise loop", shape, sides, repeats)]


def torch_loop(model, latents, text, steps, scheduler_config):
    """The loop of a plain CogVideoX with guidance, as diffusers' pipeline has it; a function of nothing.

    Args:
        model: `torch_transformer`, or what torch.compile makes of it. latents, text: JAX arrays.
    """
    import torch
    from diffusers import DDIMScheduler

    from animecolor_jax.convert.scheduler import config_to_torch

    scheduler = DDIMScheduler.from_config(config_to_torch(scheduler_config))
    start, embeds = to_torch(latents.transpose(0, 1, 4, 2, 3)), to_torch(text)

    def run():
        with torch.inference_mode():
            scheduler.set_timesteps(steps, device=start.device)
            x = start
            for t in scheduler.timesteps:
                v = model(torch.cat([x, x]), embeds, t.expand(2), return_dict=False)[0]
                uncond, cond = v.chunk(2)
                x = scheduler.step(uncond + 6.0 * (cond - uncond), t, x, return_dict=False)[0]
        wait_for_torch()

    return run


def _animecolor_loop(latents, text, sampler, shape, repeats):
    denoiser = dataclasses.replace(SMALL_DIT, in_channels=32)
    extractor = HCEConfig(model_dim=denoiser.dim, num_cross=4)
    parts = [("denoiser", denoiser), ("lcg", SMALL_DIT), ("hce", extractor)]
    model = AnimeColor(*(fresh(name, config, 0) for name, config in parts))
    reference = (
        normal(2, 1, 1, *CPU_CLIP[1:], 16),
        normal(3, 1, 1, extractor.summary_dim),
        normal(4, 1, 1, RADIO_TOKENS, extractor.feature_dim),
    )
    conditions = _conditions(model, reference)
    bank = jax.jit(lambda m, x: m.bank(x))(model, reference[0])
    # the official code projects the bank in both branches of guidance
    uncached = (jnp.repeat(bank, 2, axis=1), *reference[1:])
    sides = {
        "ours": lambda: denoise_loop(model, latents, latents, text, conditions, sampler),
        "theirs": lambda: denoise_loop(model, latents, latents, text, conditions, sampler, rebuild=uncached),
    }
    return result("AnimeColor denoise loop, cached against uncached", shape, sides, repeats)


def flops_2b():
    """Cached against uncached for one guided step of the 2B model at 49x480x720, by counting
    multiplications."""
    config, hce = TransformerConfig(in_channels=32), HCEConfig()
    tokens, width = CLIP_2B + config.text_length, config.dim
    block = flops.dense(tokens, width, (4 + 8) * width) + flops.attention(tokens, tokens + BANK_2B, width)
    step = config.num_layers * block + hce.num_cross * flops.cross_attention(hce, CLIP_2B, COLORS_2B)
    queries, inner = COLORS_2B + 1 + BANK_2B, hce.num_heads * hce.head_dim
    qformer = flops.dense(queries, hce.dim, 6 * inner + 2 * hce.ff_mult * hce.dim)
    qformer = hce.depth * (qformer + flops.attention(queries, 2 * queries, inner))
    qformer += flops.dense(BANK_2B, hce.dim, hce.feature_dim + 2 * hce.dim)
    key_value = flops.dense(COLORS_2B, hce.output_dim, 2 * hce.cross_num_heads * hce.cross_head_dim)
    # the official code projects the bank in both branches of every step, computes the bank's own queries and
    # outputs as well, and throws these away; the Q-Former runs once a step and its tokens are doubled
    rejoin = flops.dense(BANK_2B, width, 4 * width) + flops.attention(BANK_2B, tokens + BANK_2B, width)
    again = 2 * config.num_layers * rejoin + qformer + 2 * hce.num_cross * key_value
    step *= 2  # both branches of guidance
    return {
        "name": "AnimeColor step, cached against the official code, by FLOPs",
        "shape": "2B, 49x480x720, guidance",
        "dtype": "any",
        "unit": "TFLOP",
        "ours": step / 1e12,
        "theirs": (step + again) / 1e12,
        "ratio": (step + again) / step,
    }

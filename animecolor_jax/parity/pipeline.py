"""Every output of a `pipeline` fixture: from token ids and pixels to frames.

Also runs recordings of the real model (tools/record_reference.py), whose weights lie in a weights directory.
"""

import jax
import jax.numpy as jnp
import numpy as np

from animecolor_jax import denoise
from animecolor_jax.convert.scheduler import config_from_torch as scheduler_from_torch
from animecolor_jax.errors import InputError
from animecolor_jax.models.animecolor import AnimeColor, Conditions
from animecolor_jax.models.vae import decode_slices
from animecolor_jax.parity.networks import (
    channels_last,
    channels_third,
    frames_third,
    from_video,
    load_animecolor,
    trace_blocks,
)
from animecolor_jax.parity.weights import group, load_networks
from animecolor_jax.pipeline import Pipeline
from animecolor_jax.sampling import init_state, make_sampler, scale_input
from animecolor_jax.weights import Weights

SAMPLERS = {
    "DDIM_Origin": "ddim",
    "DDIM_Cog": "ddim-cog",
    "DPM_Cog": "dpm-cog",
    "DPM++": "dpmpp-2m",
    "Euler": "euler",
    "Euler A": "euler-a",
    "PNDM": "pndm",
}


def load(tensors, config, dtype, attention, weights=None):
    """The pipeline of a fixture with weights inside, or of a recording with a weights directory beside it."""
    scheduler = scheduler_from_torch(config["scheduler_config"], "fixture")
    if config.get("weights") == "external":
        if weights is None:
            raise InputError(
                "the recording holds no weights",
                where="--weights",
                expected="the converted checkpoint",
                fix="python tools/convert_torch.py --source ... --out WEIGHTS, then --weights WEIGHTS",
            )
        directory = Weights(weights)
        plain = config.get("plain", False)
        names = ["denoiser", "vae", "text_encoder"] + ([] if plain else ["lcg", "hce"])
        directory.require(*names)
        loaded = {name: directory.load(name, dtype=dtype) for name in names}
        encoder = None
        if not plain and config.get("radio_features") != "file":
            encoder = directory.load("image_encoder", dtype=dtype)
        model = AnimeColor(loaded["denoiser"], loaded.get("lcg"), loaded.get("hce"))
        return Pipeline(model, loaded["vae"], loaded["text_encoder"], encoder, None, scheduler)

    def network(component, section, prefix):
        return load_networks(component, config[section], group(tensors, f"weights/{prefix}/"), dtype=dtype)[
            component
        ]

    return Pipeline(
        load_animecolor(tensors, config, dtype, attention),
        network("vae", "vae", "vae"),
        network("text_encoder", "text_encoder", "text_encoder"),
        network("image_encoder", "radio", "radio"),
        None,
        scheduler,
    )


def pipeline(tensors, config, dtype, attention, weights=None):
    """Yields (output name, our value) for every case, in the order of computation."""
    pipe = load(tensors, config, dtype, attention, weights)
    for case, spec in config["cases"].items():
        inputs, traced = group(tensors, f"inputs/{case}/"), f"outputs/{case}/step_0/block_0/hidden" in tensors
        for name, value in _case(pipe, inputs, spec, dtype, config.get("plain", False), traced):
            yield f"{case}/{name}", value


def _case(pipe, inputs, spec, dtype, plain, traced):
    guided = spec["guidance_scale"] > 1
    text = denoise.encode_text(pipe.text_encoder, jnp.asarray(inputs["prompt_ids"]))
    yield "prompt_embeds", text
    if guided:
        negative = denoise.encode_text(pipe.text_encoder, jnp.asarray(inputs["negative_prompt_ids"]))
        yield "negative_prompt_embeds", negative
        text = jnp.concatenate([negative, text])
    encode = jax.jit(lambda vae, x: vae.encode(x))
    if plain:
        # a sketch without channels, a reference without effect
        sketch = jnp.zeros((*channels_last(inputs["init_latents"]).shape[:-1], 0))
        conditions = Conditions(None, None)
        moments = encode(pipe.vae, from_video(inputs["pixels"]))
        yield "vae_mean", frames_third(moments[..., : moments.shape[-1] // 2])
    else:
        sketch, conditions = yield from _conditions(pipe, inputs, dtype, encode, traced)
    yield from _denoise(pipe, inputs, spec, dtype, text, sketch, conditions, traced)


def _conditions(pipe, inputs, dtype, encode, traced):
    """Yields what the reference image and the sketch become; returns sketch latents and conditions."""
    pixels = jnp.asarray(inputs["ref_image"]).transpose(0, 2, 3, 1)
    if "id_cond" in inputs:  # a recording whose RADIO features were computed elsewhere
        summary, features = (jnp.asarray(inputs[name]).astype(dtype) for name in ("id_cond", "id_vit_hidden"))
    else:
        summary, features = denoise.encode_image(pipe.image_encoder, pixels.astype(dtype))
    yield "id_cond", summary
    yield "id_vit_hidden", features
    sketch = denoise.sketch_latents(pipe.vae, encode(pipe.vae, from_video(inputs["control_video"]) * 2 - 1))
    yield "control_latents", frames_third(sketch)
    moments = encode(pipe.vae, (pixels * 2 - 1)[:, None].astype(dtype))
    reference = denoise.reference_latents(pipe.vae, moments, from_video(inputs["ref_noise"]))
    yield "ref_latents", channels_third(reference)
    if pipe.model.hce is not None:
        yield (
            "hce_tokens",
            jax.jit(lambda m, *xs: m.color_tokens(*xs))(pipe.model, summary[:, None], features[:, None]),
        )
    if traced:
        bank = jax.jit(lambda m, x: m.bank(x))(pipe.model, reference)
        yield from ((f"bank_{i}", layer) for i, layer in enumerate(bank))
    return sketch, denoise.make_conditions(pipe.model, reference, summary[:, None], features[:, None])


def _denoise(pipe, inputs, spec, dtype, text, sketch, conditions, traced):
    sampler = make_sampler(SAMPLERS[spec["scheduler"]], spec["steps"], pipe.scheduler)
    run = jax.jit(denoise.predict)
    latents = (channels_last(inputs["init_latents"]) * sampler.init_noise_sigma).astype(dtype)
    layout, state = denoise.Layout.of([0], latents.shape[1]), init_state(sampler, latents)
    rope = denoise.rotary_table(pipe.model.denoiser.config, latents.shape[1:4])
    for i in range(sampler.num_calls):
        timestep = jnp.asarray(sampler.timesteps)[i]
        scaled = scale_input(sampler, latents, i).astype(dtype)
        v = run(pipe.model, scaled, sketch, text, timestep, conditions, rope)
        if traced and i == 0:
            yield from _trace_first_step(pipe.model, scaled, sketch, text, timestep, conditions, rope)
        latents, state, *_ = denoise.denoise_step(
            pipe.model,
            latents,
            state,
            sketch,
            text,
            conditions,
            rope,
            sampler,
            spec["guidance_scale"],
            i,
            None,
            layout.weights,
            layout.index,
            dtype=dtype,
        )
        yield f"step_{i}/noise_pred_raw", channels_third(v)
        yield f"step_{i}/timestep", np.asarray(sampler.timesteps[i : i + 1])
        yield f"step_{i}/latents", channels_third(latents)
    frames, cache = [], None
    for part in decode_slices(latents.shape[1], pipe.vae.config):
        chunk, cache = denoise.decode_chunk(pipe.vae, latents[:, part], cache)
        frames.append(chunk)
    yield "videos", frames_third(jnp.concatenate(frames, axis=1))


def _trace_first_step(model, latents, sketch, text, timestep, conditions, rope):
    """Block by block, the negative prompt's branch."""
    joined = jnp.concatenate([latents, sketch], axis=-1)
    for name, value in trace_blocks(
        model.denoiser, joined, text[:1], timestep[None], conditions.bank, rope, model.hce, conditions.cross
    ):
        if name.startswith(("block", "cross_attn")):
            yield f"step_0/{name}", value

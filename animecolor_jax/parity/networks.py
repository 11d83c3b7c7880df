"""Every output of the single-network fixtures, computed by our code.

Each function takes a fixture's tensors and config and yields (output name, our value) in the fixture's
layout.
Blocks are run one by one here, to look between them; the whole network runs as everywhere, scanned.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from animecolor_jax.config import HCEConfig
from animecolor_jax.convert import hce as hce_table
from animecolor_jax.convert import rules
from animecolor_jax.models import positions
from animecolor_jax.models.animecolor import AnimeColor
from animecolor_jax.models.layers import unstack
from animecolor_jax.models.transformer import timestep_embedding
from animecolor_jax.models.vae import posterior
from animecolor_jax.models.vae_tiling import tiled_decode, tiled_encode
from animecolor_jax.networks import abstract
from animecolor_jax.parity.weights import group, load_networks, procedural, procedural_weight


def channels_last(x):
    """Latents (B, F, C, h, w) -> [B, T, H, W, C]."""
    return jnp.asarray(x).transpose(0, 1, 3, 4, 2)


def channels_third(x):
    """The inverse of `channels_last`."""
    return x.transpose(0, 1, 4, 2, 3)


def frames_third(x):
    """[B, T, H, W, C] -> videos (B, C, F, H, W)."""
    return x.transpose(0, 4, 1, 2, 3)


def from_video(x):
    """The inverse of `frames_third`."""
    return jnp.asarray(x).transpose(0, 2, 3, 4, 1)


def _rope(inputs):
    return (inputs["rope_cos"], inputs["rope_sin"]) if "rope_cos" in inputs else None


@jax.jit
def _embed(model, latents, text, timestep):
    return model.patchify(latents, text), model.embed(latents, text), model.time_embed(timestep)


@jax.jit
def _block(model, i, text, video, temb, bank, rope):
    return unstack(model.blocks, i)(text, video, temb, bank, rope)


def trace_blocks(model, latents, text, timestep, bank=None, rope=None, hce=None, cross=None):
    """Yields (name, value) of what happens inside a transformer, block by block.

    Args:
        latents: [B, T, H, W, in_channels]. bank, cross: keys and values of all layers, or None.
    """
    (text_patch, patches), (text, video), temb = _embed(model, latents, text, timestep)
    yield "patch_embed", jnp.concatenate([text_patch, patches], axis=1)
    yield "embed/text", text
    yield "embed/hidden", video
    yield "temb", temb
    for i in range(model.config.num_layers):
        text, video, normed = _block(model, i, text, video, temb, unstack(bank, i), rope)
        yield f"bank_{i}", normed
        yield f"block_{i}/text", text
        yield f"block_{i}/hidden", video
        if cross is not None and i % hce.config.interval == 0:
            j = i // hce.config.interval
            added = jax.jit(lambda layer, *xs: layer(*xs))(
                unstack(hce.cross_attn, j), video, unstack(cross, j)
            )
            yield f"cross_attn_{j}", added
            video = video + hce.config.scale * added


def transformer(tensors, config, dtype, attention):
    """`dit_sincos`, `dit_rope`: a plain transformer or an LCG."""
    weights = group(tensors, "weights/")
    model = load_networks("denoiser", config["model"], weights, dtype=dtype, attention=attention)["denoiser"]
    for case in config["cases"]:
        inputs = group(tensors, f"inputs/{case}/")
        rope, timestep = _rope(inputs), jnp.asarray(inputs["timestep"])
        latents, text = channels_last(inputs["hidden_states"]), jnp.asarray(inputs["encoder_hidden_states"])
        latents, text = latents.astype(dtype), text.astype(dtype)
        if f"outputs/{case}/block_0/hidden" in tensors:
            for name, value in trace_blocks(model, latents, text, timestep, rope=rope):
                if not name.startswith("bank"):
                    yield f"{case}/{name}", value
        sample = jax.jit(lambda m, *xs, rope: m(*xs, rope=rope))(model, latents, text, timestep, rope=rope)
        yield f"{case}/sample", channels_third(sample)


def load_animecolor(tensors, config, dtype, attention):
    """Denoiser, LCG and HCE of a fixture, as one model."""
    denoiser = load_networks(
        "denoiser",
        {**config["denoiser"], "hce": config.get("hce", {})},
        group(tensors, "weights/denoiser/"),
        dtype=dtype,
        attention=attention,
    )
    lcg = load_networks(
        "lcg", config["reference"], group(tensors, "weights/reference/"), dtype=dtype, attention=attention
    )["lcg"]
    return AnimeColor(denoiser["denoiser"], lcg, denoiser.get("hce"))


@jax.jit
def _conditions(model, reference, summary, features):
    tokens = None if model.hce is None else model.color_tokens(summary, features)
    return model.bank(reference), tokens, model.conditions(reference, summary, features)


def animecolor(tensors, config, dtype, attention):
    """`animecolor_full`, `animecolor_rope`: denoiser, LCG with its bank, HCE."""
    model = load_animecolor(tensors, config, dtype, attention)
    for case in config["cases"]:
        inputs = {
            name: jnp.asarray(value).astype(dtype)
            if value.dtype == np.float32 and "rope" not in name
            else value
            for name, value in group(tensors, f"inputs/{case}/").items()
        }
        rope, timestep, text = _rope(inputs), jnp.asarray(inputs["timestep"]), inputs["encoder_hidden_states"]
        reference = channels_last(inputs["ref_latents"])
        features = (inputs[name][:, None] for name in ("id_cond", "id_vit_hidden"))
        bank, tokens, conditions = _conditions(model, reference, *(features if model.hce else (None, None)))
        if tokens is not None:
            yield f"{case}/hce_tokens", tokens
        branches = len(text) // len(reference)
        for i, layer in enumerate(bank):
            yield f"{case}/bank_{i}", jnp.tile(layer, (branches, 1, 1))
        if (
            len(reference) > 1
        ):  # one clip's conditions serve all branches, those of several are repeated for each
            conditions = jax.tree.map(lambda x: jnp.concatenate([x] * branches, axis=1), conditions)  # noqa: B023
        latents, sketch = channels_last(inputs["hidden_states"]), channels_last(inputs["control_latents"])
        if f"outputs/{case}/block_0/hidden" in tensors:
            yield from _traces(
                case, model, reference, branches, latents, sketch, text, timestep, conditions, rope
            )
        v = jax.jit(lambda m, *xs: m(*xs))(model, latents, sketch, text, timestep, conditions, rope)
        yield f"{case}/noise_pred", channels_third(v)


def _traces(case, model, reference, branches, latents, sketch, text, timestep, conditions, rope):
    """What happens inside the LCG before its first block, and inside the denoiser."""
    zeros = jnp.zeros((len(reference), *text.shape[1:]), text.dtype)
    for name, value in trace_blocks(model.lcg, reference, zeros, jnp.zeros(len(reference), jnp.int32)):
        if name in ("embed/text", "embed/hidden", "temb"):
            yield f"{case}/reference/{name}", jnp.tile(value, (branches, *(1,) * (value.ndim - 1)))
    joined = jnp.concatenate([latents, sketch], axis=-1)
    for name, value in trace_blocks(
        model.denoiser, joined, text, timestep, conditions.bank, rope, model.hce, conditions.cross
    ):
        if not name.startswith("bank"):
            yield f"{case}/{name}", value


@jax.jit
def _hce_outputs(network, summary, features, video):
    """Every intermediate result of HCE, by the fixture's names."""
    qformer = network.qformer
    out = {
        "id_embedding_mapping": qformer.summary_mlp(summary),
        "id_mapping": qformer.join(summary, features),
    }
    tokens = qformer.prepend_latents(out["id_mapping"])
    for i in range(network.config.depth):
        layer = unstack(qformer.layers, i)
        out[f"layer_{i}/attn"] = layer.attn(tokens)
        tokens = tokens + out[f"layer_{i}/attn"]
        out[f"layer_{i}/ff"] = layer.ff(tokens)
        tokens = tokens + out[f"layer_{i}/ff"]
    out["tokens"] = qformer(summary, features)
    layer = unstack(network.cross_attn, 0)
    out["cross_attention"] = layer(video, layer.key_value(out["tokens"]))
    return out


def _hce_cases(network, tensors, cases, dtype):
    for case in cases:
        inputs = group(tensors, f"inputs/{case}/")
        names = ("id_cond", "id_vit_hidden", "hidden_states")
        values = _hce_outputs(network, *(jnp.asarray(inputs[name]).astype(dtype) for name in names))
        yield from ((f"{case}/{name}", value) for name, value in values.items())


def hce(tensors, config, dtype, attention):
    """`hce`: Q-Former with its MLPs and one cross-attention."""
    weights = group(tensors, "weights/")
    state = {
        name.replace("/", ".", 1).replace(
            "perceiver_cross_attention.", "perceiver_cross_attention.0.", 1
        ): value
        for name, value in weights.items()
    }
    values = {
        "hce": config["hce"],
        "LFE_heads": config["LFE_heads"],
        "num_layers": 1,
        "cross_attn_interval": 1,
    }
    network = _load_hce(values, state, dtype)
    yield from _hce_cases(network, tensors, config["cases"], dtype)


def _load_hce(values, state, dtype):
    shapes = {key: value.shape for key, value in state.items()}
    network = dataclasses.replace(hce_table.config_from_torch(values, shapes, "fixture"), dtype=dtype)
    return load_networks("hce", values, state, dtype=network.dtype)["hce"]


def hce_fulldims(tensors, config, dtype, attention):
    """`hce_fulldims`: the same at the published widths, weights and inputs from `procedural`."""
    network = HCEConfig(num_cross=1, interval=1)
    state = {}
    for source in rules.sources(hce_table.RULES, abstract("hce", network)).values():
        for key in source.keys:
            name = key.replace("perceiver_cross_attention.0.", "perceiver_cross_attention.")
            state[key] = procedural_weight(name, source.shape)
    shapes = {
        "id_cond": (1, network.summary_dim),
        "id_vit_hidden": (1, 54, network.feature_dim),
        "hidden_states": (1, 40, network.model_dim),
    }
    inputs = {
        f"inputs/{case}/{name}": procedural(name, shape)
        for name, shape in shapes.items()
        for case in config["cases"]
    }
    model = _load_hce({"num_layers": 1, "cross_attn_interval": 1}, state, dtype)
    yield from _hce_cases(model, inputs, config["cases"], dtype)


@jax.jit
def _vae_full(vae, pixels, noise):
    moments = vae.encode(pixels)
    mean, std = posterior(moments)
    return {
        "moments": moments,
        "mean": mean,
        "std": std,
        "sample": mean + std * noise,
        "decoded": vae.decode(mean),
    }


def vae(tensors, config, dtype, attention):
    """`vae`: encode, decode, tiled, and with diffusers' chunk length."""
    weights = group(tensors, "weights/")
    model = load_networks("vae", config["model"], weights, dtype=dtype)["vae"]
    chunk8 = load_networks("vae", config["model"], weights, dtype=dtype, encode_chunk=8)["vae"]
    encode, decode = jax.jit(lambda m, x: m.encode(x)), jax.jit(lambda m, x: m.decode(x))
    for case, spec in config["cases"].items():
        inputs = group(tensors, f"inputs/{case}/")
        pixels = from_video(inputs["pixels"]).astype(dtype)
        if spec["kind"] == "tiled":
            tile = spec["tile_height"], spec["tile_width"]

            def moments_of(network, x, tile=tile):
                return tiled_encode(network, x, *tile, encode=encode)

            values = {"moments": moments_of(model, pixels)}
            values["decoded"] = tiled_decode(model, posterior(values["moments"])[0], *tile, decode=decode)
        else:
            moments_of = encode
            values = _vae_full(model, pixels, from_video(inputs["noise"]).astype(dtype))
        if f"outputs/{case}/moments_diffusers_chunk8" in tensors:
            values["moments_diffusers_chunk8"] = moments_of(chunk8, pixels)
        yield from ((f"{case}/{name}", frames_third(value)) for name, value in values.items())


def t5(tensors, config, dtype, attention):
    """`t5`: the encoder and every hidden state."""
    model = load_networks("text_encoder", config["model"], group(tensors, "weights/"), dtype=dtype)[
        "text_encoder"
    ]
    for case, spec in config["cases"].items():
        inputs = group(tensors, f"inputs/{case}/")
        ids = jnp.asarray(inputs["input_ids"])
        mask = jnp.asarray(inputs["attention_mask"]) if spec["mask"] else None
        x, bias = model.embed(ids), model.position_bias(ids.shape[1])
        for i in range(model.config.num_layers):
            yield f"{case}/hidden_{i}", x
            x = unstack(model.blocks, i)(x, bias, mask)
        last = jax.jit(lambda m, *xs: m(*xs))(model, ids, mask)
        yield f"{case}/hidden_{model.config.num_layers}", model.final_norm(x)
        yield f"{case}/last_hidden_state", last


def radio(tensors, config, dtype, attention):
    """`radio`, `radio_mlpnorm`: summary and features, both ways of resizing the position table."""
    weights = group(tensors, "weights/")
    for align_corners in (True, False):
        variant = f"align_corners_{str(align_corners).lower()}"
        model = load_networks(
            "image_encoder", config["model"], weights, dtype=dtype, align_corners=align_corners
        )["image_encoder"]
        for case in config["cases"]:
            pixels = jnp.asarray(tensors[f"inputs/{case}/pixel_values"]).transpose(0, 2, 3, 1).astype(dtype)
            summary, features = jax.jit(lambda m, x: m(x))(model, pixels)
            yield f"{case}/{variant}/summary", summary
            yield f"{case}/{variant}/features", features
            yield f"{case}/{variant}/pos_enc", model.position_embedding(*pixels.shape[1:3])


def pos_tables(tensors, config, dtype, attention):
    """`pos_tables`: sincos and rotary tables, timestep embedding."""
    for name, c in config["sincos"].items():
        table = positions.sincos_table(
            c["embed_dim"], c["frames"], c["height"], c["width"], c["spatial_scale"], c["temporal_scale"]
        )
        yield f"sincos_{name}/table", table.reshape(c["frames"], -1, c["embed_dim"])
    for name, c in config["rope"].items():
        grid = c["height"], c["width"]
        crop = c.get("crops") or positions.grid_crop(grid, (c["base_height"], c["base_width"]))
        yield f"rope_{name}/crops", np.asarray(crop)
        for suffix, legacy in (("", False), ("_endpoint_false", True)):
            cos, sin = positions.rope_table(c["head_dim"], c["frames"], grid, crop, legacy=legacy)
            yield f"rope_{name}/cos{suffix}", cos
            yield f"rope_{name}/sin{suffix}", sin
    timesteps = np.asarray(config["timesteps"])
    yield "timestep/timesteps", timesteps
    yield "timestep/embedding", timestep_embedding(jnp.asarray(timesteps), config["timestep_dim"])

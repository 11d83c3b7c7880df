"""I3D, its preprocessing and the Frechet distance against recorded results; see `check.KINDS`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from animecolor_jax import params
from animecolor_jax.convert import metrics, metrics_i3d, rules
from animecolor_jax.convert.state_dict import open_mapping
from animecolor_jax.metrics.frechet import Moments, frechet_distance, trace_sqrt
from animecolor_jax.metrics.i3d import I3D, PROTOCOLS, STAGES, preprocess, to_uint8
from animecolor_jax.parity.metrics import he_scale
from animecolor_jax.parity.weights import group, procedural


def procedural_i3d():
    """{torch key: array} of i3d_pretrained_400.pt, with the fixture's weights."""
    sources = rules.sources(metrics_i3d.VIDEOGPT.rules, params.abstract(create_i3d)[1])
    return {
        key: procedural(f"i3d.{key}", source.shape, *_distribution(key, source.shape))
        for source in sources.values()
        for key in source.keys
    }


def create_i3d():
    """An `I3D` for videogpt's file."""
    return I3D(rngs=nnx.Rngs(0))


def _distribution(key, shape):
    """(scale, offset) of a weight."""
    if key == "logits.conv3d.weight":
        return math.prod(shape[1:]) ** -0.5, 0.0
    if key.endswith("conv3d.weight"):
        return he_scale(shape), 0.0
    return (0.25, 1.0) if key.endswith(("bn.weight", "running_var")) else (0.15, 0.0)


@jax.jit
def _activations(network, clips):
    outputs = network.activations(clips)
    return outputs, network.logits(outputs["avg_pool"]).mean(1)


def i3d(tensors, config, dtype, attention):
    """Yields (name, value) for `i3d`: preprocessing, all stages, logits, and distances of feature sets."""
    network = metrics.build(
        create_i3d, metrics_i3d.VIDEOGPT, open_mapping(procedural_i3d()), where="fixture"
    )
    for case in config["cases"]:
        video = tensors[f"inputs/{case}/video"]
        for protocol in PROTOCOLS:
            clips = _channels_second(preprocess(video, protocol))
            yield f"{case}/pre_{protocol}_slice", clips[:, :, ::5, ::16, ::16]
            yield f"{case}/pre_{protocol}_corner", clips[:, :, -1, -6:, -6:]
            pixels = clips.reshape(*clips.shape[:2], -1).astype(np.float64)
            yield f"{case}/pre_{protocol}_stats", np.stack(
                [pixels.mean(-1), pixels.std(-1), pixels.min(-1), pixels.max(-1)], axis=-1
            )
        outputs, logits = _activations(network, preprocess(video, "videogpt"))
        yield f"{case}/logits", logits
        yield f"{case}/avg_pool", outputs["avg_pool"].transpose(0, 2, 1)
        outputs["avg_pool"] = outputs["avg_pool"][:, :, None, None]
        stages = {name: outputs[name] for name in (*STAGES, "avg_pool")}  # a dict out of jit is sorted
        for name, value in stages.items():
            yield f"{case}/act_{name}", _sample(value)
        squares = [np.square(np.asarray(value), dtype=np.float64).mean() for value in stages.values()]
        yield f"{case}/rms", np.sqrt(squares)
    video = jnp.asarray(tensors["inputs/float_values/video01"]).transpose(0, 2, 3, 4, 1)
    yield "float_values/uint8", to_uint8(video)
    for protocol in PROTOCOLS:
        clips = _channels_second(preprocess(video, protocol))
        yield f"float_values/pre_{protocol}_slice", clips[:, :, ::5, ::16, ::16]
    for case in config["fvd_cases"]:
        pair = Moments(), Moments()
        for moments, features in zip(pair, group(tensors, f"inputs/fvd_{case}/").values(), strict=True):
            moments.add(features)
        yield f"fvd_{case}/exact", np.array([frechet_distance(*pair)])
        yield f"fvd_{case}/trace_sqrt", np.array([trace_sqrt(*pair)])


def _channels_second(clips):
    """[B, T, H, W, C] -> (B, C, T, H, W)."""
    return np.asarray(clips).transpose(0, 4, 1, 2, 3)


def _sample(activation):
    """The part of an activation [B, T, H, W, C] that the fixture holds, (C, T, H, W)."""
    _, _, _, width, channels = activation.shape
    step = max(1, width // 4)
    first = np.asarray(activation[0]).transpose(3, 0, 1, 2)
    return first[:: max(1, channels // 4), ::2, ::step, ::step][:4, :4, :4, :4]

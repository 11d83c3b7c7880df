"""The networks of LPIPS and FID against recorded results; see `check.KINDS`.

The fixtures store no weights: they come from `procedural`, and go through the real converter.
"""

import math

import jax
import numpy as np
from flax import nnx

from animecolor_jax import params
from animecolor_jax.convert import metrics as tables
from animecolor_jax.convert import rules
from animecolor_jax.convert.state_dict import open_mapping
from animecolor_jax.metrics.frechet import Moments, frechet_distance, trace_sqrt
from animecolor_jax.metrics.inception import STAGES, Inception
from animecolor_jax.metrics.lpips import Lpips, normalize
from animecolor_jax.parity.weights import procedural


def procedural_network(create, table, weight):
    """A network whose tensors are `weight(torch key, shape)`, converted like a file of them."""
    leaves = rules.sources(table.rules, params.abstract(create)[1]).values()
    arrays = {key: weight(key, source.shape) for source in leaves for key in source.keys}
    return tables.build(create, table, open_mapping(arrays), where="fixture")


def he_scale(shape):
    """Scale of a convolution's kernel (torch's layout) that keeps the second moment through a ReLU."""
    return math.sqrt(2 / math.prod(shape[1:]))


def procedural_lpips(net, trunk, heads):
    """LPIPS with the fixtures' weights; `trunk`, `heads`: prefixes of their names."""

    def weight(key, shape):
        if key.startswith("lin"):
            return np.abs(procedural(f"{heads}.{key}", shape))
        return procedural(f"{trunk}.{key}", shape, 0.1 if key.endswith(".bias") else he_scale(shape))

    return procedural_network(lambda: Lpips(net, rngs=nnx.Rngs(0)), tables.LPIPS[net], weight)


def procedural_inception(prefix):
    """Inception with the fixtures' weights."""

    def weight(key, shape):
        name = f"{prefix}.{key}"
        if key.endswith(".conv.weight"):
            return procedural(name, shape, he_scale(shape))
        if key.endswith((".bn.weight", ".bn.running_var")):
            return procedural(name, shape, 0.25, 1.0)
        return procedural(name, shape, 0.15)

    return procedural_network(lambda: Inception(rngs=nnx.Rngs(0)), tables.INCEPTION, weight)


@jax.jit
def _lpips_outputs(network, image0, image1):
    spatial_map = network(image0, image1, spatial=True)
    return network(image0, image1), spatial_map, network.layer_maps(image0, image1), network.features(image0)


def lpips(tensors, config, dtype, attention):
    """Yields (name, value) for `lpips_alex`, `lpips_vgg`."""
    prefixes = config["weights"]["prefixes"]
    network = procedural_lpips(prefixes["heads"].removeprefix("lpips_"), **prefixes)
    for case in config["cases"]:
        if case == "normalize":
            continue
        images = [tensors[f"inputs/{case}/image{i}"] for i in (0, 1)]
        distance, spatial_map, maps, features = _lpips_outputs(network, *images)
        yield f"{case}/distance", distance
        yield f"{case}/layer_distances", np.stack([layer.mean((1, 2)) for layer in maps], axis=1)
        yield f"{case}/spatial_map", spatial_map
        yield f"{case}/spatial_mean", spatial_map.mean((1, 2))
        for i, feature in enumerate(features):
            step = max(1, min(feature.shape[1:3]) // 8)
            yield f"{case}/features_{i}", _channels_first(normalize(feature)[0, ::step, ::step, :8])
        yield f"{case}/feature_stats", np.array([_feature_stats(feature) for feature in features])
    channels_last = tensors["inputs/normalize/x"].transpose(0, 2, 3, 1)
    yield "normalize/y", np.asarray(normalize(channels_last)).transpose(0, 3, 1, 2)


def inception_fid(tensors, config, dtype, attention):
    """Yields (name, value) for `inception_fid`."""
    network = procedural_inception(config["weights"]["prefix"])
    images = [tensors[f"inputs/{case}/image"][None] for case in config["cases"]]
    resized = np.concatenate([network.preprocess(image) for image in images])
    activations = jax.jit(lambda m, x: m.activations(x))(network, resized)
    for number, case in enumerate(config["cases"]):
        image = resized[number]
        stages = {name: np.asarray(activations[name][number]) for name in STAGES}
        yield f"{case}/resized_slice", _channels_first(image[::13, ::13])
        yield f"{case}/resized_corner", _channels_first(image[-12:, -12:])
        wide = image.astype(np.float64)
        stats = [getattr(wide, name)((0, 1)) for name in ("mean", "std", "min", "max")]
        yield f"{case}/resized_stats", np.stack(stats, axis=1)
        for block, name in enumerate(("pool1", "pool2", "Mixed_6e")):
            yield f"{case}/block{block}_mean", stages[name].mean((0, 1))
        for name, value in stages.items():
            yield f"{case}/act_{name}", _sample(value)
        squares = [np.square(value.astype(np.float64)).mean() for value in stages.values()]
        yield f"{case}/rms", np.sqrt(squares)
        yield f"{case}/pool3", stages["Mixed_7c"].mean((0, 1))
    for case in config["fid_cases"]:
        moments = Moments(), Moments()
        for i, side in enumerate(moments):
            side.add(tensors[f"inputs/fid_{case}/features{i}"])
        distance = np.array([frechet_distance(*moments)])
        yield f"fid_{case}/distance", distance
        yield f"fid_{case}/distance_exact", distance
        yield f"fid_{case}/mean_term", np.array([np.square(moments[0].mean - moments[1].mean).sum()])
        yield f"fid_{case}/trace_sqrt", np.array([trace_sqrt(*moments)])
        factor = moments[0].factor()
        yield f"fid_{case}/sigma0", factor.T @ factor


def _channels_first(x):
    return np.asarray(x).transpose(2, 0, 1)


def _feature_stats(x):
    x = np.asarray(x, np.float64)
    return x.mean(), np.sqrt(np.square(x).mean()), x.max(), (x == 0).mean()


def _sample(x):
    """What the fixtures keep of an activation [H, W, C]: at most (8, 8, 8), channels first."""
    step = max(1, x.shape[1] // 5)
    return _channels_first(x)[:: max(1, x.shape[2] // 8), ::step, ::step][:8, :8, :8]

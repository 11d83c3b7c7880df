"""The metrics' networks with random weights: for tests, benchmarks, and to see which way scores move.

Their scores mean nothing beside those of the published networks.
"""

from animecolor_jax.convert import metrics, metrics_i3d
from animecolor_jax.convert.state_dict import open_mapping
from animecolor_jax.parity.metrics import procedural_inception, procedural_lpips
from animecolor_jax.parity.metrics_i3d import create_i3d, procedural_i3d


def _i3d():
    arrays = open_mapping(procedural_i3d())
    return metrics.build(create_i3d, metrics_i3d.VIDEOGPT, arrays, where="random weights")


_MAKERS = {
    "lpips_alex": lambda: procedural_lpips("alex", "alexnet", "lpips_alex"),
    "lpips_vgg": lambda: procedural_lpips("vgg", "vgg16", "lpips_vgg"),
    "fid": lambda: procedural_inception("fid_inception"),
    "fvd_styleganv": _i3d,
    "fvd_videogpt": _i3d,
}


def untrained_networks(names):
    """{metric: network} of the metrics `names` that have one, the same every time."""
    return {name: _MAKERS[name]() for name in names if name in _MAKERS}

"""What `tools/benchmark.py metrics` measures: frames a second of every metric on the device.

The networks have reproducible weights that mean nothing, the same on both sides. Frames lie on the device
before, as uint8.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from animecolor_jax.benchmarks import result
from animecolor_jax.convert import metrics as tables
from animecolor_jax.convert import metrics_i3d
from animecolor_jax.convert.state_dict import open_mapping
from animecolor_jax.metrics import i3d
from animecolor_jax.metrics.image import psnr, ssim
from animecolor_jax.metrics.inception import Inception
from animecolor_jax.metrics.lpips import Lpips
from animecolor_jax.metrics.sketches import line_art, sketch_alignment
from data_pipeline.toon import draw_clip

FRAMES, HEIGHT, WIDTH = 16, 320, 512  # the size of the paper's metrics
# Frames at once where 16 would take too long or too much memory.
BATCH = {"lpips_alex": 8, "lpips_vgg": 2, "inception (fid)": 8}
NETWORKS = {
    "lpips_alex": (lambda: Lpips("alex", rngs=nnx.Rngs(0)), tables.LPIPS["alex"]),
    "lpips_vgg": (lambda: Lpips("vgg", rngs=nnx.Rngs(0)), tables.LPIPS["vgg"]),
    "inception (fid)": (lambda: Inception(rngs=nnx.Rngs(0)), tables.INCEPTION),
    "i3d (fvd)": (lambda: i3d.I3D(rngs=nnx.Rngs(0)), metrics_i3d.VIDEOGPT),
}


def metrics(against, repeats):
    """All results, in frames a second; `against` "torch" adds PyTorch with the same weights and input."""
    generated, target = clips(FRAMES, HEIGHT, WIDTH)
    results = []
    for name, count, sides in pairs(generated, target, against == "torch"):
        line = result(name, f"{count} frames of {HEIGHT}x{WIDTH}", sides, repeats, unit="frames/s")
        for side in ("ours", "theirs"):
            line[side] = line[side] and count / line[side]
        results.append(line)
    return results


def clips(frames, height, width):
    """(generated, target): a cartoon with noise, and without; [T, H, W, 3] uint8."""
    target = draw_clip(frames, height, width, seed=0).color
    noise = np.random.default_rng(0).integers(-20, 21, target.shape)
    return np.clip(target + noise, 0, 255).astype(np.uint8), target


def pairs(generated, target, against_torch):
    """Yields (name, number of frames, {"ours": function of nothing, "theirs": ...}); they return the scores.

    One after the other, so that two networks never lie in memory at the same time.
    """
    ours = pixel_metrics(generated, target)
    theirs = torch_pixel_metrics(generated, target) if against_torch else {}
    for name, run in ours.items():
        yield name, len(target), sides(run, theirs.get(name))
    for name in NETWORKS:
        count = BATCH.get(name, len(target))
        cut = generated[:count], target[:count]
        state = theirs = None
        if against_torch:
            module, state = torch_network(name)
            theirs = torch_network_metric(name, module, *cut)
        yield name, len(cut[0]), sides(network_metric(name, state, *cut), theirs)


def sides(ours, theirs):
    """What `benchmarks.result` takes; `theirs` may be None."""
    return {"ours": ours, "theirs": theirs} if theirs else {"ours": ours}


def pixel_metrics(generated, target):
    """{name: function of nothing} of the metrics without networks."""
    frames, targets = jax.device_put(generated), jax.device_put(target)
    sketch = line_art(targets)
    ready = jax.block_until_ready
    return {
        "psnr": lambda: ready(psnr(frames, targets)),
        "ssim": lambda: ready(ssim(frames, targets)),
        "sa": lambda: ready(sketch_alignment(line_art(frames), sketch)),
    }


def network_metric(name, state, generated, target):
    """A network's distances or features as a function of nothing.

    Args:
        state: {torch key: array}, or None for weights of its own.
    """
    create, table = NETWORKS[name]
    network = create() if state is None else tables.build(create, table, open_mapping(state), where=name)
    frames, targets = jax.device_put(generated), jax.device_put(target)
    if name.startswith("lpips"):
        apply, arrays = jax.jit(lambda network, *pair: network(*pair)), (frames, targets)
    elif name.startswith("inception"):
        apply, arrays = jax.jit(lambda network, images: network(images)), (frames,)
    else:
        apply = lambda network, clip: i3d.features(network, clip, "videogpt")  # noqa: E731
        arrays = (jnp.asarray(frames)[None],)
    return lambda: jax.block_until_ready(apply(network, *arrays))


def torch_pixel_metrics(generated, target):
    """The same as `pixel_metrics` in PyTorch."""
    import torch

    from animecolor_jax import benchmarks_metrics_torch as theirs

    frames, targets = torch.tensor(generated), torch.tensor(target)
    sketch = theirs.xdog(targets)
    return {
        "psnr": _inference(theirs.psnr, frames, targets),
        "ssim": _inference(theirs.ssim, frames, targets),
        "sa": _inference(theirs.sketch_alignment, frames, sketch),
    }


def torch_network(name):
    """(PyTorch module, its state dict for ours as {key: array})."""
    from animecolor_jax import benchmarks_metrics_torch as theirs

    makers = {
        "lpips_alex": lambda: theirs.Lpips("alex"),
        "lpips_vgg": lambda: theirs.Lpips("vgg"),
        "inception (fid)": theirs.Inception,
        "i3d (fvd)": theirs.I3D,
    }
    module = makers[name]().eval()
    state = theirs.procedural_state(module, name)
    module.load_state_dict(state)
    return module, {key: value.numpy() for key, value in state.items() if value.is_floating_point()}


def torch_network_metric(name, module, generated, target):
    """The same as `network_metric` in PyTorch."""
    import torch

    from animecolor_jax import benchmarks_metrics_torch as theirs

    frames, targets = torch.tensor(generated), torch.tensor(target)
    if name.startswith("lpips"):
        return _inference(lambda *pair: module(*map(theirs.channels_first, pair)), frames, targets)
    if name.startswith("inception"):
        return _inference(lambda images: module(theirs.channels_first(images)), frames)
    return _inference(lambda clip: module(theirs.i3d_input(clip)), frames)


def _inference(function, *arrays):
    import torch

    def run():
        with torch.inference_mode():
            return function(*arrays)

    return run

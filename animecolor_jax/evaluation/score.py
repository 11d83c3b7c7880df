"""Scores clip after clip; memory does not grow with their number.

`Scorer.add` takes the frames of one clip, of the target and of every method. Scores of clips are kept as
numbers, features of sets as moments that merge. Everything can be stored in between and taken up again.
"""

import functools
import json
import math
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from animecolor_jax.errors import InputError
from animecolor_jax.evaluation.protocol import FLOW_SIDE, FVD_FRAMES, LPIPS_SIDE, SSIM_SIDE
from animecolor_jax.evaluation.results import METRICS, MethodResult
from animecolor_jax.metrics import i3d, image, sketches, temporal, weights
from animecolor_jax.metrics.frechet import Moments, frechet_distance
from animecolor_jax.sharding import make_mesh

NETWORKS = {
    "lpips_alex": "lpips-alex", "lpips_vgg": "lpips-vgg", "fid": "inception",
    "fvd_styleganv": "i3d-torchscript", "fvd_videogpt": "i3d",
}  # fmt: skip
BATCH = 8  # frames that a device is given at a time, at most: nearly all clips run the same program
TARGET = "target"
EXACT = "highest"  # precision of products: float32 everywhere, of which GPUs and TPUs would make less


def load_networks(metrics, paths):
    """Loads the networks that metrics need.

    Args:
        metrics: names. paths: {network: path} of those that are not in the folder of ANIMECOLOR_METRICS.

    Returns:
        {metric: network}, {network: {file: sha256}}, {metric: why it is skipped}.

    Raises:
        InputError: a file that is there cannot be used.
    """
    networks, hashes, skipped = {}, {}, {}
    for metric in metrics:
        name = NETWORKS.get(metric)
        if name is None:
            continue
        found = weights.find(name, paths.get(name))
        if isinstance(found, weights.Missing):
            skipped[metric] = str(found)
        else:
            networks[metric], hashes[name] = weights.load(name, paths.get(name))
    return networks, hashes, skipped


class Scorer:
    """Scores of methods against targets, streamed clip by clip.

    Attributes:
        scored: {clip: number of frames}, in the order of their coming.
        changing: whether `add` was left while it took in a clip, so that `state` is of no use.
    """

    def __init__(self, protocol, metrics, methods, networks):
        """
        Args:
            protocol: Protocol. metrics: names in METRICS. methods: their names.
            networks: {metric: network} of `load_networks`; must have those that `metrics` need.
        """
        self.protocol, self.metrics, self.methods = protocol, list(metrics), list(methods)
        self._mesh = make_mesh(data=jax.local_device_count(), devices=jax.local_devices())
        self.networks = jax.device_put(networks, NamedSharding(self._mesh, P()))
        self.scored, self.changing = {}, False
        self._rows = {}  # clip -> {method: {metric: value, or list over frames}}
        self._moments = {
            metric: {side: Moments() for side in (TARGET, *methods)} for metric in metrics if metric in _SETS
        }

    def check(self, name, shape):
        """Raises InputError where a clip of `shape` (T, H, W) after `prepare` is too small for a metric."""
        frames, *size = shape
        fvd = max(FVD_FRAMES, self.protocol.clip_length)
        fewest = {"flicker": 2, "tc_dis": 2, "fvd_styleganv": fvd, "fvd_videogpt": fvd}
        smallest = {"ssim": SSIM_SIDE, "tc_dis": FLOW_SIDE, "lpips_alex": LPIPS_SIDE, "lpips_vgg": LPIPS_SIDE}
        for metric in self.metrics:
            what = None
            if frames < fewest.get(metric, 1):
                what, expected = f"{frames} frames", f"{fewest[metric]} or more for {metric}"
            elif min(size) < smallest.get(metric, 1):
                what = f"frames of {size[0]}x{size[1]}"
                expected = f"sides of {smallest[metric]} pixels or more for {metric}"
            if what:
                fix = f"leave {metric} out (--metrics), or score larger or longer clips"
                raise InputError(what, where=f"clip {name}", expected=expected, fix=fix)

    def add(self, name, target, generated, sketch=None, mask=None):
        """Scores one clip.

        Args:
            name: of the clip. target: [T, H, W, 3] uint8. generated: {method: [T, h, w, 3] uint8}.
            sketch: [T, h, w] uint8 line art, or None: made from the target.
            mask: [T or 1, h, w] uint8, foreground above 127, or None.
            All are the whole clip, as read: frames are chosen and resized here.

        Raises:
            InputError: frames do not fit each other or a metric.
        """
        choose, protocol = self.protocol.choose, self.protocol
        if mask is not None:
            mask = choose(mask) if len(mask) > 1 else mask
        prepared = {
            side: protocol.prepare(choose(clip), mask) for side, clip in {TARGET: target, **generated}.items()
        }
        truth = prepared[TARGET]
        for side, clip in prepared.items():
            if clip.shape != truth.shape:
                raise InputError(
                    f"{side} is {list(clip.shape)}", where=f"clip {name}", expected=f"{list(truth.shape)}",
                    fix="bring the clips to one size and length",
                )  # fmt: skip
        self.check(name, truth.shape[:3])
        rows = {method: {} for method in self.methods}
        with ThreadPoolExecutor() as pool:
            flows = {
                method: pool.submit(temporal.tc_dis, prepared[method], truth)
                for method in self.methods if "tc_dis" in self.metrics
            }  # fmt: skip
            lines = self._lines(prepared, sketch, mask) if {"sa", "edmd"} & {*self.metrics} else None
            maps = {
                method: pool.submit(sketches.distance_map_rmse, lines[method], lines[TARGET])
                for method in self.methods if "edmd" in self.metrics
            }  # fmt: skip
            for method in self.methods:
                art = lines and (lines[method], lines[TARGET])
                rows[method] = self._compare(prepared[method], truth, art)
            features = {side: self._features(clip) for side, clip in prepared.items()}
            for method in self.methods:
                if "edmd" in self.metrics:
                    rows[method]["edmd"] = maps[method].result().tolist()
                if "tc_dis" in self.metrics:
                    ratio = flows[method].result()
                    rows[method]["tc_dis"] = ratio if math.isfinite(ratio) else None  # a still target
        # Nothing above changed what is kept. An interruption below leaves it half changed.
        self.changing = True
        for side, found in features.items():
            for metric, values in found.items():
                self._moments[metric][side].add(values)
        self._rows[name] = rows
        self.scored[name] = len(truth)
        self.changing = False

    def _lines(self, prepared, sketch, mask):
        """{side: line art [T, H, W] uint8}; what is compared with stands under TARGET."""
        lines = {}
        for side, clip in prepared.items():
            if side == TARGET and sketch is not None:
                art = self.protocol.prepare(self.protocol.choose(sketch), mask)
                lines[side] = _to_uint8(art)
            else:
                lines[side] = np.asarray(self._line_art(_to_uint8(clip)))
        return lines

    def _line_art(self, frames):
        if self.protocol.extractor == "xdog":
            return self._run(sketches.line_art, frames)
        return sketches.line_art(frames, self.protocol.extractor)

    def _compare(self, clip, truth, lines):
        """{metric: list over frames, or over pairs of frames} of one method's clip."""
        found = {}
        for metric in self.metrics:
            if metric in ("psnr", "ssim"):
                found[metric] = self._run(getattr(image, metric), clip, truth)
            elif metric in ("lpips_alex", "lpips_vgg"):
                spatial = self.protocol.lpips_spatial
                found[metric] = self._run(_lpips, clip, truth, network=self.networks[metric], spatial=spatial)
            elif metric == "flicker":
                pairs = (np.stack([frames[:-1], frames[1:]], axis=1) for frames in (clip, truth))
                found[metric] = self._run(image.flicker, *pairs)
            elif metric == "sa":
                found[metric] = self._run(sketches.sketch_alignment, *lines)
        return {metric: values.astype(np.float64).tolist() for metric, values in found.items()}

    def _features(self, clip):
        """{metric: [N, D]} of one clip, for the metrics of sets."""
        found = {}
        for metric in self._moments:
            network = self.networks[metric]
            if metric == "fid":
                found[metric] = self._run(_inception, clip, network=network)
                continue
            length = self.protocol.clip_length or len(clip)
            count = len(clip) // length
            samples = clip[: count * length].reshape(count, length, *clip.shape[1:])
            protocol = metric.removeprefix("fvd_")
            found[metric] = self._run(_i3d, samples, network=network, protocol=protocol, batch=1)
        return found

    def _run(self, function, *arrays, network=None, batch=BATCH, **options):
        """`function` of [N, ...] arrays -> [N, ...] on the host: in batches of one size, shared out among
        this host's devices, each of which works on its share alone."""
        devices, length = self._mesh.size, len(arrays[0])
        size = devices * min(batch, -(-length // devices))
        run = _on_every_device(function, self._mesh, tuple(sorted(options.items())))
        share, results = NamedSharding(self._mesh, P("data")), []
        for start in range(0, length, size):
            parts = [_fill(array[start : start + size], size) for array in arrays]
            results.append(run(network, *jax.device_put(parts, share)))
        return np.concatenate([np.asarray(result) for result in results])[:length]

    def result(self):
        """{method: MethodResult} of all clips so far; the order is that of the clips' names."""
        clips = sorted(self._rows)
        found = {}
        for method in self.methods:
            scores, curves = {}, {}
            for metric in self.metrics:
                if METRICS[metric].kind == "set":
                    continue
                values = {clip: self._rows[clip][method][metric] for clip in clips}
                curves[metric] = {clip: value for clip, value in values.items() if isinstance(value, list)}
                scores[metric] = {
                    clip: math.fsum(value) / len(value) if isinstance(value, list) else value
                    for clip, value in values.items()
                }
            moments = self._moments.items()
            sets = {metric: frechet_distance(sides[method], sides[TARGET]) for metric, sides in moments}
            curves = {metric: curve for metric, curve in curves.items() if curve}
            found[method] = MethodResult(scores, sets, curves)
        return found

    def state(self):
        """All that was scored, as a dict of arrays."""
        rows = json.dumps({"scored": self.scored, "rows": self._rows}).encode()
        arrays = {"rows": np.frombuffer(rows, np.uint8)}
        for metric, sides in self._moments.items():
            for number, side in enumerate((TARGET, *self.methods)):
                for name, array in sides[side].state().items():
                    arrays[f"{metric}/{number}/{name}"] = array
        return arrays

    def merge(self, state):
        """Takes in what `state` of a scorer of other clips (same metrics and methods) returned.

        Raises:
            InputError: a clip is in both, or the state is of other metrics or methods.
        """
        rows = json.loads(np.asarray(state["rows"]).tobytes())
        twice = [clip for clip in rows["scored"] if clip in self.scored]
        if twice:
            raise InputError(f"clip {twice[0]} was scored twice", where="merge", expected="other clips")
        if any(set(row) != set(self.methods) for row in rows["rows"].values()):
            raise InputError("the state is of other methods", where="merge", expected=", ".join(self.methods))
        if not rows["scored"]:
            return
        for metric, sides in self._moments.items():
            for number, side in enumerate((TARGET, *self.methods)):
                prefix = f"{metric}/{number}/"
                found = {key[len(prefix) :]: state[key] for key in state if key.startswith(prefix)}
                sides[side].merge(Moments.from_state(found))
        self.scored |= rows["scored"]
        self._rows |= rows["rows"]


_SETS = [name for name, metric in METRICS.items() if metric.kind == "set"]


def _lpips(network, clip, truth, *, spatial):
    distances = network(clip, truth, spatial=spatial)
    return distances.mean((1, 2)) if spatial else distances


def _inception(network, frames):
    return network(frames)


def _i3d(network, clips, *, protocol):
    return i3d.features(network, clips, protocol)


_WITH_NETWORK = (_lpips, _inception, _i3d)


@functools.lru_cache(maxsize=64)
def _on_every_device(function, mesh, options):
    """Jitted function of (network, arrays [N, ...]) that every device runs on its share of them."""

    def run(network, *arrays):
        inputs = (network, *arrays) if function in _WITH_NETWORK else arrays
        with jax.default_matmul_precision(EXACT):
            return function(*inputs, **dict(options))

    def shared(network, *arrays):
        specs = (P(), *(P("data") for _ in arrays))
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)(
            network, *arrays
        )

    return jax.jit(shared)


def _to_uint8(frames):
    """Frames as an extractor takes them: floats in [0, 1] are rounded to 8 bits."""
    return frames if frames.dtype == np.uint8 else np.rint(frames * 255).astype(np.uint8)


def _fill(array, size):
    """[n, ...] -> [size, ...], the last item repeated."""
    if len(array) == size:
        return array
    return np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)])

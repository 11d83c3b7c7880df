"""Compares our outputs with a recorded fixture of the reference implementation."""

import fnmatch
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from animecolor_jax import safetensors_io
from animecolor_jax.errors import InputError
from animecolor_jax.parity import metrics, metrics_i3d, metrics_image, networks, pipeline, schedulers

KINDS = {
    "dit_sincos": networks.transformer,
    "dit_rope": networks.transformer,
    "animecolor_full": networks.animecolor,
    "animecolor_rope": networks.animecolor,
    "hce": networks.hce,
    "hce_fulldims": networks.hce_fulldims,
    "vae": networks.vae,
    "t5": networks.t5,
    "radio": networks.radio,
    "radio_mlpnorm": networks.radio,
    "pos_tables": networks.pos_tables,
    "i3d": metrics_i3d.i3d,
    "image_metrics": metrics_image.image_metrics,
    "xdog": metrics_image.xdog_stages,
    "lpips_alex": metrics.lpips,
    "lpips_vgg": metrics.lpips,
    "inception_fid": metrics.inception_fid,
    "schedulers": lambda tensors, config, dtype, attention: (
        (name.removeprefix("outputs/"), value) for name, value in schedulers.outputs(tensors, config)
    ),
}


@dataclass
class Result:
    """How one fixture compares.

    Attributes:
        errors: {output: (error, tolerance)}; the error is infinite where shapes differ or we have no
        such output.
        not_compared: outputs that the fixture says to skip, or has no bfloat16 figure for.
    """

    name: str
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    not_compared: list[str] = field(default_factory=list)

    @property
    def worst(self):
        """(error / tolerance, error, output) of the worst output."""
        ratios = (
            (error / tolerance if tolerance else (0.0 if error == 0 else np.inf), error, name)
            for name, (error, tolerance) in self.errors.items()
        )
        return max(ratios, default=(0.0, 0.0, ""))

    @property
    def passed(self):
        """Whether something was compared and all of it is within its tolerance."""
        return bool(self.errors) and self.worst[0] <= 1


def check_fixture(path, *, dtype="float32", attention="auto", tolerance=None, weights=None, case=None):
    """Runs our code on a fixture's inputs and compares every output.

    Args:
        path: FIXTURE.safetensors, its JSON beside it.
        dtype: float32, or bfloat16 against the reference's own bfloat16 error.
        attention: backend. tolerance: in place of the fixture's. weights: directory, for recordings.
        case: the only one to compute; default: all.

    Raises:
        InputError: the fixture is damaged, or its kind is unknown.
    """
    tensors, meta = _read(Path(path))
    kind, config = meta["kind"], meta["config"]
    prefix = "outputs/" if case is None else f"outputs/{case}/"
    wanted = {
        name.removeprefix("outputs/"): value for name, value in tensors.items() if name.startswith(prefix)
    }
    if case is not None:
        config = config | {"cases": {case: config["cases"][case]}}
    result = Result(meta.get("name", Path(path).stem))
    half = dtype != "float32"
    measures = {
        name: _rms_error if half and np.issubdtype(value.dtype, np.floating) else _max_error
        for name, value in wanted.items()
    }
    limits = {
        name: _bound(meta, name, measure is _rms_error, tolerance) for name, measure in measures.items()
    }
    if kind == "pipeline":
        ours = pipeline.pipeline(tensors, config, dtype, attention, weights)
    elif kind in KINDS:
        ours = KINDS[kind](tensors, config, dtype, attention)
    else:
        raise InputError(f"kind {kind!r}", where=path, expected=f"one of {', '.join([*KINDS, 'pipeline'])}")
    result.not_compared = sorted(name for name, limit in limits.items() if limit is None)
    result.errors = {name: (np.inf, limit) for name, limit in limits.items() if limit is not None}
    for name, value in ours:
        if name in result.errors:
            result.errors[name] = measures[name](np.asarray(value), wanted[name]), limits[name]
    return result


def _read(path):
    file = path.with_suffix(".json")
    if not path.is_file() or not file.is_file():
        raise InputError(
            "does not exist" if not path.is_file() else f"has no {file.name} beside it",
            where=path,
            expected="FIXTURE.safetensors and FIXTURE.json",
            fix="record one with tools/record_reference.py",
        )
    with safetensors_io.Reader(path) as reader:
        tensors = {name: reader.read(name) for name in reader.specs}
    try:
        meta = json.loads(file.read_text())
        meta["kind"], meta["config"]["cases"], meta["tolerance"]["default"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"cannot be read: {error!r}", where=file, expected="kind, config and tolerance"
        ) from error
    return tensors, meta


def _bound(meta, name, half, override):
    """An output's tolerance; None where it is not to be compared."""
    rules, key = meta["tolerance"], f"outputs/{name}"
    if any(fnmatch.fnmatchcase(key, pattern) for pattern in rules.get("skip", [])):
        return None
    if override is not None:
        return override
    if half:  # the rule of the fixtures' README: 1.5 times the reference's own error, plus 1e-3
        entry = (meta.get("bfloat16_vs_float32") or {}).get(name)
        return 1.5 * entry["rel_rms"] + 1e-3 if entry else None
    matches = [
        value for pattern, value in rules.get("patterns", {}).items() if fnmatch.fnmatchcase(key, pattern)
    ]
    return matches[-1] if matches else rules["default"]


def _max_error(ours, theirs):
    """Largest difference over the largest magnitude; integers must be equal."""
    if ours.shape != theirs.shape:
        return np.inf
    if not np.issubdtype(theirs.dtype, np.floating):
        return 0.0 if np.array_equal(ours, theirs) else np.inf
    if theirs.size == 0:
        return 0.0
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))  # equal infinities subtract to nan
    difference = np.where(same, 0.0, np.abs(ours - theirs))
    scale = np.abs(theirs[np.isfinite(theirs)]).max(initial=0.0)
    error = difference.max() / max(scale, 1e-6)
    return float(error) if np.isfinite(error) else np.inf


def _rms_error(ours, theirs):
    """Root mean square of the difference over that of the reference."""
    if ours.shape != theirs.shape:
        return np.inf
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    error = np.sqrt(np.mean((ours - theirs) ** 2)) / max(np.sqrt(np.mean(theirs**2)), 1e-12)
    return float(error) if np.isfinite(error) else np.inf

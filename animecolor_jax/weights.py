"""The weights directory: what conversion writes, training ends with and everything else reads.

    config.json                 format version, preset, every component's config, provenance, licence notes;
                                optionally "inference", how these networks are best called
    COMPONENT.safetensors       one per component, our names, blocks stacked
    tokenizer/                  the text encoder's tokenizer files

Files are written and read leaf by leaf, so that a 9.5 GB text encoder needs little more than its
largest leaf.
"""

import dataclasses
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from animecolor_jax import canvas, params, quantization, safetensors_io, sharding
from animecolor_jax import config as configs
from animecolor_jax.errors import InputError
from animecolor_jax.networks import abstract, creator, described, initial_leaves
from animecolor_jax.tokenizer import Tokenizer
from data_pipeline.shapes import SPATIAL_MULTIPLE

BUNDLED = Path(__file__).parent / "bundled"  # the small trained weights that the package brings along
DTYPES = ("float32", "bfloat16", "float16")
LICENCES = {
    "image_encoder": "RADIO's published weights are for non-commercial use only (NVIDIA's licence).",
}


@dataclasses.dataclass(frozen=True)
class Inference:
    """How the networks of a weights directory are best called.

    Attributes:
        steps: denoising steps.
        guidance: guidance scale; 1 is none.
        window, overlap: frames of one window of a long clip, and those that neighbours share; see
            `canvas.windows`.
        size: (height, width) in pixels of the clips they were trained on; None where that is not known.

    Raises:
        InputError: a value that is none of these, with the field's name.
    """

    steps: int = 50
    guidance: float = 6.0
    window: int = 49
    overlap: int = 16
    size: tuple[int, int] | None = None

    def __post_init__(self):
        number = isinstance(self.guidance, float) or _is_whole(self.guidance)
        sides = f"(height, width), multiples of {SPATIAL_MULTIPLE}"
        rules = {
            "steps": (_is_whole(self.steps) and 1 <= self.steps <= 1000, "a whole number from 1 to 1000"),
            "guidance": (number and 0 <= self.guidance < math.inf, "a finite number of at least 0"),
            "window": (_is_whole(self.window) and self.window > 0, "a whole number of frames"),
            "overlap": (_is_whole(self.overlap), "a whole number of frames"),
            "size": (self.size is None or _is_size(self.size), sides),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise InputError(f"{getattr(self, name)!r}", where=f"inference.{name}", expected=expected)
        try:
            canvas.windows(canvas.padded_length(self.window + 1), self.window, self.overlap)
        except InputError as error:
            where = f"inference.{error.where.removeprefix('--')}"
            raise InputError(error.what, where=where, expected=error.expected) from error

    def filled(self, **given):
        """{name: value}: each of `given`, or our own where that is None."""
        return {name: getattr(self, name) if value is None else value for name, value in given.items()}

    @classmethod
    def from_dict(cls, values, where):
        """From the JSON of `where`; what it leaves out is as above. InputError for other fields."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, dict) or set(values) - set(names):
            raise InputError(
                f"inference is {values!r}", where=where, expected=f"an object with any of {', '.join(names)}"
            )
        if isinstance(values.get("size"), list):
            values = {**values, "size": tuple(values["size"])}
        try:
            return cls(**values)
        except InputError as error:
            raise InputError(error.what, where=f"{where}: {error.where}", expected=error.expected) from error


def _is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value):
    sides = value if isinstance(value, tuple) and len(value) == 2 else (0,)
    return all(_is_whole(side) and side > 0 and side % SPATIAL_MULTIPLE == 0 for side in sides)


class WeightsWriter:
    """Writes a weights directory: everything goes to a temporary folder, which gets the final name at
    the end.

    Use as a context manager; after an exception nothing is left.

    Raises:
        InputError: `directory` exists already and is not empty.
    """

    def __init__(self, directory):
        self.directory = Path(directory)
        if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            raise InputError(
                "exists already and is not an empty folder",
                where=self.directory,
                expected="a folder that does not exist yet",
                fix="choose another name or remove it",
            )
        self.components, self.provenance, self._inference = {}, {}, None

    def __enter__(self):
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = Path(tempfile.mkdtemp(prefix=f".{self.directory.name}-", dir=self.directory.parent))
        return self

    def component(self, name, config, specs, leaves, provenance):
        """Writes one component.

        Args:
            specs: {our name: Spec}; leaves: iterable of (our name, array), each exactly once.
            provenance: JSON-ready note of where the values come from.
        """
        safetensors_io.write(
            self._temporary / f"{name}.safetensors", specs, leaves, {"format": "animecolor-jax"}
        )
        self.components[name] = configs.config_to_dict(config)
        self.provenance[name] = provenance

    def scheduler(self, config, provenance):
        """Records the noise schedule."""
        self.components["scheduler"] = configs.config_to_dict(config)
        self.provenance["scheduler"] = provenance

    def inference(self, settings):
        """Records how the networks are best called, an `Inference`."""
        self._inference = settings

    def link(self, name, weights, provenance):
        """Takes over a component of another weights directory: a link to its file where the file system can,
        else
        a copy."""
        source, path = weights.directory / f"{name}.safetensors", self.path(f"{name}.safetensors")
        try:
            os.link(source.resolve(), path)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, path)
        self.components[name] = configs.config_to_dict(weights.config_of(name))
        self.provenance[name] = provenance

    def copy_tokenizer(self, weights):
        """Takes over the tokenizer of another weights directory, if it has one."""
        if (weights.directory / "tokenizer").is_dir():
            shutil.copytree(weights.directory / "tokenizer", self.path("tokenizer"))

    def path(self, name):
        """Where a file of that name is to be written."""
        return self._temporary / name

    @property
    def tokenizer_directory(self):
        """Where the tokenizer's files go, made on first use."""
        path = self._temporary / "tokenizer"
        path.mkdir(exist_ok=True)
        return path

    def __exit__(self, exception_type, *_):
        if exception_type is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            return
        text = {
            "format_version": configs.FORMAT_VERSION,
            "preset": _preset_name(self.components),
            "components": self.components,
            "provenance": self.provenance,
            "licences": {
                name: LICENCES[name]
                for name in self.components
                if name in LICENCES and "trained" not in self.provenance[name]  # ours are ours
            },
        }
        if self._inference is not None:
            text["inference"] = dataclasses.asdict(self._inference)
        (self._temporary / "config.json").write_text(json.dumps(text, indent=2) + "\n")
        os.chmod(self._temporary, 0o755)
        if self.directory.exists():
            self.directory.rmdir()
        os.replace(self._temporary, self.directory)


def _preset_name(components):
    """The preset that all components belong to, else "custom"."""

    def without_runtime(values):
        return {k: v for k, v in values.items() if k not in ("dtype", "attention", "scaling_factor")}

    for name, known in configs.PRESETS.items():
        wanted = {
            part: json.loads(json.dumps(without_runtime(configs.config_to_dict(getattr(known, part)))))
            for part in configs.CONFIG_CLASSES
        }
        given = {part: json.loads(json.dumps(without_runtime(values))) for part, values in components.items()}
        if all(wanted[part] == values for part, values in given.items() if part != "scheduler"):
            return name
    return "custom"


class Weights:
    """A weights directory, opened: `config` is its `AnimeColorConfig`, networks are loaded by name;
    `inference` says how they are best called, an `Inference`.

    Raises:
        InputError: not a weights directory, another format version, or a config that does not parse.
    """

    def __init__(self, directory):
        self.directory = Path(directory)
        path = self.directory / "config.json"
        if not path.is_file():
            raise InputError(
                "no weights directory: config.json is missing",
                where=self.directory,
                expected="a directory written by tools/convert_torch.py or by training",
                fix="convert the checkpoint: tools/convert_torch.py --source PATH --out WEIGHTS",
            )
        try:
            values = json.loads(path.read_text())
            version, components = values["format_version"], values["components"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"cannot be read: {error!r}",
                where=path,
                expected="config.json of a weights directory",
                fix="convert the checkpoint again; a PyTorch directory must be converted first",
            ) from error
        if version != configs.FORMAT_VERSION:
            raise InputError(
                f"format version {version!r}",
                where=path,
                expected=f"version {configs.FORMAT_VERSION}",
                fix="convert the checkpoint again with this version",
            )
        unknown = sorted(set(components) - set(configs.CONFIG_CLASSES))
        if unknown:
            raise InputError(f"unknown components {unknown}", where=path, expected=f"{configs.COMPONENTS}")
        self.values = values
        self.inference = Inference.from_dict(values.get("inference", {}), path)
        self.config = configs.AnimeColorConfig(
            preset=values.get("preset", "custom"),
            **{
                name: configs.config_from_dict(configs.CONFIG_CLASSES[name], component, f"{path}: {name}")
                for name, component in components.items()
            },
        )

    def require(self, *names):
        """Raises one InputError naming every component of `names` that the directory lacks."""
        missing = [
            name
            for name in names
            if getattr(self.config, name) is None
            or (name in configs.COMPONENTS and not (self.directory / f"{name}.safetensors").is_file())
        ]
        if missing:
            raise InputError(
                f"lacks {', '.join(missing)}",
                where=self.directory,
                expected=f"{', '.join(names)}",
                fix="convert again with these sources: "
                + " ".join(f"--source {name}=PATH" for name in missing),
            )

    def load(self, name, *, dtype=None, mesh=None, quantize=None, **overrides):
        """One network with its parameters.

        Args:
            name: one of `config.COMPONENTS`.
            dtype: of parameters and computation; default: as stored.
            mesh: a `jax.sharding.Mesh`; each host then reads only the slices of its devices.
            quantize: one of `quantization.MODES`.
            overrides: runtime fields of the component's config, such as `attention`.

        Raises:
            InputError: the component is not there, damaged, or does not fit its config; see
                `quantization.check_mode`.
        """
        quantization.check_mode(quantize)
        config = self.config_of(name)
        config = dataclasses.replace(config, dtype=dtype or config.dtype, **overrides)
        graphdef, expected = params.abstract(creator(name, config))
        leaves = self._read(name, expected, lambda _: config.dtype, mesh, quantize)
        return nnx.merge(graphdef, params.unflatten(leaves))

    def bytes_on_device(self, dtype=None, mesh=None, quantize=None):
        """Bytes of each device that all networks together take, arguments as of `load`."""
        quantization.check_mode(quantize)
        return sharding.bytes_on_device(
            [described(name, self.config_of(name), dtype, mesh, quantize) for name in configs.COMPONENTS]
        )

    def config_of(self, name):
        """A component's config; InputError if the directory lacks it."""
        self.require(name)
        return getattr(self.config, name)

    def read(self, name, dtype_of, mesh=None):
        """{name: array} of a component's parameters and buffers.

        Args:
            dtype_of: function of a name -> dtype that its floating values are cast to.
            mesh: as of `load`.

        Raises:
            InputError: as `load`.
        """
        return self._read(name, abstract(name, self.config_of(name)), dtype_of, mesh)

    def _read(self, name, expected, dtype_of, mesh, quantize=None):
        path = self.directory / f"{name}.safetensors"
        with safetensors_io.Reader(path) as reader:
            params.conform(reader.specs, expected, what=path)
            leaves = {}
            for key, leaf in reader.specs.items():
                quantized = quantization.is_quantized(quantize, name, key)
                floating = jnp.issubdtype(leaf.dtype, jnp.floating)
                cast = dtype_of(key) if floating and not quantized else leaf.dtype  # rounded once
                leaves[key] = _place(reader, key, leaf.shape, jnp.dtype(cast), mesh)
                if quantized:
                    leaves[key] = quantization.quantize(leaves[key], key, mesh)
        return leaves


def _place(reader, name, shape, dtype, mesh):
    if mesh is None:
        # not `jnp.asarray`, which compiles a program for every shape
        return jax.device_put(reader.read(name).astype(dtype, copy=False))
    placement = sharding.parameter_sharding(name, shape, mesh)
    return jax.make_array_from_callback(
        shape, placement, lambda index: np.asarray(reader.read_slice(name, index)).astype(dtype, copy=False)
    )


def write_initial(directory, config, seed=0):
    """A weights directory with freshly initialised networks and a byte-level tokenizer: for demos and
    tests."""
    with WeightsWriter(directory) as writer:
        for number, name in enumerate(configs.COMPONENTS):
            component = getattr(config, name)
            if component is None:
                continue
            leaves = initial_leaves(name, component, seed + number)
            note = {"initialised": f"randomly, seed {seed}: untrained"}
            writer.component(name, component, abstract(name, component), leaves, note)
        writer.scheduler(config.scheduler, {"initialised": "defaults"})
        Tokenizer.save_byte_level(writer.tokenizer_directory)

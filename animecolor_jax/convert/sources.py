"""Which PyTorch file or directory each component comes from."""

from pathlib import Path
from typing import NamedTuple

from animecolor_jax.errors import InputError
from animecolor_jax.safetensors_io import parse_json_object

SUBFOLDERS = {
    "transformer": "denoiser",
    "referencenet": "lcg",
    "vae": "vae",
    "text_encoder": "text_encoder",
    "image_encoder": "image_encoder",
    "tokenizer": "tokenizer",
    "scheduler": "scheduler",
}
PARTS = tuple(SUBFOLDERS.values())
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_CLASSES = {
    "CogVideoXTransformer3DModel": "denoiser",
    "AutoencoderKLCogVideoX": "vae",
    "T5EncoderModel": "text_encoder",
    "RADIOModel": "image_encoder",
}


class Source(NamedTuple):
    """One component's source: a directory with its config.json, or a single file."""

    part: str
    path: Path
    config: dict
    config_file: str


def resolve(sources):
    """Reads the `--source` arguments: `part=PATH`, or a PATH whose sub-folders name the parts.

    A named source wins over a sub-folder.

    Returns:
        {part: Source}, parts being `PARTS`.

    Raises:
        InputError: a path that is missing, no component in it, an unknown part, or two candidates for
        one part.
    """
    named, found = {}, {}
    for text in sources:
        part, separator, path = str(text).partition("=")
        if separator and part in PARTS:
            named.setdefault(part, []).append(_existing(path))
        elif separator and not Path(text).exists():
            raise InputError(
                f"unknown part {part!r}",
                where=f"--source {text}",
                expected=f"one of {', '.join(PARTS)}, or a path",
                fix="for example --source denoiser=AnimeColor/transformer",
            )
        else:
            for part, path in _scan(_existing(text)):
                found.setdefault(part, []).append(path)
    candidates = {part: named.get(part) or found[part] for part in {**found, **named}}
    double = {part: paths for part, paths in candidates.items() if len(paths) > 1}
    if double:
        raise InputError(
            "; ".join(
                f"{part} has {len(paths)} candidates: {', '.join(map(str, paths))}"
                for part, paths in sorted(double.items())
            ),
            where="--source",
            expected="one source for each component",
            fix="name the one to take, e.g. "
            + " ".join(f"{part}={paths[0]}" for part, paths in double.items()),
        )
    return {part: _source(part, candidates[part][0]) for part in PARTS if part in candidates}


def _existing(path):
    path = Path(path)
    if not path.exists():
        raise InputError(
            "does not exist", where=path, expected="a checkpoint file or directory", fix="check the path"
        )
    return path


def _scan(path):
    """(part, path) of everything that a bare path holds."""
    if path.is_dir():
        parts = [(part, path / folder) for folder, part in SUBFOLDERS.items() if (path / folder).is_dir()]
        if parts:
            return parts
        config, _ = _read_config(path)
        names = [config.get("_class_name"), *config.get("architectures", [])]
        if part := next((_CLASSES[name] for name in names if name in _CLASSES), None):
            return [(part, path)]
    raise InputError(
        "cannot tell which component this is",
        where=path,
        expected=f"sub-folders {', '.join(SUBFOLDERS)}, or a config.json that names its class",
        fix=f"name it: --source denoiser={path}",
    )


def _source(part, path):
    if part == "tokenizer":
        return Source(part, path, {}, "")
    config, file = _read_config(path, "scheduler_config.json" if part == "scheduler" else "config.json")
    return Source(part, path, config, file)


def _read_config(path, name="config.json"):
    """The parsed config beside or inside `path`, and its file name.

    A single file takes FILE.json (its own name), else config.json of its folder.
    """
    if path.is_dir():
        candidates = [path / name]
    elif path.suffix in WEIGHT_SUFFIXES:
        candidates = [path.with_suffix(".json"), path.parent / name]
    else:
        candidates = [path]
    for file in candidates:
        if file.is_file():
            return parse_json_object(file.read_bytes(), file), str(file)
    raise InputError(
        f"has no {name}",
        where=path,
        expected=" or ".join(map(str, candidates)),
        fix="put the config.json that was published with these weights there",
    )

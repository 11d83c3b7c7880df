"""Networks in transformers format, from a directory on disk: nothing is downloaded, no code of theirs runs.

They run in the driver process, on the GPU where torch sees one. torch and transformers are imported on use.
"""

import json
from pathlib import Path

from animecolor_jax.errors import InputError


def read_config(model_dir, files=("config.json",)):
    """`config.json` of a model directory as a dict.

    Raises:
        InputError: the directory or one of `files` is missing, or the config is not JSON.
    """
    model_dir = Path(model_dir)
    for name in files:
        if not (model_dir / name).is_file():
            raise InputError(
                f"has no {name}" if model_dir.is_dir() else "is not a directory",
                where=model_dir,
                expected=f"a model directory in transformers format, with {', '.join(files)}",
                fix="download the whole model first, for instance with: hf download NAME --local-dir DIR",
            )
    try:
        return json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"is not JSON ({error})", where=model_dir / "config.json", expected="the model's config"
        ) from error


def import_torch():
    """The modules (torch, transformers), or an InputError that says how to get them."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise InputError(
            f"a network needs torch and transformers, and {error.name} is not installed",
            expected="torch and transformers 5",
            fix="pip install torch 'transformers>=5'",
        ) from error
    return torch, transformers


def load_model(model_class, model_dir, **kwargs):
    """The model with exactly the directory's weights, in evaluation mode on (model, device).

    Raises:
        InputError: the weights are missing, damaged, of other shapes, or not all there (transformers
            itself would go on with random ones).
    """
    torch, _ = import_torch()
    try:
        model, report = model_class.from_pretrained(
            model_dir, local_files_only=True, use_safetensors=True, output_loading_info=True, **kwargs
        )
    except Exception as error:  # whatever transformers, safetensors and torch raise on bad files
        raise InputError(
            f"cannot be loaded as {model_class.__name__}: {_first_line(error)}",
            where=model_dir,
            expected="a model directory in transformers format, weights in safetensors",
        ) from error
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise InputError(
            f"lacks {len(names)} weights: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}",
            where=model_dir,
            expected=f"every weight of {model_class.__name__}",
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), device


def load_processor(auto_class, model_dir, **kwargs):
    """The directory's processor, by `auto_class` (AutoImageProcessor, AutoProcessor).

    Raises:
        InputError: its files are missing or broken, or it needs a package that is not installed.
    """
    try:
        return auto_class.from_pretrained(model_dir, local_files_only=True, **kwargs)
    except Exception as error:
        fix = "install torchvision, or give a model whose images Pillow prepares (LLaVA, CLIP, OWLv2 ...)"
        raise InputError(
            f"its processor cannot be loaded: {_first_line(error)}",
            where=model_dir,
            expected="the preprocessing files that the model was published with",
            fix=fix if "torchvision" in str(error).lower() else "",
        ) from error


def _first_line(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

"""Aesthetic scores of clips, through a scorer that the user brings.

A scorer is any callable from frames [K, H, W, 3] uint8 RGB to a float, higher meaning better looking. The one
here is a CLIP image embedding under a small head, the form in which aesthetic predictors are published.
"""

from pathlib import Path
from typing import Protocol

import numpy as np

from animecolor_jax.errors import InputError
from data_pipeline.local_models import import_torch, load_model, load_processor, read_config

CLIP_TYPES = ("clip", "clip_vision_model")  # model_type of a config.json that holds a CLIP image tower


class AestheticScorer(Protocol):
    """What curation calls once a clip: frames [K, H, W, 3] uint8 RGB -> score, higher is better."""

    def __call__(self, frames: np.ndarray) -> float: ...


class ClipAestheticScorer:
    """CLIP's projected image embedding, L2-normalised, through a linear head; the mean over the frames.

    The model runs in this process, on the GPU where torch sees one, in float32.

    Args:
        clip_dir: a CLIP model in transformers format, with its `preprocessor_config.json`.
        head_file: the head, see `read_head`; its input width must be CLIP's `projection_dim`.
        batch_size: how many frames go through CLIP at once.

    Raises:
        InputError: a file is missing or is not of that form, or the head and CLIP do not fit together.
    Source: Schuhmann et al., LAION-5B (arXiv 2210.08402), the LAION-Aesthetics predictors V1 and V2.
    """

    def __init__(self, clip_dir, head_file, batch_size=16):
        self.head = read_head(head_file)
        config = _clip_config(clip_dir)
        projected, width = config["projection_dim"], self.head[0][0].shape[1]
        if width != projected:
            raise InputError(
                f"the head takes {width} features",
                where=head_file,
                expected=f"{projected}, the projection_dim of {clip_dir}",
                fix="give the CLIP model that the head was trained on",
            )
        torch, transformers = import_torch()
        self.batch_size = batch_size
        self._torch = torch
        self._processor = load_processor(transformers.AutoImageProcessor, clip_dir, backend="pil")
        vision = transformers.CLIPVisionConfig.from_pretrained(clip_dir)
        vision.projection_dim = projected  # a whole CLIP's config keeps it beside, not in, the tower's
        self._model, self._device = load_model(
            transformers.CLIPVisionModelWithProjection, clip_dir, config=vision, dtype=torch.float32
        )

    def __call__(self, frames):
        """Frames [K, H, W, 3] uint8 RGB, K >= 1 -> mean score (float)."""
        return float(np.mean(self.frame_scores(frames)))

    def frame_scores(self, frames):
        """Frames [K, H, W, 3] uint8 RGB -> scores [K] float32."""
        features = self.embed(frames)  # [K, D]
        for weight, bias in self.head:
            features = features @ weight.T + bias
        return features[:, 0]

    def embed(self, frames):
        """Frames [K, H, W, 3] uint8 RGB -> L2-normalised CLIP image embeddings [K, D] float32."""
        embeddings = []
        for start in range(0, len(frames), self.batch_size):
            batch = list(frames[start : start + self.batch_size])
            pixels = self._processor(batch, return_tensors="pt", input_data_format="channels_last")
            with self._torch.inference_mode():
                output = self._model(pixel_values=pixels["pixel_values"].to(self._device))
            embeddings.append(output.image_embeds.float().cpu().numpy())
        embeddings = np.concatenate(embeddings)
        return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def read_head(path):
    """The head's layers as [(weight [out, in], bias [out])], float32, in the order they are applied.

    A .safetensors or .npz file holds `weight` [1, D] (or [D]) and `bias` [1], or, for a head of several
    linear layers with nothing between them, `<n>.weight` and `<n>.bias` under any common prefix, applied by
    rising n. A .npy file holds the weight alone, [D] or [1, D]; its bias is 0.

    Raises:
        InputError: the file is missing, of another kind (pickles are not read), or its shapes do not chain to
            one score.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("does not exist", where=path, expected="a head: .safetensors, .npz or .npy")
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            arrays = load_file(path)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                arrays = dict(archive)
        elif path.suffix == ".npy":
            arrays = {"weight": np.load(path, allow_pickle=False)}
        else:
            raise InputError(
                f"is a {path.suffix or 'file without suffix'}, which is not read: a pickle can run code",
                where=path,
                expected=".safetensors, .npz or .npy",
                fix="convert it once: safetensors.torch.save_file(torch.load(FILE, weights_only=True), OUT)",
            )
    except InputError:
        raise
    except Exception as error:  # the two readers raise nearly everything on broken files
        raise InputError(
            f"cannot be read ({error})", where=path, expected="an undamaged file of plain float arrays"
        ) from error
    return _chain(arrays, path)


def _chain(arrays, path):
    """Named arrays -> the layers in order, every name used and every shape checked."""
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    names = sorted(name for name in arrays if name.rpartition(".")[2] == "weight")
    try:
        names.sort(key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
    except ValueError:
        names.sort()
    biases = {name: name.removesuffix("weight") + "bias" for name in names}
    unknown = sorted(set(arrays) - {*names, *biases.values()})
    if not names or unknown:
        raise InputError(
            f"holds {', '.join(sorted(arrays)) or 'no arrays'}",
            where=path,
            expected="weight and bias, or <n>.weight and <n>.bias",
        )
    layers = []
    for name in names:
        weight = np.atleast_2d(arrays[name])
        bias = arrays.get(biases[name], np.zeros(weight.shape[0]))
        fits = not layers or weight.shape[-1] == layers[-1][0].shape[0]
        if weight.ndim != 2 or bias.reshape(-1).shape != weight.shape[:1] or not fits:
            raise InputError(
                f"{name} has the shape {list(arrays[name].shape)} and its bias {list(bias.shape)}",
                where=path,
                expected=f"[out, {layers[-1][0].shape[0] if layers else 'in'}] and [out]",
            )
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise InputError(f"{name} or its bias is not finite", where=path, expected="finite numbers")
        layers.append((weight.astype(np.float32), bias.reshape(-1).astype(np.float32)))
    if layers[-1][0].shape[0] != 1:
        raise InputError(
            f"gives {layers[-1][0].shape[0]} numbers a frame", where=path, expected="one, the aesthetic score"
        )
    return layers


def _clip_config(clip_dir):
    """`config.json` of a CLIP model directory, with `projection_dim` filled in."""
    config = read_config(clip_dir, ("config.json", "preprocessor_config.json"))
    if config.get("model_type") not in CLIP_TYPES:
        raise InputError(
            f"has the model_type {config.get('model_type')!r}",
            where=Path(clip_dir) / "config.json",
            expected=" or ".join(CLIP_TYPES),
        )
    config.setdefault("projection_dim", 512)  # transformers' default, left out by older configs
    return config

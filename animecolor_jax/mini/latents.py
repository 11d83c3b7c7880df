"""What the frozen networks make of the clips, once for all steps of all stages, as arrays on disk."""

import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from animecolor_jax.encoding import Encoder
from animecolor_jax.mini.encoders import trim_caption
from animecolor_jax.replacing import replacing

BATCH = 16


def encode_split(folder, split, clips, weights, config, seed):
    """{name: [N, ...] float32 array} as `train.step.clip_losses` wants them, and "empty_text" [L, D].

    References are the first frame and others, drawn from `seed`; of held-out clips the first alone.

    Args:
        clips: Clips. weights: Weights with VAE, encoders and tokenizer. config: ClipsConfig.
    """
    folder = Path(folder) / split
    if not folder.exists():
        with replacing(folder) as partial:
            partial.mkdir()
            arrays = _encode(clips, weights, 1 if split != "train" else config.references, seed)
            for name, array in arrays.items():
                np.save(partial / f"{name}.npy", array)
            (partial / "names.json").write_text(json.dumps(sorted(arrays)))
    names = json.loads((folder / "names.json").read_text())
    return {name: np.load(folder / f"{name}.npy") for name in names}


def reference_frames(count, length, number, seed):
    """Which frames of clip `number` are its references, [count]: the first, and different others."""
    rng = np.random.default_rng([seed, number])
    return np.append(0, 1 + rng.choice(length - 1, count - 1, replace=False))


def _encode(clips, weights, references, seed):
    encoder = Encoder(weights, dtype="float32")
    length, rows = weights.config.denoiser.text_length, []
    for first in tqdm(range(0, len(clips.sketch), BATCH), desc="encode", disable=not sys.stderr.isatty()):
        # the last batch is filled up: one program serves all
        numbers = np.minimum(np.arange(first, first + BATCH), len(clips.sketch) - 1)
        frames, sketch = clips.color[numbers], clips.sketch[numbers]
        chosen = [reference_frames(references, frames.shape[1], int(number), seed) for number in numbers]
        images = np.stack([clip[which] for clip, which in zip(frames, chosen, strict=True)])
        captions = [trim_caption(clips.captions[number], length) for number in numbers]
        found = encoder.latents(frames, sketch, images) | encoder.text(captions) | encoder.image(images)
        rows.append({name: np.asarray(value, np.float32) for name, value in found.items()})
    count = len(clips.sketch)
    arrays = {name: np.concatenate([row[name] for row in rows])[:count] for name in rows[0]}
    return arrays | {"empty_text": np.asarray(encoder.text([""])["text"][0], np.float32)}

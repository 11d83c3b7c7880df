"""The rows of the paper's ablation: the same held-out clips, coloured with the weights of every stage.

Clips are coloured in batches from what the encoders made of them once; a clip comes out as `Pipeline` colours
it from the same noise.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from animecolor_jax import canvas, denoise, sampling
from animecolor_jax.evaluation import tables
from animecolor_jax.evaluation.protocol import Protocol
from animecolor_jax.evaluation.results import Result
from animecolor_jax.evaluation.score import Scorer
from animecolor_jax.evaluation.seams import measure_seams
from animecolor_jax.evaluation.statistics import summarize
from animecolor_jax.evaluation.swap import summarize_swaps, swap_result
from animecolor_jax.mini.stages import join_reference
from animecolor_jax.models.animecolor import AnimeColor
from animecolor_jax.pipeline import Pipeline
from animecolor_jax.replacing import replacing
from animecolor_jax.train.step import sample_latents
from animecolor_jax.weights import Weights
from data_pipeline.toon import draw_clip

LONG_CLIPS, LONG_WINDOWS = 4, 4  # whose seams are measured, and how many windows long they are
METRICS = ("psnr", "ssim", "sa", "flicker")
BATCH = 16
FULL = "full"
BASELINE = "Concat"


class Row(NamedTuple):
    """Which stage each network of a row comes from; None: the row does without it."""

    denoiser: str
    lcg: str | None
    hce: str | None


ROWS = {
    "(1) stage 1": Row("stage1_sketch", None, None),
    "(2) stages 1+2": Row("stage2_hce", None, "stage2_hce"),
    "(3) stages 1+3": Row("stage3_lcg", "stage3_lcg", None),
    "(4) stages 1-3": Row("stage3_lcg", "stage3_lcg", "stage2_hce"),
    FULL: Row("stage4_joint", "stage4_joint", "stage4_joint"),
    BASELINE: Row("concat", None, None),
}


def load_row(folder, row):
    """The `AnimeColor` of a row. folder: of all stages."""
    networks = {
        name: Weights(Path(folder) / stage / "weights").load(name)
        for name, stage in row._asdict().items() if stage is not None
    }  # fmt: skip
    return AnimeColor(**networks)


def color(model, vae, scheduler, arrays, config, numbers):
    """Colours clips from one reference each.

    Args:
        arrays: of `latents.encode_split`. config: ScoreConfig. numbers: of the clips; they decide the noise.

    Returns:
        [B, T, H, W, 3] uint8.
    """
    numbers = np.asarray(numbers)
    inputs = {name: arrays[name][numbers] for name in arrays if name != "empty_text"}
    shapes = (inputs[name].shape[1:] for name in ("video_mean", "reference_mean"))
    noise = _noise(jax.random.key(config.seed), numbers, *shapes)
    text = [inputs["text"]]
    if config.guidance > 1:
        text.insert(0, np.broadcast_to(arrays["empty_text"], inputs["text"].shape))
    if model.denoiser.config.in_channels == 3 * model.denoiser.config.out_channels:  # the baseline
        inputs["sketch"] = join_reference(inputs["sketch"], inputs["reference_mean"])
    sampler = sampling.make_sampler("ddim", config.steps, scheduler)
    latents = _sample(model, inputs, text, noise, sampler, config.guidance, vae.config.scaling_factor)
    frames = _decode(vae, latents)
    return np.asarray(frames)[:, : 4 * (latents.shape[1] - 1) + 1]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _noise(key, numbers, latents, reference):
    def of_clip(number):
        keys = jax.random.split(jax.random.fold_in(key, number))
        return jax.random.normal(keys[0], latents), jax.random.normal(keys[1], reference)

    return jax.vmap(of_clip)(numbers)


@jax.jit
def _sample(model, inputs, texts, noise, sampler, guidance, scaling_factor):
    latents, reference_noise = noise
    means, logvars = inputs["reference_mean"], inputs["reference_logvar"]
    reference = sample_latents(means, logvars, reference_noise, scaling_factor)
    conditions = model.conditions(reference, inputs.get("image_summary"), inputs.get("image_features"))
    sketch = inputs["sketch"] * scaling_factor
    rope = denoise.rotary_table(model.denoiser.config, latents.shape[1:4])
    latents = latents * sampler.init_noise_sigma

    def call(carry, i):
        latents, state = carry
        scaled = sampling.scale_input(sampler, latents, i)
        timestep = jnp.full(len(latents), jnp.asarray(sampler.timesteps)[i])
        v = [model(scaled, sketch, text, timestep, conditions, rope) for text in texts]
        v = sampling.guide(v[0], v[1], guidance) if len(v) == 2 else v[0]
        return sampling.step(sampler, v, latents, state, i), None

    carry = (latents, sampling.init_state(sampler, latents))
    (latents, _), _ = jax.lax.scan(call, carry, jnp.arange(sampler.num_calls))
    return latents


@jax.jit
def _decode(vae, latents):
    frames = vae.decode(latents / vae.config.scaling_factor)
    return jnp.round(jnp.clip(frames / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)


def color_all(path, model, vae, scheduler, arrays, config, deadline):
    """All clips of `arrays`, kept in the file `path`; [N, T, H, W, 3] uint8."""
    path = Path(path)
    if not path.exists():
        count, videos = len(arrays["text"]), []
        for first in range(0, count, BATCH):
            deadline.check()
            numbers = np.minimum(np.arange(first, first + BATCH), count - 1)
            videos.append(color(model, vae, scheduler, arrays, config, numbers))
        with replacing(path) as partial:
            np.save(partial, np.concatenate(videos)[:count])
    return np.load(path)


def score_rows(videos, clips, command):
    """`Result` of {row: [N, T, H, W, 3]} against the true clips."""
    size = clips.sketch.shape[2:]
    protocol = Protocol(f"mini-{size[1]}x{size[0]}")
    scorer = Scorer(protocol, METRICS, list(videos), {})
    for number in range(len(clips.sketch)):
        generated = {row: video[number] for row, video in videos.items()}
        color, sketch = np.asarray(clips.color[number]), np.asarray(clips.sketch[number])
        scorer.add(f"{number:05d}", color, generated, sketch)
    return Result(
        protocol=f"{protocol.name} ({protocol.describe()})", clips=len(scorer.scored),
        frames=sum(scorer.scored.values()), pixel_source="memory; line art given", metrics=METRICS,
        methods=scorer.result(), command=command, clip_frames=dict(scorer.scored),
    )  # fmt: skip


def score_swap(video, test, swap):
    """`SwapSummary` of clips that were coloured from the references of "swap"."""
    return summarize_swaps(
        {
            f"{number:05d}": swap_result(frames, swap.color[number], test.color[number])
            for number, frames in enumerate(video)
        }
    )


def score_seams(weights, clips, config, deadline):
    """`Summary` of `Seams.ratio` over long clips, coloured in windows; at 1 nobody sees where they meet.

    Args:
        weights: weights directory. clips: ClipsConfig. config: ScoreConfig.
    """
    pipeline, ratios = Pipeline.load(weights, dtype="float32"), {}
    best, length = pipeline.inference, LONG_WINDOWS * (clips.frames - 1) + 1
    starts = canvas.windows(canvas.padded_length(length), best.window, best.overlap)
    for number in range(LONG_CLIPS):
        deadline.check()
        seed = clips.test_seed + number
        clip = draw_clip(length, *best.size, seed, fps=clips.fps, config=clips.test_toon)
        video = pipeline(clip.line_art, clip.reference, key=jax.random.key(config.seed), progress=False)
        ratios[f"{number:05d}"] = measure_seams(video, starts, best.window, clip.color).ratio
    return summarize(ratios)


def write_scores(folder, result, swap, seams):
    """FOLDER/scores.json and FOLDER/table.md; returns what is in the first.

    Args:
        result: of `score_rows`. swap: of `score_swap`. seams: of `score_seams`.
    """
    rows = {
        name: {metric: summary.mean for metric, summary in summaries.items()}
        for name, summaries in result.summaries.items()
    }
    found = {
        "protocol": result.protocol, "clips": result.clips, "rows": rows,
        "swap": {**dataclasses.asdict(swap), "further": list(swap.further)},
        "seams": {"ratio": seams.mean, "clips": seams.clips},
    }  # fmt: skip
    text = f"{tables.markdown(result)}\nSwap test: {swap}\n"
    if seams.mean is not None:
        text += f"Seams of {seams.clips} long clips: {seams.mean:.2f} times the target's change\n"
    for name, content in (("scores.json", json.dumps(found, indent=1)), ("table.md", text)):
        with replacing(Path(folder) / name) as partial:
            partial.write_text(content, encoding="utf-8")
    return found

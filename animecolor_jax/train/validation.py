"""What is looked at while training: the loss of fixed (clip, timestep, noise) triples, and coloured clips."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from animecolor_jax import denoise
from animecolor_jax.loading import batch_sharding, rows_of_host, to_device, to_host
from animecolor_jax.pipeline import Pipeline
from animecolor_jax.train.step import Draws, sample_latents
from data_pipeline.dataset import evaluation_batches

GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, are spread evenly however many there are


class Validation:
    """Validation of one run: the same clips, timesteps and noise at every step, on any mesh."""

    def __init__(self, objective, config, clips, inputs, mesh):
        """
        Args:
            objective: step.Objective. config: TrainConfig.
            clips: `records.open_clips`. inputs: train.inputs.Inputs. mesh: of the run.

        Raises:
            InputError: the data have no clips in the split.
        """
        self.objective, self.config, self.mesh, self.inputs = objective, config.validation, mesh, inputs
        self.batch_size = config.data.batch_size // config.optimizer.accumulate  # what fits in training
        self._open = functools.partial(
            evaluation_batches, clips, self.batch_size, split=self.config.split,
            stride=config.data.view.strides[0], tokenize=inputs.tokenize,
            rows=rows_of_host(mesh, self.batch_size),
        )  # fmt: skip
        self._kept, self._losses = None, jax.jit(objective.losses)
        self._open(encoded=inputs.encoded).close()

    def loss(self, trained, frozen):
        """{"loss": mean over all triples, "standard_error", "losses": of each triple, always in one
        order}."""
        if self._kept is None:
            self._kept = [
                (self.inputs(batch), to_host(batch["valid"])) for batch in self._read(self.config.clips)
            ]
        losses, seen = [], 0
        for inputs, valid in self._kept:
            draws = (self._draw(inputs, seen, turn) for turn in range(self.config.timesteps))
            rows = [to_host(self._losses(trained, frozen, inputs, each)) for each in draws]
            losses.append(np.stack(rows, axis=1)[valid])
            seen += int(valid.sum())
        losses = np.concatenate(losses)[: self.config.clips].astype(np.float64)  # [clips, timesteps]
        spread = losses.std(ddof=1) if losses.size > 1 else 0.0
        return {
            "loss": float(losses.mean()),
            "standard_error": float(spread / math.sqrt(losses.size)),
            "losses": [float(loss) for loss in losses.ravel()],
        }

    def videos(self, trained, frozen):
        """Yields ({"sketch", "reference", "sample", "target": [T, H, W, 3] uint8}, fps) of the first
        clips."""
        parts, encoder = self.objective.parts, self.inputs.encoder
        model = parts.model(trained, frozen)
        pipeline = Pipeline(model, encoder.vae, None, None, None, self.objective.scheduler, self.mesh)
        made = 0
        latents_known = "latents" not in self.inputs.on_the_fly
        pixels = self._read(self.config.videos, encoded=None) if latents_known else None
        for batch in self._read(self.config.videos):
            seen = next(pixels) if latents_known else batch
            inputs = self.inputs(batch)
            draws = self._draw(inputs, made, 0)
            valid = int(to_host(batch["valid"]).sum())
            for row in range(min(valid, self.config.videos - made)):
                one = jax.tree.map(lambda x, row=row: x[row : row + 1], (inputs, draws))
                video, lines, reference, fps = (
                    to_host(seen[name][row]) for name in ("video", "sketch", "reference", "fps")
                )
                sample = self._color(pipeline, *one)[: len(video)]
                yield (
                    {
                        "sketch": np.repeat(lines[..., None], 3, axis=-1),
                        "reference": np.broadcast_to(reference[0], video.shape),
                        "sample": sample,
                        "target": video,
                    },
                    float(fps),
                )
                made += 1

    def _color(self, pipeline, inputs, draws):
        """The sampled clip, [T, H, W, 3] uint8, with guidance by the caption."""
        scale, dtype = self.objective.scaling_factor, pipeline.dtype
        reference = sample_latents(
            inputs["reference_mean"], inputs["reference_logvar"], draws.reference, scale
        ).astype(dtype)
        lines = (inputs["sketch"].astype(jnp.float32) * scale).astype(dtype)
        text = inputs["text"]
        if self.config.guidance > 1:
            text = jnp.concatenate([self._empty_text.astype(text.dtype), text])
        layout = denoise.Layout.of([0], lines.shape[1])
        with jax.set_mesh(self.mesh):
            conditions = denoise.make_conditions(
                pipeline.model, reference, inputs.get("image_summary"), inputs.get("image_features")
            )
            latents = pipeline.denoise(
                draws.noise, lines, text, conditions, layout,
                num_steps=self.config.sampler_steps, guidance_scale=self.config.guidance,
            )  # fmt: skip
            return pipeline.decode(layout.join(latents))

    @functools.cached_property
    def _empty_text(self):
        return self.inputs.empty_text()

    def _read(self, count, **encoded):
        """Yields batches on the devices until `count` clips have come."""
        batches, seen = self._open(**{"encoded": self.inputs.encoded, **encoded}), 0
        try:
            for batch in batches:
                batch = to_device(batch, batch_sharding(self.mesh), self.batch_size)
                yield batch
                seen += int(to_host(batch["valid"]).sum())
                if seen >= count:
                    return
        finally:
            batches.close()

    def _draw(self, inputs, first, turn):
        """`Draws` of the triples of clips `first`, `first` + 1, ...: each clip's timesteps cover the
        schedule,
        and where in their intervals they lie differs from clip to clip."""
        steps = len(self.objective.alphas_cumprod)
        shapes = inputs["video_mean"].shape[1:], inputs["reference_mean"].shape[1:]
        numbers = first + np.arange(self.batch_size)
        timesteps = (turn + numbers * GOLDEN % 1) / self.config.timesteps * steps
        return _draw(
            jax.random.fold_in(jax.random.key(self.config.seed), turn), numbers, timesteps.astype(np.int32),
            shapes=shapes, sharding=batch_sharding(self.mesh),
        )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("shapes", "sharding"))
def _draw(key, numbers, timesteps, *, shapes, sharding):
    def of_clip(number):
        keys = jax.random.split(jax.random.fold_in(key, number), 3)
        video, reference = shapes
        return [jax.random.normal(k, s) for k, s in zip(keys, (video, video, reference), strict=True)]

    noise = jax.lax.with_sharding_constraint(jax.vmap(of_clip)(numbers), sharding)
    return Draws(timesteps, *noise)

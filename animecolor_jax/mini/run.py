"""The whole recipe, part after part; every part is kept in the folder of the run and never done twice.

    OUT/recipe.json                      what was asked for
    OUT/clips, OUT/latents               arrays; may be deleted in the end
    OUT/autoencoder, encoders, STAGE     state.npz, metrics.jsonl; STAGE/weights
    OUT/base                             the weights that stage 1 started from
    OUT/rows, scores.json, table.md, curves.png, clips.png, clips.gif
    OUT/weights                          the result, in bfloat16
"""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from animecolor_jax.config import COMPONENTS, preset
from animecolor_jax.errors import InputError
from animecolor_jax.evaluation.curves import draw_curves
from animecolor_jax.mini import autoencoder, encoders, latents, rows, stages
from animecolor_jax.mini.base import inference, write_base
from animecolor_jax.mini.clips import draw_split
from animecolor_jax.mini.show import write_pictures
from animecolor_jax.replacing import replacing
from animecolor_jax.safetensors_io import Reader, Spec
from animecolor_jax.tokenizer import Tokenizer
from animecolor_jax.train.run_log import read_metrics
from animecolor_jax.weights import Weights, WeightsWriter

SHOWN = 4  # held-out clips in the pictures
SHOWN_FPS = 8  # slow enough to look at


class Recipe:
    """A run of a `MiniConfig` in a folder.

    Raises:
        InputError: the folder holds a run of another recipe.
    """

    def __init__(self, config, out, deadline):
        """
        Args:
            config: MiniConfig. out: folder. deadline: loop.Deadline.
        """
        self.config, self.out, self.deadline = config, Path(out), deadline
        self.model = preset(config.preset)
        self._pin()

    def _pin(self):
        path, wanted = self.out / "recipe.json", json.loads(json.dumps(self.config.as_dict()))
        if path.exists() and json.loads(path.read_text()) != wanted:
            raise InputError(
                "holds a run of another recipe", where=path, expected="the same config",
                fix="choose another --out, or delete that folder",
            )
        with replacing(path) as partial:
            partial.write_text(json.dumps(wanted, indent=1))

    def run(self, command=""):
        """Does what is not done yet.

        Returns:
            what `rows.write_scores` does, and "weights": path.

        Raises:
            OutOfTime: the deadline has passed; the same call goes on.
        """
        config, out, model = self.config, self.out, self.model
        size = model.vae.sample_height, model.vae.sample_width
        clips = {}
        for split in ("train", "validation", "test", "swap"):
            self.deadline.check()
            clips[split] = draw_split(out / "clips", config.clips, split, size)
        vae, scaling_factor = autoencoder.train_vae(
            out / "autoencoder", config.autoencoder, model.vae, clips["train"], clips["validation"],
            config.seed, self.deadline,
        )  # fmt: skip
        trained = encoders.train_encoders(
            out / "encoders", config.encoders, model, clips["train"], clips["validation"], self._tokenize,
            config.seed, self.deadline,
        )  # fmt: skip
        if not (out / "base").exists():
            write_base(out / "base", model, config, trained | {"vae": vae}, scaling_factor)
        if config.stages.concat and not (out / "base_concat").exists():
            wider = dataclasses.replace(model.denoiser, in_channels=3 * model.denoiser.out_channels)
            baseline = dataclasses.replace(model, denoiser=wider)
            write_base(out / "base_concat", baseline, config, trained | {"vae": vae}, scaling_factor)
        arrays = {}
        for split, found in clips.items():
            self.deadline.check()
            if split == "train":
                found = found.first(config.clips.encoded)
            arrays[split] = latents.encode_split(
                out / "latents", split, found, Weights(out / "base"), config.clips, config.seed
            )
        steps = dict(zip(stages.STAGES, config.stages.steps, strict=True))
        if config.stages.concat:
            steps[stages.CONCAT] = sum(config.stages.steps)
        for name, count in steps.items():
            start = out / ("base_concat" if name == stages.CONCAT else "base")
            stages.run_stage(
                out, start, name, config.stages, count, arrays["train"], arrays["validation"], config.seed,
                self.deadline,
            )  # fmt: skip
        bundle(out, config, model)
        result = self._score(clips, arrays, command)
        logs = {name: read_metrics(out / name) for name in ("autoencoder", "encoders", *steps)}
        draw_curves(logs, out / "curves.png")
        return {**result, "weights": str(out / "weights")}

    def _tokenize(self, texts):
        folder = self.out / "tokenizer"
        if not folder.exists():
            Tokenizer.save_byte_level(folder)
        length = self.model.denoiser.text_length
        return Tokenizer.load(folder)([encoders.trim_caption(text, length) for text in texts], length)

    def _score(self, clips, arrays, command):
        base, videos = Weights(self.out / "base"), {}
        vae, scheduler = base.load("vae"), base.config.scheduler
        for number, (name, row) in enumerate(rows.ROWS.items()):
            if row.denoiser == stages.CONCAT and not self.config.stages.concat:
                continue
            model = rows.load_row(self.out, row)
            videos[name] = rows.color_all(
                self.out / "rows" / f"row{number + 1}.npy", model, vae, scheduler, arrays["test"],
                self.config.score, self.deadline,
            )  # fmt: skip
        model = rows.load_row(self.out, rows.ROWS[rows.FULL])
        # the sketches of the test clips with the references of their twins
        swapped = rows.color_all(
            self.out / "rows" / "swap.npy", model, vae, scheduler, arrays["swap"], self.config.score,
            self.deadline,
        )  # fmt: skip
        shown = np.arange(min(SHOWN, len(clips["test"].sketch)))
        names = {name: name.partition(" ")[0] for name in videos}
        write_pictures(self.out, videos, clips["test"], shown, names, SHOWN_FPS)
        result = rows.score_rows(videos, clips["test"], command)
        swap = rows.score_swap(swapped, clips["test"], clips["swap"])
        seams = rows.score_seams(self.out / "weights", self.config.clips, self.config.score, self.deadline)
        return rows.write_scores(self.out, result, swap, seams)


def bundle(out, config, model_config):
    """OUT/weights: stage 4's weights in bfloat16, with how they are best called."""
    final = Weights(Path(out) / "stage4_joint" / "weights")
    notes = final.values["provenance"]
    if (Path(out) / "weights").exists():
        return
    with WeightsWriter(Path(out) / "weights") as writer:
        for name in COMPONENTS:
            with Reader(final.directory / f"{name}.safetensors") as reader:
                specs = {leaf: Spec(spec.shape, _narrow(spec.dtype)) for leaf, spec in reader.specs.items()}
                leaves = ((leaf, reader.read(leaf).astype(specs[leaf].dtype)) for leaf in specs)
                writer.component(name, getattr(final.config, name), specs, leaves, notes[name])
        writer.scheduler(final.config.scheduler, notes["scheduler"])
        writer.inference(inference(model_config, config))
        writer.copy_tokenizer(final)


def _narrow(dtype):
    return np.dtype(jnp.bfloat16) if np.issubdtype(dtype, np.floating) else dtype

"""A run's parameters -> a weights directory: what was trained from the run, all else from where it came."""

import jax
import numpy as np

from animecolor_jax import config as configs
from animecolor_jax.convert import lora
from animecolor_jax.convert.state_dict import sha256
from animecolor_jax.loading import to_host
from animecolor_jax.networks import abstract
from animecolor_jax.safetensors_io import Reader, Spec
from animecolor_jax.weights import WeightsWriter

ADAPTERS = "pytorch_lora_weights.safetensors"  # beside the denoiser, into which they are merged


def export_weights(out, sources, parts, config, step, trained):
    """Writes the weights directory `out`; every process of a run calls it, the first one writes.

    What was trained is float32; a network of which nothing was trained is the file it came from, linked where
    the file system can. Adapters are merged into their kernels, and also written by themselves in diffusers'
    format.

    Args:
        out: folder that does not exist yet.
        sources: train.sources.Sources. parts: train.parts.Parts. config: TrainConfig.
        step: updates made. trained: {name: array}, the moving average if there is one.

    Raises:
        InputError: `out` exists, or the weights that the run started from are no longer there.
    """
    if jax.process_count() > 1:
        trained = {name: to_host(leaf) for name, leaf in trained.items()}
    if jax.process_index():
        return
    with WeightsWriter(out) as writer:
        for name in configs.COMPONENTS:
            if getattr(sources.model_config, name) is None:
                continue
            prefix = f"{name}/"
            own = {key.removeprefix(prefix): leaf for key, leaf in trained.items() if key.startswith(prefix)}
            origin, copied = sources.origins.get(name, (name, False))
            note = sources.provenance(name)
            sources.weights(origin).require(origin)
            if not own and not copied:
                writer.link(name, sources.weights(name), note)
                continue
            made = {"stage": config.stage.name, "steps": step, "seed": config.seed}
            _write(writer, name, own, sources, parts, {"trained": made, "from": note} if own else note)
        writer.scheduler(sources.model_config.scheduler, sources.provenance("scheduler"))
        writer.copy_tokenizer(sources.base)


def _write(writer, name, own, sources, parts, note):
    """A component whose leaves `own` were trained; the others are read where they came from."""
    config, adapters = getattr(sources.model_config, name), lora.adapters(own)
    layers = {leaf.rpartition("/")[0] for leaf in adapters}
    changed = {leaf for leaf in own if leaf not in adapters} | {f"{layer}/kernel" for layer in layers}
    origin, _ = sources.origins[name]
    with Reader(sources.weights(origin).directory / f"{origin}.safetensors") as reader:

        def stored():
            for leaf in specs:
                if leaf in own:
                    value = to_host(own[leaf])
                else:
                    value = sources.adapt(name, leaf, reader.read(leaf))
                yield leaf, value.astype(specs[leaf].dtype)

        specs = {
            leaf: Spec(shape.shape, np.dtype(np.float32) if leaf in changed else reader.specs[leaf].dtype)
            for leaf, shape in abstract(name, config).items()
        }
        leaves = stored()
        if adapters:
            rank, alpha = parts.configs[name].lora_rank, parts.configs[name].lora_alpha
            adapters = {leaf: np.asarray(to_host(value)) for leaf, value in adapters.items()}
            lora.export_lora(writer.path(ADAPTERS), adapters, rank, alpha)
            leaves = lora.merge_leaves(leaves, adapters, rank, alpha)
        writer.component(name, config, specs, leaves, note)
    if "trained" in note:  # what a run that starts from these weights knows them by
        note["trained"]["sha256"] = sha256(writer.path(f"{name}.safetensors"))

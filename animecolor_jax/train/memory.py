"""What a training step takes of a device's memory, by estimate, before anything is compiled.

State (parameters, moments, moving average) is counted exactly, by its shapes and shardings. What the step
makes is counted in arrays as large as the tokens: those that the backward pass keeps, which depends on the
remat policy, and those that exist at one time within the blocks that it is working on.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from animecolor_jax import networks
from animecolor_jax.encoding import COMPONENTS
from animecolor_jax.errors import InputError
from animecolor_jax.flops import FRAMES_PER_LATENT, SPATIAL_COMPRESSION, tokens_of
from animecolor_jax.models import attention
from animecolor_jax.models.chunked_attention import QUERY_CHUNK
from animecolor_jax.platforms import GIB, platform
from animecolor_jax.sharding import AXES, bytes_on_device
from animecolor_jax.train import state
from animecolor_jax.train.optimizer import make_optimizer
from animecolor_jax.train.parts import Parts

# Arrays of a block in units of [tokens, width], (in float32, in the compute dtype). What a block by itself
# hands from forward to backward pass is counted in its trace; what there is of it at one time where both
# passes are one compiled program, and besides where weights are trained or not, is fitted to XLA's
# `memory_analysis`.
KEPT = (35, 12)
KEPT_WITHIN = (8, 12)
BESIDES = {True: (0, 20), False: (0, 12)}


def estimate(config, model_config, bucket_latents, mesh_sizes, reference_latents=None, on_the_fly=()):
    """Bytes that each device holds at the worst moment of a step, on devices like those of this process.

    Args:
        config: TrainConfig. model_config: AnimeColorConfig.
        bucket_latents: (T, H, W) of the clips' latents. mesh_sizes: {axis: size}, 1 where left out.
        reference_latents: (H, W) of the references' latents; by default the clips'.
        on_the_fly: what is encoded on the devices, some of "latents", "text" and "image".

    Returns:
        {"trained", "moments", "ema", "frozen", "gradients", "saved" (for the backward pass), "working"
        (blocks being computed), "bank", "inputs", "encoders", "total" (of all these): bytes}.
    """
    return _estimates(config, model_config, mesh_sizes, on_the_fly)(bucket_latents, reference_latents)


def _estimates(config, model_config, mesh_sizes, on_the_fly):
    """`estimate` as a function of the latents' shapes alone, the state counted once."""
    sizes = {axis: mesh_sizes.get(axis, 1) for axis in AXES}
    mesh = AbstractMesh(tuple(sizes.values()), AXES)
    parts = Parts(config, model_config)
    optimizer = make_optimizer(config.optimizer, config.steps, parts.trained)
    held = state.abstract(parts, optimizer, config, mesh)
    trained = bytes_on_device(held.trainable)
    state_sizes = {
        "trained": trained,
        "moments": bytes_on_device(held.opt_state),
        "ema": bytes_on_device(held.ema),
        "frozen": bytes_on_device(held.frozen),
        # of a part of the batch, and the sum of those of the parts before
        "gradients": trained * (1 if config.optimizer.accumulate == 1 else 2),
    }
    encoders = bytes_on_device([
        networks.described(name, getattr(model_config, name), config.compute.frozen_dtype, mesh)
        for name in (COMPONENTS[what] for what in on_the_fly)
    ])  # fmt: skip
    clips = -(-config.data.batch_size // (sizes["data"] * sizes["fsdp"]))
    at_a_time = -(-clips // config.optimizer.accumulate)

    def of(latents, reference=None):
        step = _Step(config, parts, sizes, at_a_time, latents, (1, *(reference or latents[1:])))
        made = {"saved": step.saved(), "working": step.working(), "bank": step.bank()}
        found = state_sizes | made | {"inputs": clips * step.inputs_of_clip(), "encoders": encoders}
        if "latents" in on_the_fly:  # encoding comes before the step, and its arrays are gone by then
            later = sum(made.values()) + found["gradients"]
            found["encoders"] += max(0, _encoding(model_config.vae, clips, latents) - later)
        return found | {"total": sum(found.values())}

    return of


def _encoding(vae, clips, latents):
    """The VAE's largest arrays, of full resolution: a convolution's input, norm (float32) and result."""
    frames = min(vae.encode_chunk + 1, 1 + FRAMES_PER_LATENT * (latents[0] - 1))
    pixels = math.prod(SPATIAL_COMPRESSION * side for side in latents[1:])
    return clips * frames * pixels * vae.block_out_channels[0] * 4 * 3


class _Step:
    """The arrays that a step makes on one device, of `clips` clips at a time."""

    def __init__(self, config, parts, sizes, clips, latents, reference):
        self.config, self.parts, self.clips = config, parts, clips
        self.images = images = config.data.view.num_references
        self.denoiser, self.hce = parts.configs["denoiser"], parts.configs.get("hce")
        self.latents, self.reference, self.tensor = latents, reference, sizes["tensor"]
        # on a CPU, XLA computes bfloat16 in float32
        on_cpu = platform() == "cpu"
        self.itemsize = 4 if on_cpu else jnp.dtype(config.compute.dtype).itemsize
        self.trained = {name.partition("/")[0] for name in parts.trained}
        self.text = self.denoiser.text_length
        self.all_video = tokens_of(self.denoiser, latents)
        self.video = -(-self.all_video // sizes["context"])
        self.per_image = tokens_of(self.denoiser, reference)
        self.bank_tokens = images * self.per_image if "lcg" in parts.configs else 0
        self.interval = self.hce.interval if self.hce else 1

    def arrays(self, tokens, width=None, count=(0, 1)):
        """Bytes of arrays [clips, tokens, width], so many in float32 and so many in the compute dtype."""
        return self.clips * tokens * (width or self.denoiser.dim) * (4 * count[0] + self.itemsize * count[1])

    def kept(self, tokens, policy, interval):
        """What a scan of blocks keeps for the backward pass, per block."""
        carry = self.arrays(tokens) / interval
        return {
            "block": carry,
            "attention": carry + self.arrays(tokens),
            "branches": carry + 3 * self.arrays(tokens),
            "products": carry + 10 * self.arrays(tokens),  # also queries, keys, values, and 4 of feed-forward
            "none": self.arrays(tokens, count=KEPT),
        }[policy]

    def saved(self):
        """Arrays of all blocks that the backward pass needs."""
        policy, depth = self.config.compute.remat, self.denoiser.num_layers
        total = depth * self.kept(self.text + self.video, policy, self.interval)
        if policy in ("none", "products"):
            total += depth * 2 * self.arrays(self.bank_tokens)
        if "lcg" in self.trained:
            total += depth * self.kept(self.images * (self.text + self.per_image), policy, 1)
        if self.hce:
            inner = self.hce.cross_num_heads * self.hce.cross_head_dim
            colors = self.images * self.hce.num_tokens
            total += self.hce.num_cross * self.arrays(colors, 2 * inner)
            if policy == "none":
                total += self.hce.num_cross * self.arrays(self.video, 4 * inner)
            if "hce" in self.trained:
                tokens = self.hce.num_tokens + 1 + self.per_image
                total += self.images * self.hce.depth * self.arrays(tokens, self.hce.dim, KEPT)
        return int(total)

    def working(self):
        """Arrays of the blocks that are computed again and differentiated together."""
        denoiser, policy = self.denoiser, self.config.compute.remat
        tokens, keys = self.text + self.video, self.text + self.all_video + self.bank_tokens
        total = self.arrays(tokens, count=BESIDES["denoiser" in self.trained])
        if policy != "none":
            total += self.interval * self.arrays(tokens, count=KEPT_WITHIN)
        total /= self.tensor**0.5  # only heads and feed-forward are shared out
        # all keys and values of the one block, and their gradients, in float32
        total += 2 * (self.arrays(keys) + self.clips * keys * denoiser.dim * 4) / self.tensor
        total += self.scores(tokens, keys)
        if self.hce:
            inner = self.hce.cross_num_heads * self.hce.cross_head_dim
            total += 4 * self.arrays(self.video, inner)
        leaves = [leaf for name, leaf in self.parts.shapes.items() if name.startswith("denoiser/blocks/")]
        weights = sum(leaf.size for leaf in leaves) / denoiser.num_layers / self.tensor
        # the blocks' weights gathered, and their gradients before they are shared out
        return int(total + self.interval * weights * (self.itemsize + 4 * ("denoiser" in self.trained)))

    def scores(self, queries, keys):
        """Attention's scores, in float32, that exist at one time: scores, weights and their gradients."""
        denoiser = self.denoiser
        backend = denoiser.attention
        if backend == "auto":
            shape = (1, queries, denoiser.num_heads, denoiser.head_dim)
            backend = attention.choose([jax.ShapeDtypeStruct(shape, denoiser.dtype)])
        heads = self.clips * denoiser.num_heads / self.tensor
        if backend == "chunked":
            queries = min(queries, QUERY_CHUNK)
            heads = 1 if platform() == "cpu" else heads
        return {"chunked": 4, "xla": 4}.get(backend, 0) * heads * queries * keys * 4

    def bank(self):
        """What the LCG hands to the denoiser, and its gradient."""
        return self.denoiser.num_layers * self.arrays(self.bank_tokens) * (1 + ("lcg" in self.trained))

    def inputs_of_clip(self):
        """Of one clip: stored moments, sketch and text, and noise, noisy latents, target in float32."""
        values = math.prod(self.latents) * self.denoiser.out_channels
        references = self.images * math.prod(self.reference) * self.denoiser.out_channels
        stored = 3 * values + 2 * references + self.text * self.denoiser.text_dim
        if self.hce:
            stored += self.images * (self.per_image * self.hce.feature_dim + self.hce.summary_dim)
        return 2 * stored + 4 * (6 * values + 3 * references)


def check(config, model_config, buckets, mesh_sizes, limit_bytes, on_the_fly=()):
    """Refuses a run whose steps do not fit.

    Args:
        buckets: `data_pipeline.shapes.Bucket`s of the data.
        limit_bytes: memory of a device; None, if unknown, refuses nothing.
    The others are those of `estimate`.

    Raises:
        InputError: a bucket takes more.
    """
    if limit_bytes is None:
        return
    of = _estimates(config, model_config, mesh_sizes, on_the_fly)
    found = {bucket: of(bucket.latents) for bucket in buckets}
    bucket = max(found, key=lambda bucket: found[bucket]["total"])
    total = found[bucket].pop("total")
    if total <= limit_bytes:
        return
    largest = sorted(found[bucket].items(), key=lambda item: -item[1])[:4]
    fixes = ["devices in the mesh (fsdp shards the state, context the tokens)"]
    if config.compute.remat != "block":
        fixes.append("--compute.remat block")
    clips = config.data.batch_size // math.prod(mesh_sizes.get(axis, 1) for axis in ("data", "fsdp"))
    if clips > config.optimizer.accumulate:
        fixes.append(f"--optimizer.accumulate {clips}")
    raise InputError(
        f"a step of {config.data.batch_size} clips takes an estimated {total / GIB:.1f} GiB of each device: "
        + ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest),
        where=f"bucket {bucket}",
        expected=f"at most the device's {limit_bytes / GIB:.1f} GiB",
        fix=f"one of: more {'; '.join(fixes)}; smaller buckets or batch",
    )

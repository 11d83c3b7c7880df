"""How many floating-point operations the networks and a training step take, and how many a device can do.

Counted are matrix products, convolutions (padding included) and attention's two products, a multiply-add as
2; norms, activations, softmax and the optimiser are not. Every product has up to two gradients, each as
costly as the product itself; `Gradients` says which are needed. What a program computes again in its backward
pass (remat, or scores inside of attention) is counted once, as is usual for the model FLOPs utilisation (MFU;
PaLM, arXiv:2204.02311, appendix B).

Plain Python: nothing here runs on a device. Shapes are (frames, height, width).
"""

import re
from typing import NamedTuple

from animecolor_jax.config import RadioConfig
from animecolor_jax.models.vae import compresses_time, decode_slices, encode_slices
from animecolor_jax.params import first_match
from data_pipeline.shapes import FRAMES_PER_LATENT, SPATIAL_COMPRESSION

# Dense bfloat16 peak of one JAX device by `device_kind`, FLOP/s; the first full match wins. Of TPU v2, v3 and
# v7 a device is one of a chip's two cores. Source: the makers' data sheets (NVIDIA's halved where they assume
# sparsity); the TPUs' names are those of JAX's own jax/_src/pallas/mosaic/tpu_info.py.
PEAK_FLOPS = (
    (r"TPU v2", 23e12),
    (r"TPU v3", 61.5e12),
    (r"TPU v4 lite", 137e12),
    (r"TPU v4", 275e12),
    (r"TPU v5 lite|TPU v5e", 197e12),
    (r"TPU v5|TPU v5p", 459e12),
    (r"TPU v6 lite|TPU v6e", 918e12),
    (r"TPU7x?", 1153.5e12),
    (r"NVIDIA A100.*", 312e12),
    (r"NVIDIA A10", 125e12),
    (r"NVIDIA A30", 165e12),
    (r"NVIDIA A40", 149.7e12),
    (r"NVIDIA L4", 121e12),
    (r"NVIDIA L40S", 362e12),
    (r"NVIDIA H100 PCIe", 756e12),
    (r"NVIDIA H(100|200) NVL", 835.5e12),
    (r"NVIDIA (H100|H200|H800|GH200)( .*)?", 989.5e12),
    (r"NVIDIA B200( .*)?", 2250e12),
    (r"NVIDIA GB200( .*)?", 2500e12),
)


def peak_flops(device_kind, dtype):
    """FLOP/s that a device can do, or None where there is no meaningful number.

    None for CPUs, unknown devices and float32: how fast float32 products are depends on how they are made
    (TF32 or not on NVIDIA, one to six bfloat16 passes on TPU).

    Args:
        device_kind: as `jax.devices()[0].device_kind`. dtype: of the compute, such as "bfloat16".
    """
    if str(dtype) not in ("bfloat16", "float16"):
        return None
    return next((peak for pattern, peak in PEAK_FLOPS if re.fullmatch(pattern, device_kind)), None)


class Gradients(NamedTuple):
    """Which gradients the backward pass needs of a network; none at all in a forward pass.

    Attributes:
        activations: of what passes through the network.
        weights: of its own parameters.
        keys: of keys and values that come from another network (the bank's, the colour tokens').
        adapters: of its low-rank adapters.
    """

    activations: bool = False
    weights: bool = False
    keys: bool = False
    adapters: bool = False


FORWARD = Gradients()


def dense(tokens, in_dim, out_dim, activations=False, weights=False):
    """[tokens, in_dim] x [in_dim, out_dim]; the flags add the products that make the gradients."""
    return 2 * tokens * in_dim * out_dim * (1 + activations + weights)


def attention(queries, keys, dim, left=False, right=False):
    """Scores and values of all heads, `dim` channels together.

    Args:
        left: whether gradients of queries and attention weights are needed. right: of keys and values.
    """
    return 2 * dense(queries, dim, keys, left, right)


def tokens_of(config, latent_shape):
    """Video tokens of latents (T, H, W)."""
    frames, height, width = latent_shape
    return frames * (height // config.patch_size) * (width // config.patch_size)


def block(config, tokens, bank_tokens=0, gradients=FORWARD):
    """One transformer block of one clip; `tokens` are text and video tokens."""
    dim, (activations, weights, keys, adapters) = config.dim, gradients
    modulation = 2 * dense(1, config.time_embed_dim, 6 * dim, weights, weights)
    linear = 4 * dense(tokens, dim, dim, activations, weights) + 2 * dense(
        tokens, dim, 4 * dim, activations, weights
    )
    if config.lora_rank:
        down = dense(tokens, dim, config.lora_rank, activations, adapters)
        linear += 4 * (down + dense(tokens, config.lora_rank, dim, activations or adapters, adapters))
    # what reaches the weights of q, k and v passes through the products of attention
    inner = activations or weights or adapters
    joint = attention(tokens, tokens, dim, inner, inner)
    return modulation + linear + joint + attention(tokens, bank_tokens, dim, inner or keys, keys)


def transformer(
    config, latent_shape, text_tokens=None, bank_tokens=0, *, gradients=FORWARD, head=True, forward_blocks=0
):
    """Denoiser or LCG, one clip.

    Args:
        latent_shape: (T, H, W) of the latents. text_tokens: by default `config.text_length`.
        bank_tokens: reference tokens whose keys and values every block is given (see `project_bank`).
        gradients: what the backward pass needs.
        head: whether v is predicted; the LCG has no use for it.
        forward_blocks: first blocks through which no gradient passes.
    """
    video, text = tokens_of(config, latent_shape), text_tokens or config.text_length
    dim, time, patch = config.dim, config.time_embed_dim, config.patch_size**2
    activations, weights = gradients.activations, gradients.weights
    total = dense(video, patch * config.in_channels, dim, False, weights)
    total += dense(text, config.text_dim, dim, False, weights)
    total += dense(1, dim, time, False, weights) + dense(1, time, time, weights, weights)
    size = (config, text + video, bank_tokens)
    total += (config.num_layers - forward_blocks) * block(*size, gradients) + forward_blocks * block(*size)
    if head:
        total += dense(1, time, 2 * dim, weights, weights)
        total += dense(video, dim, patch * config.out_channels, activations, weights)
    return total


def project_bank(config, bank_tokens, gradients=FORWARD):
    """The denoiser's keys and values of the bank, all blocks; `activations` is the gradient of the bank."""
    total = 2 * dense(bank_tokens, config.dim, config.dim, gradients.activations, gradients.weights)
    if config.lora_rank:
        rank, (activations, _, _, adapters) = config.lora_rank, gradients
        total += 2 * dense(bank_tokens, config.dim, rank, activations, adapters)
        total += 2 * dense(bank_tokens, rank, config.dim, activations or adapters, adapters)
    return config.num_layers * total


def lcg(config, reference_shape, references=1, gradients=FORWARD):
    """`Transformer.write_bank` of every reference, (H, W) in latents, beside `text_length` zero text tokens.

    The last block is counted whole, as it is run, though only its first norm is used.
    """
    return references * transformer(config, (1, *reference_shape), gradients=gradients, head=False)


def hce(config, patches, references=1, gradients=FORWARD):
    """Summary and features -> colour tokens -> keys and values of all cross-attentions, one clip.

    Args:
        patches: features of each reference.
    """
    weights, dim, inner = gradients.weights, config.dim, config.num_heads * config.head_dim
    total = dense(1, config.summary_dim, dim, False, weights)
    total += dense(1, dim, config.feature_dim, weights, weights)
    # of all that enters the next layer, only the summary has a gradient
    total += dense(1, config.feature_dim, dim, weights, weights)
    total += dense(patches, config.feature_dim, dim, False, weights)
    total += 2 * dense(1 + patches, dim, dim, weights, weights)
    tokens = config.num_tokens + 1 + patches
    layer = dense(tokens, dim, inner, weights, weights) + dense(2 * tokens, dim, 2 * inner, weights, weights)
    layer += attention(tokens, 2 * tokens, inner, weights, weights)
    layer += dense(tokens, inner, dim, weights, weights)
    layer += 2 * dense(tokens, dim, config.ff_mult * dim, weights, weights)
    total += config.depth * layer + dense(config.num_tokens, dim, config.output_dim, weights, weights)
    cross = config.cross_num_heads * config.cross_head_dim
    total += config.num_cross * dense(config.num_tokens, config.output_dim, 2 * cross, weights, weights)
    return references * total


def cross_attention(config, video_tokens, color_tokens, gradients=FORWARD):
    """One cross-attention of HCE in the denoiser, its keys and values given."""
    activations, weights, keys, _ = gradients
    inner = config.cross_num_heads * config.cross_head_dim
    total = dense(video_tokens, config.model_dim, inner, activations, weights)
    total += attention(video_tokens, color_tokens, inner, activations or weights or keys, keys)
    return total + dense(video_tokens, inner, config.model_dim, activations or weights or keys, weights)


def vae_encode(config, video_shape):
    """VAE, a video (T, H, W) of pixels, chunk by chunk as `VAE.encode` divides it."""
    chunks = [part.stop - part.start for part in encode_slices(video_shape[0], config)]
    return sum(vae_encode_chunk(config, (frames, *video_shape[1:])) for frames in chunks)


def vae_encode_chunk(config, video_shape):
    """One chunk of `vae_encode`, (T, H, W) pixels."""
    (frames, height, width), widths = video_shape, config.block_out_channels

    def level(positions, in_dim, out_dim, depth):
        total = 0
        for _ in range(depth):
            shortcut = in_dim if in_dim != out_dim else 0
            total += dense(positions, 27 * (in_dim + out_dim) + shortcut, out_dim)
            in_dim = out_dim
        return total

    positions = frames * height * width
    total = dense(positions, 27 * config.in_channels, widths[0])
    for index, out_dim in enumerate(widths):
        total += level(positions, widths[max(index - 1, 0)], out_dim, config.layers_per_block)
        if index < len(widths) - 1:
            frames = (frames + 1) // 2 if compresses_time(index, config) else frames
            height, width = height // 2, width // 2
            positions = frames * height * width
            total += dense(positions, 9 * out_dim, out_dim)
    total += level(positions, widths[-1], widths[-1], 2)
    return total + dense(positions, 27 * widths[-1], 2 * config.latent_channels)


def vae_decode_chunk(config, latent_shape):
    """VAE, one chunk of latents (T, H, W) as `decode_slices` divides them."""
    (frames, height, width), widths = latent_shape, config.block_out_channels[::-1]
    latents, channels = frames * height * width, config.latent_channels

    def norm(dim):  # two convolutions of the latents
        return 2 * dense(latents, channels, dim)

    def level(positions, in_dim, out_dim, depth):
        total = 0
        for _ in range(depth):
            shortcut = in_dim if in_dim != out_dim else 0
            total += dense(positions, 27 * (in_dim + out_dim) + shortcut, out_dim)
            total += norm(in_dim) + norm(out_dim)
            in_dim = out_dim
        return total

    total = dense(latents, 27 * channels, widths[0]) + level(latents, widths[0], widths[0], 2)
    positions = latents
    for index, out_dim in enumerate(widths):
        total += level(positions, widths[max(index - 1, 0)], out_dim, config.layers_per_block + 1)
        if index < len(widths) - 1:
            height, width = 2 * height, 2 * width
            total += dense(frames * height * width, 9 * out_dim, out_dim)
            frames = 2 * frames - frames % 2 if compresses_time(index, config) else frames
            positions = frames * height * width
    return total + norm(widths[-1]) + dense(positions, 27 * widths[-1], config.out_channels)


def t5(config, tokens):
    """Text encoder, one caption."""
    inner = config.num_heads * config.d_kv
    layer = 4 * dense(tokens, config.d_model, inner) + 3 * dense(tokens, config.d_model, config.d_ff)
    return config.num_layers * (layer + attention(tokens, tokens, inner))


def radio(config, size):
    """Image encoder, one image (H, W) in pixels."""
    dim, patches = config.embed_dim, (size[0] // config.patch_size) * (size[1] // config.patch_size)
    tokens = config.num_prefix_tokens + patches
    layer = 4 * dense(tokens, dim, dim) + 2 * dense(tokens, dim, round(dim * config.mlp_ratio))
    layer += attention(tokens, tokens, dim)
    return dense(patches, 3 * config.patch_size**2, dim) + config.depth * layer


def image_patches(model_config, reference_shape):
    """Features that the image encoder makes of a reference whose latents are (H, W)."""
    compression = model_config.vae.spatial_compression if model_config.vae else SPATIAL_COMPRESSION
    patch = (model_config.image_encoder or RadioConfig()).patch_size
    height, width = (compression * side // patch for side in reference_shape)
    return height * width


def conditions(model_config, reference_shape):
    """What is made of one reference, (H, W) in latents, once per clip."""
    denoiser, bank = model_config.denoiser, tokens_of(model_config.denoiser, (1, *reference_shape))
    total = lcg(model_config.lcg, reference_shape) + project_bank(denoiser, bank)
    return total + hce(model_config.hce, image_patches(model_config, reference_shape))


def denoising_step(model_config, latent_shape, references=1):
    """One denoising step of AnimeColor with text guidance, one clip."""
    denoiser, extractor = model_config.denoiser, model_config.hce
    bank, colors = references * tokens_of(denoiser, (1, *latent_shape[1:])), references * extractor.num_tokens
    crossed = cross_attention(extractor, tokens_of(denoiser, latent_shape), colors)
    return 2 * (transformer(denoiser, latent_shape, None, bank) + extractor.num_cross * crossed)


def vae_decode(config, latent_shape):
    """VAE, latents (T, H, W), chunk by chunk as the pipeline decodes them."""
    chunks = [part.stop - part.start for part in decode_slices(latent_shape[0], config)]
    return sum(vae_decode_chunk(config, (frames, *latent_shape[1:])) for frames in chunks)


# names that stand for a network where a stage's rules are asked whether it is trained
STANDS_FOR = {
    "denoiser": ("denoiser/blocks/attn/q/kernel",),
    "lcg": ("lcg/blocks/attn/q/kernel",),
    "hce": ("hce/qformer/proj_out", "hce/cross_attn/q/kernel"),
}


def trained_networks(stage):
    """Names of the networks that a stage trains, a set; one of which it trains a part counts whole."""
    where = "stage.trained"
    return {
        name
        for name in stage.networks
        if any(first_match(stage.trained, parameter, where) for parameter in STANDS_FOR[name])
    }


def train_step(
    stage, model_config, latent_shape, batch_size, references=1, reference_latent_shape=None, on_the_fly=(),
    trained=None,
):  # fmt: skip
    """Model FLOPs of one update: everything that runs forward, and the gradients that the trained parts need.

    Backward, a product of activations and weights costs once more for each of them that needs a gradient;
    attention's two products cost four. Where only HCE is trained, no gradient passes the first block. Where
    only adapters are (`model_config.denoiser.lora_rank`), the frozen weights have none. The first block is
    otherwise counted like the rest.

    Args:
        stage: `train.config.StageConfig`. model_config: `AnimeColorConfig`.
        latent_shape: (T, H, W) of the clips' latents. batch_size: clips of an update.
        references: reference images of each clip. reference_latent_shape: (H, W); by default the clips'.
        on_the_fly: what is encoded within the step, some of "latents", "text" and "image".
        trained: names of the trained parameters, where these are not simply what the stage says.
    """
    denoiser, extractor = model_config.denoiser, model_config.hce
    reference_shape = tuple(reference_latent_shape or latent_shape[1:])
    used = stage.networks
    if trained is None:
        trained = trained_networks(stage)
    else:
        trained = {name.partition("/")[0] for name in trained if "/lora_" not in name}
    adapters = denoiser.lora_rank > 0
    own, lcg_trained, hce_trained = (name in trained for name in ("denoiser", "lcg", "hce"))
    own = own and not adapters
    # the gradient enters the denoiser's first block, or first comes in between that and the second
    early, any_trained = own or adapters or lcg_trained, adapters or bool(trained)
    passing = Gradients(any_trained, own, lcg_trained or own or adapters, adapters)

    bank_tokens = 0
    total = 0
    if "lcg" in used:
        bank_tokens = references * tokens_of(denoiser, (1, *reference_shape))
        total += lcg(model_config.lcg, reference_shape, references, Gradients(lcg_trained, lcg_trained))
        total += project_bank(denoiser, bank_tokens, passing._replace(activations=lcg_trained))
    forward_blocks = 0 if early or not any_trained else 1
    total += transformer(
        denoiser, latent_shape, None, bank_tokens, gradients=passing, forward_blocks=forward_blocks
    )
    if "hce" in used:
        patches = image_patches(model_config, reference_shape)
        total += hce(extractor, patches, references, Gradients(weights=hce_trained))
        size = (extractor, tokens_of(denoiser, latent_shape), references * extractor.num_tokens)
        crossing = Gradients(any_trained, hce_trained, hce_trained)
        total += (extractor.num_cross - 1) * cross_attention(*size, crossing)
        total += cross_attention(*size, crossing._replace(activations=early))
    parts = encoders(model_config, latent_shape, references, reference_shape)
    return batch_size * (total + sum(parts[part] for part in on_the_fly))


def encoders(model_config, latent_shape, references=1, reference_latent_shape=None):
    """What encoding one clip takes: {"latents" (clip, sketch and references), "text", "image" (references)}.

    Networks that the config lacks are left out. Shapes are those of `train_step`.
    """
    reference_shape = reference_latent_shape or latent_shape[1:]
    frames, height, width = latent_shape
    pixels = [SPATIAL_COMPRESSION * side for side in (height, width)]
    reference = [SPATIAL_COMPRESSION * side for side in reference_shape]
    found = {}
    if model_config.vae is not None:
        clip = vae_encode(model_config.vae, (1 + FRAMES_PER_LATENT * (frames - 1), *pixels))
        found["latents"] = 2 * clip + references * vae_encode(model_config.vae, (1, *reference))
    if model_config.text_encoder is not None:
        found["text"] = t5(model_config.text_encoder, model_config.denoiser.text_length)
    if model_config.image_encoder is not None:
        found["image"] = references * radio(model_config.image_encoder, reference)
    return found

"""Training of the small image and text encoder, from drawn frames and their captions alone.

Together, as CLIP (arXiv:2103.00020): of a batch, the frame that belongs to a caption is to be found, and the
caption that belongs to a frame. Captions do not speak of colours, which are all that the image encoder is
there for, so its patches also say the colours of their quarters, and its summary the histogram of the image.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange, reduce

from animecolor_jax import networks, params
from animecolor_jax.mini.loop import Task, train
from animecolor_jax.tokenizer import NUM_RESERVED
from animecolor_jax.train.optimizer import learning_rate_schedule, make_optimizer

SHARED_DIM = 64  # in which frames and captions are compared
LEVELS = 4  # of each of red, green and blue, in a histogram
NAMES = ("image_encoder", "text_encoder")


def trim_caption(caption, text_length):
    """As much of a caption as a byte-level tokenizer has room for, cut between words."""
    room = text_length - 1  # the last id says that the text ends
    cut = caption.encode()[:room].decode(errors="ignore")
    return caption if cut == caption else cut.rpartition(" ")[0]


def initial_parameters(model_config, seed):
    """{"NETWORK/NAME" and "heads/NAME": float32 array}."""
    leaves = {
        f"{name}/{leaf}": jnp.asarray(value)
        for number, name in enumerate(NAMES)
        for leaf, value in networks.initial_leaves(name, getattr(model_config, name), seed + number)
    }
    image, text = (getattr(model_config, name) for name in NAMES)
    summary = image.num_summary_tokens * image.embed_dim
    shapes = {
        "image": (summary, SHARED_DIM), "text": (text.d_model, SHARED_DIM),
        "patch": (image.embed_dim, 4 * 3), "histogram": (summary, LEVELS**3),
    }  # fmt: skip
    rng = np.random.default_rng([seed, 2])
    for name, shape in shapes.items():
        leaves[f"heads/{name}/kernel"] = jnp.asarray(rng.normal(0, shape[0] ** -0.5, shape), jnp.float32)
    return leaves | {"heads/temperature": jnp.float32(np.log(10.0))}


def part(leaves, name):
    """Those of a network, by their own names."""
    return {leaf.partition("/")[2]: value for leaf, value in leaves.items() if leaf.startswith(f"{name}/")}


def losses(leaves, model_config, pixels, ids):
    """Contrastive loss, and error of the colours.

    Args:
        pixels: [B, H, W, 3] in [0, 1]. ids: [B, L] int32.
    """
    image, text = (
        params.build(networks.creator(name, getattr(model_config, name)), part(leaves, name), what=name)
        for name in NAMES
    )
    summary, features = image(pixels)
    heads = part(leaves, "heads")
    seen = (ids >= NUM_RESERVED).astype(jnp.float32)[..., None]
    words = (text(ids) * seen).sum(1) / jnp.maximum(seen.sum(1), 1)
    pair = [summary @ heads["image/kernel"], words @ heads["text/kernel"]]
    frames, captions = (x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6) for x in pair)
    scores = jnp.exp(jnp.minimum(heads["temperature"], jnp.log(100.0))) * frames @ captions.T
    own = jnp.arange(len(scores))
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    contrast = (cross_entropy(scores, own).mean() + cross_entropy(scores.T, own).mean()) / 2
    half = model_config.image_encoder.patch_size // 2
    quarters = reduce(pixels, "b (h q) (w r) c -> b h w c", "mean", q=half, r=half)
    quarters = rearrange(quarters, "b (h q) (w r) c -> b (h w) (q r c)", q=2, r=2)
    colors = jnp.abs(features @ heads["patch/kernel"] + 0.5 - quarters).mean()
    likelihood = jax.nn.log_softmax(summary @ heads["histogram/kernel"])
    return contrast, colors - 0.1 * (histogram(pixels) * likelihood).sum(-1).mean()


def histogram(pixels):
    """[B, H, W, 3] in [0, 1] -> share of the pixels in each cell of the colour cube, [B, LEVELS ** 3]."""
    levels = jnp.clip((pixels * LEVELS).astype(jnp.int32), 0, LEVELS - 1)
    cells = (levels * jnp.array([LEVELS**2, LEVELS, 1])).sum(-1).reshape(len(pixels), -1)
    return jax.vmap(lambda x: jnp.bincount(x, length=LEVELS**3))(cells) / cells.shape[1]


def make_task(config, model_config, clips, held_out, tokenize, seed):
    """`loop.Task` of both encoders; its state is (parameters, optimiser state).

    Args:
        config: EncodersConfig. model_config: AnimeColorConfig. clips, held_out: Clips.
        tokenize: texts -> ids [B, L].
    """
    leaves = initial_parameters(model_config, seed)
    buffers = re.compile(r"image_encoder/(input_conditioner/.*|summary_indices)")
    fixed = {name: leaf for name, leaf in leaves.items() if buffers.fullmatch(name)}
    leaves = {name: leaf for name, leaf in leaves.items() if name not in fixed}
    optimizer = make_optimizer(config.optimizer, config.steps, leaves)
    ids = {kind: tokenize(which.captions) for kind, which in (("train", clips), ("held_out", held_out))}

    def loss_of(leaves, pixels, ids):
        pixels = jnp.asarray(pixels, jnp.float32) / 255
        contrast, colors = losses(leaves | fixed, model_config, pixels, ids)
        return contrast + config.color_weight * colors, (contrast, colors)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch, number):
        del number  # nothing is drawn
        leaves, opt_state = state
        (loss, (contrast, colors)), gradient = jax.value_and_grad(loss_of, has_aux=True)(leaves, *batch)
        updates, opt_state = optimizer.update(gradient, opt_state, leaves)
        values = {"loss": loss, "contrast": contrast, "colors": colors}
        values["grad_norm"] = optax.tree.norm(gradient)
        return (optax.apply_updates(leaves, updates), opt_state), values

    def batch(number):
        rng = np.random.default_rng([seed, number])
        count, length = clips.color.shape[:2]
        chosen = np.sort(rng.choice(count, min(config.batch_size, count), replace=False))
        frames = rng.integers(length, size=len(chosen))
        return clips.color[chosen, frames], ids["train"][chosen]

    evaluate = jax.jit(loss_of)

    def validate(state):
        loss, (contrast, colors) = evaluate(state[0], held_out.color[:, 0], ids["held_out"])
        return {"loss": float(loss), "contrast": float(contrast), "colors": float(colors)}

    task = Task(
        (leaves, optimizer.init(leaves)), step, batch, config.steps, config.batch_size,
        learning_rate_schedule(config.optimizer, config.steps), validate,
    )  # fmt: skip
    return task, fixed


def train_encoders(folder, config, model_config, clips, held_out, tokenize, seed, deadline):
    """Trains them, or goes on; returns {network: {name: array}}."""
    task, fixed = make_task(config, model_config, clips, held_out, tokenize, seed)
    leaves = train(folder, task, deadline)[0] | fixed
    return {name: part(leaves, name) for name in NAMES}

"""Gradients to updates: clipping, AdamW or CAME, weight decay by name, learning rate; the moving average.

Parameters, gradients and updates are flat dicts {COMPONENT/NAME: float32 array}, blocks stacked [depth, ...].
Everything is plain arithmetic on arrays, and so runs under `jax.jit` on arrays sharded in any way.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from animecolor_jax.errors import InputError
from animecolor_jax.networks import STACKED
from animecolor_jax.params import first_match


def make_optimizer(config, total_steps, names):
    """Clipping to a global norm, then AdamW or CAME, decoupled weight decay, and the learning rate.

    PyTorch's clipping divides by the norm plus 1e-6 and this one by the norm, so what is clipped is larger
    here, by a factor of at most 1 + 1e-6 / clip_norm. AdamW is PyTorch's.

    Args:
        config: `OptimizerConfig`.
        total_steps: updates of the whole run, at the last of which a cosine ends.
        names: of the trained parameters. A full tree needs `optax.transforms.selective_transform` around this
            transformation, which hides the frozen ones from norm and moments.

    Returns:
        optax.GradientTransformation; its `update` needs the parameters. Its state is arrays in flat dicts by
        parameter name, and scalars.

    Raises:
        InputError: a name that no rule of `config.decayed` matches, or a cosine shorter than its warm-up.
    """
    decayed = {name: first_match(config.decayed, name, "optimizer.decayed") for name in names}
    if config.name == "came":
        direction = scale_by_came(config.beta1, config.beta2, config.beta3, config.came_eps, config.came_clip)
    else:
        direction = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        direction,
        optax.add_decayed_weights(
            config.weight_decay,
            mask=lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: decayed[path[-1].key], tree),
        ),
        optax.scale_by_learning_rate(learning_rate_schedule(config, total_steps)),
    )


def learning_rate_schedule(config, total_steps):
    """The learning rate of each step: up in a line from 0, then constant, or down in half a cosine.

    Args:
        config: `OptimizerConfig`.
        total_steps: step at which a cosine arrives at `config.final_fraction`.

    Returns:
        function of a step, counted from 0, to the learning rate of its update. In a warm-up the first step's
        is 0: it changes the moments only.

    Raises:
        InputError: a cosine shorter than its warm-up.
    Source: diffusers optimization.py, get_constant_schedule_with_warmup and get_cosine_schedule_with_warmup.
    """
    warmup, final = config.warmup_steps, config.final_fraction
    if config.schedule == "cosine" and warmup >= total_steps:
        raise InputError(
            f"{warmup} warm-up steps in a run of {total_steps}",
            where="optimizer.warmup_steps",
            expected="fewer than the run's steps, as the cosine begins after them",
            fix="shorten the warm-up, or use the constant schedule",
        )

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        factor = jnp.float32(1)
        if config.schedule == "cosine":
            progress = jnp.clip((step - warmup) / (total_steps - warmup), 0, 1)
            factor = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return config.learning_rate * jnp.where(step < warmup, step / max(1, warmup), factor)

    return schedule


def update_ema(ema, trainable, decay):
    """The moving average after a step; it begins as a copy of the parameters.

    Args:
        ema: flat dict, or any tree, of float32 arrays.
        trainable: the updated parameters, likewise.
        decay: how much of the average stays.
    """
    # Not decay * average + (1 - decay) * new: rounded to float32 these factors do not add up to 1, and with a
    # decay of 0.9999 the average of a constant would settle 0.02 % beside it.
    return jax.tree.map(lambda average, new: average + (1 - decay) * (new - average), ema, trainable)


# CAME


class Factors(NamedTuple):
    """A positive array, known by its means along each of two axes."""

    row: jax.Array
    """Without the second of the axes."""
    column: jax.Array
    """Without the first of the axes."""


class CameState(NamedTuple):
    """Flat dicts by parameter name, float32."""

    momentum: dict
    """Moving average of the clipped directions."""
    square: dict
    """Moving average of the squared gradients: `Factors`, or whole for what is not factored."""
    instability: dict
    """Moving average of the squared distance of directions from `momentum`; `Factors` of what is factored."""


def scale_by_came(b1=0.9, b2=0.999, b3=0.9999, eps=(1e-30, 1e-16), clip_threshold=1.0):
    """Direction of CAME, which keeps second moments as `Factors` and trusts steady directions more.

    In PyTorch every layer's weights are a tensor of their own. Here they are stacked, so that a root mean
    square is taken of each layer, not of the stack. Nothing is bias-corrected.

    Args:
        b1: decay of the momentum.
        b2: decay of the squared gradients.
        b3: decay of the instability.
        eps: added to squared gradients, and to squared distances.
        clip_threshold: root mean square that no layer's direction exceeds before it enters the momentum.

    Returns:
        optax.GradientTransformation over flat dicts with state `CameState`.
    Source: CAME (arXiv:2307.02047) algorithm 2; where that leaves a choice, the authors' came-pytorch.
    """

    def init(params):
        state = CameState(momentum={}, square={}, instability={})
        for name, leaf in params.items():
            if isinstance(leaf, optax.MaskedNode):  # frozen
                continue
            # Every zero is an array of its own: none could be donated if two were the same.
            state.momentum[name] = jnp.zeros(leaf.shape, jnp.float32)
            state.square[name] = jnp.zeros(leaf.shape, jnp.float32)
            if axes := factored_axes(name, leaf.ndim):
                state.square[name] = _means(state.momentum[name], axes)
                state.instability[name] = _means(state.momentum[name], axes)
        return state

    def update(updates, state, params=None):
        del params
        updates, (momentum, square, instability) = dict(updates), map(dict, state)
        for name in momentum:
            gradient = updates[name]
            axes = factored_axes(name, gradient.ndim)

            squared = gradient**2 + eps[0]
            square[name] = update_ema(square[name], _means(squared, axes) if axes else squared, b2)
            root = _inverse_root(square[name], axes) if axes else jax.lax.rsqrt(square[name])
            direction = gradient * root
            direction /= jnp.maximum(1, _layer_rms(name, direction) / clip_threshold)
            momentum[name] = update_ema(momentum[name], direction, b1)

            updates[name] = momentum[name]
            if axes:
                distance = (direction - momentum[name]) ** 2 + eps[1]
                instability[name] = update_ema(instability[name], _means(distance, axes), b3)
                updates[name] *= _inverse_root(instability[name], axes)
        return updates, CameState(momentum, square, instability)

    return optax.GradientTransformation(init, update)


def factored_axes(name, ndim):
    """The two axes, counted from the end, along which CAME keeps means only; None for vectors, also stacked.

    The published code takes the last two in PyTorch's layout. Of a linear kernel, transposed here, these are
    the last two as well: rows and columns change places and nothing else. Of a convolution (PyTorch's
    [O, I, *k], [*k, I, O] here) they are the window's height and width: that saves nothing, but the updates
    are PyTorch's.
    """
    ndim -= _is_stacked(name)
    if ndim < 2:
        return None
    first = -min(ndim, 4) if name.endswith("/kernel") else -2
    return first, first + 1


def _is_stacked(name):
    return re.fullmatch(STACKED, name.partition("/")[2]) is not None


def _means(x, axes):
    first, second = axes
    return Factors(row=x.mean(second), column=x.mean(first))


def _inverse_root(factors, axes):
    """1 / sqrt of row x column / mean: the array of rank 1 that has these means."""
    first, second = axes
    row, column = jnp.expand_dims(factors.row, second), jnp.expand_dims(factors.column, first)
    return jax.lax.rsqrt(row / row.mean(first, keepdims=True)) * jax.lax.rsqrt(column)


def _layer_rms(name, x):
    """Root mean square of all of `x`, or of each layer where layers are stacked; broadcasts with `x`."""
    axes = tuple(range(1 if _is_stacked(name) else 0, x.ndim))
    return jnp.sqrt(jnp.mean(x**2, axes, keepdims=True))

"""Optimiser, learning rate and moving average against PyTorch, diffusers, CAME's code, and their claims.

`fixtures/optimizer/came.safetensors` holds ten updates of came-pytorch 0.1.3 from PyPI (the authors'
package), run by PyTorch 2.13.0 on its CPU in float64: one tensor per layer in PyTorch's layout, seeded normal
parameters and gradients (also of layers whose gradients differ by orders of magnitude, shrink or grow),
stored in float32 as `params/NAME`, `grads/NAME` [10, ...] and `updates/NAME` [10, ...], with the settings in
the file's metadata.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from animecolor_jax import networks, sharding
from animecolor_jax.config import HCEConfig, TransformerConfig
from animecolor_jax.convert.rules import TRANSFORMS
from animecolor_jax.errors import InputError
from animecolor_jax.safetensors_io import Reader
from animecolor_jax.train.config import OptimizerConfig
from animecolor_jax.train.optimizer import learning_rate_schedule, make_optimizer, update_ema

FIXTURE = Path(__file__).parent / "fixtures" / "optimizer" / "came.safetensors"
STEPS = 10
# Nothing but the direction, the decay and the learning rate.
PLAIN = OptimizerConfig(learning_rate=0.02, warmup_steps=0, clip_norm=0)

# ours: (how it is made from PyTorch's, PyTorch's names, one per layer where layers are stacked)
CAME_TENSORS = {
    "denoiser/out/kernel": ("linear", ["out.weight"]),
    "denoiser/out/bias": ("same", ["out.bias"]),
    "denoiser/patch_embed/kernel": ("conv", ["patch_embed.weight"]),
    "hce/qformer/latents": ("batch1", ["latents"]),
    "denoiser/blocks/attn/q/kernel": ("linear", [f"blocks.{layer}.weight" for layer in range(3)]),
    "denoiser/blocks/attn/q/bias": ("same", [f"blocks.{layer}.bias" for layer in range(3)]),
}


def make_tree(scale=1.0, seed=0):
    """A flat dict with one parameter of each kind."""
    rng = np.random.default_rng(seed)
    shapes = {
        "denoiser/blocks/attn/q/kernel": (3, 8, 4),
        "denoiser/blocks/attn/q/bias": (3, 4),
        "denoiser/blocks/attn/q_norm/scale": (3, 4),
        "denoiser/patch_embed/kernel": (2, 2, 3, 4),
        "denoiser/out/bias": (5,),
        "hce/qformer/proj_out": (4, 8),
        "hce/qformer/latents": (3, 4),
    }
    return {name: jnp.float32(scale * rng.standard_normal(shape)) for name, shape in shapes.items()}


def trajectory(optimizer, params, gradients):
    """The updates that the optimiser makes of a list of gradients, one dict per step."""

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    state, all_updates = jax.jit(optimizer.init)(params), []
    for grads in gradients:
        params, state, updates = step(params, state, grads)
        all_updates.append(updates)
    return all_updates


def assert_updates_equal(ours, theirs, tolerance):
    """Errors are at most `tolerance` of the largest of a parameter's updates in that step."""
    for step, (left, right) in enumerate(zip(ours, theirs, strict=True)):
        assert left.keys() == right.keys()
        for name, leaf in left.items():
            error = np.abs(np.asarray(leaf) - right[name]).max() / np.abs(right[name]).max()
            assert error <= tolerance, f"{name}, step {step}: {error:.1e}"


# CAME


@pytest.fixture(scope="module")
def published():
    """(config, params, gradients of each step, the published code's updates of each step), in our layout."""
    with Reader(FIXTURE) as reader:
        tensors = {name: reader.read(name) for name in reader.specs}
        config = replace(PLAIN, name="came", **json.loads(reader.metadata["config"]))

    def tree(kind, index=...):
        leaves = {}
        for ours, (transform, names) in CAME_TENSORS.items():
            layers = [TRANSFORMS[transform].load(tensors[f"{kind}/{name}"][index]) for name in names]
            leaves[ours] = np.stack(layers) if len(layers) > 1 else layers[0]
        return leaves

    steps = range(STEPS)
    return config, tree("params"), [tree("grads", i) for i in steps], [tree("updates", i) for i in steps]


def test_came_first_ten_updates_equal_published_code(published):
    config, params, gradients, expected = published
    updates = trajectory(make_optimizer(config, STEPS, params), params, gradients)
    assert_updates_equal(updates, expected, 1e-6)


def test_came_on_sharded_arrays_makes_the_same_updates(published):
    config, params, gradients, expected = published
    mesh = sharding.make_mesh(fsdp=2, tensor=2)

    def place(tree):
        names = {name: name.partition("/")[2] for name in tree}
        return {
            name: jax.device_put(leaf, sharding.parameter_sharding(names[name], leaf.shape, mesh))
            for name, leaf in tree.items()
        }

    optimizer = make_optimizer(config, STEPS, params)
    updates = trajectory(optimizer, place(params), map(place, gradients[:3]))
    name = "denoiser/blocks/attn/q/kernel"  # [3, 4, 6]
    assert updates[-1][name].sharding.shard_shape(params[name].shape) == (3, 2, 3)
    assert_updates_equal(updates, expected[:3], 1e-6)


def test_came_keeps_half_of_adamws_moments():
    depth, rows, columns = 30, 1920, 7680
    params = {"denoiser/blocks/ff/up/kernel": jax.ShapeDtypeStruct((depth, rows, columns), jnp.float32)}

    def moments(name):
        state = jax.eval_shape(make_optimizer(replace(PLAIN, name=name), 1, params).init, params)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state) if leaf.ndim)
        return sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)

    kernel = depth * rows * columns
    assert moments("adamw") == 2 * kernel
    assert moments("came") == kernel + 2 * depth * (rows + columns)
    assert moments("came") < 0.501 * moments("adamw")


@pytest.mark.parametrize("name", ["adamw", "came"])
def test_state_can_be_donated(name):
    params = {"denoiser/out/kernel": jnp.ones((4, 3)), "denoiser/out/bias": jnp.ones(3)}
    optimizer = make_optimizer(replace(PLAIN, name=name), STEPS, params)
    state = optimizer.init(params)
    jax.jit(optimizer.update, donate_argnums=1)(params, state, params)  # raises if two leaves are one buffer
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state) if leaf.ndim)


@pytest.mark.parametrize("name", ["adamw", "came"])
def test_without_gradient_only_decay_moves_parameters(name):
    params = make_tree()
    optimizer = make_optimizer(replace(PLAIN, name=name), STEPS, params)
    (updates,) = trajectory(optimizer, params, [jax.tree.map(jnp.zeros_like, params)])
    for key, leaf in params.items():
        decayed = key.endswith(("/kernel", "/proj_out"))
        expected = -PLAIN.learning_rate * PLAIN.weight_decay * leaf if decayed else jnp.zeros_like(leaf)
        np.testing.assert_allclose(updates[key], expected, rtol=1e-6, err_msg=key)


# AdamW and clipping


@pytest.mark.torch
# The update is multiplied by the root of 1 - beta2 ** t, which for 0.999 is off by up to 2e-5 in float32.
@pytest.mark.parametrize(("beta2", "tolerance"), [(0.96875, 1e-6), (0.999, 1.2e-5)])
def test_adamw_equals_torch(beta2, tolerance):
    torch = pytest.importorskip("torch")
    params, gradients = make_tree(), [make_tree(10.0**-i, seed=1 + i) for i in range(STEPS)]
    config = replace(PLAIN, beta2=beta2, eps=1e-3)  # so large that where it is added makes a difference
    updates = trajectory(make_optimizer(config, STEPS, params), params, gradients)

    theirs = {name: torch.nn.Parameter(torch.tensor(np.float64(leaf))) for name, leaf in params.items()}
    decayed = [name for name in theirs if name.endswith(("/kernel", "/proj_out"))]
    groups = [
        {"params": [theirs[name] for name in decayed], "weight_decay": config.weight_decay},
        {"params": [leaf for name, leaf in theirs.items() if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps
    )
    expected = []
    for grads in gradients:
        before = {name: leaf.detach().clone() for name, leaf in theirs.items()}
        for name, leaf in theirs.items():
            leaf.grad = torch.tensor(np.float64(grads[name]))
        optimizer.step()
        expected.append({name: (leaf.detach() - before[name]).numpy() for name, leaf in theirs.items()})
    assert_updates_equal(updates, expected, tolerance)


@pytest.mark.torch
def test_clipping_equals_torch_but_for_its_epsilon():
    torch = pytest.importorskip("torch")
    # Without memory, and with eps so large, Adam's direction is the clipped gradient / eps.
    config = replace(PLAIN, weight_decay=0.0, beta1=0.0, beta2=0.0, eps=1e6, clip_norm=0.05)
    gradients = [make_tree(scale) for scale in (1e-4, 1e-2, 1e2)]
    updates = trajectory(make_optimizer(config, STEPS, gradients[0]), gradients[0], gradients)
    norms, scale = [], -config.eps / config.learning_rate
    for ours, grads in zip(updates, gradients, strict=True):
        theirs = {name: torch.nn.Parameter(torch.zeros(leaf.shape)) for name, leaf in grads.items()}
        for name, leaf in theirs.items():
            leaf.grad = torch.tensor(np.asarray(grads[name]))
        norms.append(float(torch.nn.utils.clip_grad_norm_(theirs.values(), config.clip_norm)))
        epsilon = 1e-6 / norms[-1] if norms[-1] > config.clip_norm else 0.0
        for name, leaf in theirs.items():
            np.testing.assert_allclose(
                ours[name] * scale, leaf.grad.numpy() * (1 + epsilon), rtol=1e-6, err_msg=name
            )
    assert norms[0] < config.clip_norm < norms[1] < norms[2]


@pytest.mark.parametrize("name", ["adamw", "came"])
def test_masks_on_the_full_tree_equal_the_split_tree(name):
    config = replace(PLAIN, name=name, clip_norm=0.05)
    params, gradients = make_tree(), [make_tree(10.0 ** (3 - i), seed=1 + i) for i in range(3)]
    trained = {key for key in params if key.startswith("denoiser/blocks/")}
    assert 0 < len(trained) < len(params)

    def split(tree):
        return {key: leaf for key, leaf in tree.items() if key in trained}

    optimizer = make_optimizer(config, STEPS, trained)
    expected = trajectory(optimizer, split(params), map(split, gradients))
    freeze_mask = {key: key not in trained for key in params}
    masked = optax.transforms.selective_transform(optimizer, freeze_mask=freeze_mask)
    for ours, theirs in zip(trajectory(masked, params, gradients), expected, strict=True):
        for key, update in ours.items():
            np.testing.assert_array_equal(update, theirs[key] if key in trained else 0, err_msg=key)


@pytest.mark.parametrize("setting", [{"eps": 0.0}, {"came_eps": (1e-30, 0.0)}, {"came_clip": 0.0}])
def test_settings_that_divide_by_zero_are_errors(setting):
    with pytest.raises(InputError, match=f"optimizer.{next(iter(setting))}"):
        OptimizerConfig(**setting)


# decay by name


def test_every_parameter_of_the_networks_is_decayed_or_not_by_name():
    trees = {"denoiser": TransformerConfig(), "lcg": TransformerConfig(), "hce": HCEConfig()}
    names = [f"{key}/{name}" for key, config in trees.items() for name in networks.abstract(key, config)]
    make_optimizer(OptimizerConfig(), STEPS, [*names, "denoiser/blocks/attn/q/lora_a"])


def test_a_name_without_a_decay_rule_is_an_error():
    config = replace(PLAIN, decayed=((".*/kernel", True),))
    with pytest.raises(InputError, match="denoiser/out/bias"):
        make_optimizer(config, STEPS, ["denoiser/out/kernel", "denoiser/out/bias"])


# learning rate


@pytest.mark.torch
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_learning_rate_equals_diffusers(schedule, warmup):
    torch, optimization = pytest.importorskip("torch"), pytest.importorskip("diffusers.optimization")
    config, total = replace(PLAIN, schedule=schedule, warmup_steps=warmup, final_fraction=0.0), 30
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    name = {"constant": "constant_with_warmup", "cosine": "cosine"}[schedule]
    theirs = optimization.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    ours = jax.jit(learning_rate_schedule(config, total))
    for step in range(total + 1):
        # the cosine's end is a difference of numbers near 1
        np.testing.assert_allclose(
            ours(jnp.int32(step)), theirs.get_last_lr()[0], rtol=1e-6, atol=2e-7 * config.learning_rate
        )
        optimizer.step()
        theirs.step()


def test_cosine_ends_at_its_final_fraction_and_stays_there():
    config = replace(PLAIN, schedule="cosine", warmup_steps=10, final_fraction=0.1)
    schedule = learning_rate_schedule(config, 110)
    steps = [0, 5, 10, 60, 110, 200]
    factors = [0, 0.5, 1, 0.55, 0.1, 0.1]
    np.testing.assert_allclose(
        [schedule(step) for step in steps], config.learning_rate * np.array(factors), rtol=1e-6
    )


def test_updates_follow_the_schedule():
    config = replace(PLAIN, warmup_steps=4, weight_decay=0.0)
    name = "denoiser/out/bias"
    params = {name: jnp.ones(1)}
    updates = trajectory(make_optimizer(config, STEPS, params), params, [params] * 6)
    # Adam's direction is the gradient's sign while the gradient stays the same.
    factors = [-float(step[name][0]) / config.learning_rate for step in updates]
    np.testing.assert_allclose(factors, [0, 0.25, 0.5, 0.75, 1, 1], rtol=1e-4)


def test_a_cosine_shorter_than_its_warmup_is_an_error():
    with pytest.raises(InputError, match="optimizer.warmup_steps"):
        make_optimizer(replace(PLAIN, schedule="cosine", warmup_steps=10), 10, [])


# moving average


def test_ema_is_the_weighted_mean_of_all_parameters_so_far():
    decay, path = 0.9, [make_tree(seed=seed) for seed in range(6)]
    ema = path[0]
    for params in path[1:]:
        ema = jax.jit(update_ema)(ema, params, decay)
    weights = [decay**5, *((1 - decay) * decay ** (5 - i) for i in range(1, 6))]
    assert math.isclose(sum(weights), 1)
    for name, leaf in ema.items():
        expected = sum(w * np.float64(params[name]) for w, params in zip(weights, path, strict=True))
        assert leaf.dtype == jnp.float32
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6)


def test_ema_of_parameters_that_do_not_move_stays_them_exactly():
    params = make_tree()
    ema = jax.jit(
        lambda ema: jax.lax.fori_loop(0, 1000, lambda _, ema: update_ema(ema, params, 0.9999), ema)
    )(params)
    for name, leaf in params.items():
        np.testing.assert_array_equal(ema[name], leaf)

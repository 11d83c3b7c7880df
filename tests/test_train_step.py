"""Loss and update: what is computed, what is trained, what it costs."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train_models import (
    STAGES,
    make_objective,
    model_config,
    random_inputs,
    random_state,
    stage_config,
)

from animecolor_jax.convert.scheduler import config_to_torch
from animecolor_jax.train.config import TrainConfig
from animecolor_jax.train.optimizer import make_optimizer
from animecolor_jax.train.state import TrainState
from animecolor_jax.train.step import (
    Objective,
    draw,
    gradients,
    make_train_step,
    sample_latents,
)

# Adam divides gradients by themselves: with its own eps, what is 0 but for rounding would move like all else
FLAGS = ("--optimizer.eps", "1e-6", "--optimizer.ema", "0.9")
STEPS = 8  # in which the loss of one batch must fall
MODEL = model_config(hce={"interval": 1, "num_cross": 2, "cross_num_heads": 3})
INPUTS = random_inputs(MODEL, references=2)
# of the LCG only the blocks' keys count: nothing after the last one, and its text is zero
IDLE = [
    *(f"lcg/{name}/{leaf}" for name in ("modulation_out", "out") for leaf in ("bias", "kernel")),
    *(f"lcg/{name}/{leaf}" for name in ("norm_final", "norm_out") for leaf in ("bias", "scale")),
    "lcg/text_embed/kernel",
]


class Run(NamedTuple):
    """A stage, compiled, at its first step."""

    config: TrainConfig
    objective: Objective
    optimizer: optax.GradientTransformation
    start: TrainState
    step: jax.stages.Compiled

    def take(self, state, key=None, step=0):
        """(TrainState after a step from a copy of `state`, values); draws are those of `step`."""
        donated = jax.tree.map(jnp.copy, (state.trainable, state.opt_state, state.ema))
        key = state.key if key is None else key
        *updated, values = self.step(*donated, state.frozen, INPUTS, key, jnp.int32(step))
        return TrainState(state.step + 1, *updated, state.frozen, state.key), values


@functools.cache
def make_run(stage, *flags):
    config = stage_config(stage, *FLAGS, *flags)
    objective = make_objective(config, MODEL)
    start, optimizer = random_state(objective.parts, config)
    step = make_train_step(objective, optimizer, config.optimizer)
    arguments = (start.trainable, start.opt_state, start.ema, start.frozen, INPUTS, start.key, start.step)
    return Run(config, objective, optimizer, start, step.lower(*arguments).compile())


@functools.cache
def make_losses(stage):
    return jax.jit(make_objective(stage_config(stage), MODEL).losses)


@functools.cache
def one_step(stage):
    return make_run(stage).take(make_run(stage).start)


def first_draws(run):
    """The draws of a run's step 0."""
    return draw(jax.random.fold_in(run.start.key, 0), INPUTS, 1000)


def assert_close(actual, expected, tolerance):
    """Trees of arrays whose leaves differ by no more than `tolerance` of the largest value."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        ours = functools.reduce(lambda tree, key: tree[key.key], path, actual)
        np.testing.assert_allclose(
            ours, leaf, rtol=0, atol=tolerance * np.abs(leaf).max(), err_msg=jax.tree_util.keystr(path)
        )


# the loss


@pytest.mark.torch
def test_loss_equals_that_of_diffusers_scheduler():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    scheduler = diffusers.DDPMScheduler.from_config(config_to_torch(MODEL.scheduler))
    assert scheduler.alphas_cumprod[-1] == 0  # zero terminal SNR
    run, losses = make_run(4), make_losses(4)
    parameters = run.start.trainable, run.start.frozen

    @jax.jit
    def predict(trained, frozen, noisy, timesteps, reference):
        model, scale = run.objective.parts.model(trained, frozen), MODEL.vae.scaling_factor
        conditions = model.conditions(reference, INPUTS["image_summary"], INPUTS["image_features"])
        return model(noisy, INPUTS["sketch"] * scale, INPUTS["text"], timesteps, conditions)

    def channels_first(x):
        return torch.tensor(np.moveaxis(np.asarray(x), -1, 1))

    def sample(name, noise):
        moments = torch.cat([channels_first(INPUTS[f"{name}_{part}"]) for part in ("mean", "logvar")], 1)
        posterior = DiagonalGaussianDistribution(moments)
        return (posterior.mean + posterior.std * channels_first(noise)) * MODEL.vae.scaling_factor

    for timesteps in ([0, 1, 500, 999], [998, 999, 2, 250]):
        draws = first_draws(run)._replace(timesteps=jnp.asarray(timesteps))
        arguments = sample("video", draws.video), channels_first(draws.noise), torch.tensor(timesteps)
        noisy = scheduler.add_noise(*arguments).moveaxis(1, -1).numpy()
        target = scheduler.get_velocity(*arguments).moveaxis(1, -1).numpy()
        reference = sample("reference", draws.reference).moveaxis(1, -1).numpy()
        v = predict(*parameters, noisy, draws.timesteps, reference)
        expected = np.square(np.asarray(v, np.float64) - target).mean((1, 2, 3, 4))
        np.testing.assert_allclose(losses(*parameters, INPUTS, draws), expected, rtol=1e-5)


@pytest.mark.torch
def test_posterior_is_sampled_as_diffusers_does_also_where_log_variances_are_clamped():
    torch = pytest.importorskip("torch")
    vae = pytest.importorskip("diffusers.models.autoencoders.vae")
    rng = np.random.default_rng(0)
    mean, noise = rng.standard_normal((2, 1, 6, 3, 2, 4)).astype(np.float32)
    logvar = np.linspace(-60, 40, mean.size, dtype=np.float32).reshape(mean.shape)
    moments = torch.from_numpy(np.concatenate([mean, logvar], -1)).moveaxis(-1, 1)
    posterior = vae.DiagonalGaussianDistribution(moments)
    expected = (posterior.mean + posterior.std * torch.from_numpy(noise).moveaxis(-1, 1)) * 0.7
    ours = sample_latents(mean, logvar, noise, 0.7)
    np.testing.assert_allclose(ours, expected.moveaxis(1, -1), rtol=2e-6)


def test_timesteps_are_uniform_and_noises_standard_normal_and_independent():
    count = 100_000
    one = {"video_mean": np.zeros((count, 1, 1, 1, 1)), "reference_mean": np.zeros((count, 1, 1, 1, 1))}
    timesteps, *noises = draw(jax.random.key(3), one, 1000)
    seen = np.bincount(timesteps, minlength=1000)
    assert len(seen) == 1000 and seen.min() > 0  # 0 and 999 too
    mean = count / 1000
    chi_square = np.square(seen - mean).sum() / mean  # 999 on average, standard deviation 45
    assert abs(chi_square - 999) < 5 * math.sqrt(2 * 999)
    noises = np.stack([noise.ravel() for noise in noises])
    np.testing.assert_allclose(np.cov(noises), np.eye(3), atol=5 * math.sqrt(2 / count))
    np.testing.assert_allclose(noises.mean(1), 0, atol=5 / math.sqrt(count))
    np.testing.assert_allclose((noises**4).mean(1), 3, atol=5 * math.sqrt(96 / count))
    np.testing.assert_allclose(np.corrcoef(noises, timesteps)[3, :3], 0, atol=5 / math.sqrt(count))


def test_draws_are_decided_by_key_and_step():
    run = make_run(1)
    loss = lambda **changes: float(run.take(run.start, **changes)[1]["loss"])  # noqa: E731
    assert loss(step=5) == loss(step=5)
    assert len({loss(step=5), loss(step=6), loss(step=5, key=jax.random.key(1))}) == 3


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), 3, 4])
def test_every_condition_of_the_stage_and_no_other_changes_the_loss(stage):
    run, losses = make_run(stage), make_losses(stage)
    draws = first_draws(run)
    loss = lambda inputs, draws: losses(run.start.trainable, run.start.frozen, inputs, draws)  # noqa: E731
    base, read = loss(INPUTS, draws), set()
    for name, value in INPUTS.items():
        changed = np.abs(loss(INPUTS | {name: value[::-1]}, draws) - base) > 1e-5
        assert changed.all() or not changed.any(), name
        read |= {name} if changed.all() else set()
    for name, value in draws._asdict().items():
        changed = loss(INPUTS, draws._replace(**{name: value[::-1]})) != base
        read |= {name} if changed.all() else set()
    latents, lcg = {"video_mean", "video_logvar", "sketch"}, {"reference_mean", "reference_logvar"}
    expected = latents | {"text", "timesteps", "noise", "video"}
    expected |= lcg | {"reference"} if stage in (3, 4) else set()
    expected |= {"image_summary", "image_features"} if stage in (2, 4) else set()
    assert read == expected


# what is trained


@pytest.mark.parametrize("stage", STAGES)
def test_trained_parameters_move_and_frozen_ones_stay_as_they_are(stage):
    run = make_run(stage)
    frozen = {name: np.array(leaf) for name, leaf in run.start.frozen.items()}
    after, values = one_step(stage)
    moments = after.opt_state[1].mu
    assert sorted(after.trainable) == sorted(moments) == run.objective.parts.trained
    assert sorted(name for name, moment in moments.items() if not moment.any()) == (
        sorted(IDLE) if stage == 3 else []
    )
    for name, leaf in after.trainable.items():
        assert (leaf != run.start.trainable[name]).any() or name in IDLE, name
    assert sorted(after.frozen) == run.objective.parts.frozen
    for name, leaf in after.frozen.items():
        assert np.asarray(leaf).tobytes() == frozen[name].tobytes(), name
    assert values["grad_norm"] > 0


@pytest.mark.parametrize("stage", STAGES)
def test_steps_on_one_batch_lower_its_loss(stage):
    run, (state, values) = make_run(stage), one_step(stage)
    losses = [float(values["loss"])]
    for _ in range(STEPS):
        state, values = run.take(state)
        losses.append(float(values["loss"]))
    assert losses[-1] < losses[0] and sorted(losses, reverse=True) == losses


@pytest.mark.slow
def test_masks_on_the_full_tree_give_the_updates_of_the_split_tree():
    run, (_, (_, grads)) = make_run(4), gradients_of_all()
    parameters = run.start.trainable | run.start.frozen
    frozen = {name: name in run.start.frozen for name in parameters}
    assert grads.keys() == parameters.keys() and all(grads[name].any() for name in parameters.keys() - IDLE)
    optimizer = optax.transforms.selective_transform(
        make_optimizer(run.config.optimizer, run.config.steps, parameters), freeze_mask=frozen
    )
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(parameters), parameters)
    masked = optax.apply_updates(parameters, updates)
    after, values = one_step(4)
    clipped = optax.tree.norm({name: grads[name] for name in after.trainable})
    assert values["grad_norm"] > run.config.optimizer.clip_norm  # so that the norm matters
    np.testing.assert_allclose(values["grad_norm"], clipped, rtol=1e-5)
    for name, leaf in masked.items():
        if name in run.start.frozen:
            np.testing.assert_array_equal(leaf, parameters[name], err_msg=name)
        else:
            moved, expected = after.trainable[name] - parameters[name], leaf - parameters[name]
            np.testing.assert_allclose(moved, expected, atol=2e-6, err_msg=name)  # steps are of 1e-3


# what is computed


def products(jaxpr):
    """(sizes of the contracted axes, shape) of every matrix product of a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (axes, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            yield tuple(left[axis] for axis in axes), tuple(sorted(equation.outvars[0].aval.shape))
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


BATCH, REFERENCES, BANK = 11, 3, 18  # no other axis has 11 or 33; BANK are the tokens of three references
WIDTH, TIME = MODEL.denoiser.dim, MODEL.denoiser.time_embed_dim
DENOISER = [  # (in, out) of the kernels, in either order
    *[(WIDTH, WIDTH)] * 4, (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH), *[(TIME, 6 * WIDTH)] * 2,  # of the blocks
    (WIDTH, TIME), (TIME, TIME), (4 * 8, WIDTH), (32, WIDTH), (TIME, 2 * WIDTH), (WIDTH, 4 * 4),
]  # fmt: skip
CROSS = [(WIDTH, 24), (48, 48), (24, WIDTH)]  # queries, keys with values, out


@pytest.mark.parametrize("stage", STAGES)
def test_no_weight_gradient_of_what_is_frozen_is_computed(stage):
    config = stage_config(stage, "--compute.remat", "block")
    objective = make_objective(config, MODEL)
    start, optimizer = random_state(objective.parts, config)
    step = make_train_step(objective, optimizer, config.optimizer)
    inputs = random_inputs(MODEL, batch=BATCH, references=REFERENCES)
    traced = step.trace(
        start.trainable, start.opt_state, start.ema, start.frozen, inputs, start.key, start.step
    )
    found = list(products(traced.jaxpr.jaxpr))
    # a weight's gradient is a sum over the batch, and nothing else is
    of_clips = [shape for axes, shape in found if BATCH in axes and BANK not in axes]
    of_bank = [shape for axes, shape in found if BATCH in axes and BANK in axes]
    of_references = [shape for axes, shape in found if BATCH * REFERENCES in axes]
    expected = {1: DENOISER, 2: CROSS, 3: [], 4: DENOISER}[stage]
    assert sorted(of_clips) == sorted(tuple(sorted(shape)) for shape in expected)
    assert of_bank == ([(WIDTH, WIDTH)] * 2 if stage == 4 else [])  # keys and values that the denoiser makes
    assert bool(of_references) == (stage in (2, 3))  # Q-Former and LCG


# how it is computed


@functools.cache
def gradients_of_all(stage=4, accumulate=1, remat="none"):
    """(compiled program, (loss, gradients)) of a stage as if everything was trained."""
    run = make_run(stage)
    config = stage_config(stage, "--stage.trained", ".*", "True", "--compute.remat", remat)
    objective = make_objective(config, MODEL)
    compute = jax.jit(functools.partial(gradients, objective, accumulate=accumulate))
    arguments = run.start.trainable | run.start.frozen, {}, INPUTS, first_draws(run)
    compiled = compute.lower(*arguments).compile()
    return compiled, compiled(*arguments)


@pytest.mark.parametrize(
    ("stage", "accumulate", "remat"),
    [
        (1, 1, "block"),
        (1, 2, "products"),
        pytest.param(4, 1, "products", marks=pytest.mark.slow),
        pytest.param(4, 2, "branches", marks=pytest.mark.slow),
        pytest.param(4, 1, "attention", marks=pytest.mark.slow),
        pytest.param(4, 1, "block", marks=pytest.mark.slow),
    ],
)
def test_neither_parts_of_a_batch_nor_rematerialisation_change_the_gradients(stage, accumulate, remat):
    _, (loss, grads) = gradients_of_all(stage)
    _, (same_loss, same_grads) = gradients_of_all(stage, accumulate, remat)
    np.testing.assert_allclose(same_loss, loss, rtol=1e-6)
    norm = optax.tree.norm(grads)
    for name, leaf in grads.items():
        np.testing.assert_allclose(same_grads[name], leaf, rtol=1e-4, atol=1e-6 * norm, err_msg=name)


def test_remat_products_computes_no_product_over_tokens_again():
    def count(remat):
        objective = make_objective(stage_config(1, "--compute.remat", remat), MODEL)
        run = make_run(1)
        arguments = run.start.trainable, run.start.frozen, INPUTS, first_draws(run)
        traced = jax.jit(functools.partial(gradients, objective)).trace(*arguments)
        return len(list(products(traced.jaxpr.jaxpr)))

    none, kept, branches = map(count, ("none", "products", "branches"))
    assert kept == none + 2  # modulations, one row a clip
    assert branches == kept + 4  # q, k, v, and the first of feed-forward


def test_rematerialisation_takes_less_memory():
    plain, block = (gradients_of_all(1, 1, remat)[0].memory_analysis() for remat in ("none", "block"))
    assert block.temp_size_in_bytes < 0.8 * plain.temp_size_in_bytes


def test_old_parameters_and_moments_are_donated():
    run = make_run(1)
    donated = jax.tree.map(jnp.copy, (run.start.trainable, run.start.opt_state, run.start.ema))
    run.step(*donated, run.start.frozen, INPUTS, run.start.key, run.start.step)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((run.start.frozen, INPUTS)))


def test_moving_average_follows_the_updated_parameters():
    run, (first, _) = make_run(1), one_step(1)
    second, _ = run.take(first)
    for before, after in ((run.start, first), (first, second)):
        for name, average in after.ema.items():
            expected = 0.9 * np.float64(before.ema[name]) + 0.1 * np.float64(after.trainable[name])
            np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_bfloat16_computes_nearly_the_same_and_keeps_what_is_trained_in_float32():
    exact, (_, values) = make_run(2), one_step(2)
    flags = ("--compute.dtype", "bfloat16", "--compute.frozen-dtype", "bfloat16", "--compute.remat", "block")
    run = make_run(2, *flags)
    rounded = {name: leaf.astype(jnp.bfloat16) for name, leaf in exact.start.frozen.items()}
    after, coarse = run.take(run.start._replace(trainable=exact.start.trainable, frozen=rounded))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(coarse[name], values[name], rtol=0.03)
    trained = after.trainable, after.opt_state[1].mu, after.opt_state[1].nu, after.ema
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in after.frozen.values()} == {jnp.dtype(jnp.bfloat16)}
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((trained, coarse)))


# adapters


def test_only_adapters_are_trained_and_fresh_ones_change_nothing():
    run = make_run(1, "--lora.rank", "4", "--lora.alpha", "8", "--optimizer.accumulate", "4")
    layers = [f"denoiser/blocks/attn/{layer}" for layer in "qkv"] + ["denoiser/blocks/attn/out"]
    assert run.objective.parts.trained == sorted(f"{layer}/lora_{half}" for layer in layers for half in "ab")
    fresh = {
        name: jnp.zeros_like(leaf) if name.endswith("lora_b") else leaf
        for name, leaf in run.start.trainable.items()
    }
    state, losses = run.start._replace(trainable=fresh), []
    base = make_losses(1)(run.start.frozen, {}, INPUTS, first_draws(run)).mean()
    for _ in range(STEPS):
        state, values = run.take(state)
        losses.append(float(values["loss"]))
    np.testing.assert_allclose(losses[0], base, rtol=1e-6)
    assert losses[-1] < losses[0] and sorted(losses, reverse=True) == losses

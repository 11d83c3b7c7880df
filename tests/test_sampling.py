"""Samplers and guidance against the recorded reference, diffusers, and their own claims."""

import fnmatch
import importlib
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from animecolor_jax import sampling
from animecolor_jax.config import SchedulerConfig
from animecolor_jax.errors import InputError
from animecolor_jax.parity import schedulers as parity

FIXTURE = Path(__file__).parent / "fixtures" / "schedulers"
META = json.loads(FIXTURE.with_suffix(".json").read_text())
CONFIG = SchedulerConfig()
DETERMINISTIC = ("ddim", "ddim-cog", "dpmpp-2m", "euler")
STOCHASTIC = ("dpm-cog", "euler-a")


@pytest.fixture(scope="module")
def recorded():
    return load_file(FIXTURE.with_suffix(".safetensors"))


def tolerance_of(key):
    """The binding tolerance of the fixture's JSON."""
    patterns = META["tolerance"]["patterns"].items()
    matching = [value for pattern, value in patterns if fnmatch.fnmatchcase(key, pattern)]
    return matching[-1] if matching else META["tolerance"]["default"]


def assert_equals_reference(key, ours, theirs):
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape, key
    if theirs.dtype.kind == "i":
        np.testing.assert_array_equal(ours, theirs, err_msg=key)
        return
    error = np.abs(np.float64(ours) - theirs).max() / max(np.abs(theirs).max(), 1e-6)
    assert error <= tolerance_of(key), f"{key}: {error:.1e}"


# against the recorded reference


@pytest.mark.parametrize("scheduler", META["config"]["schedulers"])
def test_all_recorded_outputs_are_reproduced_on_our_own_trajectories(recorded, scheduler):
    produced = dict(parity.outputs(recorded, {**META["config"], "schedulers": [scheduler]}))
    expected = {key for key in recorded if key.startswith(f"outputs/{scheduler}/")}
    assert produced.keys() == expected - set(META["tolerance"]["skip"])
    for key, ours in produced.items():
        assert_equals_reference(key, ours, recorded[key])


@pytest.mark.parametrize("scheduler", META["config"]["schedulers"])
@pytest.mark.parametrize("num_steps", META["config"]["trajectories"])
def test_each_step_equals_reference_given_recorded_model_outputs(recorded, scheduler, num_steps):
    name, options = parity.SAMPLERS[scheduler]
    sampler = sampling.make_sampler(name, num_steps, CONFIG, **options)
    step, prefix = jax.jit(sampling.step), f"outputs/{scheduler}/traj_{num_steps}"
    x = recorded[f"{prefix}/x_init"]
    state = sampling.init_state(sampler, x)
    for i in range(sampler.num_calls):
        before, after = recorded[f"{prefix}/noise_draws_{i}"]
        noise = recorded["inputs/common/step_noise"][after - 1] if after > before else None
        x, state = step(sampler, recorded[f"{prefix}/model_output_{i}"], x, state, i, noise)
        assert_equals_reference(f"{prefix}/x_{i}", x, recorded[f"{prefix}/x_{i}"])


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers, with NumPy 2
@pytest.mark.parametrize("num_steps", [7, 30, 48])  # none divides 1000
@pytest.mark.parametrize("scheduler", META["config"]["schedulers"])
def test_awkward_numbers_of_steps_equal_diffusers(monkeypatch, scheduler, num_steps):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    classes = {
        "ddim": "DDIMScheduler",
        "ddim-cog": "CogVideoXDDIMScheduler",
        "dpm-cog": "CogVideoXDPMScheduler",
        "dpmpp-2m": "DPMSolverMultistepScheduler",
        "euler": "EulerDiscreteScheduler",
        "euler-a": "EulerAncestralDiscreteScheduler",
        "pndm": "PNDMScheduler",
    }
    name, options = parity.SAMPLERS[scheduler]
    config = {**META["config"]["scheduler_config"], **options}
    theirs = getattr(diffusers, classes[name]).from_config(config)
    theirs.set_timesteps(num_steps)
    ours = sampling.make_sampler(name, num_steps, CONFIG, **options)
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())

    rng = np.random.default_rng(num_steps)
    x_ours = rng.standard_normal(64).astype(np.float32) * np.float32(ours.init_noise_sigma)
    x_theirs, last_clean = torch.from_numpy(x_ours.copy()), None
    state, step = sampling.init_state(ours, x_ours), jax.jit(sampling.step)
    for i, t in enumerate(theirs.timesteps):
        v = rng.standard_normal(64).astype(np.float32)
        noise = rng.standard_normal(64).astype(np.float32)
        if name in STOCHASTIC:
            module = importlib.import_module(type(theirs).__module__)
            draw = torch.from_numpy(noise)
            monkeypatch.setattr(module, "randn_tensor", lambda *_, draw=draw, **__: draw)
        theirs.scale_model_input(x_theirs, t)
        if name == "dpm-cog":
            back = theirs.timesteps[i - 1] if i else None
            x_theirs, last_clean = theirs.step(torch.from_numpy(v), last_clean, t, back, x_theirs)
            x_theirs = x_theirs.float()
        else:
            x_theirs = theirs.step(torch.from_numpy(v), t, x_theirs, return_dict=False)[0]
        x_ours, state = step(ours, v, x_ours, state, i, noise)
        assert_equals_reference(f"outputs/{scheduler}/x_{i}", x_ours, x_theirs.numpy())


# with a denoiser that knows the answer


def run_with_oracle(name, num_steps, clean, seed=0):
    """Yields (network's input, alphas_cumprod there) at each call, then the result."""
    sampler, rng = sampling.make_sampler(name, num_steps, CONFIG), np.random.default_rng(seed)
    table = sampling.noise_schedule(name, CONFIG).astype(np.float64)
    step = jax.jit(sampling.step)
    x = (rng.standard_normal(clean.shape) * sampler.init_noise_sigma).astype(np.float32)
    state = sampling.init_state(sampler, x)
    for i in range(sampler.num_calls):
        alpha = table[int(sampler.timesteps[i])]
        noisy = np.float64(sampling.scale_input(sampler, x, i))
        yield noisy, alpha
        noise = (noisy - np.sqrt(alpha) * clean) / np.sqrt(1 - alpha)
        v = np.sqrt(alpha) * noise - np.sqrt(1 - alpha) * clean
        fresh = rng.standard_normal(clean.shape).astype(np.float32)
        x, state = step(sampler, v.astype(np.float32), x, state, i, fresh)
    yield np.asarray(x), 1.0


def clean_latents(shape=(1, 2, 8, 8, 4)):
    return np.random.default_rng(43).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("num_steps", [1, 4, 30])
@pytest.mark.parametrize("name", DETERMINISTIC + STOCHASTIC)
def test_oracle_denoiser_gives_back_the_clean_latents(name, num_steps):
    clean = clean_latents()
    *_, (result, _) = run_with_oracle(name, num_steps, clean)
    np.testing.assert_allclose(result, clean, atol=2e-6)


def test_pndm_approaches_the_clean_latents_of_the_oracle_at_first_order():
    # it extrapolates v over the timesteps, which even the oracle's v follows only approximately
    clean = clean_latents()
    errors = {}
    for num_steps in (10, 20, 40):
        *_, (result, _) = run_with_oracle("pndm", num_steps, clean)
        errors[num_steps] = np.abs(result - clean).max()
    assert errors[10] < 0.1
    assert errors[20] < 0.6 * errors[10] and errors[40] < 0.6 * errors[20]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_samplers_keep_their_initial_noise(name):
    clean, noises = clean_latents(), []
    for noisy, alpha in run_with_oracle(name, 10, clean):
        if alpha < 1:
            noises.append((noisy - np.sqrt(alpha) * clean) / np.sqrt(1 - alpha))
    np.testing.assert_allclose(noises, np.broadcast_to(noises[0], np.shape(noises)), atol=1e-5)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_keep_noise_of_unit_variance_and_renew_it(name):
    clean, noises = clean_latents((1, 4, 32, 32, 4)), []
    for noisy, alpha in run_with_oracle(name, 10, clean):
        if alpha < 1:
            noises.append((noisy - np.sqrt(alpha) * clean) / np.sqrt(1 - alpha))
    np.testing.assert_allclose(np.std(noises, axis=(1, 2, 3, 4, 5)), 1, atol=0.03)
    correlation = np.corrcoef(noises[0].ravel(), noises[-1].ravel())[0, 1]
    assert abs(correlation) < 0.05


# the step function


@pytest.mark.parametrize("name", sampling.SAMPLERS)
def test_one_trace_serves_all_steps(name):
    traces = []

    @jax.jit
    def call(sampler, x, state, i, noise):
        traces.append(i)
        v = jnp.tanh(sampling.scale_input(sampler, x, i))
        return sampling.step(sampler, v, x, state, i, noise)

    sampler = sampling.make_sampler(name, 5, CONFIG)
    x = noise = clean_latents()
    state = sampling.init_state(sampler, x)
    for i in range(sampler.num_calls):
        x, state = call(sampler, x, state, i, noise)
    assert len(traces) == 1


@pytest.mark.parametrize("name", sampling.SAMPLERS)
def test_scan_over_calls_equals_a_python_loop(name):
    sampler = sampling.make_sampler(name, 6, CONFIG)
    rng, shape = np.random.default_rng(1), (sampler.num_calls, 1, 2, 4, 4, 2)
    noise = rng.standard_normal(shape).astype(np.float32)
    initial = noise[0] * sampler.init_noise_sigma

    def call(carry, inputs):
        (x, state), (i, noise) = carry, inputs
        v = jnp.tanh(sampling.scale_input(sampler, x, i))
        return sampling.step(sampler, v, x, state, i, noise), None

    start = jnp.asarray(initial, jnp.float32), sampling.init_state(sampler, initial)
    (scanned, _), _ = jax.lax.scan(call, start, (jnp.arange(sampler.num_calls), noise))
    looped = start
    for i in range(sampler.num_calls):
        looped, _ = call(looped, (i, noise[i]))
    np.testing.assert_allclose(scanned, looped[0], atol=1e-5)


def test_bfloat16_model_output_leaves_latents_in_float32():
    sampler, x = sampling.make_sampler("dpm-cog", 4, CONFIG), clean_latents()
    v, state = jnp.asarray(clean_latents(), jnp.bfloat16), sampling.init_state(sampler, x)
    ours, state = sampling.step(sampler, v, x, state, 0, x)
    exact, _ = sampling.step(sampler, np.float32(v), x, sampling.init_state(sampler, x), 0, x)
    assert ours.dtype == state.dtype == jnp.float32
    np.testing.assert_array_equal(ours, exact)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("name", sampling.SAMPLERS)
def test_tables_are_finite_for_every_accepted_number_of_steps(name, rescale):
    config = SchedulerConfig(rescale_betas_zero_snr=rescale)
    for num_steps in (1, 2, 3, 4, 7, 50, 61, 999, 1000):
        if name == "pndm" and num_steps < 4:
            continue
        sampler = sampling.make_sampler(name, num_steps, config)
        assert all(np.isfinite(table).all() for table in jax.tree.leaves(sampler))
        assert sampler.num_calls == num_steps + (9 if name == "pndm" else 0)
        assert sampler.timesteps.min() >= 0


def test_pndm_without_runge_kutta_takes_one_step():
    assert sampling.make_sampler("pndm", 1, CONFIG, skip_prk_steps=True).num_calls == 1


# what is refused


@pytest.mark.parametrize(
    "name, num_steps, accepted",
    [
        ("ddim", 0, "1 to 1000"),
        ("euler", -3, "1 to 1000"),
        ("dpm-cog", 1001, "1 to 1000"),
        ("pndm", 3, "4 to 1000"),
    ],
)
def test_impossible_number_of_steps_is_refused_with_the_range(name, num_steps, accepted):
    with pytest.raises(InputError) as error:
        sampling.make_sampler(name, num_steps, CONFIG)
    assert error.value.expected == accepted


def test_unknown_sampler_is_refused_with_the_names():
    with pytest.raises(InputError) as error:
        sampling.make_sampler("unipc", 10, CONFIG)
    assert all(name in error.value.expected for name in sampling.SAMPLERS)


def test_option_of_another_sampler_is_refused():
    with pytest.raises(InputError):
        sampling.make_sampler("ddim", 10, CONFIG, skip_prk_steps=True)


# guidance


def test_guidance_extrapolates_from_the_unconditional_prediction():
    uncond, text = clean_latents(), clean_latents()[..., ::-1]
    np.testing.assert_array_equal(sampling.guide(uncond, text, 0.0), uncond)
    np.testing.assert_allclose(sampling.guide(uncond, text, 1.0), text, atol=1e-6)
    expected = uncond + 6 * (text - uncond)
    np.testing.assert_allclose(sampling.guide(uncond, text, 6.0), expected, rtol=1e-6)


def test_guidance_of_bfloat16_predictions_is_in_float32():
    uncond, text = (jnp.asarray(clean_latents() + shift, jnp.bfloat16) for shift in (0, 1))
    guided = sampling.guide(uncond, text, 6.0)
    assert guided.dtype == jnp.float32
    np.testing.assert_array_equal(guided, sampling.guide(np.float32(uncond), np.float32(text), 6.0))


def test_dynamic_guidance_rises_from_one_by_its_closed_form():
    scales = [float(sampling.dynamic_guidance_scale(6.0, step, 50)) for step in range(51)]
    assert scales[0] == 1
    assert scales[50] == pytest.approx(7)
    assert scales[25] == pytest.approx(1 + 6 * (1 - math.cos(math.pi / 32)) / 2, rel=1e-5)
    assert all(later >= earlier for earlier, later in zip(scales, scales[1:], strict=False))


def test_dynamic_guidance_takes_a_traced_step():
    traced = jax.jit(sampling.dynamic_guidance_scale)(6.0, 40, 50)
    np.testing.assert_allclose(traced, sampling.dynamic_guidance_scale(6.0, 40, 50), rtol=1e-6)


def test_step_takes_latents_of_several_windows():
    """At this shape and rank a reduction over stacked terms crashed the process (XLA on CPU, jaxlib
    0.10.2)."""
    sampler = sampling.make_sampler("ddim", 3, SchedulerConfig())
    x, v = np.random.default_rng(0).standard_normal((2, 2, 13, 12, 20, 4), np.float32)
    moved, _ = jax.jit(sampling.step)(sampler, v, x, sampling.init_state(sampler, x), 1)
    np.testing.assert_allclose(moved, sampler.mix[1, 0, 0] * x + sampler.mix[1, 0, 1] * v, atol=1e-6)

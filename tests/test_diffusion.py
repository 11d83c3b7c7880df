"""Noise schedule and v-prediction against the recorded reference, and their own identities."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from animecolor_jax import diffusion
from animecolor_jax.config import SchedulerConfig

FIXTURE = Path(__file__).parent / "fixtures" / "schedulers"
TOLERANCE = json.loads(FIXTURE.with_suffix(".json").read_text())["tolerance"]["default"]
UNSCALED = SchedulerConfig(rescale_betas_zero_snr=False)
TABLES = {  # the fixture's name of a scheduler -> config and shift
    "DDIM_Origin": (SchedulerConfig(), False),
    "DDIM_Cog": (SchedulerConfig(), True),
    "PNDM": (UNSCALED, False),
}


@pytest.fixture(scope="module")
def recorded():
    return load_file(FIXTURE.with_suffix(".safetensors"))


def relative_error(ours, theirs):
    return np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("name", TABLES)
def test_table_equals_reference(recorded, name):
    config, shift = TABLES[name]
    theirs = recorded[f"outputs/{name}/alphas_cumprod"]
    ours = diffusion.alphas_cumprod(config, shift)
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert relative_error(ours, theirs) <= TOLERANCE


def test_small_entries_of_the_training_table_equal_reference(recorded):
    theirs = recorded["outputs/DDIM_Origin/alphas_cumprod"]
    ours = diffusion.alphas_cumprod(SchedulerConfig())
    np.testing.assert_allclose(ours[:-1], theirs[:-1], rtol=1e-5)


@pytest.mark.parametrize("shift", [False, True])
def test_terminal_snr_is_exactly_zero(shift):
    table = diffusion.alphas_cumprod(SchedulerConfig(), shift)
    assert table[-1] == 0
    assert np.all(np.diff(table) < 0)


@pytest.mark.parametrize("shift", [False, True])
def test_zero_snr_rescaling_keeps_the_first_entry(shift):
    rescaled = diffusion.alphas_cumprod(SchedulerConfig(), shift)
    original = diffusion.alphas_cumprod(UNSCALED, shift)
    np.testing.assert_allclose(rescaled[0], original[0], rtol=1e-6)
    assert original[-1] > 0


def test_snr_shift_divides_the_snr():
    config = dataclasses.replace(UNSCALED, snr_shift_scale=3.0)
    plain = diffusion.alphas_cumprod(config).astype(np.float64)
    shifted = diffusion.alphas_cumprod(config, shift=True)
    np.testing.assert_allclose(shifted / (1 - shifted), plain / (1 - plain) / 3, rtol=1e-4)


def test_shift_by_one_is_no_shift():
    config = dataclasses.replace(UNSCALED, snr_shift_scale=1.0)
    shifted = diffusion.alphas_cumprod(config, shift=True)
    np.testing.assert_allclose(shifted, diffusion.alphas_cumprod(config), rtol=1e-5)


@pytest.mark.parametrize("name", ["DDIM_Origin", "DDIM_Cog"])
@pytest.mark.parametrize("ours", [diffusion.add_noise, diffusion.velocity])
def test_noisy_latents_and_targets_equal_reference(recorded, name, ours):
    config, shift = TABLES[name]
    clean, noise, timesteps = (
        recorded[f"inputs/common/{key}"] for key in ("clean", "clean_noise", "noise_timesteps")
    )
    value = jax.jit(ours)(clean, noise, timesteps, diffusion.alphas_cumprod(config, shift))
    output = {diffusion.add_noise: "add_noise", diffusion.velocity: "get_velocity"}[ours]
    assert value.dtype == jnp.float32
    assert relative_error(value, recorded[f"outputs/{name}/{output}"]) <= TOLERANCE


def latents(seed, batch=3):
    return np.random.default_rng(seed).standard_normal((batch, 2, 4, 6, 4)).astype(np.float32)


def test_at_the_last_timestep_latents_are_noise_and_the_target_is_minus_the_clean_ones():
    clean, noise, last = latents(0), latents(1), np.full(3, 999)
    table = diffusion.alphas_cumprod(SchedulerConfig())
    np.testing.assert_array_equal(diffusion.add_noise(clean, noise, last, table), noise)
    np.testing.assert_array_equal(diffusion.velocity(clean, noise, last, table), -clean)


def test_each_sample_has_its_own_timestep():
    clean, noise, table = latents(0), latents(1), diffusion.alphas_cumprod(SchedulerConfig())
    timesteps = np.array([0, 400, 999])
    together = diffusion.add_noise(clean, noise, timesteps, table)
    for b, t in enumerate(timesteps):
        expected = np.sqrt(table[t]) * clean[b] + np.sqrt(1 - table[t]) * noise[b]
        np.testing.assert_allclose(together[b], expected, rtol=1e-5, atol=1e-6)


def test_clean_latents_follow_from_noisy_latents_and_target():
    clean, noise, table = latents(0), latents(1), diffusion.alphas_cumprod(SchedulerConfig())
    timesteps = np.array([0, 400, 999])
    noisy = diffusion.add_noise(clean, noise, timesteps, table)
    v = diffusion.velocity(clean, noise, timesteps, table)
    recovered = diffusion.clean_from_velocity(noisy, v, timesteps, table)
    np.testing.assert_allclose(recovered, clean, atol=2e-6)


def test_bfloat16_latents_are_noised_in_float32():
    clean, noise = (jnp.asarray(latents(seed), jnp.bfloat16) for seed in (0, 1))
    table, timesteps = diffusion.alphas_cumprod(SchedulerConfig()), np.array([0, 400, 999])
    noisy = diffusion.add_noise(clean, noise, timesteps, table)
    exact = diffusion.add_noise(np.float32(clean), np.float32(noise), timesteps, table)
    np.testing.assert_array_equal(noisy, exact)

"""Our values for the outputs of a `schedulers` parity fixture.

Names and conventions are those of the fixture. Its latents are (B, F, C, h, w); nothing here looks
at the axes.
"""

import dataclasses

import jax
import numpy as np

from animecolor_jax import diffusion, sampling
from animecolor_jax.config import SchedulerConfig

# the fixture's name of a scheduler -> our sampler and its options
SAMPLERS = {
    "DDIM_Origin": ("ddim", {}),
    "DDIM_Cog": ("ddim-cog", {}),
    "DPM_Cog": ("dpm-cog", {}),
    "DPM++": ("dpmpp-2m", {}),
    "Euler": ("euler", {}),
    "Euler A": ("euler-a", {}),
    "PNDM": ("pndm", {}),
    "PNDM_skip_prk": ("pndm", {"skip_prk_steps": True}),
}


def outputs(tensors, config):
    """Yields (key, our value) for the fixture's outputs.

    Not produced: schedulers that are not in `SAMPLERS`, and `get_velocity` of the Euler schedulers,
    which looks the table up by the position in the schedule instead of the timestep.

    Args:
        tensors: every tensor of the fixture by its key.
        config: `config` of the fixture's JSON.
    """
    for name in filter(SAMPLERS.__contains__, config["schedulers"]):
        for key, value in _scheduler_outputs(name, tensors, config):
            if f"outputs/{name}/{key}" in tensors:  # which outputs exist differs between schedulers
                yield f"outputs/{name}/{key}", value


def scheduler_config(values):
    """`SchedulerConfig` from the config of a diffusers scheduler."""
    names = [field.name for field in dataclasses.fields(SchedulerConfig)]
    return SchedulerConfig(**{name: values[name] for name in names})


def fake_network(values, x, timestep):
    """The fixture's stand-in for a network: a tanh(x) + b cos(c t + d k), k the flat index."""
    k = np.arange(x.size, dtype=np.float64).reshape(x.shape)
    wave = np.cos(values["c"] * float(timestep) + values["d"] * k)
    v = values["a"] * np.tanh(np.asarray(x, np.float64)) + values["b"] * wave
    return v.astype(np.float32)


def count_draws(sampler, num_train_timesteps, num_steps):
    """[num_calls, 2] draws of noise that the reference has made before and after each call.

    Ours draws once per call; CogVideoX-DPM once more where it takes a second-order step, and uses
    the last.
    """
    draws = np.full(sampler.num_calls, int(sampler.draws_noise))
    if sampler.name == "dpm-cog":
        draws[1:] += sampler.timesteps[1:] >= num_train_timesteps // num_steps
    after = np.cumsum(draws)
    return np.stack([after - draws, after], axis=1)


def _scheduler_outputs(name, tensors, config):
    sampler_name, options = SAMPLERS[name]
    schedule = scheduler_config(config["scheduler_config"])
    prefix = "inputs/common/"
    inputs = {k.removeprefix(prefix): tensors[k] for k in tensors if k.startswith(prefix)}

    def sampler_at(num_steps):
        return sampling.make_sampler(sampler_name, num_steps, schedule, **options)

    table = sampling.noise_schedule(sampler_name, schedule)
    yield "alphas_cumprod", table
    yield "final_alpha_cumprod", np.ones(1, np.float32)  # of clean latents, a constant of ours
    visited = []
    for num_steps in config["timestep_counts"]:
        sampler = sampler_at(num_steps)
        visited.append(sampler.timesteps)
        yield f"timesteps_{num_steps}", sampler.timesteps
        yield f"init_noise_sigma_{num_steps}", np.full(1, sampler.init_noise_sigma)
        if sampler.sigmas is not None:
            yield f"sigmas_{num_steps}", sampler.sigmas

    timesteps = inputs["noise_timesteps"]
    if sampler.sigmas is not None:
        # these can only add noise at timesteps that they visit; the fixture records which it took
        visited = np.concatenate(visited)
        recorded = tensors[f"outputs/{name}/add_noise_timesteps"]
        timesteps = visited[np.abs(visited[:, None] - recorded).argmin(axis=0)]
    yield "add_noise_timesteps", timesteps
    pair, index = (inputs["clean"], inputs["clean_noise"]), timesteps.astype(np.int32)
    noisy = np.asarray(diffusion.add_noise(*pair, index, table))
    if sampler_name in ("euler", "euler-a"):  # their latents keep the signal at scale 1
        noisy = noisy / np.sqrt(table[index]).reshape(-1, *[1] * (noisy.ndim - 1))
    else:
        yield "get_velocity", np.asarray(diffusion.velocity(*pair, index, table))
    yield "add_noise", noisy

    for num_steps in config["trajectories"]:
        run = _trajectory(sampler_at(num_steps), num_steps, schedule, inputs, config["fake_model"])
        for key, value in run:
            yield f"traj_{num_steps}/{key}", value


def _trajectory(sampler, num_steps, schedule, inputs, network):
    """A whole run on our own latents: errors accumulate as in use."""
    advance = jax.jit(sampling.step)
    x = inputs["sample"] * np.float32(sampler.init_noise_sigma)
    state = sampling.init_state(sampler, x)
    yield "x_init", x
    draws = count_draws(sampler, schedule.num_train_timesteps, num_steps)
    for i, (before, after) in enumerate(draws):
        v = fake_network(network, sampling.scale_input(sampler, x, i), sampler.timesteps[i])
        noise = inputs["step_noise"][after - 1] if after > before else np.zeros_like(x)
        x, state = advance(sampler, v, x, state, i, noise)
        yield f"model_output_{i}", v
        yield f"x_{i}", np.asarray(x)
        yield f"noise_draws_{i}", np.array([before, after])

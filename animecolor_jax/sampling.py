"""Samplers, each as one table, and guidance.

Every sampler here is linear in the latents: a step mixes the latents x, the network's output v and
a short history by coefficients that depend on the schedule only. So a sampler is an array of
coefficients per network call, made on the host in float64, and one small jittable function runs all
of them:

    sampler = make_sampler("ddim", 50, config.scheduler)
    x = jax.random.normal(key, shape) * sampler.init_noise_sigma
    state = init_state(sampler, x)
    for i in range(sampler.num_calls):
        v = network(scale_input(sampler, x, i), sampler.timesteps[i])
        x, state = step(sampler, v, x, state, i)
"""

import dataclasses
import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from animecolor_jax.diffusion import alphas_cumprod
from animecolor_jax.errors import InputError

SAMPLERS = ("ddim", "ddim-cog", "dpm-cog", "dpmpp-2m", "euler", "euler-a", "pndm")
_SIGMA_SAMPLERS = ("dpmpp-2m", "euler", "euler-a")  # work with the noise-to-signal ratio sigma


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Sampler:
    """A sampler at a number of steps; a pytree, so that it can be an argument of a jitted function.

    N is the number of network calls and K the number of history terms.

    Attributes:
        name: one of `SAMPLERS`.
        init_noise_sigma: standard deviation of the initial latents.
        timesteps: [N] timestep of each call; int64, but float32 for `euler` and `euler-a`.
        mix: [N, 1 + K, 2 + K] coefficients of the new (x, history) in (x, v, history).
        input_scale: [N] factor from the latents to the network's input, or None for 1.
        noise_scale: [N] standard deviation of the noise that each call adds, or None.
        sigmas: [N + 1] noise-to-signal ratio before each call and after the last, or None.
    """

    name: str = field(metadata={"static": True})
    init_noise_sigma: float = field(metadata={"static": True})
    timesteps: np.ndarray
    mix: np.ndarray
    input_scale: np.ndarray | None
    noise_scale: np.ndarray | None
    sigmas: np.ndarray | None

    @property
    def num_calls(self):
        """N: the number of steps, and up to 9 more for `pndm`."""
        return self.timesteps.shape[0]

    @property
    def draws_noise(self):
        """Whether every `step` needs fresh noise."""
        return self.noise_scale is not None


def make_sampler(name, num_steps, config, *, skip_prk_steps=False):
    """The sampler `name` with its tables for `num_steps` steps.

    Timesteps are spaced "trailing". As in the reference, `ddim`, `ddim-cog`, `dpm-cog` and `pndm`
    step from t to t - num_train_timesteps // num_steps, and to clean latents only where that is
    negative: a number of steps that does not divide num_train_timesteps may leave the noise of
    timestep 0 in the result.

    Args:
        name: one of `SAMPLERS`.
        num_steps: number of denoising steps.
        config: `SchedulerConfig`.
        skip_prk_steps: start `pndm` with multistep formulas of lower order (one extra call) instead
            of three Runge-Kutta steps (nine extra calls).

    Raises:
        InputError: the name is unknown, or the sampler cannot take that number of steps.

    Source: diffusers' DDIMScheduler, CogVideoXDDIMScheduler, CogVideoXDPMScheduler,
        DPMSolverMultistepScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler and
        PNDMScheduler, all with the CogVideoX scheduler config and eta = 0.
    """
    if name not in SAMPLERS:
        known = ", ".join(SAMPLERS)
        raise InputError(f"no sampler {name!r}", where="sampler", expected=f"one of {known}")
    if skip_prk_steps and name != "pndm":
        what = f"{name} has no Runge-Kutta steps to skip"
        raise InputError(what, where="skip_prk_steps", expected="sampler pndm")
    fewest = 4 if name == "pndm" and not skip_prk_steps else 1  # Runge-Kutta covers three steps
    most = config.num_train_timesteps
    if not fewest <= num_steps <= most:
        what = f"{name} cannot take {num_steps} steps"
        raise InputError(what, where="num_steps", expected=f"{fewest} to {most}")

    table = noise_schedule(name, config).astype(np.float64)
    stride = most // num_steps
    timesteps = _trailing_timesteps(most, num_steps)
    alpha = table[timesteps]
    alpha_after_stride = np.where(timesteps >= stride, table[timesteps - stride], 1.0)
    sigmas = np.append(np.sqrt((1 - alpha) / alpha), 0.0) if name in _SIGMA_SAMPLERS else None
    init_noise_sigma, input_scale, noise_scale = 1.0, None, None

    if name in ("ddim", "ddim-cog"):
        mix = _ddim(alpha, alpha_after_stride)
    elif name == "dpm-cog":
        mix, noise_scale = _dpm(alpha, alpha_after_stride, stochastic=True)
    elif name == "dpmpp-2m":
        mix, noise_scale = _dpm(alpha, np.append(alpha[1:], 1.0), stochastic=False)
    elif name == "pndm":
        timesteps, mix = _pndm(table, timesteps, stride, skip_prk_steps)
    else:
        mix, noise_scale = _euler(sigmas, ancestral=name == "euler-a")
        # their latents keep the signal at scale 1: those of the others times sqrt(1 + sigma^2)
        init_noise_sigma, input_scale = float(sigmas[0]), 1 / np.sqrt(sigmas[:-1] ** 2 + 1)
        timesteps = timesteps.astype(np.float32)

    def float32(values):
        return None if values is None else np.asarray(values, np.float32)

    return Sampler(
        name=name,
        init_noise_sigma=init_noise_sigma,
        timesteps=timesteps,
        mix=float32(mix),
        input_scale=float32(input_scale),
        noise_scale=float32(noise_scale),
        sigmas=float32(sigmas),
    )


def noise_schedule(name, config):
    """The table of `diffusion.alphas_cumprod` that the sampler `name` works with."""
    if name == "pndm":  # divides by alpha; its reference does not know zero terminal SNR
        return alphas_cumprod(dataclasses.replace(config, rescale_betas_zero_snr=False))
    table = alphas_cumprod(config, shift=name.endswith("-cog"))
    if name in _SIGMA_SAMPLERS and config.rescale_betas_zero_snr:
        table[-1] = 2.0**-24  # the reference's smallest number, so that sigma is finite
    return table


def scale_input(sampler, x, i):
    """The network's input at call `i`, float32, from the latents `x`. `i` may be traced."""
    x = jnp.asarray(x, jnp.float32)
    return x if sampler.input_scale is None else x * jnp.asarray(sampler.input_scale)[i]


def init_state(sampler, x):
    """The empty history [K, *x.shape] that the first `step` takes."""
    return jnp.zeros((sampler.mix.shape[1] - 1, *x.shape), jnp.float32)


def step(sampler, v, x, state, i, noise=None):
    """One network call's update of the latents.

    Args:
        sampler: what `make_sampler` returned.
        v: the network's output at call `i`, after guidance; any shape.
        x: the latents before the call, of the same shape.
        state: history from `init_state` or from the previous call.
        i: index of the call; may be traced.
        noise: standard normal, of the same shape; only if `sampler.draws_noise`.

    Returns:
        (x, state) after the call, float32. Between the calls of one step of `pndm`, x is an
        intermediate point.
    """
    terms = [jnp.asarray(x, jnp.float32), jnp.asarray(v, jnp.float32), *state]
    mix = jnp.asarray(sampler.mix)[i]
    # No matrix product: those are not float32 on every accelerator. And no reduction over stacked
    # terms: XLA's CPU
    # compiler (jaxlib 0.10.2) makes one of this rank that reads out of bounds.
    mixed = sum(mix[:, k].reshape(-1, *(1,) * x.ndim) * term for k, term in enumerate(terms))
    x, state = mixed[0], mixed[1:]
    if sampler.draws_noise:
        x = x + jnp.asarray(sampler.noise_scale)[i] * noise
    return x, state


def guide(v_uncond, v_text, scale):
    """Classifier-free guidance in float32: from `v_uncond` through `v_text`, `scale` times as far.

    Source: arXiv:2207.12598, in the form of the reference's pipeline.
    """
    v_uncond, v_text = jnp.asarray(v_uncond, jnp.float32), jnp.asarray(v_text, jnp.float32)
    return v_uncond + scale * (v_text - v_uncond)


def dynamic_guidance_scale(scale, step, num_steps):
    """Guidance scale that rises from 1 at step 0 towards 1 + `scale`. `step` may be traced.

    Departs from the reference (`use_dynamic_cfg`), which takes the timestep (999 to 0) for the
    number of steps left, and so the cosine of a huge number.
    """
    return 1 + scale * (1 - jnp.cos(math.pi * (step / num_steps) ** 5)) / 2


# --------------------------------------------------------------------------------------------------
# Tables. A row is a vector over the terms (x, v, history): np.eye names the terms, and arithmetic
# on those names builds the row.


def _trailing_timesteps(num_train_timesteps, num_steps):
    """[num_steps] int64, falling from num_train_timesteps - 1."""
    spaced = np.arange(num_train_timesteps, 0, -num_train_timesteps / num_steps)
    # arange may run one too far (61 steps of 1000); the reference then also calls at timestep -1
    return np.round(spaced[:num_steps]).astype(np.int64) - 1


def _predictions(alpha, x, v):
    """(clean latents, noise) that x and v imply where alphas_cumprod is `alpha`."""
    signal, sigma = np.sqrt(alpha), np.sqrt(1 - alpha)
    return signal * x - sigma * v, sigma * x + signal * v


def _ddim(alpha, alpha_next):
    """DDIM with eta = 0 (arXiv:2010.02502 eq. 12)."""
    x, v = np.eye(2)
    mix = []
    for now, then in zip(alpha, alpha_next, strict=True):
        clean, noise = _predictions(now, x, v)
        mix.append([np.sqrt(then) * clean + np.sqrt(1 - then) * noise])
    return mix


def _dpm(alpha, alpha_next, *, stochastic):
    """DPM-Solver++ 2M (arXiv:2211.01095 algorithm 2) or, if stochastic, its SDE form.

    The history is the last prediction of the clean latents. First order at the first call and where
    the result is clean.
    """
    x, v, last_clean = np.eye(3)
    # log-SNR is -inf at zero SNR and inf when clean. What follows has the right limits: the history
    # counts for nothing after a step from -inf, and e^-inf = 0.
    with np.errstate(divide="ignore"):
        log_snr, log_snr_next = (0.5 * np.log(a / (1 - a)) for a in (alpha, alpha_next))
    order = 2 if stochastic else 1
    mix = []
    for i, (now, then, h) in enumerate(zip(alpha, alpha_next, log_snr_next - log_snr, strict=True)):
        clean, _ = _predictions(now, x, v)
        extrapolated = clean
        if i > 0 and then < 1:
            extrapolated = clean + h / (2 * (log_snr[i] - log_snr[i - 1])) * (clean - last_clean)
        keep = np.sqrt((1 - then) / (1 - now)) * (np.exp(-h) if stochastic else 1)
        mix.append([keep * x - np.sqrt(then) * np.expm1(-order * h) * extrapolated, clean])
    noise_scale = np.sqrt((1 - alpha_next) * -np.expm1(-2 * (log_snr_next - log_snr)))
    return mix, noise_scale if stochastic else None


def _euler(sigmas, *, ancestral):
    """Euler steps on latents of variance 1 + sigma^2 (arXiv:2206.00364).

    An ancestral step goes down further and comes back up by adding noise.
    """
    x, v = np.eye(2)
    before, after = sigmas[:-1], sigmas[1:]
    down = after**2 / before if ancestral else after
    mix = []
    for now, then in zip(before, down, strict=True):
        clean = x / (now**2 + 1) - now / np.sqrt(now**2 + 1) * v
        mix.append([then / now * x + (1 - then / now) * clean])
    return mix, np.sqrt(after**2 - down**2) if ancestral else None


_ADAMS_BASHFORTH = (
    (1,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
# terms of PNDM: besides x and v, where the current step began, the weighted mean of its Runge-Kutta
# slopes so far, and the outputs at the last three steps
_X, _V, _BEGIN, _MEAN, _LAST1, _LAST2, _LAST3 = np.eye(7)


def _pndm(table, timesteps, stride, skip_prk_steps):
    """(timesteps, mix) of pseudo numerical methods (arXiv:2202.09778): F-PNDM, or else PLMS."""

    def transfer(begin, slope, now, then):
        """Equation 9: moves `begin` from `now` to `then` along `slope`, a mean of outputs v."""
        alpha, alpha_next = table[now], table[then] if then >= 0 else 1.0
        _, noise = _predictions(alpha, begin, slope)
        denominator = alpha * np.sqrt(1 - alpha_next) + np.sqrt(alpha * (1 - alpha) * alpha_next)
        return np.sqrt(alpha_next / alpha) * begin - (alpha_next - alpha) / denominator * noise

    if skip_prk_steps:
        timesteps = np.concatenate([timesteps[:2], timesteps[1:]])  # the second one twice
        return timesteps, _multistep(timesteps, stride, transfer, num_stored=0)
    # each of the first three steps calls at its begin, twice halfway and at its end
    halfway = timesteps[1:4] + stride // 2
    first = np.stack([timesteps[:3], halfway, halfway, timesteps[1:4]], axis=1).ravel()
    mix = _runge_kutta(first, stride, transfer)
    mix += _multistep(timesteps[3:], stride, transfer, num_stored=3)
    return np.concatenate([first, timesteps[3:]]), mix


def _runge_kutta(timesteps, stride, transfer):
    mix = []
    for i, t in enumerate(timesteps):
        stage = i % 4
        begin = _X if stage == 0 else _BEGIN
        slope = _MEAN + _V / 6 if stage == 3 else _V
        mean = _V / 6 if stage == 0 else _MEAN + _V / 3
        then = t if i % 2 else t - stride // 2
        last = [_V, _LAST1, _LAST2] if stage == 0 else [_LAST1, _LAST2, _LAST3]
        mix.append([transfer(begin, slope, timesteps[i - stage], then), begin, mean, *last])
    return mix


def _multistep(timesteps, stride, transfer, *, num_stored):
    """Adams-Bashforth of order 4, or less while fewer than three earlier outputs are stored."""
    mix = []
    for i, t in enumerate(timesteps):
        if i == 1 and num_stored == 1:  # the first step again, with the mean of its slopes
            x = transfer(_BEGIN, (_V + _LAST1) / 2, t + stride, t)
            mix.append([x, _BEGIN, _MEAN, _LAST1, _LAST2, _LAST3])
            continue
        outputs = (_V, _LAST1, _LAST2, _LAST3)[: num_stored + 1]
        slope = np.dot(_ADAMS_BASHFORTH[num_stored], outputs)
        mix.append([transfer(_X, slope, t, t - stride), _X, _MEAN, _V, _LAST1, _LAST2])
        num_stored = min(num_stored + 1, 3)
    return mix

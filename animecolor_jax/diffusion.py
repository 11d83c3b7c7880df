"""Noise schedule and v-prediction: what training and every sampler share.

With a = alphas_cumprod[t], clean latents x0 and standard normal noise e:

    noisy  x = sqrt(a) x0 + sqrt(1 - a) e
    target v = sqrt(a) e - sqrt(1 - a) x0, so that x0 = sqrt(a) x - sqrt(1 - a) v

Tables are NumPy arrays made on the host; the functions of latents are pure and jittable.
"""

import jax.numpy as jnp
import numpy as np


def alphas_cumprod(config, shift=False):
    """Fraction of signal variance left at each timestep.

    Training and the default sampler use the table without the SNR shift, as AnimeColor's
    DDPMScheduler and DDIMScheduler do; CogVideoX's own schedulers shift it by
    `config.snr_shift_scale`. Each is computed in the precision and order of its reference: the last
    entries are differences of nearly equal numbers and depend on both.

    Args:
        config: `SchedulerConfig`.
        shift: whether to apply the SNR shift.

    Returns:
        [num_train_timesteps], falling; float32 without the shift, float64 with it. The last entry
        is exactly 0 if `config.rescale_betas_zero_snr`.

    Source: scaled-linear schedule, arXiv:2112.10752; zero terminal SNR, arXiv:2305.08891 algorithm
        1; SNR shift, arXiv:2403.03206 section 5.3.2, as in CogVideoX (arXiv:2408.06072).
    """
    dtype = np.float64 if shift else np.float32
    start, end = dtype(config.beta_start**0.5), dtype(config.beta_end**0.5)
    alphas = 1 - _linspace(start, end, config.num_train_timesteps) ** 2
    table = _cumprod(alphas)
    if shift:
        scale = config.snr_shift_scale
        table = table / (scale + (1 - scale) * table)
    if config.rescale_betas_zero_snr:
        table = _zero_terminal_snr(table)
        if not shift:  # DDPM keeps betas, and recovers the table from them in float32
            betas = 1 - np.concatenate([table[:1], table[1:] / table[:-1]])
            table = _cumprod(1 - betas)
    return table


def _linspace(start, end, count):
    """Evenly spaced, in the dtype of `start`; torch counts each half from its own end."""
    index = np.arange(count, dtype=start.dtype)
    step = (end - start) / (count - 1)
    return np.where(index < count // 2, start + step * index, end - step * (count - 1 - index))


def _cumprod(alphas):
    """Cumulative product, accumulated in float64 as torch does on the CPU."""
    return np.cumprod(alphas, dtype=np.float64).astype(alphas.dtype)


def _zero_terminal_snr(table):
    """Shifts and scales sqrt(table) so that its last entry is 0 and its first one stays."""
    root = np.sqrt(table)
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def add_noise(clean, noise, timesteps, alphas_cumprod):
    """Forward process q(x_t | x_0).

    Args:
        clean: [B, T, H, W, C] latents, already multiplied by the VAE's scaling factor.
        noise: [B, T, H, W, C] standard normal.
        timesteps: [B] integers, indices into the table.
        alphas_cumprod: [num_train_timesteps] table.

    Returns:
        [B, T, H, W, C] float32.

    Source: DDPM (arXiv:2006.11239) eq. 4.
    """
    signal_scale, noise_scale = _scales(timesteps, alphas_cumprod, jnp.ndim(clean))
    return signal_scale * _float32(clean) + noise_scale * _float32(noise)


def velocity(clean, noise, timesteps, alphas_cumprod):
    """The network's target v. Arguments and result as in `add_noise`.

    Source: Progressive Distillation (arXiv:2202.00512) appendix D.
    """
    signal_scale, noise_scale = _scales(timesteps, alphas_cumprod, jnp.ndim(clean))
    return signal_scale * _float32(noise) - noise_scale * _float32(clean)


def clean_from_velocity(noisy, v, timesteps, alphas_cumprod):
    """The clean latents that a predicted `v` implies: the inverse of `add_noise` and `velocity`.

    Args:
        noisy: [B, T, H, W, C] latents at `timesteps`.
        v: [B, T, H, W, C] prediction of the network.
        timesteps: [B] integers, indices into the table.
        alphas_cumprod: [num_train_timesteps] table.

    Returns:
        [B, T, H, W, C] float32.
    """
    signal_scale, noise_scale = _scales(timesteps, alphas_cumprod, jnp.ndim(noisy))
    return signal_scale * _float32(noisy) - noise_scale * _float32(v)


def _scales(timesteps, alphas_cumprod, ndim):
    """Standard deviations of signal and noise at `timesteps`, [B, 1, ...] with `ndim` axes."""
    alpha = jnp.asarray(alphas_cumprod, jnp.float32)[timesteps]
    alpha = alpha.reshape(alpha.shape + (1,) * (ndim - alpha.ndim))
    return jnp.sqrt(alpha), jnp.sqrt(1 - alpha)


def _float32(x):
    return jnp.asarray(x, jnp.float32)

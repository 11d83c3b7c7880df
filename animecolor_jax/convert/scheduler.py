"""scheduler_config.json of diffusers <-> `SchedulerConfig`."""

from animecolor_jax.config import SchedulerConfig
from animecolor_jax.errors import InputError

# the only values that we compute
FIXED = {
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "clip_sample": False,
    "trained_betas": None,
}
FIELDS = ("num_train_timesteps", "beta_start", "beta_end", "rescale_betas_zero_snr", "snr_shift_scale")


def config_from_torch(config, where):
    """The noise schedule; keys that are not there have CogVideoX-2B's values.

    Raises:
        InputError: a schedule that this implementation does not compute.
    """
    for key, only in FIXED.items():
        if config.get(key, only) != only:
            raise InputError(
                f"{key} is {config[key]!r}",
                where=where,
                expected=f"{key} = {only!r}",
                fix="this noise schedule is not supported",
            )
    values = {}
    for field in FIELDS:
        default = getattr(SchedulerConfig(), field)
        value = config.get(field, default)
        if type(value) not in ((int, float) if isinstance(default, float) else (type(default),)):
            raise InputError(f"{field} is {value!r}", where=where, expected=f"a {type(default).__name__}")
        values[field] = type(default)(value)
    return SchedulerConfig(**values)


def config_to_torch(config):
    """scheduler_config.json of diffusers' CogVideoXDDIMScheduler, which the other schedulers read as well."""
    values = {field: getattr(config, field) for field in FIELDS}
    return {
        "_class_name": "CogVideoXDDIMScheduler",
        "clip_sample_range": 1.0,
        "sample_max_value": 1.0,
        **FIXED,
        **values,
    }

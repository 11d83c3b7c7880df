"""Every test runs on a CPU that pretends to be 8 devices, with exact float32 matrix products."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
if "ANIMECOLOR_TEST_PLATFORM" not in os.environ:  # -m gpu and -m tpu set it
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "float32")

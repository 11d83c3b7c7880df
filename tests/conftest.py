"""Every test runs on a CPU that pretends to be 8 devices, with exact float32 matrix products."""

import os

# Little machine-code optimisation: the tests compile far longer than they compute.
FLAGS = " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS
if "ANIMECOLOR_TEST_PLATFORM" not in os.environ:  # -m gpu and -m tpu set it
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "float32")

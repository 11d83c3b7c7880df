"""Every test runs on a CPU that pretends to be 8 devices, with exact float32 matrix products.

With `-m gpu` or `-m tpu` those that take the fixture `device` run on that device instead, as JAX finds it;
where there is none they fail.
"""

import os
import tempfile

import pytest

# Little machine-code optimisation: the tests compile far longer than they compute.
FLAGS = " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"


def accelerators(config):
    """Those of "gpu" and "tpu" that `-m` asks for."""
    return [kind for kind in ("gpu", "tpu") if kind in config.option.markexpr.split(" or ")]


def pytest_configure(config):
    """Chooses the devices, before anything imports JAX, and where compiled programs lie: in a folder of this
    run, which its workers and their processes share; the user's own stays as it is."""
    if accelerators(config):
        return
    if not hasattr(config, "workerinput"):
        programs = tempfile.TemporaryDirectory(prefix="animecolor-tests-", ignore_cleanup_errors=True)
        config.add_cleanup(programs.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_default_matmul_precision", "float32")


def pytest_generate_tests(metafunc):
    """Runs what takes `device` on those that `-m` asks for, else on the CPU."""
    if "device" in metafunc.fixturenames:
        asked = accelerators(metafunc.config)
        kinds = [pytest.param(kind, marks=getattr(pytest.mark, kind)) for kind in asked] or ["cpu"]
        metafunc.parametrize("device", kinds, indirect=True, scope="session")


@pytest.fixture(scope="session")
def device(request):
    """Kind of the devices that JAX computes on: "cpu", "gpu" or "tpu"."""
    import jax

    kind = request.param
    if jax.default_backend() != kind:
        settings = {name: os.environ.get(name) for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES")}
        pytest.fail(f"no {kind.upper()} is seen by JAX, only {jax.devices()}; environment: {settings}")
    return kind

"""Shares of a profile: operations are known by their names."""

import jax
import jax.numpy as jnp
import pytest

from animecolor_jax.benchmarks_profile import KINDS, kind_of, profile


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ynn_fusion.144", 0), ("dot_general.29", 0), ("conv_general_dilated.0", 0),
        ("subtract_exponential_fusion", 1), ("multiply_bitcast_fusion", 1), ("reduce.7", 1),
        ("copy.24", 2), ("concatenate_bitcast_fusion.1", 2), ("wrapped_broadcast.16", 2),
        ("bitcast_dynamic-update-slice_fusion.1", 2), ("while.3", None), ("end: ynn_fusion", None),
    ],
)  # fmt: skip
def test_an_operation_is_known_by_its_name(name, kind):
    assert kind_of(name) == (None if kind is None else KINDS[kind])


def test_a_program_of_products_is_profiled_as_such():
    x = jnp.ones((512, 512))
    run = jax.jit(lambda x: x @ x)
    shares = profile(lambda: jax.block_until_ready(run(x)))
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["products"] > 0.8

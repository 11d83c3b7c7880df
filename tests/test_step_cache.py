"""Steps that reuse what the blocks added: exact where they must be, and fewer runs for a larger threshold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from animecolor_jax import denoise
from animecolor_jax.config import preset
from animecolor_jax.errors import InputError
from animecolor_jax.pipeline import Pipeline
from animecolor_jax.sampling import make_sampler
from animecolor_jax.sharding import make_mesh
from animecolor_jax.weights import write_initial


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    write_initial(folder, preset("tiny"))
    pipeline = Pipeline.load(folder)
    pipeline.directory = folder
    return pipeline


@pytest.fixture(scope="module")
def clip():
    rng = np.random.default_rng(0)
    sketch = np.repeat(rng.integers(0, 256, (9, 32, 48, 1), np.uint8), 3, axis=-1)
    return sketch, rng.integers(0, 256, (32, 48, 3), np.uint8)


def test_a_threshold_below_every_change_gives_the_exact_clip(pipeline, clip):
    exact = pipeline(*clip, num_steps=4, guidance_scale=3.0)
    cached = pipeline(*clip, num_steps=4, guidance_scale=3.0, step_cache=1e-9)
    np.testing.assert_array_equal(cached, exact)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0},
        {"window": 9, "overlap": 4},
        pytest.param({"mesh": True}, marks=pytest.mark.slow),
    ],
)
def test_the_more_steps_reuse_the_more_a_clip_changes(pipeline, clip, options):
    options = dict(options)
    if options.pop("mesh", False):
        pipeline = Pipeline.load(pipeline.directory, mesh=make_mesh(data=2, context=2))
    sketch = np.concatenate([clip[0], clip[0][::-1]])[: 13 if "window" in options else 9]
    exact, some, all_but_two = (
        pipeline(sketch, clip[1], num_steps=8, **options, step_cache=value).astype(int)
        for value in (0.0, 1.5, 1e9)
    )
    errors = [np.abs(video - exact).mean() for video in (some, all_but_two)]
    assert 0 < errors[0] < errors[1] < 60


def test_the_residual_of_the_same_input_gives_the_same_v(pipeline):
    model, config = pipeline.model, pipeline.model.denoiser.config
    keys = iter(jax.random.split(jax.random.key(0), 3))
    latents, sketch = (jax.random.normal(next(keys), (1, 3, 4, 6, config.out_channels)) for _ in range(2))
    text = jax.random.normal(next(keys), (2, config.text_length, config.text_dim))
    reference = jnp.ones((1, 1, 4, 6, config.out_channels))
    summary = jnp.ones((1, 1, model.hce.config.summary_dim))
    conditions = model.conditions(reference, summary, jnp.ones((1, 1, 6, model.hce.config.feature_dim)))
    given = denoise.for_every_text(latents, sketch, text, 500)
    v, residual = model.with_residual(*given, conditions)
    again = model.from_residual(*given, residual)
    np.testing.assert_allclose(again, v, atol=1e-5)


def test_the_first_and_the_last_step_run_and_a_larger_threshold_runs_fewer(pipeline):
    sampler = make_sampler("ddim", 20, pipeline.scheduler)
    runs = [denoise.steps_to_run(pipeline.model.denoiser, sampler, value) for value in (1e-9, 1.5, 4.0, 1e9)]
    assert all(found[0] and found[-1] and len(found) == 20 for found in runs)
    counts = [found.sum() for found in runs]
    assert counts[0] == 20 > counts[1] > counts[2] > counts[3] == 2


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_an_impossible_threshold_is_refused(pipeline, clip, value):
    with pytest.raises(InputError, match="--step-cache"):
        pipeline(*clip, step_cache=value)


def test_samplers_that_call_the_network_twice_in_a_step_are_refused(pipeline, clip):
    with pytest.raises(InputError, match="pndm"):
        pipeline(*clip, sampler="pndm", step_cache=0.2)

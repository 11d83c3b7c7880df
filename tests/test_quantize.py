"""Matrices in int8: how far they are from what they were, and the same clip wherever they lie."""

import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from animecolor_jax import denoise, quantization, sharding
from animecolor_jax.compiling import programs
from animecolor_jax.config import COMPONENTS, preset
from animecolor_jax.errors import InputError
from animecolor_jax.metrics.image import psnr
from animecolor_jax.mini.recipe import ClipsConfig
from animecolor_jax.models.layers import linear
from animecolor_jax.networks import abstract
from animecolor_jax.pipeline import Pipeline
from animecolor_jax.weights import BUNDLED, Weights, write_initial
from data_pipeline.toon import draw_clip

NAME = "blocks/attn/q/kernel"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    write_initial(folder, preset("tiny"))
    return Weights(folder)


@pytest.fixture(scope="module")
def pipeline(weights):
    return Pipeline.load(weights.directory, quantize="int8")


def color(pipeline, frames=5, **options):
    rng = np.random.default_rng(0)
    sketch = np.repeat(rng.integers(0, 256, (frames, 32, 48, 1), np.uint8), 3, axis=-1)
    reference = rng.integers(0, 256, (32, 48, 3), np.uint8)
    options = {"prompt": "a cat", "num_steps": 3, "guidance_scale": 3.0, **options}
    return pipeline(sketch, reference, **options).astype(int)


def test_a_kernel_comes_back_within_half_a_step_of_its_column():
    kernel = np.random.default_rng(0).standard_normal((3, 24, 40)) * np.geomspace(1e-3, 1e3, 40)
    kernel[1, :, 3] = 0
    found = quantization.quantize(jnp.asarray(kernel, jnp.float32), NAME)
    assert found.qvalue.dtype == "int8" and found.scale.dtype == "float32" and found.scale.shape == (3, 1, 40)
    error = np.abs(np.asarray(found.qvalue, np.float64) * np.asarray(found.scale) - kernel)
    step = np.abs(kernel).max(axis=1, keepdims=True) / 127.5
    assert (error <= 0.5001 * step).all()
    assert error.max() > 0


@pytest.mark.parametrize("rank", [0, 4])
def test_a_layer_computes_with_what_its_kernel_stands_for(rank):
    layer = linear(24, 40, dtype="bfloat16", rank=rank, rngs=nnx.Rngs(0))
    if rank:
        layer.lora_b[...] = jax.random.normal(jax.random.key(3), (rank, 40))
    x = jax.random.normal(jax.random.key(1), (5, 24), jnp.bfloat16)
    kernel = jax.tree.map(lambda array: array[0], quantization.quantize(layer.kernel[...][None], NAME))
    layer.kernel.set_value(kernel.qvalue * kernel.scale)
    expected = layer(x)
    layer.kernel.set_value(kernel)
    assert layer(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(layer(x), expected)


@pytest.mark.parametrize("name", ["animecolor-2b", "mini-cpu"])
def test_all_matrices_of_stacks_are_quantised_and_nothing_else(name):
    kept, taken = set(), set()
    for component in COMPONENTS:
        for leaf, spec in abstract(component, getattr(preset(name), component)).items():
            if quantization.is_quantized("int8", component, leaf):
                assert leaf.endswith("kernel") and len(spec.shape) == 3
                taken.add(component)
            elif component != "vae" and len(spec.shape) > 2:
                kept.add(f"{component}/{leaf}")
    assert taken == {"denoiser", "lcg", "hce", "text_encoder", "image_encoder"}
    assert kept == {"denoiser/patch_embed/kernel", "lcg/patch_embed/kernel"}  # four-dimensional


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0, "step_cache": 1.5, "num_steps": 5}])
def test_clips_stay_near(weights, pipeline, options):
    exact = color(Pipeline.load(weights.directory), **options)
    assert 0 < np.abs(color(pipeline, **options) - exact).mean() < 2.5  # of 255; it came to 1.2


@pytest.mark.slow
def test_a_clip_is_the_same_offloaded_and_on_another_device(weights, pipeline):
    expected, device = color(pipeline), jax.devices()[1]
    offloaded = Pipeline.load(weights.directory, quantize="int8", offload="yes")
    np.testing.assert_array_equal(color(offloaded), expected)
    np.testing.assert_array_equal(color(offloaded.copy_to(device)), expected)
    copied = jax.tree.leaves(pipeline.copy_to(device).model)
    for ours, theirs in zip(copied, jax.tree.leaves(pipeline.model), strict=True):
        assert ours.devices() == {device} and ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@jax.jit
def predict(model, text_encoder):
    """v of two texts from a reference, all three networks of the model and the text encoder at work."""
    config, hce = model.denoiser.config, model.hce.config
    keys = iter(jax.random.split(jax.random.key(0), 5))
    draw = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    latents, sketch, reference = (draw(1, frames, 4, 6, config.out_channels) for frames in (3, 3, 1))
    conditions = model.conditions(reference, draw(1, 1, hce.summary_dim), draw(1, 1, 6, hce.feature_dim))
    text = text_encoder(jnp.arange(2 * config.text_length).reshape(2, -1))
    return denoise.predict(model, latents, sketch, text, 500, conditions, None)


def test_networks_are_the_same_on_a_mesh(weights, pipeline):
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    found = Pipeline.load(weights.directory, quantize="int8", mesh=mesh)
    for ours, theirs in zip(*(jax.tree.leaves(each.model) for each in (found, pipeline)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    kernel = found.model.denoiser.blocks.attn.q.kernel.get_value()
    assert kernel.qvalue.sharding.spec == P(None, "fsdp", "tensor")
    assert kernel.scale.sharding.spec == P(None, None, "tensor")
    with jax.set_mesh(mesh):
        v = predict(found.model, found.text_encoder)
    np.testing.assert_allclose(v, predict(pipeline.model, pipeline.text_encoder), atol=1e-4)


def test_bytes_on_a_device_are_those_of_its_share(weights):
    options = {"dtype": "bfloat16", "mesh": sharding.make_mesh(fsdp=2, tensor=2)}
    counted = weights.bytes_on_device(**options, quantize="int8")
    loaded = [weights.load(name, **options, quantize="int8") for name in COMPONENTS]
    assert counted == sum(map(sharding.bytes_on_device, loaded))
    assert counted < weights.bytes_on_device(**options)


def test_a_compiled_program_takes_less_by_as_much():
    mesh, clip = sharding.make_mesh(devices=jax.devices()[:1]), programs.Clip(9, 64, 96)
    taken, held = [], []
    for mode in quantization.MODES:
        colouring = programs.Colouring(preset("tiny"), clip, mesh, "bfloat16", quantize=mode)
        held.append(sharding.bytes_on_device(colouring.leaves("text_encoder")))
        (program,) = colouring.text()
        taken.append(program.lower().compile().memory_analysis().argument_size_in_bytes)
    assert taken[0] - taken[1] == held[0] - held[1] > 0


def test_another_mode_and_a_missing_package_are_refused(weights, monkeypatch):
    with pytest.raises(InputError, match="--quantize"):
        weights.load("hce", quantize="int4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install qwix"):
        Pipeline.load(weights.directory, quantize="int8")


def bundled_clips(count):
    """Drawn clips that the bundled model has not seen."""
    config, size = ClipsConfig(), Weights(BUNDLED).inference.size
    return [
        draw_clip(
            config.frames, *size, seed=config.test_seed + number, fps=config.fps, config=config.test_toon
        )
        for number in range(count)
    ]  # fmt: skip


def test_the_bundled_model_stays_near():
    (clip,) = bundled_clips(1)
    exact, found = (
        Pipeline.load(BUNDLED, quantize=mode)(clip.line_art[:1], clip.reference, num_steps=3, progress=False)
        for mode in quantization.MODES
    )
    assert np.mean(psnr(found, exact)) > 48  # it came to 56


@pytest.mark.slow
def test_eight_clips_stay_near():
    """The table of docs/performance.md; -s prints it."""
    clips, weights, exact = bundled_clips(8), Weights(BUNDLED), None
    for dtype, mode in itertools.product(("float32", "bfloat16"), quantization.MODES):
        pipeline = Pipeline.load(BUNDLED, dtype=dtype, quantize=mode)
        videos = [pipeline(clip.line_art, clip.reference, progress=False) for clip in clips]
        exact = videos if exact is None else exact
        near, true = (
            np.mean([np.mean(psnr(*pair)) for pair in zip(videos, others, strict=True)])
            for others in (exact, [clip.color for clip in clips])
        )
        size = weights.bytes_on_device(dtype, quantize=mode) / 1e6
        print(f"{dtype} {mode}: {size:.1f} MB, {near:.1f} dB to float32, {true:.2f} dB to the truth")
        assert near > 48 and true > 19.4

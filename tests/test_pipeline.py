"""Sketch + reference -> video: sizes, windows, noise, devices."""

import dataclasses
import json

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from animecolor_jax import denoise
from animecolor_jax.config import preset
from animecolor_jax.convert.checkpoint import convert_checkpoint
from animecolor_jax.errors import InputError
from animecolor_jax.pipeline import Noise, NonFiniteError, Pipeline
from animecolor_jax.sharding import make_mesh
from animecolor_jax.weights import Weights, write_initial
from data_pipeline.toon import draw_clip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Weights of the fixture, all parameters random, with a byte-level tokenizer: every input has an
    effect."""
    root = tmp_path_factory.mktemp("pipeline")
    source = checkpoints.write_checkpoint(root / "torch")
    tokenizer = source / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "byte_level.json").write_text(json.dumps({"type": "byte-level"}))
    convert_checkpoint(source, root / "weights")
    return root / "weights"


@pytest.fixture(scope="module")
def pipeline(directory):
    return Pipeline.load(directory)


@pytest.fixture(scope="module")
def clip():
    return draw_clip(num_frames=17, height=32, width=48)


# the fixture's text encoder knows 64 tokens: bytes up to "<"
FAST = {
    "num_steps": 2,
    "guidance_scale": 1.0,
    "prompt": "1",
    "negative_prompt": "2",
    "window": 17,
    "overlap": 8,
}


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 32, 48), (6, 31, 45), (9, 32, 48)])
def test_result_has_exactly_the_size_and_length_of_the_sketch(pipeline, clip, frames, height, width):
    video = pipeline(clip.line_art[:frames, :height, :width], clip.reference, **FAST)
    assert video.shape == (frames, height, width, 3) and video.dtype == np.uint8


def test_a_key_repeats_bit_for_bit_and_another_differs(pipeline, clip):
    def run(seed):
        return pipeline(clip.line_art[:9], clip.reference, key=jax.random.key(seed), **FAST)

    first = run(0)
    np.testing.assert_array_equal(first, run(0))
    assert (first != run(1)).any()


def test_prompt_guidance_and_references_have_an_effect(pipeline, clip):
    base = {**FAST, "guidance_scale": 4.0}

    def run(reference=clip.reference, **changes):
        return pipeline(clip.line_art[:9], reference, **{**base, **changes}).astype(int)

    first = run()
    assert (first != run(prompt="3")).any()
    assert (first != run(negative_prompt="3")).any()
    assert (first != run(guidance_scale=5.0)).any()
    assert (first != run(dynamic_guidance=True)).any()
    assert (first != run(reference=255 - clip.reference)).any()
    assert (first != run(reference=[clip.reference, 255 - clip.reference])).any()


@pytest.mark.parametrize("sampler", ["dpm-cog", "euler-a", "pndm"])
def test_samplers_with_noise_history_and_extra_calls_run(pipeline, clip, sampler):
    first, again = (
        pipeline(clip.line_art[:9], clip.reference, **{**FAST, "num_steps": 4, "sampler": sampler})
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, again)


def test_given_noise_is_used(pipeline, clip):
    rng = np.random.default_rng(0)
    noise = Noise(rng.normal(size=(1, 1, 4, 6, 4)), rng.normal(size=(3, 4, 6, 4)))

    def run(noise, seed=0):
        return pipeline(clip.line_art[:9], clip.reference, noise=noise, key=jax.random.key(seed), **FAST)

    first = run(noise)
    np.testing.assert_array_equal(first, run(noise, seed=1))
    assert (first != run(Noise(noise.reference + 1, noise.latents))).any()
    with pytest.raises(InputError, match=r"latents noise has shape \(2, 4, 6, 4\)"):
        run(Noise(noise.reference, noise.latents[:2]))


def test_the_official_pipeline_is_reproduced_from_pixels(pipeline):
    """Through the public call: ids, noise and uint8 pixels of the fixture, whose frames lie on the
    1/255 grid."""
    tensors, config = checkpoints.fixture()
    case = "ddim_cfg"
    spec = config["cases"][case]
    inputs = {key.rsplit("/", 1)[1]: x for key, x in tensors.items() if key.startswith(f"inputs/{case}/")}
    ids = np.concatenate([inputs["negative_prompt_ids"], inputs["prompt_ids"]])
    tokenized = Pipeline(**{**vars_of(pipeline), "tokenizer": lambda texts, length: ids})
    to_bytes = lambda x: np.round(x * 255).astype(np.uint8)  # noqa: E731
    sketch = to_bytes(inputs["control_video"][0].transpose(1, 2, 3, 0))
    image = to_bytes(inputs["ref_image"][0].transpose(1, 2, 0))
    noise = Noise(
        inputs["ref_noise"].transpose(0, 2, 3, 4, 1), inputs["init_latents"][0].transpose(0, 2, 3, 1)
    )
    video = tokenized(
        sketch,
        image,
        num_steps=spec["steps"],
        guidance_scale=spec["guidance_scale"],
        noise=noise,
        strict_reference=True,
        window=17,
        overlap=8,
    )
    expected = tensors[f"outputs/{case}/videos"][0].transpose(1, 2, 3, 0) * 255
    np.testing.assert_allclose(video, expected, atol=0.55)  # half a level of rounding


def vars_of(pipeline):
    names = ("model", "vae", "text_encoder", "image_encoder", "tokenizer", "scheduler", "mesh")
    return {name: getattr(pipeline, name) for name in names}


def test_windows_share_latents_and_keep_their_first():
    layout = denoise.Layout.of([0, 8], 5)  # 17-frame windows over 25 frames: latents 0..4 and 2..6
    assert layout.total == 7
    np.testing.assert_array_equal(layout.index, [[0, 1, 2, 3, 4], [8, 3, 4, 5, 6]])
    noise = layout.spread(jax.random.key(0), (2, 2, 4))
    np.testing.assert_array_equal(noise[0, 3:], noise[1, 1:3])
    clip = layout.join(noise)
    assert clip.shape == (1, 7, 2, 2, 4)
    np.testing.assert_array_equal(clip[0, :5], noise[0])
    np.testing.assert_array_equal(clip[0, 5:], noise[1, 3:])


def test_blending_makes_windows_agree_and_leaves_agreement_alone():
    layout = denoise.Layout.of([0, 16, 24], 9)
    v = jax.random.normal(jax.random.key(0), (3, 9, 2))
    blended = denoise.blend(v, layout.weights, layout.index)
    np.testing.assert_allclose(denoise.blend(blended, layout.weights, layout.index), blended, atol=1e-6)
    for frame in np.unique(layout.index):
        values = blended[layout.index == frame]
        np.testing.assert_allclose(values, np.broadcast_to(values[:1], values.shape), atol=1e-6)
        own = v[layout.index == frame]
        assert (values[0] <= own.max(0) + 1e-6).all() and (values[0] >= own.min(0) - 1e-6).all()
    np.testing.assert_allclose(blended[1:, 0], v[1:, 0])  # single-frame latents take no part


def test_one_window_is_not_blended():
    layout = denoise.Layout.of([0], 5)
    v = jax.random.normal(jax.random.key(0), (1, 5, 3))
    np.testing.assert_array_equal(denoise.blend(v, layout.weights, layout.index), v)


def test_a_long_clip_is_coloured_in_windows(pipeline):
    clip = draw_clip(num_frames=22, height=32, width=48)
    video = pipeline(clip.line_art, clip.reference, **FAST)
    assert video.shape == clip.line_art.shape


def test_several_devices_give_the_result_of_one(directory, pipeline, clip):
    mesh = make_mesh(data=2, fsdp=2, context=2)
    sharded = Pipeline.load(directory, mesh=mesh)
    kernel = sharded.model.denoiser.blocks.attn.q.kernel
    assert kernel[...].addressable_shards[0].data.shape == (4, 24, 48), "parameters are sharded over fsdp"
    one, many = (p(clip.line_art[:9], clip.reference, **FAST).astype(int) for p in (pipeline, sharded))
    assert np.abs(one - many).max() <= 1


def test_damaged_weights_stop_at_the_first_step(directory, clip):
    broken = Pipeline.load(directory)
    broken.model.denoiser.out.bias[...] = jnp.full_like(broken.model.denoiser.out.bias[...], jnp.nan)
    with pytest.raises(NonFiniteError, match="after step 0 of ddim in float32"):
        broken(clip.line_art[:9], clip.reference, **FAST)


def test_tokens_that_the_text_encoder_does_not_know_are_refused(pipeline, clip):
    with pytest.raises(InputError, match="token 125 .* the text encoder knows 64"):
        pipeline(clip.line_art[:9], clip.reference, **{**FAST, "prompt": "z"})


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"sampler": "dpm"}, "sampler"),
        ({"window": 49}, "--window"),
        ({"window": 16}, "--window"),
        ({"overlap": 7}, "--overlap"),
    ],
)
def test_impossible_numbers_are_refused(pipeline, clip, changes, where):
    with pytest.raises(InputError) as error:
        pipeline(clip.line_art, clip.reference, **{**FAST, **changes})
    assert error.value.where == where


@pytest.mark.slow
def test_bfloat16_stays_near_float32(directory, clip):
    half = Pipeline.load(directory, dtype="bfloat16")
    assert half.dtype == "bfloat16" and half.model.denoiser.out.kernel.dtype == jnp.bfloat16
    video = half(clip.line_art[:9], clip.reference, **FAST)
    assert video.shape == (9, 32, 48, 3) and video.std() > 0


def test_tiny_weights_load_and_say_what_they_are(tmp_path):
    config = preset("tiny")
    write_initial(tmp_path / "tiny", config)
    weights = Weights(tmp_path / "tiny")
    assert weights.config == dataclasses.replace(config)
    assert "untrained" in weights.values["provenance"]["denoiser"]["initialised"]


def test_missing_components_are_named(directory, tmp_path):
    import shutil

    copy = shutil.copytree(directory, tmp_path / "copy")
    values = json.loads((copy / "config.json").read_text())
    for name in ("lcg", "image_encoder"):
        del values["components"][name]
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="lacks lcg, image_encoder"):
        Pipeline.load(copy)

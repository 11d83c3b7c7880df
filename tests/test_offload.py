"""Networks that wait in the host's memory: the same clip, and only one of them on the device at a time."""

import contextlib
import gc

import jax
import numpy as np
import pytest

from animecolor_jax import denoise, offload
from animecolor_jax.config import preset
from animecolor_jax.errors import InputError
from animecolor_jax.pipeline import Pipeline
from animecolor_jax.sharding import make_mesh
from animecolor_jax.weights import Weights, write_initial


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    write_initial(folder, preset("tiny"))
    return Weights(folder)


def held():
    """Bytes on the devices."""
    return sum(array.nbytes for array in jax.live_arrays())


def color(pipeline, prompt="a cat", reference=0):
    sketch = np.repeat(np.random.default_rng(0).integers(0, 256, (5, 32, 48, 1), np.uint8), 3, axis=-1)
    reference = np.random.default_rng([1, reference]).integers(0, 256, (32, 48, 3), np.uint8)
    return pipeline(sketch, reference, prompt=prompt, num_steps=2)


def test_a_clip_is_the_same_with_one_network_at_a_time_on_the_device(weights, monkeypatch, device):
    levels = 0 if device == "cpu" else 1  # of grey: a GPU's compiler may choose kernels for each program
    expected = color(Pipeline.load(weights.directory, offload="no"))
    gc.collect()
    before, seen, denoise_step = held(), {}, denoise.denoise_step
    pipeline = Pipeline.load(weights.directory, offload="yes")
    assert held() - before < 1000  # all wait

    def watched(name):
        original = getattr(denoise, name)

        def call(*args, **kwargs):
            seen[name] = held() - before
            return original(*args, **kwargs)

        monkeypatch.setattr(denoise, name, call)

    for name in ("encode_text", "encode_image", "denoise_step"):
        watched(name)
    np.testing.assert_allclose(color(pipeline), expected, rtol=0, atol=levels)
    compiled = denoise_step._cache_size()
    np.testing.assert_allclose(color(pipeline), expected, rtol=0, atol=levels)
    assert denoise_step._cache_size() == compiled  # nothing is compiled for the second clip
    everything = weights.bytes_on_device()
    assert max(seen["encode_text"], seen["encode_image"]) < everything / 2
    assert seen["denoise_step"] < everything
    assert held() - before < everything / 10


def test_what_clips_share_is_encoded_once(weights, monkeypatch):
    pipeline, calls, load = Pipeline.load(weights.directory, offload="yes"), [], offload.on_devices

    @contextlib.contextmanager
    def watched(network):
        calls.extend(name for name, value in vars(pipeline).items() if value is network)
        with load(network) as there:
            yield there

    monkeypatch.setattr("animecolor_jax.pipeline.on_devices", watched)
    first = color(pipeline)
    for prompt, reference, expected in (
        ("a cat", 0, set()), ("a dog", 0, {"text_encoder"}), ("a dog", 1, {"image_encoder"}),
    ):  # fmt: skip
        calls.clear()
        video = color(pipeline, prompt, reference)
        assert set(calls) & {"text_encoder", "image_encoder"} == expected
        if not expected:
            np.testing.assert_array_equal(video, first)
    np.testing.assert_array_equal(video, color(Pipeline.load(weights.directory), "a dog", 1))


def test_offloaded_networks_return_to_their_places_on_a_mesh(weights):
    mesh = make_mesh(fsdp=2, context=2)
    networks = [Pipeline.load(weights.directory, mesh=mesh, offload=mode).model for mode in ("no", "yes")]
    with offload.on_devices(networks[1]) as back, offload.on_devices(networks[1]) as nested:
        assert nested is back
        for ours, theirs in zip(*map(jax.tree.leaves, (back, networks[0])), strict=True):
            assert ours.sharding == theirs.sharding
            np.testing.assert_array_equal(ours, theirs)
    assert offload.structure(networks[1]).denoiser.config == networks[0].denoiser.config


def test_bytes_on_a_device_are_those_of_its_share(weights):
    whole = weights.bytes_on_device()
    loaded = [
        weights.load(name) for name in ("denoiser", "lcg", "hce", "vae", "text_encoder", "image_encoder")
    ]
    assert whole == sum(leaf.nbytes for network in loaded for leaf in jax.tree.leaves(network))
    assert weights.bytes_on_device("bfloat16") < 0.51 * whole


@pytest.mark.parametrize(
    ("mode", "limit", "needed"),
    [
        ("yes", None, True),
        ("no", 10, False),
        ("auto", None, False),
        ("auto", 199, True),
        ("auto", 200, False),
    ],
)
def test_networks_are_offloaded_where_they_take_more_than_half(mode, limit, needed):
    assert offload.is_needed(mode, 100, limit) is needed


def test_processes_that_share_networks_keep_them():
    assert not offload.is_needed("auto", 100, 100, several_processes=True)
    with pytest.raises(InputError, match="several processes"):
        offload.is_needed("yes", 100, 100, several_processes=True)


def test_another_mode_is_refused():
    with pytest.raises(InputError, match="auto, yes, no"):
        offload.is_needed("maybe", 1, None)

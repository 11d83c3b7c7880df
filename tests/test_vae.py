"""The causal VAE: chunks and caches, tiles, conversion. Parity with the fixtures is in test_parity.py."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from animecolor_jax import params
from animecolor_jax.config import VAEConfig
from animecolor_jax.convert import vae as convert
from animecolor_jax.convert.rules import matching_rules, sources
from animecolor_jax.errors import InputError
from animecolor_jax.models.vae import VAE, decode_slices, encode_slices, posterior
from animecolor_jax.models.vae_tiling import tiled_decode, tiled_encode
from animecolor_jax.sharding import make_mesh

FIXTURES = Path(__file__).parent / "fixtures"

# many small programs, each run once or twice: what is not optimised compiles in half the time
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
encode, decode = jit(VAE.encode), jit(VAE.decode)


TENSORS = load_file(FIXTURES / "vae.safetensors")
CONFIG = convert.config_from_torch(
    json.loads((FIXTURES / "vae.json").read_text())["config"]["model"], {}, "vae.json"
)


def create(config):
    """Function of nothing that builds the VAE."""
    return lambda: VAE(config, rngs=nnx.Rngs(0))


def leaf_sources(config):
    return sources(convert.RULES, params.abstract(create(config))[1])


@pytest.fixture(scope="module")
def vae():
    """The VAE of the fixture, converted from its torch weights."""
    table = leaf_sources(CONFIG)
    leaves = {name: source.load(lambda key: TENSORS[f"weights/{key}"]) for name, source in table.items()}
    return params.build(create(CONFIG), leaves, what="fixture", dtype="float32")


def tensor(key):
    """A video or latents of the fixture, channels last."""
    return jnp.asarray(np.moveaxis(TENSORS[key], 1, -1))


def assert_close(ours, theirs):
    """Equal but for rounding, as far as the fixture's tolerance says."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_chunk_by_chunk_equals_the_whole_clip(vae):
    pixels, latents = tensor("inputs/f17/pixels"), tensor("outputs/f17/mean")
    for step, whole, x, slices in (
        (jit(VAE.encode_chunk), encode, pixels, encode_slices(pixels.shape[1], CONFIG)),
        (jit(VAE.decode_chunk), decode, latents, decode_slices(latents.shape[1], CONFIG)),
    ):
        parts, state = [], None
        for part in slices:
            out, state = step(vae, x[:, part], state)
            parts.append(out)
        assert len(parts) > 1
        assert_close(jnp.concatenate(parts, axis=1), whole(vae, x))


def test_devices_share_the_rows_of_a_chunk(vae):
    latents = jax.random.normal(jax.random.key(0), (1, 3, 8, 6, CONFIG.latent_channels))
    pixels = jax.random.uniform(jax.random.key(1), (1, 9, 64, 48, 3), minval=-1)
    mesh = make_mesh(context=4)
    for step, x in ((VAE.decode_chunk, latents), (VAE.encode_chunk, pixels)):
        # a function of its own for each mesh: what was traced for one is not found for another
        alone, shared = (jit(lambda vae, x, step=step: step(vae, x)[0]) for _ in range(2))
        alone = alone.lower(vae, x).compile()
        with jax.set_mesh(mesh):
            shared = shared.lower(vae, x).compile()
            found = shared(vae, x)
        assert_close(found, alone(vae, x))
        assert "collective-permute" in shared.as_text()  # rows of the neighbours
        taken, whole = (each.memory_analysis().temp_size_in_bytes for each in (shared, alone))
        assert taken < 0.6 * whole


def test_a_later_chunk_depends_on_the_one_before(vae):
    latents = tensor("outputs/f17/mean")
    change = decode(vae, latents.at[:, 0].add(1.0)) - decode(vae, latents)
    assert change.shape[1] == 9 + 8
    assert np.abs(change[:, 9:]).max() > 1e-3


def test_an_encode_leaves_nothing_for_the_next(vae):
    image, clip = tensor("inputs/f1/pixels"), tensor("inputs/f5/pixels")
    first = encode(vae, clip)
    encode(vae, image)
    np.testing.assert_array_equal(encode(vae, clip), first)


def test_chunks_split_as_in_the_official_class():
    lengths = lambda slices: [part.stop - part.start for part in slices]  # noqa: E731
    config = VAEConfig()
    for frames, expected in {1: [1], 4: [4], 5: [5], 7: [7], 8: [4, 4], 10: [6, 4], 17: [5, 4, 4, 4]}.items():
        slices = encode_slices(frames, config)
        assert lengths(slices) == expected
        assert [i for part in slices for i in range(part.start, part.stop)] == list(range(frames))
    for frames, expected in {1: [1], 2: [2], 3: [3], 6: [2, 2, 2], 13: [3, 2, 2, 2, 2, 2]}.items():
        assert lengths(decode_slices(frames, config)) == expected
    chunk8 = dataclasses.replace(config, encode_chunk=8)
    assert lengths(encode_slices(5, chunk8)) == [5]
    assert lengths(encode_slices(17, chunk8)) == [9, 8]


def test_results_have_the_compute_dtype():
    half = nnx.eval_shape(create(dataclasses.replace(CONFIG, dtype="bfloat16")))
    video = jax.ShapeDtypeStruct((1, 9, 16, 24, 3), jnp.float32)
    moments = jax.eval_shape(VAE.encode, half, video)
    assert (moments.shape, moments.dtype) == ((1, 3, 2, 3, 8), jnp.bfloat16)
    mean, _ = jax.eval_shape(posterior, moments)
    decoded = jax.eval_shape(VAE.decode, half, mean)
    assert (decoded.shape, decoded.dtype) == (video.shape, jnp.bfloat16)


def test_an_even_number_of_latents_gives_four_frames_each(vae):
    for latents in range(1, 8):
        video = jax.eval_shape(decode, vae, jax.ShapeDtypeStruct((1, latents, 2, 3, 4), jnp.float32))
        assert video.shape == (1, 4 * latents if latents % 2 == 0 else 4 * (latents - 1) + 1, 16, 24, 3)


@pytest.mark.parametrize("frames", [0, 2, 3])
def test_frames_that_make_no_latents_are_refused(vae, frames):
    with pytest.raises(InputError, match="1 frame, or at least 4"):
        vae.encode(jnp.zeros((1, frames, 16, 16, 3)))


@pytest.mark.parametrize("run", [encode, tiled_encode])
def test_a_size_of_broken_latents_is_refused(vae, run):
    with pytest.raises(InputError, match="multiples of 8"):
        run(vae, jnp.zeros((1, 1, 16, 20, 3)))


@pytest.mark.parametrize("tile", [(40, 40), (48, 48), (0, 40)])
def test_tiles_whose_overlaps_are_not_whole_are_refused(vae, tile):
    with pytest.raises(InputError, match="a multiple of 48 by a multiple of 40"):
        tiled_encode(vae, jnp.zeros((1, 1, 64, 64, 3)), *tile)
    with pytest.raises(InputError, match="a multiple of 48 by a multiple of 40"):
        tiled_decode(vae, jnp.zeros((1, 1, 8, 8, 4)), *tile)


@pytest.mark.parametrize("size", [(48, 40), (64, 72), (48, 80), (136, 40), (104, 152)])
def test_blending_tiles_of_a_local_function_gives_the_function(vae, size):
    latents = np.random.default_rng(0).standard_normal((1, 2, size[0] // 8, size[1] // 8, 3), np.float32)
    enlarge = lambda vae, x: jnp.repeat(jnp.repeat(x, 8, axis=2), 8, axis=3)  # noqa: E731
    video = enlarge(vae, latents)
    np.testing.assert_allclose(tiled_decode(vae, latents, 48, 40, decode=enlarge), video, atol=1e-6)
    shrunk = tiled_encode(vae, video, 48, 40, encode=lambda vae, x: x[:, :, ::8, ::8])
    np.testing.assert_allclose(shrunk, latents, atol=1e-6)


def test_what_fits_into_one_tile_is_not_split(vae):
    image = tensor("inputs/f1/pixels")  # 32x48
    assert_close(tiled_encode(vae, image, 48, 80), encode(vae, image))


def test_tiles_of_equal_size_are_compiled_once(vae):
    traced = []

    @jax.jit
    def shrink(vae, x):
        traced.append(x.shape[2:4])
        return x[:, :, ::8, ::8]

    tiled_encode(vae, jnp.zeros((1, 1, 128, 104, 3)), 48, 40, encode=shrink)  # 4 x 4 tiles
    assert sorted(traced) == sorted(set(traced)) == [(8, 8), (8, 40), (48, 8), (48, 40)]


def test_every_key_of_the_real_checkpoint_fills_one_parameter():
    manifest = json.loads((FIXTURES / "manifests" / "vae_2b.json").read_text())
    config = convert.config_from_torch({}, {}, "defaults")
    assert config == VAEConfig()
    wanted = {key: list(source.shape) for source in leaf_sources(config).values() for key in source.keys}
    assert wanted == {key: shape for key, (shape, _) in manifest["keys"].items()}
    assert all(len(matching_rules(convert.RULES, key)) == 1 for key in manifest["keys"])
    assert params.parameter_count(create(config)) == manifest["total_parameters"]


def test_config_survives_the_way_through_torch():
    config = VAEConfig(block_out_channels=(32, 64), temporal_compression=2, scaling_factor=0.7)
    written = json.dumps(convert.config_to_torch(config))
    assert convert.config_from_torch(json.loads(written), {}, "") == config
    assert convert.config_from_torch({"temporal_compression_ratio": 4.0}, {}, "") == VAEConfig()


@pytest.mark.parametrize(
    "change",
    [
        {"act_fn": "relu"},
        {"use_quant_conv": True},
        {"use_post_quant_conv": True},
        {"pad_mode": "replicate"},
        {"shift_factor": 0.1},
        {"latents_mean": [0.0]},
        {"invert_scale_latents": True},
        {"_class_name": "AutoencoderKL"},
        {"down_block_types": ["DownEncoderBlock2D"] * 4},
        {"up_block_types": ["CogVideoXUpBlock3D"] * 3},
        {"block_out_channels": [128]},
        {"block_out_channels": [128, 200]},
        {"temporal_compression_ratio": 3},
        {"temporal_compression_ratio": 16},
        {"layers_per_block": 0},
        {"norm_eps": "small"},
    ],
    ids=str,
)
def test_a_variant_that_is_not_computed_is_refused_by_name(change):
    ((key, value),) = change.items()
    with pytest.raises(InputError) as raised:
        convert.config_from_torch(change, {}, "vae/config.json")
    assert key in raised.value.what and repr(value) in raised.value.what
    assert raised.value.where == "vae/config.json"


@pytest.mark.slow  # test_convert.py loads every export in diffusers
@pytest.mark.torch
def test_exported_weights_load_in_diffusers_and_agree(vae, tmp_path):
    import torch
    from diffusers import AutoencoderKLCogVideoX

    leaves, table = params.extract(vae), leaf_sources(CONFIG)
    state = {source.keys[0]: source.save(np.asarray(leaves[leaf])) for leaf, source in table.items()}
    (tmp_path / "config.json").write_text(json.dumps(convert.config_to_torch(CONFIG)))
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    theirs = AutoencoderKLCogVideoX.from_pretrained(tmp_path)
    theirs.num_sample_frames_batch_size = CONFIG.encode_chunk

    # not 4 k + 1 frames: one chunk of 6, and an even number of latents
    video = np.random.default_rng(0).uniform(-1, 1, (1, 6, 16, 24, 3)).astype(np.float32)
    with torch.no_grad():
        posteriors = theirs.encode(torch.from_numpy(np.moveaxis(video, -1, 1).copy())).latent_dist
        decoded = theirs.decode(posteriors.mean).sample
    assert_close(encode(vae, video), np.moveaxis(posteriors.parameters.numpy(), 1, -1))
    latents = np.moveaxis(posteriors.mean.numpy(), 1, -1)
    assert_close(decode(vae, latents), np.moveaxis(decoded.numpy(), 1, -1))

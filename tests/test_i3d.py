"""I3D: parity with the reference, TensorFlow's padding, both preprocessings, and both published files."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from animecolor_jax import params
from animecolor_jax.convert import metrics, metrics_i3d, rules
from animecolor_jax.convert.state_dict import open_mapping
from animecolor_jax.errors import InputError
from animecolor_jax.metrics import i3d
from animecolor_jax.parity.check import KINDS
from animecolor_jax.parity.metrics_i3d import create_i3d, procedural_i3d

FIXTURES = Path(__file__).parent / "fixtures" / "metrics"
RECORDED = load_file(FIXTURES / "i3d.safetensors")
CONFIG = json.loads((FIXTURES / "i3d.json").read_text())["config"]
MANIFEST = json.loads((FIXTURES / "manifests" / "i3d_pretrained_400.json").read_text())["keys"]
SHAPES = {key: tuple(shape) for key, (shape, _) in MANIFEST.items()}


@pytest.fixture(scope="module")
def weights():
    """{torch key: array} of i3d_pretrained_400.pt."""
    return procedural_i3d()


SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in ("clip16", "clip20_portrait")]


@pytest.mark.parametrize("case", ["clip11_48x54", *SLOW])
def test_every_recorded_output_is_reproduced(case):
    config = {"cases": {case: CONFIG["cases"][case]}, "fvd_cases": []}
    outputs = dict(KINDS["i3d"](RECORDED, config, "float32", "auto"))
    recorded = {key.removeprefix("outputs/"): value for key, value in RECORDED.items()}
    recorded = {name: x for name, x in recorded.items() if name.startswith((f"{case}/", "float_values/"))}
    assert set(recorded) == set(outputs)
    for name, expected in recorded.items():
        ours = np.asarray(outputs[name])
        assert ours.shape == expected.shape, name
        bound = 1e-5 if name.endswith("logits") else 2e-5
        assert np.abs(ours - expected).max() <= bound * np.abs(expected).max(), name


@pytest.mark.parametrize("size, stride", [(1, 1), (3, 1), (7, 2)])
@pytest.mark.parametrize("shape", [(8, 8, 8), (5, 7, 6)])
def test_convolution_is_the_one_in_three_dimensions_with_same_padding(shape, size, stride):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *shape, 3)).astype(np.float32)
    kernel = rng.normal(size=(size, size, size, 3, 4)).astype(np.float32)
    expected = jax.lax.conv_general_dilated(
        x, kernel, (stride,) * 3, "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )
    np.testing.assert_allclose(i3d.conv3d(jnp.asarray(x), jnp.asarray(kernel), stride), expected, atol=1e-4)


@pytest.mark.parametrize("size, stride", [*i3d.POOLS.values(), ((3, 3, 3), (1, 1, 1))])
@pytest.mark.parametrize("shape", [(8, 8, 8), (5, 7, 9)])
def test_max_pool_is_that_of_tensorflow(shape, size, stride):
    x = np.random.default_rng(0).uniform(size=(2, *shape, 3)).astype(np.float32)
    window, strides = (1, *size, 1), (1, *stride, 1)
    expected = jax.lax.reduce_window(x, -np.inf, jax.lax.max, window, strides, "SAME")
    np.testing.assert_array_equal(i3d.max_pool(x, size, stride), expected)


@pytest.mark.parametrize("size, even, odd", [(7, (2, 3), (3, 3)), (3, (0, 1), (1, 1)), (2, (0, 0), (0, 1))])
def test_padding_of_stride_2_depends_on_the_remainder(size, even, odd):
    assert i3d.same_padding(224, size, 2) == even
    assert i3d.same_padding(11, size, 2) == odd


@pytest.mark.parametrize("frames", [9, 49])
def test_clips_give_400_features(frames):
    network, clips = nnx.eval_shape(create_i3d), jax.ShapeDtypeStruct((2, frames, 224, 224, 3), jnp.float32)
    assert jax.eval_shape(lambda m, x: m(x), network, clips).shape == (2, i3d.FEATURES)
    video = jax.ShapeDtypeStruct((2, frames, 30, 40, 3), jnp.uint8)
    features = jax.eval_shape(partial(i3d.features, protocol="styleganv"), network, video)
    assert (features.shape, features.dtype) == ((2, i3d.FEATURES), jnp.float32)


@pytest.mark.parametrize(
    "shape", [(1, 8, 224, 224, 3), (1, 16, 224, 223, 3), (1, 16, 224, 224, 1), (16, 224, 224, 3)]
)
def test_clips_of_another_shape_are_refused(shape):
    network = nnx.eval_shape(create_i3d)
    with pytest.raises(InputError, match="at least 9 frames"):
        jax.eval_shape(lambda m, x: m(x), network, jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.fixture(scope="module")
def video():
    return np.random.default_rng(3).integers(0, 256, (1, 2, 30, 40, 3), np.uint8)


@pytest.mark.parametrize("protocol", i3d.PROTOCOLS)
def test_uint8_and_its_float_are_the_same(video, protocol):
    whole = i3d.preprocess(video, protocol)
    np.testing.assert_allclose(i3d.preprocess(video.astype(np.float32) / 255, protocol), whole, atol=1e-6)
    assert whole.shape == (1, 2, 224, 224, 3) and whole.dtype == jnp.float32
    assert -1 <= whole.min() < -0.9 and 0.9 < whole.max() <= 1


def test_only_videogpt_cuts_floats_down_to_uint8(video):
    between = ((video // 2 + 0.9) / 255).astype(np.float32)
    cut = i3d.preprocess(video // 2, "styleganv")
    np.testing.assert_array_equal(i3d.preprocess(between, "videogpt"), cut)
    np.testing.assert_allclose(i3d.preprocess(between, "styleganv") - cut, 2 * 0.9 / 255, atol=1e-5)


@pytest.mark.parametrize("protocol", i3d.PROTOCOLS)
def test_upright_frames_are_treated_like_wide_ones(video, protocol):
    upright = i3d.preprocess(video.swapaxes(2, 3), protocol)
    np.testing.assert_allclose(upright.swapaxes(2, 3), i3d.preprocess(video, protocol), atol=1e-6)


def test_crop_is_the_middle():
    frames = np.zeros((1, 1, 224, 300, 3), np.uint8)
    frames[:, :, :, 38:262] = 255
    assert (i3d.preprocess(frames, "videogpt") == 1).all()


def test_other_protocols_and_frames_are_refused(video):
    with pytest.raises(InputError, match="protocol 'tensorflow'"):
        i3d.preprocess(video, "tensorflow")
    with pytest.raises(InputError, match="frames of shape"):
        i3d.preprocess(video[0], "videogpt")


def test_published_state_dict_fits_with_and_without_its_counters():
    counters = {key for key in SHAPES if key.endswith("num_batches_tracked")}
    without = {key: shape for key, shape in SHAPES.items() if key not in counters}
    assert len(counters) == 57 and len(without) == 287
    for shapes in (SHAPES, without):
        assert not metrics.problems(create_i3d, metrics_i3d.VIDEOGPT, shapes)
    for key in SHAPES:
        everything = [*metrics_i3d.VIDEOGPT.rules, *metrics_i3d.VIDEOGPT.ignored]
        assert len(rules.matching_rules(everything, key)) == 1, key


def test_the_network_has_the_parameters_of_the_published_file():
    sizes = [int(np.prod(shape)) for key, shape in SHAPES.items() if "num_batches" not in key]
    assert sum(leaf.size for leaf in params.abstract(create_i3d)[1].values()) == sum(sizes) == 12_711_824


def test_missing_unexpected_and_misshapen_keys_are_named(weights):
    arrays = dict(weights)
    arrays["Mixed_3b.b4.conv3d.weight"] = arrays.pop("Mixed_3b.b0.conv3d.weight")
    arrays["logits.conv3d.bias"] = arrays["logits.conv3d.bias"][:399]
    with pytest.raises(InputError) as error:
        metrics.build(create_i3d, metrics_i3d.VIDEOGPT, open_mapping(arrays), where="w.pt")
    for problem in ("missing: Mixed_3b.b0.", "unexpected: Mixed_3b.b4.", "logits.conv3d.bias: (399,)"):
        assert problem in str(error.value)


def script_of(weights, path, eps):
    """Writes a TorchScript archive with the modules of i3d_torchscript.pt, and these weights.

    Args:
        eps: function of a unit's name -> epsilon of its batch norm.
    """
    import torch

    class Module(torch.nn.Module):
        def forward(self, x):
            return x

    def convolution(name, bias=False):
        kernel = torch.tensor(weights[f"{name}.conv3d.weight"])
        module = Module()
        module.conv3d = torch.nn.Conv3d(kernel.shape[1], kernel.shape[0], kernel.shape[2:], bias=bias)
        module.conv3d.weight.data = kernel
        return module

    def unit(name):
        module = convolution(name)
        module.batch3d = torch.nn.BatchNorm3d(len(module.conv3d.weight), eps=eps(name))
        keys = ("weight", "bias", "running_mean", "running_var")
        state = {key: torch.tensor(weights[f"{name}.bn.{key}"]) for key in keys}
        module.batch3d.load_state_dict(state, strict=False)
        return module

    network = Module()
    network.conv3d_1a_7x7 = unit("Conv3d_1a_7x7")
    network.conv3d_2b_1x1 = unit("Conv3d_2b_1x1")
    network.conv3d_2c_3x3 = unit("Conv3d_2c_3x3")
    for name in i3d.BLOCKS:
        block = Module()
        block.branch_0 = unit(f"{name}.b0")
        block.branch_1 = torch.nn.Sequential(unit(f"{name}.b1a"), unit(f"{name}.b1b"))
        block.branch_2 = torch.nn.Sequential(unit(f"{name}.b2a"), unit(f"{name}.b2b"))
        block.branch_3 = torch.nn.Sequential(torch.nn.Identity(), unit(f"{name}.b3b"))
        setattr(network, name.lower(), block)
    network.conv3d_0c_1x1 = convolution("logits", bias=True)
    network.conv3d_0c_1x1.conv3d.bias.data = torch.tensor(weights["logits.conv3d.bias"])
    torch.jit.script(network.eval()).save(str(path))


@pytest.mark.torch
def test_both_published_files_give_the_same_network_but_for_epsilon(tmp_path, weights):
    import torch

    counters = {key: torch.tensor(0) for key in SHAPES if key.endswith("num_batches_tracked")}
    state = {key: torch.tensor(array) for key, array in weights.items()}
    torch.save({**state, **counters}, tmp_path / "i3d_pretrained_400.pt")
    script_of(weights, tmp_path / "i3d_torchscript.pt", lambda name: 1e-3)
    videogpt = metrics_i3d.load_i3d(tmp_path / "i3d_pretrained_400.pt")
    styleganv = metrics_i3d.load_i3d(tmp_path / "i3d_torchscript.pt")
    assert videogpt.Mixed_4d.b2b.eps == videogpt.Conv3d_1a_7x7.eps == 1e-5
    assert styleganv.Mixed_4d.b2b.eps == styleganv.Conv3d_1a_7x7.eps == 1e-3
    direct = metrics.build(create_i3d, metrics_i3d.VIDEOGPT, open_mapping(weights), where="weights")
    expected = params.extract(direct)
    for network in (videogpt, styleganv):
        arrays = params.extract(network)
        assert arrays.keys() == expected.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.torch
def test_archive_whose_norms_have_several_epsilons_is_refused(tmp_path, weights):
    script_of(weights, tmp_path / "w.pt", lambda name: 1e-5 if name == "Mixed_5c.b0" else 1e-3)
    with pytest.raises(InputError, match="epsilons of its batch norms: .*1e-05"):
        metrics_i3d.load_i3d(tmp_path / "w.pt")


@pytest.mark.torch
@pytest.mark.parametrize("how", ["script", "trace"])
def test_epsilon_is_read_from_scripted_and_traced_code(tmp_path, how):
    import torch

    norm = torch.nn.BatchNorm3d(2, eps=2e-4).eval()
    saved = torch.jit.script(norm) if how == "script" else torch.jit.trace(norm, torch.zeros(1, 2, 3, 3, 3))
    saved.save(str(tmp_path / "w.pt"))
    assert metrics_i3d.script_eps(tmp_path / "w.pt") == 2e-4


@pytest.mark.torch
def test_archive_that_says_no_epsilon_is_refused(tmp_path):
    import torch

    torch.jit.script(torch.nn.Conv3d(2, 2, 1)).save(str(tmp_path / "w.pt"))
    with pytest.raises(InputError, match="epsilons of its batch norms: none"):
        metrics_i3d.load_i3d(tmp_path / "w.pt")


def test_epsilon_is_under_the_root(weights):
    unit = nnx.eval_shape(lambda: i3d.Unit(1, 1, eps=0.5, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(unit)
    values = {"kernel": np.ones((1,) * 5), "scale": [3.0], "bias": [0.25], "mean": [1.0], "var": [1.75]}
    state = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
    result = nnx.merge(graphdef, state)(jnp.array([2.0, 0.0]).reshape(1, 2, 1, 1, 1))
    np.testing.assert_allclose(result.ravel(), [3 / 1.5 + 0.25, 0], rtol=1e-6)

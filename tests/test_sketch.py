"""XDoG against the official script's recorded results and its own formula, on the host and on the device."""

from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from animecolor_jax.errors import InputError
from animecolor_jax.safetensors_io import Reader
from animecolor_jax.sketch import _look_up, xdog
from data_pipeline.sketch import EXTRACTORS, Canny, Ink, XDoG, dog_order, extractor, gaussian_kernel, to_grey
from data_pipeline.sketch_augment import ClipSketcher, LineStyle, SketchAugmentation, SketchMix
from data_pipeline.toon import draw_clip

FIXTURE = Path(__file__).parent / "fixtures" / "metrics" / "xdog.safetensors"
CASES = ("gradient", "constant", "small", "crop_native", "crop_quarter")
# Of the fixture's float32 copy of the response, in [0, 2]: half its last digit.
RESPONSE_ERROR = 6e-8
PARAMETERS = (
    XDoG(),
    XDoG(light_lines=True),
    XDoG(binarize=False),
    XDoG(sigma=0.7, k=2.5, gamma=0.95, epsilon=-3.7, phi=12.0, binarize=False, light_lines=True),
    XDoG(sigma=1.4, gamma=1.0, epsilon=-1.0),
    XDoG(gamma=0.981, epsilon=0.0, phi=1.0, binarize=False),
)


@pytest.fixture(scope="module")
def recorded():
    with Reader(FIXTURE) as file:
        return {name: file.read(name) for name in file.specs}


@pytest.fixture(scope="module")
def clip():
    return draw_clip(3, 96, 160)


def noise(*shape, high=256, seed=0):
    return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)


def literal(grey, parameters):
    """The published formula with OpenCV's blur and float64, for one frame [H, W]."""
    sigma = parameters.sigma
    dog = cv2.GaussianBlur(grey, (0, 0), sigma)
    dog = dog - parameters.gamma * cv2.GaussianBlur(grey, (0, 0), sigma * parameters.k)
    dog /= dog.max()
    response = 1 + np.tanh(parameters.phi * (dog - parameters.epsilon / 255))
    return np.minimum(response, 1)


def rgb(grey):
    return np.repeat(grey[..., None], 3, axis=-1)


# ---------------------------------------------------------------- XDoG on the host


@pytest.mark.parametrize("case", CASES)
def test_host_equals_the_official_script(recorded, case):
    frames = recorded.get(f"inputs/{case}/rgb")
    if frames is None:
        frames = recorded[f"inputs/{case}/grey"]
    else:
        np.testing.assert_array_equal(to_grey(frames[None])[0], recorded[f"outputs/{case}/grey"])
    g1, g2 = XDoG().blurred(to_grey(frames[None])[0])
    np.testing.assert_array_equal(g1, recorded[f"outputs/{case}/g1"])
    np.testing.assert_array_equal(g2, recorded[f"outputs/{case}/g2"])
    response = XDoG().response(frames[None])[0]
    np.testing.assert_allclose(response, recorded[f"outputs/{case}/response"], rtol=0, atol=RESPONSE_ERROR)
    sketch = XDoG()(frames[None])
    assert sketch.dtype == np.uint8 and sketch.shape == (1, *frames.shape[:2])
    np.testing.assert_array_equal(sketch[0], recorded[f"outputs/{case}/sketch"])


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_host_equals_the_formula(parameters, clip):
    frames = [noise(40, 56), noise(40, 56, high=30) + 90, *to_grey(clip.color[:2])]
    for frame in frames:
        sketch = parameters(frame[None])[0]
        sketch = 255 - sketch if parameters.light_lines else sketch
        response = literal(frame, parameters)
        np.testing.assert_array_equal(sketch == 255, response >= 1)
        if parameters.binarize:
            assert set(np.unique(sketch)) <= {0, 255}
        else:
            assert np.abs(sketch - np.floor(255 * response)).max() <= 1


def tie_cases():
    """Yields (frame, parameters, ties): dog / maximum is epsilon / 255 there, but for rounding."""
    for seed in range(40):
        frame = noise(24, 32, seed=seed)
        g1, g2 = (blurred.astype(int) for blurred in XDoG().blurred(frame))
        exact = 50 * g1 - 49 * g2
        chosen = np.sort(exact[exact < 0])[-50]
        yield frame, XDoG(epsilon=255 * float(chosen / exact.max())), exact == chosen


def test_ties_are_decided_by_rounding_as_in_the_formula():
    fallen = []
    for frame, parameters, ties in tie_cases():
        sketch = parameters(frame[None])[0]
        np.testing.assert_array_equal(sketch == 255, literal(frame, parameters) >= 1)
        fallen.extend(sketch[ties])
    assert min(fallen.count(0), fallen.count(255)) > 10  # they fall both ways


@pytest.mark.parametrize(
    "gamma, epsilon", [(0.98, -1.3), (0.98, -1.0), (0.9, -2.0), (1.0, -1.3), (0.5, -5.1)]
)
def test_thresholds_equal_the_formula_for_all_pairs_of_levels(gamma, epsilon):
    parameters, order = XDoG(gamma=gamma, epsilon=epsilon), dog_order(gamma)
    rng = np.random.default_rng(0)
    peaks = np.flatnonzero(np.isin(order.dogs, [5.1, 51, 102, 153, 204]))  # these have ties at -1.3, -1.0
    peaks = np.concatenate([peaks, rng.choice(np.flatnonzero(order.dogs > 0), 60, replace=False)])
    papers = parameters.paper_thresholds(order.keys[peaks])
    for peak, paper in zip(peaks, papers, strict=True):
        response = 1 + np.tanh(parameters.phi * (order.dogs / order.dogs[peak] - epsilon / 255))
        np.testing.assert_array_equal(order.keys >= paper, response >= 1)


@pytest.mark.parametrize("gamma", [0.0, 0.001, 0.5, 0.8, 0.98, 0.981, 1.0])
def test_keys_sort_as_the_float_differences_do(gamma):
    order, levels = dog_order(gamma), np.arange(256)
    keys = order.scale * levels[:, None] - order.weight * levels + order.tie
    by_key = np.argsort(keys, axis=None, kind="stable")
    assert (np.diff((levels[:, None] - gamma * levels).ravel()[by_key]) >= 0).all()
    assert np.abs(keys).max() < 2**19


@pytest.mark.parametrize("sigma", [0.1, 0.25, 0.3, 0.75, 1.0, 1.25, 1.6, 2.0, 3.3, 7.7, 10.0])
def test_kernel_blurs_as_opencv(sigma, recorded):
    kernel = gaussian_kernel(sigma)
    name = f"outputs/common/kernel_sigma{sigma:g}_times_256"
    assert sum(kernel) == 256 and min(kernel) >= 0 and (name not in recorded or kernel == (*recorded[name],))
    radius, frame = len(kernel) // 2, noise(40, 23)
    blurred = np.pad(frame.astype(int), radius, mode="reflect")
    for axis in (0, 1):
        blurred = np.apply_along_axis(np.convolve, axis, blurred, kernel, "valid")
    np.testing.assert_array_equal((blurred + 2**15) >> 16, cv2.GaussianBlur(frame, (0, 0), sigma))


def test_frames_without_contrast_have_no_lines():
    frames = np.stack([np.full((12, 17), level, np.uint8) for level in (0, 1, 90, 255)])
    assert (XDoG()(frames) == 255).all() and (XDoG(binarize=False)(frames) == 255).all()
    assert (XDoG(light_lines=True)(frames) == 0).all()
    assert (XDoG().response(frames) > 1).all()
    assert (np.asarray(xdog(rgb(frames))) == 255).all()


def test_frames_do_not_influence_each_other(clip):
    together = XDoG()(clip.color)
    for index, frame in enumerate(clip.color):
        np.testing.assert_array_equal(XDoG()(frame[None])[0], together[index])


# ---------------------------------------------------------------- XDoG on the device


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_device_equals_host(parameters, clip):
    frames = np.stack([noise(3, 96, 160, 3), noise(3, 96, 160, 3, high=7), clip.color])
    sketch = np.asarray(xdog(frames, parameters))
    assert sketch.dtype == np.uint8 and sketch.shape == (3, 3, 96, 160)
    np.testing.assert_array_equal(sketch, np.stack([parameters(one) for one in frames]))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (2, 3)], ids=str)
def test_device_equals_host_on_frames_smaller_than_the_kernel(size):
    frames = np.concatenate([noise(20, *size, 3, high=high) for high in (2, 4, 256)])
    np.testing.assert_array_equal(xdog(frames), XDoG()(frames))


@pytest.mark.parametrize("case", CASES)
def test_device_equals_the_official_script(recorded, case):
    frames = recorded.get(f"inputs/{case}/rgb")
    frames = rgb(recorded[f"inputs/{case}/grey"]) if frames is None else frames
    np.testing.assert_array_equal(xdog(frames), recorded[f"outputs/{case}/sketch"])


def test_device_decides_ties_as_the_host():
    for frame, parameters, _ in tie_cases():
        np.testing.assert_array_equal(xdog(rgb(frame), parameters), parameters(frame[None])[0])


def test_device_function_works_under_jit_and_vmap():
    frames = noise(2, 3, 24, 32, 3)
    expected = np.stack([XDoG()(one) for one in frames])
    np.testing.assert_array_equal(jax.jit(xdog)(frames), expected)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(xdog))(frames), expected)


def test_table_is_looked_up_without_gather():
    table, index = np.random.default_rng(0).integers(0, 23, 256), np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(_look_up(table, index), table)


# ---------------------------------------------------------------- extractors


@pytest.mark.parametrize("name", EXTRACTORS)
def test_every_extractor_finds_the_drawn_lines(name, clip):
    make = extractor(name)
    sketch = make(clip.color)
    assert make.name == name
    assert sketch.shape == clip.color.shape[:3] and sketch.dtype == np.uint8
    assert np.median(sketch) == 255 and sketch.min() < 30
    drawn = clip.sketch < 128
    near = np.stack([cv2.dilate(frame.astype(np.uint8), np.ones((3, 3))) for frame in drawn]) > 0
    assert 255 - sketch[near].mean() > 5 * (255 - sketch[~near].mean())


@pytest.mark.parametrize("name", EXTRACTORS)
def test_higher_thresholds_give_fewer_lines(name, clip):
    tones = [extractor(name).with_threshold(factor)(clip.color).mean() for factor in (0.3, 1, 3)]
    assert tones[0] < tones[1] < tones[2]
    np.testing.assert_array_equal(
        extractor(name).with_threshold(1.0)(clip.color), extractor(name)(clip.color)
    )


def test_ink_ignores_borders_between_colours():
    frame = np.full((1, 40, 40), 200, np.uint8)
    frame[:, :, 20:] = 80
    assert (Ink()(frame) == 255).all() and (Canny()(frame) == 0).any()
    frame[:, 10, :] = 20
    assert (Ink()(frame)[0, 10] == 0).all()


def test_extractors_take_their_options():
    assert extractor("xdog", sigma=1.2) == XDoG(sigma=1.2)
    assert extractor("xdog-soft") == XDoG(binarize=False)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: extractor("anime"), "xdog, xdog-soft, canny, ink"),
        (lambda: extractor("canny", sharpness=2), "low, high, sigma"),
        (lambda: XDoG(sigma=0.0), "sigma"),
        (lambda: XDoG(sigma=8.0), "k is 1.6"),
        (lambda: XDoG(gamma=0.9801), "multiple of 0.001"),
        (lambda: XDoG(epsilon=1.3), "at most 0"),
        (lambda: XDoG(phi=float("nan")), "phi"),
        (lambda: Canny(low=9, high=3), "low <= high"),
        (lambda: Ink(width=4), "odd"),
        (lambda: XDoG()(np.zeros((2, 8, 8, 4), np.uint8)), "RGB"),
        (lambda: XDoG()(np.zeros((2, 8, 8, 3), np.float32)), "float32"),
        (lambda: XDoG()(np.zeros((0, 8, 8, 3), np.uint8)), "at least one pixel"),
        (lambda: XDoG()(np.zeros((8, 8), np.uint8)), "RGB"),
        (lambda: xdog(np.zeros((8, 8), np.uint8)), "RGB"),
        (lambda: xdog(np.zeros((8, 8, 3), np.float32)), "float32"),
        (lambda: SketchAugmentation(ink=(90, 10)), "smaller first"),
        (lambda: SketchAugmentation(probability=1.5), "probability"),
        (lambda: SketchMix((XDoG(), Canny()), (1.0,)), "2 extractors"),
        (lambda: SketchMix((XDoG(),), (0.0,)), "not all 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


# ---------------------------------------------------------------- augmentation


@pytest.fixture(scope="module")
def sketch(clip):
    return XDoG()(clip.color)


def test_default_style_changes_nothing(sketch):
    np.testing.assert_array_equal(LineStyle()(sketch), sketch)


def test_line_width_widens_and_thins_by_pixels():
    line = np.full((1, 41, 41), 255, np.uint8)
    line[:, :, 18:23] = 0  # 5 pixels
    for pixels in (-3, -2, -1, 0, 0.5, 1, 2, 3.5, 6):
        width = (255 - LineStyle(line_width=pixels)(line)[0, 20].astype(float)).sum() / 255
        assert width == pytest.approx(5 + pixels, abs=0.01)


def test_wider_lines_cover_thinner_ones(sketch):
    styled = [LineStyle(line_width=pixels)(sketch) for pixels in (-1.5, -0.5, 0, 0.7, 1.5, 3)]
    for thinner, wider in zip(styled, styled[1:], strict=False):
        assert (wider <= thinner).all() and wider.mean() < thinner.mean()


def test_pencil_is_grey_and_soft_on_white_paper(sketch):
    pencil = LineStyle(ink=100)(sketch)
    assert set(np.unique(pencil)) == {100, 255}
    soft = LineStyle(softness=0.7)(sketch)
    assert len(np.unique(soft)) > 20 and soft.max() == 255
    assert soft.mean() == pytest.approx(sketch.mean(), abs=0.5)


def test_all_frames_of_a_clip_get_the_same_style(clip):
    mix = SketchMix((XDoG(), Canny()), (1, 1), SketchAugmentation(probability=1.0))
    sketcher = mix.draw(np.random.default_rng(3))
    still = np.repeat(clip.color[:1], 4, axis=0)
    frames = sketcher(still)
    assert (frames == frames[:1]).all()
    np.testing.assert_array_equal(sketcher(clip.color)[1:2], sketcher(clip.color[1:2]))


def test_draws_are_a_function_of_the_generator():
    mix = SketchMix(tuple(extractor(name) for name in EXTRACTORS), (4, 2, 1, 1), SketchAugmentation())
    draws = [[mix.draw(np.random.default_rng([7, clip])) for clip in range(8)] for _ in range(2)]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 4


def test_draws_keep_to_weights_and_ranges():
    augmentation = SketchAugmentation(probability=0.25, line_width=(0.5, 1.0), ink=(10, 20))
    mix = SketchMix((XDoG(), Canny(), Ink()), (3, 1, 0), augmentation)
    rng = np.random.default_rng(0)
    draws = [mix.draw(rng) for _ in range(2000)]
    names = [draw.extractor.name for draw in draws]
    assert "ink" not in names and names.count("xdog") / 2000 == pytest.approx(0.75, abs=0.03)
    changed = [draw.style for draw in draws if draw.style != LineStyle()]
    assert len(changed) / 2000 == pytest.approx(0.25, abs=0.03)
    assert all(0.5 <= style.line_width <= 1 and 10 <= style.ink <= 20 for style in changed)
    thresholds = np.log2([style.threshold for style in changed])
    assert -0.7 <= thresholds.min() < -0.6 and 0.6 < thresholds.max() <= 0.7


def test_plain_mix_is_the_reference_sketch(clip, sketch):
    sketcher = SketchMix().draw(np.random.default_rng(0))
    assert sketcher == ClipSketcher(XDoG())
    np.testing.assert_array_equal(sketcher(clip.color), sketch)


def test_threshold_of_a_style_reaches_the_extractor(clip):
    sketcher = ClipSketcher(XDoG(), LineStyle(threshold=2.0))
    np.testing.assert_array_equal(sketcher(clip.color), XDoG(epsilon=-2.6)(clip.color))

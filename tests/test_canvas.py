import numpy as np
import pytest
from PIL import Image

from animecolor_jax import canvas
from animecolor_jax.errors import InputError


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ---------------------------------------------------------------- canvas


def test_fit_size_is_the_smallest_multiple_that_holds_the_size():
    assert canvas.fit_size(480, 852) == (480, 864)
    assert canvas.fit_size(1, 17) == (16, 32)
    assert canvas.fit_size(96, 160) == (96, 160)
    assert canvas.fit_size(33, 64, multiple=32) == (64, 64)


@pytest.mark.parametrize(
    "size, wanted",
    [((128, 192), (64, 96)), ((96, 144), (64, 96)), ((64, 96), (64, 96)), ((1080, 1920), (64, 112)),
     ((720, 480), (96, 64)), ((16, 16), (80, 80))],
)  # fmt: skip
def test_a_size_of_an_area_keeps_the_aspect(size, wanted):
    assert canvas.size_of_area(*size, 64 * 96) == wanted


def test_a_size_of_an_area_is_near_that_area_for_any_usual_aspect():
    for width in range(100, 401, 7):
        for size in ((100, width), (width, 100)):
            height, length = canvas.size_of_area(*size, 64 * 96)
            assert height % 16 == length % 16 == 0 and 1 / 1.4 < height * length / (64 * 96) < 1.4


def test_crop_undoes_pad_frames_and_padding_repeats_the_edge():
    frames = noise(2, 21, 33, 3)
    padded = canvas.pad_frames(frames, canvas.fit_size(21, 33))
    assert padded.shape == (2, 32, 48, 3)
    np.testing.assert_array_equal(canvas.crop(padded, 21, 33), frames)
    assert (padded[:, 21:, :33] == frames[:, -1:]).all()
    assert (padded[:, :21, 33:] == frames[:, :, -1:]).all()


def test_padding_or_cropping_to_the_wrong_side_is_refused():
    with pytest.raises(ValueError, match="larger than 16x16"):
        canvas.pad_frames(noise(1, 17, 16, 3), (16, 16))
    with pytest.raises(ValueError, match="cannot crop"):
        canvas.crop(noise(1, 16, 16, 3), 17, 16)


@pytest.mark.parametrize(
    "frames, padded", [(1, 1), (2, 9), (9, 9), (10, 17), (16, 17), (17, 17), (49, 49), (50, 57)]
)
def test_length_is_padded_to_8m_plus_1_by_the_last_frame(frames, padded):
    assert canvas.padded_length(frames) == padded
    clip = noise(frames, 2, 2, 3)
    result = canvas.pad_length(clip)
    assert len(result) == padded
    np.testing.assert_array_equal(result[:frames], clip)
    assert (result[frames:] == clip[-1]).all()


# ---------------------------------------------------------------- references


def test_reference_of_the_canvas_shape_is_unchanged():
    image = noise(32, 48, 3)
    np.testing.assert_array_equal(canvas.fit_reference(image, (32, 48)), image)


@pytest.mark.parametrize("shape, size", [((40, 20), (32, 48)), ((20, 80), (32, 48)), ((10, 10), (64, 32))])
def test_reference_of_another_shape_is_seen_whole_unstretched_and_centred(shape, size):
    """A disc stays round, as large as the scale says, and in the middle."""
    rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
    radius = 0.4 * min(shape)
    disc = np.hypot(rows - shape[0] / 2, columns - shape[1] / 2) < radius
    fitted = canvas.fit_reference(np.where(disc, 0, 255).astype(np.uint8)[..., None].repeat(3, axis=-1), size)
    assert fitted.shape == (*size, 3)
    seen_rows, seen_columns = np.nonzero(fitted[..., 0] < 128)
    height, width = np.ptp(seen_rows) + 1, np.ptp(seen_columns) + 1
    scale = min(size[0] / shape[0], size[1] / shape[1])
    assert height == pytest.approx(2 * radius * scale, abs=1.5)
    assert width == pytest.approx(2 * radius * scale, abs=1.5)
    assert seen_rows.mean() == pytest.approx(size[0] / 2 - 0.5, abs=0.6)
    assert seen_columns.mean() == pytest.approx(size[1] / 2 - 0.5, abs=0.6)


def test_margins_of_a_reference_continue_its_edge():
    image = np.zeros((20, 10, 3), np.uint8)
    image[:10], image[10:] = (200, 30, 30), (30, 30, 200)
    fitted = canvas.fit_reference(image, (20, 40))
    assert (fitted[:10] == (200, 30, 30)).all()
    assert (fitted[10:] == (30, 30, 200)).all()


def test_a_thin_reference_keeps_at_least_one_pixel():
    assert canvas.fit_reference(noise(1, 1000, 3), (16, 32)).shape == (16, 32, 3)


def test_resize_exact_is_pillows_bicubic_stretch():
    image = noise(30, 20, 3)
    expected = Image.fromarray(image).resize((48, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(canvas.resize_exact(image, (32, 48)), np.asarray(expected))


# ---------------------------------------------------------------- --strict-reference


def test_strict_canvas_floors_the_reference_to_multiples_of_16():
    assert canvas.strict_canvas((481, 863)) == (480, 848)
    with pytest.raises(InputError, match="15x300"):
        canvas.strict_canvas((15, 300))


@pytest.mark.parametrize(
    "frames, kept", [(1, 1), (4, 1), (5, 5), (16, 13), (48, 45), (49, 49), (51, 49), (500, 49)]
)
def test_strict_frame_count_is_4k_plus_1_and_at_most_49(frames, kept):
    assert canvas.strict_frame_count(frames) == kept


def test_strict_resize_interpolates_linearly_between_pixel_centres():
    """Against the formula in float64: OpenCV's fixed point is within one level of it."""
    frames, size = noise(2, 30, 20, 3), (48, 16)

    def weights(source, target):
        centre = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
        return np.maximum(0, 1 - np.abs(centre[:, None] - np.arange(source)))

    expected = np.einsum("yh,xw,thwc->tyxc", weights(30, 48), weights(20, 16), frames)
    result = canvas.resize_video_bilinear(frames, size)
    assert result.dtype == np.uint8
    assert np.abs(result - expected).max() <= 1


# ---------------------------------------------------------------- polarity


def drawing(paper, line, cover=0.2):
    frames = np.full((3, 20, 20, 3), paper, np.uint8)
    frames[:, :, : int(20 * cover)] = line
    return frames


def test_dark_lines_on_white_are_left_alone():
    frames = drawing(255, 0)
    result, inverted = canvas.normalise_polarity(frames)
    assert not inverted
    np.testing.assert_array_equal(result, frames)


def test_light_lines_on_black_are_inverted():
    result, inverted = canvas.normalise_polarity(drawing(10, 240), "auto")
    assert inverted
    np.testing.assert_array_equal(result, drawing(245, 15))


def test_polarity_is_one_decision_for_the_clip():
    """A black flash does not turn the rest over, nor stay the only frame that is not."""
    frames = np.concatenate([drawing(255, 0), drawing(0, 0)[:1], drawing(255, 0)])
    result, inverted = canvas.normalise_polarity(frames)
    assert not inverted
    np.testing.assert_array_equal(result, frames)


def test_polarity_looks_at_luma_not_at_one_channel():
    assert canvas.normalise_polarity(drawing((0, 0, 255), 255))[1]  # blue paper is dark
    assert not canvas.normalise_polarity(drawing((255, 255, 0), 0))[1]  # yellow is light


def test_polarity_can_be_forced():
    frames = drawing(255, 0)
    np.testing.assert_array_equal(canvas.normalise_polarity(frames, "yes")[0], 255 - frames)
    assert canvas.normalise_polarity(255 - frames, "no")[1] is False
    with pytest.raises(InputError, match="maybe") as caught:
        canvas.normalise_polarity(frames, "maybe")
    assert caught.value.where == "--invert"


# ---------------------------------------------------------------- windows

CASES = [
    (57, 49, 16),
    (97, 49, 16),
    (81, 49, 16),
    (201, 49, 16),
    (201, 49, 40),
    (105, 49, 36),
    (41, 17, 4),
    (41, 17, 8),
    (33, 25, 16),
    (801, 65, 20),
    (25, 9, 4),
    (41, 17, 12),
]


def test_windows_by_hand():
    assert canvas.windows(49) == [0]
    assert canvas.windows(1) == [0]
    assert canvas.windows(81) == [0, 32]
    assert canvas.windows(97) == [0, 32, 48]
    assert canvas.windows(41, window=17, overlap=8) == [0, 8, 16, 24]
    assert canvas.windows(25, window=9, overlap=4) == [0, 4, 8, 12, 16]


@pytest.mark.parametrize("num_frames, window, overlap", CASES)
def test_windows_cover_the_clip_and_share_at_least_the_overlap(num_frames, window, overlap):
    starts = canvas.windows(num_frames, window, overlap)
    assert starts[0] == 0 and starts[-1] + window == num_frames
    assert all(start % 4 == 0 for start in starts)
    shared = [earlier + window - (later + 1) for earlier, later in zip(starts, starts[1:], strict=False)]
    assert all(frames == overlap for frames in shared[:-1])
    assert overlap <= shared[-1] < window - 1


@pytest.mark.parametrize("window", [0, 1, 5, 12, 48, -7])
def test_impossible_windows_are_refused(window):
    with pytest.raises(InputError) as caught:
        canvas.windows(97, window, 4)
    assert caught.value.where == "--window"


@pytest.mark.parametrize("window, overlap", [(49, 0), (49, -4), (49, 6), (49, 48), (9, 8)])
def test_impossible_overlaps_are_refused(window, overlap):
    with pytest.raises(InputError) as caught:
        canvas.windows(97, window, overlap)
    assert caught.value.where == "--overlap"


def test_overlap_need_not_fit_a_window_that_is_alone():
    assert canvas.windows(9, window=9, overlap=16) == [0]
    with pytest.raises(InputError):
        canvas.windows(9, window=9, overlap=3)


def test_clips_of_another_length_are_refused():
    with pytest.raises(ValueError, match="8m"):
        canvas.windows(53)


def test_latents_of_windows_and_clip_hold_the_same_frames():
    """A latent i >= 1 of an encoding holds the frames 4(i - 1) + 1 ... 4i after the encoding's first."""
    starts = canvas.windows(97)
    index = canvas.latent_index(starts, 13)
    assert index.dtype == np.int32 and index.shape == (3, 13)
    assert index[0].tolist() == list(range(13))
    assert index[1:, 0].tolist() == [-1, -1]
    for start, latents in zip(starts, index, strict=True):
        for i in range(1, 13):
            assert start + 4 * i == 4 * latents[i]  # the last frame of either


@pytest.mark.parametrize("num_frames, window, overlap", CASES)
def test_weights_of_each_latent_sum_to_one(num_frames, window, overlap):
    starts, length, total = (
        canvas.windows(num_frames, window, overlap),
        (window - 1) // 4 + 1,
        (num_frames - 1) // 4 + 1,
    )
    weights, index = canvas.blend_weights(starts, length, total), canvas.latent_index(starts, length)
    assert weights.dtype == np.float32 and weights.shape == index.shape
    sums = np.zeros(total)
    for window_weights, window_index in zip(weights, index, strict=True):
        for weight, latent in zip(window_weights, window_index, strict=True):
            if latent < 0:
                assert weight == 0
            else:
                assert weight > 0
                sums[latent] += weight
    np.testing.assert_allclose(sums, 1, atol=1e-6)


def test_weights_are_linear_ramps_where_two_windows_meet():
    weights = canvas.blend_weights(canvas.windows(81), 13, 21)  # latents 9 to 12 are shared
    up = np.array([0.2, 0.4, 0.6, 0.8])
    np.testing.assert_allclose(weights[0], [*[1] * 9, *up[::-1]], atol=1e-6)
    np.testing.assert_allclose(weights[1], [0, *up, *[1] * 8], atol=1e-6)


def test_blending_the_windows_of_one_latent_clip_gives_it_back():
    latents = np.random.default_rng(0).normal(size=(26, 3))
    starts = canvas.windows(101 - 4, 25, 12)
    weights, index = canvas.blend_weights(starts, 7, 25), canvas.latent_index(starts, 7)
    blended = np.zeros((25, 3))
    for window_weights, window_index in zip(weights, index, strict=True):
        used = window_index >= 0
        np.add.at(blended, window_index[used], window_weights[used, None] * latents[window_index[used]])
    np.testing.assert_allclose(blended, latents[:25], atol=1e-6)


def test_a_single_window_has_weight_one():
    np.testing.assert_array_equal(canvas.blend_weights([0], 13, 13), np.ones((1, 13)))
    np.testing.assert_array_equal(canvas.blend_weights([0], 1, 1), np.ones((1, 1)))


def test_weights_for_another_clip_are_refused():
    with pytest.raises(ValueError, match="the clip has 22"):
        canvas.blend_weights(canvas.windows(81), 13, 22)

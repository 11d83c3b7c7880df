import subprocess
import sys

import pytest

from animecolor_jax.errors import InputError
from data_pipeline.shapes import (
    SIZES_512,
    Bucket,
    BucketConfig,
    aspect_size,
    aspect_sizes,
    cover_box,
    latent_frames,
)


def test_the_module_needs_neither_jax_nor_flax():
    code = "import sys, data_pipeline.shapes; print('jax' in sys.modules or 'flax' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"


def test_the_table_spans_a_quarter_to_four_at_one_area():
    ratios = [height / width for height, width in SIZES_512]
    assert len(SIZES_512) == 40 and ratios == sorted(ratios) and (ratios[0], ratios[-1]) == (0.25, 4)
    mirrored = {(width, height) for height, width in SIZES_512}
    assert set(SIZES_512) - mirrored == {(352, 672)}, "published so, without its portrait twin"
    assert all(0.9 < height * width / 512**2 <= 1.0001 for height, width in SIZES_512)
    assert all(side % 32 == 0 for size in SIZES_512 for side in size)


@pytest.mark.parametrize("base", [128, 256, 320, 512, 768])
def test_sizes_of_every_base_are_whole_patches(base):
    assert all(side % 16 == 0 and side > 0 for size in aspect_sizes(base) for side in size)
    assert all(height * width <= base**2 for height, width in aspect_sizes(base))


@pytest.mark.parametrize(
    "size, expected",
    [
        ((1080, 1920), (384, 672)),  # 0.5625: nearest to 0.57
        ((480, 720), (416, 608)),  # 0.667: nearest to 0.68
        ((512, 512), (512, 512)),
        ((1920, 1080), (672, 384)),
        ((100, 1000), (256, 1024)),
    ],
)
def test_a_clip_goes_to_the_nearest_aspect_ratio(size, expected):
    assert aspect_size(*size, 512) == expected


@pytest.mark.parametrize(
    "frames, expected", [(8, None), (9, 9), (24, 9), (25, 9), (49, 17), (145, 49), (900, 49)]
)
def test_frames_follow_from_length_and_stride(frames, expected):
    bucket = BucketConfig().video_bucket(frames, 512, 512)
    assert (bucket and bucket.frames) == expected
    if bucket:
        stride = BucketConfig().window_stride(frames)
        assert (bucket.frames - 1) * stride + 1 <= frames


def test_smaller_buckets_get_more_frames_from_the_same_budget():
    config = BucketConfig(bases=(128, 256, 512), frame_counts=(9, 17, 33, 49, 97, 193), stride=1)
    assert config.video_bucket(1000, 1024, 1024) == Bucket(49, 512, 512)
    assert config.video_bucket(1000, 300, 300) == Bucket(193, 256, 256)
    assert config.video_bucket(1000, 20, 20).size == (128, 128), "the smallest base where all would enlarge"


def test_exact_sizes_replace_the_table():
    config = BucketConfig(sizes=((480, 720), (720, 480)))
    assert config.video_bucket(200, 1080, 1920) == Bucket(33, 480, 720)
    assert config.image_bucket(1920, 1080) == Bucket(1, 720, 480)


def test_latent_sizes():
    assert [latent_frames(n) for n in (1, 5, 9, 49)] == [1, 2, 3, 13]
    assert Bucket(49, 480, 720).latents == (13, 60, 90)
    assert Bucket.parse("49x480x720") == Bucket(49, 480, 720) and str(Bucket(1, 16, 32)) == "1x16x32"
    with pytest.raises(ValueError, match="49-480-720"):
        Bucket.parse("49-480-720")


@pytest.mark.parametrize(
    "fields",
    [
        {"bases": ()},
        {"bases": (512, 256)},
        {"bases": (32,)},
        {"sizes": ((480, 721),)},
        {"frame_counts": (8,)},
        {"frame_counts": (17, 9)},
        {"frame_counts": (1, 5)},
        {"stride": 0},
        {"image_base": 1},
        {"max_pixels": 100},
    ],
)
def test_impossible_buckets_are_refused_by_name(fields):
    with pytest.raises(InputError, match=f"buckets.{next(iter(fields))}"):
        BucketConfig(**fields)


@pytest.mark.parametrize("size", [(1080, 1920), (97, 43), (500, 500), (64, 1000)])
def test_cover_box_has_the_buckets_ratio_and_lies_inside(size):
    top, left, height, width = cover_box(*size, 320, 512)
    assert top >= 0 and left >= 0 and top + height <= size[0] and left + width <= size[1]
    assert abs(height * 512 - width * 320) <= 512 and (height == size[0] or width == size[1])

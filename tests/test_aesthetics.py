"""The aesthetic scorer against the same arithmetic in torch; and what it refuses."""

import json

import numpy as np
import pytest
from tiny_models import WIDTH, save_clip

from animecolor_jax.errors import InputError
from data_pipeline.aesthetics import ClipAestheticScorer, read_head


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def frames():
    return np.random.default_rng(1).integers(0, 256, (5, 40, 56, 3), np.uint8)


def save_head(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.torch
def test_score_is_the_mean_of_the_head_over_normalised_clip_embeddings(clip_dir, frames, tmp_path):
    import torch
    import transformers
    from PIL import Image
    from safetensors.numpy import save_file

    rng = np.random.default_rng(2)
    weight, bias = rng.normal(size=(1, WIDTH)).astype(np.float32), np.array([5.5], np.float32)
    save_file({"weight": weight, "bias": bias}, tmp_path / "head.safetensors")
    scorer = ClipAestheticScorer(clip_dir, tmp_path / "head.safetensors", batch_size=2)

    model = transformers.CLIPModel.from_pretrained(clip_dir)
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    expected = []
    for frame in frames:
        small = np.asarray(Image.fromarray(frame).resize((39, 28), Image.Resampling.BICUBIC))[:, 5:33]
        pixels = (torch.tensor(small).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            pooled = model.vision_model(pixel_values=pixels[None]).pooler_output
            embedding = torch.nn.functional.normalize(model.visual_projection(pooled), dim=-1)
        expected.append((embedding @ torch.tensor(weight).T + torch.tensor(bias)).item())
    np.testing.assert_allclose(scorer.frame_scores(frames), expected, rtol=1e-5, atol=1e-5)
    assert scorer(frames) == pytest.approx(np.mean(expected), abs=1e-5)
    assert isinstance(scorer(frames[:1]), float)


@pytest.mark.torch
def test_head_of_another_width_is_refused_before_the_model_loads(clip_dir, tmp_path):
    head = save_head(tmp_path / "head.npz", weight=np.zeros((1, 7)), bias=np.zeros(1))
    with pytest.raises(InputError, match="7 features") as error:
        ClipAestheticScorer(clip_dir, head)
    assert str(WIDTH) in error.value.expected


@pytest.mark.torch
def test_clip_without_its_projection_is_refused(clip_dir, tmp_path):
    from safetensors.numpy import load_file, save_file

    weights = load_file(clip_dir / "model.safetensors")
    del weights["visual_projection.weight"]
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((clip_dir / name).read_bytes())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    head = save_head(tmp_path / "head.npz", weight=np.zeros((1, WIDTH)), bias=np.zeros(1))
    with pytest.raises(InputError, match="visual_projection"):
        ClipAestheticScorer(tmp_path, head)


def test_model_that_is_not_clip_is_refused(tmp_path):
    head = save_head(tmp_path / "head.npz", weight=np.zeros((1, WIDTH)), bias=np.zeros(1))
    with pytest.raises(InputError, match=r"no config\.json"):
        ClipAestheticScorer(tmp_path, head)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(InputError, match="'bert'"):
        ClipAestheticScorer(tmp_path, head)


def test_head_of_linear_layers_is_applied_in_the_order_of_its_numbers(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"layers.2": (8, 12), "layers.10": (1, 8), "layers.0": (12, 6)}  # 10 comes last, not after 0
    arrays = {f"{name}.weight": rng.normal(size=shape) for name, shape in shapes.items()}
    arrays |= {f"{name}.bias": rng.normal(size=shape[0]) for name, shape in shapes.items()}
    layers = read_head(save_head(tmp_path / "head.npz", **arrays))
    assert [weight.shape for weight, _ in layers] == [(12, 6), (8, 12), (1, 8)]
    np.testing.assert_allclose(layers[2][0], arrays["layers.10.weight"], rtol=1e-6)
    np.testing.assert_allclose(layers[2][1], arrays["layers.10.bias"], rtol=1e-6)


def test_bare_weight_has_no_bias(tmp_path):
    np.save(tmp_path / "head.npy", np.arange(6.0))
    ((weight, bias),) = read_head(tmp_path / "head.npy")
    np.testing.assert_array_equal(weight, np.arange(6.0, dtype=np.float32)[None])
    np.testing.assert_array_equal(bias, [0])


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"weight": np.zeros((2, 6)), "bias": np.zeros(2)}, "gives 2 numbers"),
        ({"weight": np.zeros((1, 6)), "bias": np.zeros(3)}, r"bias \[3\]"),
        ({"weight": np.zeros((1, 6)), "scale": np.zeros(1)}, "scale"),
        ({"weight": np.full((1, 6), np.nan)}, "not finite"),
        ({"0.weight": np.zeros((5, 6)), "1.weight": np.zeros((1, 4))}, r"1\.weight has the shape \[1, 4\]"),
        ({}, "no arrays"),
    ],
)
def test_heads_that_give_no_single_score_are_refused(tmp_path, arrays, message):
    with pytest.raises(InputError, match=message):
        read_head(save_head(tmp_path / "head.npz", **arrays))


def test_pickles_and_damaged_files_are_refused(tmp_path):
    for name, message in [("head.pth", "pickle"), ("head.npz", "cannot"), ("head.safetensors", "cannot")]:
        (tmp_path / name).write_bytes(b"\x80\x02not a head")
        with pytest.raises(InputError, match=message):
            read_head(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        read_head(tmp_path / "missing.npz")

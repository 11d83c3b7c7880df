"""The official PyTorch classes colour a toon clip with exported weights exactly as our pipeline does.

ANIMECOLOR_OFFICIAL names a checkout of the official repository, whose code is not ours to ship. Its image
encoder is nvidia/RADIO: with ANIMECOLOR_RADIO, a checkout of NVlabs/RADIO (which needs timm), PyTorch
computes the reference image's features too; without it the official classes are given ours.

    ANIMECOLOR_OFFICIAL=AnimeColor/ ANIMECOLOR_RADIO=RADIO/ pytest -m slow tests/test_official.py
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from animecolor_jax import safetensors_io
from animecolor_jax.config import preset
from animecolor_jax.convert.export import export_checkpoint
from animecolor_jax.parity.check import check_fixture
from animecolor_jax.pipeline import NEGATIVE_PROMPT, Noise, Pipeline
from animecolor_jax.weights import BUNDLED, Weights, write_initial
from data_pipeline.toon import draw_clip

TOOL = Path(__file__).parents[1] / "tools" / "record_reference.py"
OFFICIAL, RADIO = os.environ.get("ANIMECOLOR_OFFICIAL"), os.environ.get("ANIMECOLOR_RADIO")
FRAMES, HEIGHT, WIDTH, STEPS = 9, 64, 96, 4
RADIO_TOLERANCE = 1e-5  # of the largest value, as of the `radio` fixture

pytestmark = [pytest.mark.slow, pytest.mark.torch]
needs_radio = pytest.mark.skipif(not RADIO, reason="ANIMECOLOR_RADIO names no checkout of NVlabs/RADIO")
needs_official = pytest.mark.skipif(
    not OFFICIAL, reason="ANIMECOLOR_OFFICIAL names no checkout of the official repository"
)


@pytest.fixture(scope="module", params=["bundled", "mini-cpu", "tiny"])
def weights(request, tmp_path_factory):
    """A weights directory: the trained one, or random weights of a preset."""
    if request.param != "bundled":
        directory = tmp_path_factory.mktemp("random") / request.param
        write_initial(directory, preset(request.param))
        for file in directory.glob("*.safetensors"):
            vary_constants(file)
        return directory
    return BUNDLED


def vary_constants(file):
    """Adds noise to every parameter that starts as a constant: HCE's last layers at 0 would hide the rest."""
    rng = np.random.default_rng(0)
    with safetensors_io.Reader(file) as reader:
        leaves = {name: reader.read(name) for name in reader.specs}
    for name, leaf in leaves.items():
        if leaf.dtype == np.float32 and np.ptp(leaf) == 0:
            leaves[name] = leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32)
    safetensors_io.write(file, leaves, leaves.items(), {})


@pytest.fixture(scope="module")
def exported(weights, tmp_path_factory):
    """The same weights as PyTorch safetensors."""
    folder = tmp_path_factory.mktemp("exported") / "checkpoint"
    export_checkpoint(weights, folder)
    return folder


@pytest.fixture(scope="module")
def clip():
    """A toon clip the size of `mini-cpu`'s."""
    return draw_clip(FRAMES, HEIGHT, WIDTH, seed=3)


@pytest.fixture(scope="module")
def pipeline(weights):
    """Ours."""
    return Pipeline.load(weights, dtype="float32")


@pytest.fixture(scope="module")
def our_features(pipeline, clip):
    """The reference image's summary [1, K E] and features [1, N, E] by the official code's names."""
    summary, features = pipeline.image_encoder(clip.reference[None] / np.float32(255))
    return {"id_cond": np.asarray(summary), "id_vit_hidden": np.asarray(features)}


@pytest.fixture(scope="module")
def radio_features(weights, exported, clip):
    """`our_features` by the classes of NVlabs/RADIO."""
    pytest.importorskip("timm", reason="NVlabs/RADIO builds its networks with timm")
    import torch
    from safetensors.torch import load_file

    config = Weights(weights).config.image_encoder
    state = load_file(exported / "image_encoder" / "model.safetensors")
    state = {name.removeprefix("radio_model."): value.float() for name, value in state.items()}
    indices = state.pop("summary_idxs").long()
    num_classes = int(indices.max()) + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RADIO)
        from radio.input_conditioner import get_default_conditioner
        from radio.radio_model import RADIOModel, create_model_from_args

        arguments = dict.fromkeys(
            ("in_chans", "input_size", "drop_path", "drop_block", "bn_momentum", "bn_eps"), None
        )
        network = create_model_from_args(
            SimpleNamespace(
                **arguments,
                model="vit_base_patch16_224",
                model_kwargs={
                    "embed_dim": config.embed_dim,
                    "depth": config.depth,
                    "num_heads": config.num_heads,
                    "mlp_ratio": config.mlp_ratio,
                },
                pretrained=False,
                num_classes=0,
                drop=0.0,
                gp=None,
                torchscript=False,
                initial_checkpoint="",
                cpe_max_size=config.table_size * config.patch_size,
                teachers=[{"name": str(index)} for index in range(num_classes)],
                cls_token_per_teacher=True,
                cpe_num_registers=config.num_prefix_tokens - num_classes,
            )
        )
        model = RADIOModel(network, get_default_conditioner(), config.patch_size, None, None, indices)
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert missing == ["summary_idxs"] and unexpected == []
        # releases differ in this one flag, which our config states
        interpolate = torch.nn.functional.interpolate
        patch.setattr(
            torch.nn.functional,
            "interpolate",
            lambda *args, **options: interpolate(*args, **{**options, "align_corners": config.align_corners}),
        )
        with torch.no_grad():
            image = torch.from_numpy(clip.reference).permute(2, 0, 1)[None] / 255
            summary, features = model.eval()(image)
    return {"id_cond": summary.numpy(), "id_vit_hidden": features.numpy()}


@needs_radio
def test_radio_gives_the_features_of_our_image_encoder(our_features, radio_features):
    for name, theirs in radio_features.items():
        error = np.abs(our_features[name] - theirs).max() / np.abs(theirs).max()
        print(f"{name}: {error:.1e} of the largest value")
        assert error < RADIO_TOLERANCE, name


@pytest.fixture(scope="module", params=[1.0, 2.0], ids=["unguided", "guided"])
def recording(request, exported, clip, tmp_path_factory):
    """(guidance scale, recording of the official pipeline on the clip, its tensors)."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("recording")
    (folder / "sketch").mkdir()
    for index, frame in enumerate(clip.line_art):
        Image.fromarray(frame).save(folder / "sketch" / f"{index:03}.png")
    Image.fromarray(clip.reference).save(folder / "reference.png")
    features = request.getfixturevalue("radio_features" if RADIO else "our_features")
    features = {name: np.ascontiguousarray(value) for name, value in features.items()}
    safetensors_io.write(folder / "features.safetensors", features, features.items(), {})
    arguments = {
        "repo": OFFICIAL, "source": exported, "sketch": folder / "sketch",
        "reference": folder / "reference.png", "radio-features": folder / "features.safetensors",
        "size": f"{HEIGHT}x{WIDTH}", "frames": FRAMES, "steps": STEPS, "guidance": request.param,
        "prompt": clip.caption, "negative-prompt": NEGATIVE_PROMPT, "device": "cpu",
        "out": folder / "official.safetensors",
    }  # fmt: skip
    command = [sys.executable, TOOL, "--trace", "--no-bfloat16"]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with safetensors_io.Reader(arguments["out"]) as reader:
        return request.param, arguments["out"], {name: reader.read(name) for name in reader.specs}


@needs_official
def test_every_intermediate_result_is_that_of_the_official_classes(recording, weights):
    _, path, tensors = recording
    result = check_fixture(path, weights=weights)
    names = {name.removeprefix("outputs/") for name in tensors if name.startswith("outputs/")}
    assert set(result.errors) == names
    for name in (f"recorded/step_{STEPS - 1}/latents", result.worst[2]):
        print(f"{name}: {result.errors[name][0]:.1e} of the largest value")
    assert result.passed, result.worst


@needs_official
def test_the_pipeline_gives_the_frames_of_the_official_one(recording, pipeline, clip):
    guidance, _, tensors = recording
    reference, latents = (tensors[f"inputs/recorded/{name}"] for name in ("ref_noise", "init_latents"))
    noise = Noise(reference.transpose(0, 2, 3, 4, 1), latents[0].transpose(0, 2, 3, 1))
    ours = pipeline(
        clip.line_art,
        clip.reference,
        prompt=clip.caption,
        num_steps=STEPS,
        guidance_scale=guidance,
        noise=noise,
        window=FRAMES,
    )
    theirs = np.round(tensors["outputs/recorded/videos"][0].transpose(1, 2, 3, 0) * 255)
    difference = np.abs(ours - theirs)
    print(f"largest difference {difference.max()} of 255, {(difference > 0).mean():.2%} of values differ")
    assert ours.shape == theirs.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert difference.max() <= 1
    assert np.ptp(ours) > 8  # random weights, too, paint more than one grey

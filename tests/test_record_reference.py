"""Recordings of the PyTorch reference: what they hold, that they repeat exactly, and what is refused.

The networks are plain CogVideoX from diffusers; of the official AnimeColor mode, whose code is not ours to
ship, everything up to the first network is tested.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from animecolor_jax.config import preset
from animecolor_jax.convert import hce
from animecolor_jax.convert.checkpoint import convert_checkpoint
from animecolor_jax.convert.export import export_checkpoint
from animecolor_jax.errors import InputError
from animecolor_jax.parity.check import check_fixture
from animecolor_jax.tokenizer import Tokenizer
from animecolor_jax.weights import WeightsWriter

pytestmark = pytest.mark.torch
TOOLS = Path(__file__).parents[1] / "tools"
LATENT = (3, 4, 4, 6)  # frames, channels, height, width of 9 frames of 32x48 pixels
TEXT = "an anime girl with long hair smiles at the camera while strange trajectories distort"
ARGUMENTS = "--device cpu --frames 9 --steps 2 --guidance 3 --prompt anime --negative-prompt strange --json"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random CogVideoX in the layout that from_pretrained reads."""
    import diffusers
    import sentencepiece
    import torch
    import transformers

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("checkpoint")
    diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=16,
        num_layers=2,
        sample_height=4,
        sample_width=6,
        sample_frames=9,
        max_text_seq_length=8,
    ).save_pretrained(root / "transformer")
    diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    ).save_pretrained(root / "vae")
    transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=64,
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    ).save_pretrained(root / "text_encoder")
    diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    ).save_pretrained(root / "scheduler")
    (root / "tokenizer").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20),
        model_prefix=str(root / "tokenizer" / "spiece"),
        vocab_size=32,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return root


@pytest.fixture(scope="module")
def recording(checkpoint, tmp_path_factory):
    """(path, tensors, JSON, last line of stdout) of one traced run as a user starts it."""
    out = tmp_path_factory.mktemp("recording") / "tiny.safetensors"
    command = [sys.executable, TOOLS / "record_reference.py", "--source", checkpoint, "--out", out, "--trace"]
    done = subprocess.run([*command, *ARGUMENTS.split()], capture_output=True, text=True, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return out, load(out), json.loads(out.with_suffix(".json").read_text()), done.stdout.splitlines()[-1]


@pytest.fixture
def tool(monkeypatch):
    """The tool as a module."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import record_reference

    return record_reference


def load(path):
    from safetensors.numpy import load_file

    return load_file(path)


def outputs_of(tensors):
    prefix = "outputs/recorded/"
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_recording_holds_inputs_every_step_the_trace_and_the_frames(recording):
    out, tensors, _, line = recording
    text, tokens = (1, 8), (1, 18, 32)  # 3 latent frames of 2x3 patches
    expected = {
        "prompt_embeds": (*text, 16),
        "negative_prompt_embeds": (*text, 16),
        "vae_mean": (1, 4, 3, 4, 6),
        "videos": (1, 3, 9, 32, 48),
    }
    for step in range(2):
        expected[f"step_{step}/noise_pred_raw"] = (2, *LATENT)
        expected[f"step_{step}/timestep"] = (1,)
        expected[f"step_{step}/latents"] = (1, *LATENT)
    for block in range(2):
        expected[f"step_0/block_{block}/hidden"] = tokens
        expected[f"step_0/block_{block}/text"] = (*text, 32)
    outputs = outputs_of(tensors)
    assert {name: value.shape for name, value in outputs.items()} == expected
    inputs = {
        "prompt_ids": text,
        "negative_prompt_ids": text,
        "pixels": (1, 3, 9, 32, 48),
        "init_latents": (1, *LATENT),
    }
    assert {name: value.shape for name, value in tensors.items() if name.startswith("inputs")} == {
        f"inputs/recorded/{name}": shape for name, shape in inputs.items()
    }
    integers = {name for name, value in tensors.items() if value.dtype == np.int64}
    assert {name.rpartition("/")[2] for name in integers} == {"prompt_ids", "negative_prompt_ids", "timestep"}
    assert all(value.dtype == np.float32 for name, value in tensors.items() if name not in integers)
    assert all(np.isfinite(value).all() for value in tensors.values())
    assert json.loads(line) == {"out": str(out), "outputs": len(expected)}


def test_json_describes_the_run_and_its_sources(recording, checkpoint):
    _, tensors, meta, _ = recording
    assert (meta["name"], meta["kind"], meta["seed"]) == ("tiny", "pipeline", 43)
    assert "4 frames at a time" in meta["what_was_run"]
    assert {"default", "patterns", "skip"} <= set(meta["tolerance"]) and meta["tolerance"]["default"] == 1e-4
    assert {"torch", "diffusers", "transformers"} <= set(meta["versions"])
    config = meta["config"]
    assert config["plain"] is True and config["weights"] == "external"
    for section, file in {
        "denoiser": "transformer/config.json",
        "vae": "vae/config.json",
        "text_encoder": "text_encoder/config.json",
        "scheduler_config": "scheduler/scheduler_config.json",
    }.items():
        assert config[section] == json.loads((checkpoint / file).read_text())
    case = dict(config["cases"]["recorded"])
    for ids, key in (("prompt_ids", "prompt_length"), ("negative_prompt_ids", "negative_length")):
        length, padded = case.pop(key), tensors[f"inputs/recorded/{ids}"][0]
        assert padded[length - 1] == 1 and not padded[length:].any()  # the end mark, then padding
    assert case == {
        "frames": 9,
        "height": 32,
        "width": 48,
        "steps": 2,
        "guidance_scale": 3.0,
        "scheduler": "DDIM_Origin",
    }
    digest = hashlib.sha256((checkpoint / "vae" / "config.json").read_bytes()).hexdigest()
    assert config["sources"]["vae"]["config.json"] == digest
    assert set(config["sources"]) == {"denoiser", "vae", "text_encoder", "tokenizer", "scheduler"}


def test_bfloat16_error_is_stored_for_every_float_output(recording):
    _, tensors, meta, _ = recording
    floats = {f"recorded/{name}" for name, value in outputs_of(tensors).items() if value.dtype == np.float32}
    errors = meta["bfloat16_vs_float32"]
    assert set(errors) == floats
    assert all(0 < error["rel_rms"] < 0.1 and error["rel_to_max"] > 0 for error in errors.values())


def test_recorded_outputs_follow_from_the_recorded_inputs(recording, checkpoint):
    import diffusers
    import torch

    tensors = {
        name.replace("/recorded/", "/"): torch.from_numpy(value) for name, value in recording[1].items()
    }
    network = diffusers.CogVideoXTransformer3DModel.from_pretrained(checkpoint / "transformer")
    vae = diffusers.AutoencoderKLCogVideoX.from_pretrained(checkpoint / "vae")
    scheduler = diffusers.DDIMScheduler.from_pretrained(checkpoint / "scheduler")
    scheduler.set_timesteps(2)
    latents = tensors["inputs/init_latents"]
    prompts = torch.cat([tensors["outputs/negative_prompt_embeds"], tensors["outputs/prompt_embeds"]])
    with torch.no_grad():
        for step, timestep in enumerate(scheduler.timesteps):
            assert tensors[f"outputs/step_{step}/timestep"] == timestep
            both = network(torch.cat([latents] * 2), prompts, timestep.expand(2)).sample
            torch.testing.assert_close(tensors[f"outputs/step_{step}/noise_pred_raw"], both)
            guided = both[:1] + 3 * (both[1:] - both[:1])
            latents = scheduler.step(guided, timestep, latents).prev_sample
            torch.testing.assert_close(tensors[f"outputs/step_{step}/latents"], latents)
        decoded = vae.decode(latents.permute(0, 2, 1, 3, 4) / vae.config.scaling_factor).sample
        first_chunk = vae.encoder(tensors["inputs/pixels"][:, :, :5])[0][:, :4]  # 9 frames: chunks of 5 and 4
    torch.testing.assert_close(tensors["outputs/videos"], (decoded / 2 + 0.5).clamp(0, 1))
    torch.testing.assert_close(tensors["outputs/vae_mean"][:, :, :2], first_chunk)


def test_the_same_arguments_give_bit_identical_tensors(recording, checkpoint, tool, tmp_path):
    out = tmp_path / "again.safetensors"
    arguments = ["--source", str(checkpoint), "--out", str(out), "--trace", "--no-bfloat16"]
    assert tool.main([*arguments, *ARGUMENTS.split()]) == 0
    again = load(out)
    assert again.keys() == recording[1].keys()
    assert all(np.array_equal(value, again[name]) for name, value in recording[1].items())
    assert json.loads(out.with_suffix(".json").read_text())["bfloat16_vs_float32"] == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.json", "again.safetensors"]


def test_without_guidance_only_the_prompt_is_run(checkpoint, tool, tmp_path):
    out = tmp_path / "unguided.safetensors"
    arguments = ["--source", str(checkpoint), "--out", str(out), "--no-bfloat16", *ARGUMENTS.split()]
    assert tool.main([*arguments, "--guidance", "1", "--steps", "1", "--sampler", "ddim-cog"]) == 0
    outputs = outputs_of(load(out))
    assert outputs["step_0/noise_pred_raw"].shape == (1, *LATENT)
    assert "negative_prompt_embeds" not in outputs and not any("block" in name for name in outputs)
    config = json.loads(out.with_suffix(".json").read_text())["config"]
    assert config["cases"]["recorded"]["scheduler"] == "DDIM_Cog"


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        (["--frames", "8"], "8 frames"),
        (["--frames", "13"], "13 frames"),  # the position table has 9
        (["--size", "48x48"], "48x48"),  # diffusers would recompute the table
        (["--size", "0x48"], "0x48"),
        (["--size", "large"], "HEIGHTxWIDTH"),
        (["--steps", "0"], "0 steps"),
        (["--guidance", "nan"], "guidance nan"),
        (["--device", "warp"], "warp"),
        (["--sampler", "euler"], "invalid choice"),
        (["--sketch", "sketch.mp4"], "--sketch"),  # needs --repo
        (["--repo", "no/clone"], "cogvideox/models/"),
        (["--source", "nowhere"], "is not a directory"),
        (["--source", "lora=nowhere"], "unknown part"),
        (["--out", "missing/folder/out.safetensors"], "cannot be written to"),
        (["--out", "out.npz"], "out.npz"),
        (["--no-such-flag"], "unrecognized"),
    ],
)
def test_bad_arguments_are_refused_before_any_loading(checkpoint, tool, tmp_path, capsys, extra, what):
    defaults = ["--source", str(checkpoint), "--out", str(tmp_path / "out.safetensors"), *ARGUMENTS.split()]
    assert tool.main([*defaults, *extra]) == 2
    captured = capsys.readouterr()
    error = json.loads(captured.out.splitlines()[-1])["error"]
    assert set(error) == {"what", "where", "expected", "fix"} and what in error["what"]
    assert "loading" not in captured.err and not list(tmp_path.iterdir())


@pytest.fixture
def refused(checkpoint, tool, tmp_path, capsys):
    """Function: the error of running on a changed copy of the checkpoint, and what went to stderr."""
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)

    def run(change):
        change(copy)
        out = tmp_path / "out.safetensors"
        assert tool.main(["--source", str(copy), "--out", str(out), *ARGUMENTS.split()]) == 2
        assert not out.exists()
        captured = capsys.readouterr()
        return json.loads(captured.out.splitlines()[-1])["error"], captured.err

    return run


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda copy: (copy / "vae" / "config.json").unlink(), "config.json"),
        (lambda copy: (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "holds no weights"),
        (lambda copy: (copy / "scheduler" / "scheduler_config.json").write_text("{"), "Expecting"),
        (
            lambda copy: (copy / "tokenizer" / "spiece.model").write_bytes(b"garbage"),
            "from_pretrained failed",
        ),
        (lambda copy: (copy / "tokenizer" / "spiece.model").unlink(), "holds no tokenizer"),
        (lambda copy: edit_json(copy / "transformer" / "config.json", in_channels=8), "in_channels is 8"),
        (lambda copy: edit_json(copy / "text_encoder" / "config.json", d_model=32), "text_embed_dim is 16"),
        (lambda copy: edit_json(copy / "text_encoder" / "config.json", vocab_size=4), "gives id"),
    ],
)
def test_an_unfit_checkpoint_is_refused_before_any_loading(refused, change, what):
    error, progress = refused(change)
    assert what in error["what"] + error["where"]
    assert "loading" not in progress


def test_a_checkpoint_that_lacks_a_weight_is_refused_by_its_name(refused):
    def drop(copy):
        from safetensors.numpy import load_file, save_file

        file = copy / "vae" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        del tensors["decoder.conv_out.conv.weight"]
        save_file(tensors, file, metadata={"format": "pt"})

    error, _ = refused(drop)
    assert "decoder.conv_out.conv.weight" in error["what"]


def test_a_named_part_wins_over_a_sub_folder_and_two_sub_folders_are_refused(checkpoint, tool, tmp_path):
    other = tmp_path / "other"
    (other / "vae").mkdir(parents=True)
    chosen = tool.resolve_sources([f"vae={other / 'vae'}", str(checkpoint)], ["vae", "tokenizer"])
    assert chosen == {"vae": other / "vae", "tokenizer": checkpoint / "tokenizer"}
    with pytest.raises(tool.InputError, match="vae has 2 candidates"):
        tool.resolve_sources([str(other), str(checkpoint)], ["vae"])
    with pytest.raises(tool.InputError, match="lcg has 0 candidates"):
        tool.resolve_sources([str(checkpoint)], ["lcg"])


def test_bytes_of_an_exported_tokenizer_are_numbered_as_ours(tool, tmp_path):
    with WeightsWriter(tmp_path / "weights") as writer:
        writer.scheduler(preset("tiny").scheduler, {})
        Tokenizer.save_byte_level(writer.tokenizer_directory)
    export_checkpoint(tmp_path / "weights", tmp_path / "exported")
    prompts = ["é <extra_id_0>", "longer than there is room for"]
    args = SimpleNamespace(prompt=prompts[0], negative_prompt=prompts[1])
    configs = {"denoiser": {"max_text_seq_length": 24}, "text_encoder": {"vocab_size": 259}}
    ids, lengths = tool.tokenize(args, tmp_path / "exported" / "tokenizer", configs)
    with pytest.warns(UserWarning, match="too long"):
        ours = Tokenizer.load(tmp_path / "weights" / "tokenizer")(prompts, 24)
    assert np.array_equal(np.concatenate([ids["prompt_ids"], ids["negative_prompt_ids"]]), ours)
    assert lengths == {"prompt_length": 16, "negative_length": 24}


def test_an_exported_hce_keeps_its_sizes_where_the_official_class_has_constants(tool):
    import reference_runs

    class Extractor:  # constants in the places where the official class has them
        def __init__(self, dim=1024, depth=3, dim_head=64, heads=16, output_dim=2048, ff_mult=4):
            self.mlp = [range(2560, 1024, -1), range(1024, 1280)]
            self.sizes = dim, depth, dim_head, heads, output_dim, ff_mult

        def forward(self):
            return range(1280)

    module = SimpleNamespace(LocalFacialExtractor=Extractor, PerceiverCrossAttention=dict)
    sizes = hce.config_to_torch(preset("mini-cpu").hce)["hce"]
    with reference_runs.hce_sizes_of(module, sizes):
        extractor = module.LocalFacialExtractor(heads=4, output_dim=2048)
        cross = module.PerceiverCrossAttention(dim=192, dim_head=128, heads=16, kv_dim=2048)
    assert extractor.mlp == [range(192, 96, -1), range(96, 96)] and extractor.forward() == range(96)
    assert extractor.sizes == (96, 2, 24, 4, 96, 4)
    assert cross == {"dim": 192, "dim_head": 32, "heads": 6, "kv_dim": 96}
    assert module.LocalFacialExtractor is Extractor and Extractor().forward() == range(1280)


@pytest.fixture
def official(checkpoint, tool, tmp_path):
    """Function: extra arguments -> prepared job of the official mode, on an empty stand-in for its code."""
    from safetensors.numpy import save_file

    repo, root = tmp_path / "repo", tmp_path / "animecolor"
    for file in tool.REPO_FILES.values():
        (repo / file).parent.mkdir(parents=True, exist_ok=True)
        (repo / file).touch()
    shutil.copytree(checkpoint, root)
    shutil.copytree(root / "transformer", root / "referencenet")
    edit_json(root / "transformer" / "config.json", in_channels=8, sample_frames=13)
    features = {"id_cond": np.ones((1, 8), np.float32), "id_vit_hidden": np.ones((1, 6, 4), np.float32)}
    save_file(features, tmp_path / "features.safetensors")

    def prepare(*extra, features=True):
        given = ["--radio-features", str(tmp_path / "features.safetensors")] if features else []
        return tool.prepare(
            tool.parse_arguments(
                [
                    "--repo",
                    str(repo),
                    "--source",
                    str(root),
                    "--out",
                    str(tmp_path / "out.safetensors"),
                    "--device",
                    "cpu",
                    "--prompt",
                    "anime",
                    "--negative-prompt",
                    "strange",
                    *given,
                    *map(str, extra),
                ]
            )
        )

    return prepare


def test_reference_noise_is_drawn_before_the_initial_latents_from_one_generator(official):
    import torch

    inputs = official("--synthetic", "--size", "32x48", "--frames", 5, "--seed", 7).inputs
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(inputs["ref_noise"], torch.randn(1, 4, 1, 4, 6, generator=generator))
    assert torch.equal(inputs["init_latents"], torch.randn(1, 2, 4, 4, 6, generator=generator))
    assert inputs["control_video"].shape == (1, 3, 5, 32, 48) and inputs["ref_image"].shape == (1, 3, 32, 48)
    for name in ("control_video", "ref_image"):
        assert inputs[name].min() >= 0 and 0.5 < inputs[name].max() <= 1


def test_sketch_and_reference_are_prepared_as_in_the_official_script(official, tmp_path):
    from PIL import Image

    sketch = tmp_path / "sketch"
    sketch.mkdir()
    for frame in range(7):
        Image.fromarray(np.full((20, 30, 3), (10 * frame, 0, 255), np.uint8)).save(sketch / f"{frame:03}.png")
    Image.fromarray(np.full((47, 50, 3), (255, 51, 0), np.uint8)).save(tmp_path / "reference.png")
    job = official("--sketch", sketch, "--reference", tmp_path / "reference.png")
    video, image = job.inputs["control_video"], job.inputs["ref_image"]
    assert video.shape == (1, 3, 5, 32, 48)  # 4k+1 frames, the reference's size floored to multiples of 16
    colours = [np.arange(5) * 10 / 255, np.zeros(5), np.ones(5)]
    np.testing.assert_allclose(video[0, :, :, 9, 9], colours, atol=1e-6)
    np.testing.assert_allclose(image[0, :, 9, 9], [1, 0.2, 0], atol=1e-6)
    assert (job.case["frames"], job.case["height"], job.case["width"]) == (5, 32, 48)
    assert job.inputs["id_cond"].shape == (1, 8)  # features from a file are inputs too


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        (["--synthetic"], "no size"),
        (["--synthetic", "--size", "40x48"], "40x48"),
        (["--synthetic", "--size", "32x48", "--frames", "17"], "17 frames"),  # the position table has 13
        (["--synthetic", "--reference", "reference.png"], "inputs are"),
        (["--sketch", "sketch.mp4"], "inputs are"),
        (["--sketch", "nowhere.mp4", "--reference", "nowhere.png"], "does not exist"),
        (["--sketch", __file__, "--reference", __file__], "cannot identify"),
    ],
)
def test_bad_inputs_of_the_official_mode_are_refused(official, tool, extra, what):
    with pytest.raises(tool.InputError, match=what):
        official(*extra)


def test_a_sketch_that_does_not_play_is_refused(official, tool, tmp_path):
    from PIL import Image

    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(tmp_path / "reference.png")
    (tmp_path / "sketch.mp4").write_bytes(b"no video")
    with pytest.raises(tool.InputError, match="has 0 frames"):
        official("--sketch", tmp_path / "sketch.mp4", "--reference", tmp_path / "reference.png")


def test_code_from_a_checkpoint_is_not_executed_unasked(official, tool):
    with pytest.raises(tool.InputError, match="allow-remote-code"):
        official("--synthetic", "--size", "32x48", features=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_a_recording_checks_our_converted_weights(dtype, checkpoint, recording, tmp_path):
    out, tensors, _, _ = recording
    convert_checkpoint(checkpoint, tmp_path / "weights")
    result = check_fixture(out, weights=tmp_path / "weights", dtype=dtype)
    assert result.passed, result.worst
    outputs = {name.removeprefix("outputs/") for name in tensors if name.startswith("outputs/")}
    assert set(result.errors) == outputs and result.not_compared == []


def test_a_recording_without_weights_says_where_to_get_them(recording):
    with pytest.raises(InputError, match="the recording holds no weights"):
        check_fixture(recording[0])

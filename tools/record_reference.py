r"""Records a parity fixture of a published checkpoint with the PyTorch code it was published for.

    python tools/record_reference.py --repo AnimeColor/ --synthetic --size 256x384 --trace \
        --source denoiser=AnimeColor/checkpoints/transformer lcg=AnimeColor/checkpoints/referencenet \
        CogVideoX-Fun-V1.1-2b-Pose/ image_encoder=RADIO/ --allow-remote-code --out animecolor.safetensors
    python tools/record_reference.py --source CogVideoX-2b/ --out cogvideox.safetensors

The first runs the official AnimeColor pipeline, the second plain CogVideoX from diffusers. Inputs, noise
and intermediate results go to OUT.safetensors, configs and the reference's own bfloat16 error to OUT.json;
weights do not. `check_parity.py OUT.safetensors --weights WEIGHTS` then compares our code, with weights
converted from the same checkpoints. Runs without JAX and this repository's packages (with reference_runs.py
beside it): needs torch, diffusers and transformers, for AnimeColor also einops, for --sketch OpenCV.
"""

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image, UnidentifiedImageError
from reference_runs import (
    REPO_FILES,
    InputError,
    bfloat16_errors,
    file_hashes,
    load,
    require,
    run,
    say,
    versions,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

SUBFOLDERS = {
    "transformer": "denoiser",
    "referencenet": "lcg",
    "vae": "vae",
    "text_encoder": "text_encoder",
    "tokenizer": "tokenizer",
    "scheduler": "scheduler",
}
PARTS = (*SUBFOLDERS.values(), "image_encoder")
SAMPLERS = {"ddim": "DDIM_Origin", "ddim-cog": "DDIM_Cog"}
TOKENIZERS = {  # by the file that the class reads; byte_level.json is this repository's own
    "spiece.model": transformers.T5Tokenizer,
    "tokenizer.json": transformers.T5Tokenizer,
    "byte_level.json": transformers.ByT5Tokenizer,
}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MAX_FRAMES = 49  # the official pipeline refuses more
CASE = "recorded"
NEGATIVE_PROMPT = (  # the official test script's
    "The video is not of a high quality, it has a low resolution. Watermark present in each frame. "
    "The background is solid. Strange body and strange trajectory. Distortion. "
)
OFFICIAL_RUN = (
    "Official CogVideoX_Fun_Pipeline_Control_Color.__call__ with prompt embeddings from T5EncoderModel (no "
    "mask), RADIO features of ref_image and recorded noise: VAE encode of sketch (mode) and reference image "
    "(mean + std * ref_noise), reference pass at i == 0, denoising loop, VAE decode, clamp to [0, 1]. The "
    "VAE's conv caches are cleared before every encode: the official class leaves them set after one frame."
)
PLAIN_RUN = (
    "diffusers' CogVideoXPipeline.__call__ with prompt embeddings from T5EncoderModel (no mask) and recorded "
    "noise: denoising loop, VAE decode, clamp to [0, 1]. vae_mean is the VAE's encoding of pixels, 4 frames "
    "at a time as in CogVideoX's own code (diffusers' default is 8)."
)
TOLERANCE = {
    "default": 1e-4,
    "patterns": {},
    "skip": [],
    "why": "one chained computation: rounding of text encoder, VAE and blocks is carried from step to step",
}


class Job(NamedTuple):
    """One recording, checked: what to run and on what."""

    args: argparse.Namespace
    sources: dict  # part -> directory
    configs: dict  # part -> its config.json
    case: dict  # frames, height, width, steps, guidance_scale, scheduler, prompt_length, negative_length
    inputs: dict  # name -> float32 or int64 tensor, on the CPU
    radio_features: dict  # id_cond and id_vit_hidden, if they come from a file: then inputs and outputs

    @property
    def plain(self):
        """No sketch, LCG and HCE."""
        return self.args.repo is None

    @property
    def guided(self):
        """Whether every step is computed for [negative, positive] prompt."""
        return self.args.guidance > 1


# ---------------------------------------------------------------------------------------- arguments


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours, so that --json shows them too."""

    def error(self, message):
        raise InputError(message, "command line", "arguments as --help lists them", "correct them")


def size_argument(text):
    """HEIGHTxWIDTH in pixels as (height, width)."""
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, e.g. 320x512")
    return int(match[1]), int(match[2])


def parse_arguments(argv):
    """The command line as a namespace. Raises InputError."""
    parser = Parser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--repo", type=Path, metavar="DIR",
        help="clone of github.com/IamCreateAI/AnimeColor; without it: plain CogVideoX")
    add("--source", nargs="+", action="extend", required=True, metavar="[PART=]DIR",
        help=f"directories as from_pretrained takes. PART is one of {', '.join(PARTS)}; a bare DIR is "
        f"searched for sub-folders {', '.join(SUBFOLDERS)}; a named part wins over a sub-folder")
    add("--sketch", type=Path, metavar="VIDEO_OR_FOLDER", help="line art: a video, or a folder of frames")
    add("--reference", type=Path, metavar="IMAGE", help="the coloured reference image")
    add("--synthetic", action="store_true", help="draw a smooth random sketch and reference instead")
    add("--radio-features", type=Path, metavar="FILE",
        help="safetensors with id_cond [1, 2E] and id_vit_hidden [1, N, E]: what RADIO gives in float32 for "
        "exactly this reference at this size. Replaces image_encoder")
    add("--allow-remote-code", action="store_true",
        help="RADIO is not part of transformers: its checkpoint brings Python files, which from_pretrained "
        "executes (trust_remote_code). Read them, then permit it with this flag")
    add("--size", type=size_argument, metavar="HxW",
        help="pixels; default: the reference's, floored to multiples of 16, or the transformer's own")
    add("--frames", type=int, metavar="F",
        help="4k+1; default: the sketch's, at most 49, or 9 without a sketch")
    add("--steps", type=int, default=4, metavar="N", help="denoising steps (default: 4)")
    add("--guidance", type=float, default=6.0, metavar="G", help="none up to 1 (default: 6)")
    add("--sampler", choices=SAMPLERS, default="ddim", help="ddim is the official one, without SNR shift")
    add("--prompt", default="An anime girl with long hair turns towards the camera and smiles.")
    add("--negative-prompt", default=NEGATIVE_PROMPT)
    add("--seed", type=int, default=43, help="of all noise, drawn on the CPU in float32 (default: 43)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--trace", action="store_true", help="also record every block of the first step, and the bank")
    add("--no-bfloat16", action="store_true", help="leave out the second run, in bfloat16")
    add("--out", type=Path, required=True, metavar="OUT.safetensors")
    add("--json", action="store_true", help="last line of stdout: one JSON object")
    return parser.parse_args(argv)


def check_arguments(args):
    """Raises InputError for what can be seen to be wrong without opening a checkpoint."""
    require(args.out.suffix == ".safetensors", f"{args.out.name!r}", "--out", "a name that ends in "
            ".safetensors", "rename it")
    require(args.out.parent.is_dir() and os.access(args.out.parent, os.W_OK), "cannot be written to",
            args.out.parent, "an existing folder", "create it or choose another --out")
    require(1 <= args.steps <= 1000, f"{args.steps} steps", "--steps", "1 to 1000", "e.g. 4")
    require(math.isfinite(args.guidance) and args.guidance > 0, f"guidance {args.guidance}", "--guidance",
            "a positive number", "6 is the official value")
    require(0 <= args.seed < 2**63 - 1, f"seed {args.seed}", "--seed", "0 to 2^63 - 2", "e.g. 43")
    require(args.frames is None or (args.frames > 0 and args.frames % 4 == 1), f"{args.frames} frames",
            "--frames", "4k+1: 1, 5, 9, 13, ...", "choose one of these")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        what = str(error).splitlines()[0]
        raise InputError(what, "--device", "a device of this machine", "e.g. --device cpu") from error
    given = {"--sketch": args.sketch, "--reference": args.reference, "--radio-features": args.radio_features}
    given = {flag: path for flag, path in given.items() if path is not None}
    if args.repo is None:
        require(not given, f"plain CogVideoX does not take {', '.join(given)}", "command line",
                "--repo DIR, or none of these", "clone github.com/IamCreateAI/AnimeColor and give --repo")
        return
    for file in REPO_FILES.values():
        require((args.repo / file).is_file(), f"has no {file}", args.repo,
                "a clone of github.com/IamCreateAI/AnimeColor", "clone it and give its folder")
    inputs = [flag for flag in ("--sketch", "--reference") if flag in given]
    require(len(inputs) == (0 if args.synthetic else 2), f"inputs are {inputs}", "command line",
            "either --sketch and --reference, or --synthetic", "add or remove one")
    for flag, path in given.items():
        require(path.exists(), "does not exist", path, f"the file of {flag}", "check the path")
    require(args.radio_features or args.allow_remote_code,
            "RADIO's checkpoint brings Python code that would be executed", "image_encoder",
            "--allow-remote-code, or --radio-features FILE",
            "read the *.py files of that directory, then add --allow-remote-code")


def resolve_sources(texts, needed):
    """`--source` arguments -> {part: directory} of the parts needed.

    Raises:
        InputError: a missing directory, an unknown part, or not exactly one candidate for a part.
    """
    named, found = {}, {}
    for text in texts:
        part, separator, path = text.partition("=")
        if not separator or Path(text).is_dir():
            part, path = "", text
        require(part in ("", *PARTS), f"unknown part {part!r}", f"--source {text}",
                f"one of {', '.join(PARTS)}", "for example --source vae=DIR")
        path = Path(path).expanduser()
        require(path.is_dir(), "is not a directory", path, "a downloaded checkpoint", "download it first")
        if part:
            named.setdefault(part, []).append(path)
        for folder, sub_part in () if part else SUBFOLDERS.items():
            if (path / folder).is_dir():
                found.setdefault(sub_part, []).append(path / folder)
    candidates = {part: named.get(part) or found.get(part, []) for part in needed}
    for part, paths in candidates.items():
        require(len(paths) == 1, f"{part} has {len(paths)} candidates: {[str(path) for path in paths]}",
                "--source", "one directory for each part", f"name it: --source {part}=DIR")
    return {part: paths[0] for part, paths in candidates.items()}


def read_config(part, path):
    """The part's config.json. Raises InputError if it or the weights beside it are not there."""
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    try:
        config = json.loads((path / name).read_text())
    except (OSError, ValueError) as error:
        raise InputError(str(error), path / name, f"the {name} of {part}", "download it again") from error
    require(isinstance(config, dict), "is no JSON object", path / name, f"the {name} of {part}",
            "download it again")
    weights = [*path.glob("*.safetensors"), *path.glob("*.bin")]
    require(weights or part == "scheduler", "holds no weights", path, "*.safetensors or *.bin",
            "download it again")
    return config


# ------------------------------------------------------------------------------- sizes and configs


def latent_scale(vae):
    """Pixels per latent along height and width; `vae` is its config.json."""
    return 2 ** (len(vae.get("block_out_channels", (128, 256, 256, 512))) - 1)


def native_size(configs):
    """(height, width) in pixels of the denoiser's position table."""
    scale, denoiser = latent_scale(configs["vae"]), configs["denoiser"]
    return scale * denoiser.get("sample_height", 60), scale * denoiser.get("sample_width", 90)


def check_configs(configs, plain):
    """Raises InputError unless the networks fit each other and the mode. Defaults are the classes'."""

    def same(part, key, default, expected, fix):
        got = configs[part].get(key, default)
        require(got == expected, f"{key} is {got}", f"config.json of {part}", f"{expected}", fix)

    latent = configs["vae"].get("latent_channels", 16)
    same("denoiser", "text_embed_dim", 4096, configs["text_encoder"].get("d_model", 512),
         "give the text encoder that belongs to the denoiser")
    same("denoiser", "out_channels", 16, latent, "give the VAE that belongs to the denoiser")
    if plain:
        same("denoiser", "in_channels", 16, latent, "AnimeColor's denoiser needs --repo")
        for key in ("patch_size_t", "ofs_embed_dim"):
            same("denoiser", key, None, None, "CogVideoX 1.5 cannot be recorded")
        same("denoiser", "use_learned_positional_embeddings", False, False,
             "image-to-video models cannot be recorded")
    else:
        same("denoiser", "in_channels", 16, 2 * latent, "plain CogVideoX is recorded without --repo")
        same("denoiser", "is_train_qformer", True, True, "give AnimeColor's denoiser")
        same("lcg", "in_channels", 16, latent, "give AnimeColor's referencenet")


def check_canvas(configs, plain, frames, height, width):
    """Raises InputError unless the networks can run at this size."""
    denoiser = configs["denoiser"]
    multiple = latent_scale(configs["vae"]) * denoiser.get("patch_size", 2)
    require(height and width and not (height % multiple or width % multiple), f"{height}x{width}", "--size",
            f"multiples of {multiple}", "choose another size")
    limits = [] if plain else [MAX_FRAMES]
    if not denoiser.get("use_rotary_positional_embeddings", False):
        limits.append(denoiser.get("sample_frames", 49))
        native = native_size(configs)
        require(not plain or (height, width) == native, f"{height}x{width}", "--size",
                f"{native[0]}x{native[1]}, the transformer's own size",
                "leave --size out: elsewhere diffusers recomputes the position table that AnimeColor resizes")
    require(frames <= min(limits, default=frames), f"{frames} frames", "--frames",
            f"at most {min(limits, default=frames)}", "choose fewer frames")


# ------------------------------------------------------------------------------------------ inputs


def prepare(args):
    """Checks all that does not need weights and makes the inputs.

    Returns:
        Job.

    Raises:
        InputError: something is wrong.
    """
    check_arguments(args)
    plain = args.repo is None
    needed = ["denoiser", "vae", "text_encoder", "tokenizer", "scheduler"]
    if not plain:
        needed += ["lcg"] if args.radio_features else ["lcg", "image_encoder"]
    sources = resolve_sources(args.source, needed)
    configs = {part: read_config(part, sources[part]) for part in needed if part != "tokenizer"}
    check_configs(configs, plain)
    clip = plain_inputs(args, configs) if plain else official_inputs(args, configs)
    frames, height, width = next(iter(clip.values())).shape[2:]
    ids, lengths = tokenize(args, sources["tokenizer"], configs)
    case = {
        "frames": frames,
        "height": height,
        "width": width,
        "steps": args.steps,
        "guidance_scale": args.guidance,
        "scheduler": SAMPLERS[args.sampler],
        **lengths,
    }
    features = read_radio_features(args.radio_features) if args.radio_features else {}
    noise = draw_noise(args.seed, configs["vae"], plain, frames, height, width)
    return Job(args, sources, configs, case, {**ids, **clip, **noise, **features}, features)


def plain_inputs(args, configs):
    """`pixels` [1, 3, F, H, W] in [-1, 1]: a smooth random clip."""
    frames, (height, width) = args.frames or 9, args.size or native_size(configs)
    check_canvas(configs, True, frames, height, width)
    return {"pixels": 2 * smooth_clip(args.seed, 3, frames, height, width) - 1}


def official_inputs(args, configs):
    """`control_video` [1, 3, F, H, W] and `ref_image` [1, 3, H, W] in [0, 1]."""
    if args.synthetic:
        require(args.size, "no size", "--synthetic", "--size HxW", "e.g. --size 320x512")
        frames = args.frames or 9
        check_canvas(configs, False, frames, *args.size)
        clip = smooth_clip(args.seed, 4, frames, *args.size)
        lines = 1 - torch.exp(-(((clip[:, :1] - 0.5) / 0.025) ** 2))  # dark where it passes its middle
        return {"control_video": lines.repeat(1, 3, 1, 1, 1), "ref_image": clip[:, 1:, 0].contiguous()}
    try:
        image = Image.open(args.reference).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(str(error), args.reference, "an image file", "convert it to PNG") from error
    height, width = args.size or (image.height // 16 * 16, image.width // 16 * 16)
    check_canvas(configs, False, args.frames or 1, height, width)
    sketch = read_sketch(args.sketch, args.frames, height, width)
    check_canvas(configs, False, len(sketch), height, width)
    video = torch.from_numpy(sketch).permute(3, 0, 1, 2)
    picture = torch.from_numpy(np.array(image.resize((width, height)))).permute(2, 0, 1)
    return {"control_video": video[None] / 255, "ref_image": picture[None] / 255}


def smooth_clip(seed, channels, frames, height, width):
    """[1, channels, F, H, W] in [0, 1]; its generator is not the noise's."""
    coarse = torch.rand(1, channels, 3, 5, 7, generator=torch.Generator().manual_seed(seed + 1))
    size = (frames, height, width)
    return torch.nn.functional.interpolate(coarse, size, mode="trilinear", align_corners=True)


def read_sketch(path, frames, height, width):
    """[F, H, W, 3] uint8, read, resized and cut to 4k+1 frames as in the official script."""
    try:
        import cv2  # only --sketch needs it
    except ImportError as error:
        raise InputError("OpenCV is not installed", "--sketch", "the official repository's requirements",
                         "pip install opencv-python-headless, or use --synthetic") from error
    images = []
    if path.is_dir():
        for file in sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES):
            images.append(cv2.imread(str(file)))
            require(images[-1] is not None, "cannot be read", file, "an image", "convert it to PNG")
    else:
        capture = cv2.VideoCapture(str(path))
        while len(images) < (frames or MAX_FRAMES) and (read := capture.read())[0]:
            images.append(read[1])
        capture.release()
    count = frames or max(4 * ((min(len(images), MAX_FRAMES) - 1) // 4) + 1, 1)
    require(len(images) >= count, f"has {len(images)} frames", path, f"a video or a folder of {count} images",
            "check that it plays, or choose fewer --frames")
    resized = (cv2.resize(image, (width, height)) for image in images[:count])
    return np.stack([cv2.cvtColor(image, cv2.COLOR_BGR2RGB) for image in resized])


def read_radio_features(path):
    """{id_cond [1, 2E], id_vit_hidden [1, N, E]} float32. Raises InputError."""
    names = ("id_cond", "id_vit_hidden")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(str(error), path, f"safetensors with {names}", "write it again") from error
    shapes = [tuple(tensors[name].shape) if name in tensors else () for name in names]
    require([len(shape) for shape in shapes] == [2, 3] and shapes[0][0] == shapes[1][0] == 1,
            f"{names} have the shapes {shapes}", path, "[1, 2E] and [1, N, E]", "write it again")
    return {name: tensors[name].float() for name in names}


def tokenize(args, path, configs):
    """Padded ids [1, L] int64 of both prompts, and how many of each are text or its end mark."""
    length, vocabulary = configs["denoiser"].get("max_text_seq_length", 226), configs["text_encoder"]
    found = [file for file in TOKENIZERS if (path / file).is_file()]
    require(found, "holds no tokenizer", path, f"one of {', '.join(TOKENIZERS)}", "download it again")
    tokenizer = load(TOKENIZERS[found[0]], path)
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    positive, negative = (tokenizer([text], **options) for text in (args.prompt, args.negative_prompt))
    ids = {"prompt_ids": positive.input_ids, "negative_prompt_ids": negative.input_ids}
    largest = max(int(tensor.max()) for tensor in ids.values())
    require(largest < vocabulary.get("vocab_size", 32128), f"gives id {largest}", path,
            "ids below the text encoder's vocab_size", "give the tokenizer that belongs to it")
    counts = {"prompt_length": positive, "negative_length": negative}
    return ids, {name: int(tokens.attention_mask.sum()) for name, tokens in counts.items()}


def draw_noise(seed, vae, plain, frames, height, width):
    """`ref_noise` (not in plain mode), then `init_latents`, from one generator as the official pipeline."""
    generator, scale = torch.Generator().manual_seed(seed), latent_scale(vae)
    channels, height, width = vae.get("latent_channels", 16), height // scale, width // scale
    latent_frames = (frames - 1) // int(vae.get("temporal_compression_ratio", 4)) + 1
    shapes = {} if plain else {"ref_noise": (1, channels, 1, height, width)}
    shapes["init_latents"] = (1, latent_frames, channels, height, width)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


# ----------------------------------------------------------------------------------------- fixture


def describe(job, runs, hce):
    """The fixture's JSON. `hce`: the HCE's sizes."""
    say("hashing the checkpoints")
    keys = {"denoiser": "denoiser", "lcg": "reference", "vae": "vae", "text_encoder": "text_encoder",
            "scheduler": "scheduler_config"}
    features = "file" if job.radio_features else "computed"
    # features from a file are only rounded to bfloat16, which says nothing about RADIO's error
    errors = bfloat16_errors(runs, skip=job.radio_features)
    return {
        "name": job.args.out.stem,
        "kind": "pipeline",
        "what_was_run": PLAIN_RUN if job.plain else OFFICIAL_RUN,
        "seed": job.args.seed,
        "config": {
            "plain": job.plain,
            "weights": "external",
            **({} if job.plain else {"hce": hce, "radio_features": features}),
            **{key: job.configs[part] for part, key in keys.items() if part in job.configs},
            "prompt": job.args.prompt,
            "negative_prompt": job.args.negative_prompt,
            "sources": {part: file_hashes(path) for part, path in job.sources.items()},
            "cases": {CASE: job.case},
        },
        "versions": versions(job.args.repo, job.args.device),
        "tolerance": TOLERANCE,
        "bfloat16_vs_float32": {f"{CASE}/{name}": error for name, error in errors.items()},
    }


def write(job, outputs, description):
    """OUT.json, then OUT.safetensors; neither name ever holds half a file."""
    tensors = {f"inputs/{CASE}/{name}": tensor for name, tensor in job.inputs.items()}
    tensors.update({f"outputs/{CASE}/{name}": tensor for name, tensor in outputs.items()})
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = json.dumps(description, indent=1, allow_nan=False) + "\n"
    out = job.args.out
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.write_text(text)
        os.replace(partial, out.with_suffix(".json"))
        save_file(tensors, partial)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def main(argv=None):
    """Runs the tool and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse_arguments(argv)
        job = prepare(args)
        runs, hce = run(job)
        write(job, runs[torch.float32], describe(job, runs, hce))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        if "--json" in argv:
            print(json.dumps({"error": error.fields}))
        return 2
    result = {"out": str(args.out), "outputs": len(runs[torch.float32])}
    print(json.dumps(result) if args.json else f"{result['out']}: {result['outputs']} outputs")
    return 0


if __name__ == "__main__":
    sys.exit(main())

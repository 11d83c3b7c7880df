"""Runs the PyTorch networks for `record_reference.py` and records what they produce.

Imports nothing of this repository, so that it works wherever the published checkpoints do.
"""

import contextlib
import functools
import gc
import hashlib
import importlib
import subprocess
import sys
import time
import types

import diffusers
import numpy as np
import torch
import transformers

# the modules of the official repository that are imported; nothing else of it is
REPO_FILES = {
    "denoiser": "cogvideox/models/transformer3d_radio.py",
    "lcg": "cogvideox/models/transformer3d.py",
    "vae": "cogvideox/models/autoencoder_magvit.py",
    "pipeline": "cogvideox/pipeline/pipeline_cogvideo_color_ref.py",
}
SCHEDULERS = {  # by the official test script's names
    "DDIM_Origin": diffusers.DDIMScheduler,
    "DDIM_Cog": diffusers.CogVideoXDDIMScheduler,
}


class InputError(ValueError):
    """Arguments or files that cannot be used."""

    def __init__(self, what, where, expected, fix):
        super().__init__(f"{where}: {what}\n  expected: {expected}\n  fix: {fix}")
        self.fields = {"what": what, "where": str(where), "expected": expected, "fix": fix}


def require(condition, what, where, expected, fix):
    """Raises InputError unless `condition`."""
    if not condition:
        raise InputError(what, where, expected, fix)


def say(message):
    """Progress, to stderr: stdout carries the result only."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


def load(cls, path, **options):
    """`cls.from_pretrained` on a local directory.

    Raises:
        InputError: it fails, or weights would be left at their random initial values.
    """
    try:
        loaded = cls.from_pretrained(str(path), **options)
    except Exception as error:  # libraries and remote code raise anything for a directory that does not fit
        raise InputError(
            f"{cls.__name__}.from_pretrained failed: {error}", path, "a complete checkpoint directory",
            "download it again; use the library versions that it was published for",
        ) from error
    if not options.get("output_loading_info"):
        return loaded
    model, info = loaded
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    require(
        not absent, f"{cls.__name__} lacks {', '.join(absent)}", path, "every weight of the network",
        "download it again, and check that this directory is that part",
    )
    if info["unexpected_keys"]:
        say(f"not used of {path}: {', '.join(sorted(info['unexpected_keys']))}")
    return model


def load_network(cls, path, device, **options):
    """A network in float32 on `device`, for inference. Raises InputError as `load`."""
    say(f"loading {cls.__name__} from {path}")
    model = load(cls, path, torch_dtype=torch.float32, output_loading_info=True, **options)
    return cast(model.eval().requires_grad_(False), torch.float32).to(device)


def cast(network, dtype):
    """`network` itself with weights and floating buffers in `dtype`; diffusers' own `to` warns needlessly."""
    return torch.nn.Module.to(network, dtype)


def import_official(repo):
    """The official repository's modules by the keys of `REPO_FILES`. Raises InputError if one is missing."""
    sys.path.insert(0, str(repo.resolve()))
    names = {name: file[: -len(".py")].replace("/", ".") for name, file in REPO_FILES.items()}
    try:
        modules = {name: importlib.import_module(module) for name, module in names.items()}
    except ImportError as error:
        raise InputError(
            f"cannot be imported: {error}", repo,
            "torch, diffusers, transformers and einops in the versions that the repository asks for",
            "pip install what is missing",
        ) from error
    for name in ("denoiser", "lcg"):  # diffusers once gave these as an array, which the official code expects
        positions = modules[name].get_3d_sincos_pos_embed
        modules[name].get_3d_sincos_pos_embed = lambda *args, of=positions: np.asarray(of(*args))
    return modules


@contextlib.contextmanager
def hce_sizes_of(module, sizes):
    """Within, the official denoiser's module builds an HCE of these sizes, which its code has as constants.

    Args:
        sizes: `hce` of a config.json that export_checkpoint of this repository wrote; None changes nothing.
    """
    if sizes is None:
        yield
        return
    published = module.LocalFacialExtractor, module.PerceiverCrossAttention
    # written out in its methods: hidden width, widths of RADIO's features and summary
    literals = {1024: sizes["dim"], 1280: sizes["feature_dim"], 2560: sizes["summary_dim"]}

    class Extractor(published[0]):
        __init__ = replace_literals(published[0].__init__, literals)
        forward = replace_literals(published[0].forward, literals)

    names = ("dim", "depth", "dim_head", "output_dim", "ff_mult")
    arguments = {name: sizes[name] for name in names if name in sizes}
    cross = {"kv_dim": "output_dim", "dim_head": "cross_dim_head", "heads": "cross_heads"}
    cross = {name: sizes[ours] for name, ours in cross.items()}
    module.LocalFacialExtractor = lambda **given: Extractor(**{**given, **arguments})
    module.PerceiverCrossAttention = lambda **given: published[1](**{**given, **cross})
    try:
        yield
    finally:
        module.LocalFacialExtractor, module.PerceiverCrossAttention = published


def replace_literals(function, values):
    """A copy of `function` whose code has `values[x]` wherever it had the integer x, a key of `values`."""
    constants = [values.get(x, x) if type(x) is int else x for x in function.__code__.co_consts]
    code = function.__code__.replace(co_consts=tuple(constants))
    return types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )


class Recorder:
    """Collects into `outputs`, by the fixture's names and on the CPU, what one run produces."""

    def __init__(self, outputs):
        self.outputs = outputs
        self.step = 0
        self.hooks = []

    def put(self, name, tensor):
        """Keeps a copy of `tensor`."""
        self.outputs[name] = tensor.detach().cpu().clone()

    def on_output(self, module, use, every_step=False):
        """Calls `use` with the outputs of `module`, those of the first step unless `every_step`."""

        def hook(_module, _args, output):
            if every_step or self.step == 0:
                use(output)

        self.hooks.append(module.register_forward_hook(hook))

    def on_return(self, owner, method, use):
        """Calls `use` with what `owner.method` returns."""
        original = getattr(owner, method)

        def tapped(*args, **kwargs):
            result = original(*args, **kwargs)
            use(result)
            return result

        setattr(owner, method, tapped)

    def watch_denoiser(self, denoiser, trace):
        """Records every step's prediction and, if `trace`, all blocks and the bank of the first step.

        The trace holds the first batch element only, which with guidance is the negative prompt's.
        """

        def put_first(name, tensor):
            self.put(name, tensor[:1])

        def put_block(block, index, output):
            put_first(f"step_0/block_{index}/hidden", output[0])
            put_first(f"step_0/block_{index}/text", output[1])
            if hasattr(block, "bank"):
                put_first(f"bank_{index}", block.bank[0])

        self.on_output(
            denoiser, lambda output: self.put(f"step_{self.step}/noise_pred_raw", output[0]), every_step=True
        )
        if not trace:
            return
        for index, block in enumerate(denoiser.transformer_blocks):
            self.on_output(block, functools.partial(put_block, block, index))
        for index, cross in enumerate(getattr(denoiser, "perceiver_cross_attention", ())):
            self.on_output(cross, functools.partial(put_first, f"step_0/cross_attn_{index}"))

    def step_end(self, _pipeline, index, timestep, tensors):
        """The pipelines' `callback_on_step_end`."""
        self.put(f"step_{index}/timestep", timestep.reshape(1).long())
        self.put(f"step_{index}/latents", tensors["latents"])
        self.step = index + 1
        return {}

    def close(self):
        """Removes the hooks; the networks are used again for the next run."""
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def run(job):
    """Runs a `record_reference.Job` in float32 and, unless refused, in bfloat16.

    Every network is loaded once and used for both; the text encoder is never in memory beside the
    transformers. In bfloat16 each stage is fed the bfloat16 results of the one before.

    Returns:
        {dtype: {name: tensor}}, and the HCE's sizes (None in plain mode).
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    official = None if job.plain else import_official(job.args.repo)
    runs = {torch.float32: {}} if job.args.no_bfloat16 else {torch.float32: {}, torch.bfloat16: {}}
    encode_prompts(job, runs)
    if not job.plain:
        encode_reference(job, runs)
    gc.collect()
    torch.cuda.empty_cache()
    sizes = run_plain(job, runs) if job.plain else run_official(job, runs, official)
    for dtype, outputs in runs.items():
        bad = [name for name, tensor in outputs.items() if not tensor.isfinite().all()]
        require(not bad, f"not finite in {dtype}: {', '.join(bad)}", "outputs", "finite numbers",
                "check the checkpoints; --no-bfloat16 leaves bfloat16 out")
    return runs, sizes


def encode_prompts(job, runs):
    """prompt_embeds and, with guidance, negative_prompt_embeds [1, L, text_dim]. There is no mask."""
    # eager is all that T5 had in the library versions of the official code; sdpa loses accuracy in bfloat16
    model = load_network(
        transformers.T5EncoderModel, job.sources["text_encoder"], job.args.device, attn_implementation="eager"
    )
    for dtype, outputs in runs.items():
        say(f"text encoder in {dtype}")
        cast(model, dtype)
        for name in ("prompt", "negative_prompt") if job.guided else ("prompt",):
            outputs[f"{name}_embeds"] = model(job.inputs[f"{name}_ids"].to(job.args.device))[0].cpu()


def encode_reference(job, runs):
    """id_cond [1, 2E] and id_vit_hidden [1, N, E]: RADIO's, or the features from a file."""
    if job.radio_features:
        for dtype, outputs in runs.items():
            outputs.update({name: tensor.to(dtype, copy=True) for name, tensor in job.radio_features.items()})
        return
    model = load_network(
        transformers.AutoModel, job.sources["image_encoder"], job.args.device, trust_remote_code=True
    )
    for dtype, outputs in runs.items():
        say(f"RADIO in {dtype}")
        summary, features = cast(model, dtype)(job.inputs["ref_image"].to(job.args.device, dtype))
        outputs.update(id_cond=summary.cpu(), id_vit_hidden=features.cpu())


def run_official(job, runs, official):
    """VAE, LCG, HCE and denoising loop by the official pipeline. Returns the HCE's sizes."""
    device, inputs = job.args.device, job.inputs
    transformer = "CogVideoXTransformer3DModel"
    with hce_sizes_of(official["denoiser"], job.configs["denoiser"].get("hce")):
        denoiser = load_network(getattr(official["denoiser"], transformer), job.sources["denoiser"], device)
    lcg = load_network(getattr(official["lcg"], transformer), job.sources["lcg"], device)
    vae = load_network(official["vae"].AutoencoderKLCogVideoX, job.sources["vae"], device)
    sizes = hce_sizes(denoiser)
    check_features(job, runs[torch.float32], sizes)

    def run_in(dtype, outputs):
        say(f"official pipeline in {dtype}")
        pipeline = official["pipeline"].CogVideoX_Fun_Pipeline_Control_Color(
            tokenizer=None, text_encoder=None, scheduler=load_scheduler(job), vae=cast(vae, dtype),
            denoising_transformer=cast(denoiser, dtype), reference_transformer=cast(lcg, dtype),
        )
        recorder = Recorder(outputs)
        vae.encode = functools.partial(encode_with_noise, vae, inputs["ref_noise"].to(device, dtype))
        recorder.on_return(
            pipeline, "prepare_control_latents", lambda pair: recorder.put("control_latents", pair[1])
        )
        recorder.on_return(pipeline, "prepare_latents", lambda pair: recorder.put("ref_latents", pair[1]))
        recorder.on_output(
            denoiser.local_facial_extractor, functools.partial(recorder.put, "hce_tokens")
        )
        recorder.watch_denoiser(denoiser, job.args.trace)
        video = pipeline(
            **call_arguments(job, pipeline, recorder, dtype),
            control_video=inputs["control_video"], ref_image=inputs["ref_image"],
            id_cond=outputs["id_cond"].to(device), id_vit_hidden=outputs["id_vit_hidden"].to(device),
        ).videos
        recorder.put("videos", video)
        recorder.close()

    for dtype, outputs in runs.items():
        run_in(dtype, outputs)
    return sizes


def run_plain(job, runs):
    """VAE encode and decode, and the denoising loop by diffusers' own pipeline."""
    device = job.args.device
    transformer = load_network(diffusers.CogVideoXTransformer3DModel, job.sources["denoiser"], device)
    vae = load_network(diffusers.AutoencoderKLCogVideoX, job.sources["vae"], device)
    vae.num_sample_frames_batch_size = 4  # frames a chunk, as in CogVideoX's own code; GroupNorm sees it
    for dtype, outputs in runs.items():
        say(f"CogVideoX pipeline in {dtype}")
        pipeline = diffusers.CogVideoXPipeline(
            tokenizer=None, text_encoder=None, scheduler=load_scheduler(job), vae=cast(vae, dtype),
            transformer=cast(transformer, dtype),
        )
        recorder = Recorder(outputs)
        recorder.put("vae_mean", vae.encode(job.inputs["pixels"].to(device, dtype)).latent_dist.mean)
        recorder.watch_denoiser(transformer, job.args.trace)
        video = pipeline(**call_arguments(job, pipeline, recorder, dtype), output_type="pt").frames
        recorder.put("videos", video.permute(0, 2, 1, 3, 4))  # [1, F, 3, H, W] -> [1, 3, F, H, W]
        recorder.close()


def load_scheduler(job):
    """A fresh sampler: it keeps state from step to step."""
    return load(SCHEDULERS[job.case["scheduler"]], job.sources["scheduler"])


def call_arguments(job, pipeline, recorder, dtype):
    """What both pipelines are called with."""
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty())
    prompts = ("prompt_embeds", "negative_prompt_embeds") if job.guided else ("prompt_embeds",)
    return {
        **{name: recorder.outputs[name].to(job.args.device) for name in prompts},
        "height": job.case["height"],
        "width": job.case["width"],
        "num_frames": job.case["frames"],
        "num_inference_steps": job.case["steps"],
        "guidance_scale": job.case["guidance_scale"],
        "latents": job.inputs["init_latents"].to(dtype),
        "callback_on_step_end": recorder.step_end,
    }


def encode_with_noise(vae, noise, pixels, *args, **kwargs):
    """The official VAE's `encode` from clean caches, whose `latent_dist.sample` takes `noise`."""
    vae._clear_fake_context_parallel_cache()
    encoded = type(vae).encode(vae, pixels, *args, **kwargs)
    posterior = encoded.latent_dist
    posterior.sample = lambda generator=None: posterior.mean + posterior.std * noise
    return encoded


def hce_sizes(denoiser):
    """The HCE's sizes, most of which are constants of the official code and in no config."""
    extractor, cross = denoiser.local_facial_extractor, denoiser.perceiver_cross_attention[0]
    return {
        "dim": extractor.dim,
        "feature_dim": extractor.id_mapping[0].in_features,
        "summary_dim": extractor.id_embedding_mapping[0].in_features,
        "output_dim": extractor.proj_out.shape[1],
        "dim_head": extractor.layers[0][0].dim_head,
        "cross_dim_head": cross.dim_head,
        "cross_heads": cross.heads,
    }


def check_features(job, outputs, sizes):
    """Raises InputError unless the RADIO features have the widths that the HCE takes."""
    got = outputs["id_cond"].shape[-1], outputs["id_vit_hidden"].shape[-1]
    wanted = sizes["summary_dim"], sizes["feature_dim"]
    require(got == wanted, f"RADIO's summary and features are {got} wide",
            job.args.radio_features or job.sources["image_encoder"], f"{wanted}",
            "use the RADIO model of the official script, nvidia/RADIO")


def bfloat16_errors(runs, skip):
    """{name: rel_rms and rel_to_max} of the bfloat16 run against the float32 one, to three digits."""
    sizes = {"rel_rms": lambda x: x.square().mean().sqrt(), "rel_to_max": lambda x: x.abs().max()}
    errors = {}
    for name, tensor in runs.get(torch.bfloat16, {}).items():
        if tensor.is_floating_point() and name not in skip:
            reference = runs[torch.float32][name].double()
            difference = tensor.double() - reference
            errors[name] = {
                key: float(f"{size(difference) / size(reference).clamp_min(1e-12):.3g}")
                for key, size in sizes.items()
            }
    return errors


def file_hashes(folder):
    """{file name: sha256} of a checkpoint directory."""
    hashes = {}
    for file in sorted(file for file in folder.iterdir() if file.is_file() and file.name[0] != "."):
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
        hashes[file.name] = digest.hexdigest()
    return hashes


def versions(repo, device):
    """Library versions, the official commit (if there is a `repo`) and the device."""
    found = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
    if repo is not None:
        git = subprocess.run(["git", "-C", str(repo), "rev-parse", "HEAD"], capture_output=True, text=True)
        found["AnimeColor_commit"] = git.stdout.strip() if git.returncode == 0 else "unknown"
    device = torch.device(device)
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return found

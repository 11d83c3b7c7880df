"""Converts PyTorch checkpoints to a weights directory and back.

    python tools/convert_torch.py --source CogVideoX/ denoiser=AnimeColor/transformer
    lcg=AnimeColor/referencenet \
        image_encoder=RADIO/ --out weights/
    python tools/convert_torch.py --init-from CogVideoX-2b/ --out weights/
    python tools/convert_torch.py --export pytorch/ --weights weights/
    python tools/convert_torch.py --check-manifest manifest.json
"""

from dataclasses import dataclass
from pathlib import Path

from animecolor_jax import cli, preset
from animecolor_jax.convert.checkpoint import check_manifests, convert_checkpoint, init_from
from animecolor_jax.convert.export import export_checkpoint
from animecolor_jax.errors import InputError


@dataclass
class Arguments:
    """Convert PyTorch checkpoints to a weights directory, and back."""

    source: tuple[str, ...] = ()
    """Checkpoints: [denoiser=|lcg=|vae=|text_encoder=|image_encoder=|tokenizer=|scheduler=]PATH. A path is a
    diffusers or transformers directory, or a single .safetensors, .bin, .pt or .pth file with its config.json
    beside it. An unnamed path goes by its sub-folders (transformer, referencenet, vae, text_encoder,
    image_encoder, tokenizer, scheduler)."""
    out: Path | None = None
    """The weights directory to make."""
    dtype: str | None = None
    """float32, bfloat16 or float16; default: as stored in the checkpoint."""
    init_from: Path | None = None
    """Plain CogVideoX directory: makes stage-1 weights (sketch channels zero, LCG copied, HCE fresh)."""
    seed: int = 0
    """Seed of the fresh HCE of --init-from."""
    hce: str = "animecolor-2b"
    """Preset whose HCE --init-from makes, fitted to the denoiser's width and depth."""
    export: Path | None = None
    """Folder to write PyTorch safetensors and configs to, from --weights."""
    weights: Path | None = None
    """The weights directory that --export reads."""
    check_manifest: tuple[Path, ...] = ()
    """JSON manifests of names and shapes to compare with our rules; nothing is converted."""
    json: bool = False
    """Print one JSON object as the last line."""


def run(args):
    """Does what the arguments ask for; see the module's docstring."""
    cli.check_dtype(args.dtype)
    converting = bool(args.source) or args.init_from is not None
    if converting + (args.export is not None) + bool(args.check_manifest) != 1:
        raise InputError(
            "nothing to do, or several things at once",
            where="arguments",
            expected="one of --source/--init-from with --out, --export with --weights, --check-manifest",
            fix="see --help",
        )
    if args.check_manifest:
        report = check_manifests(args.check_manifest)
    elif args.export is not None:
        if args.weights is None:
            raise InputError("is missing", where="--weights", expected="the weights directory to export")
        report = export_checkpoint(args.weights, args.export)
    elif args.out is None:
        raise InputError("is missing", where="--out", expected="the weights directory to make")
    elif args.init_from is not None:
        options = {"source": args.source, "dtype": args.dtype, "seed": args.seed}
        report = init_from(args.init_from, args.out, hce=preset(args.hce).hce, **options)
    else:
        report = convert_checkpoint(args.source, args.out, dtype=args.dtype)
    print(f"{', '.join(report['components'])}: {report['parameters']:,} parameters")
    problems = {name: report[name] for name in ("missing", "unexpected", "misshapen") if report[name]}
    for name, keys in problems.items():
        print(f"{name}: {', '.join(keys)}")
    return report, not problems


if __name__ == "__main__":
    cli.main(run, Arguments)

"""PyTorch checkpoints in diffusers' layout, made from the weights of the `pipeline` fixture."""

import json
from pathlib import Path

from animecolor_jax import safetensors_io

FIXTURE = Path(__file__).parent / "fixtures" / "pipeline.safetensors"

FOLDERS = {
    "denoiser": ("transformer", "diffusion_pytorch_model.safetensors"),
    "reference": ("referencenet", "diffusion_pytorch_model.safetensors"),
    "vae": ("vae", "diffusion_pytorch_model.safetensors"),
    "text_encoder": ("text_encoder", "model.safetensors"),
    "radio": ("image_encoder", "model.safetensors"),
}


def fixture():
    """(tensors, config) of the `pipeline` fixture."""
    with safetensors_io.Reader(FIXTURE) as reader:
        tensors = {name: reader.read(name) for name in reader.specs}
    return tensors, json.loads(FIXTURE.with_suffix(".json").read_text())["config"]


def state_dict(tensors, name):
    """{torch key: array} of one of the fixture's networks."""
    prefix = f"weights/{name}/"
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def configs(config):
    """{name: values of config.json} of the fixture's networks."""
    values = {name: config[name] for name in FOLDERS}
    values["denoiser"] = {**config["denoiser"], "hce": config["hce"]}
    return values


def write_component(folder, state, values, file="diffusion_pytorch_model.safetensors"):
    """Writes one network's safetensors and config.json."""
    folder.mkdir(parents=True)
    safetensors_io.write(folder / file, state, state.items(), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(values))


def write_checkpoint(root, names=tuple(FOLDERS), change=lambda name, state: state):
    """Writes the named networks and the scheduler; `change(name, state dict)` may alter them first."""
    tensors, config = fixture()
    for name in names:
        folder, file = FOLDERS[name]
        write_component(root / folder, change(name, state_dict(tensors, name)), configs(config)[name], file)
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(config["scheduler_config"]))
    return root

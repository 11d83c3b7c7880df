"""Finding and loading the networks of the metrics.

They are published by others, under licences of their own, and are never downloaded here. A network's files
are looked for where the caller says, else in the folder that the environment variable ANIMECOLOR_METRICS
names, under their published names:

    inception          pt_inception-2015-12-05-6726825d.pth
    lpips-alex         alexnet-owt-7be5be79.pth and lpips' weights/v0.1/alex.pth
    lpips-vgg          vgg16-397923af.pth and lpips' weights/v0.1/vgg.pth
    i3d                i3d_pretrained_400.pt
    i3d-torchscript    i3d_torchscript.pt

The heads of LPIPS, whose own names say little, may be called lpips_alex.pth and lpips_vgg.pth, or lie in the
sub-folder weights/v0.1, v0.1 or lpips. A file of a whole saved LPIPS may be given in place of its two files.
A file that is not there is reported, and no other network ever takes its place.
"""

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from flax import nnx

from animecolor_jax.convert import metrics as tables
from animecolor_jax.convert.state_dict import open_state_dict, sha256
from animecolor_jax.errors import InputError
from animecolor_jax.metrics.inception import Inception
from animecolor_jax.metrics.lpips import Lpips

VARIABLE = "ANIMECOLOR_METRICS"


@dataclass(frozen=True)
class Wanted:
    """A file that a network is made of.

    Attributes:
        name: its published name.
        source: where it is published.
        also: other places in a folder where it may lie.
    """

    name: str
    source: str
    also: tuple[str, ...] = ()

    @property
    def places(self):
        """Everywhere in a folder where it may lie, the published name first."""
        return self.name, *self.also


def _heads(net):
    source = f"https://github.com/richzhang/PerceptualSimilarity, lpips/weights/v0.1/{net}.pth"
    folders = ("weights/v0.1", "v0.1", "lpips/weights/v0.1", "lpips")
    also = (*(f"{folder}/{net}.pth" for folder in folders), f"{net}.pth")
    return Wanted(f"lpips_{net}.pth", source, also)


_TORCHVISION = "https://download.pytorch.org/models/"
_PYTORCH_FID = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
_COMMON_METRICS = "https://github.com/JunyaoHu/common_metrics_on_video_quality, README"
_INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
_ALEXNET, _VGG = "alexnet-owt-7be5be79.pth", "vgg16-397923af.pth"
FILES = {
    "inception": (Wanted(_INCEPTION, _PYTORCH_FID + _INCEPTION),),
    "lpips-alex": (Wanted(_ALEXNET, _TORCHVISION + _ALEXNET), _heads("alex")),
    "lpips-vgg": (Wanted(_VGG, _TORCHVISION + _VGG), _heads("vgg")),
    "i3d": (Wanted("i3d_pretrained_400.pt", _COMMON_METRICS),),
    "i3d-torchscript": (Wanted("i3d_torchscript.pt", _COMMON_METRICS),),
}


@dataclass(frozen=True)
class Missing:
    """Why a network cannot be loaded.

    Attributes:
        network: one of `FILES`.
        wanted: the files that are not there.
        folder: where they were looked for; None where neither a path nor ANIMECOLOR_METRICS is given.
    """

    network: str
    wanted: tuple[Wanted, ...]
    folder: Path | None

    def __str__(self):
        names = " and ".join(file.name for file in self.wanted)
        where = f"not in {self.folder}" if self.folder else f"{VARIABLE} is not set"
        return f"{self.network} needs {names} ({where})"

    def error(self):
        """The same as an InputError, for whoever cannot go on without the network."""
        return InputError(
            "; ".join(f"no {file.name}" for file in self.wanted),
            where=self.folder or VARIABLE,
            expected=f"the files of {self.network}: {', '.join(file.name for file in FILES[self.network])}",
            fix=f"get {'; '.join(f'{file.name} from {file.source}' for file in self.wanted)}; "
            f"set {VARIABLE} to the folder that holds it",
        )


def find(name, path=None):
    """The files of a network.

    Args:
        name: one of `FILES`.
        path: a folder that holds them, or the file itself: the network's only one, or a whole saved LPIPS.
            Default: the folder that ANIMECOLOR_METRICS names.

    Returns:
        tuple of paths; or `Missing`.

    Raises:
        InputError: the name is unknown, or `path` or the folder does not exist.
    """
    if name not in FILES:
        raise InputError(f"{name!r}", where="network", expected=f"one of {', '.join(FILES)}")
    given = path or os.environ.get(VARIABLE)
    if not given:
        return Missing(name, FILES[name], None)
    folder = Path(given).expanduser()
    if path and folder.is_file():
        return (folder,)
    if not folder.is_dir():
        raise InputError(
            f"{folder} does not exist" if not folder.exists() else f"{folder} is not a folder",
            where=f"path of {name}" if path else VARIABLE,
            expected=f"a folder with {' and '.join(file.name for file in FILES[name])}",
        )
    found = {
        file: next((folder / place for place in file.places if (folder / place).is_file()), None)
        for file in FILES[name]
    }
    absent = tuple(file for file, place in found.items() if place is None)
    return Missing(name, absent, folder) if absent else tuple(found.values())


def load(name, path=None):
    """A network of the metrics, in float32.

    Args:
        name, path: as in `find`.

    Returns:
        the network (`Inception`, `Lpips` or `I3D`), and {file name: SHA-256} of what it was made from.

    Raises:
        InputError: a file is missing, damaged, holds more than tensors (nothing in it is executed), or does
            not fit the network.
    """
    files = find(name, path)
    if isinstance(files, Missing):
        raise files.error()
    return _build(name, files), {file.name: sha256(file) for file in files}


def _build(name, files):
    if name.startswith("i3d"):
        return _build_i3d(name, *files)
    if name == "inception":
        create, table = lambda: Inception(rngs=nnx.Rngs(0)), tables.INCEPTION
    else:
        net = name.removeprefix("lpips-")
        create, table = lambda: Lpips(net, rngs=nnx.Rngs(0)), tables.LPIPS[net]
    with ExitStack() as stack:
        state_dict = tables.join(*(stack.enter_context(open_state_dict(file)) for file in files))
        return tables.build(create, table, state_dict, where=" and ".join(map(str, files)))


def _build_i3d(name, file):
    from animecolor_jax.convert.metrics_i3d import load_i3d
    from animecolor_jax.convert.torchscript import is_torchscript

    if is_torchscript(file) != (name == "i3d-torchscript"):  # the reader goes by content; the networks differ
        raise InputError(
            f"{'a TorchScript archive' if name == 'i3d' else 'no TorchScript archive'}", where=file,
            expected=f"what {FILES[name][0].name} holds", fix="give the other protocol, or the other file",
        )  # fmt: skip
    return load_i3d(file)

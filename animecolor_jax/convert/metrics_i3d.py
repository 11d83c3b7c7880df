"""Rules for I3D, from the two files that FVD is computed with.

`i3d_pretrained_400.pt` (videogpt) is a state dict. `i3d_torchscript.pt` (styleganv) is a TorchScript archive
of the class `src.i3dpt_jit.I3D`, which has the names of hassony2/kinetics_i3d_pytorch src/i3dpt.py.
"""

import re

from flax import nnx

from animecolor_jax.convert.metrics import Ignored, Table, batch_norm, build
from animecolor_jax.convert.rules import Rule
from animecolor_jax.convert.state_dict import open_state_dict
from animecolor_jax.convert.torchscript import TorchScriptArchive, is_torchscript
from animecolor_jax.errors import InputError
from animecolor_jax.metrics.i3d import BLOCKS, I3D, VIDEOGPT_EPS

_STEM = ("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3")
# how TorchScript's code says the epsilon of a batch norm: as a constant of the class, and in calls
_EPS = re.compile(
    r"^ *eps : Final\[float\] = (?P<constant>\S+)$"
    r"|running_mean, [^()\n]*, (?P<argument>[0-9][0-9.e-]*), (True|False)?\)",
    re.MULTILINE,
)
_BRANCHES = {
    "b0": "branch_0", "b1a": "branch_1.0", "b1b": "branch_1.1", "b2a": "branch_2.0", "b2b": "branch_2.1",
    "b3b": "branch_3.1",
}  # fmt: skip


def _unit(torch, ours, norm):
    return [Rule(f"{torch}.conv3d.weight", f"{ours}/kernel", "conv"), *batch_norm(f"{torch}.{norm}", ours)]


def _table(units, norm, logits):
    """Args: units: {torch: ours}. norm: torch's name of a unit's batch norm. logits: that of the head."""
    table = [rule for torch, ours in units.items() for rule in _unit(torch, ours, norm)]
    table.append(Rule(f"{logits}.conv3d.weight", "logits/kernel", "conv"))
    table.append(Rule(f"{logits}.conv3d.bias", "logits/bias"))
    return Table(table, [Ignored(f"{torch}.{norm}.num_batches_tracked") for torch in units])


VIDEOGPT = _table(
    {
        **{name: name for name in _STEM},
        **{f"{block}.{ours}": f"{block}/{ours}" for block in BLOCKS for ours in _BRANCHES},
    },
    norm="bn", logits="logits",
)  # fmt: skip
TORCHSCRIPT = _table(
    {
        **{name.lower(): name for name in _STEM},
        **{
            f"{block.lower()}.{torch}": f"{block}/{ours}"
            for block in BLOCKS
            for ours, torch in _BRANCHES.items()
        },
    },
    norm="batch3d", logits="conv3d_0c_1x1",
)  # fmt: skip


def load_i3d(path):
    """I3D with the weights of a file, i3d_pretrained_400.pt or i3d_torchscript.pt, by its content.

    Of the archive the weights and the epsilon of its batch norms are taken, not its program. Its padding is
    TensorFlow's where the number of frames is a multiple of 8; with other numbers its authors may differ.

    Raises:
        InputError: the file cannot be read, or is neither.
    """
    script = is_torchscript(path)
    eps = script_eps(path) if script else VIDEOGPT_EPS
    table = TORCHSCRIPT if script else VIDEOGPT
    with open_state_dict(path) as state_dict:
        return build(lambda: I3D(eps=eps, rngs=nnx.Rngs(0)), table, state_dict, where=path)


def script_eps(path):
    """The epsilon of the batch norms of a TorchScript archive, as its code says it.

    Raises:
        InputError: it says none, or several.
    """
    with TorchScriptArchive(path) as archive:
        found = {match["constant"] or match["argument"] for match in _EPS.finditer(archive.read_code())}
    try:
        (eps,) = {float(text) for text in found}
    except ValueError as error:
        raise InputError(
            f"epsilons of its batch norms: {', '.join(sorted(found))[:200] or 'none'}", where=path,
            expected="the same in all, in the code of the archive",
            fix="use i3d_torchscript.pt as published, or the videogpt protocol with i3d_pretrained_400.pt",
        ) from error
    return eps

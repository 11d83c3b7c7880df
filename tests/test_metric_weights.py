"""The files of the metrics' networks: manifests, finding, loading, refusing."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from animecolor_jax import params
from animecolor_jax.convert import metrics as tables
from animecolor_jax.convert.rules import aliases
from animecolor_jax.convert.state_dict import open_mapping
from animecolor_jax.errors import InputError
from animecolor_jax.metrics import weights
from animecolor_jax.metrics.inception import Inception
from animecolor_jax.metrics.lpips import Lpips

MANIFESTS = Path(__file__).parent / "fixtures" / "metrics" / "manifests"
CREATE = {
    "inception": lambda: Inception(rngs=nnx.Rngs(0)),
    "alex": lambda: Lpips("alex", rngs=nnx.Rngs(0)),
    "vgg": lambda: Lpips("vgg", rngs=nnx.Rngs(0)),
}
TABLES = {"inception": tables.INCEPTION, **tables.LPIPS}
FILES = {
    "inception": ["pt_inception-2015-12-05"],
    "alex": ["torchvision_alexnet", "lpips_v0.1_alex"],
    "vgg": ["torchvision_vgg16", "lpips_v0.1_vgg"],
}


def shapes_of(network):
    """{torch key: shape} of a network's files together."""
    manifests = [json.loads((MANIFESTS / f"{name}.json").read_text())["keys"] for name in FILES[network]]
    return {key: tuple(shape) for keys in manifests for key, (shape, _) in keys.items()}


def saved_whole(shapes, net):
    """The keys under which a whole saved LPIPS has what its two files hold."""
    other = {alias.of: alias.torch for alias in aliases(tables.LPIPS[net].rules)}
    heads = {f"lin{i}.model.1.weight" for i in range(5)}
    trunk = {other[key]: shape for key, shape in shapes.items() if key.startswith("features.")}
    twice = {name: shapes[key] for key in heads for name in (key, other[key])}
    return trunk | twice | {"scaling_layer.shift": (1, 3, 1, 1), "scaling_layer.scale": (1, 3, 1, 1)}


@pytest.fixture(autouse=True)
def no_folder(monkeypatch):
    monkeypatch.delenv(weights.VARIABLE, raising=False)


@pytest.mark.parametrize("network", CREATE)
def test_the_published_files_have_the_names_and_shapes_of_the_table(network):
    shapes = shapes_of(network)
    problems = tables.problems(CREATE[network], TABLES[network], shapes)
    assert not problems, problems
    without_counts = {key: shape for key, shape in shapes.items() if "num_batches_tracked" not in key}
    assert not tables.problems(CREATE[network], TABLES[network], without_counts)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_a_whole_saved_lpips_has_the_names_of_the_table(net):
    saved = saved_whole(shapes_of(net), net)
    assert f"net.slice3.{10 if net == 'vgg' else 6}.weight" in saved
    assert not tables.problems(CREATE[net], tables.LPIPS[net], saved)


@pytest.mark.parametrize("network", CREATE)
def test_the_unused_keys_are_all_that_is_ignored(network):
    ignored = [key.torch for key in TABLES[network].ignored]
    assert len(ignored) == len(set(ignored)) == {"inception": 96, "alex": 8, "vgg": 8}[network]
    used = params.abstract(CREATE[network])[1]
    present = set(shapes_of(network))
    assert len(present - set(ignored)) == len(used)


def test_what_does_not_fit_is_named():
    shapes = shapes_of("inception")
    shapes["Mixed_5b.branch1x1.bn.weights"] = shapes.pop("Mixed_5b.branch1x1.bn.weight")
    shapes["AuxLogits.fc.weight"] = (1000, 768)
    shapes["Mixed_7c.branch_pool.conv.weight"] = (192, 2048, 3, 3)
    problems = tables.problems(CREATE["inception"], tables.INCEPTION, shapes)
    assert problems.missing == ["Mixed_5b.branch1x1.bn.weight"]
    assert problems.unexpected == ["AuxLogits.fc.weight", "Mixed_5b.branch1x1.bn.weights"]
    assert [text.split(":")[0] for text in problems.misshapen] == ["Mixed_7c.branch_pool.conv.weight"]


def random_arrays(shapes, seed=0):
    """The classifiers, which nothing reads, are small."""
    rng = np.random.default_rng(seed)
    return {
        key: rng.standard_normal((2, 2) if key.startswith(("classifier", "fc")) else shape, np.float32)
        for key, shape in shapes.items()
    }


def save(path, arrays, **kwargs):
    torch = pytest.importorskip("torch")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: torch.from_numpy(array) for key, array in arrays.items()}, path, **kwargs)


def alex_arrays():
    arrays = random_arrays(shapes_of("alex"))
    heads = {key: arrays.pop(key) for key in list(arrays) if key.startswith("lin")}
    return arrays, heads


def holds(network, arrays):
    """Whether an AlexNet LPIPS has the tensors of these files."""
    kernel = np.moveaxis(arrays["features.3.weight"], (0, 1), (-1, -2))
    return np.array_equal(network.conv_3.kernel[...], kernel) and np.array_equal(
        network.head_2[0, 0, :, 0], arrays["lin2.model.1.weight"][0, :, 0, 0]
    )


@pytest.mark.torch
@pytest.mark.parametrize("heads_file", ["lpips_alex.pth", "weights/v0.1/alex.pth", "alex.pth"])
def test_lpips_is_loaded_from_torch_files(tmp_path, monkeypatch, heads_file):
    trunk, heads = alex_arrays()
    save(tmp_path / "alexnet-owt-7be5be79.pth", trunk)
    save(tmp_path / heads_file, heads, _use_new_zipfile_serialization=False)
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path))
    network, hashes = weights.load("lpips-alex")
    assert holds(network, trunk | heads)
    files = ["alexnet-owt-7be5be79.pth", heads_file]
    assert hashes == {
        Path(file).name: hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() for file in files
    }


@pytest.mark.torch
def test_a_whole_saved_lpips_is_loaded_and_its_two_copies_must_agree(tmp_path):
    trunk, heads = alex_arrays()
    names = {alias.of: alias.torch for alias in aliases(tables.LPIPS["alex"].rules)}
    saved = {names[key]: array for key, array in trunk.items() if key in names}
    saved |= heads | {names[key]: array for key, array in heads.items()}
    saved["scaling_layer.shift"] = np.zeros((1, 3, 1, 1), np.float32)
    save(tmp_path / "lpips.pth", saved)
    network, hashes = weights.load("lpips-alex", tmp_path / "lpips.pth")
    assert holds(network, trunk | heads) and list(hashes) == ["lpips.pth"]
    save(tmp_path / "lpips.pth", saved | {"lins.1.model.1.weight": heads["lin1.model.1.weight"] + 1})
    with pytest.raises(InputError, match="lins.1.model.1.weight differs from lin1.model.1.weight"):
        weights.load("lpips-alex", tmp_path / "lpips.pth")


@pytest.mark.torch
def test_inception_is_loaded_from_a_torch_file_without_the_counts(tmp_path):
    shapes = shapes_of("inception")
    arrays = random_arrays({key: shape for key, shape in shapes.items() if "num_batches" not in key})
    name = "pt_inception-2015-12-05-6726825d.pth"
    save(tmp_path / name, arrays)
    for path in (tmp_path, tmp_path / name):
        network, _ = weights.load("inception", path)
        found = network.Mixed_6d.branch7x7dbl_4.var[...]
        np.testing.assert_array_equal(found, arrays["Mixed_6d.branch7x7dbl_4.bn.running_var"])


@pytest.mark.torch
def test_a_file_that_does_not_fit_is_refused_by_its_keys(tmp_path):
    trunk, _ = alex_arrays()
    save(tmp_path / "trunk.pth", trunk | {"features.12.weight": np.zeros(3, np.float32)})
    with pytest.raises(InputError, match="lin0.model.1.weight.*unexpected: features.12.weight"):
        weights.load("lpips-alex", tmp_path / "trunk.pth")


@pytest.mark.torch
def test_one_i3d_does_not_stand_in_for_the_other(tmp_path):
    save(tmp_path / "i3d_torchscript.pt", {"logits.conv3d.bias": np.zeros(400, np.float32)})
    with pytest.raises(InputError, match="no TorchScript archive"):
        weights.load("i3d-torchscript", tmp_path)


class Evil:
    """Pickled, it asks the reader to make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.torch
def test_a_file_that_asks_for_more_than_tensors_is_refused_and_nothing_is_done(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    torch.save({"fc.weight": torch.zeros(1), "more": Evil(tmp_path / "made")}, path)
    with pytest.raises(InputError, match="mkdir"):
        weights.load("inception", path)
    assert not (tmp_path / "made").exists()


def test_without_a_folder_every_network_is_missing_by_its_files():
    for name, files in weights.FILES.items():
        missing = weights.find(name)
        assert missing == weights.Missing(name, files, None)
        assert all(file.name in str(missing) for file in files) and weights.VARIABLE in str(missing)


def test_only_the_file_that_is_not_there_is_wanted(tmp_path, monkeypatch):
    (tmp_path / "vgg16-397923af.pth").touch()
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path))
    missing = weights.find("lpips-vgg")
    assert [file.name for file in missing.wanted] == ["lpips_vgg.pth"] and missing.folder == tmp_path
    with pytest.raises(InputError, match="no lpips_vgg.pth") as error:
        weights.load("lpips-vgg")
    assert "PerceptualSimilarity" in error.value.fix and "vgg16" not in error.value.fix
    (tmp_path / "lpips").mkdir()
    (tmp_path / "lpips" / "vgg.pth").touch()
    assert weights.find("lpips-vgg") == (tmp_path / "vgg16-397923af.pth", tmp_path / "lpips" / "vgg.pth")


def test_a_path_comes_before_the_environment(tmp_path, monkeypatch):
    for folder in ("given", "variable"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "i3d_pretrained_400.pt").touch()
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path / "variable"))
    assert weights.find("i3d", tmp_path / "given") == (tmp_path / "given" / "i3d_pretrained_400.pt",)
    assert weights.find("i3d") == (tmp_path / "variable" / "i3d_pretrained_400.pt",)
    assert isinstance(weights.find("i3d-torchscript", tmp_path / "given"), weights.Missing)


def test_a_folder_that_does_not_exist_and_an_unknown_network_are_errors(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no-such-folder does not exist"):
        weights.find("inception", tmp_path / "no-such-folder")
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=weights.VARIABLE):
        weights.find("inception")
    with pytest.raises(InputError, match="one of inception, lpips-alex"):
        weights.find("resnet", tmp_path)


def test_a_tensor_in_two_files_is_an_error():
    one = open_mapping({"a": np.zeros(1)})
    with pytest.raises(InputError, match="a is in two files"):
        tables.join(one, one)

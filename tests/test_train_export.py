"""What a run ends with: a weights directory that everything else takes."""

import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_models import model_config, random_inputs, random_parameters, stage_config, write_run

from animecolor_jax.convert.export import export_checkpoint
from animecolor_jax.convert.lora import import_lora
from animecolor_jax.errors import InputError
from animecolor_jax.pipeline import Pipeline
from animecolor_jax.safetensors_io import Reader, Spec
from animecolor_jax.sharding import make_mesh
from animecolor_jax.train import loop
from animecolor_jax.train.export import ADAPTERS, export_weights
from animecolor_jax.train.parts import Parts
from animecolor_jax.train.sources import Sources, open_source
from animecolor_jax.train.state import read_parameters
from animecolor_jax.train.step import Objective, draw
from animecolor_jax.weights import Weights, WeightsWriter, write_initial
from data_pipeline.storage import Storage

MODEL = model_config()


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    """Untrained weights of all six networks."""
    path = tmp_path_factory.mktemp("init") / "weights"
    write_initial(path, MODEL)
    return path


def leaves(directory, component):
    """{"COMPONENT/NAME": array} as stored."""
    values = Weights(directory).read(component, lambda name: "float32")
    return {f"{component}/{name}": leaf for name, leaf in values.items()}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(actual[name], leaf, err_msg=name)


def files(directory):
    """{path: bytes} of everything below, without config.json."""
    found = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != "config.json")
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def test_trained_network_is_the_runs_and_all_else_is_what_it_came_from(init, tmp_path):
    config = stage_config(2, "--compute.frozen-dtype", "bfloat16")
    trained = write_run(tmp_path, [init], config, step=123)
    made = Weights(tmp_path / "weights")
    assert_equal(leaves(tmp_path / "weights", "hce"), trained)
    with Reader(tmp_path / "weights" / "hce.safetensors") as reader:
        assert {spec.dtype for spec in reader.specs.values()} == {np.dtype(np.float32)}
    ours, theirs = files(tmp_path / "weights"), files(init)
    assert ours.keys() == theirs.keys() and {
        name for name in ours if ours[name] != theirs[name]
    } == {"hce.safetensors"}  # fmt: skip
    assert made.config == Weights(init).config
    provenance = dict(made.values["provenance"])
    origin = Weights(init).values["provenance"]
    digest = hashlib.sha256((tmp_path / "weights" / "hce.safetensors").read_bytes()).hexdigest()
    assert provenance.pop("hce") == {
        "trained": {"stage": "stage2_hce", "steps": 123, "seed": 0, "sha256": digest},
        "from": origin["hce"],
    }
    assert provenance == {name: note for name, note in origin.items() if name != "hce"}


def test_what_is_not_trained_takes_no_disk_space(init):
    folder = init.parent / "run"  # on the same file system, so that a link is possible
    folder.mkdir()
    write_run(folder, [init], stage_config(2))
    assert (folder / "weights" / "vae.safetensors").samefile(init / "vae.safetensors")


def test_lcg_of_stage_3_is_written_without_the_channels_of_the_sketch(init, tmp_path):
    trained = write_run(tmp_path, [init], stage_config(3))
    assert Weights(tmp_path / "weights").config.lcg.in_channels == 4
    assert_equal(leaves(tmp_path / "weights", "lcg"), trained)
    note = Weights(tmp_path / "weights").values["provenance"]["lcg"]
    assert note["from"] == {
        "untrained": "copy of the denoiser",
        "from": Weights(init).values["provenance"]["denoiser"],
    }


@pytest.mark.parametrize("pattern", [r"lcg/blocks/.*", r"denoiser/.*"])
def test_a_copied_lcg_that_is_not_or_partly_trained_is_written_as_the_run_had_it(init, tmp_path, pattern):
    config = stage_config(3, "--stage.trained", pattern, "True", ".*", "False")
    trained = write_run(tmp_path, [init], config)
    denoiser = {name.replace("denoiser", "lcg"): leaf for name, leaf in leaves(init, "denoiser").items()}
    denoiser["lcg/patch_embed/kernel"] = denoiser["lcg/patch_embed/kernel"][:, :, :4]
    of_lcg = {name: leaf for name, leaf in trained.items() if name.startswith("lcg/")}
    assert_equal(leaves(tmp_path / "weights", "lcg"), denoiser | of_lcg)


def test_stage_4_exports_the_networks_it_joined(init, tmp_path):
    for name in ("run2", "run3", "run4"):
        (tmp_path / name).mkdir()
    hce = write_run(tmp_path / "run2", [init], stage_config(2))
    lcg = write_run(tmp_path / "run3", [init], stage_config(3))
    denoiser = write_run(
        tmp_path / "run4", [tmp_path / "run3", f"hce={tmp_path / 'run2'}"], stage_config(4, "--seed", "5")
    )
    weights = tmp_path / "run4" / "weights"
    for name, trained in (("hce", hce), ("lcg", lcg), ("denoiser", denoiser)):
        assert_equal(leaves(weights, name), trained)
    notes = Weights(weights).values["provenance"]
    assert [notes[name]["trained"]["stage"] for name in ("denoiser", "lcg", "hce")] == [
        "stage4_joint", "stage3_lcg", "stage2_hce",
    ]  # fmt: skip
    Pipeline.load(weights)
    report = export_checkpoint(weights, tmp_path / "torch")
    assert set(report["components"]) == {*notes} - {"scheduler"}
    settings = json.loads((tmp_path / "torch" / "transformer" / "config.json").read_text())
    assert settings["in_channels"] == 8


def test_merged_adapters_compute_what_they_did_beside_their_kernels(init, tmp_path):
    config = stage_config(1, "--lora.rank", "3", "--lora.alpha", "4")
    trained = write_run(tmp_path, [init], config)
    weights = tmp_path / "weights"
    loaded, rank, alpha = import_lora(weights / ADAPTERS, MODEL.denoiser)
    assert (rank, alpha) == (3, 4.0)
    assert_equal({f"denoiser/{name}": leaf for name, leaf in loaded.items()}, trained)

    inputs = random_inputs(MODEL)

    def losses_of(config, path):
        """(function of a denoiser's parameters, those of the weights at `path`)."""
        sources = Sources([path], config.stage)
        objective = Objective(Parts(config, MODEL), MODEL.scheduler, MODEL.vae.scaling_factor)
        ours, frozen = read_parameters(sources, objective.parts, config, make_mesh())
        draws = draw(jax.random.key(0), inputs, 1000)
        losses = jax.jit(lambda parameters: objective.losses({}, parameters, inputs, draws))
        return losses, ours | frozen

    losses, parameters = losses_of(config, init)
    beside, fresh = losses(parameters | trained), losses(parameters)
    losses, parameters = losses_of(stage_config(1), weights)
    np.testing.assert_allclose(losses(parameters), beside, rtol=1e-5)
    assert (np.abs(fresh - beside) > 1e-5 * beside).all() and (np.abs(fresh - beside) > 1e-3 * beside).any()
    stored, origin = leaves(weights, "denoiser"), leaves(init, "denoiser")
    changed = {name for name in origin if (np.asarray(stored[name]) != np.asarray(origin[name])).any()}
    assert changed == {f"denoiser/blocks/attn/{layer}/kernel" for layer in ("q", "k", "v", "out")}


def test_parameters_shared_out_over_devices_are_exported_whole(init, tmp_path):
    config = stage_config(2)
    sources = Sources([init], config.stage)
    parts = Parts(config, sources.model_config)
    trained, _ = read_parameters(sources, parts, config, make_mesh(fsdp=2, tensor=2))
    assert any(not leaf.is_fully_replicated for leaf in trained.values())
    export_weights(tmp_path / "out", sources, parts, config, 1, trained)
    assert_equal(leaves(tmp_path / "out", "hce"), {name: np.asarray(leaf) for name, leaf in trained.items()})


def test_a_directory_that_is_there_is_not_overwritten(init, tmp_path):
    trained = write_run(tmp_path, [init], stage_config(2))
    before = files(tmp_path / "weights")
    with pytest.raises(InputError, match="exists already"):
        write_run(tmp_path, [init], stage_config(2), seed=1)
    assert files(tmp_path / "weights") == before and trained


def export_with(init, out, change):
    config = stage_config(2)
    sources = Sources([init], config.stage)
    parts = Parts(config, sources.model_config)
    trained, _ = random_parameters(parts, config)
    change(sources, trained)
    export_weights(out, sources, parts, config, 1, trained)


def test_an_export_that_fails_leaves_nothing(init, tmp_path):
    def break_last_leaf(sources, trained):
        trained["hce/qformer/summary_mlp/up/kernel"] = jnp.zeros((2, 2))

    with pytest.raises(ValueError, match="qformer/summary_mlp/up/kernel"):
        export_with(init, tmp_path / "out", break_last_leaf)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_went_away_are_named(init, tmp_path):
    shutil.copytree(init, tmp_path / "init")

    def remove(sources, trained):
        (tmp_path / "init" / "vae.safetensors").unlink()

    with pytest.raises(InputError, match="lacks vae") as caught:
        export_with(tmp_path / "init", tmp_path / "out", remove)
    assert caught.value.where == str(tmp_path / "init")
    assert [path.name for path in tmp_path.iterdir()] == ["init"]


def test_only_what_was_trained_of_a_network_becomes_float32(init, tmp_path):
    half, origin = tmp_path / "half", Weights(init)
    with WeightsWriter(half) as writer, Reader(init / "hce.safetensors") as stored:
        for name in ("denoiser", "vae"):
            writer.link(name, origin, {})
        specs = {name: Spec(spec.shape, np.dtype(jnp.bfloat16)) for name, spec in stored.specs.items()}
        rows = ((name, stored.read(name).astype(jnp.bfloat16)) for name in specs)
        writer.component("hce", MODEL.hce, specs, rows, {})
        writer.scheduler(MODEL.scheduler, {})
    config = stage_config(2, "--stage.trained", "hce/cross_attn/.*", "True", ".*", "False")
    trained = write_run(tmp_path, [half], config)
    made = tmp_path / "weights" / "hce.safetensors"
    with Reader(made) as ours, Reader(half / "hce.safetensors") as theirs:
        assert ours.specs.keys() == theirs.specs.keys()
        for name, spec in ours.specs.items():
            if name.startswith("cross_attn/"):
                assert spec.dtype == np.float32
                np.testing.assert_array_equal(ours.read(name), trained[f"hce/{name}"])
            else:
                assert spec.dtype == jnp.bfloat16 and ours.read(name).tobytes() == theirs.read(name).tobytes()


def test_weights_travel_through_an_object_store(init, tmp_path, monkeypatch):
    """`--out gs://...` of one stage, `--init gs://...` of the next."""
    monkeypatch.setenv("ANIMECOLOR_CACHE", str(tmp_path / "cache"))
    store = Storage("memory://bucket/run")
    store.write("run.json", b"{}")
    with pytest.raises(InputError, match="no weights directory yet"):
        open_source("memory://bucket/run")
    loop._upload(init, store / "weights")
    found = open_source("memory://bucket/run")
    assert found.directory != init
    for file in init.rglob("*"):
        if file.is_file():
            assert (found.directory / file.relative_to(init)).read_bytes() == file.read_bytes()
    with pytest.raises(InputError, match="config.json"):
        open_source("memory://bucket/nothing")

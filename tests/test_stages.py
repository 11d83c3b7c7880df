"""The four stages: what each trains, what it sees, where it starts, and what is refused."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from train_models import CONFIGS, STAGES, model_config, stage_config, write_run

from animecolor_jax.config import preset
from animecolor_jax.errors import InputError
from animecolor_jax.sharding import make_mesh
from animecolor_jax.train.command import override, read_config
from animecolor_jax.train.parts import Parts
from animecolor_jax.train.sources import Sources, open_source
from animecolor_jax.train.state import read_parameters
from animecolor_jax.weights import write_initial


def names(text):
    return text.split()


TRANSFORMER = names("""
    blocks/attn/k/bias blocks/attn/k/kernel blocks/attn/k_norm/bias blocks/attn/k_norm/scale
    blocks/attn/out/bias blocks/attn/out/kernel blocks/attn/q/bias blocks/attn/q/kernel
    blocks/attn/q_norm/bias blocks/attn/q_norm/scale blocks/attn/v/bias blocks/attn/v/kernel
    blocks/ff/down/bias blocks/ff/down/kernel blocks/ff/up/bias blocks/ff/up/kernel
    blocks/norm1/linear/bias blocks/norm1/linear/kernel blocks/norm1/norm/bias blocks/norm1/norm/scale
    blocks/norm2/linear/bias blocks/norm2/linear/kernel blocks/norm2/norm/bias blocks/norm2/norm/scale
    modulation_out/bias modulation_out/kernel norm_final/bias norm_final/scale norm_out/bias norm_out/scale
    out/bias out/kernel patch_embed/bias patch_embed/kernel text_embed/bias text_embed/kernel
    time_embed/out/bias time_embed/out/kernel time_embed/up/bias time_embed/up/kernel
""")
HCE = names("""
    cross_attn/kv/kernel cross_attn/norm1/bias cross_attn/norm1/scale cross_attn/norm2/bias
    cross_attn/norm2/scale cross_attn/out/kernel cross_attn/q/kernel
    qformer/latents qformer/layers/attn/kv/kernel qformer/layers/attn/norm1/bias
    qformer/layers/attn/norm1/scale qformer/layers/attn/norm2/bias qformer/layers/attn/norm2/scale
    qformer/layers/attn/out/kernel qformer/layers/attn/q/kernel qformer/layers/ff/down/kernel
    qformer/layers/ff/norm/bias qformer/layers/ff/norm/scale qformer/layers/ff/up/kernel qformer/proj_out
    qformer/spatial_mlp/mid/bias qformer/spatial_mlp/mid/kernel qformer/spatial_mlp/norm1/bias
    qformer/spatial_mlp/norm1/scale qformer/spatial_mlp/norm2/bias qformer/spatial_mlp/norm2/scale
    qformer/spatial_mlp/out/bias qformer/spatial_mlp/out/kernel qformer/spatial_mlp/up/bias
    qformer/spatial_mlp/up/kernel qformer/summary_mlp/norm/bias qformer/summary_mlp/norm/scale
    qformer/summary_mlp/out/bias qformer/summary_mlp/out/kernel qformer/summary_mlp/up/bias
    qformer/summary_mlp/up/kernel
""")
NAMES = {"denoiser": TRANSFORMER, "lcg": TRANSFORMER, "hce": HCE}
TRAINED = {1: ["denoiser"], 2: ["hce"], 3: ["lcg"], 4: ["denoiser"]}
FROZEN = {1: [], 2: ["denoiser"], 3: ["denoiser"], 4: ["hce", "lcg"]}
CONDITIONS = {1: set(), 2: {"hce"}, 3: {"lcg"}, 4: {"hce", "lcg"}}
FULL = preset("animecolor-2b")


def names_of(components):
    return sorted(f"{component}/{name}" for component in components for name in NAMES[component])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Untrained weights of all six networks."""
    path = tmp_path_factory.mktemp("init") / "weights"
    write_initial(path, model_config())
    return path


@pytest.fixture(scope="module")
def runs(weights):
    """Runs of stages 1, 2 and 3, as they would end, and what each trained."""
    folder, trained = weights.parent, {}
    for stage, init in ((1, weights), (2, folder / "run1"), (3, folder / "run1")):
        trained[stage] = write_run(folder / f"run{stage}", [init], stage_config(stage), seed=stage)
    return folder, trained


# what is trained


@pytest.mark.parametrize("stage", STAGES)
def test_stage_trains_exactly_these_parameters_of_the_full_size_model(stage):
    parts = Parts(read_config(CONFIGS[stage - 1]), FULL)
    assert parts.trained == names_of(TRAINED[stage])
    assert parts.frozen == names_of(FROZEN[stage])
    assert parts.trains_lcg == (stage == 3)


@pytest.mark.parametrize("stage", STAGES)
def test_stage_sees_these_conditions_and_runs_these_networks(stage):
    config = read_config(CONFIGS[stage - 1]).stage
    assert set(config.conditions) == {"text", "sketch"} | CONDITIONS[stage]
    assert set(config.networks) == {"denoiser"} | CONDITIONS[stage]


def test_paper_steps_and_batch():
    configs = [read_config(path) for path in CONFIGS]
    assert [config.steps for config in configs] == [50_000, 25_000, 30_000, 50_000]
    assert {config.data.batch_size for config in configs} == {16}


def test_stage_3_with_hce_keeps_it_frozen_and_stage_4_can_train_it():
    flags = ["--stage.conditions", "text", "sketch", "hce", "lcg"]
    parts = Parts(override(read_config(CONFIGS[2]), flags), FULL)
    assert parts.trained == names_of(["lcg"]) and parts.frozen == names_of(["denoiser", "hce"])
    flags = ["--stage.trained", "(denoiser|hce)/.*", "True", ".*", "False"]
    parts = Parts(override(read_config(CONFIGS[3]), flags), FULL)
    assert parts.trained == names_of(["denoiser", "hce"]) and parts.frozen == names_of(["lcg"])


def test_adapters_are_trained_in_place_of_what_the_stage_says():
    parts = Parts(stage_config(4, "--lora.rank", "8"), FULL)
    assert [name for name in parts.trained if "/lora_" not in name] == []
    assert len(parts.trained) == 8 and all(name.startswith("denoiser/blocks/attn/") for name in parts.trained)
    assert parts.frozen == names_of(NAMES)
    assert parts.shapes["denoiser/blocks/attn/q/lora_a"].shape == (30, 1920, 8)


@pytest.mark.parametrize(
    ("rules", "what"),
    [
        (["hce/.*", "True"], "no rule matches 'denoiser/"),
        ([".*", "False"], "no parameter of denoiser, hce is trained"),
    ],
)
def test_rules_that_miss_a_parameter_or_train_none_are_refused(rules, what):
    with pytest.raises(InputError, match=what) as caught:
        Parts(stage_config(2, "--stage.trained", *rules), FULL)
    assert caught.value.where == "stage.trained" and caught.value.fix


# where it starts


def test_lcg_starts_as_the_denoiser_without_the_channels_of_the_sketch(runs):
    folder, trained = runs
    config = stage_config(3)
    sources = Sources([folder / "run1"], config.stage)
    assert sources.model_config.lcg.in_channels == 4 and sources.model_config.denoiser.in_channels == 8
    parts = Parts(config, sources.model_config)
    ours, frozen = read_parameters(sources, parts, config, make_mesh(fsdp=2))
    assert sorted(ours) == names_of(["lcg"]) and sorted(frozen) == names_of(["denoiser"])
    for name, leaf in ours.items():
        expected = trained[1][name.replace("lcg", "denoiser")]
        expected = expected[:, :, :4] if name == "lcg/patch_embed/kernel" else expected
        np.testing.assert_array_equal(leaf, expected, err_msg=name)
        np.testing.assert_array_equal(
            frozen[name.replace("lcg", "denoiser")], trained[1][name.replace("lcg", "denoiser")]
        )


def test_an_lcg_given_by_name_is_taken_in_place_of_the_copy(runs):
    folder, trained = runs
    sources = Sources([folder / "run1", f"lcg={folder / 'run3'}"], stage_config(3).stage)
    leaf = sources.read("lcg", lambda name: "float32", None)["blocks/attn/q/kernel"]
    np.testing.assert_array_equal(leaf, trained[3]["lcg/blocks/attn/q/kernel"])


def test_stage_4_joins_the_hce_of_stage_2_and_the_lcg_of_stage_3(runs):
    folder, trained = runs
    config = stage_config(4, "--compute.frozen-dtype", "bfloat16")
    sources = Sources([folder / "run3", f"hce={folder / 'run2'}"], config.stage)
    parts = Parts(config, sources.model_config)
    sources.require_trained(parts.trained)
    ours, frozen = read_parameters(sources, parts, config, make_mesh(fsdp=2))
    expected = trained[1] | trained[2] | trained[3]
    assert (ours | frozen).keys() == expected.keys()
    for name, leaf in ours.items():
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
    for name, leaf in frozen.items():
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, expected[name].astype(jnp.bfloat16), err_msg=name)
    stages = {name: sources.provenance(name)["trained"]["stage"] for name in ("denoiser", "lcg", "hce")}
    assert stages == {"denoiser": "stage1_sketch", "lcg": "stage3_lcg", "hce": "stage2_hce"}


def test_adapters_start_without_effect(weights):
    config = stage_config(1, "--lora.rank", "4")
    sources = Sources([weights], config.stage)
    parts = Parts(config, sources.model_config)
    trained, frozen = read_parameters(sources, parts, config, make_mesh(fsdp=2))
    assert sorted(trained) == parts.trained and sorted(frozen) == names_of(["denoiser"])
    for name, leaf in trained.items():
        assert leaf.any() == name.endswith("lora_a") and leaf.dtype == jnp.float32


# what is refused


def refusal(init, stage, *flags):
    """The InputError of `Sources` and `require_trained`."""
    config = stage_config(stage, *flags)
    with pytest.raises(InputError) as caught:
        sources = Sources(init, config.stage)
        sources.require_trained(Parts(config, sources.model_config).trained)
    assert caught.value.where and caught.value.expected
    return caught.value


def test_networks_that_were_never_trained_are_refused_where_they_stay_so(weights, runs):
    folder, _ = runs
    error = refusal([weights], 2)
    assert "denoiser was never trained" in error.what and error.where == str(weights)
    assert "denoiser=RUN" in error.fix and "--allow-untrained" in error.fix
    assert "hce was never trained" in refusal([folder / "run3"], 4).what
    copied = ("--stage.start", "lcg", "denoiser", ".*", "init")
    assert "lcg was never trained" in refusal([folder / "run2"], 4, *copied).what


@pytest.mark.parametrize(
    ("init", "what"),
    [
        ([], r"\[\]"),
        (["hce={run}"], "hce="),
        (["{weights}", "{weights}"], "an unnamed path is given twice"),
        (["{weights}", "hce={run}", "hce={run}"], "hce is given twice"),
        (["{weights}", "vae={run}"], "vae is no network that is trained"),
        (["{weights}/missing"], "config.json is missing"),
        (["{weights}", "hce={weights}/missing"], "config.json is missing"),
    ],
)
def test_init_that_names_no_weights_is_refused(weights, runs, init, what):
    values = {"weights": weights, "run": runs[0] / "run2"}
    with pytest.raises(InputError, match=what) as caught:
        Sources([text.format(**values) for text in init], stage_config(4).stage)
    assert caught.value.where and caught.value.expected


def test_missing_networks_are_refused(tmp_path):
    config = dataclasses.replace(model_config(), hce=None, lcg=None)
    write_initial(tmp_path / "plain", config)
    Sources([tmp_path / "plain"], stage_config(1).stage)
    Sources([tmp_path / "plain"], stage_config(3).stage)  # the LCG is a copy
    error = refusal([tmp_path / "plain"], 2)
    assert error.what == "lacks hce" and error.where == str(tmp_path / "plain")
    with pytest.raises(InputError, match="lacks vae, scheduler"):
        broken = json.loads((tmp_path / "plain" / "config.json").read_text())
        del broken["components"]["vae"], broken["components"]["scheduler"]
        (tmp_path / "plain" / "config.json").write_text(json.dumps(broken))
        Sources([tmp_path / "plain"], stage_config(1).stage)


def test_networks_that_do_not_fit_each_other_are_refused(weights, tmp_path):
    write_initial(tmp_path / "wide", dataclasses.replace(model_config(num_heads=4), vae=None))
    config = stage_config(2)
    sources = Sources([weights, f"hce={tmp_path / 'wide'}"], config.stage)
    with pytest.raises(InputError, match="hce.model_dim is 64, the denoiser's width 32"):
        Parts(config, sources.model_config)


def test_a_run_without_weights_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="no weights directory yet") as caught:
        open_source(tmp_path)
    assert caught.value.where == str(tmp_path) and "--export" in caught.value.fix


@pytest.mark.parametrize(
    "start",
    [("hce", "denoiser", ".*", "init"), (".*", "elsewhere"), ("lcg", "init"), ("lcg", "hce", ".*", "init")],
)
def test_impossible_starts_are_refused(weights, start):
    error = refusal([weights], 4, "--stage.start", *start)
    assert error.where == "stage.start"


# the config


def test_flags_replace_single_values():
    config = override(
        read_config(CONFIGS[2]),
        ["--optimizer.learning-rate", "1e-6", "--compute.mesh", "fsdp=2", "--steps", "3", "--lora.rank", "2"],
    )
    assert (config.optimizer.learning_rate, config.compute.mesh, config.steps) == (1e-6, "fsdp=2", 3)
    assert config.lora.rank == 2 and config.stage == read_config(CONFIGS[2]).stage


@pytest.mark.parametrize(
    "flags",
    [
        "--stage.conditions text hce",
        "--stage.conditions text sketch radio",
        "--optimizer.name sgd",
        "--optimizer.schedule linear",
        *(f"--optimizer.{name} -1" for name in ("learning-rate", "weight-decay", "clip-norm")),
        "--optimizer.warmup-steps -1",
        *(f"--optimizer.{name} 1" for name in ("beta1", "beta2", "beta3", "ema")),
        "--optimizer.final-fraction nan",
        "--optimizer.learning-rate inf",
        "--optimizer.eps 0",
        "--optimizer.came-eps 0 1e-16",
        "--optimizer.came-clip 0",
        "--optimizer.accumulate 0",
        "--optimizer.accumulate 3",
        "--lora.rank -1",
        "--lora.alpha -1",
        "--compute.dtype float16",
        "--compute.frozen-dtype float64",
        "--compute.attention flash",
        "--compute.remat all",
        "--compute.memory-gib -1",
        *(f"--checkpoint.{name} {value}" for name, value in (("every", 0), ("keep", 0), ("keep-every", -1))),
        *(f"--validation.{name} -1" for name in ("every", "videos-every")),
        *(f"--validation.{name} 0" for name in ("clips", "timesteps", "videos", "sampler-steps")),
        "--steps 0",
        "--log-every 0",
        "--precomputed latents audio",
        "--optimizer.learning-speed 1",
        "--steps many",
    ],
)  # fmt: skip
def test_bad_values_are_refused(flags):
    with pytest.raises(InputError) as caught:
        override(read_config(CONFIGS[0]), flags.split())
    name, *values = flags.removeprefix("--").split()
    if name == "optimizer.accumulate" and values == ["3"]:
        name = "data.batch-size"
    assert name in caught.value.what.replace("_", "-") and caught.value.where
    assert caught.value.expected


def test_a_file_without_a_config_is_refused(tmp_path):
    for text, what in (
        ("CONFIG = 1", "CONFIG is int"),
        ("", "CONFIG is NoneType"),
        ("1 / 0", "division by zero"),
    ):
        (tmp_path / "config.py").write_text(text)
        with pytest.raises(InputError, match=what):
            read_config(tmp_path / "config.py")
    with pytest.raises(InputError, match="no such Python file"):
        read_config(tmp_path / "missing.py")

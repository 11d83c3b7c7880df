"""Programs compiled for devices that are not here, and what is read from them."""

import json
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from animecolor_jax import platforms, sharding
from animecolor_jax.compiling import collectives, hlo, kernels, programs, report, targets
from animecolor_jax.config import preset
from animecolor_jax.errors import InputError
from animecolor_jax.models import attention

STEPS, ROWS, COLUMNS = 6, 8, 128


@pytest.fixture(scope="module")
def looped():
    """Instructions of a loop that gathers [ROWS, COLUMNS] over 4 devices and sums over all 8, STEPS times."""
    mesh = sharding.make_mesh(data=2, fsdp=4)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=P("fsdp"), out_specs=P(), check_vma=False)
    def program(x):
        def body(total, scale):
            whole = jax.lax.all_gather(jnp.sin(x * scale), "fsdp", tiled=True)
            return total + jax.lax.psum(jnp.sin(total) @ whole.T @ whole, ("data", "fsdp")), None

        return jax.lax.scan(body, jnp.zeros((ROWS, COLUMNS)), jnp.arange(STEPS, dtype=jnp.float32))[0]

    return hlo.instructions(program.lower(jnp.ones((ROWS, COLUMNS))).compile().as_text())


def test_collectives_of_a_loop_count_as_often_as_it_runs(looped):
    found = {each.kind: each for each in collectives.read_collectives(looped, 8, devices_per_slice=4)}
    assert set(found) == {"all-gather", "all-reduce"}
    gather, reduce = found["all-gather"], found["all-reduce"]
    size = ROWS * COLUMNS * 4
    assert gather == ("all-gather", size, 4, STEPS, False)
    assert gather.received == STEPS * size * 3 / 4
    assert reduce == ("all-reduce", size, 8, STEPS, True)
    assert reduce.received == STEPS * 2 * size * 7 / 8
    assert collectives.summarise(found.values())["all-reduce"]["count"] == STEPS


def test_traffic_counts_what_a_loop_writes(looped):
    size = ROWS * COLUMNS * 4
    # the gathered rows, their products and sums, each written and read
    assert 6 * STEPS * size < hlo.memory_traffic(looped) < 30 * STEPS * size


@pytest.mark.parametrize(
    ("kernel", "moved"),
    [
        ("loop_add_fusion", 2 * 4096),
        ("loop_dynamic_update_slice_fusion", 0),  # as GPUs' compiler names it
        ("bitcast_dynamic-update-slice_fusion", 0),  # as TPUs'
    ],
)
def test_what_is_written_into_a_part_of_a_larger_array_is_no_traffic(kernel, moved):
    lines = ["ENTRY %main (p: f32[1024]) -> f32[1024] {", "  %p = f32[1024]{0} parameter(0)"]
    lines.append(f"  ROOT %{kernel}.3 = f32[1024]{{0}} fusion(%p), kind=kLoop, calls=%fused")
    assert hlo.memory_traffic(hlo.instructions("\n".join([*lines, "}"]))) == moved


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_are_read_however_they_are_written(text, groups):
    assert collectives._groups(f"  %x = f32[2] all-gather(%y), {text}, dimensions={{0}}") == groups


# what compilers for TPUs and GPUs write, and the one for CPUs does not
PROGRAM = """HloModule program

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %gather = ((bf16[4]{0}, bf16[2]{0}), (bf16[16]{0}, bf16[8]{0}), u32[], u32[]) all-gather-start(%a, %b), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  %reduce = (f32[4]{0}, f32[2]{0}) all-reduce-start(%c, %d), channel_id=2, replica_groups={}, to_apply=%add
  %scatter = ((f32[16]{0}), f32[4]{0}) reduce-scatter-start(%e), channel_id=3, replica_groups={{0,1,2,3}}, calls=%inner
  %sum = (f32[2,8]{1,0:T(8,128)}, u32[], token[]) recv(%after), channel_id=5, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %choice = f32[8]{0} conditional(%i, %x, %y), branch_computations={%left, %right}
}

%inner (x: f32[16]) -> f32[4] {
  %again = f32[4]{0} reduce-scatter(%x), channel_id=3, replica_groups={{0,1,2,3}}
}

%left (x: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} parameter(0)
}

%right (x: f32[8]) -> f32[8] {
  ROOT %moved = f32[8]{0} collective-permute(%x), channel_id=4, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
}

%limit (p: (s32[], f32[8])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  %number = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%number, %five), direction=LT
}

%unclear (p: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] fusion(%p), kind=kLoop, calls=%left
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]) while(%start), condition=%limit, body=%body
  ROOT %other = (s32[], f32[8]) while(%start), condition=%unclear, body=%left
}
"""  # noqa: E501


def test_what_only_starts_and_what_is_chosen_is_read():
    found = hlo.instructions(PROGRAM)
    assert [each.trips for each in found if each.operation == "while"] == [5, None]
    sent = {each.kind: each for each in collectives.read_collectives(found, 4, 2)}
    assert sent["all-gather"] == ("all-gather", 2 * (16 + 8), 4, 5, True)
    assert sent["all-reduce"] == ("all-reduce", 4 * (4 + 2), 4, 5, True)
    assert sent["reduce-scatter"] == ("reduce-scatter", 4 * 4, 4, 5, True)
    assert sent["reduce-scatter"].received == 5 * 3 * 16
    assert sent["collective-permute"] == ("collective-permute", 32, 2, 5, True)
    assert sent["between-slices"] == ("between-slices", 64, 2, 5, True)
    assert sent["between-slices"].received == 5 * 64
    assert len(sent) == 5


@pytest.mark.parametrize(
    "text",
    ["tpu:v5e", "tpu:a100-40gb:1x8", "gpu:v5e:4x4", "gpu:a100-40gb:1x8:2", "tpu:v5e:0x4", "gpu:h100-80gb:1"],
)
def test_unknown_devices_are_refused(text):
    with pytest.raises(InputError, match="--target"):
        targets.open_target(text)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    for text, package in (("tpu:v5e:2x2", "libtpu"), ("gpu:a100-40gb:1x1", "jax_cuda13_plugin")):
        with pytest.raises(InputError, match=f"{package}.*\n.*pip install"):
            targets.open_target(text)


def on_cpu(memory):
    kind = targets.Kind("cpu", memory, 1e9, 1e9, 1e9)
    return targets.Target("cpu", kind, tuple(jax.devices()[:4]), 1)


@pytest.mark.parametrize(("memory", "fits"), [(2**30, True), (10_000, False)])
def test_a_program_fits_or_not(memory, fits):
    target = on_cpu(memory)
    mesh = sharding.make_mesh(fsdp=4, devices=list(target.devices))
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=jax.NamedSharding(mesh, P("fsdp")))
    program = programs.Program(
        "product", lambda: jax.jit(lambda x: x @ x.T).lower(x), 2 * 64**3, "float32", 1000
    )
    (facts,) = report.check([program], target, mesh)
    assert facts["fits"] is fits
    assert facts["argument_gib"] * 2**30 == 64 * 64 * 4 / 4  # a quarter on each
    own = facts["argument_gib"] + facts["temp_gib"] + facts["output_gib"]
    assert facts["peak_gib"] * 2**30 == pytest.approx(own * 2**30 + 1000)
    assert "all-gather" in facts["collectives"]
    assert ("does NOT fit" in report.describe(facts)) is not fits


def test_a_compiler_that_runs_out_of_memory_says_how_much_is_needed():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 24.50G of 15.75G hbm."
    assert report.needed_memory(message) == 24.5 * 2**30
    message = "memory required for HLO temporaries (25.5G) exceeds available HBM (15.75G). HLO module: jit_f."
    assert report.needed_memory(message) == 25.5 * 2**30
    for other in ("INVALID_ARGUMENT: no such thing", "Ran out of memory in vmem. Used 130M of 128M vmem."):
        assert report.needed_memory(other) is None


def test_failure_of_the_compiler_with_a_way_round_names_it():
    message = "INTERNAL: Value <1 start.25{0}> (3080, 3090) off: 0 size: 8 overlaps with another chunk off: 0"
    assert "LIBTPU_INIT_ARGS=--xla" in str(report.explained(message))
    assert report.explained("INTERNAL: another") is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_kernels_compile_for_a_tpu_forward_and_backward(dtype):
    """Interpreted, they need not be what Mosaic takes."""
    code = f"""
import jax
from jax.sharding import SingleDeviceSharding
from animecolor_jax.compiling import targets
from animecolor_jax.models.attention import joint_attention

device = targets.open_target("tpu:v5e:2x2").devices[0]
q, k = (
    [jax.ShapeDtypeStruct((1, n, 2, 64), "{dtype}", sharding=SingleDeviceSharding(device)) for n in lengths]
    for lengths in ((30, 200), (100, 30, 200))
)

def attend(q, k, v):
    out, pull = jax.vjp(lambda *xs: joint_attention(*xs, "packed"), q, k, v)
    return out, pull(out)

text = jax.jit(attend).trace(q, k, k).lower(lowering_platforms=("tpu",)).compile().as_text()
assert text.count("custom_call_target") >= 4, text
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


CODE = """
= control target key start
LB: loop body
     0   :  { %s1 = inlined_call_operand.hbm [shape: bf16[1,8]] }
   0x5 LB: > { %3 = sst [smem:[#a]] %s4 }
   0x9   : > { %7 = sbr.rel (%p8) target = $region16 }
   0xa   : > { %v1 = vld [vmem:[%s1]] }
  0x2a   : > { %v2 = vmatmul %v1 } /* End region 13 */
second_minor_factor: 1 */ }
  0x2c PF: > { %p9 = scmp.ne.s32 %s1, 0 }
  0x30   :  { %10 = vsyncpa [#a], 1 }
"""


def test_the_longest_stretch_of_a_kernel_lies_between_branches_and_what_they_lead_to():
    assert kernels.longest_stretch(CODE.splitlines()) == 0x2C - 0x9


def test_programs_are_traced_for_the_devices_they_are_for():
    x = [jnp.ones((1, 4, 2, 8), jnp.bfloat16)]
    assert attention.choose(x) == "chunked"
    with platforms.traced_for("tpu", "TPU v5 lite"):
        assert attention.choose(x) == "splash"
    with platforms.traced_for("gpu", "NVIDIA H100 80GB HBM3"):
        assert attention.choose(x) == "cudnn"
        assert attention.choose([x[0].astype(jnp.float32)]) == "chunked"
    assert platforms.platform() == "cpu"


PROGRAMS = ("text", "image", "encode", "conditions", "denoise", "decode")


@pytest.mark.parametrize("program", PROGRAMS)
def test_all_networks_are_on_the_device_unless_they_are_offloaded(program):
    """What a program reads and what is beside it is all there is; a compiler leaves out what is not read."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    clip, config = programs.Clip(9, 64, 96), preset("tiny")
    kept, offloaded = (
        getattr(programs.Colouring(config, clip, mesh, "float32", offload), program)()[0]
        for offload in (False, True)
    )
    everything = sum(
        sharding.bytes_on_device(leaf)
        for name in programs.COMPONENTS
        for leaf in programs.Colouring(config, clip, mesh, "float32").leaves(name).values()
    )
    assert 0 <= offloaded.resident < kept.resident < everything
    lowered = kept.lower()
    taken = lowered.compile({"xla_backend_optimization_level": 0}).memory_analysis().argument_size_in_bytes
    # arguments that are no parameters are small here
    assert everything <= kept.resident + taken < 1.35 * everything


def test_a_clip_that_cannot_be_encoded_is_refused():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    for clip in (programs.Clip(10, 64, 96), programs.Clip(9, 60, 96)):
        with pytest.raises(InputError, match="--frames, --size"):
            programs.Colouring(preset("tiny"), clip, mesh)


def compile_check(*args):
    command = [sys.executable, "tools/compile_check.py", "--preset", "tiny", "--size", "64x96"]
    done = subprocess.run([*command, "--frames", "9", "--json", *args], capture_output=True, text=True)
    return done, json.loads(done.stdout.splitlines()[-1]) if done.stdout else None


TINY = ("--config", "configs/tiny/stage4_joint.py", "--compute.dtype", "bfloat16")


def test_tiny_compiles_for_a_tpu():
    done, found = compile_check(*TINY, "--target", "tpu:v5e:2x2", "--mesh", "fsdp=2,context=2")
    assert done.returncode == 0, done.stderr
    assert found["devices"] == 4 and found["fits"] and found["hbm_gib"] == 16
    # every block of three networks gathers keys and values, forward and backward
    assert found["collectives"]["all-gather"]["count"] > 8 * preset("tiny").denoiser.num_layers
    assert found["loops_counted_once"] == 0
    assert found["peak_gib"] > found["argument_gib"] > 0 and found["model_tflop_per_step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("program", ["text", "image", "vae-encode", "conditions", "denoise", "vae-decode"])
def test_colouring_compiles_for_a_tpu(program):
    done, found = compile_check("--program", program, "--target", "tpu:v5e:2x2")
    assert done.returncode == 0, done.stderr
    assert found["fits"] and len(found["programs"]) == (2 if program.startswith("vae") else 1)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--target", "tpu:v5e:2x2"), "--config"),
        (("--target", "tpu:v5e:2x2", "--program", "denoise", "--batch", "4"), "only with train"),
        (("--target", "tpu:v5e:2x2", "--offload", *TINY), "is of colouring"),
        (("--target", "tpu:v5e:3x5", *TINY), "arrangement of chips"),
        (("--target", "tpu:v5e:2x2", "--mesh", "fsdp=8", *TINY), "needs 8 devices"),
    ],
)
def test_what_cannot_be_compiled_is_said(args, says):
    done, found = compile_check(*args)
    assert done.returncode == 2 and says in done.stderr
    assert set(found["error"]) == {"what", "where", "expected", "fix"}

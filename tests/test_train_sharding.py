"""Training on 8 devices is training on one: the same numbers, and everything really shared out.

No size divides by its axis of `context`: 27 video, 10 text and 9 reference tokens. Programs on a mesh compute
activations again in the backward pass, those on one device keep them.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from train_models import STAGES, make_objective, model_config, random_inputs, random_state, stage_config

from animecolor_jax.errors import InputError
from animecolor_jax.loading import batch_sharding
from animecolor_jax.sharding import check_mesh, make_mesh, parameter_sharding
from animecolor_jax.train.optimizer import make_optimizer
from animecolor_jax.train.state import sharding_of, state_shardings
from animecolor_jax.train.step import draw, gradients, make_train_step

BATCH, DIM, DEPTH, HEADS, HEAD_DIM = 8, 32, 2, 8, 4
TEXT, VIDEO, REFERENCE = 10, 27, 9
MODEL = model_config(
    num_layers=DEPTH, num_heads=HEADS, head_dim=HEAD_DIM, text_length=TEXT,
    hce={"interval": 1, "num_cross": DEPTH, "cross_num_heads": HEADS},
)  # fmt: skip
INPUTS = random_inputs(MODEL, BATCH, size=(3, 6, 6))
KERNEL, NETWORK = "blocks/ff/up/kernel", {1: "denoiser", 2: "hce", 3: "lcg", 4: "denoiser"}
# Adam divides gradients by their size: with its own eps, rounding of the smallest would move parameters.
FLAGS = ("--optimizer.eps", "1e-3", "--data.batch-size", str(BATCH))
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
MOVES = {"all-to-all", "collective-permute"}
MIXED = ({"data": 2, "fsdp": 2, "context": 2}, {"fsdp": 2, "context": 2, "tensor": 2})


def collectives(program):
    """{(operation, shape of a result, whether it is in a loop)} of a compiled program."""
    found, looped = set(), False
    for line in program.as_text().splitlines():
        if line.endswith("{"):
            looped = not line.startswith("ENTRY")
        if match := re.search(rf" = (.*?) ({COLLECTIVES})(-start)?\(", line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found |= {(match[2], tuple(map(int, filter(None, s.split(",")))), looped) for s in shapes}
    return found


def results(program):
    """Shapes of all arrays that a compiled program makes on each device."""
    return {tuple(map(int, shape.split(","))) for shape in re.findall(r"\w\[([\d,]+)\]", program.as_text())}


def two_updates(stage, mesh=None, *flags):
    """((state, inputs) before, state after, [values of each update], the compiled update)."""
    config = stage_config(stage, *FLAGS, *flags)
    objective = make_objective(config, MODEL)
    state, optimizer = random_state(objective.parts, config)
    inputs, placed = INPUTS, None
    if mesh is not None:
        of_trained, of_opt_state = state_shardings(optimizer, state.trainable, mesh)
        frozen = {name: sharding_of(name, leaf.shape, mesh) for name, leaf in state.frozen.items()}
        placed = of_trained, of_opt_state, None
        state = state._replace(
            trainable=jax.device_put(state.trainable, of_trained),
            opt_state=jax.device_put(state.opt_state, of_opt_state),
            frozen=jax.device_put(state.frozen, frozen),
        )
        inputs = jax.device_put(INPUTS, batch_sharding(mesh))
    with jax.set_mesh(mesh or make_mesh()):
        step = make_train_step(objective, optimizer, config.optimizer, placed)
        before = jax.tree.map(jnp.copy, (state.trainable, state.opt_state)), inputs
        arguments = state.trainable, state.opt_state, None
        program = step.lower(*arguments, state.frozen, inputs, state.key, state.step).compile()
        values = []
        for number in range(2):
            *arguments, value = program(*arguments, state.frozen, inputs, state.key, jnp.int32(number))
            values.append(value)
    return before, tuple(arguments[:2]), values, program


@functools.cache
def on_one_device(stage):
    _, after, values, program = two_updates(stage)
    assert not collectives(program)
    return jax.device_get((after, values))


def check_equal(stage, after, values):
    """Losses, gradient norms, parameters and moments are those of one device."""
    expected_after, expected = on_one_device(stage)
    for ours, theirs in zip(values, expected, strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
        np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-4)
    assert values[0]["loss"] != values[1]["loss"]
    for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(expected_after), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max() + 1e-9)


def check_shards(before, after, name, shard):
    """Parameter `name` and its moments have these shards; an update leaves every array where it was."""
    (trained, opt_state), inputs = before
    assert trained[name].addressable_shards[0].data.shape == shard
    same = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state) if name in str(path)]
    assert [leaf.addressable_shards[0].data.shape for leaf in same] == [shard, shard]
    for old, new in zip(jax.tree.leaves(before[0]), jax.tree.leaves(after), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim)


def run(stage, sizes, kernel_shard, *flags):
    """Trains on a mesh and checks what holds on any; the compiled update, and its collectives."""
    before, after, values, program = two_updates(stage, make_mesh(**sizes), *flags)
    check_equal(stage, after, values)
    name = f"{NETWORK[stage]}/{KERNEL if stage != 2 else 'cross_attn/q/kernel'}"
    check_shards(before, after, name, kernel_shard)
    rows = BATCH // (sizes.get("data", 1) * sizes.get("fsdp", 1))
    assert {len(x.addressable_shards[0].data) for x in before[1].values()} == {rows}
    made = results(program)
    assert not {(BATCH, tokens, 4 * DIM) for tokens in (VIDEO, TEXT + VIDEO)} & made
    return program, collectives(program)


@pytest.mark.slow
def test_data_alone():
    program, found = run(4, {"data": 8}, (DEPTH, DIM, 4 * DIM))
    assert {operation for operation, _, _ in found} == {"all-reduce"}
    assert ("all-reduce", (DIM, 4 * DIM), True) in found
    assert (1, TEXT + VIDEO, 4 * DIM) in results(program)


@pytest.mark.slow  # the mixed meshes show it as well
def test_fsdp_alone_gathers_one_layer_at_a_time():
    program, found = run(4, {"fsdp": 8}, (DEPTH, DIM // 8, 4 * DIM), "--compute.remat", "block")
    gathered = {(shape, looped) for operation, shape, looped in found if operation == "all-gather"}
    layer = {(DIM, 4 * DIM), (4 * DIM, DIM), (DIM, DIM)}
    assert {(shape, True) for shape in layer} <= gathered
    assert not {(DEPTH, *shape) for shape in layer} & {shape for shape, _ in gathered}
    # the CPU sums and then cuts, where others reduce-scatter
    assert found & {("all-reduce", (DIM, 4 * DIM), True), ("reduce-scatter", (DIM // 8, 4 * DIM), True)}
    assert (1, TEXT + VIDEO, 4 * DIM) in results(program)


@pytest.mark.slow
def test_context_alone_gathers_keys_and_values_only():
    program, found = run(4, {"context": 8}, (DEPTH, DIM, 4 * DIM), "--compute.remat", "attention")
    in_loops = {(operation, shape) for operation, shape, looped in found if looped}
    keys = {(BATCH, -(-tokens // 8) * 8, HEADS, HEAD_DIM) for tokens in (TEXT, VIDEO, REFERENCE)}
    colors = {(BATCH, 8, HEADS, MODEL.hce.cross_head_dim)}
    assert {shape for operation, shape in in_loops if operation == "all-gather"} == keys | colors
    assert {shape for operation, shape in in_loops if operation == "reduce-scatter"} == {
        (batch, tokens // 8, *heads) for batch, tokens, *heads in keys
    }
    assert not {operation for operation, _ in in_loops} & MOVES
    made = results(program)
    assert (BATCH, 4, 4 * DIM) in made and (BATCH, 2, 4 * DIM) in made  # of 27 video tokens, of 10 of text
    assert not any(shape[1:] == (TEXT, 4 * DIM) for shape in made)


@pytest.mark.slow
def test_tensor_alone():
    program, found = run(4, {"tensor": 8}, (DEPTH, DIM, 4 * DIM // 8), "--compute.remat", "block")
    assert ("all-reduce", (BATCH, TEXT + VIDEO, DIM), True) in found
    assert not {operation for operation, _, _ in found} & MOVES
    assert not {shape for operation, shape, looped in found if operation == "all-gather" and looped}
    made = results(program)
    assert (BATCH, TEXT + VIDEO, 4 * DIM // 8) in made
    assert (BATCH, TEXT + VIDEO, 1, HEAD_DIM) in made and (BATCH, TEXT + VIDEO, HEADS, HEAD_DIM) not in made


QUICK = [(MIXED[1], 3)]


@pytest.mark.parametrize(
    ("sizes", "stage"),
    QUICK
    + [
        pytest.param(sizes, stage, marks=pytest.mark.slow)
        for sizes in MIXED
        for stage in STAGES
        if (sizes, stage) not in QUICK
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_mixed_meshes(sizes, stage):
    tensor = sizes.get("tensor", 1)
    inner = HEADS * MODEL.hce.cross_head_dim if stage == 2 else 4 * DIM
    shard = (DEPTH, DIM // 2, inner // tensor)
    program, found = run(stage, sizes, shard, "--compute.remat", "attention" if tensor == 1 else "block")
    rows = BATCH // (2 * sizes.get("data", 1))
    gathered = {shape for operation, shape, looped in found if operation == "all-gather" and looped}
    assert (rows, 28, HEADS // tensor * HEAD_DIM) in gathered  # video keys
    assert (DIM, 4 * DIM // tensor) in gathered  # one layer of the feed-forward
    assert not {(DEPTH, DIM, 4 * DIM // share) for share in (1, 2)} & {shape for _, shape, _ in found}
    if tensor > 1:
        assert ("all-reduce", (rows, 14, DIM), True) in found  # video tokens after attention and feed-forward
    assert (rows, 14, 4 * DIM // tensor) in results(program)


def test_accumulation_leaves_every_clip_on_its_device():
    config = stage_config(1, *FLAGS, "--optimizer.accumulate", "2")
    objective = make_objective(config, MODEL)
    state, _ = random_state(objective.parts, config)
    mesh = make_mesh(data=4)

    def loss_and_gradient(trained, inputs, key):
        return gradients(objective, trained, state.frozen, inputs, draw(key, inputs, 1000), 2)

    inputs = jax.device_put(INPUTS, batch_sharding(mesh))
    trained = jax.device_put(state.trainable, jax.NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        key = jax.random.fold_in(state.key, 0)  # as in the first update
        program = jax.jit(loss_and_gradient).lower(trained, inputs, key).compile()
        loss, _ = program(trained, inputs, key)
    assert {operation for operation, _, _ in collectives(program)} == {"all-reduce"}
    _, values = on_one_device(1)
    np.testing.assert_allclose(loss, values[0]["loss"], rtol=1e-5)


def test_factored_moments_lie_where_their_parameters_do():
    config = stage_config(4, "--optimizer.name", "came")
    parts = make_objective(config, MODEL).parts
    optimizer = make_optimizer(config.optimizer, config.steps, parts.trained)
    shapes = {name: parts.shapes[name] for name in parts.trained}
    _, placed = state_shardings(optimizer, shapes, make_mesh(fsdp=4, tensor=2))
    (came,) = (each for each in placed if hasattr(each, "square"))
    name = f"denoiser/{KERNEL}"
    assert came.momentum[name].spec == P(None, "fsdp", "tensor")
    assert came.square[name].row.spec == P(None, "fsdp")
    assert came.instability[name].column.spec == P(None, "tensor")
    assert came.square["denoiser/blocks/ff/up/bias"].spec == P()


def test_adapters_are_on_every_device():
    shape = (DEPTH, DIM, 4)
    assert parameter_sharding("blocks/attn/q/lora_a", shape, make_mesh(fsdp=4, tensor=2)).spec == P()


def test_heads_that_tensor_does_not_divide_are_refused():
    configs = {"denoiser": MODEL.denoiser, "lcg": MODEL.lcg, "hce": MODEL.hce}
    check_mesh(make_mesh(fsdp=2, context=2, tensor=2), configs)
    check_mesh(make_mesh(context=7), configs)
    with pytest.raises(InputError, match=r"tensor=3 .*denoiser.num_heads = 8, lcg.num_heads = 8, hce"):
        check_mesh(make_mesh(tensor=3), configs)
    uneven = model_config(num_heads=6, hce={"cross_num_heads": 4})
    with pytest.raises(InputError, match=r"tensor=6 does not divide hce.cross_num_heads = 4\n"):
        check_mesh(make_mesh(tensor=6), {"denoiser": uneven.denoiser, "hce": uneven.hce})

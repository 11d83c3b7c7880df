"""What a training run holds in memory: parameters, optimiser state, step and key, laid out over a mesh."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from animecolor_jax.networks import initial_leaves
from animecolor_jax.sharding import parameter_sharding
from animecolor_jax.train.optimizer import factored_axes


class TrainState(NamedTuple):
    """All of it; parameters are flat dicts {"COMPONENT/NAME": array}.

    Attributes:
        step: updates made, an int32 scalar.
        trainable: float32. opt_state: Optax's. ema: float32 like `trainable`, or None.
        frozen: in the config's `frozen_dtype`.
        key: `jax.random.key` of the run; step s draws from `fold_in(key, s)`.
    """

    step: jax.Array
    trainable: dict
    opt_state: tuple
    ema: dict | None
    frozen: dict
    key: jax.Array


def sharding_of(name, shape, mesh):
    """Placement of a parameter COMPONENT/NAME."""
    return parameter_sharding(name.partition("/")[2], shape, mesh)


def read_parameters(sources, parts, config, mesh):
    """(trained, frozen) of `Sources`, on the mesh; adapters are new."""
    trained_names = set(parts.trained)
    trained, frozen = {}, {}

    def dtype_of(component):
        frozen_dtype = config.compute.frozen_dtype
        return lambda name: "float32" if f"{component}/{name}" in trained_names else frozen_dtype

    for component in parts.configs:
        leaves = sources.read(component, dtype_of(component), mesh)
        if component == "denoiser" and config.lora.rank:
            fresh = initial_leaves(component, parts.configs[component], config.seed, r".*/lora_[ab]")
            leaves |= {name: place(leaf, name, mesh) for name, leaf in fresh}
        for name, leaf in leaves.items():
            name = f"{component}/{name}"
            (trained if name in trained_names else frozen)[name] = leaf
    return trained, frozen


def place(leaf, name, mesh):
    """A host array as a parameter (NAME without component) on the mesh."""
    sharding = parameter_sharding(name, leaf.shape, mesh)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def state_shardings(optimizer, trained, mesh):
    """Shardings of (trained, opt_state, ema-like): moments lie where their parameters do.

    Args:
        trained: {name: array or ShapeDtypeStruct}.
    """
    placed = {name: sharding_of(name, leaf.shape, mesh) for name, leaf in trained.items()}

    def of_state(path, leaf):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in placed]
        if not names:
            return NamedSharding(mesh, P())  # a count
        name, shape = names[-1], trained[names[-1]].shape
        if leaf.shape == shape:
            return placed[name]
        # one of CAME's `Factors`: the parameter's placement without the axis that it is a mean along
        spec = [*placed[name].spec, *[None] * (len(shape) - len(placed[name].spec))]
        first, second = factored_axes(name, len(shape))
        del spec[second if path[-1].name == "row" else first]
        return NamedSharding(mesh, P(*spec))

    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for name, leaf in trained.items()}
    return placed, jax.tree_util.tree_map_with_path(of_state, jax.eval_shape(optimizer.init, shapes))


def create(sources, parts, optimizer, config, mesh):
    """The `TrainState` of step 0."""
    trained, frozen = read_parameters(sources, parts, config, mesh)
    _, of_opt_state = state_shardings(optimizer, trained, mesh)
    everywhere = NamedSharding(mesh, P())
    return TrainState(
        step=jax.jit(lambda: jnp.int32(0), out_shardings=everywhere)(),
        trainable=trained,
        opt_state=jax.jit(optimizer.init, out_shardings=of_opt_state)(trained),
        ema=jax.tree.map(jnp.copy, trained) if config.optimizer.ema else None,
        frozen=frozen,
        key=jax.jit(jax.random.key, static_argnums=0, out_shardings=everywhere)(config.seed),
    )


def abstract(parts, optimizer, config, mesh):
    """The `TrainState` as ShapeDtypeStructs with shardings: what a checkpoint is restored into, on any
    mesh."""

    def struct(name, dtype):
        shape = parts.shapes[name].shape
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding_of(name, shape, mesh))

    trained = {name: struct(name, "float32") for name in parts.trained}
    shapes = jax.eval_shape(optimizer.init, trained)
    _, of_opt_state = state_shardings(optimizer, trained, mesh)
    everywhere = NamedSharding(mesh, P())
    key = jax.eval_shape(lambda: jax.random.key(0))
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
        trainable=trained,
        opt_state=jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes, of_opt_state,
        ),
        ema=dict(trained) if config.optimizer.ema else None,
        frozen={name: struct(name, config.compute.frozen_dtype) for name in parts.frozen},
        key=jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere),
    )  # fmt: skip

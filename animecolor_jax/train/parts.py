"""Which parameters a stage trains, and the model put together from trained and frozen ones.

Outside the model, parameters are flat dicts {"COMPONENT/NAME": array}.
"""

import dataclasses

from flax import nnx

from animecolor_jax import networks, params
from animecolor_jax.errors import InputError
from animecolor_jax.models.animecolor import AnimeColor, check

LORA = r"denoiser/.*/lora_[ab]"


def trained_rules(config):
    """The rules that say what is trained: the stage's, or with adapters those of the adapters."""
    return ((LORA, True), (r".*", False)) if config.lora.rank else config.stage.trained


class Parts:
    """The networks that a stage runs.

    Attributes:
        configs: {"denoiser", and "lcg", "hce" where the stage has them: config} as they run: dtype,
            attention, remat and adapters are those of the run.
        shapes: {name: ShapeDtypeStruct} of all parameters.
        trained: sorted names of the parameters that are trained.
        frozen: sorted names of the others.

    Raises:
        InputError: no rule matches a parameter, nothing is trained, or the networks do not fit each other.
    """

    def __init__(self, config, model_config):
        """
        Args:
            config: TrainConfig. model_config: AnimeColorConfig with the networks of the stage.
        """
        compute, lora = config.compute, config.lora
        self.configs, self._graphs, self.shapes = {}, {}, {}
        for name in config.stage.networks:
            changes = {"dtype": compute.dtype}
            if name != "hce":
                changes |= {"attention": compute.attention, "remat": compute.remat}
            if name == "denoiser":
                changes |= {"lora_rank": lora.rank, "lora_alpha": lora.alpha}
            self.configs[name] = dataclasses.replace(getattr(model_config, name), **changes)
            graph, shapes = params.abstract(networks.creator(name, self.configs[name]))
            self._graphs[name] = graph
            self.shapes |= {f"{name}/{leaf}": shape for leaf, shape in shapes.items()}
        check(**self.configs)
        rules = trained_rules(config)
        chosen = {name: params.first_match(rules, name, "stage.trained") for name in self.shapes}
        self.trained = sorted(name for name in chosen if chosen[name])
        self.frozen = sorted(name for name in chosen if not chosen[name])
        if not self.trained:
            raise InputError(
                f"no parameter of {', '.join(self.configs)} is trained",
                where="stage.trained",
                expected="rules that are true for some of them",
                fix="names are COMPONENT/NAME, such as denoiser/blocks/attn/q/kernel",
            )

    @property
    def trains_lcg(self):
        """Whether gradients pass the bank."""
        return any(name.startswith("lcg/") for name in self.trained)

    def model(self, trained, frozen):
        """The AnimeColor model with these parameters, {name: array} each."""
        leaves = {name: {} for name in self._graphs}
        for name, leaf in (trained | frozen).items():
            component, _, rest = name.partition("/")
            leaves[component][rest] = leaf
        return AnimeColor(
            **{name: nnx.merge(graph, params.unflatten(leaves[name])) for name, graph in self._graphs.items()}
        )

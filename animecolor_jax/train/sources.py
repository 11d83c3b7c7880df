"""`--init`: where the weights of a run come from.

A source is a weights directory, or an earlier stage's run, whose weights directory is then taken.
"""

import dataclasses

from animecolor_jax import config as configs
from animecolor_jax import params
from animecolor_jax.errors import InputError
from animecolor_jax.weights import Weights
from data_pipeline.storage import Storage, is_remote

RUN_FILE = "run.json"
WEIGHTS = "weights"  # of a run: the folder with the weights directory that it ended with
NETWORKS = ("denoiser", "lcg", "hce")  # that can come from elsewhere; the encoders made the data
UNTRAINED = ("initialised", "untrained")  # notes of the provenance


class Sources:
    """The weights that a stage starts from.

    Attributes:
        base: Weights with the networks that are not named, and with VAE, text encoder, image encoder,
        tokenizer.
        named: {network: Weights}.
        model_config: AnimeColorConfig of all of them together.
    """

    def __init__(self, init, stage):
        """
        Args:
            init: texts "PATH" (exactly one) and "NETWORK=PATH".
            stage: StageConfig.

        Raises:
            InputError: not such texts, not weights, or networks that are missing.
        """
        self.stage = stage
        paths = _parse(init)
        self.base = open_source(paths.pop(""))
        self.named = {name: open_source(path) for name, path in paths.items()}
        self.origins = {name: self._origin(name) for name in stage.networks}
        for name in {source for source, _ in self.origins.values()}:
            self.weights(name).require(name)
        self.base.require("vae", "scheduler")
        self.model_config = dataclasses.replace(
            self.base.config,
            preset="custom",
            **(
                {name: weights.config_of(name) for name, weights in self.named.items()}
                | {name: self._config(name) for name in stage.networks}
            ),
        )

    def weights(self, component):
        """The Weights that hold a component."""
        return self.named.get(component, self.base)

    def read(self, component, dtype_of, mesh):
        """{name: array} of a network of the stage, on the mesh.

        Args:
            dtype_of: function of a parameter's name -> dtype.
        """
        source, _ = self.origins[component]
        leaves = self.weights(source).read(source, dtype_of, mesh)
        return {name: self.adapt(component, name, leaf) for name, leaf in leaves.items()}

    def adapt(self, component, name, leaf):
        """A leaf as its weights hold it -> as the component has it: a copy of the denoiser has no sketch."""
        if self.origins[component][1] and name == "patch_embed/kernel":  # [p, p, C, D]
            return leaf[:, :, : self.model_config.denoiser.out_channels]
        return leaf

    def provenance(self, component):
        """What config.json of its weights says about where a component comes from."""
        source, copied = self.origins.get(component, (component, False))
        weights = self.weights(source)
        note = weights.values.get("provenance", {}).get(source, {})
        return {"untrained": "copy of the denoiser", "from": note} if copied else note

    def _origin(self, name):
        """(component whose weights are read, whether that is a copy of another network)."""
        origin = params.first_match(self.stage.start, name, "stage.start")
        if origin not in ("init", "denoiser") or (origin == "denoiser" and name != "lcg"):
            raise InputError(
                f"{origin!r} for {name}", where="stage.start", expected="init, or denoiser for lcg"
            )
        if origin == "denoiser" and name in self.named:  # given by name, so it is wanted
            return name, False
        return ("denoiser" if origin == "denoiser" else name), origin == "denoiser"

    def _config(self, name):
        source, copied = self.origins[name]
        config = self.weights(source).config_of(source)
        return dataclasses.replace(config, in_channels=config.out_channels) if copied else config

    def require_trained(self, names):
        """Raises InputError where the stage leaves a network as it is that was never trained.

        Args:
            names: of the parameters that the stage trains.
        """
        for name in self.stage.networks:
            note = self.provenance(name)
            trains = any(parameter.startswith(f"{name}/") for parameter in names)
            if not trains and any(key in note for key in UNTRAINED):
                raise InputError(
                    f"{name} was never trained ({note}), and stage {self.stage.name} leaves it as it is",
                    where=self.weights(name).directory,
                    expected=f"a trained {name}",
                    fix=f"give the run that trained it, --init ... {name}=RUN, or --allow-untrained",
                )


def open_source(path):
    """The Weights of a weights directory, or of a run; of a URL (gs://, s3://) those of a local copy.

    Raises:
        InputError: neither, or a run without weights yet.
    """
    storage, folder = Storage(path), ""
    if storage.exists(RUN_FILE):
        folder = WEIGHTS
        if not storage.exists(f"{WEIGHTS}/config.json"):
            raise InputError(
                "this run has no weights directory yet",
                where=path,
                expected="a finished run",
                fix="finish it; or give its command once more with --export, and then what that writes",
            )
    if not is_remote(path):
        return Weights(storage.path(folder))
    config = f"{folder}/config.json".lstrip("/")
    if not storage.exists(config):
        raise InputError(
            "holds no config.json",
            where=storage,
            expected="a weights directory or a run",
            fix="check the URL",
        )
    return Weights(storage.mirror(folder, storage.stamp(config)))


def _parse(init):
    paths = {}
    for text in init:
        name, equals, path = str(text).partition("=")
        name, path = (name, path) if equals and name in configs.COMPONENTS else ("", str(text))
        if name and name not in NETWORKS:
            raise InputError(
                f"{text!r}: {name} is no network that is trained",
                where="--init",
                expected=f"one unnamed path, with {name}, and any of "
                + ", ".join(f"{network}=PATH" for network in NETWORKS),
            )
        if name in paths:
            raise InputError(
                f"{text!r}: {name or 'an unnamed path'} is given twice", where="--init", expected="once"
            )
        paths[name] = path
    if "" not in paths:
        raise InputError(
            f"{list(map(str, init))}",
            where="--init",
            expected="one unnamed path, and any of "
            + ", ".join(f"{name}=PATH" for name in NETWORKS),
            fix="for example --init weights/, or --init runs/stage3 hce=runs/stage2",
        )
    return paths

"""AnimeColor: denoiser, LCG and HCE together, the conditions computed once per clip."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from animecolor_jax.errors import InputError
from animecolor_jax.models.hce import CrossConditions
from animecolor_jax.models.transformer import KeyValue


class Conditions(NamedTuple):
    """The reference as the denoiser sees it: independent of timestep and noise, hence made once per clip."""

    bank: KeyValue | None  # [depth, B, R, N, H]
    cross: KeyValue | None  # [num_cross, B, Q, N, H]


class AnimeColor(nnx.Module):
    """The trained part of the method; without LCG or HCE, that component is None.

    Raises:
        InputError: the configs of the three do not fit each other.
    """

    def __init__(self, denoiser, lcg=None, hce=None):
        check(denoiser.config, lcg and lcg.config, hce and hce.config)
        self.denoiser, self.lcg, self.hce = denoiser, lcg, hce

    def conditions(self, reference, summary, features):
        """Everything that the reference contributes, once per clip.

        Args:
            reference: [B, K, H, W, C] scaled latents of K reference images.
            summary: [B, K, summary_dim], features: [B, K, N, feature_dim] of the same images, from RADIO.
        """
        bank = cross = None
        if self.lcg is not None:
            bank = self.denoiser.project_bank(self.bank(reference))
        if self.hce is not None:
            cross = self.hce.key_value(self.color_tokens(summary, features))
        return Conditions(bank, cross)

    def bank(self, reference):
        """[B, K, H, W, C] -> [depth, B, K R, D]; several references are concatenated in the bank."""
        batch, images = reference.shape[:2]
        single = reference.reshape(batch * images, 1, *reference.shape[2:])
        bank = self.lcg.write_bank(single, self.lcg.config.text_length)
        return bank.reshape(len(bank), batch, -1, bank.shape[-1])

    def color_tokens(self, summary, features):
        """[B, K, summary_dim], [B, K, N, feature_dim] -> [B, K Q, output_dim]."""
        batch, images = summary.shape[:2]
        flat = jax.tree.map(lambda x: x.reshape(batch * images, *x.shape[2:]), (summary, features))
        tokens = self.hce.qformer(*flat)
        return tokens.reshape(batch, -1, tokens.shape[-1])

    def __call__(self, latents, sketch, text, timestep, conditions, rope=None):
        """Predicts v.

        Args:
            latents: [B, T, H, W, C] noisy latents; sketch: [B, T, H, W, C] sketch latents.
            text: [B, L, text_dim]; timestep: [B].
            conditions: from `conditions`, made for B clips or for one that all B share.

        Returns:
            [B, T, H, W, C].
        """
        return self.with_residual(latents, sketch, text, timestep, conditions, rope)[0]

    def with_residual(self, latents, sketch, text, timestep, conditions, rope=None):
        """As `__call__`, and what the denoiser's blocks add to the video tokens, [B, S, D]."""
        cross = None
        if conditions.cross is not None:
            cross = CrossConditions(self.hce.cross_attn, conditions.cross)
        joined = jnp.concatenate([latents, sketch.astype(latents.dtype)], axis=-1)
        return self.denoiser.with_residual(
            joined, text, timestep, bank=conditions.bank, cross=cross, rope=rope
        )

    def from_residual(self, latents, sketch, text, timestep, residual):
        """v if the blocks added `residual` again; conditions reach v through the blocks alone."""
        joined = jnp.concatenate([latents, sketch.astype(latents.dtype)], axis=-1)
        return self.denoiser.from_residual(joined, text, timestep, residual)


def check(denoiser, lcg=None, hce=None):
    """Raises InputError where the configs of denoiser, LCG and HCE do not fit each other."""
    problems = []
    if lcg is not None:
        for field in ("num_layers", "num_heads", "head_dim"):
            if getattr(lcg, field) != getattr(denoiser, field):
                problems.append(
                    f"lcg.{field} is {getattr(lcg, field)}, the denoiser's {getattr(denoiser, field)}"
                )
    if hce is not None:
        if denoiser.num_layers % hce.interval:
            problems.append(f"{denoiser.num_layers} blocks do not divide by hce.interval {hce.interval}")
        elif hce.num_cross != denoiser.num_layers // hce.interval:
            problems.append(
                f"hce.num_cross is {hce.num_cross}, expected {denoiser.num_layers // hce.interval}"
            )
        if hce.model_dim != denoiser.dim:
            problems.append(f"hce.model_dim is {hce.model_dim}, the denoiser's width {denoiser.dim}")
    if problems:
        raise InputError(
            "; ".join(problems),
            where="config",
            expected="networks of one model",
            fix="convert denoiser and LCG of the same checkpoint",
        )

"""Diffusion transformer: positions, scan, bank, HCE, and what is computed once per clip."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from animecolor_jax import params
from animecolor_jax.config import preset
from animecolor_jax.errors import InputError
from animecolor_jax.models import positions
from animecolor_jax.models.animecolor import AnimeColor, Conditions
from animecolor_jax.models.layers import unstack
from animecolor_jax.models.transformer import Block, rotate
from animecolor_jax.networks import creator, fresh

MANIFESTS = Path(__file__).parent / "fixtures" / "manifests"
TINY = preset("tiny")
TINY = dataclasses.replace(
    TINY, **{name: dataclasses.replace(getattr(TINY, name), text_length=32) for name in ("denoiser", "lcg")}
)


def perturbed(network, seed):
    """Every parameter moved, so that nothing is zero and nothing is ignored by accident."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), network)


def make_model(config=TINY):
    names = ("denoiser", "lcg", "hce")
    return AnimeColor(*(perturbed(fresh(name, getattr(config, name), i), i) for i, name in enumerate(names)))


@pytest.fixture(scope="module")
def model():
    return make_model()


make_conditions = jax.jit(lambda model, reference: model.conditions(*reference))
make_bank = jax.jit(lambda model, latents: model.bank(latents))
predict = jax.jit(lambda model, clip, conditions: model(*clip, conditions))
uncached = jax.jit(lambda model, clip, reference: model(*clip, model.conditions(*reference)))


def inputs(size=(3, 4, 6), batch=1, references=1):
    """(latents, sketch, text, timestep), (reference, summary, features)."""
    config, keys = TINY, iter(jax.random.split(jax.random.key(1), 10))
    normal = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    channels = config.denoiser.out_channels
    clip = (
        normal(batch, *size, channels),
        normal(batch, *size, channels),
        normal(batch, config.denoiser.text_length, config.denoiser.text_dim),
        jnp.full(batch, 321),
    )
    reference = (
        normal(1, references, *size[1:], channels),
        normal(1, references, config.hce.summary_dim),
        normal(1, references, 6, config.hce.feature_dim),
    )
    return clip, reference


def test_full_size_parameter_counts_equal_the_manifests():
    def total(name):
        return json.loads((MANIFESTS / f"{name}.json").read_text())["total_parameters"]

    def count(config, *names):
        return sum(params.parameter_count(creator(name, getattr(config, name))) for name in names)

    two, five = preset("animecolor-2b"), preset("animecolor-5b")
    assert count(two, "denoiser", "hce") == total("denoiser_2b_animecolor")
    assert count(two, "lcg") == total("reference_2b")
    assert count(five, "denoiser", "hce") == total("denoiser_5b_animecolor_layout")
    plain = dataclasses.replace(five, denoiser=dataclasses.replace(five.denoiser, in_channels=16))
    assert count(plain, "denoiser") == total("transformer_5b_diffusers")


@pytest.mark.parametrize("name", ["animecolor-2b", "animecolor-5b"])
def test_full_size_output_shape_at_49_frames_of_480x720(name):
    config = preset(name)

    def forward():
        model = AnimeColor(*(creator(part, getattr(config, part))() for part in ("denoiser", "lcg", "hce")))
        latents = jnp.zeros((2, 13, 60, 90, 16))
        conditions = model.conditions(latents[:1, :1], jnp.zeros((1, 1, 2560)), jnp.zeros((1, 1, 1350, 1280)))
        rope = (jnp.zeros((17550, 64)),) * 2 if config.denoiser.rope else None
        return model(latents, latents, jnp.zeros((2, 226, 4096)), jnp.zeros(2), conditions, rope), conditions

    v, conditions = jax.eval_shape(forward)
    assert v.shape == (2, 13, 60, 90, 16)
    depth, heads = config.denoiser.num_layers, config.denoiser.num_heads
    assert conditions.bank.k.shape == (depth, 1, 1350, heads, 64)
    assert conditions.cross.v.shape == (depth // 2, 1, 32, 16, 128)


def test_scan_equals_a_python_loop(model):
    clip, reference = inputs()
    conditions = make_conditions(model, reference)

    @jax.jit
    def loop(model, clip, conditions):
        latents, sketch, text, timestep = clip
        denoiser, hce = model.denoiser, model.hce
        tokens = denoiser.embed(jnp.concatenate([latents, sketch], -1), text)
        temb = denoiser.time_embed(timestep)
        for i in range(denoiser.config.num_layers):
            text_tokens, video, _ = unstack(denoiser.blocks, i)(*tokens, temb, unstack(conditions.bank, i))
            if i % hce.config.interval == 0:
                j = i // hce.config.interval
                video = video + unstack(hce.cross_attn, j)(video, unstack(conditions.cross, j))
            tokens = text_tokens, video
        return denoiser.head(tokens[1], temb, latents.shape[1:4])

    scanned, expected = predict(model, clip, conditions), loop(model, clip, conditions)
    np.testing.assert_allclose(scanned, expected, atol=1e-4 * float(jnp.abs(expected).max()))


def test_bank_of_the_scan_equals_a_python_loop(model):
    _, (reference, _, _) = inputs()

    @jax.jit
    def loop(lcg, latents):
        text = jnp.zeros((1, lcg.config.text_length, lcg.config.text_dim))
        tokens, temb, bank = lcg.embed(latents, text), lcg.time_embed(jnp.zeros(1)), []
        for i in range(lcg.config.num_layers):
            *tokens, normed = unstack(lcg.blocks, i)(*tokens, temb)
            bank.append(normed)
        return jnp.stack(bank)

    np.testing.assert_allclose(make_bank(model, reference), loop(model.lcg, reference), atol=1e-4)


def test_cached_conditions_equal_uncached(model):
    clip, reference = inputs(batch=2)
    cached = predict(model, clip, make_conditions(model, reference))
    np.testing.assert_allclose(cached, uncached(model, clip, reference), atol=2e-5)


def test_a_step_computes_nothing_of_the_reference():
    """The compiled step costs a plain CogVideoX step, and attention to the bank and to the colour
    tokens; what is
    left over, softmaxes and sums, is less than projecting the bank once would be."""
    denoiser = dataclasses.replace(TINY.denoiser, num_layers=2, attention="xla")
    config = dataclasses.replace(
        TINY,
        denoiser=denoiser,
        lcg=dataclasses.replace(denoiser, in_channels=4),
        hce=dataclasses.replace(TINY.hce, num_cross=1),
    )
    model = make_model(config)
    clip, reference = inputs(size=(1, 8, 12))
    conditions = make_conditions(model, reference)

    def flops(function, *args):
        return function.lower(*args).compile().cost_analysis()["flops"]

    plain = flops(predict, model, clip, Conditions(None, None))
    cached = flops(predict, model, clip, conditions)
    width, text, video, bank = denoiser.dim, denoiser.text_length, 4 * 6, 4 * 6
    # cost_analysis counts a scanned body once: one block, with HCE a cross-attention too
    inner = config.hce.cross_num_heads * config.hce.cross_head_dim
    attend_to_bank = 2 * 2 * bank * (text + video) * width
    cross_attend = 2 * 2 * video * inner * width + 2 * 2 * video * config.hce.num_tokens * inner
    project_bank = 2 * (2 * 2 * bank * width * width)
    left_over = cached - plain - attend_to_bank - cross_attend
    assert 0 <= left_over < project_bank / 2
    assert flops(uncached, model, clip, reference) - cached > project_bank, (
        "making the conditions does cost that"
    )


def test_both_guidance_branches_share_one_bank(model):
    clip, reference = inputs(batch=2)
    conditions = make_conditions(model, reference)
    repeated = jax.tree.map(lambda x: jnp.concatenate([x, x], axis=1), conditions)
    np.testing.assert_allclose(predict(model, clip, conditions), predict(model, clip, repeated), atol=1e-5)


def test_each_condition_has_an_effect(model):
    clip, reference = inputs()
    base = uncached(model, clip, reference)
    for i in range(3):
        moved = [x + (1.0 if j == i else 0.0) for j, x in enumerate(reference)]
        assert jnp.abs(uncached(model, clip, moved) - base).max() > 1e-3
    moved_sketch = (clip[0], clip[1] + 1, *clip[2:])
    assert jnp.abs(uncached(model, moved_sketch, reference) - base).max() > 1e-3


def hce_only(predict, model, clip, conditions):
    return predict(model, clip, Conditions(None, conditions.cross))


def test_two_equal_references_attend_like_one(model):
    clip, (reference, summary, features) = inputs()
    twice = [jnp.concatenate([x, x], axis=1) for x in (reference, summary, features)]
    once, doubled = (make_conditions(model, xs) for xs in ((reference, summary, features), twice))
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(doubled), strict=True):
        np.testing.assert_allclose(jnp.concatenate([a, a], axis=2), b, atol=1e-5)
    # a key that is there twice weighs as much as the same key in both: the colours do not change
    np.testing.assert_allclose(
        hce_only(predict, model, clip, doubled), hce_only(predict, model, clip, once), atol=1e-5
    )


def test_rotary_positions_turn_video_but_neither_text_nor_bank():
    config = dataclasses.replace(TINY.denoiser, rope=True, head_dim=16)
    block = perturbed(Block(config, rngs=nnx.Rngs(0)), 0)
    key = jax.random.key(2)
    text, video = jax.random.normal(key, (1, 5, 128)), jax.random.normal(key, (1, 24, 128))
    bank = block.attn.key_value(jax.random.normal(key, (1, 7, 128)))
    rope = positions.rope_table(16, 1, (4, 6), ((0, 0), (4, 6)))
    # reference: queries and keys laid out by hand, turned where they are video
    tokens = jnp.concatenate([text, video], axis=1)
    q, (k, v) = block.attn.q_norm(block.attn.heads(block.attn.q(tokens))), block.attn.key_value(tokens)
    q, k = (x.at[:, 5:].set(rotate(x[:, 5:], rope)) for x in (q, k))
    k, v = jnp.concatenate([k, bank.k], axis=1), jnp.concatenate([v, bank.v], axis=1)
    out = block.attn.out(jax.nn.dot_product_attention(q, k, v).reshape(1, 29, 128))
    attended = jnp.concatenate(block.attn(text, video, bank, rope), axis=1)
    np.testing.assert_allclose(attended, out, atol=1e-5)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    rope = positions.rope_table(16, 3, (4, 6), ((0, 0), (4, 6)))
    x = jax.random.normal(jax.random.key(0), (1, 72, 2, 16))
    np.testing.assert_allclose(
        jnp.linalg.norm(rotate(x, rope), axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )
    same = jnp.broadcast_to(x[:, :1], x.shape)
    turned = rotate(same, rope)[0, :, 0]
    np.testing.assert_allclose(turned[0] @ turned[1], turned[7] @ turned[8], rtol=1e-4)  # neighbours in a row


def test_position_table_resize_is_trilinear_interpolation():
    table = np.random.default_rng(0).normal(size=(5, 3))
    matrix = positions.resize_matrix(5, 8)
    np.testing.assert_allclose(matrix.sum(1), 1)
    expected = jax.image.resize(jnp.asarray(table), (8, 3), "linear", antialias=False)
    np.testing.assert_allclose(matrix @ table, expected, atol=1e-6)
    np.testing.assert_array_equal(positions.resize_matrix(6, 6), np.eye(6))


def test_too_many_frames_for_the_position_table_are_refused(model):
    clip, _ = inputs(size=(14, 4, 6))
    with pytest.raises(ValueError, match="14 latent frames.*13"):
        predict(model, clip, Conditions(None, None))


def test_another_text_length_is_refused(model):
    (latents, sketch, text, timestep), _ = inputs()
    with pytest.raises(ValueError, match="31 text tokens, expected 32"):
        predict(model, (latents, sketch, text[:, 1:], timestep), Conditions(None, None))


def test_networks_that_do_not_fit_are_refused():
    denoiser = nnx.eval_shape(creator("denoiser", TINY.denoiser))
    shallow = nnx.eval_shape(creator("lcg", dataclasses.replace(TINY.lcg, num_layers=2)))
    with pytest.raises(InputError, match="lcg.num_layers is 2, the denoiser's 4"):
        AnimeColor(denoiser, shallow)
    wrong = nnx.eval_shape(creator("hce", dataclasses.replace(TINY.hce, model_dim=8)))
    with pytest.raises(InputError, match="hce.model_dim is 8, the denoiser's width 64"):
        AnimeColor(denoiser, None, wrong)


def test_a_fresh_hce_changes_nothing():
    denoiser, hce = fresh("denoiser", TINY.denoiser, 0), fresh("hce", TINY.hce, 1)
    clip, (_, summary, features) = inputs()
    with_hce, without = AnimeColor(denoiser, None, hce), AnimeColor(denoiser)
    conditions = make_conditions(with_hce, (None, summary, features))
    np.testing.assert_array_equal(
        predict(with_hce, clip, conditions), predict(without, clip, Conditions(None, None))
    )

"""Encoding and decoding of large frames in overlapping tiles that are blended into one another.

Memory then depends on the tile, not on the frame. The result differs from the untiled one: GroupNorm sees a
tile at a time.
Source: AnimeColor cogvideox/models/autoencoder_magvit.py, tiled_decode (encode: diffusers' class).
"""

from functools import partial

import jax
import jax.numpy as jnp

from animecolor_jax.errors import InputError
from animecolor_jax.models.vae import VAE, check_size

OVERLAP = (6, 5)  # neighbours share a 6th of their height and a 5th of their width

encode_tile, decode_tile = jax.jit(VAE.encode), jax.jit(VAE.decode)


def tiled_encode(vae, video, tile_height=None, tile_width=None, *, encode=encode_tile):
    """As `vae.encode`, tile by tile; a video no larger than a tile is encoded whole.

    Args:
        video: [B, T, H, W, 3] in [-1, 1].
        tile_height, tile_width: pixels; by default half of the config's sample size.
        encode: (vae, tile of video) -> moments; the default compiles once per size of tile.

    Returns:
        Moments [B, t, h, w, 2 C].

    Raises:
        InputError: a tile size whose overlaps are not whole latents, or a video as for `vae.encode`.
    """
    check_size(video, vae.config)
    pixels, latents = _tile_sizes(vae.config, tile_height, tile_width)
    return _in_tiles(partial(encode, vae), video, pixels, latents)


def tiled_decode(vae, latents, tile_height=None, tile_width=None, *, decode=decode_tile):
    """As `vae.decode`, tile by tile; latents that fit into a tile are decoded whole.

    Args:
        latents: [B, t, h, w, C], already divided by the scaling factor.
        tile_height, tile_width: pixels; by default half of the config's sample size.
        decode: (vae, tile of latents) -> video; the default compiles once per size of tile.

    Returns:
        Video [B, T, H, W, 3].

    Raises:
        InputError: a tile size whose overlaps are not whole latents.
    """
    pixels, sizes = _tile_sizes(vae.config, tile_height, tile_width)
    return _in_tiles(partial(decode, vae), latents, sizes, pixels)


def _tile_sizes(config, height, width):
    """A tile's (height, width) in pixels and in latents."""
    height = config.sample_height // 2 if height is None else height
    width = config.sample_width // 2 if width is None else width
    multiples = [config.spatial_compression * overlap for overlap in OVERLAP]
    # for other sizes the reference rounds strides and overlaps down, and its tiles no longer meet
    if height < 1 or width < 1 or height % multiples[0] or width % multiples[1]:
        raise InputError(
            f"tiles of {height}x{width} pixels", where="vae tiling",
            expected=f"a multiple of {multiples[0]} by a multiple of {multiples[1]}",
            fix=f"for example {5 * multiples[0]}x{9 * multiples[1]}",
        )
    return (height, width), (height // config.spatial_compression, width // config.spatial_compression)


def _in_tiles(apply, x, source, target):
    """`apply` to tiles of x [B, T, H, W, C] of (height, width) `source`, which become `target`."""
    height, width = x.shape[2:4]
    if height <= source[0] and width <= source[1]:
        return apply(x)
    strides = [side - side // part for side, part in zip(source, OVERLAP, strict=True)]
    extents = [side // part for side, part in zip(target, OVERLAP, strict=True)]
    keep = [side - extent for side, extent in zip(target, extents, strict=True)]
    above, rows = [], []
    for top in range(0, height, strides[0]):
        row = []
        for left in range(0, width, strides[1]):
            tile = apply(x[:, :, top : top + source[0], left : left + source[1]])
            # the neighbours are blended already
            if above:
                tile = _blend(above[len(row)], tile, extents[0], axis=2)
            if row:
                tile = _blend(row[-1], tile, extents[1], axis=3)
            row.append(tile)
        rows.append(jnp.concatenate([tile[:, :, : keep[0], : keep[1]] for tile in row], axis=3))
        above = row
    return jnp.concatenate(rows, axis=2)


def _blend(before, tile, extent, axis):
    """Fades the first `extent` rows (axis 2) or columns (axis 3) of `tile` in over the last of `before`."""
    extent = min(before.shape[axis], tile.shape[axis], extent)
    ramp = (jnp.arange(extent) / extent).reshape([-1 if i == axis else 1 for i in range(tile.ndim)])
    last = jax.lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    first, rest = jnp.split(tile, [extent], axis=axis)
    blended = last * (1 - ramp) + first * ramp  # [B, T, H, W, C] float32
    return jnp.concatenate([blended.astype(tile.dtype), rest], axis=axis)

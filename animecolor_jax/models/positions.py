"""Position tables of the diffusion transformer, functions of shapes alone.

All tables are separable (each channel depends on time, height or width only), so they are made, and
resized, axis by axis: the 3D table of the 2B model would be a 134 MB constant in the compiled program.
Source: diffusers models/embeddings.py, get_3d_sincos_pos_embed and get_3d_rotary_pos_embed; AnimeColor
cogvideox/models/transformer3d.py for the trilinear resize.
"""

import numpy as np


def sincos_1d(dim, positions):
    """[len(positions), dim] float64: sines of all frequencies, then cosines."""
    frequencies = 10000.0 ** (-np.arange(dim // 2, dtype=np.float64) / (dim / 2))
    angles = np.asarray(positions, np.float64)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def resize_matrix(size, new_size):
    """[new_size, size]: linear interpolation at half-pixel centres, edges clamped (align_corners=False)."""
    source = np.maximum((np.arange(new_size) + 0.5) * (size / new_size) - 0.5, 0.0)
    low = np.minimum(source.astype(np.int64), size - 1)
    high = np.minimum(low + 1, size - 1)
    weight = source - low
    matrix = np.zeros((new_size, size))
    np.add.at(matrix, (np.arange(new_size), low), 1.0 - weight)
    np.add.at(matrix, (np.arange(new_size), high), weight)
    return matrix


def sincos_axes(dim, frames, height, width, spatial_scale, temporal_scale):
    """The three parts of the table, float64: time [T, D/4], height [H, 3D/8], width [W, 3D/8]."""
    return (
        sincos_1d(dim // 4, np.arange(frames) / temporal_scale),
        sincos_1d(3 * dim // 8, np.arange(height) / spatial_scale),
        sincos_1d(3 * dim // 8, np.arange(width) / spatial_scale),
    )


def broadcast_axes(time, height, width):
    """[T, c], [H, c], [W, c] -> the same three as views over one [T, H, W] grid."""
    grid = (len(time), len(height), len(width))
    return (
        np.broadcast_to(time[:, None, None], (*grid, time.shape[-1])),
        np.broadcast_to(height[None, :, None], (*grid, height.shape[-1])),
        np.broadcast_to(width[None, None], (*grid, width.shape[-1])),
    )


def sincos_table(dim, frames, height, width, spatial_scale, temporal_scale):
    """The whole table at its native size, [T, H, W, D] float32; channels are time, width, height."""
    parts = sincos_axes(dim, frames, height, width, spatial_scale, temporal_scale)
    time, rows, columns = broadcast_axes(*(part.astype(np.float32) for part in parts))
    return np.concatenate([time, columns, rows], axis=-1)


def grid_crop(grid, base):
    """((top, left), (bottom, right)): where a (height, width) grid lies when fitted into the base grid.

    Source: diffusers pipelines/cogvideo, get_resize_crop_region_for_grid.
    """
    (height, width), (base_height, base_width) = grid, base
    if height / width > base_height / base_width:
        new_height, new_width = base_height, int(round(base_height / height * width))
    else:
        new_height, new_width = int(round(base_width / width * height)), base_width
    top, left = int(round((base_height - new_height) / 2.0)), int(round((base_width - new_width) / 2.0))
    return (top, left), (top + new_height, left + new_width)


def rope_table(head_dim, frames, grid, crop, legacy=False):
    """Rotary table of the video tokens, frame by frame, row by row.

    Args:
        grid: (height, width) in patches. crop: from `grid_crop`, positions within the base grid.
        legacy: space positions as diffusers did until 0.31; differs where the crop does not start at 0.

    Returns:
        (cos, sin), each [frames * height * width, head_dim] float32, every frequency twice in a row.
    """
    (top, left), (bottom, right) = crop
    height, width = grid
    # float32 as in the reference: at the far positions the rounding of the angle is visible
    def spaced(start, stop, count):
        if legacy:
            return np.linspace(start, stop, count, endpoint=False, dtype=np.float32)
        return np.linspace(start, stop * (count - 1) / count, count, dtype=np.float32)

    rows, columns = spaced(top, bottom, height), spaced(left, right, width)

    def angles(dim, positions):
        frequencies = 1.0 / (10000.0 ** (np.arange(0, dim, 2, dtype=np.float32) / dim)).astype(np.float32)
        return np.repeat(np.outer(positions.astype(np.float32), frequencies).astype(np.float32), 2, axis=1)

    time = angles(head_dim // 4, np.arange(frames, dtype=np.float32))
    parts = broadcast_axes(time, angles(3 * head_dim // 8, rows), angles(3 * head_dim // 8, columns))
    table = np.concatenate(parts, axis=-1).reshape(-1, head_dim)
    return np.cos(table), np.sin(table)

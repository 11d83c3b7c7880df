"""PSNR, SSIM and XDoG against recorded results; see `check.KINDS`."""

import numpy as np

from animecolor_jax.metrics import image
from animecolor_jax.sketch import xdog
from data_pipeline.sketch import XDoG, gaussian_kernel, to_grey


def image_metrics(tensors, config, dtype, attention):
    """Yields (name, value) for `image_metrics`: scores of frames, and their means and deviations."""
    yield "common/gaussian_kernel", image.gaussian_window()
    for case in config["cases"]:
        pair = [tensors[f"inputs/{case}/video{i}"] for i in (0, 1)]
        for metric in (image.psnr, image.ssim):
            frames = np.asarray(metric(*pair), np.float64)  # [B, T]
            name = f"{case}/{metric.__name__}"
            yield f"{name}_frames", frames
            yield f"{name}_value", frames.mean(0)
            yield f"{name}_value_std", frames.std(0)
            yield f"{name}_final", frames.mean(keepdims=True)[0]
            yield f"{name}_final_std", frames.std(keepdims=True)[0]
        yield f"{case}/psnr_frames_float64", np.asarray(image.psnr(*pair), np.float64)
        yield f"{case}/skimage_ssim_gaussian_frames", np.asarray(image.ssim(*pair), np.float64)
    pair = [tensors[f"inputs/mixed/video{i}"][0, 1] for i in (0, 1)]
    yield "mixed/ssim_map_0_1_0", image.ssim_map(*pair)[..., 0]


def xdog_stages(tensors, config, dtype, attention):
    """Yields (name, value) for `xdog`: the sketch from the device, what leads to it from the host."""
    make = XDoG()
    for sigma in (make.sigma, make.sigma * make.k):
        yield f"common/kernel_sigma{sigma:g}_times_256", np.array(gaussian_kernel(sigma))
    for case in config["cases"]:
        rgb = tensors.get(f"inputs/{case}/rgb")
        if rgb is None:
            grey = tensors[f"inputs/{case}/grey"]
            rgb = np.repeat(grey[..., None], 3, axis=-1)
        else:
            grey = to_grey(rgb[None])[0]
            yield f"{case}/grey", grey
        g1, g2 = make.blurred(grey)
        dog = g1 - make.gamma * g2
        yield f"{case}/g1", g1
        yield f"{case}/g2", g2
        yield f"{case}/dog", dog
        yield f"{case}/dog_normalised", dog / dog.max()
        yield f"{case}/response", make.response(grey[None])[0]
        yield f"{case}/sketch", xdog(rgb)

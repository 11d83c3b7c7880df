"""Drawn evaluation results for the tests of tables and reports."""

import numpy as np

from animecolor_jax.evaluation.results import MethodResult, Result

CLIPS = ("a_1", "b_2", "c_3", "d_4", "e_5")
CLIP_METRICS = ("psnr", "ssim", "lpips_alex", "tc_dis")


def result(methods=("ours", "theirs"), clips=CLIPS, **changes):
    """Scores of drawn clips; the first method is the best. FVD is skipped.

    Args:
        methods: names, or {name: MethodResult}.
        changes: other fields.
    """
    made = dict(methods) if isinstance(methods, dict) else {}
    for order, name in enumerate(() if made else methods):
        rng = np.random.default_rng(order)
        scores = {
            "psnr": 24 - 3 * order + rng.normal(size=len(clips)),
            "ssim": 0.83 - 0.05 * order + 0.01 * rng.normal(size=len(clips)),
            "lpips_alex": 0.2 + 0.06 * order + 0.01 * rng.normal(size=len(clips)),
            "tc_dis": 1.05 + 0.3 * order + 0.02 * rng.normal(size=len(clips)),
        }
        made[name] = MethodResult(
            {metric: dict(zip(clips, values.tolist(), strict=True)) for metric, values in scores.items()},
            {"fid": 4.87 + 5 * order},
            {"psnr": {clip: (20 + rng.normal(size=6 + i)).tolist() for i, clip in enumerate(clips)}},
        )
    fields = {
        "protocol": "animecolor-512x320",
        "clips": len(clips),
        "frames": 6 * len(clips),
        "pixel_source": "PNG, resized to 320 x 512",
        "metrics": (*CLIP_METRICS, "fid", "fvd_styleganv"),
        "methods": made,
        "skipped": {"fvd_styleganv": "no weights: i3d_torchscript.pt is wanted"},
        "networks": {"inception": {"weights/pt_inception.pth": "0123456789abcdef" * 4}},
        "versions": {"jax": "0.10.2", "opencv": "5.0"},
        "command": "tools/evaluate.py --generated <A & B>",
    }
    return Result(**{**fields, **changes})

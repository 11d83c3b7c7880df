"""The four stages of AnimeColor (arXiv:2507.20158) eq. 5-8, which the files of `configs/` make runs of."""

from animecolor_jax.train.config import (
    CheckpointConfig,
    ComputeConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
    ValidationConfig,
)
from data_pipeline.dataset import DataConfig

SKETCH = StageConfig(
    name="stage1_sketch",
    trained=((r"denoiser/.*", True),),
    conditions=("text", "sketch"),
)
HCE = StageConfig(
    name="stage2_hce",
    trained=((r"hce/.*", True), (r"denoiser/.*", False)),
    conditions=("text", "sketch", "hce"),
)
LCG = StageConfig(
    name="stage3_lcg",
    trained=((r"lcg/.*", True), (r"(denoiser|hce)/.*", False)),
    conditions=("text", "sketch", "lcg"),
    start=((r"lcg", "denoiser"), (r".*", "init")),
)
JOINT = StageConfig(
    name="stage4_joint",
    trained=((r"denoiser/.*", True), (r"(hce|lcg)/.*", False)),
    conditions=("text", "sketch", "hce", "lcg"),
)


def tiny_run(stage, steps, learning_rate=2e-3):
    """A run of the preset `tiny` on a CPU, in minutes: float32, a high learning rate, many validations."""
    return TrainConfig(
        stage=stage,
        steps=steps,
        data=DataConfig(batch_size=8),
        optimizer=OptimizerConfig(learning_rate=learning_rate, schedule="cosine", warmup_steps=20),
        compute=ComputeConfig(dtype="float32", frozen_dtype="float32", remat="none"),
        checkpoint=CheckpointConfig(every=100, keep=2),
        validation=ValidationConfig(
            every=100, clips=32, timesteps=8, videos_every=1000, videos=8, guidance=1.0
        ),
        log_every=20,
    )

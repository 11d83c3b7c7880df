"""The method's stages by name, each of which trains all of one network."""

from animecolor_jax.train.config import StageConfig

STAGES = {
    name: StageConfig(name, ((trained, True), (".*", False)), ("text", "sketch", *conditions))
    for name, trained, conditions in (
        ("sketch", "denoiser/.*", ()),
        ("hce", "hce/.*", ("hce",)),
        ("lcg", "lcg/.*", ("lcg",)),
        ("joint", "denoiser/.*", ("hce", "lcg")),
    )
}

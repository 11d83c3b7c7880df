"""Rules for the T5 v1.1 encoder, and its config.json (transformers' T5EncoderModel)."""

from animecolor_jax.config import T5Config
from animecolor_jax.convert.rules import Alias, Rule
from animecolor_jax.errors import InputError

_BLOCK = "encoder.block.{layer}.layer"

RULES = [
    Rule("shared.weight", "token_embed/embedding"),
    Alias("encoder.embed_tokens.weight", of="shared.weight"),
    # only block 0 has the table, all blocks use it
    Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_bias/embedding"),
    Rule(f"{_BLOCK}.0.layer_norm.weight", "blocks/attn_norm/scale"),
    Rule(f"{_BLOCK}.0.SelfAttention.q.weight", "blocks/attn/q/kernel", "linear"),
    Rule(f"{_BLOCK}.0.SelfAttention.k.weight", "blocks/attn/k/kernel", "linear"),
    Rule(f"{_BLOCK}.0.SelfAttention.v.weight", "blocks/attn/v/kernel", "linear"),
    Rule(f"{_BLOCK}.0.SelfAttention.o.weight", "blocks/attn/out/kernel", "linear"),
    Rule(f"{_BLOCK}.1.layer_norm.weight", "blocks/ff_norm/scale"),
    Rule(f"{_BLOCK}.1.DenseReluDense.wi_0.weight", "blocks/ff/gate/kernel", "linear"),
    Rule(f"{_BLOCK}.1.DenseReluDense.wi_1.weight", "blocks/ff/up/kernel", "linear"),
    Rule(f"{_BLOCK}.1.DenseReluDense.wo.weight", "blocks/ff/down/kernel", "linear"),
    Rule("encoder.final_layer_norm.weight", "final_norm/scale"),
]

# our field: (key of config.json, transformers' default)
FIELDS = {
    "vocab_size": ("vocab_size", 32128),
    "d_model": ("d_model", 512),
    "d_kv": ("d_kv", 64),
    "d_ff": ("d_ff", 2048),
    "num_layers": ("num_layers", 6),
    "num_heads": ("num_heads", 8),
    "relative_attention_num_buckets": ("relative_attention_num_buckets", 32),
    "relative_attention_max_distance": ("relative_attention_max_distance", 128),
    "norm_eps": ("layer_norm_epsilon", 1e-6),
}


def config_from_torch(config, shapes, where):
    """The encoder's config from its config.json.

    Args:
        config: the parsed config.json; keys that are not there have transformers' defaults.
        shapes: {torch key: shape} of the checkpoint (not needed here, the config says it all).
        where: the file, for errors.

    Raises:
        InputError: not T5 v1.1, or a value of the wrong type.
    """
    # T5 1.0 has a ReLU network, transformers' default
    if (activation := config.get("feed_forward_proj", "relu")) != "gated-gelu":
        raise InputError(
            f"feed_forward_proj is {activation!r}", where=where, expected="feed_forward_proj = 'gated-gelu'",
            fix="use a T5 v1.1 encoder, such as the one of CogVideoX",
        )
    values = {}
    for field, (key, default) in FIELDS.items():
        value = config.get(key, default)
        if type(value) is not type(default) or value <= 0:
            raise InputError(
                f"{key} is {value!r}", where=where, expected=f"a positive {type(default).__name__}",
                fix="correct the value in that file",
            )
        values[field] = value
    return T5Config(**values)


def config_to_torch(config):
    """config.json of transformers' T5EncoderModel."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        **{key: getattr(config, field) for field, (key, _) in FIELDS.items()},
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.1,
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,  # of an output head, which an encoder does not have
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }

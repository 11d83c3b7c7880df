"""Tiny networks in transformers format with random weights, made on the spot."""

import pytest

WORDS = [f"word{index}" for index in range(40)]
WIDTH = 24  # projection_dim of the CLIP

def save_llava(folder):
    """A LLaVA of two layers that knows `WORDS`; returns `folder`."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(3)
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    vocabulary = {word: index for index, word in enumerate(special + WORDS + ["USER", "ASSISTANT", ":"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**tower, image_size=28, patch_size=14),
        text_config=transformers.LlamaConfig(
            **tower, vocab_size=len(vocabulary), max_position_embeddings=256, initializer_range=0.6,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        image_token_index=vocabulary["<image>"], vision_feature_layer=-1,
    )  # fmt: skip
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(**size), tokenizer, patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_clip(folder):
    """A CLIP of two layers whose embedding has `WIDTH` numbers; returns `folder`."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": 40, "max_position_embeddings": 8},
        vision_config={**tower, "image_size": 28, "patch_size": 14},
        projection_dim=WIDTH,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    transformers.CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder

"""Tokenizer: the same ids as transformers' T5Tokenizer, truncation with a warning, byte level, bad files."""

import json
import shutil
import warnings

import numpy as np
import pytest

from animecolor_jax.config import preset
from animecolor_jax.errors import InputError
from animecolor_jax.tokenizer import FILES, Tokenizer

CORPUS = """A girl with long silver hair walks through the rain, holding a red umbrella.
The quick brown fox jumps over the lazy dog. Anime style, cel shading, soft lighting.
Two children run along the beach at sunset; the waves are blue and orange.
Das Mädchen trägt ein grünes Kleid und einen weißen Hut. Ça va très bien, merci!
A robot (mecha) stands in the city - 1080p, 24 fps, 16:9, high-quality: "colourful".
"""
PROMPTS = [
    "",
    " ",
    "A girl with long silver hair.",
    "  leading, double  and   trailing spaces  ",
    "two\nlines,\r\n\ta tab and a\u00a0no-break space\u3000",
    "Mädchen, Ça va, weißen, nai\u0308ve",  # the last one decomposed
    "日本語のアニメ 한국어 русский",
    "Ｆｕｌｌ ｗｉｄｔｈ, ﬁne ½ ™ ㎏",  # what NFKC rewrites
    "👩\u200d👩\u200d👧 emoji 🎨, zero\u200bwidth, soft\u00adhyphen, \ufeffbom",
    "n\u0323\u031c\u0318e\u035a\u032a stacked marks",  # where SentencePiece itself differs
    "next\u0085line \u200d joiner",  # and here
    "▁meta ▁ symbol",
    "</s> a <pad>b<unk>c <extra_id_0>, <extra_id_99><extra_id_100> < /s> ＜/s＞",
    "control \x00\x01\x0b\x1f characters",
    "the rain " * 300,
    "x" * 3000,
]


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """Directory of a small unigram model with T5's reserved ids and normalisation."""
    sentencepiece = pytest.importorskip("sentencepiece")
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "corpus.txt").write_text(CORPUS * 20, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "corpus.txt"), model_prefix=str(directory / "spiece"), model_type="unigram",
        vocab_size=200, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )
    return directory


def only(directory, name, copy):
    """`copy` holding that file of `directory` alone."""
    shutil.copy(directory / name, copy / name)
    return copy


def encode_silently(tokenizer, prompts, length):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tokenizer(prompts, length)


def transformers_ids(directory, prompts, length):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.T5Tokenizer.from_pretrained(directory)
    return np.array([
        tokenizer(
            prompt, padding="max_length", max_length=length, truncation=True, add_special_tokens=True
        ).input_ids
        for prompt in prompts
    ])


@pytest.mark.torch
@pytest.mark.parametrize("length", [226, 5, 1])
def test_ids_equal_those_of_transformers(spiece, tmp_path, length):
    directory = only(spiece, "spiece.model", tmp_path)
    ours = encode_silently(Tokenizer.load(directory), PROMPTS, length)
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(ours, transformers_ids(directory, PROMPTS, length))


@pytest.mark.torch
def test_ids_equal_those_of_transformers_for_random_text(spiece, tmp_path):
    directory = only(spiece, "spiece.model", tmp_path)
    rng = np.random.default_rng(0)
    blocks = [(0, 0x250), (0x300, 0x370), (0x2000, 0x2070), (0x3000, 0x3100)]  # Latin, marks, spaces, kana
    characters = [chr(c) for block in blocks for c in range(*block)]
    pieces = [*characters, *["a", "e", "the ", " ", "<extra_id_5>", "</s>"] * 100]
    prompts = ["".join(rng.choice(pieces, size=rng.integers(40))) for _ in range(500)]
    ours = encode_silently(Tokenizer.load(directory), prompts, 64)
    np.testing.assert_array_equal(ours, transformers_ids(directory, prompts, 64))


@pytest.mark.torch
def test_sentinels_are_as_many_as_the_tokenizer_config_says(spiece, tmp_path):
    directory = only(spiece, "spiece.model", tmp_path)
    (directory / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 7}))
    prompts = ["a <extra_id_6> b <extra_id_7> c <extra_id_0>"]
    np.testing.assert_array_equal(
        Tokenizer.load(directory)(prompts, 64), transformers_ids(directory, prompts, 64)
    )


@pytest.mark.torch
def test_tokenizer_json_alone_gives_the_same_ids(spiece, tmp_path):
    transformers = pytest.importorskip("transformers")
    expected = encode_silently(Tokenizer.load(spiece), PROMPTS, 226)
    transformers.T5Tokenizer.from_pretrained(spiece).save_pretrained(tmp_path / "saved")
    directory = only(tmp_path / "saved", "tokenizer.json", tmp_path)
    np.testing.assert_array_equal(encode_silently(Tokenizer.load(directory), PROMPTS, 226), expected)


def test_a_cut_prompt_keeps_eos_and_says_what_is_lost(spiece):
    tokenizer = Tokenizer.load(spiece)
    prompt = "the rain, holding a red umbrella"
    whole = tokenizer([prompt], 64)[0]
    count = int(np.argmax(whole == 0)) - 1
    holding = len(encode_silently(tokenizer, ["the rain,"], 64)[0].nonzero()[0]) - 1
    message = rf"{count - holding} of {count} tokens are dropped.*'holding a red umbrella'"
    with pytest.warns(UserWarning, match=message):
        cut = tokenizer([prompt], holding + 1)[0]
    np.testing.assert_array_equal(cut, [*whole[:holding], 1])


def test_a_prompt_that_just_fits_gives_no_warning(spiece):
    tokenizer = Tokenizer.load(spiece)
    length = int(np.argmax(tokenizer(["the red umbrella"], 64)[0] == 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer(["the red umbrella"], length)[0, -1] == 1


def test_bytes_are_shifted_by_three(tmp_path):
    Tokenizer.save_byte_level(tmp_path / "tokenizer")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    ids = tokenizer(["", "Ab", "ü"], 5)
    np.testing.assert_array_equal(
        ids, [[1, 0, 0, 0, 0], [ord("A") + 3, ord("b") + 3, 1, 0, 0], [0xC3 + 3, 0xBC + 3, 1, 0, 0]]
    )
    assert ids.dtype == np.int32
    # no byte lies outside the vocabulary of the small models
    assert preset("tiny").text_encoder.vocab_size > 0xFF + 3


def test_a_cut_between_bytes_names_the_character(tmp_path):
    Tokenizer.save_byte_level(tmp_path)
    with pytest.warns(UserWarning, match="4 of 6 tokens are dropped, from .öä. on"):
        ids = Tokenizer.load(tmp_path)(["üöä"], 3)
    np.testing.assert_array_equal(ids, [[0xC3 + 3, 0xBC + 3, 1]])


def test_an_empty_directory_names_the_wanted_files(tmp_path):
    with pytest.raises(InputError) as error:
        Tokenizer.load(tmp_path)
    assert error.value.where == str(tmp_path)
    assert all(name in error.value.expected for name in FILES)


def test_every_damaged_file_is_refused(spiece, tmp_path):
    model = (spiece / "spiece.model").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 791656\n"
    damaged = {
        "spiece.model": [b"", pointer, model[:1000], model[: len(model) // 2], b"\xff" * 50],
        "tokenizer.json": [b"", b"{}", pointer, json.dumps({"version": "1.0", "model": {}}).encode()],
        "byte_level.json": [b"", b"[]", b'{"type": "word-level"}', b"\xff"],
    }
    for name, contents in damaged.items():
        directory = tmp_path / name.replace(".", "_")
        directory.mkdir()
        for content in contents:
            (directory / name).write_bytes(content)
            with pytest.raises(InputError, match=name):
                Tokenizer.load(directory)


def test_a_vocabulary_with_other_reserved_ids_is_refused(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "corpus.txt").write_text(CORPUS * 20, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(  # the library's own defaults
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "spiece"), model_type="unigram",
        vocab_size=200, hard_vocab_limit=False, minloglevel=2,
    )
    with pytest.raises(InputError, match="<pad>, </s> and <unk> are"):
        Tokenizer.load(tmp_path)


def test_unusable_arguments_are_refused(tmp_path):
    Tokenizer.save_byte_level(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    with pytest.raises(TypeError, match="expected a list"):
        tokenizer("a prompt", 8)
    with pytest.raises(InputError, match="length is 0"):
        tokenizer(["a prompt"], 0)
    with pytest.raises(InputError, match="not text"):
        tokenizer(["\udcff"], 8)

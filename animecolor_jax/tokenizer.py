"""Prompts -> token ids: T5's own tokeniser, or bytes for small models that need no vocabulary file.

T5's vocabulary runs in the `tokenizers` library, as in transformers 5: SentencePiece itself treats stacked
combining marks and some spaces differently. Source: SentencePiece (arXiv:1808.06226), ByT5 (2105.13626).
"""

import json
import struct
import warnings
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers
from tokenizers.models import Unigram

from animecolor_jax.errors import InputError
from animecolor_jax.safetensors_io import parse_json_object

PAD, EOS, UNKNOWN = 0, 1, 2
NUM_RESERVED = 3
SENTENCEPIECE, TOKENIZER_JSON, BYTE_LEVEL = "spiece.model", "tokenizer.json", "byte_level.json"
FILES = (SENTENCEPIECE, TOKENIZER_JSON, BYTE_LEVEL)  # in order of preference; one of them is a tokenizer
BYTE_LEVEL_SETTINGS = {"type": "byte-level"}
NUM_SENTINELS = 100  # <extra_id_0> ... <extra_id_99>, behind the vocabulary of the file


class Tokenizer:
    """Callable from prompts to ids; `Tokenizer.load` makes one."""

    def __init__(self, encode):
        """`encode`: text -> (ids, for each id where its text begins); without EOS."""
        self._encode = encode

    @classmethod
    def load(cls, directory):
        """The tokenizer of a directory that holds one of `FILES`.

        Raises:
            InputError: none of the files is there, or the one that is cannot be used.
        """
        directory = Path(directory)
        for name, read in zip(FILES, (_from_sentencepiece, _from_json, _from_byte_level), strict=True):
            if (directory / name).exists():
                return cls(read(directory / name))
        raise InputError(
            "there is no tokenizer", where=directory, expected=f"one of {', '.join(FILES)}",
            fix="give the `tokenizer` directory of a CogVideoX checkpoint",
        )

    @staticmethod
    def save_byte_level(directory):
        """Writes the file of a byte-level tokenizer: 256 bytes behind padding, EOS and one unused id."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / BYTE_LEVEL).write_text(json.dumps(BYTE_LEVEL_SETTINGS) + "\n")

    def __call__(self, prompts, length):
        """Encodes prompts; each ends with EOS, then padding.

        Warns of every prompt that is cut, with what is lost.

        Args:
            prompts: list of strings.
            length: number of ids per prompt, EOS included.

        Returns:
            [B, length] int32.

        Raises:
            InputError: a prompt is not Unicode text, or `length` leaves no place for EOS.
            TypeError: `prompts` is one string.
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts is the string {prompts[:40]!r}, expected a list of strings")
        if length < 1:
            raise InputError(f"length is {length}", where="tokenizer", expected="at least 1")
        ids = np.full((len(prompts), length), PAD, np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            _require_unicode(prompt)
            tokens, starts = self._encode(prompt)
            room = length - 1
            if len(tokens) > room:
                warnings.warn(
                    f"the prompt is too long: {len(tokens) - room} of {len(tokens)} tokens are dropped, "
                    f"from {prompt[starts[room] :][:60]!r} on",
                    stacklevel=2,
                )
            tokens = [*tokens[:room], EOS]
            row[: len(tokens)] = tokens
        return ids


def _require_unicode(prompt):
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the prompt {prompt[:60]!r} is not text: {error.reason}", where="prompt",
            expected="valid Unicode", fix="save the prompt as UTF-8",
        ) from error


def _from_byte_level(path):
    """ByT5's convention: id = byte + 3."""
    if parse_json_object(path.read_bytes(), path) != BYTE_LEVEL_SETTINGS:
        raise _unusable(path, f"{BYTE_LEVEL} holds something else than {BYTE_LEVEL_SETTINGS}")

    def encode(text):
        starts = [index for index, character in enumerate(text) for _ in character.encode()]
        return [byte + NUM_RESERVED for byte in text.encode()], starts

    return encode


def _from_json(path):
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # the library has no narrower class
        raise _unusable(path, error) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return _encoder(tokenizer, path)


def _from_sentencepiece(path):
    """The pipeline that transformers' T5Tokenizer builds from the same file."""
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(_num_sentinels(path.parent)))]
    try:
        pieces, charsmap = _read_sentencepiece(path.read_bytes())
        vocabulary = [(piece, score) for piece, score, _ in pieces] + [(piece, 0.0) for piece in sentinels]
        tokenizer = tokenizers.Tokenizer(Unigram(vocabulary, unk_id=UNKNOWN, byte_fallback=False))
        if charsmap:
            tokenizer.normalizer = normalizers.Precompiled(charsmap)
    except Exception as error:  # the library has no narrower class
        raise _unusable(path, error) from error
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    special = [piece for piece, _, is_special in pieces if is_special] + sentinels
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    return _encoder(tokenizer, path)


def _num_sentinels(directory):
    path = directory / "tokenizer_config.json"
    settings = parse_json_object(path.read_bytes(), path) if path.exists() else {}
    count = settings.get("extra_ids", NUM_SENTINELS)
    if type(count) is not int or count < 0:
        raise InputError(f"extra_ids is {count!r}", where=path, expected="a number of sentinels, such as 100")
    return count


def _encoder(tokenizer, path):
    reserved = [tokenizer.token_to_id(piece) for piece in ("<pad>", "</s>", "<unk>")]
    if reserved != [PAD, EOS, UNKNOWN]:
        raise _unusable(path, f"<pad>, </s> and <unk> are {reserved}, not {[PAD, EOS, UNKNOWN]}")

    def encode(text):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    return encode


def _unusable(path, why):
    return InputError(
        f"not a tokenizer of T5: {why}", where=path,
        expected="the tokenizer of a T5 v1.1 or CogVideoX checkpoint",
        fix="download the file again (a Git LFS pointer is not the file)",
    )


def _read_sentencepiece(data):
    """Pieces (text, score, whether it is a special token) and normaliser of a SentencePiece model.

    Read by hand because SentencePiece's own Python module for it demands one release of protobuf.
    Source: google/sentencepiece src/sentencepiece_model.proto.
    """
    unknown, control, user_defined = 2, 3, 4  # SentencePiece.Type
    pieces, charsmap = [], b""
    for number, value in _fields(data):
        if number == 1:  # ModelProto.pieces
            fields = {1: b"", 2: bytes(4), 3: 1, **dict(_fields(value))}
            special = fields[3] in (unknown, control, user_defined)
            pieces.append((fields[1].decode(), *struct.unpack("<f", fields[2]), special))
        elif number == 3:  # ModelProto.normalizer_spec
            charsmap = dict(_fields(value)).get(2, b"")
    return pieces, charsmap


def _fields(message):
    """(number, value) of every field of a serialised protobuf message: an int for a varint, else bytes.

    Raises:
        ValueError: not such a message.
    """
    position = 0

    def varint():
        nonlocal position
        value = shift = 0
        while True:
            if position == len(message):
                raise ValueError("the file is truncated")
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"protobuf wire type {kind}")
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if position + size > len(message):
            raise ValueError("the file is truncated")
        yield tag >> 3, message[position : position + size]
        position += size

"""Captions of clips: from text files beside the videos, from a table, or from a vision-language model."""

import csv
import io
import json
import unicodedata
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np

from animecolor_jax.errors import InputError
from animecolor_jax.media import IMAGE_SUFFIXES
from data_pipeline.local_models import import_torch, load_model, load_processor, read_config
from data_pipeline.storage import Storage

VIDEO_COLUMNS = ("path", "video", "file")
CAPTION_COLUMNS = ("caption", "text")
START_COLUMNS, END_COLUMNS = ("start_frame", "start"), ("end_frame", "end")
PROMPT = (
    "Describe this animation in one paragraph: the characters and their looks, the colours, what happens, "
    "the background, and how the camera moves."
)


@dataclass(frozen=True)
class CaptionSpan:
    """A caption of the source's frames start <= frame < end; of all of it where both are None."""

    text: str
    start: int | None = None
    end: int | None = None


@dataclass(frozen=True)
class CaptionTable:
    """What was found for a list of videos."""

    spans: dict = field(default_factory=dict)
    """{video's name: tuple of CaptionSpan}; only videos that have a caption."""
    unmatched: tuple = ()
    """Where the captions were found that belong to none of the videos."""
    without: tuple = ()
    """Names of the videos that have no caption."""

    def caption(self, video, start, end):
        """The caption of frames start <= frame < end of a video; "" where there is none.

        That is the caption whose own span shares most frames with these, if it covers at least half of them;
        else the caption of the whole video.
        """
        whole, best, most = "", "", 0
        for span in self.spans.get(video, ()):
            if span.start is None:
                whole = span.text
                continue
            shared = min(end, span.end) - max(start, span.start)
            if shared > most and 2 * shared >= end - start:
                best, most = span.text, shared
        return best or whole

    def report(self):
        """Counts: videos with a caption, videos without, and captions without a video."""
        return {
            "captioned": len(self.spans),
            "without_caption": len(self.without),
            "unmatched_captions": len(self.unmatched),
        }


def read_captions(source, videos_dir, videos):
    """Reads the captions of a folder of videos.

    `source` is one of
      * None: text files beside the videos, `walk.txt` (or `walk.mp4.txt`) for `walk.mp4`;
      * a folder of such text files, in the same sub-folders or all in one;
      * a table: .json (an object {video: caption} or a list of records), .jsonl, .csv or .parquet. A record
        names the video in `path`, `video` or `file` and has the caption in `caption` or `text`; with
        `start_frame` and `end_frame` (or `start`, `end`) the caption is only of these frames of the source,
        counted from 0, the end excluded.

    A caption belongs to the video of that path, with or without its suffix; else to the one video for which
    either path ends in the other (`walk` or `/data/set/a/walk.mp4` for `a/walk.mp4`). White space is
    squeezed; empty captions count as none.

    Args:
        source: None, or a path or URL of a folder or table.
        videos_dir: folder or URL of the videos.
        videos: their names below it, with forward slashes.

    Returns:
        CaptionTable.

    Raises:
        InputError: `source` is missing or malformed (with its file and line), a caption could belong to
            several videos, or a video has two captions for the same frames.
    """
    matcher = _Matcher(videos)
    rows = _read_folder(Storage(videos_dir), matcher) if source is None else _read_source(source, matcher)
    found, unmatched = {}, []
    for where, key, span in rows:
        video = matcher.find(key, where)
        if video is None:
            unmatched.append(where)
        elif span.text:
            spans = found.setdefault(video, {})
            twin = spans.setdefault((span.start, span.end), (span, where))
            if twin[0].text != span.text:
                raise InputError(
                    f"a second caption of {video}",
                    where=where,
                    expected=f"one only; the other is in {twin[1]}",
                )
    spans = {video: tuple(span for span, _ in found[video].values()) for video in videos if video in found}
    return CaptionTable(spans, tuple(unmatched), tuple(video for video in videos if video not in found))


def _parts(path):
    """Parts of a path, in the composed form of Unicode: some systems store names decomposed."""
    return PurePosixPath(unicodedata.normalize("NFC", path)).parts


class _Matcher:
    """Finds the video that a key of the user's means."""

    def __init__(self, videos):
        self.videos = {_parts(video): video for video in videos}
        self.suffixes = {PurePosixPath(video).suffix for video in videos} - {""}
        self.by_last, self.exact = {}, {}
        for parts, video in self.videos.items():
            bare = self._bare(parts)
            self.exact.setdefault(bare, []).append(video)
            for last in {parts[-1], bare[-1]}:
                self.by_last.setdefault(last, []).append(parts)

    def _bare(self, parts):
        suffix = PurePosixPath(parts[-1]).suffix
        return (*parts[:-1], parts[-1].removesuffix(suffix)) if suffix in self.suffixes else parts

    def find(self, key, where):
        parts = tuple(part for part in _parts(key.replace("\\", "/")) if part not in ("/", "."))
        if not parts:
            raise InputError("names no video", where=where, expected="the video's path or name")
        if parts in self.videos:
            return self.videos[parts]
        matches = self.exact.get(parts)
        if matches is None:
            lasts = {parts[-1], self._bare(parts)[-1]}
            candidates = {video for last in lasts for video in self.by_last.get(last, ())}
            matches = [self.videos[video] for video in candidates if self._agree(parts, video)]
        if len(matches) > 1:  # a thumbnail beside its video
            moving = [video for video in matches if PurePosixPath(video).suffix.lower() not in IMAGE_SUFFIXES]
            matches = moving if len(moving) == 1 else matches
        if len(matches) > 1:
            raise InputError(
                f"{key!r} could be {', '.join(sorted(matches)[:4])}",
                where=where,
                expected="a path that fits one video",
                fix="name the video by its path with its suffix (a text file: walk.mp4.txt)",
            )
        return matches[0] if matches else None

    def _agree(self, key, video):
        """Whether one of the paths ends in the other; a suffix that the key leaves out counts for nothing."""
        if key[-1] != video[-1]:
            video = self._bare(video)
        length = min(len(key), len(video))
        return key[-length:] == video[-length:]


# ---------------------------------------------------------------- files: rows of (where, key, CaptionSpan)


def _read_source(source, matcher):
    folder, _, name = str(source).rstrip("/").rpartition("/")
    top = "/" if str(source).startswith("/") else "."
    storage, suffix = Storage(folder or top), PurePosixPath(name).suffix.lower()
    if suffix not in _READERS:
        whole = Storage(source)
        rows = _read_folder(whole, matcher)
        if not rows:
            raise InputError(
                "holds no .txt file" if whole.exists() else "does not exist",
                where=source,
                expected=f"a folder of .txt files, or a table ({', '.join(_READERS)})",
            )
        return rows
    if not storage.exists(name):
        raise InputError("does not exist", where=source, expected="the table of captions")
    rows = _READERS[suffix](storage.read(name), str(source))
    if not rows:
        raise InputError("holds no captions", where=source, expected="at least one row")
    return rows


def _read_folder(storage, matcher):
    """Rows of all text files; those that belong to no video are not read, whatever is in them."""
    rows = []
    for name in storage.names(recursive=True):
        if name.lower().endswith(".txt"):
            where, key = storage.path(name), name[: -len(".txt")]
            known = matcher.find(key, where) is not None
            text = _squeeze(_decode(storage.read(name), where)) if known else ""
            rows.append((where, key, CaptionSpan(text)))
    return rows


def _decode(data, where):
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"byte 0x{data[error.start]:02x} in line {line} is not UTF-8",
            where=where,
            expected="text in UTF-8",
            fix="save the file as UTF-8, for instance with: iconv -t utf-8 -f cp932",
        ) from error


def _squeeze(text):
    return " ".join(text.split())


def _parse_json(text, where, first_line=1):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = error.lineno + first_line - 1
        raise InputError(
            f"line {line}, column {error.colno}: {error.msg}", where=where, expected="JSON"
        ) from error


def _read_json(data, where):
    content = _parse_json(_decode(data, where), where)
    if isinstance(content, dict):
        return [_row({"path": key, "caption": text}, f"{where}: {key!r}") for key, text in content.items()]
    if not isinstance(content, list):
        raise InputError(
            f"holds {type(content).__name__}", where=where, expected="{video: caption}, or a list of records"
        )
    return [_row(record, f"{where}: record {index}") for index, record in enumerate(content)]


def _read_json_lines(data, where):
    lines = enumerate(_decode(data, where).split("\n"), start=1)
    return [_row(_parse_json(line, where, n), f"{where}: line {n}") for n, line in lines if line.strip()]


def _read_csv(data, where):
    reader = csv.DictReader(io.StringIO(_decode(data, where), newline=""), strict=True)
    try:
        return [_row(record, f"{where}: line {reader.line_num}") for record in reader]
    except csv.Error as error:
        raise InputError(f"after line {reader.line_num}: {error}", where=where, expected="CSV") from error


def _read_parquet(data, where):
    import pyarrow
    import pyarrow.parquet

    wanted = (*VIDEO_COLUMNS, *CAPTION_COLUMNS, *START_COLUMNS, *END_COLUMNS)
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        columns = [name for name in file.schema_arrow.names if name in wanted]
        records = file.read(columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"cannot be read ({error})", where=where, expected="a Parquet file") from error
    return [_row(record, f"{where}: row {index}") for index, record in enumerate(records)]


def _row(record, where):
    """A record as (where, key, CaptionSpan)."""
    if not isinstance(record, dict):
        raise InputError(f"is {record!r:.40}", where=where, expected="a record with a video and a caption")
    key = _field(record, VIDEO_COLUMNS, where)
    text = _field(record, CAPTION_COLUMNS, where)
    start, end = (
        _frame(next((record[name] for name in names if name in record), None), where, names[0])
        for names in (START_COLUMNS, END_COLUMNS)
    )
    if (start is None) != (end is None) or (start is not None and not 0 <= start < end):
        raise InputError(
            f"frames {start} to {end}", where=where, expected="both or neither, 0 <= start_frame < end_frame"
        )
    return where, key, CaptionSpan(_squeeze(text), start, end)


def _field(record, names, where):
    for name in names:
        if name in record:
            value = record[name]
            if value is None and names is CAPTION_COLUMNS:
                return ""
            if not isinstance(value, str):
                raise InputError(f"{name} is {value!r:.40}", where=where, expected="text")
            return value
    columns = ", ".join(str(name) for name in record if name is not None)
    raise InputError(f"has only {columns}", where=where, expected=f"a column {' or '.join(names)}")


def _frame(value, where, name):
    if value is None or value == "" or value != value:  # the last is NaN, pandas' way to leave a number out
        return None
    try:
        if float(value) == int(float(value)):
            return int(float(value))
    except (TypeError, ValueError, OverflowError):
        pass
    raise InputError(f"{name} is {value!r:.40}", where=where, expected="a frame number")


_READERS = {".json": _read_json, ".jsonl": _read_json_lines, ".csv": _read_csv, ".parquet": _read_parquet}


# ---------------------------------------------------------------- a vision-language model


def sample_frames(length, count):
    """Indices [min(count, length)] of the frames in the middle of equal segments of a clip.

    Source: PLLaVA (arXiv 2404.16994), after TSN (arXiv 1608.00859).
    """
    count = min(count, length)
    return ((np.arange(count) + 0.5) * length / count).astype(int)


class Captioner:
    """A vision-language model in transformers format that takes several images, such as LLaVA and its kin.

    It is shown frames from the middle of equal segments of the clip, as PLLaVA does, and answers greedily, so
    that the same clip has the same caption. It runs in this process, on the GPU (bfloat16) where torch sees
    one, else in float32.

    Args:
        model_dir: model, tokenizer and processor, as published; nothing is downloaded.
        frames: how many frames the model is shown of a clip.
        prompt: what it is asked.
        max_new_tokens: longest answer.
        batch_size: clips at once.

    Raises:
        InputError: the directory is incomplete, or its processor takes no images here.
    """

    def __init__(self, model_dir, frames=16, prompt=PROMPT, max_new_tokens=200, batch_size=1):
        counts = {"frames": frames, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
        for name, value in counts.items():
            if value < 1:
                raise InputError(f"{value}", where=name, expected="1 or more")
        kind = read_config(model_dir).get("model_type")
        torch, transformers = import_torch()
        classes = transformers.AutoModelForImageTextToText
        if kind not in {config.model_type for config in classes._model_mapping}:
            raise InputError(
                f"has the model_type {kind!r}",
                where=f"{model_dir}/config.json",
                expected="a vision-language model (AutoModelForImageTextToText), such as llava",
            )
        self.frames, self.prompt = frames, prompt
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self._torch = torch
        self._processor = load_processor(transformers.AutoProcessor, model_dir)
        self._tokenizer = getattr(self._processor, "tokenizer", None)
        if self._tokenizer is None or getattr(self._processor, "image_processor", None) is None:
            raise InputError(
                f"its processor is a {type(self._processor).__name__}",
                where=model_dir,
                expected="a processor of text and images: its tokenizer and preprocessor_config.json",
            )
        if not (self._processor.chat_template or getattr(self._processor, "image_token", None)):
            raise InputError(
                f"{type(self._processor).__name__} has neither a chat template nor an image token",
                where=model_dir,
                expected="a model that can be shown several images",
            )
        self._tokenizer.padding_side = "left"  # answers start right behind the questions
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        self._model, self._device = load_model(classes, model_dir, dtype=dtype)

    def __call__(self, frames):
        """Frames [T, H, W, 3] uint8 RGB, T >= 1 -> caption."""
        return self.captions([frames])[0]

    def captions(self, clips):
        """An iterable of clips [T, H, W, 3] uint8 RGB, of any lengths and sizes -> captions, in order."""
        captions, batch = [], []
        for clip in clips:
            batch.append([clip[index] for index in sample_frames(len(clip), self.frames)])
            if len(batch) == self.batch_size:
                captions += self._answer(batch)
                batch = []
        return captions + (self._answer(batch) if batch else [])

    def _answer(self, batch):
        """[clip][frame] -> answers. One batch through the model."""
        inputs = self._processor(
            images=batch,
            text=[self._question(len(images)) for images in batch],
            padding=True,
            return_tensors="pt",
        ).to(self._device)
        for name, value in inputs.items():
            if value.is_floating_point():
                inputs[name] = value.to(self._model.dtype)
        with self._torch.inference_mode():
            tokens = self._model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=self._tokenizer.pad_token_id,
            )
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        return [_squeeze(text) for text in self._tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def _question(self, images):
        """The prompt behind `images` images, in the model's own chat format where it has one."""
        if not self._processor.chat_template:
            return f"USER: {self._processor.image_token * images}\n{self.prompt} ASSISTANT:"  # LLaVA 1.5's
        content = [{"type": "image"}] * images + [{"type": "text", "text": self.prompt}]
        return self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )

"""Which clips are scored against which: folders matched by name, and everything that does not match listed.

A clip is a video file, or a folder of frames, directly in the folder given; its name is that of the file
without the suffix, or of the folder. A folder of nothing but images is one clip.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av

from animecolor_jax import media
from animecolor_jax.errors import InputError

LISTED = 20  # names in an error
ONE_CLIP = "clip"  # name of a clip whose frames lie in the folder itself
STILL_SUFFIXES = media.IMAGE_SUFFIXES - {".gif", ".apng", ".webp"}
ASPECT = 0.02  # relative difference of aspect ratios that rounding to multiples of 8 or 16 explains


class Probe(NamedTuple):
    """A clip as far as it can be known without decoding all of it."""

    frames: int
    height: int
    width: int
    source: str
    """Codec of the file, or kinds of image in the folder: "h264", "ffv1", "png"."""


@dataclass(frozen=True)
class Pair:
    """Files of one clip; `frames` is how many of them every file has (before the protocol's choice)."""

    name: str
    target: Path
    generated: dict
    """{method: path}."""
    sketch: Path | None
    mask: Path | None
    frames: int
    size: tuple[int, int]
    """(height, width) of the target."""


class Matched(NamedTuple):
    """What there is to score.

    Attributes:
        pairs: list of Pair. notes: what was left out on request, a line each.
        sources: {"target" or method: set of codecs}.
    """

    pairs: list
    notes: list
    sources: dict


def match(generated, target, sketch, mask, protocol, partial=False):
    """Matches the clips of folders by name.

    Args:
        generated: {method: folder}. target: folder. sketch, mask: folders, or None.
        protocol: Protocol. partial: score what is in all folders, and the frames that all have, and note the
            rest; otherwise any difference is an error.

    Returns:
        `Matched`.

    Raises:
        InputError: names, numbers of frames or aspect ratios differ (all of them are listed), a folder holds
            no clips, or a file cannot be opened.
    """
    folders = {"target": target, **generated}
    folders |= {kind: folder for kind, folder in (("sketch", sketch), ("mask", mask)) if folder is not None}
    clips = {kind: list_clips(folder) for kind, folder in folders.items()}
    common = set.intersection(*(set(found) for found in clips.values()))
    every = sorted(set.union(*(set(found) for found in clips.values())))
    absent = [
        f"{name}: not in {', '.join(str(folders[kind]) for kind in folders if name not in clips[kind])}"
        for name in every
        if name not in common
    ]
    if absent and (not partial or not common):
        raise InputError(
            f"{len(absent)} of {len(every)} clips are not everywhere:\n" + _listing(absent),
            where=", ".join(map(str, folders.values())), expected="the same names in every folder",
            fix="rename or add the clips, or score those that are everywhere with --partial",
        )  # fmt: skip
    notes, pairs, problems = [f"left out: {line}" for line in absent], [], []
    sources = {kind: set() for kind in ("target", *generated)}
    for name in sorted(common, key=lambda name: media._natural_key(Path(name))):
        paths = {kind: found[name] for kind, found in clips.items()}
        probes = {kind: probe(path) for kind, path in paths.items()}
        frames, found = _compare(name, probes, protocol, partial)
        problems += found
        counted = _frame_counts(probes)
        if len(set(counted.values())) > 1 and partial:
            notes.append(f"{name}: the first {frames} frames, which all have ({_counts(counted)})")
        if protocol.num_frames(frames) < protocol.frames and partial:
            notes.append(f"{name}: {protocol.num_frames(frames)} of the protocol's {protocol.frames} frames")
        for kind, kinds in sources.items():
            kinds.add(probes[kind].source)
        size = probes["target"].height, probes["target"].width
        pairs.append(
            Pair(
                name, paths["target"], {method: paths[method] for method in generated},
                paths.get("sketch"), paths.get("mask"), frames, size,
            )  # fmt: skip
        )
    if problems:
        raise InputError(
            f"{len(problems)} differences:\n" + _listing(problems), where=str(target),
            expected="as many frames in every folder, and one shape of picture",
            fix="mend the clips; --partial scores the frames that all have",
        )  # fmt: skip
    return Matched(pairs, notes, sources)


def _compare(name, probes, protocol, partial):
    """(frames that all files of a clip have, what is wrong with it)."""
    problems, target = [], probes["target"]
    counted = _frame_counts(probes)
    frames = min(counted.values())
    if len(set(counted.values())) > 1 and not partial:
        problems.append(f"{name}: frames: {_counts(counted)}")
    elif protocol.num_frames(frames) < max(1, 0 if partial else protocol.frames):
        needed = protocol.skip + max(1, protocol.frames)
        problems.append(f"{name}: {frames} frames, of {needed} that the protocol takes")
    for kind, probed in probes.items():
        same = (probed.height, probed.width) == (target.height, target.width)
        ratio = probed.width / probed.height / (target.width / target.height)
        if not same and (protocol.size is None or abs(ratio - 1) > ASPECT):
            problems.append(
                f"{name}: {kind} is {probed.height}x{probed.width}, the target {target.height}x{target.width}"
            )
    return frames, problems


def _frame_counts(probes):
    """{kind: frames}; one mask may serve all frames."""
    return {kind: found.frames for kind, found in probes.items() if kind != "mask" or found.frames > 1}


def _counts(counted):
    return ", ".join(f"{kind} {count}" for kind, count in counted.items())


def _listing(lines):
    more = [f"    and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "\n".join([f"    {line}" for line in lines[:LISTED]] + more)


def list_clips(folder):
    """{name: path} of the clips in a folder.

    Raises:
        InputError: it does not exist or holds none, or two clips have one name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            "is not a folder" if folder.exists() else "does not exist", where=folder,
            expected="a folder of videos, or of folders of frames",
        )  # fmt: skip
    clips, paths = {}, sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    images = [path for path in paths if path.is_file() and path.suffix.lower() in STILL_SUFFIXES]
    if images and len(images) == len(paths):
        return {ONE_CLIP: folder}
    if images:
        raise InputError(
            f"holds the image {images[0].name} beside other things", where=folder,
            expected="videos, or one folder of frames for every clip",
            fix="put the frames of each clip into a folder of its own",
        )  # fmt: skip
    for path in paths:
        name = path.name if path.is_dir() else path.stem
        if name in clips:
            raise InputError(
                f"two clips are called {name!r}: {clips[name].name} and {path.name}", where=folder,
                expected="one clip of a name", fix="move one of them away",
            )  # fmt: skip
        clips[name] = path
    if not clips:
        raise InputError("is empty", where=folder, expected="videos, or folders of frames")
    return clips


def probe(path):
    """`Probe` of a clip: its first frame is decoded, the others are counted.

    Raises:
        InputError: it cannot be opened, or holds no frames.
    """
    with media.open_video(path) as stream:
        height, width = next(iter(stream.frames)).shape[:2]
    if path.is_dir():
        files = [file for file in path.iterdir() if not file.name.startswith(".")]
        suffixes = [file.suffix.lower() for file in files if file.suffix.lower() in media.IMAGE_SUFFIXES]
        return Probe(len(suffixes), height, width, "+".join(sorted({suffix[1:] for suffix in suffixes})))
    image = media._open_image(path)
    if image is not None:
        with image:
            return Probe(getattr(image, "n_frames", 1), height, width, image.format.lower())
    with media._open_container(path) as container:
        video = media._video_stream(container, path)
        codec = video.codec_context.name
        try:
            count = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(video))
        except av.FFmpegError as error:
            raise InputError(f"is damaged: {error}", where=path, expected="a whole video") from error
    if codec == "vp8":  # has packets that are not shown
        count = len(media.read_video(path).frames)
    return Probe(count, height, width, codec)


def read(path, frames, *, or_one=False, or_more=False):
    """The `frames` frames of a clip, [T, H, W, 3] uint8.

    Args:
        or_one: it may have a single one instead. or_more: the first of more frames.

    Raises:
        InputError: another number decodes, or the file is damaged.
    """
    clip = media.read_video(path).frames
    wrong = len(clip) < frames or (len(clip) > frames and not or_more)
    if wrong and not (or_one and len(clip) == 1):
        raise InputError(f"{len(clip)} frames decode", where=path, expected=f"{frames}", fix="make it again")
    return clip[:frames]

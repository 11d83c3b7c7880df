"""The networks a user may add to data preparation: they run in this process, never on Beam.

What they say is kept in DATASET/work, under a hash of the network's files, and read from there the next time.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from animecolor_jax.media import open_video
from data_pipeline import clip_video, stages
from data_pipeline.captions import sample_frames

SCORES, CAPTIONS = "work/scores", "work/captions"
SCORED_FRAMES = 4  # of a clip


@dataclass
class Models:
    """Loaded networks, each None where the user gave none; `*_files` name what identifies them."""

    text_detector: object = None
    aesthetic: object = None
    captioner: object = None
    text_files: tuple = ()
    aesthetic_files: tuple = ()
    caption_files: tuple = ()

    def score(self, rows, videos, out, progress):
        """Puts the networks' text and aesthetic scores into the rows' clips."""
        if self.text_detector is None and self.aesthetic is None:
            return
        mark = fingerprint(self.text_files + self.aesthetic_files)
        by_source = {}
        for row in rows:
            if row.clip is not None:
                by_source.setdefault(row.source, []).append(row)
        with progress(total=len(by_source), desc="scoring") as bar:
            for source, group in by_source.items():
                key = hashlib.sha256(
                    json.dumps([group[0].sha256, [[row.clip.start, row.clip.end] for row in group]]).encode()
                ).hexdigest()[:32]
                name = f"{SCORES}/{mark}/{key}.json"
                if not out.exists(name):
                    out.write(name, json.dumps(self._score_source(videos, source, group)).encode())
                for row, scores in zip(group, json.loads(out.read(name)), strict=True):
                    row.clip = dataclasses.replace(row.clip, **scores)
                bar.update()

    def _score_source(self, videos, source, rows):
        result = []
        with videos.local(source) as path, open_video(path) as stream:
            frames = enumerate(stream.frames)
            for row in rows:
                wanted = row.clip.start + sample_frames(row.clip.num_frames, SCORED_FRAMES)
                top, left, height, width = row.clip.crop
                shown = np.stack(
                    [
                        frame[top : top + height, left : left + width]
                        for index, frame in stages.span(frames, row.clip.start, row.clip.end)
                        if index in wanted
                    ]
                )
                scores = {}
                if self.text_detector is not None:
                    scores["text"] = float(self.text_detector(shown))
                if self.aesthetic is not None:
                    scores["aesthetic"] = float(self.aesthetic(shown))
                result.append(scores)
        return result

    def caption(self, rows, out, progress):
        """Captions the kept clips that have no caption yet."""
        if self.captioner is None:
            return
        mark = fingerprint(self.caption_files)
        pending = [row for row in rows if row.kept and not row.caption]
        with progress(total=len(pending), desc="captioning") as bar:
            size = self.captioner.batch_size
            for group in (pending[i : i + size] for i in range(0, len(pending), size)):
                names = [f"{CAPTIONS}/{mark}/{row.identity}.txt" for row in group]
                named = zip(group, names, strict=True)
                missing = [(row, name) for row, name in named if not out.exists(name)]
                if missing:
                    texts = self.captioner.captions(self._stored_frames(row, out) for row, _ in missing)
                    for (_, name), text in zip(missing, texts, strict=True):
                        out.write(name, text.encode())
                for row, name in zip(group, names, strict=True):
                    row.caption = out.read(name).decode()
                bar.update(len(group))

    def _stored_frames(self, row, out):
        data = out.read(stages.clip_name(row.identity, row.bucket))
        return clip_video.decode(data, sample_frames(row.clip.num_frames, self.captioner.frames).tolist())


def fingerprint(paths):
    """16 hex digits of the names, sizes and times of all files below `paths`."""
    found = []
    for path in map(Path, paths):
        files = sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
        found += [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]

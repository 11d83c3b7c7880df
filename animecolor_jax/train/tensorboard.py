"""Numbers and animated pictures for TensorBoard."""

import io
import sys
import time

import numpy as np
from PIL import Image


def open_events(folder, start_step):
    """An `EventFile`; None, and a line on stderr, where tensorboardX is not installed."""
    try:
        return EventFile(folder, start_step)
    except ModuleNotFoundError as error:
        if error.name != "tensorboardX":
            raise
        print("no TensorBoard files: tensorboardX is not installed", file=sys.stderr, flush=True)
        return None


class EventFile:
    """A new event file in `folder`, written record by record: what is flushed survives the process.

    Needs tensorboardX, whose protocol buffers and record format it uses.
    """

    def __init__(self, folder, start_step):
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        seconds, rest = divmod(time.time_ns(), 10**9)
        # TensorBoard reads a folder's files by name; not tensorboardX's own names, which tell the host's.
        self._writer = RecordWriter(str(folder / f"events.out.tfevents.{seconds}.{rest:09d}"))
        self._add(file_version="brain.Event:2")
        # Makes TensorBoard forget what an earlier attempt said about this and later steps.
        purge = start_step + 1 if start_step else 0
        self._add(step=purge, session_log=SessionLog(status=SessionLog.START))

    def _add(self, **fields):
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def scalars(self, step, values):
        """Adds those of {tag: value} that are numbers."""
        numbers = {tag: value for tag, value in values.items() if type(value) in (int, float)}
        found = [self._summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()]
        self._add(step=step, summary=self._summary(value=found))

    def image(self, tag, step, data, size):
        """Adds an encoded picture of `size` (height, width)."""
        height, width = size
        image = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        self._add(step=step, summary=self._summary(value=[self._summary.Value(tag=tag, image=image)]))

    def flush(self):
        self._writer.flush()

    def close(self):
        self._writer.close()


def encode_gif(frames, fps, longest=None):
    """An animated GIF that repeats for ever; all frames share 256 colours, so that flat areas do not flicker.

    Args:
        frames: [T, H, W, 3] uint8 RGB.
        fps: frames a second, kept on average: a frame lasts whole hundredths of a second.
        longest: pixels that no side exceeds; None keeps the size.

    Returns:
        (bytes, (height, width)).
    """
    height, width = frames.shape[1:3]
    scale = min(1.0, longest / max(height, width)) if longest else 1.0
    size = max(1, round(height * scale)), max(1, round(width * scale))
    images = [Image.fromarray(frame).resize(size[::-1], Image.Resampling.BOX) for frame in frames]
    pixels = np.concatenate([np.asarray(image).reshape(-1, 3) for image in images])
    pixels = pixels[:: -(-len(pixels) // 2_000_000)]
    palette = Image.fromarray(pixels[None]).quantize(256, method=Image.Quantize.MEDIANCUT)
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    ends = [round(100 * index / fps) for index in range(len(images) + 1)]
    durations = [10 * (end - start) for start, end in zip(ends, ends[1:], strict=False)]
    file = io.BytesIO()
    images[0].save(
        file, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=False
    )
    return file.getvalue(), size

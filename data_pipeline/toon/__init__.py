"""Cartoons drawn by the computer, with their line art and captions: no download, no licence.

`draw_clip` makes a clip from a seed; shapes and motion come from one random stream and colours from another.
"""

from data_pipeline.toon.scene import ToonClip, ToonConfig, draw_clip
from data_pipeline.toon.subtitles import draw_subtitle

__all__ = ["ToonClip", "ToonConfig", "draw_clip", "draw_subtitle"]

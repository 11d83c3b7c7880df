"""The small model that comes with the code: how it is made, from a seed to its scores.

`tools/train_mini.py` runs all of it. It works from arrays: of the data pipeline it uses the cartoon generator
alone, so that it runs where Grain, TFDS and PyAV cannot be had.
"""

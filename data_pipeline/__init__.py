"""From folders of videos to training batches, on the host: nothing here imports JAX.

toon draws cartoons; sketch makes line art; curation scores and drops; shapes names the buckets; prepare runs
it all on Beam; records is what is on disk; dataset hands batches to training.
"""

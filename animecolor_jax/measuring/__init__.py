"""Everything that takes a GPU to be known, measured by one command in slices of a few minutes:

    python -m animecolor_jax.measuring --out FOLDER --minutes 9

It needs JAX, Flax and Optax, neither data nor weights: these are random, made on the device. Every row of the
table runs in a process of its own, so that its peak memory is its own and an error ends no other row.
"""

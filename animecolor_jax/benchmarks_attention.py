"""Speed of every attention backend that this device has, forward and with its gradients."""

from typing import NamedTuple

import jax

from animecolor_jax import benchmarks, flops
from animecolor_jax.models.attention import PLATFORM_OF
from animecolor_jax.models.attention import attention as attend

# beside a device's own; "xla" holds all scores at once, which takes tens of GB at the size for a GPU
ANYWHERE = {"cpu": ("chunked", "xla"), "gpu": ("chunked",), "tpu": ("chunked",)}


class Size(NamedTuple):
    """Self-attention of one clip."""

    tokens: int
    heads: int
    head_dim: int
    dtype: str


SMALL = Size(2048, 8, 64, "float32")
CLIP_2B = Size(17776, 30, 64, "bfloat16")  # 49x480x720 and its text


def attention(against, repeats, size=None):
    """Forward, and forward with the gradients of queries, keys and values, of each backend.

    Args:
        against: "torch" (scaled_dot_product_attention) or "none". size: by default what suits the device.

    Returns:
        Lines as of `benchmarks.result` with "tflop", model FLOPs.
    """
    size = size or (SMALL if jax.default_backend() == "cpu" else CLIP_2B)
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (1, *size[:3]), size.dtype) for key in keys]
    theirs = torch_attention(*arrays) if against == "torch" else {}
    shape, lines = f"{size.heads} heads x {size.head_dim}, {size.tokens} tokens", []
    work = flops.attention(size.tokens, size.tokens, size.heads * size.head_dim) / 1e12
    device = jax.default_backend()
    own = (backend for backend, platform in PLATFORM_OF.items() if platform == device)
    for backend in (*own, *ANYWHERE[device]):

        def forward(q, k, v, cotangent, backend=backend):
            return attend(q, k, v, backend)

        def backward(q, k, v, cotangent, backend=backend):
            out, pull = jax.vjp(lambda *qkv: attend(*qkv, backend), q, k, v)
            return out, *pull(cotangent)

        # twice the forward's products; what is computed again does not count
        passes = ("forward", forward, work), ("forward and backward", backward, 3 * work)
        for name, function, tflop in passes:
            sides = {"ours": benchmarks.compiled(function, *arrays)}
            if theirs:
                sides["theirs"] = theirs[name]
            line = benchmarks.result(f"attention {backend}, {name}", shape, sides, repeats, dtype=size.dtype)
            lines.append(line | {"tflop": tflop})
    return lines


def torch_attention(q, k, v, cotangent):
    """PyTorch's own choice of kernel.

    Args:
        all: [B, S, N, H] arrays of JAX.

    Returns:
        {"forward", "forward and backward": function of nothing -> the result [B, N, S, H], or that and the
        gradients}.
    """
    import torch

    q, k, v, cotangent = (benchmarks.to_torch(x.swapaxes(1, 2)) for x in (q, k, v, cotangent))
    function = torch.nn.functional.scaled_dot_product_attention

    def forward():
        with torch.inference_mode():
            out = function(q, k, v)
        benchmarks.wait_for_torch()
        return out

    def backward():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        out.backward(cotangent)
        benchmarks.wait_for_torch()
        return out.detach(), *(leaf.grad for leaf in leaves)

    return {"forward": forward, "forward and backward": backward}

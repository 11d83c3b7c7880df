"""Whether these devices compute right: attention against float64, whole small networks against what PyTorch's
gave; for every backend of attention and every dtype.

Float32 is asked of the devices at the highest precision of products, half precision as a run has it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from animecolor_jax.models.attention import PLATFORM_OF, attention
from animecolor_jax.parity.check import check_fixture
from animecolor_jax.platforms import device_kind

# relative root mean square of the error against float64, by dtype; about twice what rounding makes it
LIMITS = {"float32": 5e-6, "bfloat16": 1.2e-2, "float16": 1.5e-3}
ANYWHERE = ("chunked", "xla")
DTYPES = {"gpu": ("bfloat16", "float16"), "tpu": ("float32", "bfloat16")}  # of a device's own backends
HEADS, HEAD_SIZE = 2, 64  # of attention that is compared with float64
MODEL = "denoiser, LCG and HCE"
CASES = {  # (fixture, case) of each network
    MODEL: ("animecolor_rope", "cfg"), "VAE": ("vae", "f9"), "text encoder": ("t5", "no_mask"),
    "image encoder": ("radio", "native"),
}  # fmt: skip
# of an output's largest value: CPUs come to 5e-6, weights that are rounded to TF32 give 6e-4 to 3e-3
FLOAT32_LIMIT = 1e-4


def own():
    """{backend: dtypes} of attention's backends that are for this kind of device."""
    kind = jax.default_backend()
    found = {backend: DTYPES[kind] for backend, platform in PLATFORM_OF.items() if platform == kind}
    if kind == "tpu":
        from animecolor_jax.models import packed_attention  # not above: Pallas takes long to import

        if not packed_attention.fits(1, HEADS, HEAD_SIZE, 4, device_kind()):
            del found["packed"]
    return found


def attention_errors(queries=300, keys=333):
    """Error of every attention backend that these devices have, in every dtype, forward and backward.

    Args:
        queries, keys: numbers of tokens.

    Returns:
        [{"backend", "dtype", "error" (of result and gradients, the largest), "limit", "passed"}]; error is
        None where it is not finite, and so is passed where this device does not have the backend.
    """
    rng = np.random.default_rng(0)
    q, k, v, cotangent = (
        rng.standard_normal((1, n, HEADS, HEAD_SIZE)) for n in (queries, keys, keys, queries)
    )
    expected, found = _reference(q, k, v, cotangent), []
    for backend, dtypes in (dict.fromkeys(ANYWHERE, ("float32", "bfloat16")) | own()).items():
        for dtype in dtypes:
            arrays = [jnp.asarray(x, dtype) for x in (q, k, v, cotangent)]
            facts = {"backend": backend, "dtype": dtype}
            try:
                with _precision(dtype):
                    outputs = _attend(*arrays, backend)
            except (RuntimeError, ValueError, NotImplementedError):  # older GPUs have no cuDNN attention
                passed = False if backend in ANYWHERE else None
                found.append(facts | {"error": None, "limit": LIMITS[dtype], "passed": passed})
                continue
            errors = [_relative_rms(*pair) for pair in zip(outputs, expected, strict=True)]
            found.append(facts | _judged(float(np.max(errors)), LIMITS[dtype]))
    return found


def network_errors(folder, attention_found, networks=tuple(CASES)):
    """Error of whole small networks against recorded outputs of the PyTorch reference, in float32 and
    bfloat16, the denoiser with every backend of attention.

    Args:
        folder: the repository's tests/fixtures. attention_found: of `attention_errors`.
        networks: names in `CASES`.

    Returns:
        [{"network", "backend", "dtype", "error" (of the output that is nearest to its limit; None where it is
        not finite or the network does not run), "limit", "passed"}, and where it does not run "why"].
    """
    there = [(each["backend"], each["dtype"]) for each in attention_found if each["passed"] is not None]
    found = []
    for network in networks:
        for dtype in ("float32", "bfloat16"):
            chosen = ["auto"]
            if network == MODEL:  # whose heads are smaller than those that packed takes
                chosen = [backend for backend, of in there if of == dtype and backend != "packed"]
            fixture, case = CASES[network]
            tolerance = FLOAT32_LIMIT if dtype == "float32" else None  # else by the reference's own error
            for backend in chosen:
                facts = {"network": network, "backend": backend, "dtype": dtype}
                try:
                    with _precision(dtype):
                        result = check_fixture(
                            folder / f"{fixture}.safetensors", dtype=dtype, attention=backend,
                            tolerance=tolerance, case=case,
                        )  # fmt: skip
                except (RuntimeError, NotImplementedError) as error:
                    why = str(error).partition("\n")[0]
                    found.append(facts | {"error": None, "limit": None, "passed": False, "why": why})
                    continue
                _, error, output = result.worst
                found.append(facts | _judged(error, result.errors[output][1]))
    return found


def _precision(dtype):
    return jax.default_matmul_precision("highest" if dtype == "float32" else "default")


def _judged(error, limit):
    finite = bool(np.isfinite(error))
    return {"error": error if finite else None, "limit": limit, "passed": finite and bool(error <= limit)}


def _attend(q, k, v, cotangent, backend):
    def run(q, k, v, cotangent):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, backend), q, k, v)
        return out, *pull(cotangent)

    return jax.jit(run)(q, k, v, cotangent)


def _reference(q, k, v, cotangent):
    """Attention and its gradients in float64, [B, S, N, H] each."""
    q, k, v, cotangent = (x.swapaxes(1, 2) for x in (q, k, v, cotangent))  # [B, N, S, H]
    scale = q.shape[-1] ** -0.5
    scores = scale * q @ k.swapaxes(2, 3)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    of_weights = cotangent @ v.swapaxes(2, 3)
    of_scores = scale * weights * (of_weights - (of_weights * weights).sum(-1, keepdims=True))
    found = weights @ v, of_scores @ k, of_scores.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ cotangent
    return [x.swapaxes(1, 2) for x in found]


def _relative_rms(ours, theirs):
    error = np.asarray(ours, np.float64) - theirs
    return float(np.sqrt(np.square(error).mean() / np.square(theirs).mean()))

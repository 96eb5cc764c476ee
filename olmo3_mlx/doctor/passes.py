"""What a decoding pass over several tokens costs beside a pass over one. Nothing is judged.

Speculation and batches live on it: they pay where T(M) is far below M times T(1).
"""

import time

import mlx.core as mx

from olmo3_mlx.caches.cache import rewind
from olmo3_mlx.doctor.finding import PASSED, Outcome
from olmo3_mlx.doctor.subject import Subject
from olmo3_mlx.doctor.tolerances import on_gpu

TOKENS = (1, 2, 3, 4, 6, 8, 16)
_HELD = 8


def pass_times(subject: Subject) -> Outcome:
    """T(M) / T(1) for passes of M tokens behind 8, whose logits are all computed."""
    model, ids = subject.model, subject.ids
    caches = model.make_caches()
    mx.eval(model(mx.array([ids[:_HELD]]), caches, logits_to_keep=1))
    best = dict.fromkeys(TOKENS, float("inf"))
    for _ in range(3 if on_gpu() else 1):  # the fastest counts: a GPU first has to make kernels ready
        for count in TOKENS:
            tokens = mx.array([ids[_HELD : _HELD + count]])
            begun = time.perf_counter()
            mx.eval(model(tokens, caches))
            best[count] = min(best[count], time.perf_counter() - begun)
            rewind(caches, count)
    ratios = ", ".join(f"{count}: {best[count] / best[1]:.2f}" for count in TOKENS[1:])
    dtype = str(model.dtype).rpartition(".")[2]
    return Outcome(
        PASSED, f"T(1) {1000 * best[1]:.1f} ms in {dtype}; T(M)/T(1) of {ratios} (nothing is judged)"
    )

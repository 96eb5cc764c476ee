"""Caches that were rewound, quantized, saved and resumed, against fresh ones. For any model."""

import tempfile
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path

import mlx.core as mx

from olmo3_mlx.caches.cache import rewind
from olmo3_mlx.caches.options import CacheOptions
from olmo3_mlx.caches.quantized import FEW_QUERIES
from olmo3_mlx.checkpoints.fingerprint import fingerprint
from olmo3_mlx.doctor.finding import PASSED, SKIPPED, Check, Outcome, judged
from olmo3_mlx.doctor.golden import relative_errors, worst
from olmo3_mlx.doctor.subject import Subject
from olmo3_mlx.doctor.tolerances import AGREEMENT, QUANTIZED_CACHES
from olmo3_mlx.memory.plan import in_gib
from olmo3_mlx.sessions.files import SessionFiles
from olmo3_mlx.sessions.session import Session

_SAVED = 24  # tokens of the session that is saved
_BEFORE = 8  # tokens in a quantized cache before those whose logits are compared
_MANY = FEW_QUERIES + 1  # in one pass: so many are not multiplied as they are packed

_ADVICE = (
    "answers after going back, from quantized caches or after a restart cannot be trusted on this machine: "
    "look at the checks above, and report it with all of this"
)
_DISK_ADVICE = (
    "conversations saved on this machine may not be read back: look at the disk of the folder for temporary "
    "files (TMPDIR), and report it with all of this if that is sound"
)


class CacheChecks:
    """Checks of one model's caches. `length` tokens are read before going `back` that many."""

    def __init__(self, subject: Subject, name: str, *, length: int, back: int, judge_bits: bool) -> None:
        """`judge_bits` judges what quantizing keys and values costs, as is known for the demo."""
        self._subject, self._name = subject, name
        self._length, self._back, self._judge_bits = length, back, judge_bits

    def __iter__(self) -> Iterator[Check]:
        """Each of them."""
        yield Check(f"{self._name}: rewound caches", self.rewound, _ADVICE)
        for bits in (8, 4):
            yield Check(f"{self._name}: {bits}-bit caches", partial(self.quantized, bits), _ADVICE)
        yield Check(f"{self._name}: saved caches", self.saved, _DISK_ADVICE)

    def rewound(self) -> Outcome:
        """That a session which went back comes to the same logits again."""
        session = Session(self._subject.model, snapshot_bytes=0)
        ids = self._subject.ids[: self._length]
        fresh = session.prefill(ids)
        ran = session.goto(len(ids) - self._back)
        again = session.prefill(ids[len(ids) - self._back :])
        found = self._compared(f"{self._back} of {len(ids)} tokens taken back", again, fresh)
        if ran:
            return judged(False, f"{ran} tokens ran again where caches should have gone back")
        return found

    def quantized(self, bits: int) -> Outcome:
        """That one pass over many tokens, which unpacks keys and values, and short ones, which do not, come
        to the same logits, and that they are near those of caches that are not quantized.
        """
        model = self._subject.model
        if model.config.head_dim % 32:
            return Outcome(SKIPPED, f"its heads of {model.config.head_dim} cannot be quantized")
        ids = self._subject.ids
        caches = model.make_caches(kv_bits=bits)
        mx.eval(model(mx.array([ids[:_BEFORE]]), caches, logits_to_keep=1))
        end = _BEFORE + _MANY
        together = self._subject.passes(ids, (_BEFORE, end), caches)
        rewind(caches, _MANY)
        split = (_BEFORE, _BEFORE + 5, *range(_BEFORE + 6, end + 1))
        outcome = self._compared(
            "short passes beside a long one", self._subject.passes(ids, split, caches), together
        )
        cost = float(relative_errors(together, self._unquantized).mean(stream=mx.cpu).item())  # type: ignore[arg-type]
        said = f"{outcome.detail}; unquantized ones by {cost:.2g}"
        if not self._judge_bits:
            return Outcome(outcome.status, said)
        most = QUANTIZED_CACHES[bits]
        return judged(outcome.status == PASSED and cost <= most, f"{said} of at most {most}")

    def saved(self) -> Outcome:
        """That a session written to files and read by another goes on to the same logits."""
        model, ids = self._subject.model, self._subject.ids[: _SAVED + 1]
        with tempfile.TemporaryDirectory(prefix="olmo3-doctor-") as folder:
            form = CacheOptions().form(model.config.head_dim, model.dtype)
            owner = fingerprint(model)
            session = Session(model, files=SessionFiles(Path(folder), owner, form))
            session.prefill(ids[:-1])
            session.save()
            files = sum(path.stat().st_size for path in Path(folder).iterdir())
            fresh = session.prefill(ids[-1:])
            resumed = Session(model, files=SessionFiles(Path(folder), owner, form))
            resumed.resume()
            if list(resumed.tokens) != list(ids[:-1]):
                return judged(False, f"{len(resumed.tokens)} of {len(ids) - 1} tokens came back")
            again = resumed.prefill(ids[-1:])
        return self._compared(f"{len(ids) - 1} tokens in {in_gib(files)}", again, fresh)

    @cached_property
    def _unquantized(self) -> mx.array:
        """Logits of the same tokens from fresh caches."""
        return self._subject.run(self._subject.ids[: _BEFORE + _MANY], _BEFORE)[_BEFORE:]

    def _compared(self, what: str, found: mx.array, fresh: mx.array) -> Outcome:
        tolerance = AGREEMENT.of(self._subject.model.dtype)
        error = worst(relative_errors(found, fresh))
        return judged(error <= tolerance, f"{what}: logits off by {error:.1e} of at most {tolerance:.1e}")

"""What can be checked of any checkpoint, of which nothing is recorded: that it agrees with itself."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from olmo3_mlx.checkpoints.checkpoint import Checkpoint
from olmo3_mlx.doctor.cache_checks import CacheChecks
from olmo3_mlx.doctor.finding import PASSED, SKIPPED, Check, Outcome, judged
from olmo3_mlx.doctor.golden import relative_errors, worst
from olmo3_mlx.doctor.passes import pass_times
from olmo3_mlx.doctor.subject import Subject
from olmo3_mlx.doctor.tolerances import AGREEMENT, LOGITS
from olmo3_mlx.errors import MemoryFitError
from olmo3_mlx.memory.plan import LEAST_CONTEXT, in_gib

_TOKENS = 40
_SLOW = 0.5  # seconds a token from which a model is too slow to be looked at: the checks run some 400

_ADVICE = "report it with all of this, and with the checkpoint's name"


def plan_check(checkpoint: Checkpoint, name: str) -> Check:
    """Whether it fits the machine, before it is loaded."""
    return Check(f"{name}: memory plan", partial(_planned, checkpoint), "take a smaller model, or fewer bits")


def loading_check(subject: Subject, name: str) -> Check:
    """That it is whole, and that what it says is finite."""
    return Check(f"{name}: loading", subject.load, "fetch its files again; if that does not help, " + _ADVICE)


def checkpoint_checks(subject: Subject, name: str) -> Iterator[Check]:
    """The rest, for a model that is loaded."""
    yield Check(f"{name}: chat template", partial(_template, subject.checkpoint), _ADVICE)
    length = min(_TOKENS, subject.checkpoint.config.max_position_embeddings - 1)
    checks = [Check(f"{name}: passes", partial(_passes, subject), _ADVICE)]
    checks += CacheChecks(subject, name, length=length, back=length // 3, judge_bits=False)
    checks += [Check(f"{name}: as it is stored", partial(_as_stored, subject), _ADVICE)]
    checks += [Check(f"{name}: pass times", lambda: pass_times(subject.as_stored), _ADVICE)]
    for check in checks:
        yield replace(check, look=partial(_unless_slow, subject, check))


def _planned(checkpoint: Checkpoint) -> Outcome:
    context = _context(checkpoint)
    plan = checkpoint.plan(context=context)
    return Outcome(
        PASSED, f"{in_gib(plan.total)} with {context} tokens, of {in_gib(plan.machine)} that there are"
    )


def roomy_dtype(checkpoint: Checkpoint) -> str | None:
    """Float32 where that takes less than half of the machine, as quantized weights do: in bfloat16 rounding
    hides what goes wrong. Else None, for what the checkpoint is stored in.
    """
    try:
        plan = checkpoint.plan(context=_context(checkpoint), dtype="float32")
    except MemoryFitError:
        return None
    return "float32" if plan.total <= plan.machine // 2 else None


def _context(checkpoint: Checkpoint) -> int:
    return min(LEAST_CONTEXT, checkpoint.config.max_position_embeddings)


def _template(checkpoint: Checkpoint) -> Outcome:
    tokenizer = checkpoint.tokenizer
    if tokenizer.chat_template is None:
        return Outcome(SKIPPED, "it has none")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "What is 17 + 25?"}])
    if "What is 17 + 25?" not in text:
        return judged(False, "what is asked is not in the prompt")
    ids = tokenizer.encode(text)
    return judged(tokenizer.decode(ids) == text, f"{len(ids)} tokens, which decode to the prompt")


def _passes(subject: Subject) -> Outcome:
    ids = subject.ids[:_TOKENS]
    whole = subject.run(ids, len(ids))
    tolerance = AGREEMENT.of(subject.model.dtype)
    errors = {chunk: worst(relative_errors(subject.run(ids, chunk), whole)) for chunk in (1, 7)}
    said = ", ".join(f"{error:.1e} in passes of {chunk}" for chunk, error in errors.items())
    within = all(error <= tolerance for error in errors.values())
    return judged(within, f"{len(ids)} tokens, logits off by {said}, of at most {tolerance:.1e}")


def _as_stored(subject: Subject) -> Outcome:
    stored = subject.as_stored
    if stored is subject:
        return Outcome(SKIPPED, "all of the above was")
    ids = subject.ids[:_TOKENS]
    error = worst(relative_errors(stored.run(ids, len(ids)), subject.run(ids, len(ids))))
    dtype, tolerance = stored.model.dtype, LOGITS.of(stored.model.dtype)
    said = f"{len(ids)} tokens in {str(dtype).rpartition('.')[2]}, logits off by {error:.1e}"
    return judged(error <= tolerance, f"{said} of at most {tolerance:.1e}")


def _unless_slow(subject: Subject, check: Check) -> Outcome:
    if subject.seconds > _SLOW:
        return Outcome(SKIPPED, f"a token takes {subject.seconds:.1f} s here")
    return check.look()

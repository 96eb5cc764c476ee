"""The embedded demo against golden.json: files, template, logits and ids in passes of many lengths."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial

import mlx.core as mx

from olmo3_mlx.checkpoints.checkpoint import Checkpoint
from olmo3_mlx.doctor.finding import Check, Outcome, judged
from olmo3_mlx.doctor.golden import Golden
from olmo3_mlx.doctor.subject import Subject
from olmo3_mlx.doctor.tolerances import LOGITS
from olmo3_mlx.generation.loop import decode, prefill

# Tokens in a pass, and how many are read so: a few by each kernel, all that are kept in two passes, the
# second beyond the window of 128, and 72 in one. On a CPU each costs 8 ms; all may take ten seconds.
CHUNKS = {1: 12, 7: 28, 64: 72, 256: 258, 2048: 72}
DECODED = 8

_FILES_ADVICE = "its files were changed or are damaged: install olmo3-mlx anew"
_ADVICE = (
    "this machine or its MLX computes something else than the model: look at the first check that failed, "
    "install MLX's own wheel anew, and report it with all of this if it stays"
)


def demo_checks(subject: Subject, golden: Golden) -> Iterator[Check]:
    """What is checked of the demo, in the order in which one thing rests on another."""
    yield Check("demo: files", partial(files, subject.checkpoint, golden), _FILES_ADVICE)
    yield Check("demo: chat template", partial(template, subject.checkpoint, golden), _ADVICE)
    yield Check("demo: tokens", partial(tokens, subject.checkpoint, golden), _ADVICE)
    for chunk in CHUNKS:
        name = f"demo: {chunk} token{'s' if chunk > 1 else ''} a pass"
        yield Check(name, partial(logits, subject, golden, chunk), _ADVICE)
    yield Check("demo: decoding", partial(decoding, subject, golden), _ADVICE)


def half_precision_checks(subject: Subject, golden: Golden) -> Iterator[Check]:
    """For a GPU, where models compute in the type that they are stored in: the demo in that, loosely."""
    for chunk in CHUNKS:
        name = f"demo: {chunk} as it is stored"
        yield Check(name, partial(_logits_as_stored, subject, golden, chunk), _ADVICE)


def files(checkpoint: Checkpoint, golden: Golden) -> Outcome:
    """That they are the ones that were recorded."""
    other = [name for name, digest in golden.files.items() if sha256(checkpoint, name) != digest]
    said = ", ".join(other) + " changed" if other else f"{len(golden.files)} as they were shipped"
    return judged(not other, said)


def sha256(checkpoint: Checkpoint, name: str) -> str:
    """Of a file in a checkpoint's folder."""
    return hashlib.sha256((checkpoint.folder / name).read_bytes()).hexdigest()


def template(checkpoint: Checkpoint, golden: Golden) -> Outcome:
    """That a conversation with a system message, functions and a call is rendered as it was."""
    text = checkpoint.tokenizer.apply_chat_template(golden.messages, tools=golden.tools)
    return _same(text, golden.rendered, "character")


def tokens(checkpoint: Checkpoint, golden: Golden) -> Outcome:
    """That its text becomes the ids that it became, and those the text again."""
    tokenizer = checkpoint.tokenizer
    found = _same(tokenizer.encode(golden.rendered), golden.rendered_ids, "token")
    if tokenizer.decode(golden.rendered_ids) != golden.rendered:
        return judged(False, "the ids do not decode to their text")
    return found


def logits(subject: Subject, golden: Golden, chunk: int) -> Outcome:
    """That logits are the kept ones within tolerance, and the likeliest ids the kept ones, but where the kept
    logits are too near each other to tell.
    """
    count = CHUNKS[chunk]
    found = subject.run(golden.ids[:count], chunk)
    tolerance = LOGITS.of(subject.model.dtype)
    error = golden.error(found)
    wrong, ties = golden.other_ids(mx.argmax(found, axis=-1).tolist(), tolerance)  # type: ignore[arg-type]
    said = f"{count} tokens, logits off by {error:.1e} of at most {tolerance:.1e}, "
    return judged(error <= tolerance and not wrong, said + _other_ids(count, wrong, ties))


def _logits_as_stored(subject: Subject, golden: Golden, chunk: int) -> Outcome:
    return logits(subject.as_stored, golden, chunk)


def decoding(subject: Subject, golden: Golden) -> Outcome:
    """That the loop chooses the kept ids, one after the other, up to a near tie."""
    model, start = subject.model, golden.prompt_tokens
    caches, tolerance = model.make_caches(), LOGITS.of(subject.model.dtype)
    first = prefill(model, golden.ids[:start], caches)
    said: list[int] = []
    loop = decode(model, first, caches, lambda rows: mx.argmax(rows, axis=-1), DECODED)
    for id_ in loop:
        said.append(id_)
        if id_ != golden.ids[start + len(said) - 1]:
            break  # what follows is another text
    loop.close()
    wrong, ties = golden.other_ids(said, tolerance, start - 1)
    return judged(bool(said) and not wrong, _other_ids(len(said), wrong, ties))


def _other_ids(count: int, wrong: list[int], ties: int) -> str:
    if wrong:
        return f"{len(wrong)} of {count} ids are others, the first at position {wrong[0]}"
    return f"{count} ids the same" + (f" but for {ties} near ties" if ties else "")


def _same(found: Sequence[object], expected: Sequence[object], what: str) -> Outcome:
    at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
    if at is None and len(found) == len(expected):
        return judged(True, f"{len(expected)} {what}s the same")
    return judged(False, f"{what} {min(len(found), len(expected)) if at is None else at} is another")

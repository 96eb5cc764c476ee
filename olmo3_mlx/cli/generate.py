"""olmo3 generate: one prompt, one answer."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

from olmo3_mlx.caches.options import CacheOptions
from olmo3_mlx.checkpoints.checkpoint import Checkpoint
from olmo3_mlx.cli.interrupt import PrefillProgress, interruptible
from olmo3_mlx.cli.options import add_answering, add_memory, add_model, answer_options, cache_options
from olmo3_mlx.cli.standard_input import added_text, read_text
from olmo3_mlx.conversation.completion import Completion, join, stream
from olmo3_mlx.errors import OptionError, PromptError
from olmo3_mlx.sessions.session import Session
from olmo3_mlx.text.client_messages import Message


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb's command line."""
    parser = verbs.add_parser(
        "generate",
        help="answer one prompt",
        description="Answer one prompt: the answer goes to stdout as it comes, statistics to stderr. "
        "Ctrl-C ends the answer and keeps what was said; so do SIGTERM and SIGHUP, which end the program.",
    )
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="the prompt, to which text is added after a blank line if standard input is a pipe or a file "
        "(`< /dev/null` leaves it out); - or nothing reads standard input alone, less the newline at its end",
    )
    add_model(parser)
    add_answering(parser)
    add_memory(parser)
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as it stands, without the chat template"
    )
    parser.add_argument(
        "--prefill", metavar="TEXT", help="begin the answer with this, which is printed as part of it"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object instead, at the end (finish_reason: stop, length, memory or interrupted)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer; returns the exit code."""
    options, caches = answer_options(args), CacheOptions.of(cache_options(args), rewind=1)
    for flag, value in (("--system", args.system), ("--prefill", args.prefill)):
        if args.raw and value is not None:
            raise OptionError(f"{flag} needs the chat template, which --raw skips")
    prompt = _prompt(args.prompt)
    checkpoint = Checkpoint.open(args.model, args.revision)
    plan = checkpoint.plan(caches, context=args.context)
    tokenizer, model = checkpoint.tokenizer, checkpoint.load()
    session = Session(model, plan.options, context=plan.context, snapshot_bytes=0)
    with interruptible() as interrupted:
        pieces = stream(
            model,
            tokenizer,
            prompt if args.prefill is None else _begun(prompt, args.prefill),
            system=args.system,
            raw=args.raw,
            continue_final_message=args.prefill is not None,
            session=session,
            progress=PrefillProgress(interrupted),
            **options,
        )
        if not args.json:
            print(args.prefill or "", end="", flush=True)
        completion = ended(list(_shown(pieces, interrupted, quiet=args.json)))
        completion = replace(completion, text=(args.prefill or "") + completion.text)
        if args.json:
            print(json.dumps({**asdict(completion), "model": args.model}, ensure_ascii=False))
        else:
            print(flush=True)
            print(statistics(completion), file=sys.stderr)
    return 0


def ended(pieces: list[Completion]) -> Completion:
    """The whole answer, "interrupted" if its last piece has no finish_reason."""
    completion = join(iter(pieces))
    return replace(completion, finish_reason=completion.finish_reason or "interrupted")


def statistics(completion: Completion) -> str:
    """One line on how an answer went."""
    return (
        f"prompt: {completion.prompt_tokens} tokens, {completion.prompt_tps:.1f} tokens/s | "
        f"generation: {completion.generation_tokens} tokens, {completion.generation_tps:.1f} tokens/s"
        f" | peak memory: {completion.peak_memory:.3f} GB | finish: {completion.finish_reason}"
    )


def _shown(
    pieces: Iterator[Completion], interrupted: Callable[[], bool], quiet: bool
) -> Iterator[Completion]:
    for piece in pieces:
        if not quiet:
            print(piece.text, end="", flush=True)
        yield piece
        if interrupted():
            return


def _begun(prompt: str, answer: str) -> list[Message]:
    """A conversation whose answer is begun."""
    if not prompt.strip():
        raise PromptError("the prompt is empty: expected a text")
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _prompt(given: str | None) -> str:
    if given is not None and given != "-":
        added = added_text()
        return "\n\n".join(part for part in (given, added) if part) if added.strip() else given
    if given is None and sys.stdin.isatty():
        raise OptionError("expected a PROMPT, as an argument or on standard input")
    return read_text()

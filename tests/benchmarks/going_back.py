"""What an edit, a retry, a restart and a thinking turn cost in a conversation of 1,000 tokens, beside mlx-lm.

    python tests/benchmarks/going_back.py [--rounds N]

Uses ../shared/lab/olmo3-lab-chat (window 128) in bfloat16. Times are from the call to the first token,
in alternating rounds. mlx-lm's chat cannot go back, so there the conversation is read from its beginning;
its server is asked over HTTP as a client would, and says itself how much it had cached.
"""

import argparse
import importlib.metadata
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from olmo3_mlx import Completion, Olmo3, Session, Tokenizer, load, stream
from olmo3_mlx.chat_template import ChatTemplate
from olmo3_mlx.identity import cache_form, identity
from olmo3_mlx.session_files import SessionFiles

LAB = Path(__file__).parents[3] / "shared" / "lab"
CHECKPOINT = LAB / "olmo3-lab-chat"
LENGTH = 1000

Messages = list[dict[str, str]]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def conversation(model: Olmo3, tokenizer: Tokenizer, session: Session) -> Messages:
    """Questions and the model's answers to them, LENGTH tokens."""
    messages: Messages = []
    number = 0
    while len(session.tokens) < LENGTH:
        messages.append(
            user(f"What is {number % 9 + 1} + {number % 7 + 2}?" if number else "My name is Ada.")
        )
        said = "".join(p.text for p in stream(model, tokenizer, messages, session=session, temperature=0))
        messages.append({"role": "assistant", "content": said})
        number += 1
    return messages


def first(pieces: Iterator[Completion]) -> tuple[float, int]:
    """Seconds to the first token, and tokens that were run for it."""
    begin = time.perf_counter()
    piece = next(pieces)
    seconds = time.perf_counter() - begin
    pieces.close()  # type: ignore[attr-defined]
    return seconds, piece.prompt_tokens


def theirs(model: Any, ids: list[int]) -> float:
    """mlx-lm's seconds to the first token from the beginning."""
    begin = time.perf_counter()
    next(generate_step(mx.array(ids), model, max_tokens=4, prompt_cache=make_prompt_cache(model)))
    return time.perf_counter() - begin


@contextmanager
def server() -> Iterator[str]:
    """mlx-lm's server with the checkpoint; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(CHECKPOINT), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            time.sleep(0.5)
            try:
                urllib.request.urlopen(f"{address}/health").read()
                break
            except OSError:
                continue
        yield address
    finally:
        process.kill()
        process.wait()


def asked(address: str, messages: Messages) -> tuple[float, int, int]:
    """(seconds to the first token, prompt tokens, of which cached) of a request to the server."""
    body = {
        "messages": messages,
        "temperature": 0,
        "max_tokens": 24,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    begin, seconds, prompt, cached = time.perf_counter(), 0.0, 0, 0
    with urllib.request.urlopen(request) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("choices") and not seconds:
                seconds = time.perf_counter() - begin
            if event.get("usage"):
                prompt = event["usage"]["prompt_tokens"]
                cached = (event["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return seconds, prompt, cached


def row(what: str, ours: list[tuple[float, int]], new: int, peer: list[float], note: str) -> str:
    ratios = [a / b for (a, _), b in zip(ours, peer, strict=True)]
    spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    ran = max(tokens for _, tokens in ours)
    milliseconds = 1000 * statistics.median(seconds for seconds, _ in ours)
    return f"| {what} | {new} | {ran} | {milliseconds:.0f} ms | {spread} | {note} |"


def tokens_in_common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def edits(model: Olmo3, tokenizer: Tokenizer, other: Any, rounds: int) -> None:
    """The rows on a conversation that is edited, retried and taken up after a restart."""
    session = Session(model)
    messages = conversation(model, tokenizer, session)
    held = list(session.tokens)
    # Another question each time, as both remember what they were asked.
    cases: dict[str, Callable[[int], Messages]] = {
        "last question edited": lambda n: [*messages[:-2], user(f"Is it true that {n} + 7 = 30?")],
        "last answer again": lambda _: messages[:-1],
        "next question": lambda n: [*messages, user(f"Is it true that {n} + 8 = 30?")],
    }
    with server() as address:
        for what, case in cases.items():
            ours, peer, served = [], [], []
            for number in range(rounds + 1):
                asking = case(number)
                ids = tokenizer.encode(tokenizer.apply_chat_template(asking))
                list(stream(model, tokenizer, messages[:-1], session=session, temperature=0, max_tokens=24))
                for end in range(1 if not number else len(messages) - 1, len(messages), 2):
                    asked(address, messages[:end])
                measured = first(stream(model, tokenizer, asking, session=session, temperature=0))
                alone, over_http = theirs(other, ids), asked(address, asking)
                if number:  # the first one warms up
                    ours.append(measured)
                    peer.append(alone)
                    served.append((measured[0] / over_http[0], over_http[1] - over_http[2]))
            new = max(1, len(ids) - tokens_in_common(ids, held))
            ratio = statistics.median(ratio for ratio, _ in served)
            note = f"ran {max(ran for _, ran in served)}; ours / theirs {ratio:.3f}"
            print(row(what, ours, new, peer, note), flush=True)
    restart(model, tokenizer, other, messages, rounds)


def restart(model: Olmo3, tokenizer: Tokenizer, other: Any, messages: Messages, rounds: int) -> None:
    asking = [*messages, user("What is my name?")]
    ids = tokenizer.encode(tokenizer.apply_chat_template(asking))
    ours, peer = [], []
    with tempfile.TemporaryDirectory() as folder:
        saved = Session(model, files=SessionFiles(Path(folder), identity(model), cache_form(model)))
        said = list(stream(model, tokenizer, messages[:-1], session=saved, temperature=0))
        messages[-1]["content"] = "".join(piece.text for piece in said)
        saved.save()
        for _ in range(rounds):
            begin = time.perf_counter()
            session = Session(model, files=SessionFiles(Path(folder), identity(model), cache_form(model)))
            session.resume()
            resumed = time.perf_counter() - begin
            seconds, ran = first(stream(model, tokenizer, asking, session=session, temperature=0))
            ours.append((resumed + seconds, ran))
            peer.append(theirs(other, ids))
    note = "starts anew"
    print(row("next question after a restart", ours, len(ids) - len(saved.tokens), peer, note), flush=True)


def thinking(model: Olmo3, tokenizer: Tokenizer, other: Any, rounds: int) -> None:
    """A client that sends answers back without their thinking, with the template that opens <think>."""
    source = (LAB / "templates" / "lab_think.jinja").read_text(encoding="utf-8")
    thinker = Tokenizer(tokenizer.backend, ChatTemplate(source))
    ours, peer, new = [], [], 0
    for _ in range(rounds):
        session = Session(model)
        messages: Messages = []
        while len(session.tokens) < LENGTH:
            messages.append(user(f"What is {len(messages) % 9 + 1} + {len(messages) % 7 + 2}?"))
            ids = thinker.encode(thinker.apply_chat_template(messages))
            new = len(ids) - tokens_in_common(ids, list(session.tokens))
            turn = first(stream(model, thinker, messages, session=session, temperature=0))
            text = "".join(p.text for p in stream(model, thinker, messages, session=session, temperature=0))
            messages.append({"role": "assistant", "content": text.rpartition("</think>")[2].strip()})
        ours.append(turn)
        peer.append(theirs(other, ids))
    note = f"see facts: all but the system prompt ({len(ids)} tokens here)"
    print(row("next question, thinking left out", ours, new, peer, note), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    model, tokenizer = load(CHECKPOINT, dtype="bfloat16")
    other = load_model(CHECKPOINT)[0]
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("mlx", "mlx-lm"))
    print(f"{versions}, {LENGTH} tokens, {rounds} rounds\n")
    print("| | new tokens | tokens run | first token | ours / mlx-lm reading all of it | mlx-lm's server |")
    print("|---|---|---|---|---|---|")
    edits(model, tokenizer, other, rounds)
    thinking(model, tokenizer, other, rounds)


if __name__ == "__main__":
    main()

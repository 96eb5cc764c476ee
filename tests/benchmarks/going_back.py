"""What an edit, a retry, a restart and a thinking turn cost in a conversation of 1,000 tokens, beside mlx-lm.

    python tests/benchmarks/going_back.py [--rounds N]

Uses ../shared/lab/olmo3-lab-chat (window 128) in bfloat16. Times are from the call to the first token,
in alternating rounds. mlx-lm's chat cannot go back, so there the conversation is read from its beginning;
its server, which can reuse some of it, is asked over HTTP as a client would.
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

from olmo3_mlx import CacheOptions, Completion, Olmo3, Session, Tokenizer, load, stream
from olmo3_mlx.checkpoints.fingerprint import fingerprint
from olmo3_mlx.sessions.files import SessionFiles
from olmo3_mlx.text.chat_template import ChatTemplate

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
def server(checkpoint: Path) -> Iterator[str]:
    """mlx-lm's server with a checkpoint; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(checkpoint), "--port", str(port)]
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


def asked(address: str, messages: Messages) -> float:
    """Seconds to the first token of a request to the server."""
    body = {"messages": messages, "temperature": 0, "max_tokens": 24, "stream": True}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    begin, seconds = time.perf_counter(), 0.0
    with urllib.request.urlopen(request) as answer:
        for line in answer:
            if line.startswith(b"data: {") and json.loads(line[6:]).get("choices") and not seconds:
                seconds = time.perf_counter() - begin
    return seconds


def row(what: str, new: int, ours: list[tuple[float, int]], *peers: list[float]) -> str:
    cells = [what, str(new), str(max(tokens for _, tokens in ours))]
    cells.append(f"{1000 * statistics.median(seconds for seconds, _ in ours):.0f} ms")
    for peer in peers:
        ratios = [a / b for (a, _), b in zip(ours, peer, strict=True)]
        cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    return "| " + " | ".join([*cells, *[""] * (2 - len(peers))]) + " |"


def tokens_in_common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def edits(model: Olmo3, tokenizer: Tokenizer, other: Any, rounds: int) -> None:
    """The rows on a conversation that is edited, retried and taken up after a restart."""
    session = Session(model)
    messages = conversation(model, tokenizer, session)
    held = list(session.tokens)
    # Each time another question from its first word on, as both remember what they were asked.
    words = ["Is", "Was", "Can", "Will", "Does", "Has", "Are", "Who", "Where", "When"]
    cases: dict[str, Callable[[int], Messages]] = {
        "last question edited": lambda n: [*messages[:-2], user(f"{words[n % 10]} it true that 3 + 7 = 30?")],
        "last answer again": lambda _: messages[:-1],
        "next question": lambda n: [*messages, user(f"{words[n % 10]} it true that 3 + 8 = 30?")],
    }
    with server(CHECKPOINT) as address:
        for what, case in cases.items():
            ours, peer, served, new = [], [], [], 0
            for number in range(rounds + 1):
                asking = case(number)
                ids = tokenizer.encode(tokenizer.apply_chat_template(asking))
                new = max(1, len(ids) - tokens_in_common(ids, held))
                list(stream(model, tokenizer, messages[:-1], session=session, temperature=0, max_tokens=24))
                for end in range(1 if not number else len(messages) - 1, len(messages), 2):
                    asked(address, messages[:end])
                measured = first(stream(model, tokenizer, asking, session=session, temperature=0))
                alone, over_http = theirs(other, ids), asked(address, asking)
                if number:  # the first one warms up
                    ours.append(measured)
                    peer.append(alone)
                    served.append(over_http)
            print(row(what, new, ours, peer, served), flush=True)
    restart(model, tokenizer, other, messages, rounds)


def restart(model: Olmo3, tokenizer: Tokenizer, other: Any, messages: Messages, rounds: int) -> None:
    asking = [*messages, user("What is my name?")]
    ids = tokenizer.encode(tokenizer.apply_chat_template(asking))
    ours, peer = [], []
    form = CacheOptions().form(model.config.head_dim, model.dtype)
    with tempfile.TemporaryDirectory() as folder:
        saved = Session(
            model,
            files=SessionFiles(Path(folder), fingerprint(model), form),
        )
        said = list(stream(model, tokenizer, messages[:-1], session=saved, temperature=0))
        messages[-1]["content"] = "".join(piece.text for piece in said)
        saved.save()
        for _ in range(rounds):
            begin = time.perf_counter()
            session = Session(
                model,
                files=SessionFiles(Path(folder), fingerprint(model), form),
            )
            session.resume()
            resumed = time.perf_counter() - begin
            seconds, ran = first(stream(model, tokenizer, asking, session=session, temperature=0))
            ours.append((resumed + seconds, ran))
            peer.append(theirs(other, ids))
    print(row("next question after a restart", len(ids) - len(saved.tokens), ours, peer), flush=True)


def thinking(model: Olmo3, tokenizer: Tokenizer, other: Any, rounds: int) -> None:
    """A client that sends answers back without their thinking, with the template that opens <think>."""
    template = (LAB / "templates" / "lab_think.jinja").read_text(encoding="utf-8")
    thinker = Tokenizer(tokenizer.backend, ChatTemplate(template))
    with tempfile.TemporaryDirectory() as folder:
        for path in CHECKPOINT.iterdir():
            (Path(folder) / path.name).write_bytes(path.read_bytes())
        (Path(folder) / "chat_template.jinja").write_text(template, encoding="utf-8")
        ours, peer, served, new = [], [], [], 0
        for _ in range(rounds):
            with server(Path(folder)) as address:
                session = Session(model)
                messages: Messages = []
                while len(session.tokens) < LENGTH:
                    messages.append(user(f"What is {len(messages) % 9 + 1} + {len(messages) % 7 + 2}?"))
                    ids = thinker.encode(thinker.apply_chat_template(messages))
                    new = len(ids) - tokens_in_common(ids, list(session.tokens))
                    turn = first(stream(model, thinker, messages, session=session, temperature=0))
                    over_http = asked(address, messages)
                    said = stream(model, thinker, messages, session=session, temperature=0)
                    answer = "".join(p.text for p in said).rpartition("</think>")[2].strip()
                    messages.append({"role": "assistant", "content": answer})
            ours.append(turn)
            peer.append(theirs(other, ids))
            served.append(over_http)
    print(row("next question, thinking left out", new, ours, peer, served), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    model, tokenizer = load(CHECKPOINT, dtype="bfloat16")
    other = load_model(CHECKPOINT)[0]
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("mlx", "mlx-lm"))
    print(f"{versions}, {LENGTH} tokens, {rounds} rounds\n")
    print("| | new tokens | tokens run | first token | ours / mlx-lm reading all | ours / its server |")
    print("|---|---|---|---|---|---|")
    edits(model, tokenizer, other, rounds)
    thinking(model, tokenizer, other, rounds)


if __name__ == "__main__":
    main()

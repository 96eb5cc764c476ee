"""Conversations: the commands of a chat, and sessions that go on in another process."""

from collections.abc import Iterator

from same_output_cases.case import GREEDY, Case, bash, group, step

CHAT = f"chat {GREEDY} --max-tokens 30"
TURNS = "My name is Ada.\nWhat is 20 + 22?\nWhat is my name?\n"
SCRIPTS: dict[str, tuple[str, str | bytes]] = {
    "turns": (CHAT, f"{TURNS}/stats\n/history\n"),
    "retry": (CHAT, "My name is Ada.\n/retry\n/stats\n/retry\n/history\n"),
    "edit": (CHAT, f"{TURNS}/edit What is 3 + 4?\n/stats\n/edit\n/history\n"),
    "undo": (CHAT, f"{TURNS}/undo\n/history\n/stats\nHello\n/undo\n/undo\n/undo\n/undo\n/history\n"),
    "system": (CHAT, "/system\n/system You are terse.\n/system\nWho are you?\n/history\n/reset\n/system\n"),
    "a system from the start": (f"{CHAT} --system 'You are terse.'", "/system\nHello\n/reset\n/system\n"),
    "reset": (CHAT, "My name is Ada.\n/reset\n/stats\nWhat is my name?\n/history\n"),
    "help": (CHAT, "/help\n/unknown\n/ \n/stats\n/history\n/HELP\n"),
    "nothing to go back to": (CHAT, "/retry\n/edit hello\n/undo\n"),
    "exit": (CHAT, "/exit\nnever said\n"),
    "quit": (CHAT, "\n\n  \n/quit\nnever said\n"),
    "no last newline": (CHAT, "Hello"),
    "seed": ("chat --temperature 1 --seed 5 --max-tokens 12", "Hello\n/retry\nAnd you?\n/stats\n"),
    "stop": (f"{CHAT} --stop 4", "What is 20 + 22?\n/stats\n"),
    "kv-bits 8": (f"{CHAT} --kv-bits 8", f"{TURNS}/stats\n/undo\nHello\n/stats\n"),
    "kv-bits 4, group and start": (
        f"{CHAT} --kv-bits 4 --kv-group-size 32 --kv-start 64",
        f"{TURNS}/stats\n/edit Hello\n/stats\n",
    ),
    "context": (f"{CHAT} --context 130", f"{TURNS}/stats\n{TURNS}/stats\n/undo\n/undo\nHello\n"),
    "tiny, past the window": (
        "chat --model tiny --temperature 0 --max-tokens 20",
        f"{TURNS}/stats\n/undo\nA\n/stats\n",
    ),
    "too long a message": (
        "chat --model tiny --seed 1 --max-tokens 5",
        f"{'word ' * 300}\n/stats\nHello\n/stats\n",
    ),
    "no text": (CHAT, b"Hello\ncaf\xe9\n"),
}


def cases() -> Iterator[Case]:
    yield from chat()
    yield from sessions()
    yield from damaged_sessions()
    yield from places_of_sessions()


def chat() -> Iterator[Case]:
    for name, (line, script) in SCRIPTS.items():
        yield Case(f"chat: {name}", (step(line, script),))
    yield Case(
        "chat: little memory",
        (
            step("chat --seed 1 --max-tokens 9", "Hello\n/stats\n", variables={"OLMO3_MEMORY": "20M"}),
            step("chat", "Hello\n", variables={"OLMO3_MEMORY": "10M"}),
        ),
    )
    terminal = step(CHAT, "What is 20 + 22?\n/stats\n/exit\n", terminal=True)
    yield Case("chat: on a terminal", (terminal,))
    yield from group(
        "chat wrong",
        {
            "no template": "chat --model no-template",
            "damaged": "chat --model wrong-shape",
            "a template that refuses": "chat --model template-refuses",
            "a temperature": "chat --temperature -1",
            "kv-group-size": "chat --kv-bits 8 --kv-group-size 48",
            "context": "chat --context 100000",
            "no such model": "chat --model no/such/folder",
        },
    )


def sessions() -> Iterator[Case]:
    name, more = f"{CHAT} --session ada", f"/stats\nWhat is my name?\n/stats\n/undo\n/undo\n{TURNS}/history\n"
    kept = (
        step(name, TURNS),
        step(name, more),
        step(name, "/reset\nHello\n/stats\n"),
        step(name, "/history\n"),
    )
    yield Case("session: three times", kept)
    yield Case("session: what BEFORE kept goes on", (step(name, TURNS, first=True), step(name, more)))
    quantized = f"{name} --kv-bits 8"
    both = (step(quantized, TURNS, first=True), step(quantized, more), step(name, more))
    yield Case("session: quantized caches, kept by BEFORE, then plain ones", both)
    sampled = f"chat --temperature 1 --seed 3 --max-tokens 12 --session s.1-{'x' * 90}"
    yield Case(
        "session: edits and retries",
        (
            step(f"{name} --system 'You are terse.'", "Hello\n/retry\n/edit Who are you?\n"),
            step(f"{name} --system other", "Hello\n"),
            step(name, "/system\n/system Be kind.\nHello\n"),
            step(name, "/history\n"),
            step(sampled, "Hello\n"),
            step(sampled, "/retry\n/stats\n"),
        ),
    )
    yield Case(
        "session: of another model",
        (
            step(name, TURNS),
            step(f"{name} --model tiny --context 200", "/stats\nHello\n/stats\n"),
        ),
    )


def damaged_sessions() -> Iterator[Case]:
    name, caches = f"{CHAT} --session ada", "sessions/ada/caches"
    damages = {
        "no caches": f"rm -r {caches}",
        "an index that is none": f"echo '{{' > {caches}/caches.json",
        "payloads cut": f'for f in {caches}/*.safetensors; do truncate -s 100 "$f"; done',
        "another format": f"""sed -i 's/"format": "1"/"format": "0"/' {caches}/caches.json""",
        "no text": "rm sessions/ada/conversation.json",
        "text that is none": "echo '[]' > sessions/ada/conversation.json",
        "text cut": "truncate -s 20 sessions/ada/conversation.json",
        "nothing may be written": "rm -r sessions/ada/caches; touch sessions/ada/caches",
    }
    for what, damage in damages.items():
        yield Case(
            f"session damaged: {what}", (step(name, TURNS), bash(damage), step(name, "/stats\nHello\n"))
        )


def places_of_sessions() -> Iterator[Case]:
    name = f"{CHAT} --session ada"
    wrong = {"dots": "=../a", "a slash": "=a/b", "empty": "=", "a dash": "=-a", "long": f"={'x' * 101}"}
    yield from group("session wrong", {what: f"chat --session{name}" for what, name in wrong.items()})
    # The first one waits at a pipe that nobody writes to until the second one is done.
    held = f"mkfifo hold; $OLMO3 {name} < hold > first.out 2> first.err & exec 3> hold"
    locked = "until [ -e sessions/ada/lock ]; do sleep 0.1; done; sleep 1"
    both = bash(f"{held}; {locked}; echo Hello | $OLMO3 {name}; exec 3>&-; wait; rm hold")
    yield Case("session: open already", (both,))
    data = {"OLMO3_SESSIONS": "", "XDG_DATA_HOME": "data"}
    yield Case("session: the user's data folder", (step(name, "Hello\n", variables=data),))
    no_folder = {"OLMO3_SESSIONS": "short.txt"}
    yield Case("session: a folder that cannot be", (step(name, "Hello\n", variables=no_folder),))

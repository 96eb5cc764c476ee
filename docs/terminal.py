"""Draws docs/chat.svg: olmo3 in a terminal. What it shows was recorded, not written.

python docs/terminal.py            draws the recording, docs/chat.json
python docs/terminal.py --record   runs the commands again first; ../shared must be there for the last one
"""

import json
import os
import platform
import pty
import re
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from svg import MONO, circle, document, rect, text

DOCS = Path(__file__).parent
RECORDING = DOCS / "chat.json"
CHECKPOINTS = DOCS.parents[1] / "shared" / "lab"

# Commands, and what is typed while they run, line by line.
STEPS: list[tuple[str, list[str]]] = [
    (
        "olmo3 chat --session work --kv-bits 8 --temperature 0",
        [
            "My name is Ada. How many layers does Olmo 3 7B have?",
            "What is my name?",
            "/edit What is 17 + 25?",
            "/stats",
            "/exit",
        ],
    ),
    ("olmo3 chat --session work --kv-bits 8 --temperature 0", ["What is my name?", "/stats", "/exit"]),
    ("OLMO3_MEMORY=16G olmo3 inspect --model 7b --context 65536 --kv-bits 4 | tail -3", []),
    ("olmo3 convert olmo3-lab-draft draft-5bit --bits 5 --group-size 32", []),
]
COLUMNS = 112
LINE, LETTER, LEFT, TOP = 20, 8.43, 24, 72  # pixels
STYLE = f"""
text {{ font: 14px {MONO}; fill: #c9d1d9; white-space: pre; }}
.title {{ fill: #8b949e; font-size: 13px; }} .command {{ fill: #f0f6fc; font-weight: 600; }}
.typed {{ fill: #79c0ff; }} .aside {{ fill: #8b949e; }} .verdict {{ fill: #7ee787; }}
.window {{ fill: #0d1117; stroke: #30363d; }} .bar {{ fill: #161b22; }}
.close {{ fill: #ff5f57; }} .shrink {{ fill: #febc2e; }} .grow {{ fill: #28c840; }}
"""


def recorded() -> dict[str, Any]:
    """Run the commands, and say where."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for checkpoint in CHECKPOINTS.glob("olmo3-*"):
            (work / checkpoint.name).symlink_to(checkpoint)
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "PATH": programs, "TERM": "dumb", "OLMO3_SESSIONS": str(work / "sessions")}
        env.pop("OLMO3_MODEL", None)
        steps = [
            {
                "command": command,
                "output": typed(command, lines, work, env) if lines else ran(command, work, env),
            }
            for command, lines in STEPS
        ]
    versions = f"olmo3-mlx {metadata.version('olmo3-mlx')}, mlx {metadata.version('mlx')}"
    return {"where": f"{versions}, {platform.system()} {platform.machine()}, CPU", "steps": steps}


def ran(command: str, work: Path, env: dict[str, str]) -> str:
    """What a command prints, standard error included, but for the lines that tell how far a long work is: on
    a terminal that is a bar, which goes.
    """
    done = subprocess.run(
        command,
        shell=True,
        cwd=work,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return re.sub(r"^.+: \d+% after [\d:]+\n", "", done.stdout, flags=re.M).rstrip("\n")


def typed(command: str, lines: list[str], work: Path, env: dict[str, str]) -> str:
    """What a terminal shows while these lines are typed, each when the program asks for it."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command, shell=True, cwd=work, env=env, stdin=slave, stdout=slave, stderr=slave, close_fds=True
    )
    os.close(slave)
    shown, waiting = b"", list(lines)
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # the program has ended
            break
        if not piece:
            break
        shown += piece
        if waiting and shown.endswith((b"\n> ", b"\r> ")):
            time.sleep(0.2)
            os.write(master, waiting.pop(0).encode() + b"\n")
    assert process.wait() == 0
    return screen(shown.decode())


def screen(shown: str) -> str:
    """What stays on a screen: escape sequences gone, and of lines that were written over the last."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r\n", "\n")
    return "\n".join(line.rpartition("\r")[2].rstrip() for line in plain.rstrip("\n").split("\n"))


def kind_of(line: str) -> str:
    """The colour of a line."""
    if line.startswith("$ "):
        return "command"
    if line.startswith("> "):
        return "typed"
    if re.match(r"quality: ", line):
        return "verdict"
    return "aside" if re.match(r"\(|prompt: |conversation: |demo: ", line) else ""


def picture(recording: dict[str, Any]) -> str:
    """A terminal that shows a recording."""
    shapes, row = [], 0
    for step in recording["steps"]:
        for line in (f"$ {step['command']}", *step["output"].split("\n")):
            for start in range(0, max(1, len(line)), COLUMNS):
                piece = line[start : start + COLUMNS]
                if piece:
                    shapes.append(text(LEFT, TOP + LINE * row, piece, kind_of(line), anchor="start"))
                row += 1
        row += 1
    width, height = round(2 * LEFT + LETTER * COLUMNS), TOP + LINE * (row - 1)
    frame = [
        rect(0.5, 0.5, width - 1, height - 1, "window", radius=10),
        rect(1, 1, width - 2, 36, "bar", radius=10),
        *(circle(22 + 20 * i, 19, 6, kind) for i, kind in enumerate(("close", "shrink", "grow"))),
        text(width / 2, 23.5, recording["where"], "title"),
    ]
    return document(width, height, "olmo3 in a terminal", STYLE, [*frame, *shapes])


if __name__ == "__main__":
    if "--record" in sys.argv:
        RECORDING.write_text(json.dumps(recorded(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    drawn = picture(json.loads(RECORDING.read_text(encoding="utf-8")))
    (DOCS / "chat.svg").write_text(drawn, encoding="utf-8")

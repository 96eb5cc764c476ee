"""Running a case in a checkout, and all that came of it as one text that can be compared."""

import hashlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from same_output_cases.case import Case, Step
from same_output_cases.materials import hub

SECONDS = 900  # that a command may take
TEXT_BYTES = 100_000  # of a file that is shown rather than hashed

# What differs from run to run, or says which version ran.
NORMAL: list[tuple[str, str]] = [
    (r"\d+\.\d tokens/s", "N tokens/s"),
    (r"peak memory: \d+\.\d+ GB", "peak memory: N GB"),
    (r'"(prompt_tps|generation_tps|peak_memory)": [\d.e+-]+', r'"\1": N'),
    (r"(, was [^)]*\)|\)), \d+\.\d s$", r"\1, N s"),
    (r"\bolmo3(-mlx)?(\"?:? \"?)\d+\.\d+[\w.+]*", r"olmo3\1\2VERSION"),
    (r"http://127\.0\.0\.1:\d+", "http://HUB"),
]


@dataclass(frozen=True)
class Checkout:
    """A folder of this repository, and what starts its program."""

    folder: Path
    python: str
    olmo3: tuple[str, ...]

    @classmethod
    def at(cls, folder: Path) -> "Checkout":
        folder = folder.resolve()
        if not (folder / "olmo3_mlx" / "__init__.py").is_file():
            sys.exit(f"{folder}: expected a checkout of this repository, found no olmo3_mlx in it")
        own = folder / ".venv" / "bin"
        python = str(own / "python") if (own / "python").exists() else sys.executable
        script = own / "olmo3"
        return cls(folder, python, (str(script),) if script.exists() else (python, "-m", "olmo3_mlx"))

    def environment(self, home: Path) -> dict[str, str]:
        """Nothing of the user's, except where programs are."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "COLUMNS": "110",
            "TERM": "dumb",
            "MPLCONFIGDIR": str(home / "matplotlib"),
            "HF_HOME": "hub",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*",
            "OLMO3_MEMORY": "8G",
            "OLMO3_SESSIONS": "sessions",
            "PYTHONPATH": str(self.folder),
            "CHECKOUT": str(self.folder),
            "PYTHON": self.python,
            "OLMO3": " ".join(self.olmo3),
        }


class Place(NamedTuple):
    """Folders: the one to run in, which is new, what is seen in it, and what is kept from case to case."""

    room: Path
    materials: Path
    home: Path


class Done(NamedTuple):
    """How a command went."""

    code: int | str
    out: str
    err: str


def perform(step: Step, checkout: Checkout, room: Path, environment: dict[str, str]) -> Done:
    """Run one command in the folder `room`."""
    command = ["bash", "-c", step.bash] if step.bash else [*checkout.olmo3, *step.arguments]
    keyboard, stdin = (None, subprocess.PIPE) if not step.terminal else terminal(step.stdin)
    process = subprocess.Popen(
        command, cwd=room, env=environment, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        if step.interrupt_at:
            while process.poll() is None and not (room / step.interrupt_at).exists():
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(None if step.terminal else step.stdin, timeout=SECONDS)
        code: int | str = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        code = f"none after {SECONDS} s"
    finally:
        if keyboard is not None:
            os.close(keyboard)
            os.close(stdin)
    return Done(code, *(text.decode(errors="backslashreplace") for text in (out, err)))


def terminal(typed: bytes) -> tuple[int, int]:
    """A terminal at which that was typed, and Ctrl-D: our end, and the program's. It shows nothing of it."""
    keyboard, screen = pty.openpty()
    mode = termios.tcgetattr(screen)
    mode[3] &= ~termios.ECHO
    termios.tcsetattr(screen, termios.TCSANOW, mode)
    os.write(keyboard, typed + b"\x04")
    return keyboard, screen


class Played(NamedTuple):
    """What came of a case as one text, and the peak memory that its answers told, in GB."""

    text: str
    peaks: list[float]


def play(case: Case, checkout: Checkout, before: Checkout, place: Place) -> Played:
    """Run a case's commands in `checkout`, or in `before` those that are its on both sides."""
    room, materials, home = place
    room.mkdir(parents=True)
    for path in materials.iterdir():
        (room / path.name).symlink_to(path)
    parts: list[str] = []
    with hub(materials / "tiny") if case.needs == "hub" else nullcontext() as web:
        for step in case.steps:
            runs = before if step.first else checkout
            more = {} if web is None else {"HF_ENDPOINT": web.url, "HF_HUB_OFFLINE": "0"}
            done = perform(step, runs, room, {**runs.environment(home), **more, **step.variables})
            parts += [f"$ {step.line[:300]}", f"exit code: {done.code}"]
            parts += [f"{name}:\n{text}" for name, text in (("stdout", done.out), ("stderr", done.err))]
        parts += [] if web is None else ["fetched:", *sorted(web.got)]
    parts += written(room)
    shutil.rmtree(room)
    text = "\n".join(parts)
    peaks = [float(peak) for peak in re.findall(r'"peak_memory": ([\d.e-]+)', text)]
    places = {
        str(room.parents[1]): "SCRATCH",
        str(checkout.folder): "CHECKOUT",
        str(before.folder): "CHECKOUT",
    }
    return Played(normal(text, places), peaks)


def written(room: Path) -> Iterator[str]:
    """The files in a room, less the materials and what was fetched."""
    for path in sorted(room.rglob("*")):
        name = path.relative_to(room)
        if path.is_symlink() or not path.is_file() or name.parts[0] == "hub":
            continue
        data = path.read_bytes()
        if len(data) <= TEXT_BYTES and b"\0" not in data:
            with suppress(UnicodeDecodeError):
                yield f"file {name}:\n{data.decode()}"
                continue
        yield f"file {name}: {len(data)} bytes, SHA-256 {hashlib.sha256(data).hexdigest()}"


def normal(text: str, places: dict[str, str]) -> str:
    """Without what must differ; folders are told by the names in `places`."""
    for place in sorted(places, key=len, reverse=True):  # one may begin like another
        text = text.replace(place, places[place])
    for pattern, plain in NORMAL:
        text = re.sub(pattern, plain, text, flags=re.MULTILINE)
    return text

"""The way of a prompt through the files of a checkout, and of the options of a quantized cache.

    python tests/benchmarks/way_of_a_prompt.py CHECKOUT [--json FILE]

The way. In a process of its own, with CHECKOUT's environment (.venv, else this Python), the command line's
`main` is called as for `olmo3 generate Hello --model demo --max-tokens 2 --temperature 0`. Every call of a
function that is written in a file below olmo3_mlx/ is seen by sys.setprofile, from the call of `main` to the
first text of the answer on standard output.

- call: a function is entered, or a generator goes on. The bodies of modules and what they run (imports, those
  inside functions too) do not count, nor what dataclasses generate, as it is in no file.
- visit: calls of one file's functions with none of another file's between them. A return is no visit.
- loop: files visited again at once in the same order, as for each layer, tensor or guess, count once:
  of "a b a b a b c" stays "a b c". The shortest loops go first, until none is left. Without this the figures
  would tell of the demo's number of layers and tensors; `every_visit` counts them all.
- step: going from one visit to the next.
- between rooms: the steps of one who sees sub-packages and not the files in them. A file in none is a room of
  its own, so that a flat package has nearly as many rooms as files.
- ready: what lies before the model's first call: the checkpoint is loaded and the prompt is ids. Behind it
  come the layers and their caches, whose visits tell how finely these are divided into files.

Files that are read. An open of a checkpoint's file by Python (the audit event "open"), by MLX (mx.load, which
reads the header and keeps the file for the data), or by the tokenizers library (from_file). Whether a file is
there is looked up more often, which does not count. From the call of `main` to its end.

The options. `kv_bits`, `kv_group_size`, `kv_start` and `rewind` as whole words: on how many lines of how many
.py files below olmo3_mlx/, comments and docstrings included, and in the signatures of how many functions. A
line that names several of the first three counts once for "any". `CacheOptions`, the one value for them all
where there is one, is counted alike; its signatures are those with a parameter of that type.
"""

import argparse
import ast
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

COMMAND = ["generate", "Hello", "--model", "demo", "--max-tokens", "2", "--temperature", "0"]
NAMES = ("kv_bits", "kv_group_size", "kv_start", "rewind")
VALUE = "CacheOptions"
READ = re.compile(r"(.*/)?[^/]+\.(json|safetensors|jinja)")
LONGEST = 200  # loop that is looked for, in visits


class Tracer:
    """Records the calls in `package`'s files, by the file's path in it."""

    def __init__(self, package: Path) -> None:
        self._package = f"{package}/"
        self._importing = 0
        self.calls: list[str] = []
        self.ready: int | None = None  # calls before the first one of the model

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if code.co_name == "<module>":
            self._importing += {"call": 1, "return": -1}.get(event, 0)
        elif event == "call" and not self._importing and code.co_filename.startswith(self._package):
            file = code.co_filename.removeprefix(self._package)
            if self.ready is None and file == "model.py" and code.co_name == "__call__":
                self.ready = len(self.calls)
            self.calls.append(file)


class FirstText(io.StringIO):
    """Standard output, which ends the trace when something is written."""

    def write(self, text: str) -> int:
        if text:
            sys.setprofile(None)
        return super().write(text)


def trace(checkout: Path) -> dict[str, Any]:
    """Run COMMAND in this process, which must be a new one; what it did."""
    opened: list[tuple[str, str]] = []

    def seen(by: str, path: object) -> None:
        name = os.fspath(path) if isinstance(path, str | os.PathLike) else ""  # or a descriptor
        if isinstance(name, str) and READ.fullmatch(name):
            opened.append((Path(name).name, by))

    watch_libraries(seen)
    from olmo3_mlx.cli import main

    tracer = Tracer(checkout / "olmo3_mlx")
    sys.addaudithook(lambda event, args: seen("Python", args[0]) if event == "open" else None)
    answer, stdout = FirstText(), sys.stdout
    sys.stdout = answer
    sys.setprofile(tracer)
    try:
        code = main(COMMAND)
    finally:
        sys.setprofile(None)
        sys.stdout = stdout
    assert code == 0, code
    return {
        "answer": answer.getvalue().strip(),
        "calls": tracer.calls,
        "ready": tracer.ready,
        "opened": [f"{name} by {by}" for name, by in opened],
    }


def watch_libraries(seen: Callable[[str, object], None]) -> None:
    """Tell of files that are opened by compiled code, which no audit event does."""
    import mlx.core as mx
    import tokenizers

    load, backend = mx.load, tokenizers.Tokenizer

    def watched_load(file: Any, *args: Any, **options: Any) -> Any:
        seen("MLX", file)
        return load(file, *args, **options)

    class Watched(type):
        """Stands for the class: what is not from_file is the class's own."""

        def __getattr__(cls, name: str) -> Any:
            return getattr(backend, name)

        def __call__(cls, *args: Any, **options: Any) -> Any:
            return backend(*args, **options)

        def from_file(cls, path: str) -> Any:
            seen("tokenizers", path)
            return backend.from_file(path)

    mx.load = watched_load
    tokenizers.Tokenizer = Watched("Tokenizer", (), {})  # type: ignore[assignment,misc]


def way(calls: list[str]) -> dict[str, Any]:
    """Visits, calls and steps of a trace."""
    every = [file for file, _ in groupby(calls)]
    visits = without_loops(every)
    return {
        "sequence": visits,
        "steps": len(visits) - 1,
        "files": len(set(visits)),
        "between_rooms": len(without_loops([room for room, _ in groupby(map(room_of, visits))])) - 1,
        "visits": dict(Counter(visits).most_common()),
        "every_visit": len(every),
        "calls": dict(Counter(calls).most_common()),
    }


def room_of(file: str) -> str:
    """The sub-package that a file is in; a file in none is a room of its own."""
    return file.rpartition("/")[0] or file


def without_loops(visits: list[str]) -> list[str]:
    """What comes again at once in the same order once, the shortest such loops first."""
    length = 1
    while length <= min(LONGEST, len(visits) // 2):
        kept: list[str] = []
        at = 0
        while at < len(visits):
            if len(kept) >= length and visits[at : at + length] == kept[-length:]:
                at += length
            else:
                kept.append(visits[at])
                at += 1
        length = length + 1 if len(kept) == len(visits) else 1
        visits = kept
    return visits


def options(package: Path) -> dict[str, Any]:
    """Where the options of a quantized cache are named."""
    texts = {str(path.relative_to(package)): path.read_text() for path in sorted(package.rglob("*.py"))}
    found = {name: named(texts, rf"\b{name}\b") | {"signatures": signatures(texts, name)} for name in NAMES}
    found["any"] = named(texts, rf"\b({'|'.join(NAMES[:3])})\b")
    found[VALUE] = named(texts, rf"\b{VALUE}\b") | {"signatures": signatures(texts, VALUE, typed=True)}
    return found


def named(texts: dict[str, str], pattern: str) -> dict[str, Any]:
    by_file = {
        file: count
        for file, text in texts.items()
        if (count := sum(re.search(pattern, line) is not None for line in text.splitlines()))
    }
    return {"lines": sum(by_file.values()), "files": len(by_file), "by_file": by_file}


def signatures(texts: dict[str, str], name: str, *, typed: bool = False) -> int:
    """Functions with a parameter of that name, or with one whose annotation names that type."""
    count = 0
    for text in texts.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                types = [ast.unparse(a.annotation) for a in given if a.annotation is not None]
                there = any(re.search(rf"\b{name}\b", t) for t in types) if typed else None
                count += any(a.arg == name for a in given) if there is None else there
    return count


def measured(checkout: Path) -> dict[str, Any]:
    """Both, the first in a process of its own."""
    own = checkout / ".venv" / "bin" / "python"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        command = [
            str(own) if own.exists() else sys.executable,
            __file__,
            str(checkout),
            "--trace",
            str(file),
        ]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        environment.pop("OLMO3_MODEL", None)
        no_text, no_screen = subprocess.DEVNULL, subprocess.DEVNULL
        subprocess.run(command, check=True, cwd=folder, env=environment, stdin=no_text, stderr=no_screen)
        traced = json.loads(file.read_text())
    return {
        "command": " ".join(["olmo3", *COMMAND]),
        "answer": traced["answer"],
        "way": way(traced["calls"]),
        "ready": way(traced["calls"][: traced["ready"]]),
        "opened": dict(sorted(Counter(traced["opened"]).items())),
        "options": options(checkout / "olmo3_mlx"),
        "modules": sum(1 for _ in (checkout / "olmo3_mlx").rglob("*.py")),
    }


def report(found: dict[str, Any]) -> str:
    went, ready = found["way"], found["ready"]
    lines = [
        f"{found['command']}: {found['answer']!r}",
        f"to the first token {went['steps']} steps between {went['files']} files (of {found['modules']}); "
        f"{went['every_visit']} visits with all rounds of loops",
        f"before the model runs {ready['steps']} steps between {ready['files']} files",
        f"{went['between_rooms']} steps between rooms (sub-packages; the package's own files are one each)",
        "",
        *(f"{n:5} visits {went['calls'][file]:5} calls  {file}" for file, n in went["visits"].items()),
        "",
        "the way: " + " → ".join(file.removesuffix(".py") for file in went["sequence"]),
        "",
        *(f"{n:5} times  {name}" for name, n in found["opened"].items()),
        "",
    ]
    for name, told in found["options"].items():
        more = f", in {told['signatures']} signatures" if "signatures" in told else ""
        lines.append(f"{name}: on {told['lines']} lines of {told['files']} files{more}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it there too")
    parser.add_argument("--trace", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    checkout = args.checkout.resolve()
    if args.trace is not None:
        args.trace.write_text(json.dumps(trace(checkout)))
        return
    found = measured(checkout)
    print(report(found))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

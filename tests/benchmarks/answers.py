"""What quantizing costs in answers: the share of tasks that a model answers to the letter, greedily.

    python tests/benchmarks/answers.py --rows FILE [--resume] [--shared DIR] [--gpus N [--per-gpu M]]
        [--checkpoint NAME ...] [--method NAME ...]
    python tests/benchmarks/answers.py --rows FILE --table

The tasks are those of lab/tasks.jsonl. An answer is right if it is the expected text and ends there. It is
not generated token by token: a greedy answer is the expected one if and only if at each of its positions,
all those before being as expected, the likeliest token is the expected one, and at its end one that ends a
turn; so one pass over prompt and expected answer tells. Where the likeliest token spells the expected text in
other pieces, the answer goes on from there. Weights and sums are float32. Each checkpoint and
method is a process of its own. Needs ../shared, or `--shared`.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Self

import measured_rows
import mlx.core as mx
from measured_rows import Job, Row
from ways_of_quantizing import (
    PAIRS,
    SIZE_OF_4_BITS,
    UNQUANTIZED,
    calibrated,
    dynamic,
    dynamic_row,
    dynamic_targets,
    quantize,
    rounding,
)

from olmo3_mlx import Olmo3, Tokenizer, load

CHECKPOINTS = ("olmo3-lab-chat", "olmo3-lab-wide")
TARGETS = (SIZE_OF_4_BITS, 3.8, 3.3)
_BATCH, _STEP = 8, 64  # sequences in a pass; their lengths are multiples, as CUDA plans each one anew


@dataclass(frozen=True)
class Task:
    """A prompt and the answer that is looked for, as ids; `place` is that of its line."""

    place: int
    kind: str
    prompt: list[int]
    answer: list[int]

    @classmethod
    def of(cls, place: int, line: str, tokenizer: Tokenizer) -> Self:
        task = json.loads(line)
        prompt, answer = (tokenizer.encode(task[key]) for key in ("prompt", "expected"))
        assert tokenizer.decode(answer) == task["expected"], line
        return cls(place, task["kind"], prompt, answer)

    @property
    def length(self) -> int:
        """Tokens of both, in whole steps."""
        return -(-(len(self.prompt) + len(self.answer)) // _STEP) * _STEP


def likeliest(model: Olmo3, tasks: Sequence[Task]) -> list[list[int]]:
    """The likeliest token at each position of some tasks' answers, and after them. Behind an answer there are
    zeros, which nothing before them sees.
    """
    length = max(task.length for task in tasks)
    rows = [(t.prompt + t.answer + length * [0])[:length] for t in tasks]
    found: Any = mx.argmax(model(mx.array(rows)), axis=-1).tolist()
    return [
        row[len(t.prompt) - 1 : len(t.prompt) + len(t.answer)] for t, row in zip(tasks, found, strict=True)
    ]


def judged(task: Task, said: list[int], tokenizer: Tokenizer, ends: frozenset[int]) -> bool | Task:
    """Whether the answer is right; or a task that tells, if it goes on in other pieces."""
    for place, (token, expected) in enumerate(zip(said, task.answer, strict=False)):
        if token == expected:
            continue
        piece, rest = tokenizer.decode([token]), tokenizer.decode(task.answer[place:])
        if token in ends or not piece or not rest.startswith(piece):
            return False
        return replace(task, answer=[*task.answer[:place], token, *tokenizer.encode(rest[len(piece) :])])
    return said[-1] in ends


def right(model: Olmo3, tokenizer: Tokenizer, tasks: Sequence[Task]) -> dict[int, bool]:
    """Whether each task, by its place, is answered right."""
    ends = frozenset(model.generation_config.eos_token_ids) | frozenset(tokenizer.eos_token_ids)
    found: dict[int, bool] = {}
    left = list(tasks)
    while left:
        again = []
        for _, alike in groupby(sorted(left, key=lambda task: task.length), key=lambda task: task.length):
            same = list(alike)
            for start in range(0, len(same), _BATCH):
                batch = same[start : start + _BATCH]
                for task, said in zip(batch, likeliest(model, batch), strict=True):
                    verdict = judged(task, said, tokenizer, ends)
                    if isinstance(verdict, Task):
                        again.append(verdict)
                    else:
                        found[task.place] = verdict
        left = again
    return found


def measure(args: argparse.Namespace, checkpoint: str, method: str) -> None:
    """Quantize in this process, and write a row for each result."""
    folder = args.shared / "lab" / checkpoint
    model, tokenizer = load(folder)
    model.set_dtype(mx.float32)
    lines = (args.shared / "lab" / "tasks.jsonl").read_text(encoding="utf-8").splitlines()
    tasks = [Task.of(place, line, tokenizer) for place, line in enumerate(lines)]

    def add(name: str, bits: float, seconds: float) -> None:
        found = right(model, tokenizer, tasks)
        kinds: dict[str, str] = {}
        for task in tasks:  # a digit for each task, in the file's order: results can be paired
            kinds[task.kind] = kinds.get(task.kind, "") + str(int(found[task.place]))
        row: Row = {
            "checkpoint": checkpoint,
            "name": name,
            "bits_per_weight": bits,
            "right": kinds,
            "seconds": round(seconds, 2),
            **measured_rows.machine(),
        }
        measured_rows.add(args.rows, row)

    if method == UNQUANTIZED:
        add(UNQUANTIZED, 16, 0)
        return
    for result in quantize(folder, method, TARGETS):
        model.load_weights(list(result.tensors.items()))
        add(result.name, result.bits, result.seconds)


def jobs(args: argparse.Namespace) -> list[Job]:
    methods = [UNQUANTIZED, rounding(4, 64), rounding(3, 64), *map(calibrated, TARGETS)]
    rows: dict[str, tuple[str, ...]] = {name: (name,) for name in methods}
    for pair in PAIRS:
        if targets := dynamic_targets(*pair, TARGETS):
            rows[dynamic(*pair)] = tuple(dynamic_row(*pair, target) for target in targets)
    return measured_rows.jobs(args, rows)


def print_tables(rows: Sequence[Row]) -> None:
    """A table for each checkpoint: right answers by kind in %, and in all with the standard error."""
    for checkpoint in dict.fromkeys(row["checkpoint"] for row in rows):
        mine = [row for row in rows if row["checkpoint"] == checkpoint]
        kinds = list(mine[0]["right"])
        print(f"| {checkpoint} | bits per weight | {' | '.join(kinds)} | all |")
        print("|---" * (len(kinds) + 3) + "|")
        for row in mine:
            cells = " | ".join(f"{100 * _share(row['right'][kind]):.0f}" for kind in kinds)
            every = "".join(row["right"].values())
            share = _share(every)
            error = math.sqrt(share * (1 - share) / len(every))
            print(
                f"| {row['name']} | {row['bits_per_weight']:.3f} | {cells} "
                f"| {100 * share:.1f} ± {100 * error:.1f} |"
            )
        print()


def _share(right: str) -> float:
    return right.count("1") / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    measured_rows.add_options(parser, CHECKPOINTS)
    args = parser.parse_args()
    if args.here:
        measure(args, *args.here)
    elif args.table:
        print_tables(measured_rows.read(args.rows))
    else:
        sys.exit(min(1, measured_rows.measure(args, jobs(args))))


if __name__ == "__main__":
    main()

"""Any sequence of what one does with a session: it stays exact, and runs no token that need not."""

import random
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import pytest
from test_session import PLENTY, TOLERANCE, assert_nothing, draw, model_of, rewindable, same, worst

from olmo3_mlx import Session
from olmo3_mlx.generation.loop import prefill
from olmo3_mlx.sessions.files import SessionFiles


@dataclass
class Findings:
    """What was seen to go wrong over random sequences, by kind."""

    errors: list[str] = field(default_factory=list)
    logits: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    offsets: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    budget: list[str] = field(default_factory=list)
    disk: list[str] = field(default_factory=list)
    compared: int = 0
    restored: int = 0


class RandomUse:
    """One random sequence of what one does with a session, and what is then expected of it."""

    def __init__(self, seed: int, found: Findings) -> None:
        self.rng = rng = random.Random(seed)
        self.found = found
        self.window = rng.choice([8, 128])
        self.model = model_of(self.window)
        self.bits = rng.choice([None, None, 8, 4])
        self.rewind = rng.choice([0, 0, 5, 64, 512])
        self.limit = rng.choice([0, 100_000, 1_000_000, PLENTY, PLENTY, PLENTY])
        self.disk = rng.choice([0, 300_000, PLENTY, PLENTY])
        self.folder = Path(tempfile.mkdtemp()) if rng.random() < 0.4 else None
        self.name = (
            f"seed {seed} window {self.window} bits {self.bits} rewind {self.rewind} limit {self.limit}"
        )
        self.name += f" disk {self.disk}" if self.folder else ""
        self.session = self.make()
        self.known: list[list[int]] = [[]]  # conversations, the branches
        self.marked: set[tuple[int, ...]] = set()  # where snapshots were taken
        self.passes: list[int] = []  # the lengths in which what is held was run
        self.unquantized: list[tuple[list[int], mx.array, str]] = []  # to be compared in the end
        self.step = "start"

    def make(self) -> Session:
        files = None
        if self.folder:
            files = SessionFiles(self.folder, "identity", f"{self.bits}", self.disk)
        return Session(
            self.model, snapshot_bytes=self.limit, files=files, rewind=self.rewind, kv_bits=self.bits
        )

    @property
    def remembers(self) -> bool:
        """Whether nothing is ever evicted for good."""
        return self.limit == PLENTY or (self.folder is not None and self.disk == PLENTY)

    def run(self, steps: int) -> None:
        try:
            for number in range(steps):
                does = self.rng.choice(
                    [self.append, self.append, self.edit, self.branch, self.branch, self.goto, self.reload]
                )
                self.step = f"{self.name}: step {number}, {does.__name__} at {len(self.session.tokens)}"
                does()
                self.check()
            self.compare_unquantized()
        except Exception as error:
            self.found.errors.append(f"{self.step}: {type(error).__name__}: {error}")
        finally:
            if self.folder:
                shutil.rmtree(self.folder, ignore_errors=True)

    def append(self) -> None:
        self.prefill(draw(self.rng, self.rng.randint(1, self.rng.choice([30, 300, 300]))))
        self.known.append(list(self.session.tokens))

    def prefill(self, new: list[int]) -> None:
        before = len(self.session.tokens)
        at = self.rng.choice([None, self.rng.randint(0, len(new))])
        logits = self.session.prefill(new, snapshot=at)
        self.passes += [min(256, len(new) - start) for start in range(0, len(new), 256)]
        if before + len(new) != len(self.session.tokens):
            self.found.tokens.append(self.step)
        if self.rng.random() < 0.4:
            self.compare(logits)
        if self.rng.random() < 0.6:
            self.session.snapshot()
            self.marked.add(tuple(self.session.tokens))

    def compare(self, logits: mx.array) -> None:
        """With a fresh run; a quantized one rounds as what it is given, so it is given the same passes."""
        tokens = list(self.session.tokens)
        if not self.bits:
            mx.eval(logits)
            self.unquantized.append((tokens, logits, self.step))
            return
        caches = self.model.make_caches(rewind=self.rewind, kv_bits=self.bits)
        expected, at = mx.zeros(()), 0
        for length in self.passes:
            expected = prefill(self.model, tokens[at : at + length], caches)
            at += length
        assert at == len(tokens)
        self.compared(logits, expected, self.step)

    def compare_unquantized(self) -> None:
        """With one fresh run for all texts that begin alike."""
        while left := self.unquantized:
            longest = max((tokens for tokens, _, _ in left), key=len)
            expected = self.model(mx.array([longest]))[0]
            for tokens, logits, step in left:
                if longest[: len(tokens)] == tokens:
                    self.compared(logits, expected[len(tokens) - 1], step)
            self.unquantized = [note for note in left if longest[: len(note[0])] != note[0]]

    def compared(self, logits: mx.array, expected: mx.array, step: str) -> None:
        self.found.compared += 1
        if (difference := worst(logits, expected)) > TOLERANCE:
            self.found.logits.append(f"{step}: {difference}")

    def cut(self, position: int) -> None:
        """What is held was run in these passes, if it was."""
        passes: list[int] = []
        for length in self.passes:
            if length := min(length, position - sum(passes)):
                passes.append(length)
        self.passes = passes

    def least(self, wanted: list[int]) -> int:
        """How much of `wanted` the session must be able to hold without running a token."""
        common = same(self.session.tokens, wanted)
        best = common if len(self.session.tokens) - common <= rewindable(self.session) else 0
        if self.remembers:
            marks = (len(mark) for mark in self.marked if tuple(wanted[: len(mark)]) == mark)
            mark = max(marks, default=0)
            self.found.restored += mark > best
            best = max(best, mark)
        return best

    def branch(self) -> None:
        """Go on from somewhere in some conversation."""
        known = self.rng.choice(self.known)
        stop = self.rng.choice([len(known), self.rng.randint(0, len(known))])
        self.match([*known[:stop], *draw(self.rng, self.rng.randint(1, 40))])

    def edit(self) -> None:
        """Go on from near the end of some conversation."""
        known = self.rng.choice(self.known)
        self.match([*known[: max(0, len(known) - self.rng.randint(0, 20))], *draw(self.rng, 9)])

    def match(self, wanted: list[int]) -> None:
        least, before = self.least(wanted[:-1]), list(self.session.tokens)
        held = self.session.match(wanted)
        if list(self.session.tokens) != wanted[:held] or held >= len(wanted):
            self.found.tokens.append(self.step)
        if held < least:
            self.found.runs.append(f"{self.step}: {held} of {len(wanted)} held, {least} could be")
        self.find_passes(before, wanted[:held])
        self.prefill(wanted[held:])
        self.known.append(list(self.session.tokens))

    def find_passes(self, before: list[int], now: list[int]) -> None:
        if before[: len(now)] == now:
            self.cut(len(now))
            return
        self.passes = [min(256, len(now) - start) for start in range(0, len(now), 256)]
        if self.bits:  # in which passes another branch was run is not known: begin again from there
            self.session.clear()
            self.marked.clear()
            self.passes = []
            if now:
                self.prefill(now)

    def goto(self) -> None:
        tokens = list(self.session.tokens)
        position = self.rng.randint(0, len(tokens))
        least = self.least(tokens[:position])
        ran = self.session.goto(position)
        if list(self.session.tokens) != tokens[:position]:
            self.found.tokens.append(self.step)
        if ran > position - least:
            self.found.runs.append(f"{self.step}: ran {ran} to {position}, {least} could be held")
        self.cut(position - ran)
        self.passes += [min(256, ran - start) for start in range(0, ran, 256)]

    def reload(self) -> None:
        if not self.folder:
            return
        self.session.save()
        tokens = list(self.session.tokens)
        self.session = self.make()
        self.session.resume()
        if list(self.session.tokens) != tokens:
            self.found.tokens.append(f"{self.step}: {len(self.session.tokens)} after a restart")
        self.known = [list(self.session.tokens)]
        self.marked = {tuple(self.session.tokens)}
        self.cut(len(self.session.tokens))

    def check(self) -> None:
        if {cache.offset for cache in self.session.caches} != {len(self.session.tokens)}:
            self.found.offsets.append(self.step)
        if self.session.snapshot_bytes > self.limit:
            self.found.budget.append(f"{self.step}: {self.session.snapshot_bytes}")
        if self.folder:
            total = sum(path.stat().st_size for path in self.folder.iterdir())
            if self.disk == 300_000 and total > self.disk + 40 * len(self.session.tokens) * 3 * 512:
                self.found.disk.append(f"{self.step}: {total}")


def explore(seeds: range) -> Findings:
    """Run the sequences, and see what they hold in memory and whether the budget is ever passed."""
    found = Findings()
    for seed in seeds:
        RandomUse(seed, found).run(10)
    return found


@pytest.fixture(scope="module")
def found() -> Findings:
    """What 30 random sequences show."""
    return explore(range(30))


@pytest.mark.parametrize("kind", ["errors", "logits", "tokens", "offsets", "runs", "budget", "disk"])
def test_random_sequences_are_exact_and_run_no_token_that_need_not(found: Findings, kind: str) -> None:
    assert found.compared > 60
    assert found.restored > 10
    assert_nothing(getattr(found, kind))


@pytest.mark.slow
def test_a_thousand_random_sequences_are_exact_and_run_no_token_that_need_not() -> None:
    found = explore(range(1000, 2000))
    kinds = ("errors", "logits", "tokens", "offsets", "runs", "budget", "disk")
    assert_nothing([f"{kind}: {what}" for kind in kinds for what in getattr(found, kind)])

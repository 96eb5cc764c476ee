"""How long a work still takes: measured, smoothed, in words; told of choosing bits and of calibrating."""

import sys
import time
from itertools import count
from math import prod
from pathlib import Path

import pytest
from conftest import Told, random_model
from test_calibrated import EVEN, WORDS, even_checkpoint
from test_cli_convert import Terminal
from test_target import FEW

from convert import convert as to_mlx
from convert.remaining import Remaining
from olmo3_mlx import Olmo3, Olmo3Config
from olmo3_mlx.cli.bar import progress_bar


class Clock:
    """Seconds that go on only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("convert.remaining.monotonic", clock)
    return clock


def done(left: Remaining, clock: Clock, *seconds: float) -> Remaining:
    """Parts that took so many seconds each."""
    for each in seconds:
        clock.now += each
        left.end()
    return left


def test_nothing_is_said_before_the_first_part_is_done(clock: Clock) -> None:
    left = Remaining([1, 1, 1])
    assert (left.seconds, left.in_words) == (None, "")
    assert done(left, clock, 120).seconds == 240
    assert left.in_words == ", about 4 min left"


def test_what_is_left_goes_by_the_work_that_each_part_is(clock: Clock) -> None:
    assert done(Remaining([9, 16, 23]), clock, 90).seconds == 390
    assert done(Remaining([9, 16, 23]), clock, 90, 160).seconds == pytest.approx(230)


def test_the_newest_parts_count_most_and_one_alone_does_not_decide(clock: Clock) -> None:
    left = done(Remaining([1] * 20), clock, *[100] * 9)
    before = left.seconds
    assert before == pytest.approx(1100)
    slow = done(left, clock, 300).seconds
    assert slow is not None
    assert 1100 < slow < 2000  # 10 parts at 100 to 200 seconds, and not at 300
    again = done(left, clock, *[300] * 6).seconds
    assert again is not None
    assert 4 * 240 < again < 4 * 300


def test_parts_without_work_and_time_before_a_part_begins_are_not_measured(clock: Clock) -> None:
    left = done(Remaining([0, 2, 3]), clock, 5000)
    assert (left.seconds, left.in_words) == (None, "")
    clock.now += 1000
    left.begin()
    assert done(left, clock, 100).seconds == 150


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (61, ", about 1 min left"),
        (89, ", about 1 min left"),
        (725, ", about 12 min left"),
        (89 * 60, ", about 89 min left"),
        (90 * 60, ", about 1 h 30 min left"),
        (2 * 3600 + 100, ", about 2 h left"),
        (26 * 3600 + 2500, ", about 26 h 40 min left"),
        (59, ""),
    ],
)
def test_time_is_said_as_exactly_as_it_is_known(clock: Clock, seconds: float, words: str) -> None:
    left = done(Remaining([1, 100 * seconds]), clock, 0.01)
    assert left.seconds == pytest.approx(seconds)
    assert left.in_words == words


def test_the_end_of_a_long_work_is_less_than_a_minute_away(clock: Clock) -> None:
    left = done(Remaining([3, 1, 1]), clock, 120, 40)
    assert left.in_words == ", less than a minute left"
    assert done(left, clock, 40).in_words == ""


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FEW.items():
        monkeypatch.setattr(name, value)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return even_checkpoint(tmp_path / "source", random_model(EVEN).tensors())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(WORDS.format(7 * i, i * i) for i in range(50)))
    return path


def minutes_left(told: Told, stage: str) -> list[str]:
    """What the titles of a stage's parts said behind their names, blank where they said nothing."""
    parts = [title.removeprefix(f"{stage}, ") for title in told.titles if title.startswith(f"{stage}, ")]
    return [part.partition(", ")[2] for part in parts]


def quantized_weights(prefix: str) -> int:
    layers = Olmo3(Olmo3Config.from_dict(EVEN)).quantizable()
    return sum(prod(shape) for path, shape in layers.items() if path.startswith(prefix))


def test_python_is_told_once_a_layer_is_done_while_bits_are_chosen_and_while_calibrating(
    source: Path, text: Path, tmp_path: Path, few_tokens: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, looks = Told(), count()
    # A hundred seconds pass between any two looks.
    monkeypatch.setattr("convert.remaining.monotonic", lambda: 100.0 * next(looks))
    to_mlx(source, tmp_path / "dest", calibrate=text, **told.callbacks)
    block, head = quantized_weights("model.layers.1."), quantized_weights("lm_head")
    assert minutes_left(told, "choosing bits") == ["", "", "", "about 2 min left"]  # the second of two layers
    assert minutes_left(told, "calibrating") == [
        "",  # the embedding, which is unlike the rest
        "",
        f"about {round(100 * (1 + head / block) / 60)} min left",
        f"about {round(100 * head / block / 60)} min left",
    ]


def test_layers_that_were_done_before_are_not_measured(
    source: Path, text: Path, tmp_path: Path, few_tokens: None, clock: Clock
) -> None:
    dest, recipe = tmp_path / "dest", tmp_path / "recipe.toml"
    recipe.write_text("bits = 4")
    stop = Told("calibrating", 9)  # the embedding, the seven layers of the first block, and one more
    with pytest.raises(KeyboardInterrupt):
        to_mlx(source, dest, calibrate=text, recipe=recipe, **stop.callbacks)
    told: list[str] = []

    def stage(title: str) -> None:
        told.append(title)
        clock.now += 5000  # before it begins

    def progress(*_: int) -> None:
        clock.now += 20  # at each of a block's seven layers

    to_mlx(source, dest, calibrate=text, recipe=recipe, resume=True, stage=stage, progress=progress)
    blocks = quantized_weights("model.layers.1.") / quantized_weights("lm_head")
    assert [title for title in told if title.startswith("calibrating, ")] == [
        "calibrating, past the embedding",
        "calibrating, past layer 1 of 2",
        "calibrating, layer 2 of 2",
        f"calibrating, the head, about {round(7 * 20 / blocks / 60)} min left",
    ]


def test_a_bar_leaves_the_time_to_a_stage_that_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress_bar("calibrating, layer 1 of 3") as bar:
        time.sleep(0.15)  # a bar is drawn anew ten times a second at most
        bar.progress(50, 100)
        assert "<" in terminal.getvalue()
        before = len(terminal.getvalue())
        bar.stage("calibrating, layer 3 of 3, about 12 min left")
        time.sleep(0.15)
        bar.progress(60, 100)
        bar.progress(100, 100)
        said = terminal.getvalue()[before:].partition("about 12 min left: ")
    assert "100%" in said[2]
    assert "<" not in said[2]


def test_a_log_says_the_time_that_a_stage_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("olmo3_mlx.cli.bar._LOGGED", 0.0)
    with progress_bar("calibrating, layer 1 of 3") as bar:
        bar.progress(0, 100)
        bar.progress(50, 100)
        bar.stage("calibrating, layer 3 of 3, about 12 min left")
    assert "calibrating, layer 3 of 3, about 12 min left: 50% after 0:00\n" in capsys.readouterr().err

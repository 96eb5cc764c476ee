"""Sizes that bits are chosen for, in GB: exact, never exceeded, or refused in one line."""

import json
import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import QUICK_CALIBRATION, Told, random_model
from test_calibrated import EVEN, WORDS, even_checkpoint

from convert import convert as to_mlx
from convert.calibration.allocation import allocate, extremes
from convert.conversion import Conversion
from convert.options import ConvertOptions
from convert.reading.source import Source
from convert.recipe import Plan
from convert.size import Size
from convert.target import BPW, GB, Target, asked_for
from olmo3_mlx import ConvertError, OptionError
from olmo3_mlx.quantization import Quantization

FEW: Mapping[str, Any] = {
    **QUICK_CALIBRATION,
    "convert.calibration.text._TOKENS": 256,
    "convert.calibration.text._LEAST_TOKENS": 256,
    "convert.calibration.text._LENGTH": 64,
    "convert.calibration.sensitivity._SEQUENCES": 2,
    "convert.calibration.allocation._SAMPLED_ROWS": 1,
}


def four_bits(
    source: Source, *_: object, keep: Callable[[Mapping[str, float]], None], **__: object
) -> dict[str, Quantization]:
    """Chooses four bits for every layer, at once, and keeps costs as if it had measured them."""
    layers = extremes(source)[0].layers
    keep(dict.fromkeys(layers, 0.5))
    return dict.fromkeys(layers, Quantization(4, 64))


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FEW.items():
        monkeypatch.setattr(name, value)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {name: a.astype(mx.bfloat16) for name, a in random_model(EVEN).tensors().items()}
    return even_checkpoint(tmp_path_factory.mktemp("target") / "source", tensors)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(WORDS.format(7 * i, i * i) for i in range(50)))
    return path


def ends(source: Source) -> tuple[Size, Size]:
    """The smallest and the largest result that bits can be chosen for."""
    least, most = (Conversion(source, plan, source.folder).size for plan in extremes(source))
    return least, most


def test_so_many_gb_are_as_many_bytes_as_the_number_says() -> None:
    assert Target(GB, 4.9).bytes == 4_900_000_000
    assert Target(GB, 4).bytes == 4 * 10**9
    assert Target(GB, 1.001).bytes == 1_001_000_000  # 1.001 * 1e9 is less, in floats
    assert Target(GB, 0.1 + 0.2).bytes == 300_000_000
    assert Target(GB, 1.2345678999).bytes == 1_234_567_899  # at most: a byte begun is none


def test_bits_per_weight_of_gb_are_exact_to_less_than_a_byte_at_every_size() -> None:
    draw = random.Random(0)
    for _ in range(2_000):
        parameters = draw.randrange(10**4, 10**11)
        target = Target(GB, draw.uniform(1, 16) * parameters / 8e9)
        found = Fraction(target.bits_per_weight(parameters)) * parameters / 8
        assert abs(found - target.bytes) < Fraction(1, 1000)
    assert Target(BPW, 4.5).bits_per_weight(7) == 4.5


def test_bits_chosen_for_gb_never_take_more(source: Path) -> None:
    origin, draw = Source.open(source), random.Random(0)
    least, most = ends(origin)
    costs = {path: draw.uniform(0, 1) for path in extremes(origin)[0].layers}
    for count in (least.bytes, most.bytes, draw.randint(least.bytes, most.bytes)):
        target = Target(GB, count / 1e9)
        assert target.bytes == count
        layers = allocate(origin, costs, target.bits_per_weight(origin.parameters))
        taken = Conversion(origin, Plan(layers), source).size.bytes
        assert taken <= count
        assert taken > count - 0.1 * least.bytes  # and nearly all of it
        assert taken == least.bytes or count != least.bytes


def test_a_result_takes_at_most_the_gb_that_were_asked_for(source: Path, text: Path, tmp_path: Path) -> None:
    report = to_mlx(source, tmp_path / "dest", target_gb=0.00007, calibrate=text)
    assert 66_000 < report.bytes <= 70_000
    stored = mx.load(str(tmp_path / "dest" / "model.safetensors"))
    assert isinstance(stored, dict)
    assert sum(array.nbytes for array in stored.values()) == report.bytes
    schemes = json.loads((tmp_path / "dest" / "config.json").read_text())["quantization"]
    assert any(isinstance(scheme, dict) for scheme in schemes.values())  # they were chosen


def test_gb_out_of_reach_are_refused_with_ends_that_can_be_asked_for(
    source: Path, text: Path, tmp_path: Path
) -> None:
    origin = Source.open(source)
    least, most = ends(origin)
    for asked in (1e-5, 3.0):
        with pytest.raises(ConvertError, match=r"GB cannot be reached: this model can have 0\.\d+ to ") as e:
            to_mlx(source, tmp_path / "dest", target_gb=asked, calibrate=text)
        assert str(e.value).startswith(f"{asked:g} GB cannot")
        for end in str(e.value).partition("can have ")[2].removesuffix(" GB").split(" to "):
            Target(GB, float(end)).check_reach(least, most)
            assert len(end.strip("0.")) <= 4
    assert not list(tmp_path.iterdir())


def test_the_journal_keeps_gb_as_bits_per_weight(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert.preparing.choose", four_bits)
    with pytest.raises(KeyboardInterrupt):
        to_mlx(source, tmp_path / "dest", target_gb=0.00007, calibrate=text, **Told("converting").callbacks)
    line = (tmp_path / ".dest.unfinished" / "journal.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["target"] == 70_000 * 8 / Source.open(source).parameters
    message = r"begun with target_gb=7e-05 and calibrate=.*, not target_gb=8e-05 and"
    with pytest.raises(ConvertError, match=message):
        to_mlx(source, tmp_path / "dest", target_gb=0.00008, calibrate=text, resume=True)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_gb_that_nothing_takes_are_refused(value: float) -> None:
    with pytest.raises(OptionError, match=rf"^target_gb must be above 0 and finite, not {value}$"):
        ConvertOptions(target_gb=value)
    with pytest.raises(OptionError, match=r"^target_gb must be above 0"):
        ConvertOptions(target_gb=value, calibrate=True)


def test_two_sizes_at_once_are_refused() -> None:
    with pytest.raises(OptionError, match=r"give either target_bpw=4\.5 or target_gb=4$"):
        ConvertOptions(target_bpw=4.5, target_gb=4)
    assert asked_for(None, None) is None
    assert ConvertOptions(target_gb=4).target == Target(GB, 4)
    assert ConvertOptions(target_gb=4).calibrates
    assert ConvertOptions(target_gb=4).chosen_by == "target_gb"

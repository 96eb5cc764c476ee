"""The quality card: a page, figures for programs, pictures; verdicts and advice."""

import errno
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from convert.card.page import (
    CARD,
    FIGURES,
    KL_PICTURE,
    LAYERS_PICTURE,
    Measured,
    called,
    code,
    figures,
    page,
    write_card,
)
from convert.card.pictures import kl_picture, layers_picture
from convert.card.quality import HISTOGRAM_EDGES, LayerError, Position, Quality, Size
from convert.card.verdict import Quantized, advice, verdict
from olmo3_mlx.durable import replace_file
from olmo3_mlx.errors import ConvertError
from olmo3_mlx.quantization import Quantization

WORDS = ["the ", "cat|", "`sat`", "on\n", "a", " mat", "\x1b", "\\"]


def quality(**change: Any) -> Quality:
    """What measuring a 4-bit checkpoint might give."""
    counts = [0] * (len(HISTOGRAM_EDGES) + 1)
    counts[20:24] = [10, 60, 25, 5]
    made = Quality(
        tokens=100,
        perplexity=(10.0, 10.25),
        kl_mean=0.04,
        kl_error=0.002,
        kl_median=0.03,
        kl_99=0.3,
        kl_max=1.5,
        agreement=0.92,
        probability_mean=0.012,
        probability_99=0.11,
        histogram=tuple(counts),
        worst=(
            Position(0, 1, 1.5, 1, (1, 4), (0.6, 0.3), (0.6, 0.0001)),
            Position(1, 7, 0.9, 6, (0, 0), (0.5, 0.9), (0.1, 0.05)),
        ),
        layers=(
            LayerError("embed_tokens", "embedding", 0.01, 0.01),
            LayerError("layers.0", "sliding", 0.02, 0.015),
            LayerError("layers.1", "full", 0.05, 0.06),
        ),
        sizes=(Size(1000, 2000), Size(1000, 563)),
    )
    return replace(made, **change)


@pytest.fixture
def measured() -> Measured:
    return Measured(
        original="some/original",
        result="out/result-4bit",
        text="a text",
        text_sha256="ab" * 32,
        tokens=mx.array([[0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 6]]),
        command="olmo3 compare some/original out/result-4bit",
        decode=lambda ids: "".join(WORDS[i] for i in ids),
    )


def test_a_card_is_a_page_figures_and_two_pictures_that_it_shows(tmp_path: Path, measured: Measured) -> None:
    written = write_card(tmp_path, quality(), measured)
    assert sorted(path.name for path in written) == sorted([CARD, FIGURES, LAYERS_PICTURE, KL_PICTURE])
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written}
    text = (tmp_path / CARD).read_text()
    for name in (LAYERS_PICTURE, KL_PICTURE, FIGURES):
        assert f"]({name})" in text
    assert text.startswith("# How far `result-4bit` is from `original`\n\n**Good**: ")
    assert "| bits per weight | 16.00 | 4.50 |" in text
    assert "10.250 (+2.50%)" in text
    assert "0.04000 ± 0.00200 nats" in text
    assert "| layers.1 | full | 6.000% | 5.000% |" in text
    assert f"that it names:\n\n```\n{measured.command}\n```\n" in text


def test_the_figures_are_all_there_for_programs(tmp_path: Path, measured: Measured) -> None:
    write_card(tmp_path, quality(), measured)
    found = json.loads((tmp_path / FIGURES).read_text())
    assert found["schema"] == 1
    assert found["verdict"] == "good"
    assert found["kl_mean"] == 0.04
    assert found["perplexity"] == [10.0, 10.25]
    assert found["sizes"][1] == {"parameters": 1000, "bytes": 563, "bits_per_weight": 4.504}
    assert found["layers"][2] == {"name": "layers.1", "kind": "full", "accumulated": 0.05, "added": 0.06}
    assert found["worst"][0]["actual_probability"] == [0.6, 0.0001]
    assert found["text"] == {"name": "a text", "sha256": "ab" * 32, "sequences": 2, "length": 8}
    assert len(found["histogram"]["counts"]) == len(found["histogram"]["edges"]) + 1
    assert json.loads(json.dumps(figures(quality(), measured))) == found


@pytest.mark.parametrize(
    ("device", "variable", "said"),
    [
        (mx.cpu, None, "on the CPU"),
        (mx.gpu, None, "on the GPU (matrix products perhaps in TF32)"),
        (mx.gpu, "1", "on the GPU (matrix products perhaps in TF32)"),
        (mx.gpu, "0", "on the GPU"),
    ],
)
def test_a_card_says_on_what_device_and_how_exactly_it_was_measured(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, device: Any, variable: str | None, said: str
) -> None:
    monkeypatch.setattr("convert.card.page.mx.default_device", lambda: mx.Device(device))
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    if variable is not None:
        monkeypatch.setenv("MLX_ENABLE_TF32", variable)
    assert f"in float32 {said}, and" in page(quality(), measured)
    versions = figures(quality(), measured)["versions"]
    assert versions["device"] == said[7:10].lower()
    assert versions["tf32"] == ("possible" if "TF32" in said else "off")


def test_the_same_figures_give_the_same_bytes_over_an_older_card(tmp_path: Path, measured: Measured) -> None:
    first = {path.name: path.read_bytes() for path in write_card(tmp_path, quality(), measured)}
    (tmp_path / CARD).write_text("older")
    again = {path.name: path.read_bytes() for path in write_card(tmp_path, quality(), measured)}
    assert first == again


def test_pictures_are_pngs_without_software_or_time() -> None:
    for picture in (layers_picture(quality()), kl_picture(quality())):
        assert picture.startswith(b"\x89PNG\r\n\x1a\n")
        assert b"matplotlib" not in picture.lower()
        assert b"tIME" not in picture


def test_identical_checkpoints_have_a_card_too(tmp_path: Path, measured: Measured) -> None:
    counts = (100, *[0] * len(HISTOGRAM_EDGES))
    same = quality(
        kl_mean=0.0, kl_error=0.0, kl_median=0.0, kl_99=0.0, kl_max=0.0, agreement=1.0, histogram=counts,
        layers=(LayerError("embed_tokens", "embedding", 0.0, 0.0),),
    )  # fmt: skip
    write_card(tmp_path, same, measured)
    text = (tmp_path / CARD).read_text()
    assert "**Identical**" in text
    assert "Nowhere." in text


def test_sixty_four_layers_of_a_poor_model_are_drawn() -> None:
    layers = tuple(
        LayerError(f"layers.{i}", "full" if i % 4 == 3 else "sliding", 9.0, 2.0) for i in range(64)
    )
    counts = (0, *[0] * (len(HISTOGRAM_EDGES) - 1), 100)
    for picture in (layers_picture, kl_picture):
        assert picture(quality(layers=layers, histogram=counts, kl_99=200.0))


def test_the_worst_tokens_stand_in_their_context_one_row_each(measured: Measured) -> None:
    rows = [line for line in page(quality(), measured).splitlines() if "**›**" in line]
    assert len(rows) == 3  # with the heading
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == 5
    assert rows[1].startswith(r"| 1.500 | `the ` **›** `cat\|` **‹** `` `sat`on\na mat\u001b\\ `` | ")
    assert r"`cat\|` 60.0% |" in rows[1]
    assert "`a` 30.0%; what came < 0.1% |" in rows[1]
    assert "*nothing*" in rows[2]  # nothing comes after a sequence's last token


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("word", "`word`"),
        (" word", "` word`"),
        (" word ", "`  word  `"),
        ("   ", "`   `"),
        ("a`b", "``a`b``"),
        ("`", "`` ` ``"),
        ("``x", "``` ``x ```"),
        ("a|b\nc\t", r"`a\|b\nc\t`"),
        ("", "*nothing*"),
        ("\u202e", r"`\u202e`"),
    ],
)
def test_any_text_fits_a_code_span_in_a_table(text: str, expected: str) -> None:
    assert code(text) == expected


def test_folders_and_files_are_called_by_their_own_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "model" / "inside"
    inside.mkdir(parents=True)
    (inside / "text.txt").touch()
    monkeypatch.chdir(inside)
    assert [called(name) for name in (tmp_path / "model", "..", ".", "text.txt", inside / "text.txt")] == [
        "model", "model", "inside", "text.txt", "text.txt"
    ]  # fmt: skip
    assert [called(name) for name in ("allenai/Olmo-3-7B", "demo")] == ["allenai/Olmo-3-7B", "demo"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"kl_mean": 0.001, "agreement": 0.97}, "good"),  # lab-chat in 8 bits
        ({"kl_mean": 0.0468, "agreement": 0.853}, "good"),  # 5
        ({"kl_mean": 0.196, "agreement": 0.73}, "fair"),  # 4
        ({"kl_mean": 0.8, "agreement": 0.5}, "poor"),  # 3
        ({"kl_mean": 0.04, "agreement": 0.6}, "poor"),
        ({"kl_mean": 0.3, "agreement": 0.99}, "poor"),
        ({"kl_max": 0.0, "agreement": 1.0}, "identical"),
    ],
)
def test_a_verdict_asks_for_both_divergence_and_agreement(change: dict[str, float], word: str) -> None:
    assert verdict(quality(**change)) == word


def test_advice_is_given_where_it_is_needed_and_fits_what_was_done(measured: Measured) -> None:
    assert advice(quality()) == ()
    poor = quality(kl_mean=1.0)
    assert advice(poor)[0] == "more bits: `--bits 5` (this one has 4.50 bits per weight)"
    assert "layers.1" in " ".join(advice(poor))
    assert "--bits" not in " ".join(advice(quality(kl_mean=1.0, sizes=(Size(1000, 2000), Size(1000, 1063)))))
    assert "- more bits" in page(poor, measured)
    assert advice(quality(kl_mean=1.0, sizes=(Size(1000, 2000),) * 2)) == ()  # two stages of training
    assert "To come closer" not in page(quality(), measured)


def test_a_folder_that_is_not_there_is_an_error_of_one_line(tmp_path: Path, measured: Measured) -> None:
    with pytest.raises(ConvertError, match="could not be written: No such file"):
        write_card(tmp_path / "none", quality(), measured)


def test_a_disk_that_is_full_leaves_no_half_card(
    tmp_path: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, write: Callable[[Path], object]) -> Path:
        if path.name == FIGURES:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace_file(path, write)

    write_card(tmp_path, quality(), measured)
    monkeypatch.setattr("convert.card.page.replace_file", full)
    with pytest.raises(ConvertError, match=r"^quality\.json could not be written: No space left on device$"):
        write_card(tmp_path, quality(), measured)
    assert list(tmp_path.iterdir()) == []


def made(*kinds: Quantization, **known: Any) -> Quantized:
    """Quantized so, the embedding and two layers in turn."""
    paths = ("model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    return Quantized({path: kinds[i % len(kinds)] for i, path in enumerate(paths)}, **known)


FOUR, EIGHT = Quantization(4, 64), Quantization(8, 32)
MORE, GROUPS, CALIBRATE = "more bits: `--bits", "groups", "--calibrate"
DOWN = {"model.layers.0.mlp.down_proj": 352, "model.layers.1.mlp.down_proj": 352}
RECIPE, TARGET = "where most", "--target-bpw"
BITS, CHOSEN = {"by": "bits", "calibrated": False}, {"by": "bits", "calibrated": True}
TOLD, TUNED = {"by": "recipe", "calibrated": False}, {"by": "recipe", "calibrated": True}


@pytest.mark.parametrize(
    ("how", "said", "unsaid"),
    [
        (made(FOUR, bits=4, **BITS), (MORE, GROUPS, CALIBRATE, RECIPE, TARGET), ("unless",)),
        (made(FOUR, bits=4, **BITS), ("--group-size 32`, half a bit more than 64",), ("128",)),
        (made(Quantization(4, 128), bits=4, **BITS), ("64`, a quarter of a bit more than 128",), ("unless",)),
        (made(Quantization(4, 32), bits=4, **BITS), (MORE, CALIBRATE), (GROUPS,)),
        (
            made(FOUR, bits=4, left_out=DOWN, **BITS),
            ("`--group-size 32` with more bits: 32 divides the inputs of `down_proj` too",),
            ("a bit more",),
        ),
        (
            made(Quantization(4, 128), bits=4, left_out=DOWN, **BITS),
            ("`--group-size 32` with more bits",),
            ("64", "a bit more"),
        ),
        (
            made(Quantization(4, 128), bits=4, left_out={"a.up_proj": 192}, **BITS),
            ("-size 64` with more",),
            (),
        ),
        (made(FOUR, bits=4, left_out={"a.up_proj": 80}, **BITS), ("`--group-size 32`\n",), ("a bit more",)),
        (made(FOUR, left_out=DOWN, **TOLD), ("groups of 32 in the recipe with more bits: 32 divides",), ()),
        (made(Quantization(6, 64), bits=6, **BITS), ("`--bits 8`",), ("`--bits 5`",)),
        (made(EIGHT, bits=8, **BITS), (CALIBRATE,), ("more", GROUPS, RECIPE, TARGET)),
        (made(EIGHT, bits=8, **CHOSEN), (), ("try",)),
        (made(FOUR, EIGHT, bits=4, **CHOSEN), ("`--bits 5`",), (GROUPS, CALIBRATE, RECIPE, TARGET)),
        (made(FOUR, EIGHT, bits=8, **CHOSEN), ("a larger `--target-bpw`",), (MORE, CALIBRATE)),
        (
            made(FOUR, EIGHT, by="target", calibrated=True),
            ("a larger `--target-bpw`",),
            (MORE, GROUPS, CALIBRATE),
        ),
        (
            made(FOUR, EIGHT, **TOLD),
            ("bits in the recipe (", "smaller groups in the recipe", CALIBRATE, "instead of the recipe"),
            (MORE, "`--recipe`"),
        ),
        (made(FOUR, EIGHT, **TUNED), ("in the recipe where most",), (CALIBRATE, MORE)),
        (made(EIGHT, **TUNED), (), ("try",)),
        (made(EIGHT, EIGHT, FOUR, **TOLD), ("is lost: layers.1\n",), ("embed", "layers.0")),
        (made(Quantization(4, 32, "mxfp4"), bits=4, **BITS), ("`--bits 5` in affine",), (GROUPS, TARGET)),
        (made(Quantization(8, 32, "mxfp8"), bits=8, **BITS), ("`--bits 8` in affine",), (GROUPS, TARGET)),
        (made(FOUR), (MORE, GROUPS, "`--calibrate`, unless it was", RECIPE, TARGET), ()),
        (Quantized({}, **BITS), (), ("try",)),  # a cast
    ],
)
def test_advice_is_nothing_that_was_done_or_cannot_be(
    measured: Measured, how: Quantized, said: tuple[str, ...], unsaid: tuple[str, ...]
) -> None:
    poor, measured = quality(kl_mean=1.0), replace(measured, made=how)
    tried = page(poor, measured).partition("To come closer, ")[2].partition("![")[0]
    for words in said:
        assert words in tried
    for words in unsaid:
        assert words not in tried
    assert [f"- {line}" for line in advice(poor, how)] == tried.splitlines()[2:-1]
    assert figures(poor, measured)["advice"] == list(advice(poor, how))

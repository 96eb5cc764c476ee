"""The quality card: a page, figures for programs, pictures; verdicts and advice."""

import errno
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from convert.calibration.text import CalibratedOn
from convert.card.advice import advice
from convert.card.command import CompareCommand, own_name
from convert.card.comparison import Comparison
from convert.card.evaluation import EvaluationTexts
from convert.card.markdown import code
from convert.card.method import QuantizationMethod
from convert.card.page import CARD, FIGURES, KL_PICTURE, LAYERS_PICTURE, page
from convert.card.pictures import kl_picture, layers_picture
from convert.card.quality import HISTOGRAM_EDGES, Figures, LayerError, Position, Quality
from convert.card.quality_card import write_card
from convert.card.verdict import ANCHORS, deciding, verdict
from convert.size import Size
from convert.texts.kinds import Label
from convert.texts.sequences import TextRead
from olmo3_mlx.durable import replace_file
from olmo3_mlx.errors import ConvertError
from olmo3_mlx.quantization import Quantization

TOKENS = ["the ", "cat|", "`sat`", "on\n", "a", " mat", "\x1b", "\\"]


FIGURES_OF_ALL: dict[str, Any] = {
    "tokens": 100,
    "perplexity": (10.0, 10.25),
    "perplexity_ratio": 1.025,
    "perplexity_ratio_error": 0.004,
    "kl_mean": 0.04,
    "kl_error": 0.002,
    "kl_median": 0.03,
    "kl_median_error": 0.001,
    "kl_99": 0.3,
    "kl_99_error": 0.05,
    "kl_999": 1.4,
    "kl_999_error": 0.6,
    "kl_max": 1.5,
    "agreement": 0.92,
    "agreement_error": 0.01,
    "probability_mean": 0.012,
    "probability_99": 0.11,
}


def quality(**change: Any) -> Quality:
    """What measuring a 4-bit checkpoint might give."""
    counts = [0] * (len(HISTOGRAM_EDGES) + 1)
    counts[20:24] = [10, 60, 25, 5]
    every = {name: change.get(name, value) for name, value in FIGURES_OF_ALL.items()}
    usual = Quality(
        **every,
        histogram=tuple(counts),
        worst=(
            Position(0, 1, 1.5, 1, (1, 4), (0.6, 0.3), (0.6, 0.0001), "text"),
            Position(1, 7, 0.9, 6, (0, 0), (0.5, 0.9), (0.1, 0.05), "text"),
        ),
        layers=(
            LayerError("embed_tokens", "embedding", 0.01, 0.01),
            LayerError("layers.0", "sliding", 0.02, 0.015),
            LayerError("layers.1", "full", 0.05, 0.06),
        ),
        sizes=(Size(1000, 2000), Size(1000, 563)),
        kinds={"text": Figures(**every)},
    )
    return replace(usual, **change)


def compared(**change: Any) -> Comparison:
    """What comparing a 4-bit checkpoint with its original might give."""
    texts = EvaluationTexts(
        tokens=mx.array([[0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 6]]),
        kinds=("text", "text"),
        texts=(TextRead(Label("text", "a text", "ab" * 32, "old prose"), 2, 8),),
        decode=lambda ids: "".join(TOKENS[i] for i in ids),
    )
    comparison = Comparison(quality(), texts, CompareCommand("some/original", "out/result-4bit"))
    return replace(comparison, **change)


def test_a_card_is_a_page_figures_and_two_pictures_that_it_shows(tmp_path: Path) -> None:
    written = write_card(tmp_path, compared())
    assert sorted(path.name for path in written) == sorted([CARD, FIGURES, LAYERS_PICTURE, KL_PICTURE])
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written}
    text = (tmp_path / CARD).read_text()
    for name in (LAYERS_PICTURE, KL_PICTURE, FIGURES):
        assert f"]({name})" in text
    assert text.startswith("# How far `result-4bit` is from `original`\n\n**Good**: ")
    assert "| bits per weight | 16.00 | 4.50 |" in text
    figures = [
        "0.04000 ± 0.00200", "0.03000 ± 0.00100", "0.3000 ± 0.0500", "1.400 ± 0.600", "92.00% ± 1.00%",
        "1.0250 ± 0.0040 (10.000 → 10.250)",
    ]  # fmt: skip
    assert f"| text | {' | '.join(figures)} |" in text
    assert "*all*" not in text
    assert "the 99.9th percentile of 100 positions rests on the largest value alone" in text
    assert "| layers.1 | full | 6.000% | 5.000% |" in text
    assert f"that it names:\n\n```\n{compared().command}\n```\n" in text


def test_the_figures_are_all_there_for_programs(tmp_path: Path) -> None:
    write_card(tmp_path, compared())
    found = json.loads((tmp_path / FIGURES).read_text())
    assert found["schema"] == 2
    assert found["kinds"] == {
        "text": {n: list(v) if n == "perplexity" else v for n, v in FIGURES_OF_ALL.items()}
    }
    assert found["decided_by"] == "text"
    assert found["verdict"] == "good"
    assert found["kl_mean"] == 0.04
    assert found["perplexity"] == [10.0, 10.25]
    assert found["sizes"][1] == {"parameters": 1000, "bytes": 563, "bits_per_weight": 4.504}
    assert found["layers"][2] == {"name": "layers.1", "kind": "full", "accumulated": 0.05, "added": 0.06}
    assert found["worst"][0]["actual_probability"] == [0.6, 0.0001]
    named = {"kind": "text", "name": "a text", "about": "old prose", "sha256": "ab" * 32}
    assert found["texts"] == [{**named, "sequences": 2, "length": 8}]
    assert len(found["histogram"]["counts"]) == len(found["histogram"]["edges"]) + 1
    assert json.loads(json.dumps(compared().figures())) == found


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
    monkeypatch: pytest.MonkeyPatch, device: Any, variable: str | None, said: str
) -> None:
    monkeypatch.setattr("convert.card.comparison.mx.default_device", lambda: mx.Device(device))
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    if variable is not None:
        monkeypatch.setenv("MLX_ENABLE_TF32", variable)
    assert f"in float32 {said}, and" in page(compared())
    versions = compared().figures()["versions"]
    assert versions["device"] == said[7:10].lower()
    assert versions["tf32"] == ("possible" if "TF32" in said else "off")


def test_the_same_figures_give_the_same_bytes_over_an_older_card(tmp_path: Path) -> None:
    first = {path.name: path.read_bytes() for path in write_card(tmp_path, compared())}
    (tmp_path / CARD).write_text("older")
    again = {path.name: path.read_bytes() for path in write_card(tmp_path, compared())}
    assert first == again


def test_pictures_are_pngs_without_software_or_time() -> None:
    for picture in (layers_picture(quality()), kl_picture(quality())):
        assert picture.startswith(b"\x89PNG\r\n\x1a\n")
        assert b"matplotlib" not in picture.lower()
        assert b"tIME" not in picture


def test_identical_checkpoints_have_a_card_too(tmp_path: Path) -> None:
    counts = (100, *[0] * len(HISTOGRAM_EDGES))
    same = quality(
        kl_mean=0.0, kl_error=0.0, kl_median=0.0, kl_99=0.0, kl_max=0.0, agreement=1.0, histogram=counts,
        layers=(LayerError("embed_tokens", "embedding", 0.0, 0.0),),
    )  # fmt: skip
    write_card(tmp_path, compared(quality=same))
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


def test_the_worst_tokens_stand_in_their_context_one_row_each() -> None:
    rows = [line for line in page(compared()).splitlines() if "**›**" in line]
    assert len(rows) == 3  # with the heading
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == 6
    assert rows[1].startswith(r"| 1.500 | text | `the ` **›** `cat\|` **‹** `` `sat`on\na mat\u001b\\ `` | ")
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
    assert [own_name(name) for name in (tmp_path / "model", "..", ".", "text.txt", inside / "text.txt")] == [
        "model", "model", "inside", "text.txt", "text.txt"
    ]  # fmt: skip
    assert [own_name(name) for name in ("allenai/Olmo-3-7B", "demo")] == ["allenai/Olmo-3-7B", "demo"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"kl_mean": 0.0014, "agreement": 0.977}, "good"),  # Llama 3 8B in q8_0
        ({"kl_mean": 0.0313, "agreement": 0.919}, "good"),  # q4_K_M, the last that is recommended
        ({"kl_mean": 0.0431, "agreement": 0.91}, "fair"),  # q4_K_S
        ({"kl_mean": 0.1019, "agreement": 0.86}, "poor"),  # q3_K_M, of high loss
        ({"kl_mean": 0.4451, "agreement": 0.711}, "poor"),  # q2_K
        ({"kl_mean": 0.0112, "agreement": 0.933}, "good"),  # lab-chat in 6 bits
        ({"kl_mean": 0.046, "agreement": 0.847}, "fair"),  # 5
        ({"kl_mean": 0.196, "agreement": 0.732}, "poor"),  # 4
        ({"kl_mean": 0.091, "agreement": 0.793}, "fair"),  # lab-gqa in 4
        ({"kl_mean": 0.0208, "agreement": 0.882}, "fair"),  # 5
        ({"kl_mean": 0.03, "agreement": 0.65}, "poor"),
        ({"kl_mean": 0.3, "agreement": 0.99}, "poor"),
        ({"kl_max": 0.0, "agreement": 1.0}, "identical"),
    ],
)
def test_a_verdict_asks_for_both_divergence_and_agreement(change: dict[str, float], word: str) -> None:
    assert verdict(quality(**change)) == word


@pytest.mark.parametrize(
    ("kl", "where"),
    [
        (0.0, "nearer than q8_0"),
        (0.0014, "between q8_0 and q6_K"),
        (0.0313, "between q4_K_M and q4_K_S"),
        (0.07, "between q4_K_S and q3_K_M"),
        (0.9, "farther than q2_K"),
    ],
)
def test_a_card_places_its_figure_among_published_ones_and_says_where_the_lines_lie(
    kl: float, where: str
) -> None:
    shown = page(compared(quality=quality(kl_mean=kl)))
    assert f"lies {where} of an 8B in llama.cpp's table. That places it, no more" in shown
    assert "| q4_K_M | 0.0313 | 91.9% | balanced quality, recommended |" in shown
    assert "https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/README.md" in shown
    assert "A small model's KL is not a large one's" in shown
    assert "Good is a mean KL of at most 0.04 nats with at least 90% of top tokens the same" in shown


def test_the_published_figures_ascend_and_the_lines_lie_where_it_is_said() -> None:
    assert [anchor.kl for anchor in ANCHORS] == sorted(anchor.kl for anchor in ANCHORS)
    words = [verdict(quality(kl_mean=anchor.kl, agreement=anchor.agreement or 0.95)) for anchor in ANCHORS]
    assert words == ["good"] * 4 + ["fair"] + ["poor"] * 2
    assert [anchor.name for anchor in ANCHORS if "recommended" in anchor.said][:2] == ["q5_K_M", "q4_K_M"]


def test_a_card_says_which_texts_were_read_and_what_perplexities_on_them_mean() -> None:
    shown = page(compared())
    assert "Other texts give other perplexities: what counts is the ratio of the two." in shown
    assert f"| text | old prose | 16 | `{'ab' * 8}…` |" in shown
    assert "This is one text. It says little about what is unlike it" in shown


def by_kind(**means: float) -> Quality:
    """What measuring on several kinds might give, by their mean KL."""
    kinds = {kind: Figures(**{**FIGURES_OF_ALL, "kl_mean": mean}) for kind, mean in means.items()}
    return replace(quality(), kinds=kinds, kl_mean=sum(means.values()) / len(means))


def test_the_worst_kind_of_text_decides_and_the_page_says_which() -> None:
    two = compared(quality=by_kind(prose=0.02, code=0.07, documents=0.03))
    assert two.quality.kl_mean == 0.04  # which would be good
    assert (two.verdict, two.decided_by) == ("fair", "code")
    shown = page(two)
    assert "**Fair**: " in shown
    assert "That is said of code, the kind of text on which it is farthest off." in shown
    assert "The mean KL on code, 0.0700, lies between q4_K_S and q3_K_M of an 8B" in shown
    rows = [line.split(" | ")[0] for line in shown.splitlines() if "→ 10.250) |" in line]
    assert rows == ["| prose", "| code", "| documents", "| *all*"]
    assert advice(two.quality)
    assert "That is said of" not in page(compared())


def test_a_worse_word_counts_more_than_a_larger_divergence() -> None:
    found = by_kind(prose=0.09, code=0.05)
    kinds = {**found.kinds, "code": replace(found.kinds["code"], agreement=0.7)}
    assert deciding(replace(found, kinds=kinds)) == "code"
    assert verdict(replace(found, kinds=kinds)) == "poor"


def test_a_card_of_an_older_schema_still_tells_what_was_calibrated_on(tmp_path: Path) -> None:
    file = tmp_path / FIGURES
    file.write_text('{"schema": 1, "calibration": {"name": "a.txt", "sha256": "cd", "tokens": 512}}')
    known = CalibratedOn.from_figures(file)
    assert known is not None
    assert known.in_words == "512 tokens of a.txt (SHA-256 `cd…`)"
    assert known.saw("cd")
    assert not known.saw("ab")
    texts = tuple(TextRead(Label(name, name, name * 8, ""), 4, 8) for name in ("ab", "cd"))
    file.write_text(json.dumps(compared(method=method(FOUR, calibrated_on=CalibratedOn(texts))).figures()))
    assert CalibratedOn.from_figures(file) == CalibratedOn(texts)
    for text in ("{}", '{"calibration": null}', '{"calibration": {"texts": [{}]}}', "[]", ""):
        file.write_text(text)
        assert CalibratedOn.from_figures(file) is None
    assert CalibratedOn.from_figures(tmp_path / "none") is None


def test_a_result_is_flattered_by_any_text_that_it_was_calibrated_on() -> None:
    for sha256, flattered in (("ab" * 32, True), ("ef" * 32, False)):
        on = CalibratedOn(tuple(TextRead(Label(n, n, s), 4, 8) for n, s in (("x", "cd"), ("y", sha256))))
        comparison = compared(method=method(FOUR, calibrated_on=on))
        assert comparison.flattered == flattered
        assert ("flatter the result" in page(comparison)) == flattered
        assert "calibrated on 64 tokens of 2 texts (x, y).\n\n| text | what it is |" in page(comparison)


def test_advice_is_given_where_it_is_needed_and_fits_what_was_done() -> None:
    assert advice(quality()) == ()
    poor = quality(kl_mean=1.0)
    assert advice(poor)[0] == "more bits: `--bits 5` (this one has 4.50 bits per weight)"
    assert "layers.1" in " ".join(advice(poor))
    assert "--bits" not in " ".join(advice(quality(kl_mean=1.0, sizes=(Size(1000, 2000), Size(1000, 1063)))))
    assert "- more bits" in page(compared(quality=poor))
    assert advice(quality(kl_mean=1.0, sizes=(Size(1000, 2000),) * 2)) == ()  # two stages of training
    assert "To come closer" not in page(compared())


def test_a_folder_that_is_not_there_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="could not be written: No such file"):
        write_card(tmp_path / "none", compared())


def test_a_disk_that_is_full_leaves_no_half_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, write: Callable[[Path], object]) -> Path:
        if path.name == FIGURES:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace_file(path, write)

    write_card(tmp_path, compared())
    monkeypatch.setattr("convert.card.quality_card.replace_file", full)
    with pytest.raises(ConvertError, match=r"^quality\.json could not be written: No space left on device$"):
        write_card(tmp_path, compared())
    assert list(tmp_path.iterdir()) == []


def method(*kinds: Quantization, **known: Any) -> QuantizationMethod:
    """The method that gives the embedding and two layers these schemes in turn."""
    paths = ("model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    return QuantizationMethod({path: kinds[i % len(kinds)] for i, path in enumerate(paths)}, **known)


FOUR, EIGHT = Quantization(4, 64), Quantization(8, 32)
MORE, GROUPS, CALIBRATE = "more bits: `--bits", "groups", "--calibrate"
DOWN = {"model.layers.0.mlp.down_proj": 352, "model.layers.1.mlp.down_proj": 352}
RECIPE, TARGET = "where most", "--target-bpw"
BITS: dict[str, Any] = {"chosen_by": "bits", "calibrated": False}
CHOSEN: dict[str, Any] = {"chosen_by": "bits", "calibrated": True}
TOLD, TUNED = {"chosen_by": "recipe", "calibrated": False}, {"chosen_by": "recipe", "calibrated": True}


@pytest.mark.parametrize(
    ("quantized_by", "said", "unsaid"),
    [
        (method(FOUR, bits=4, **BITS), (MORE, GROUPS, CALIBRATE, RECIPE, TARGET), ("unless",)),
        (method(FOUR, bits=4, **BITS), ("--group-size 32`, half a bit more than 64",), ("128",)),
        (
            method(Quantization(4, 128), bits=4, **BITS),
            ("64`, a quarter of a bit more than 128",),
            ("unless",),
        ),
        (method(Quantization(4, 32), bits=4, **BITS), (MORE, CALIBRATE), (GROUPS,)),
        (
            method(FOUR, bits=4, left_out=DOWN, **BITS),
            ("`--group-size 32` with more bits: 32 divides the inputs of `down_proj` too",),
            ("a bit more",),
        ),
        (
            method(Quantization(4, 128), bits=4, left_out=DOWN, **BITS),
            ("`--group-size 32` with more bits",),
            ("64", "a bit more"),
        ),
        (
            method(Quantization(4, 128), bits=4, left_out={"a.up_proj": 192}, **BITS),
            ("-size 64` with more",),
            (),
        ),
        (method(FOUR, bits=4, left_out={"a.up_proj": 80}, **BITS), ("`--group-size 32`\n",), ("a bit more",)),
        (method(FOUR, left_out=DOWN, **TOLD), ("groups of 32 in the recipe with more bits: 32 divides",), ()),
        (method(Quantization(6, 64), bits=6, **BITS), ("`--bits 8`",), ("`--bits 5`",)),
        (method(EIGHT, bits=8, **BITS), (CALIBRATE,), ("more", GROUPS, RECIPE, TARGET)),
        (method(EIGHT, bits=8, **CHOSEN), (), ("try",)),
        (method(FOUR, EIGHT, bits=4, **CHOSEN), ("`--bits 5`",), (GROUPS, CALIBRATE, RECIPE, TARGET)),
        (method(FOUR, EIGHT, bits=8, **CHOSEN), ("a larger `--target-bpw`",), (MORE, CALIBRATE)),
        (
            method(FOUR, EIGHT, chosen_by="target_gb", calibrated=True),
            ("a larger `--target-gb`",),
            (MORE, GROUPS, CALIBRATE, TARGET),
        ),
        (
            method(FOUR, EIGHT, chosen_by="target_bpw", calibrated=True),
            ("a larger `--target-bpw`",),
            (MORE, GROUPS, CALIBRATE),
        ),
        (
            method(FOUR, EIGHT, **TOLD),
            ("bits in the recipe (", "smaller groups in the recipe", CALIBRATE, "instead of the recipe"),
            (MORE, "`--recipe`"),
        ),
        (method(FOUR, EIGHT, **TUNED), ("in the recipe where most",), (CALIBRATE, MORE)),
        (method(EIGHT, **TUNED), (), ("try",)),
        (method(EIGHT, EIGHT, FOUR, **TOLD), ("is lost: layers.1\n",), ("embed", "layers.0")),
        (method(Quantization(4, 32, "mxfp4"), bits=4, **BITS), ("`--bits 5` in affine",), (GROUPS, TARGET)),
        (method(Quantization(8, 32, "mxfp8"), bits=8, **BITS), ("`--bits 8` in affine",), (GROUPS, TARGET)),
        (method(FOUR), (MORE, GROUPS, "`--calibrate`, unless it was", RECIPE, TARGET), ()),
        (QuantizationMethod({}, **BITS), (), ("try",)),  # a cast
    ],
)
def test_advice_is_nothing_that_was_done_or_cannot_be(
    quantized_by: QuantizationMethod, said: tuple[str, ...], unsaid: tuple[str, ...]
) -> None:
    poor = compared(quality=quality(kl_mean=1.0), method=quantized_by)
    tried = page(poor).partition("To come closer, ")[2].partition("![")[0]
    for phrase in said:
        assert phrase in tried
    for phrase in unsaid:
        assert phrase not in tried
    assert [f"- {line}" for line in poor.advice] == tried.splitlines()[2:-1]
    assert poor.figures()["advice"] == list(poor.advice) == list(advice(poor.quality, quantized_by))


def test_the_command_is_one_for_a_shell_with_the_options_that_were_given() -> None:
    command = CompareCommand(
        "a b", "out/b", tokens=64, length=32, text=(Path("it's.txt"), Path("b.jsonl")), revision_b="main"
    )
    assert shlex.split(str(command)) == [
        "olmo3", "compare", "a b", "out/b", "--tokens", "64", "--length", "32", "--text", "it's.txt",
        "b.jsonl", "--revision-b", "main",
    ]  # fmt: skip


def test_what_is_published_names_no_paths(tmp_path: Path) -> None:
    for name in ("a", "b", "tokenizer"):
        (tmp_path / name).mkdir()
    (tmp_path / "text").touch()
    command = CompareCommand(
        str(tmp_path / "a"), str(tmp_path / "b"), text=(tmp_path / "text",), tokenizer=tmp_path / "tokenizer"
    )
    published = compared(command=command).without_paths()
    assert str(published.command) == "olmo3 compare a b --text text --tokenizer tokenizer"
    assert (published.original, published.result) == ("a", "b")

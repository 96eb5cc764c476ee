"""Calibration in a conversion: sizes, sensible errors before the work, and going on after a stop."""

import errno
import hashlib
import io
import json
import random
import shutil
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import (
    QUICK_CALIBRATION,
    TINY,
    Told,
    cut_tokenizer,
    kill_until_there,
    random_model,
    save_checkpoint,
)

from convert import convert as to_mlx
from convert.calibration.calibration import Calibration
from convert.calibration.text import CalibrationText
from convert.card.measure import measure
from convert.reading.source import Source
from convert.recipe import named
from convert.writer.output import Output
from olmo3_mlx import (
    CheckpointError,
    ConvertError,
    MemoryFitError,
    Olmo3,
    OptionError,
    PromptError,
    Tokenizer,
    load,
)
from olmo3_mlx.cli import main

# A sliding and a full layer and a vocabulary of 512, as more of them show no more and calibrating takes time.
EVEN: dict[str, Any] = {
    **TINY,
    "vocab_size": 512,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "intermediate_size": 64,
    "eos_token_id": [510, 508],
    "dtype": "bfloat16",
}
FEW: dict[str, Any] = {
    **QUICK_CALIBRATION,
    "convert.calibration.text._TOKENS": 512,
    "convert.calibration.text._LEAST_TOKENS": 256,
    "convert.calibration.text._LENGTH": 64,
    "convert.calibration.sensitivity._SEQUENCES": 2,
    "convert.preparing._LENGTH": 64,
    "convert.calibration.allocation._SAMPLED_ROWS": 16,
}
COMING_ALONG = ["prose", "documents", "code", "mathematics", "questions", "languages"]
WORDS = "Three of four layers see a window of 4096 tokens, one sees everything, and {} is not {}. "


def even_checkpoint(folder: Path, tensors: dict[str, mx.array]) -> Path:
    save_checkpoint(folder, EVEN, tensors)
    cut_tokenizer(folder, EVEN["vocab_size"])
    return folder


@pytest.fixture(autouse=True)
def little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FEW.items():
        monkeypatch.setattr(name, value)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {name: a.astype(mx.bfloat16) for name, a in random_model(EVEN).tensors().items()}
    return even_checkpoint(tmp_path_factory.mktemp("calibrated") / "source", tensors)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(WORDS.format(7 * i, i * i) for i in range(100)))
    return path


@pytest.fixture(scope="module")
def whole(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated in one go."""
    dest = tmp_path_factory.mktemp("whole") / "dest"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FEW.items():
            patch.setattr(name, value)
        to_mlx(source, dest, calibrate=text, bits=4, **TOLD.callbacks)
    return dest


TOLD = Told()  # what `whole` told


def kl(original: Path, result: Path, text: Path) -> float:
    tokenizer = Tokenizer.from_folder(original)
    tokens = mx.array(tokenizer.encode(text.read_text())[:512]).reshape(8, 64)
    return measure(Source.open(original), Source.open(result), tokens).kl_mean


def test_calibrated_weights_come_nearer_than_rounded_ones_of_the_same_size(
    source: Path, text: Path, tmp_path: Path
) -> None:
    plain = to_mlx(source, tmp_path / "plain", bits=3)
    better = to_mlx(source, tmp_path / "better", bits=3, calibrate=text)
    assert better.bits_per_weight <= plain.bits_per_weight
    assert kl(source, tmp_path / "better", text) < 0.7 * kl(source, tmp_path / "plain", text)
    assert isinstance(load(tmp_path / "better")[0], Olmo3)
    assert (
        "Calibrated on 512 tokens of text.txt (SHA-256 `" in (tmp_path / "better" / "README.md").read_text()
    )
    assert "Rounded to nearest" in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.parametrize(("target", "dtype"), [(3.5, None), (5.5, "float32")])
def test_a_target_is_met_and_nearly_used_up_counting_scales_in_the_dtype_that_they_will_have(
    source: Path, text: Path, tmp_path: Path, target: float, dtype: str | None
) -> None:
    report = to_mlx(source, tmp_path / "dest", target_bpw=target, calibrate=text, dtype=dtype)
    assert target - 0.1 < report.bits_per_weight <= target


def test_layers_that_no_group_size_divides_are_reported_by_a_run_that_goes_on_too(
    text: Path, tmp_path: Path
) -> None:
    config = {**EVEN, "intermediate_size": 80}
    source = save_checkpoint(tmp_path / "source", config, random_model(config).tensors())
    cut_tokenizer(source, EVEN["vocab_size"])
    downs = tuple(f"model.layers.{i}.mlp.down_proj" for i in range(2))

    with pytest.raises(KeyboardInterrupt):
        to_mlx(source, tmp_path / "dest", calibrate=text, **Told("converting").callbacks)
    assert to_mlx(source, tmp_path / "dest", calibrate=text, resume=True).left_out == downs
    assert to_mlx(source, tmp_path / "again", calibrate=text).left_out == downs
    assert "| `mlp.down_proj` of all 2 layers | 32 | – | not" in (tmp_path / "dest" / "README.md").read_text()


def test_weights_that_a_narrower_dtype_cannot_hold_are_refused(
    source: Path, text: Path, tmp_path: Path
) -> None:
    tensors = random_model(EVEN).tensors()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] * 1e7
    large = even_checkpoint(tmp_path / "large", tensors)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("bits = 4\n")
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight: .* choose a wider dtype"):
        to_mlx(large, tmp_path / "dest", calibrate=text, recipe=recipe, dtype="float16")


def test_cards_say_what_was_calibrated_on_and_that_figures_from_the_same_text_flatter(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("The rain had stopped before noon, and the road was dry again. " * 90)
    flatter = "flatter the result, as it was calibrated on a text that it is measured on"
    for measured_on in (text, other):
        dest = tmp_path / measured_on.stem
        given = ["--recipe", "mixed_4_5", "--calibrate", str(text), "--text", str(measured_on)]
        assert main(["convert", str(source), str(dest), *given]) == 0
        figures = json.loads((dest / "quality.json").read_text())
        sha256 = hashlib.sha256(text.read_bytes()).hexdigest()
        assert figures["calibration"]["tokens"] == 512
        read = {"kind": "text.txt", "name": "text.txt", "about": "", "sha256": sha256}
        assert figures["calibration"]["texts"] == [{**read, "sequences": 8, "length": 64}]
        page = (dest / "QUALITY.md").read_text()
        assert f"The result was calibrated on 512 tokens of text.txt (SHA-256 `{sha256[:16]}…`)." in page
        told = capsys.readouterr().err
        assert main(["compare", str(source), str(dest), "--tokens", "64", "--text", str(measured_on)]) == 0
        for said in (page, told, capsys.readouterr().out):
            assert (flatter in said) == (measured_on == text)


def test_a_recipe_stays_as_it_is_when_calibrated(source: Path, text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('bits = 4\n[layers]\n"*.down_proj" = 6\n"model.embed_tokens" = "none"\n')
    to_mlx(source, tmp_path / "plain", recipe=recipe)
    to_mlx(source, tmp_path / "better", recipe=recipe, calibrate=text)
    plain, better = (mx.load(str(tmp_path / n / "model.safetensors")) for n in ("plain", "better"))
    assert isinstance(plain, dict)
    assert isinstance(better, dict)
    assert {n: (a.shape, a.dtype) for n, a in plain.items()} == {
        n: (a.shape, a.dtype) for n, a in better.items()
    }
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert mx.array_equal(plain[name], better[name]).item()
    name = "model.layers.1.mlp.down_proj.weight"
    assert not mx.array_equal(plain[name], better[name]).item()


def same_files(one: Path, other: Path) -> bool:
    files = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (one, other)]
    return files[0] == files[1]


@pytest.mark.parametrize(
    "stopped",
    [
        ("reading the weights", 0),
        ("choosing bits", 11),
        ("weighing bits against each other", 3),
        ("converting", 2),
        ("calibrating", 3),
        ("calibrating", 10),
    ],
)
def test_a_calibration_that_was_stopped_at_any_stage_goes_on_to_the_same_bytes(
    source: Path, text: Path, whole: Path, tmp_path: Path, stopped: tuple[str, int]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        to_mlx(source, tmp_path / "dest", calibrate=text, bits=4, **Told(*stopped).callbacks)
    with pytest.raises(ConvertError, match=r"an unfinished conversion to .* go on with resume=True"):
        to_mlx(source, tmp_path / "dest", calibrate=text, bits=4)
    told = Told()
    to_mlx(source, tmp_path / "dest", calibrate=text, bits=4, resume=True, **told.callbacks)
    assert same_files(whole, tmp_path / "dest")
    told.assert_each_stage_went_to_its_end()
    order = list(TOLD.moves)
    for stage in order[1:3]:  # what was measured, and chosen, is not again
        assert (stage in told.moves) == (order.index(stopped[0]) <= order.index(stage))


def test_a_calibration_that_was_stopped_within_a_block_goes_on_to_the_same_bytes(
    source: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = Output.write

    def killed(output: Output, weight: str, piece: dict[str, mx.array]) -> None:
        write(output, weight, piece)
        written.append(weight)
        if sum(name.endswith("proj.weight") and ".layers.1." in name for name in written) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Output, "write", killed)
        to_mlx(source, tmp_path / "dest", calibrate=text, bits=4)
    told = Told()
    to_mlx(source, tmp_path / "dest", calibrate=text, bits=4, resume=True, **told.callbacks)
    told.assert_each_stage_went_to_its_end()
    assert same_files(whole, tmp_path / "dest")


def test_costs_that_are_not_of_every_layer_are_measured_again(
    source: Path, text: Path, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        to_mlx(
            source,
            tmp_path / "dest",
            calibrate=text,
            bits=4,
            **Told("weighing bits against each other").callbacks,
        )
    journal = tmp_path / ".dest.unfinished" / "journal.jsonl"
    begun, measured = journal.read_text().splitlines()
    costs = json.loads(measured)["costs"]
    costs.popitem()
    journal.write_text(f"{begun}\n{json.dumps({'costs': costs})}\n")
    told = Told()
    to_mlx(source, tmp_path / "dest", calibrate=text, bits=4, resume=True, **told.callbacks)
    assert "choosing bits" in told.moves
    assert same_files(whole, tmp_path / "dest")


def test_a_calibration_that_also_casts_goes_on_to_the_same_bytes(text: Path, tmp_path: Path) -> None:
    wide = even_checkpoint(tmp_path / "wide", random_model(EVEN).tensors())
    (tmp_path / "recipe.toml").write_text('bits = 4\n[layers]\n"*.0.mlp.down_proj" = "none"\n')
    options: dict[str, Any] = {"calibrate": text, "recipe": tmp_path / "recipe.toml", "dtype": "bfloat16"}
    to_mlx(wide, tmp_path / "whole" / "dest", **options)
    with pytest.raises(KeyboardInterrupt):
        to_mlx(wide, tmp_path / "dest", **options, **Told("calibrating", 7).callbacks)
    to_mlx(wide, tmp_path / "dest", **options, resume=True)
    assert same_files(tmp_path / "whole" / "dest", tmp_path / "dest")


def test_another_text_does_not_go_on_with_what_one_began(source: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        to_mlx(source, tmp_path / "dest", calibrate=text, **Told("converting", 1).callbacks)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[40:] * 2)
    message = (
        r"is another one \(it was begun with bits=4 and calibrate=.*text\.txt', not .*=.*other\.txt'\): "
    )
    with pytest.raises(ConvertError, match=message):
        to_mlx(source, tmp_path / "dest", calibrate=other, resume=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_bpw": 0.5}, OptionError, "target_bpw must be above 1 and below 16"),
        ({"target_bpw": 4.5, "recipe": "x"}, OptionError, "itself, in mode affine: leave out .*recipe"),
        ({"target_bpw": 1.5}, ConvertError, r"1\.5 bits per weight cannot be reached: .* 2\.\d+ to 9\."),
        ({"target_bpw": 15}, ConvertError, r"15 bits per weight cannot be reached: .* 2\.\d+ to 9\."),
        ({"calibrate": True, "mode": "mxfp4"}, OptionError, "calibration is for affine quantization"),
        ({"calibrate": True, "bits": None}, OptionError, "nothing is quantized, .*leave out calibrate"),
        ({"calibrate": True, "keep": False}, OptionError, "leave out keep=False"),
        ({"calibrate": "no/such/file"}, OptionError, "no/such/file: the text cannot be read"),
        (
            {"calibrate": ()},
            OptionError,
            r"^calibrate must be True, False, a text file or several, not \(\)$",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(
    source: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    if "recipe" in options:
        options = {**options, "recipe": tmp_path / "recipe.toml"}
        options["recipe"].write_text("bits = 4\n")
    with pytest.raises(error, match=message):
        to_mlx(source, tmp_path / "dest", **options)
    assert not list(tmp_path.glob("*dest*"))


def test_memory_that_does_not_suffice_is_said_before_the_work(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLMO3_MEMORY", "0.5M")
    with pytest.raises(MemoryFitError, match=r"takes about \d.*, this machine has 0\.52 MB: leave out"):
        to_mlx(source, tmp_path / "dest", calibrate=text)
    assert not list(tmp_path.glob("*dest*"))
    to_mlx(source, tmp_path / "dest")


def test_a_text_too_short_to_calibrate_on_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(
        OptionError,
        match=r"short\.txt is too short: 256 tokens are needed \(4 .* it has \d: give",
    ):
        to_mlx(source, tmp_path / "dest", calibrate=tmp_path / "short.txt")


def test_several_texts_are_read_in_equal_shares_and_named(source: Path, text: Path, tmp_path: Path) -> None:
    other, chats, dest = tmp_path / "other.txt", tmp_path / "chats.jsonl", tmp_path / "dest"
    other.write_text("The rain had stopped before noon, and the road was dry again. " * 90)
    messages = [{"role": "user", "content": "Is it dry?"}, {"role": "assistant", "content": "It is."}]
    chats.write_text(f"{json.dumps(messages)}\n" * 30)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('bits = 4\n[layers]\n"*" = "none"\n"*.0.mlp.up_proj" = 4\n')
    files = [str(path) for path in (text, other, chats)]
    given = ["--recipe", str(recipe), "--text", files[1], files[2], "--calibrate", *files]
    assert main(["convert", str(source), str(dest), *given]) == 0
    figures = json.loads((dest / "quality.json").read_text())
    kinds = ["text.txt", "other.txt", "chats.jsonl"]
    assert [(t["kind"], t["sequences"]) for t in figures["calibration"]["texts"]] == [
        (kinds[0], 3), (kinds[1], 3), (kinds[2], 2)
    ]  # fmt: skip
    assert list(figures["kinds"]) == kinds[1:]
    named = f"512 tokens of 3 texts ({', '.join(kinds)})"
    for card in ("README.md", "QUALITY.md"):
        assert named in (dest / card).read_text()
        assert "| `chats.jsonl` | the file `chats.jsonl` | 128 |" in (dest / card).read_text()
    cut = CalibrationText.read([Path(file) for file in files], source, Source.open(source).config)
    assert cut.tokens.shape == (8, 64)
    assert cut.kinds == ("text.txt", "other.txt", "chats.jsonl", *kinds[:2], "chats.jsonl", *kinds[:2])


def test_conversations_get_a_share_where_there_is_a_template(source: Path, tmp_path: Path) -> None:
    config = Source.open(source).config
    counts = Counter(CalibrationText.read(None, source, config).kinds)
    assert counts.keys() == {"conversations", *COMING_ALONG}
    assert set(counts.values()) <= {1, 2}  # eight sequences among seven kinds
    base = shutil.copytree(source, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    assert Counter(CalibrationText.read(None, base, config).kinds).keys() == set(COMING_ALONG)


def test_conversations_that_cannot_be_read_are_refused_before_the_work(
    source: Path, text: Path, tmp_path: Path
) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text('[{"role": "user", "content": "Hello"}]\n\n{"messages": [{"role": "user"}]}\n')
    with pytest.raises(
        OptionError, match=r"chats\.jsonl:3: expected a text as content of the user's message"
    ):
        to_mlx(source, tmp_path / "dest", calibrate=[text, chats])
    with pytest.raises(OptionError, match=r"text\.txt is named twice: name each text once"):
        to_mlx(source, tmp_path / "dest", calibrate=[text, text])
    with pytest.raises(OptionError, match=r"is a folder: expected a text file"):
        to_mlx(source, tmp_path / "dest", calibrate=[text, tmp_path])
    (source / "chat_template.jinja").rename(tmp_path / "kept")
    try:
        with pytest.raises(OptionError, match=r"chats\.jsonl: this checkpoint has no chat template"):
            to_mlx(source, tmp_path / "dest", calibrate=[chats, text])
    finally:
        (tmp_path / "kept").rename(source / "chat_template.jinja")
    assert not list(tmp_path.glob("*dest*"))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, text: Path) -> None:
    small = {**EVEN, "vocab_size": 128, "eos_token_id": 0}
    folder = save_checkpoint(tmp_path / "small", small, random_model(small).tensors())
    with pytest.raises(PromptError, match="is outside the model's vocabulary of 128"):
        to_mlx(folder, tmp_path / "dest", calibrate=text)


def test_each_step_is_told_before_it_begins(whole: Path) -> None:
    assert TOLD.titles == [
        "reading the weights",
        "choosing bits, reading the text",
        "choosing bits, head",
        "choosing bits, layer 2 of 2",
        "choosing bits, layer 1 of 2",
        "weighing bits against each other",
        "converting",
        "calibrating",
        "calibrating, the embedding",
        "calibrating, layer 1 of 2",
        "calibrating, layer 2 of 2",
        "calibrating, the head",
        "reading back",
    ]
    TOLD.assert_each_stage_went_to_its_end()
    assert [moves[0][0] for moves in TOLD.moves.values()] == [0] * len(TOLD.moves)
    assert (
        max(b - a for (a, _), (b, _) in pairwise(TOLD.moves["choosing bits"]))
        < 0.15 * TOLD.moves["choosing bits"][0][1]
    )


def test_going_on_does_not_choose_bits_again(
    source: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        to_mlx(source, tmp_path / "dest", calibrate=text, bits=4, **Told("calibrating", 9).callbacks)

    def never(*_: object, **__: object) -> None:
        pytest.fail("chosen again")

    monkeypatch.setattr("convert.preparing.choose", never)
    monkeypatch.setattr("convert.calibration.fisher.Fisher.embedding", never)
    to_mlx(source, tmp_path / "dest", calibrate=text, bits=4, resume=True)
    name = "model.safetensors"
    assert (tmp_path / "dest" / name).read_bytes() == (whole / name).read_bytes()


def test_a_full_temporary_folder_is_named_and_the_work_goes_on(
    source: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("convert.calibration.fisher.TemporaryFile", Full)
        with pytest.raises(
            ConvertError, match=r"No space left on device in the temporary folder /.* \(TMPDIR"
        ):
            to_mlx(source, tmp_path / "dest", calibrate=text, bits=4)
    to_mlx(source, tmp_path / "dest", calibrate=text, bits=4, resume=True)
    name = "model.safetensors"
    assert (tmp_path / "dest" / name).read_bytes() == (whole / name).read_bytes()


def test_a_target_is_not_changed_on_the_way(source: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        to_mlx(source, tmp_path / "dest", calibrate=text, target_bpw=5, **Told("converting").callbacks)
    message = r"is another one \(it was begun with target_bpw=5 and calibrate=.*, not target_bpw=5\.5 .*\): "
    with pytest.raises(ConvertError, match=message):
        to_mlx(source, tmp_path / "dest", calibrate=text, target_bpw=5.5, resume=True)


def test_what_cannot_be_gone_on_with_is_refused_before_bits_are_chosen(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        to_mlx(source, tmp_path / "dest", calibrate=text, **Told("converting", 1).callbacks)
    journal = tmp_path / ".dest.unfinished" / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([lines[0].replace("olmo3-mlx ", "olmo3-mlx 0."), *lines[1:]]))
    for name in ("choose", "check_all_finite"):
        monkeypatch.setattr(f"convert.preparing.{name}", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(ConvertError, match=r"is another one \(another version of olmo3-mlx or mlx\): "):
        to_mlx(source, tmp_path / "dest", calibrate=text, resume=True)


def test_a_text_that_has_changed_is_named(source: Path, text: Path, tmp_path: Path) -> None:
    changing = tmp_path / "changing.txt"
    changing.write_text(text.read_text())
    with pytest.raises(KeyboardInterrupt):
        to_mlx(source, tmp_path / "dest", calibrate=changing, **Told("converting", 1).callbacks)
    changing.write_text(text.read_text()[40:] * 2)
    with pytest.raises(ConvertError, match=r"is another one \(the text of calibrate has changed\): "):
        to_mlx(source, tmp_path / "dest", calibrate=changing, resume=True)


def test_blocks_in_which_nothing_is_quantized_are_run_all_the_same(
    source: Path, text: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('bits = 4\n[layers]\n"model.layers.0.*" = "none"\n')
    to_mlx(source, tmp_path / "dest", calibrate=text, recipe=recipe)
    found = mx.load(str(tmp_path / "dest" / "model.safetensors"))
    assert isinstance(found, dict)
    origin, plan = Source.open(source), named(recipe).plan(Olmo3(Source.open(source).config)).layers
    tokens = CalibrationText.read([text], source, origin.config).tokens
    calibration = Calibration(origin, plan, tokens)
    calibration.embedding()
    for index in range(2):
        wanted = calibration.block(index)
    assert wanted
    for name, array in wanted.items():
        assert mx.array_equal(array, found[name]).item(), name


def test_weights_that_are_not_finite_are_refused_before_the_long_work(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = random_model(EVEN).tensors()
    broken = mx.array(tensors["model.layers.1.mlp.down_proj.weight"])
    broken[5, 7] = float("nan")
    tensors["model.layers.1.mlp.down_proj.weight"] = broken
    folder = even_checkpoint(tmp_path / "broken", tensors)
    monkeypatch.setattr("convert.preparing.choose", lambda *_, **__: pytest.fail("bits were chosen"))
    seen: list[int] = []
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        to_mlx(folder, tmp_path / "dest", calibrate=text, progress=lambda done, _: seen.append(done))
    assert 0 < seen[-1] < sum(array.size for array in tensors.values())
    assert not list(tmp_path.glob("*dest*"))


SCRIPT = f"""
import sys
from unittest import mock

from convert import convert as to_mlx

for name, value in {FEW!r}.items():
    mock.patch(name, value).start()
to_mlx(sys.argv[1], sys.argv[2], calibrate=sys.argv[3], bits=4, resume=True)
"""


@pytest.mark.slow
def test_a_calibration_killed_at_twenty_random_moments_always_gives_the_same_bytes(
    source: Path, text: Path, whole: Path, tmp_path: Path
) -> None:
    dest, moments, kills = tmp_path / "dest", random.Random(0), 0
    command = [sys.executable, "-c", SCRIPT, str(source), str(dest), str(text)]
    while kills < 20:
        shutil.rmtree(dest, ignore_errors=True)
        kills += kill_until_there(dest, command, lambda: moments.uniform(0, 2.5))
        if (dest / "journal.jsonl").exists():  # killed right after the folder got its name
            with pytest.raises(ConvertError, match="exists already and is complete"):
                to_mlx(source, dest, calibrate=text, resume=True)
        assert same_files(whole, dest)

"""olmo3 inspect: architectures, sizes, and what fits a machine."""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from command_line import Run, assert_one_line, facts
from conftest import TINY

pytestmark = pytest.mark.usefixtures("a_users_shell")

GIB = 2**30


def lines_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_inspect_shows_the_published_7b(olmo3: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLMO3_MEMORY", "16G")
    done = olmo3("inspect", "--model", "7b")
    assert (done.code, done.err) == (0, "")
    lines = lines_of(done.out)
    assert done.out.splitlines()[0] == "7b: Olmo 3, 7.30 B parameters, context 65,536 tokens"
    for part in (
        "embed_tokens 100,278 × 4,096 410.74 M 5.6%",
        "╭─ 32 blocks: (3 sliding + 1 full) × 8",
        "│ │ self_attn multi-head: 32 query heads, 32 key-value heads of 128 2.15 B 29.4%",
        "│ │ │ q_norm, k_norm: RMSNorm over all 4,096 and all 4,096, before the split into heads",
        "│ │ │ sliding_attention: sees 4,096 tokens, plain RoPE θ 500,000",
        "│ │ │ full_attention: sees all tokens, YaRN × 8 from 8,192 θ 500,000, attention factor 1.2079",
        "│ │ RMSNorm post_attention_layernorm",
        "│ │ mlp SwiGLU 4,096 → 11,008 → 4,096 4.33 B 59.3%",
        "│ │ RMSNorm post_feedforward_layernorm",
        "lm_head 4,096 → 100,278 410.74 M 5.6%",
        "weights alone 13.59 7.22 3.82",
        "This machine has 16.00 GiB for it. The largest contexts that fit, in tokens:",
    ):
        assert part.split() in lines, part
    rows = memory_rows(done.out)
    assert {label: cells[0] for label, cells in rows.items() if "tokens" in label} == {
        "4,096 tokens, bf16 caches": "2.00",
        "4,096 tokens, 8-bit caches": "1.02",
        "4,096 tokens, 4-bit caches": "0.58",
        "16,384 tokens, bf16 caches": "3.73",
        "16,384 tokens, 8-bit caches": "1.90",
        "16,384 tokens, 4-bit caches": "1.08",
        "65,536 tokens, bf16 caches": "9.73",
        "65,536 tokens, 8-bit caches": "4.94",
        "65,536 tokens, 4-bit caches": "2.81",
    }
    assert_the_sums_are_right(rows, (13.59, 7.22, 3.82), 16)
    assert [row[-1] for label, row in rows.items() if label.startswith("with ")] == ["65,536"] * 3


def memory_rows(out: str) -> dict[str, list[str]]:
    """The cells of the memory table and of the largest contexts, by the label of their line."""
    tail = out.partition("weights alone")[2].splitlines()[1:]
    split = [re.split(r" {2,}", line) for line in tail if "caches  " in line]
    return {label: cells for label, *cells in split}


def assert_the_sums_are_right(rows: dict[str, list[str]], weights: tuple[float, ...], machine: float) -> None:
    sums = {label: cells for label, cells in rows.items() if "tokens" in label}
    assert sums
    for caches, working, *totals in sums.values():
        for size, total in zip(weights, totals, strict=True):
            expected = size + float(caches) + float(working)
            assert float(total.rstrip("*")) == pytest.approx(expected, abs=0.021)
            assert total.endswith("*") == (expected > machine)


def test_inspect_shows_the_published_32b(olmo3: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLMO3_MEMORY", "32G")
    done = olmo3("inspect", "--model", "32B")
    assert done.code == 0
    lines = lines_of(done.out)
    assert done.out.startswith("32B: Olmo 3, 32.23 B parameters, context 65,536 tokens\n")
    for part in (
        "╭─ 64 blocks: (3 sliding + 1 full) × 16",
        "│ │ self_attn grouped-query: 40 query heads, 8 key-value heads of 128 4.03 B 12.5%",
        "│ │ │ q_norm, k_norm: RMSNorm over all 5,120 and all 1,024, before the split into heads",
        "weights alone 60.04* 31.90 16.89",
        "This machine has 32.00 GiB for it. The largest contexts that fit, in tokens:",
    ):
        assert part.split() in lines, part
    rows = memory_rows(done.out)
    assert_the_sums_are_right(rows, (60.04, 31.90, 16.89), 32)
    for caches in ("bf16", "8-bit", "4-bit"):
        assert rows[f"with {caches} caches"][0] == "none*"
        assert rows[f"with {caches} caches"][2] == "65,536"


def test_the_columns_of_the_memory_table_stand_apart(olmo3: Run) -> None:
    out = olmo3("inspect", "--model", "7b").out
    (head,) = [line for line in out.splitlines() if line.startswith("memory in")]
    assert re.split(r" {2,}", head.rstrip()) == [
        "memory in GiB", "caches", "working", "bf16 weights", "8-bit weights", "4-bit weights",
    ]  # fmt: skip
    assert max(len(line) for line in out.partition("memory in")[2].splitlines()) <= 100


def test_a_star_in_the_memory_table_is_explained_where_there_is_one(
    olmo3: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    legend = "* more than the 16.00 GiB that this machine has for it"
    monkeypatch.setenv("OLMO3_MEMORY", "16G")
    large = olmo3("inspect", "--model", "32b").out.splitlines()
    assert large[large.index(legend) - 1].startswith("65,536 tokens, 4-bit caches")
    assert not any("*" in line for line in olmo3("inspect", "--model", "demo").out.splitlines())


def test_inspect_says_whether_a_context_fits(olmo3: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLMO3_MEMORY", "12G")
    done = olmo3("inspect", "--model", "7b", "--context", 16384, "--kv-bits", 8)
    assert (done.code, done.err) == (0, "")
    bf16, eight, four = done.out.splitlines()[-3:]
    assert bf16.startswith("bf16 weights do not fit: a context of 16,384 tokens needs 1")
    assert eight.startswith("8-bit weights: 16,384 tokens fit in ")
    assert "caches 1.90 GiB and working space" in four
    plans = facts(olmo3("inspect", "--model", "7b", "--context", 16384, "--kv-bits", 8, "--json"))["plans"]
    assert [plan["fits"] for plan in plans.values()] == [False, True, True]
    for plan in plans.values():
        assert (plan["context"], plan["kv_bits"], plan["machine"]) == (16384, 8, 12 * GIB)
        assert plan["total"] == plan["weights"] + plan["caches"] + plan["working"]


def test_inspect_finds_the_context_for_a_precision_of_caches(
    olmo3: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLMO3_MEMORY", "8G")
    found = facts(olmo3("inspect", "--model", "7b", "--kv-bits", 8, "--json"))
    largest = {weights: contexts["8-bit"] for weights, contexts in found["largest_context"].items()}
    assert largest["bf16"] == 0 < largest["4-bit"] == found["plans"]["4-bit"]["context"]
    out = olmo3("inspect", "--model", "7b", "--kv-bits", 8).out
    assert f"4-bit weights: {largest['4-bit']:,} tokens fit in " in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--context", 0], ("--context", "0")),
        (["--context", 65537], ("context", "65,536", "65,537")),
        (["--kv-bits", 8, "--kv-group-size", 48], ("--kv-group-size", "48")),
        (["--kv-group-size", 48], ("--kv-group-size", "48")),
        (["--context", 9, "--kv-start", -1], ("--kv-start", "-1")),
    ],
)
def test_inspect_refuses_a_wrong_context_in_one_line(
    olmo3: Run, arguments: list[Any], words: tuple[str, ...]
) -> None:
    done = olmo3("inspect", "--model", "7b", *arguments)
    assert done.code == 2
    assert_one_line(done.err, "inspect")
    assert all(word in done.err for word in words)


def test_a_wrong_size_of_memory_is_told_in_one_line(olmo3: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLMO3_MEMORY", "lots")
    done = olmo3("inspect", "--model", "7b")
    assert done.code == 2
    assert_one_line(done.err, "inspect")
    assert "OLMO3_MEMORY" in done.err


@pytest.mark.parametrize(
    ("name", "parameters", "matrices"),
    [("7b", 7_298_011_136, 7_297_482_752), ("32b", 32_233_522_176, 32_232_468_480)],
)
def test_inspect_gives_json(olmo3: Run, name: str, parameters: int, matrices: int) -> None:
    found = facts(olmo3("inspect", "--model", name, "--json"))
    assert found["model"] == name
    assert list(found["parameters"]) == ["embedding", "attention", "feed-forward", "norms", "head"]
    assert sum(found["parameters"].values()) == parameters
    norms = parameters - matrices
    assert found["parameters"]["norms"] == norms
    assert found["weight_bytes"] == {
        "bf16": 2 * parameters,
        "8-bit": matrices * 17 // 16 + 2 * norms,
        "4-bit": matrices * 9 // 16 + 2 * norms,
    }
    for key in ("cache_bytes", "working_bytes"):
        assert list(found[key]) == ["bf16", "8-bit", "4-bit"]
        assert list(found[key]["4-bit"]) == ["4096", "16384", "65536"]
    assert "plans" not in found
    assert found["rope"]["full_attention"]["factor"] == 8.0
    assert found["rope"]["sliding_attention"]["rope_type"] == "default"
    assert found["layer_types"].count("full_attention") * 4 == found["num_hidden_layers"]
    assert found["machine_bytes"] > 2**28


def test_inspect_needs_only_a_config(olmo3: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    done = olmo3("inspect", "--model", tmp_path)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{tmp_path}: Olmo 3, ")
    lines = lines_of(done.out)
    for part in (
        "╭─ 4 blocks: (3 sliding + 1 full) × 1",
        "│ │ │ sliding_attention: sees 8 tokens, plain RoPE θ 10,000",
    ):
        assert part.split() in lines, part
    assert [line for line in lines if line[:2] == ["256", "tokens,"]]  # all that it has
    assert "8-bit caches" not in done.out  # heads of 16 cannot be quantized
    assert facts(olmo3("inspect", "--model", tmp_path, "--json"))["hidden_size"] == 64


def test_inspect_draws_other_architectures_as_they_are(olmo3: Run, tmp_path: Path) -> None:
    full = {
        **TINY,
        "layer_types": ["full_attention"] * 4,
        "sliding_window": None,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(full))
    out = olmo3("inspect", "--model", tmp_path).out
    assert "4 blocks: 0 sliding, 4 full" in out
    assert "embed_tokens again (tied)" in out
    assert "sliding_attention" not in out


def test_inspect_tells_how_the_demo_is_quantized(olmo3: Run) -> None:
    out = olmo3("inspect").out
    assert out.startswith(
        "demo: Olmo 3, 10.63 M parameters, context 4,096 tokens\n"
        "weights as they are: 4-bit affine, group size 64: 4.51 bits per weight\n"
    )
    assert "memory in MiB" in out
    assert "stored weights" not in out  # they are what the column of 4 bits says


def test_inspect_shows_what_a_mixed_checkpoint_takes(
    olmo3: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.toml").write_text(
        'bits = 4\n[layers]\n"*.q_proj" = 8\nlm_head = "none"\n'
        '"*.down_proj" = { bits = 3, group_size = 32 }\n'
    )
    dest = tmp_path / "dest"
    assert (
        olmo3("convert", "--no-card", tiny_checkpoint, dest, "--recipe", tmp_path / "recipe.toml").code == 0
    )
    tensors = mx.load(str(dest / "model.safetensors"))
    assert isinstance(tensors, dict)
    size = sum(array.nbytes for array in tensors.values())
    found = facts(olmo3("inspect", "--model", dest, "--json"))
    assert list(found["weight_bytes"]) == ["stored", "bf16", "8-bit", "4-bit"]
    assert found["weight_bytes"]["stored"] == size
    parameters = sum(found["parameters"].values())
    said = f"\nweights as they are: mixed, 3 to 8 bits: {8 * size / parameters:.2f} bits per weight\n"
    for there in ("all files", "config and index"):
        out = olmo3("inspect", "--model", dest).out
        assert said in out, there
        (row,) = (line for line in lines_of(out) if line[:2] == ["weights", "alone"])
        assert row[2] == f"{size / 2**20:.2f}", there
        (dest / "model.safetensors").unlink(missing_ok=True)
    (dest / "model.safetensors.index.json").unlink()
    assert "\nweights as they are: mixed, 3 to 8 bits\n" in olmo3("inspect", "--model", dest).out


def test_a_folder_named_like_a_size_is_the_folder(
    olmo3: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("7b").mkdir()
    Path("7b", "config.json").write_text(json.dumps(TINY))
    assert facts(olmo3("inspect", "--model", "7b", "--json"))["hidden_size"] == 64


def test_a_published_size_has_no_revision(olmo3: Run) -> None:
    done = olmo3("inspect", "--model", "7b", "--revision", "main")
    assert (done.code, done.out) == (2, "")
    assert_one_line(done.err, "inspect")

"""The doctor finds each kind of fault, planted here, and finds none on a machine that is right."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import record_golden
from conftest import TINY, save_checkpoint

from convert import convert
from olmo3_mlx import CheckpointError, Olmo3, UnknownNameError
from olmo3_mlx.caches.buffered import BufferedCache
from olmo3_mlx.caches.quantized import KVQuantization, Packed
from olmo3_mlx.checkpoints.checkpoint import Checkpoint
from olmo3_mlx.checkpoints.names import DEMO
from olmo3_mlx.config import FULL, SLIDING, RopeConfig
from olmo3_mlx.doctor import Finding, demo_checks, examine, kernels
from olmo3_mlx.doctor.cache_checks import CacheChecks
from olmo3_mlx.doctor.checkpoint_checks import _as_stored, roomy_dtype
from olmo3_mlx.doctor.conversion_check import conversion
from olmo3_mlx.doctor.facts import Facts
from olmo3_mlx.doctor.finding import FAILED, PASSED, SKIPPED, Check, Outcome
from olmo3_mlx.doctor.golden import GOLDEN, Golden
from olmo3_mlx.doctor.known_faults import KNOWN_FAULTS, LEAST_MLX, matching
from olmo3_mlx.doctor.machine_checks import known_faults, machine_checks, versions
from olmo3_mlx.doctor.passes import TOKENS, pass_times
from olmo3_mlx.doctor.subject import Subject
from olmo3_mlx.doctor.tolerances import LOGITS
from olmo3_mlx.model import Attention
from olmo3_mlx.rope import RotaryEmbedding
from olmo3_mlx.sessions.files import SessionFiles
from olmo3_mlx.text.chat_template import ChatTemplate

ROOT = Path(__file__).parents[1]
MAC = Facts(
    version="0.1.0",
    mlx="0.32.4",
    python="3.13.1",
    system="Darwin",
    os_version="26.1",
    chip="Apple M5 Pro",
    device="gpu",
    packages={"mlx": "0.32.4", "mlx-metal": "0.32.4"},
    tags={"mlx": "cp313-cp313-macosx_26_0_arm64", "mlx-metal": "py3-none-macosx_26_0_arm64"},
)

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden.read()


@pytest.fixture(scope="module")
def subject(golden: Golden) -> Subject:
    return Subject(Checkpoint.open("demo"), golden.ids, "float32")


@pytest.fixture
def few_tokens(monkeypatch: Patch) -> None:
    """The demo reads less, as what each check finds is tested below."""
    monkeypatch.setattr(demo_checks, "CHUNKS", {1: 3, 7: 14})
    monkeypatch.setattr(demo_checks, "DECODED", 2)
    monkeypatch.setattr("olmo3_mlx.doctor.examination._REWOUND", {"length": 12, "back": 4})
    monkeypatch.setattr("olmo3_mlx.doctor.passes.TOKENS", (1, 2))


def as_on_a_gpu(monkeypatch: Patch) -> None:
    """Its tolerances count: what is found within them is found on any machine."""
    monkeypatch.setattr("olmo3_mlx.doctor.tolerances.on_gpu", lambda: True)


def rounded_as_tf32(x: mx.array) -> mx.array:
    """Float32 numbers with ten bits behind the first one."""
    if x.dtype != mx.float32:
        return x
    return ((x.view(mx.uint32) + 0x1000) & 0xFFFFE000).view(mx.float32)


@pytest.mark.usefixtures("few_tokens")
def test_nothing_is_found_on_this_machine() -> None:
    findings = list(examine(convert=lambda source, dest: convert(source, dest, bits=8, card=False)))
    assert [finding for finding in findings if finding.status == FAILED] == []
    assert {finding.name for finding in findings if finding.status == SKIPPED} == {
        "large matrix products", "large 4-bit products"
    }  # fmt: skip
    names = [finding.name for finding in findings]
    assert len(set(names)) == len(names)
    assert "conversion" in names
    assert all(finding.advice == "" and finding.detail for finding in findings)


@pytest.mark.slow
def test_nothing_is_found_with_all_that_the_demo_reads() -> None:
    assert [finding for finding in examine() if finding.status == FAILED] == []


@pytest.mark.slow
def test_the_golden_file_is_what_its_script_records() -> None:
    assert dataclasses.asdict(record_golden.recorded()) == dataclasses.asdict(Golden.read())


def test_the_golden_file_keeps_200_ids_and_is_small(golden: Golden) -> None:
    assert len(golden.ids) - golden.prompt_tokens == 200
    assert list(golden.ids[golden.prompt_tokens :]) == list(golden.following[golden.prompt_tokens - 1 :])
    assert max(demo_checks.CHUNKS.values()) == len(golden.following)
    assert GOLDEN.stat().st_size < 40_000


# Kernels


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_products_that_are_wrong_beyond_8_rows_are_found(bits: int | None, monkeypatch: Patch) -> None:
    as_on_a_gpu(monkeypatch)
    name = "matmul" if bits is None else "quantized_matmul"
    right = getattr(mx, name)

    def wrong(x: mx.array, *args: Any, **keywords: Any) -> mx.array:
        found: mx.array = right(x, *args, **keywords)
        return found if x.shape[0] <= 8 else found[::-1]

    assert kernels.products(bits).status == PASSED
    monkeypatch.setattr(mx, name, wrong)
    outcome = kernels.products(bits)
    assert outcome.status == FAILED
    assert outcome.detail.count("(16 rows; 33 rows)") == 2  # in float32 and in bfloat16


@pytest.mark.parametrize("bits", [None, 4])
def test_large_products_are_looked_at_on_a_gpu(bits: int | None, monkeypatch: Patch) -> None:
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(kernels, "_LARGE", (64, 128))
    assert kernels.large_products(bits).status == SKIPPED
    monkeypatch.setattr(kernels, "on_gpu", lambda: True)
    assert kernels.large_products(bits).status == PASSED
    name = "matmul" if bits is None else "quantized_matmul"
    right = getattr(mx, name)

    def wrong(*args: Any, **keywords: Any) -> mx.array:
        found: mx.array = right(*args, **keywords)
        return mx.concatenate([found[:40], mx.roll(found[40:], 1, 0)])

    monkeypatch.setattr(mx, name, wrong)
    assert kernels.large_products(bits).status == FAILED


@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_without_its_mask_is_found(head_dim: int, monkeypatch: Patch) -> None:
    as_on_a_gpu(monkeypatch)
    right = mx.fast.scaled_dot_product_attention
    assert kernels.attentions(head_dim).status == PASSED
    monkeypatch.setattr(
        mx.fast,
        "scaled_dot_product_attention",
        lambda q, k, v, *, scale, mask=None: right(q, k, v, scale=scale),
    )
    outcome = kernels.attentions(head_dim)
    assert outcome.status == FAILED
    assert "(5 queries, causal; 33 queries, causal; 33 queries, window 48)" in outcome.detail


def test_a_norm_that_forgets_its_weight_is_found(monkeypatch: Patch) -> None:
    as_on_a_gpu(monkeypatch)
    right = mx.fast.rms_norm
    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, weight, eps: right(x, mx.ones_like(weight), eps))
    assert kernels.norms().status == FAILED


def test_a_rotation_by_one_position_too_many_is_found(monkeypatch: Patch) -> None:
    as_on_a_gpu(monkeypatch)
    right = mx.fast.rope
    monkeypatch.setattr(
        mx.fast, "rope", lambda x, dims, *, offset, **rest: right(x, dims, offset=offset + 1, **rest)
    )
    assert kernels.rotations().status == FAILED


def test_a_kernel_that_gives_no_number_is_found(monkeypatch: Patch) -> None:
    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, weight, eps: x * float("nan"))
    outcome = kernels.norms()
    assert outcome.status == FAILED
    assert "off by nan" in outcome.detail


# The demo


ROPES: dict[str, Callable[[RopeConfig, RopeConfig], dict[str, RopeConfig]]] = {
    "swapped": lambda plain, yarn: {SLIDING: yarn, FULL: plain},
    "no YaRN": lambda plain, yarn: {SLIDING: plain, FULL: plain},
    "YaRN everywhere": lambda plain, yarn: {SLIDING: yarn, FULL: yarn},
}


@pytest.mark.parametrize("fault", ROPES)
def test_a_wrong_rope_is_found(fault: str, golden: Golden, monkeypatch: Patch) -> None:
    as_on_a_gpu(monkeypatch)
    monkeypatch.setitem(demo_checks.CHUNKS, 7, 14)
    checkpoint = Checkpoint.open("demo")
    rope = ROPES[fault](checkpoint.config.rope[SLIDING], checkpoint.config.rope[FULL])
    wrong = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, rope=rope))
    assert demo_checks.logits(Subject(wrong, dtype="float32"), golden, 7).status == FAILED


@pytest.mark.slow
def test_a_window_that_is_off_by_one_is_found(golden: Golden) -> None:
    checkpoint = Checkpoint.open("demo")
    config = dataclasses.replace(checkpoint.config, sliding_window=127)
    subject = Subject(dataclasses.replace(checkpoint, config=config), dtype="float32")
    assert demo_checks.logits(subject, golden, 256).status == FAILED


def test_a_position_that_passes_forget_is_found(subject: Subject, golden: Golden, monkeypatch: Patch) -> None:
    monkeypatch.setitem(demo_checks.CHUNKS, 7, 14)
    assert demo_checks.logits(subject, golden, 7).status == PASSED
    right = RotaryEmbedding.__call__
    monkeypatch.setattr(
        RotaryEmbedding, "__call__", lambda self, x, offset: right(self, x, max(0, offset - 1))
    )
    outcome = demo_checks.logits(subject, golden, 7)
    assert outcome.status == FAILED
    assert "ids are others, the first at position " in outcome.detail


def test_rounding_as_a_gpu_does_is_no_fault_on_one(
    subject: Subject, golden: Golden, monkeypatch: Patch
) -> None:
    right = mx.quantized_matmul
    monkeypatch.setattr(mx, "quantized_matmul", lambda x, *a, **k: right(rounded_as_tf32(x), *a, **k))
    monkeypatch.setitem(demo_checks.CHUNKS, 7, 28)
    assert demo_checks.logits(subject, golden, 7).status == FAILED  # no CPU rounds so
    as_on_a_gpu(monkeypatch)
    assert demo_checks.logits(subject, golden, 7).status == PASSED
    assert kernels.products(4).status == PASSED


def test_the_demo_in_bfloat16_is_within_its_tolerance(golden: Golden, monkeypatch: Patch) -> None:
    monkeypatch.setitem(demo_checks.CHUNKS, 1, 4)
    subject = Subject(Checkpoint.open("demo"), golden.ids, "float32")
    subject.__dict__["as_stored"] = Subject(subject.checkpoint, golden.ids, "bfloat16")  # as on a GPU
    check = next(demo_checks.half_precision_checks(subject, golden))
    finding = check.finding()
    assert finding.status == PASSED
    assert "of at most 5.0e-01" in finding.detail


def test_logits_that_are_no_numbers_are_found(subject: Subject, golden: Golden, monkeypatch: Patch) -> None:
    monkeypatch.setattr(Subject, "run", lambda self, ids, chunk: mx.full((12, 8192), float("nan")))
    assert demo_checks.logits(subject, golden, 1).status == FAILED
    assert not golden.error(mx.full((12, 8192), float("nan"))) <= 1e9


def test_another_id_counts_as_wrong_unless_the_kept_logits_are_nearly_equal(golden: Golden) -> None:
    tied = dataclasses.replace(golden, following=[5, 6, 7], leads=[1.0, 0.1, 1.0], spreads=[4.0, 4.0, 4.0])
    assert tied.other_ids([5, 6, 7], 0.01) == ([], 0)
    assert tied.other_ids([5, 9, 7], 0.01) == ([], 1)
    assert tied.other_ids([9, 9, 9], 0.01) == ([0, 2], 1)
    assert tied.other_ids([6, 9], 1e-4, start=1) == ([2], 0)


def test_decoding_that_chooses_another_id_is_found(
    subject: Subject, golden: Golden, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(demo_checks, "DECODED", 2)
    assert demo_checks.decoding(subject, golden).status == PASSED
    monkeypatch.setattr(mx, "argmax", lambda logits, axis: mx.argsort(logits, axis=axis)[..., -2])
    outcome = demo_checks.decoding(subject, golden)
    assert outcome.status == FAILED
    assert f"position {golden.prompt_tokens - 1}" in outcome.detail


def test_a_template_that_renders_otherwise_is_found(
    subject: Subject, golden: Golden, monkeypatch: Patch
) -> None:
    assert demo_checks.template(subject.checkpoint, golden).status == PASSED
    right = ChatTemplate.render
    monkeypatch.setattr(
        ChatTemplate, "render", lambda *args, **keywords: right(*args, **keywords).replace("ü", "\\u00fc")
    )
    outcome = demo_checks.template(subject.checkpoint, golden)
    assert (outcome.status, outcome.detail) == (FAILED, f"character {golden.rendered.index('ü')} is another")


def test_a_tokenizer_that_cuts_otherwise_is_found(golden: Golden, monkeypatch: Patch) -> None:
    checkpoint = Checkpoint.open("demo")
    assert demo_checks.tokens(checkpoint, golden).status == PASSED
    monkeypatch.setattr(
        "olmo3_mlx.text.tokenizer.Tokenizer.encode", lambda self, text: [*golden.rendered_ids, 0]
    )
    assert demo_checks.tokens(checkpoint, golden).status == FAILED


def test_a_changed_file_of_the_demo_is_found(golden: Golden, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO, tmp_path / "demo"))
    assert demo_checks.files(Checkpoint.in_folder(folder), golden).status == PASSED
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(3_000_000)
        file.write(b"\x55")
    outcome = demo_checks.files(Checkpoint.in_folder(folder), golden)
    assert (outcome.status, outcome.detail) == (FAILED, "model.safetensors changed")


# Caches


def caches(subject: Subject) -> CacheChecks:
    return CacheChecks(subject, "demo", length=12, back=4, judge_bits=True)


def test_a_cache_that_goes_back_one_too_few_is_found(subject: Subject, monkeypatch: Patch) -> None:
    as_on_a_gpu(monkeypatch)
    assert caches(subject).rewound().status == PASSED
    right = BufferedCache.rewind
    monkeypatch.setattr(BufferedCache, "rewind", lambda self, count: right(self, max(0, count - 1)))
    assert caches(subject).rewound().status == FAILED


def test_a_cache_that_goes_back_to_other_keys_is_found(subject: Subject, monkeypatch: Patch) -> None:
    """Its offset is right, what it holds is not: the newest position was taken back and another put there."""
    as_on_a_gpu(monkeypatch)
    right = BufferedCache.rewind

    def wrong(self: BufferedCache, count: int) -> None:
        right(self, count + 1 if count else 0)
        if count:
            self.append(*(mx.ones((1, 4, 1, 64)) for _ in range(2)))

    monkeypatch.setattr(BufferedCache, "rewind", wrong)
    assert caches(subject).rewound().status == FAILED


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_cache_that_multiplies_wrongly_is_found(
    bits: int, subject: Subject, monkeypatch: Patch
) -> None:
    as_on_a_gpu(monkeypatch)
    right = Packed.times
    monkeypatch.setattr(
        Packed, "times", lambda self, x, *, transpose: 0.9 * right(self, x, transpose=transpose)
    )
    outcome = caches(subject).quantized(bits)
    assert outcome.status == FAILED
    assert "short passes beside a long one" in outcome.detail


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_cache_that_holds_something_else_is_found(
    bits: int, subject: Subject, monkeypatch: Patch
) -> None:
    """Long and short passes agree then: what quantizing costs gives it away."""
    as_on_a_gpu(monkeypatch)
    right = KVQuantization.encode
    monkeypatch.setattr(
        KVQuantization, "encode", lambda self, keys, values: right(self, keys, mx.roll(values, 1, 1))
    )
    assert caches(subject).quantized(bits).status == FAILED


def test_a_saved_file_that_is_damaged_is_found(subject: Subject, monkeypatch: Patch) -> None:
    assert caches(subject).saved().status == PASSED
    right = SessionFiles.commit

    def wrong(self: SessionFiles, *args: Any) -> None:
        right(self, *args)
        path = next(self.folder.glob("*.safetensors"))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(SessionFiles, "commit", wrong)
    saved = next(check for check in caches(subject) if check.name == "demo: saved caches")
    finding = saved.finding()
    assert finding.status == FAILED
    assert "was changed" in finding.detail
    assert "TMPDIR" in finding.advice


def test_pass_times_are_told_and_not_judged(subject: Subject) -> None:
    outcome = pass_times(subject)
    assert outcome.status == PASSED
    assert all(f" {count}: " in outcome.detail for count in TOKENS[1:])


# Conversion


def test_a_conversion_that_changes_weights_is_found() -> None:
    def wrong(source: Path, dest: Path) -> None:
        convert(source, dest, bits=8, card=False)
        (file,) = dest.glob("*.safetensors")
        tensors = dict(mx.load(str(file)))  # type: ignore[arg-type]
        name = "model.layers.1.mlp.up_proj.biases"
        tensors[name] = mx.roll(tensors[name], 1, 0)
        mx.eval(tensors)
        mx.save_safetensors(str(file), tensors, metadata={"format": "mlx"})

    assert conversion(wrong).status == FAILED
    assert conversion(lambda source, dest: convert(source, dest, bits=8, card=False)).status == PASSED


def test_a_conversion_that_makes_nothing_is_a_finding() -> None:
    finding = Check("conversion", lambda: conversion(lambda source, dest: None), "look").finding()
    assert finding.status == FAILED
    assert "found no config.json" in finding.detail


# The machine


def test_mlx_for_macos_26_on_an_m5_before_26_2_is_known_to_be_wrong() -> None:
    (fault,) = matching(MAC)
    assert fault.source.endswith("/4525")
    outcome = known_faults(MAC)
    assert outcome.status == FAILED
    assert fault.source in outcome.detail
    assert outcome.advice == fault.advice
    for change in (
        {"os_version": "26.2"},
        {"chip": "Apple M4 Max"},
        {"tags": {"mlx-metal": "py3-none-macosx_15_0_arm64"}},
    ):
        assert matching(dataclasses.replace(MAC, **change)) == [], change


def test_an_mlx_that_was_built_on_an_m5_is_named_and_not_judged() -> None:
    built = dataclasses.replace(MAC, packages={"mlx": "0.32.4"}, tags={}, os_version="26.5")
    (fault,) = matching(built)
    assert fault.source.endswith("/3585")
    outcome = known_faults(built)
    assert outcome.status == PASSED
    assert fault.name in outcome.detail


def test_an_older_mlx_than_needed_is_known_to_be_wrong() -> None:
    linux = {"system": "Linux", "os_version": "6.1", "chip": "AMD EPYC", "device": "cpu"}
    old = dataclasses.replace(MAC, mlx="0.31.2", packages={"mlx": "0.31.2"}, **linux)  # type: ignore[arg-type]
    assert [fault.below for fault in matching(old)] == [LEAST_MLX]
    assert f"mlx>={LEAST_MLX};" in (ROOT / "pyproject.toml").read_text()
    newer = dataclasses.replace(MAC, packages={"mlx": "0.100.0.dev1"}, **linux)  # type: ignore[arg-type]
    assert matching(newer) == []


def test_every_known_fault_says_where_it_is_described_and_what_to_do() -> None:
    for fault in KNOWN_FAULTS:
        assert fault.name and fault.source and fault.advice
        assert any((fault.package, fault.without)), fault.name


def test_parts_of_mlx_of_two_versions_are_found() -> None:
    assert versions(MAC).status == PASSED
    outcome = versions(dataclasses.replace(MAC, packages={"mlx": "0.32.4", "mlx-metal": "0.31.2"}))
    assert outcome.status == FAILED
    assert outcome.detail.startswith("mlx-metal 0.31.2 beside mlx 0.32.4")


def test_the_facts_of_this_machine_are_told_in_a_line() -> None:
    said = str(Facts.here())
    assert "mlx 0." in said and "Python 3." in said and "\n" not in said
    assert str(MAC).endswith("macOS 26.1, Apple M5 Pro (gpu)")


def test_macos_26_that_calls_itself_16_is_26(monkeypatch: Patch) -> None:
    monkeypatch.setattr("olmo3_mlx.doctor.facts.sys.platform", "darwin")
    monkeypatch.setattr("olmo3_mlx.doctor.facts.platform.mac_ver", lambda: ("16.1", ("", "", ""), "arm64"))
    assert Facts.here().os_version == "26.1"


# Checks, whatever they look at


def test_a_kernel_that_cannot_be_compiled_is_not_called_a_wrong_one() -> None:
    def look() -> Outcome:
        raise RuntimeError('Failed to compile kernel: cannot open source file "crt/mma.h"')

    finding = Check("caches", look, "cannot be trusted").finding()
    assert finding.status == FAILED
    assert "says nothing of its results" in finding.advice
    assert "trusted" not in finding.advice


def test_a_check_that_raises_is_a_finding_with_the_errors_line() -> None:
    def look() -> Outcome:
        raise RuntimeError("[metal::Device] Unable to load\n  kernel qmm")

    finding = Check("products", look, "install it anew").finding()
    assert dataclasses.replace(finding, seconds=0.0) == Finding(
        "products", FAILED, "RuntimeError: [metal::Device] Unable to load kernel qmm", "install it anew"
    )


def test_a_record_that_cannot_be_read_is_a_finding(tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "golden.json").write_text("{")
    monkeypatch.setattr(Golden.read.__func__, "__defaults__", (tmp_path / "golden.json",))  # type: ignore[attr-defined]
    monkeypatch.setattr("olmo3_mlx.doctor.examination.kernel_checks", lambda: [])
    *_, last = examine()
    assert (last.name, last.status) == ("demo: record", FAILED)
    assert last.detail.startswith("JSONDecodeError: ")


def test_a_machine_that_does_not_say_what_it_is_is_a_finding(monkeypatch: Patch) -> None:
    monkeypatch.setattr("platform.release", lambda: 1 / 0)
    monkeypatch.setattr("platform.mac_ver", lambda: 1 / 0)
    first, second, third, *_ = (check.finding() for check in machine_checks())
    assert (first.detail, first.status) == ("ZeroDivisionError: division by zero", FAILED)
    assert (second.status, third.status) == (FAILED, PASSED)


def test_an_interrupt_ends_the_examination() -> None:
    def stop() -> Outcome:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Check("products", stop, "").finding()


def test_a_demo_that_does_not_load_leaves_its_checks_out(monkeypatch: Patch) -> None:
    def broken(self: Checkpoint, dtype: object = None) -> Olmo3:
        raise CheckpointError("model.safetensors: damaged")

    monkeypatch.setattr(Checkpoint, "load", broken)
    monkeypatch.setattr("olmo3_mlx.doctor.examination.kernel_checks", lambda: [])
    findings = {finding.name: finding for finding in examine()}
    assert findings["demo: loading"].detail == "model.safetensors: damaged"
    of_demo = [finding for name, finding in findings.items() if name.startswith("demo: ")]
    assert {finding.status for finding in of_demo[2:]} == {SKIPPED}
    assert len(of_demo) > 10


def test_findings_come_one_by_one() -> None:
    findings = examine()
    assert isinstance(findings, Iterator)
    assert next(findings).name == "versions"


# Other checkpoints


def of(checkpoint: Path, monkeypatch: Patch) -> dict[str, Finding]:
    """What is found of a checkpoint alone."""
    for others in ("_of_demo", "kernel_checks"):
        monkeypatch.setattr(f"olmo3_mlx.doctor.examination.{others}", lambda: [])
    return {finding.name: finding for finding in examine(checkpoint)}


@pytest.mark.usefixtures("few_tokens")
def test_any_checkpoint_is_held_against_itself(tiny_checkpoint: Path, monkeypatch: Patch) -> None:
    found = [f for name, f in of(tiny_checkpoint, monkeypatch).items() if name.startswith("tiny: ")]
    assert [finding.name.removeprefix("tiny: ") for finding in found] == [
        "memory plan", "loading", "chat template", "passes", "rewound caches", "8-bit caches", "4-bit caches",
        "saved caches", "as it is stored", "pass times",
    ]  # fmt: skip
    assert [finding for finding in found if finding.status == FAILED] == []
    skipped = [finding.name for finding in found if finding.status == SKIPPED]
    assert skipped == ["tiny: 8-bit caches", "tiny: 4-bit caches", "tiny: as it is stored"]


def test_what_does_not_fit_is_not_loaded(tiny_checkpoint: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("OLMO3_MEMORY", "1M")
    found = of(tiny_checkpoint, monkeypatch)
    assert found["tiny: memory plan"].status == FAILED
    assert "there are 1.00 MiB" in found["tiny: memory plan"].detail
    assert found["tiny: loading"].status == SKIPPED


def half_precision(original: Path, folder: Path) -> Checkpoint:
    """The same checkpoint, stored in bfloat16."""
    tensors = Checkpoint.in_folder(original).load("bfloat16").tensors()
    return Checkpoint.in_folder(save_checkpoint(folder / "half", {**TINY, "vocab_size": 8192}, tensors))


def test_a_checkpoint_is_looked_at_in_float32_where_there_is_room(
    tiny_original: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    half = half_precision(tiny_original, tmp_path)
    needed = half.plan(context=256, dtype="float32").total
    assert Subject(half).model.dtype == mx.bfloat16
    for memory, dtype in ((2 * needed, mx.float32), (2 * needed - 2, mx.bfloat16), (needed - 1, mx.bfloat16)):
        monkeypatch.setenv("OLMO3_MEMORY", str(memory))
        assert Subject(half, dtype=roomy_dtype).model.dtype == dtype, memory


def test_a_checkpoint_that_says_something_else_as_it_is_stored_is_found(
    tiny_original: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    wide = Subject(Checkpoint.in_folder(tiny_original), dtype="float32")
    assert wide.as_stored is wide
    assert _as_stored(wide).status == SKIPPED
    narrow = Subject(half_precision(tiny_original, tmp_path), dtype="float32")
    assert _as_stored(narrow).detail.startswith("40 tokens in bfloat16, ")
    assert _as_stored(narrow).status == PASSED
    monkeypatch.setattr(
        narrow.as_stored.model, "lm_head", lambda hidden: mx.full((1, 40, 8192), float("inf"))
    )
    assert _as_stored(narrow).status == FAILED


def test_a_limit_that_is_none_is_a_finding(monkeypatch: Patch) -> None:
    monkeypatch.setenv("OLMO3_MEMORY", "plenty")
    findings = iter(examine())
    memory = next(finding for finding in findings if finding.name == "memory")
    assert memory.status == FAILED
    assert "OLMO3_MEMORY must be bytes" in memory.detail


def test_a_model_that_is_too_slow_here_is_only_loaded(tiny_checkpoint: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr("olmo3_mlx.doctor.checkpoint_checks._SLOW", 0.0)
    found = of(tiny_checkpoint, monkeypatch)
    assert found["tiny: loading"].status == PASSED
    assert found["tiny: passes"].status == SKIPPED
    assert "a token takes" in found["tiny: passes"].detail


def test_passes_that_disagree_are_found(tiny_checkpoint: Path, monkeypatch: Patch) -> None:
    right = Attention.__call__

    def wrong(self: Attention, x: mx.array, cache: Any) -> mx.array:
        return right(self, x, cache) if x.shape[1] > 1 else mx.zeros_like(x)

    monkeypatch.setattr(Attention, "__call__", wrong)
    assert of(tiny_checkpoint, monkeypatch)["tiny: passes"].status == FAILED


def test_weights_that_lead_to_no_number_are_found(tiny_checkpoint: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(Olmo3, "__call__", lambda self, tokens: mx.full((1, 1, 8192), float("inf")))
    found = of(tiny_checkpoint, monkeypatch)
    assert found["tiny: loading"].status == FAILED
    assert "NaN or infinite" in found["tiny: loading"].detail


def test_a_name_that_is_no_checkpoint_is_refused_before_anything_is_looked_at() -> None:
    with pytest.raises(UnknownNameError):
        examine("no/such/model/here")


@pytest.mark.parametrize("model", [None, "demo"])
def test_a_revision_of_the_demo_is_refused(model: str | None) -> None:
    with pytest.raises(CheckpointError, match="revision='main' is for hub ids"):
        examine(model, revision="main")


def test_tolerances_of_bfloat16_are_the_widest() -> None:
    assert LOGITS.of(mx.float32) < LOGITS.of(mx.bfloat16) == LOGITS.of(mx.float16)

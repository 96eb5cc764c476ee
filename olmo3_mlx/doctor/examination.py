"""Everything that is looked at, in its order."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from olmo3_mlx.checkpoints.checkpoint import Checkpoint
from olmo3_mlx.checkpoints.names import is_hub_id
from olmo3_mlx.doctor.cache_checks import CacheChecks
from olmo3_mlx.doctor.checkpoint_checks import checkpoint_checks, loading_check, plan_check, roomy_dtype
from olmo3_mlx.doctor.conversion_check import ADVICE, Conversion, conversion
from olmo3_mlx.doctor.demo_checks import demo_checks, half_precision_checks
from olmo3_mlx.doctor.finding import PASSED, Check, Finding, Outcome
from olmo3_mlx.doctor.golden import Golden
from olmo3_mlx.doctor.kernels import kernel_checks
from olmo3_mlx.doctor.machine_checks import machine_checks
from olmo3_mlx.doctor.passes import pass_times
from olmo3_mlx.doctor.subject import Subject
from olmo3_mlx.doctor.tolerances import on_gpu

_REWOUND = {"length": 132, "back": 8}  # beyond the demo's window of 128


def examine(
    model: str | Path | None = None, *, revision: str | None = None, convert: Conversion | None = None
) -> Iterator[Finding]:
    """Look at this machine, and yield what is found, one thing after the other: versions and what is known of
    them, memory, kernels against their definitions, the embedded demo against what it says elsewhere, its
    caches, a conversion, and times.

    With `model`, a checkpoint's folder or a hub id at `revision`, that checkpoint is looked at too: whether
    it fits, is whole and agrees with itself. `convert` turns the checkpoint in a folder into one of 8 bits in
    another, `lambda source, dest: convert.convert(source, dest, bits=8, card=False)`; without it no
    conversion is looked at.

    What a check runs into is its finding. Raises CheckpointError, HubError or ConfigError, before anything
    is looked at, if there is no such checkpoint.
    """
    if revision is None and (model is None or model == "demo"):
        return _examined(None, "demo", convert)
    other = Checkpoint.open(model or "demo", revision)
    # A folder's path is nobody's business who reads a report.
    return _examined(other, str(model) if is_hub_id(str(model)) else other.folder.name, convert)


def _examined(other: Checkpoint | None, name: str, convert: Conversion | None) -> Iterator[Finding]:
    yield from (check.finding() for check in machine_checks())
    yield from (check.finding() for check in kernel_checks())
    yield from _of_demo()
    if convert is not None:
        yield Check("conversion", partial(conversion, convert), ADVICE).finding()
    if other is not None:
        yield from _of_checkpoint(other, name)


def _of_demo() -> Iterator[Finding]:
    opened = Check("demo: record", _recorded, "install olmo3-mlx anew").finding()
    yield opened
    if opened.status != PASSED:
        return
    golden = Golden.read()
    # In float32, whatever the device: in bfloat16 rounding is as large as some faults.
    demo = Subject(Checkpoint.open("demo"), golden.ids, "float32")
    checks = [*demo_checks(demo, golden), *CacheChecks(demo, "demo", **_REWOUND, judge_bits=True)]
    if on_gpu():
        checks += half_precision_checks(demo, golden)
    checks += [Check("demo: pass times", lambda: pass_times(demo.as_stored), "report it with all of this")]
    yield from _in_turn([Check("demo: loading", demo.load, "install olmo3-mlx anew")], checks)


def _recorded() -> Outcome:
    """That what the demo should say can be read, and that there is a demo."""
    ids = len(Golden.read().ids)
    return Outcome(PASSED, f"{ids} ids, and a model of {len(Checkpoint.open('demo').headers)} tensors")


def _of_checkpoint(checkpoint: Checkpoint, name: str) -> Iterator[Finding]:
    subject = Subject(checkpoint, dtype=roomy_dtype)
    needed = [plan_check(checkpoint, name), loading_check(subject, name)]
    return _in_turn(needed, checkpoint_checks(subject, name))


def _in_turn(needed: list[Check], others: Iterable[Check]) -> Iterator[Finding]:
    """The first ones, then the others if all of those passed."""
    missing = ""
    for check in needed:
        finding = check.skipped(missing) if missing else check.finding()
        yield finding
        if finding.status != PASSED:
            missing = missing or f"after {check.name}"
    for check in others:
        yield check.skipped(missing) if missing else check.finding()

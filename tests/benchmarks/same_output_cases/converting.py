"""Converting: every form, every refusal, and going on with what was stopped."""

from collections.abc import Iterator

from same_output_cases.case import GREEDY, SUM, Case, bash, group, step
from same_output_cases.materials import DAMAGED

WRONG_OPTIONS = {
    "a recipe and bits": "--recipe mixed_4_6 --bits 4",
    "a recipe and groups": "--recipe mixed_4_6 --group-size 32",
    "a recipe and a mode": "--recipe mixed_4_6 --mode mxfp4",
    "a target and bits": "--target-bpw 5 --bits 4",
    "a target and groups": "--target-bpw 5 --group-size 32",
    "a target and a recipe": "--target-bpw 5 --recipe mixed_4_6",
    "a target and a mode": "--target-bpw 5 --mode mxfp4",
    "a target of 0": "--target-bpw 0",
    "a target of 0 and bits": "--target-bpw 0 --bits 4",
    "a target of 17": "--target-bpw 17",
    "a target of nan": "--target-bpw nan",
    "a target out of reach": "--target-bpw 1.2",
    "a target in GB and bits": "--target-gb 0.003 --bits 4",
    "two targets": "--target-gb 0.003 --target-bpw 5",
    "a target of 0 GB": "--target-gb 0",
    "a target in GB out of reach": "--target-gb 4",
    "a recipe of a cast": "--dtype float16 --save-recipe recipe.toml",
    "a recipe where something is": "--save-recipe prose.txt",
    "a recipe nowhere": "--save-recipe nosuch/recipe.toml",
    "a recipe that is not quantized": "--recipe tiny",
    "calibrating a mode": "--calibrate --mode mxfp4",
    "calibrating on nothing": "--calibrate=",
    "calibrating on no file": "--calibrate=nonexistent.txt",
    "calibrating on little": "--calibrate=short.txt",
    "calibrating a cast": "--calibrate --dtype float16 --no-keep",
    "calibrating and no-keep": "--calibrate --no-keep",
    "bits of a mode": "--mode mxfp4 --bits 8",
    "groups of a mode": "--mode nvfp4 --group-size 64",
    "a cast with groups": "--dtype float16 --group-size 32",
    "a cast and a text": "--dtype float16 --text prose.txt",
    "a text without a card": "--no-card --text prose.txt",
    "a card and no-keep": "--card --no-keep",
    "no-keep of a folder": "--no-keep",
    "a revision of a folder": "--revision main",
    "no recipe": "--recipe nosuch",
    "no text": "--text nonexistent.txt",
    "a text that is none": "--text latin1.txt",
    "no tokenizer": "--tokenizer nonexistent",
    "a tokenizer without one": "--tokenizer no-tokenizer",
    "groups that divide nothing": "--group-size 128",
    "an upload without an owner": "--upload name",
    "an upload of no name": "--upload a/b/c",
    "an upload, offline": "--upload you/olmo3",
}
WRONG_PLACES = {
    "no such folder": "convert no/such/folder dest",
    "a file": "convert prose.txt dest",
    "offline": "convert allenai/Olmo-3-7B-Instruct dest",
    "quantizing twice": "convert demo dest",
    "quantizing twice by a recipe": "convert demo dest --recipe mixed_4_6",
    "calibrating what is quantized": "convert demo dest --calibrate",
    "dest exists": "convert tiny even",
    "dest exists, resume": "convert tiny even --resume",
    "dest is a file": "convert tiny prose.txt",
    "dest below a file": "convert tiny prose.txt/dest",
    "dest has no name": "convert tiny /",
    "dest is ..": "convert tiny ..",
    "dest is empty": 'convert tiny ""',
    "dest of nobody": "convert tiny ~nosuchuser/dest",
    "too long a name": f"convert tiny {'x' * 250}",
}


def cases() -> Iterator[Case]:
    yield from forms()
    yield from whole()
    yield from wrong()
    yield from damaged()
    yield from stopped()
    yield from calibrated()


def forms() -> Iterator[Case]:
    options = {
        "default bits": "",
        "bits 8": "--bits 8",
        "bits 2, group 32": "--bits 2 --group-size 32",
        "bits 5": "--bits 5 --group-size 32",
        "mxfp4": "--mode mxfp4",
        "mxfp8": "--mode mxfp8",
        "nvfp4": "--mode nvfp4",
        "mixed_4_6": "--recipe mixed_4_6",
        "mixed_3_5": "--recipe mixed_3_5",
        "a recipe": "--recipe mixed.toml",
        "a recipe, groups of 64": "--recipe group64.toml",
        "bfloat16 alone": "--dtype bfloat16",
        "float16 alone": "--dtype float16",
        "bfloat16 and bits": "--dtype bfloat16 --bits 6",
        "the demo's tokenizer": "--tokenizer demo",
    }
    lines = {f"even, {w}": f"convert even dest {o} --no-card" for w, o in options.items()}
    uneven = ("default bits", "mxfp4", "nvfp4", "mixed_4_6", "a recipe, groups of 64")  # leaves layers out
    lines |= {f"tiny, {w}": f"convert tiny dest {options[w]} --no-card" for w in uneven}
    yield from group("convert", lines)
    yield from group(
        "convert",
        {
            "sharded": "convert sharded dest --group-size 32 --no-card",
            "native": "convert native dest --group-size 32 --no-card --tokenizer demo",
            "native, cast": "convert native dest --dtype bfloat16",
            "no tokenizer": "convert no-tokenizer dest --group-size 32",
            "missing parents": "convert tiny a/b/dest --group-size 32 --no-card",
            "a text too short to measure on": "convert tiny dest --group-size 32 --text short.txt",
            "nothing to resume": "convert tiny dest --group-size 32 --no-card --resume",
        },
    )
    labs = ("chat", "gqa", "draft", "wide")
    yield from group(
        "convert lab", {name: f"convert olmo3-lab-{name} dest --no-card" for name in labs}, needs="lab"
    )


def whole() -> Iterator[Case]:
    """With cards, and the result is run."""
    yield Case("convert: a card", (step("convert tiny dest --group-size 32"), step("inspect --model dest")))
    yield Case(
        "convert: a card of a cast, on a text",
        (step("convert tiny dest --dtype bfloat16 --card --text prose.txt"),),
    )
    yield Case(
        "convert: the demo, dequantized, quantized and run",
        (
            step("convert demo plain --dtype bfloat16"),
            step("convert plain dest --no-card"),
            step(f"generate {SUM} --model dest {GREEDY} --json"),
            step("inspect --model plain"),
            step("convert dest again"),
            step("convert dest plain"),
            step("convert dest cast --dtype float16 --no-card"),
            step("convert plain plain"),
            step("convert plain prose.txt"),
        ),
    )


def wrong() -> Iterator[Case]:
    lines = {name: f"convert tiny dest {options}" for name, options in WRONG_OPTIONS.items()}
    lines |= {
        name: f"convert tiny dest --recipe {name}"
        for name in (
            "nobits.toml",
            "broken.toml",
            "unknown.toml",
            "rule.toml",
            "nomatch.toml",
            "tiny",
        )
    }
    yield from group("convert wrong", lines | WRONG_PLACES)


def damaged() -> Iterator[Case]:
    fine = ("large", "generation-set", "other-tokenizer", "heads-5", "no-tokenizer", "no-template")
    names = [name for name in DAMAGED if name not in fine]
    yield from group("convert damaged", {n: f"convert {n} dest --group-size 32 --no-card" for n in names})
    yield from group("convert damaged", {"too large": "convert large dest --dtype float16"})


def stopped() -> Iterator[Case]:
    """A file may not grow beyond half of the result, as on a full disk; then it may."""
    plain = "convert tiny dest --group-size 32 --no-card"
    full = bash(f"ulimit -f 400; $OLMO3 {plain}", first=True)
    yield Case("resume: a file that cannot grow", (bash(f"ulimit -f 400; $OLMO3 {plain}"),))
    yield Case(
        "resume: what BEFORE began is finished", (full, step(f"{plain} --resume"), step(f"{plain} --resume"))
    )
    yield Case(
        "resume: without being asked, and another one",
        (
            full,
            step(plain),
            step(f"{plain} --bits 8 --resume"),
            step(f"{plain} --tokenizer bad-tokenizer --resume"),
            step("convert even dest --group-size 32 --no-card --resume"),
            step("convert tiny dest --recipe mixed.toml --no-card --resume"),
            step("convert tiny dest --target-bpw 6 --no-card --resume"),
            step(f"{plain} --resume"),
        ),
    )
    yield Case(
        "resume: a damaged journal",
        (
            full,
            bash("truncate -s -9 .dest.unfinished/journal.jsonl"),
            step(f"{plain} --resume"),
        ),
    )
    yield Case(
        "resume: no journal",
        (
            full,
            bash("rm .dest.unfinished/journal.jsonl; touch .dest.unfinished/left"),
            step(plain),
        ),
    )
    # Killed when a dozen weights are written, more or less: what was done then is not compared, the end is.
    begun = "[ -e dest ] || [ $(cat .dest.unfinished/journal.jsonl 2> /dev/null | wc -l) -ge 12 ]"
    kill = f"$OLMO3 convert plain dest --no-card & until {begun}; do sleep 0.005; done; kill -9 $!"
    yield Case(
        "resume: what BEFORE was killed at",
        (
            step("convert demo plain --dtype bfloat16", first=True),
            bash(f"({kill}; wait) 2> /dev/null", first=True),
            step("convert plain dest --no-card --resume"),
        ),
    )


def calibrated() -> Iterator[Case]:
    """Minutes each."""
    short = "--calibrate=calibration.txt"
    lines = {
        "calibrate": f"convert tiny dest --group-size 32 {short} --no-card",
        "calibrate by a recipe": f"convert tiny dest --recipe mixed.toml {short} --no-card",
        "calibrate, target": f"convert even dest --target-bpw 5.2 {short} --no-card",
        "calibrate, measured on the same": f"convert even dest {short} --text calibration.txt",
    }
    yield from group("calibrated", lines, slow=True)
    line = f"convert tiny dest --recipe mixed.toml {short} --no-card"
    stop = step(line, interrupt_at=".dest.unfinished/journal.jsonl")
    yield Case("calibrated: interrupted, and gone on with", (stop, step(f"{line} --resume")), slow=True)
    lab = "convert olmo3-lab-draft dest --calibrate=calibration.txt"
    yield Case("calibrated: lab", (step(lab),), needs="lab", slow=True)

"""What `olmo3 generate` cannot do: options, prompts, names, checkpoints, memory."""

from collections.abc import Iterator

from same_output_cases.case import SUM, Case, bash, group, step
from same_output_cases.materials import DAMAGED

HI = "generate hi --seed 1 --max-tokens 4"


def cases() -> Iterator[Case]:
    yield from wrong_options()
    yield from wrong_prompts_and_names()
    yield from damaged()
    yield from little_memory()


def wrong_options() -> Iterator[Case]:
    options = {
        "--max-tokens": ("0", "-5"),
        "--temperature": ("-1", "1e9", "nan"),
        "--top-p": ("0", "1.5"),
        "--top-k": ("-1",),
        "--min-p": ("2",),
        "--repetition-penalty": ("0", "nan"),
        "--seed": ("-1", str(2**64)),
        "--stop": ("''",),
        "--context": ("0", "-3", "100000"),
        "--kv-group-size": ("48", "0"),
        "--kv-start": ("-1",),
    }
    for option, values in options.items():
        extra = " --kv-bits 8" if option.startswith("--kv") else ""
        yield from group(
            "generate wrong",
            {f"{option} {v}": f"{HI} {option} {v}{extra}" for v in values},
        )


def wrong_prompts_and_names() -> Iterator[Case]:
    yield from group(
        "generate wrong",
        {
            "kv-bits of narrow heads": f"{HI} --model tiny --raw --kv-bits 8",
            "a group wider than a head": f"{HI} --model heads --raw --kv-bits 8 --kv-group-size 64",
            "raw and system": f"{HI} --raw --system s",
            "an empty prompt": 'generate ""',
            "a prompt of spaces": 'generate "  "',
            "an empty raw prompt": 'generate "" --raw',
            "longer than the context": f"generate '{'word ' * 300}' --raw --model tiny",
            "longer than --context": f"generate {SUM} --context 20",
            "a chat longer than the context": f"generate '{'word ' * 300}' --model tiny",
            "no such folder": f"{HI} --model no/such/folder",
            "an empty name": f'{HI} --model ""',
            "a size": f"{HI} --model 7b",
            "a file": f"{HI} --model prose.txt",
            "a revision of the demo": f"{HI} --revision x",
            "a revision of a folder": f"{HI} --model tiny --revision x",
            "outside the vocabulary": 'generate "Hello there" --raw --model small-vocabulary',
            "native": f"{HI} --model native",
            "offline": f"{HI} --model allenai/Olmo-3-7B-Instruct",
            "offline, with a revision": f"{HI} --model allenai/Olmo-3-7B-Instruct --revision r",
        },
    )
    yield Case("generate wrong: no Unicode", (bash("$OLMO3 generate $'\\xff\\xfe'"),))


def damaged() -> Iterator[Case]:
    names = (name for name in DAMAGED if name not in ("large", "generation-set", "other-tokenizer"))
    yield from group(
        "generate damaged", {d: f"generate Hello --seed 1 --max-tokens 1 --model {d}" for d in names}
    )


def little_memory() -> Iterator[Case]:
    for size in ("10M", "1", "nonsense", "0", "40M"):
        few = {"OLMO3_MEMORY": size}
        yield Case(
            f"generate memory: {size}",
            (
                step(f"generate {SUM}", variables=few),
                step(f"generate {SUM} --context 4096", variables=few),
            ),
        )
    yield Case(
        "generate memory: quantized caches in little",
        (
            step(f"generate {SUM} --kv-bits 4 --json", variables={"OLMO3_MEMORY": "16M"}),
            step(f"generate {SUM} --kv-bits 4 --kv-start 3000", variables={"OLMO3_MEMORY": "16M"}),
            step(
                "generate Hello --seed 1 --model tiny --raw --temperature 0 --json",
                variables={"OLMO3_MEMORY": "5200K"},
            ),
        ),
    )

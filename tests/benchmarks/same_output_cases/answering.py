"""Asking one question, and what the program tells of its use."""

from collections.abc import Iterator

from same_output_cases.case import GREEDY, SUM, Case, bash, group, step

SHORT = "--raw --seed 5 --max-tokens 8"
TINY = f"--model tiny --raw {GREEDY} --max-tokens 24"
ANSWERS = {
    "plain": f"generate {SUM}",
    "json": f"generate {SUM} --json",
    "greedy, long": f'generate "How many layers does Olmo 3 7B have?" {GREEDY}',
    "raw": f'generate "Once upon a time" --raw {GREEDY} --max-tokens 30',
    "raw json": f'generate "Once upon a time" --raw {GREEDY} --max-tokens 30 --json',
    "max-tokens": f"generate {SUM} --max-tokens 3",
    "one stop": f"generate {SUM} --stop =",
    "two stops": f"generate {SUM} --stop 25 --stop 7 --json",
    "a stop that never comes": f"generate {SUM} --stop zebra",
    "system": 'generate "Who are you?" --system "You are terse." --temperature 0 --json',
    "an empty system": 'generate "Who are you?" --system "" --json --seed 1 --max-tokens 8',
    "seed": "generate Hello --temperature 1 --seed 7 --max-tokens 20 --json",
    "seed, all options": "generate Hello --temperature 0.9 --top-p 0.9 --top-k 40 --min-p 0.02 "
    "--repetition-penalty 1.1 --seed 11 --max-tokens 20 --json",
    "seed, tiny": "generate Hello --model tiny --raw --temperature 1 --seed 3 --max-tokens 40 --json",
    "repetition penalty": f"generate Hello --model tiny --raw {GREEDY} --max-tokens 20 "
    "--repetition-penalty 1.3 --json",
    "kv-bits 8": f"generate {SUM} --kv-bits 8 --json",
    "kv-bits 4": f"generate {SUM} --kv-bits 4 --json",
    "kv-bits 4, group 32": f"generate {SUM} --kv-bits 4 --kv-group-size 32 --json",
    "kv-bits 8, start": f"generate {SUM} --kv-bits 8 --kv-start 40 --json",
    "kv-start without kv-bits": f"generate {SUM} --kv-start 40",
    "kv-group-size without kv-bits": f"generate {SUM} --kv-group-size 32",
    "kv-bits past the window": 'generate "Hello there" --model heads --raw --temperature 0 '
    "--max-tokens 60 --kv-bits 4 --kv-group-size 32 --kv-start 16 --json",
    "tiny, past the window": f"generate Hello {TINY} --json",
    "tiny, with the template": f"generate Hello --model tiny {GREEDY} --max-tokens 12",
    "to the end of the context": f"generate Hello --model tiny --raw {GREEDY} --json",
    "a small context": f"generate {SUM} --context 60 --json",
    "a context of the prompt": f"generate Hello --model tiny --raw {GREEDY} --context 8 --json",
    "sharded": f"generate Hello {TINY.replace('tiny', 'sharded')}",
    "a quantized copy by its folder": f"generate {SUM} --model demo-files",
    "defaults of the checkpoint": f"generate Hello --model generation-set {SHORT}",
    "characters": 'generate "Zoë naïve 日本 🙂" --raw --temperature 0 --max-tokens 12 --json',
}


def cases() -> Iterator[Case]:
    yield from usage()
    yield from generate()
    yield from streams()


def usage() -> Iterator[Case]:
    verbs = ("generate", "chat", "convert", "compare", "inspect", "revisions")
    yield from group("help", {verb: f"{verb} --help" for verb in verbs})
    yield from group(
        "usage",
        {
            "help": "--help",
            "version": "--version",
            "nothing": "",
            "unknown verb": "dance",
            "unknown option": "generate hi --tempreature 1",
            "two prompts": "generate hi there",
            "a word for a number": "generate hi --max-tokens many",
            "no DEST": "convert tiny",
            "bits that do not exist": "convert tiny dest --bits 7",
            "groups that do not exist": "convert tiny dest --group-size 48",
            "a dtype that does not exist": "convert tiny dest --dtype int8",
            "kv-bits that do not exist": "generate hi --kv-bits 3",
            "an extra argument": "inspect 7b",
            "no B": "compare tiny",
            "no hub id": "revisions",
        },
    )
    yield Case(
        "usage: modules",
        (
            bash("$PYTHON -m olmo3_mlx --version"),
            bash("$PYTHON -m convert tiny dest --group-size 32 --no-card"),
            bash("$PYTHON -m convert --help"),
        ),
    )
    yield Case(
        "usage: OLMO3_MODEL",
        (
            step("inspect --json", variables={"OLMO3_MODEL": "tiny"}),
            step("generate --help", variables={"OLMO3_MODEL": "tiny"}),
        ),
    )


def generate() -> Iterator[Case]:
    yield from group("generate", ANSWERS)
    yield from group(
        "generate lab",
        {
            name: f'generate "What is the capital of France?" --model olmo3-lab-{name} {GREEDY} '
            f"--max-tokens 24 --json"
            for name in ("chat", "gqa", "draft", "wide")
        },
        needs="lab",
    )


def streams() -> Iterator[Case]:
    yield Case(
        "generate: pipes",
        (
            step("generate --seed 1", "What is 17 + 25?\n"),
            step("generate --seed 1 -", "What is 17 + 25?\r\n"),
            step("generate --json --seed 1", "\ufeffHello\n\n"),
            step("generate - --raw --seed 1 --max-tokens 5", "Once upon\na time"),
            step("generate -", ""),
            step("generate", b"caf\xe9\n"),
        ),
    )
    yield Case(
        "generate: a prompt leaves stdin alone",
        (bash("(echo kept; cat) | ($OLMO3 generate Hello --seed 1; cat)"),),
    )
    yield Case(
        "generate: streams",
        (
            bash("$OLMO3 generate Hello --seed 1 > /dev/full"),
            bash("$OLMO3 inspect > /dev/full"),
            bash("$OLMO3 inspect | head -1"),
            bash("$OLMO3 generate Hello --seed 1 >&-"),
            bash("$OLMO3 generate Hello --seed 1 <&-"),
            bash("$OLMO3 chat <&-"),
            bash("PYTHONIOENCODING=ascii $OLMO3 inspect | head -12"),
        ),
    )
    yield Case("generate: no prompt on a terminal", (step("generate", terminal=True),))

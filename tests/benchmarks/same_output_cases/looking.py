"""Looking inside a checkpoint, and measuring how far one is from another."""

from collections.abc import Iterator

from same_output_cases.case import Case, bash, group, step

FEW = "--tokens 64 --length 32"


def cases() -> Iterator[Case]:
    yield from inspect()
    yield from inspect_wrong()
    yield from compare()
    yield from compare_wrong()


def inspect() -> Iterator[Case]:
    lines = {}
    for name, option in {
        "demo": "",
        "7b": "--model 7b",
        "32B": "--model 32B",
        "tiny": "--model tiny",
    }.items():
        for what in ("", "--json", "--kv-bits 4 --kv-group-size 32 --kv-start 1000", "--context 200"):
            lines[f"{name} {what}".strip()] = f"inspect {option} {what}"
    lines["demo, all"] = "inspect --context 250 --kv-bits 8 --json"
    lines["7b, a long context"] = "inspect --model 7b --context 65536 --kv-bits 4 --kv-group-size 64"
    lines["7b, a long context, json"] = "inspect --model 7b --context 65536 --json"
    for name in ("even", "heads", "sharded", "no-weights", "no-tokenizer", "says-quantized"):
        lines[name] = f"inspect --model {name}"
    yield from group("inspect", lines)
    labs = {name: f"inspect --model olmo3-lab-{name} --json" for name in ("chat", "gqa", "draft", "wide")}
    yield from group("inspect lab", labs, needs="lab")
    for size in ("200M", "16 GiB", "64g"):
        memory = {"OLMO3_MEMORY": size}
        steps = (
            step("inspect", variables=memory),
            step("inspect --model 7b --context 4096", variables=memory),
        )
        yield Case(f"inspect: a machine of {size}", steps)
    yield Case("inspect: a folder named like a size", (bash("cp -r tiny 7b; $OLMO3 inspect --model 7b"),))


def inspect_wrong() -> Iterator[Case]:
    names = (
        "no-config config-no-json config-a-list llama no-eps rope-ntk layer-linear heads-5 window-0 native"
    )
    lines = {name: f"inspect --model {name}" for name in names.split()}
    lines |= {
        "a revision of a size": "inspect --model 7b --revision main",
        "a revision of a folder": "inspect --model tiny --revision main",
        "no context": "inspect --context 0",
        "too long a context": "inspect --context 100000",
        "too long a context, json": "inspect --context 100000 --json",
        "kv-bits of narrow heads": "inspect --model small-vocabulary --kv-bits 8",
        "a group": "inspect --kv-bits 8 --kv-group-size 48",
        "a group wider than a head": "inspect --model heads --kv-bits 8 --kv-group-size 64",
        "a group without kv-bits": "inspect --kv-group-size 48",
        "kv-start": "inspect --kv-bits 8 --kv-start -1",
        "kv-start without kv-bits": "inspect --kv-start -1",
        "a file": "inspect --model prose.txt",
        "no such folder": "inspect --model no/such/folder",
        "offline": "inspect --model allenai/Olmo-3-7B-Instruct",
    }
    yield from group("inspect wrong", lines)
    for size in ("nonsense", "-1", "0", "1e30"):
        memory = {"OLMO3_MEMORY": size}
        yield Case(f"inspect wrong: a machine of {size}", (step("inspect", variables=memory),))


def compare() -> Iterator[Case]:
    quantized = step("convert tiny 4bit --group-size 32 --no-card", first=True)
    text = step(f"compare tiny 4bit {FEW}")
    again = step(f"compare tiny 4bit {FEW} --card card")
    other = step(f"compare tiny 4bit {FEW} --json --text prose.txt --card other/card")
    yield Case(
        "compare: tiny and its 4 bits",
        (
            quantized,
            text,
            step(f"compare tiny 4bit {FEW} --json"),
            again,
            again,
            other,
            step(f"compare tiny 4bit {FEW} --tokenizer demo --json"),
            step("compare tiny 4bit --tokens 40 --json"),
            step(f"compare 4bit tiny {FEW}"),
        ),
    )
    yield from group(
        "compare",
        {
            "itself": f"compare tiny tiny {FEW}",
            "a checkpoint without a tokenizer": f"compare tiny no-tokenizer {FEW}",
            "another tokenizer": f"compare no-tokenizer tiny {FEW} --tokenizer demo",
            "native": f"compare tiny native {FEW}",
            "native, read as demo": f"compare native tiny {FEW} --tokenizer demo --json",
            "sharded": f"compare tiny sharded {FEW} --json",
        },
    )
    lab = (
        step("convert olmo3-lab-draft 4bit --no-card", first=True),
        step("compare olmo3-lab-draft 4bit --tokens 128 --length 128"),
        step("compare olmo3-lab-chat demo --tokens 64 --length 64 --json"),
    )
    yield Case("compare: lab", lab, needs="lab")


def compare_wrong() -> Iterator[Case]:
    yield from group(
        "compare wrong",
        {
            "another architecture": f"compare tiny shallow {FEW}",
            "another vocabulary": f"compare tiny small-vocabulary {FEW}",
            "outside the vocabulary": f"compare small-vocabulary small-vocabulary {FEW}",
            "another tokenizer": f"compare tiny other-tokenizer {FEW}",
            "no tokenizer": f"compare no-tokenizer tiny {FEW}",
            "a tokenizer that is not there": f"compare no-tokenizer tiny {FEW} --tokenizer mixed.toml",
            "no such folder": f"compare tiny no/such/folder {FEW}",
            "damaged": f"compare tiny cut-body {FEW}",
            "NaN": f"compare tiny nan {FEW}",
            "one token": "compare tiny tiny --tokens 1",
            "too many tokens": "compare tiny tiny --tokens 1000000 --length 32",
            "longer than the context": "compare tiny tiny --length 300",
            "a length of 1": "compare tiny tiny --length 1",
            "no text": "compare tiny tiny --text nonexistent.txt",
            "a short text": "compare tiny tiny --text short.txt",
            "a text that is none": "compare tiny tiny --text latin1.txt",
            "a card in a file": "compare tiny tiny --card prose.txt",
            "a card below a file": "compare tiny tiny --card prose.txt/card",
            "a revision of A": "compare tiny tiny --revision-a main",
            "a revision of B": "compare tiny tiny --revision-b main",
            "offline": "compare tiny allenai/Olmo-3-7B-Instruct",
        },
    )

"""The house: imports go down only, nothing heavy on the way to the first token, a known public list."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import olmo3_mlx

ROOT = Path(__file__).parents[1]

# From the ground up: a module imports only from floors below its own, and a room only from rooms below it.
# A floor is one module of the package itself, or a room and its own floors.
FLOORS: dict[str, list[str]] = {
    "olmo3_mlx": [
        "errors",
        "git_lfs",
        "fields durable packing option_checks published fused",
        "quantization",
        "config",
        "rope token_ids",
        "caches: buffer attention, quantized, options cache, buffered, growing rotating",
        "model",
        "generation: sampling unfinished, loop",
        "text: stop_strings client_messages added_tokens, chat_template, template_files, tokenizer",
        "memory: container sizes, machine working_space, plan",
        "checkpoints: headers files fingerprint, hub weights stored_bits, names revisions, checkpoint",
        "sessions: spans, files, snapshots, session",
        "conversation: options messages place, saved completion, chat listing",
        "__init__",
        "doctor: finding tolerances exact, facts golden subject kernels, known_faults demo_checks "
        "cache_checks passes conversion_check, machine_checks checkpoint_checks, examination",
        "doctor",
        "cli: bar interrupt options wording drawing nearest standard_input columns, "
        "memory_table generate parser, chat_commands, chat convert compare inspect revisions sessions doctor",
        "cli",
        "__main__",
    ],
    "convert": [
        "progress remaining quantized size",
        "target",
        "texts: kinds given, conversations sequences, files saved, shipped",
        "reading: ahead softmax stored native.unpickle, remote native.archive native.config, "
        "native.distcp, native.checkpoint, source, finite layers",
        "sampling: script model, rows, loop, itself",
        "recipe",
        "saved_recipe",
        "calibration: memory cholesky matrix text gradients, metric outputs fisher, grids moments, "
        "gptq sides, calibration, resumable allocation, sensitivity",
        "writer: layout journal upload, files folder output",
        "card: command markdown divergence evaluation method, quality, measure pictures verdict, advice, "
        "comparison, page, quality_card model_card",
        "options conversion, comparing",
        "calibration_texts",
        "preparing",
        "converting",
        "__init__",
        "__main__",
    ],
}


def floors(package: str) -> dict[str, tuple[int, int]]:
    """Each module's floor in the house, and in its room."""
    found: dict[str, tuple[int, int]] = {}
    for floor, line in enumerate(FLOORS[package]):
        room, colon, modules = line.rpartition(":")
        for within, names in enumerate(modules.split(",")):
            for name in names.split():
                found[f"{package}.{room}.{name}" if colon else f"{package}.{name}"] = (floor, within)
    return found


def module_name(path: Path) -> str:
    """The dotted name of a file; a room's or package's own file counts as the room, or as __init__."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name if name.count(".") == 1 else name.removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """The modules that a file names in imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            inside = {f"{module}.{alias.name}" for alias in node.names}
            found |= {
                name if (ROOT / f"{name.replace('.', '/')}.py").is_file() else module for name in inside
            }
    return {f"{name}.__init__" if name in FLOORS else name for name in found}


@pytest.mark.parametrize("package", FLOORS)
def test_every_module_has_a_floor_and_imports_only_from_below(package: str) -> None:
    floor = floors(package)
    for path in (ROOT / package).rglob("*.py"):
        name = module_name(path)
        if name not in floor:  # a room's own file says what the room is for, no more
            assert path.name == "__init__.py", f"{name} has no floor"
            assert not imports(path), f"{name} imports"
            continue
        for below in imports(path):
            if below.startswith(f"{package}."):
                assert floor[below] < floor[name], f"{name} imports {below}"


def test_every_floor_is_a_module_that_there_is() -> None:
    for package in FLOORS:
        there = {module_name(path) for path in (ROOT / package).rglob("*.py")}
        assert floors(package).keys() <= there, floors(package).keys() - there


def test_the_library_knows_neither_convert_nor_its_command_line() -> None:
    verbs = [ROOT / "olmo3_mlx" / "cli" / f"{verb}.py" for verb in ("convert", "compare", "doctor")]
    for path in (ROOT / "olmo3_mlx").rglob("*.py"):
        for module in imports(path):
            above = path.parent.name == "cli" or path.name == "__main__.py"
            assert not module.startswith("olmo3_mlx.cli") or above, path
            assert not module.startswith("convert") or path in verbs, path


def test_the_library_neither_prints_nor_exits() -> None:
    for folder in ("olmo3_mlx", "convert"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.parent.name in ("cli",) or path.name == "__main__.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    assert ast.unparse(node.func) not in ("print", "sys.exit", "exit"), path


@pytest.mark.parametrize("package", FLOORS)
def test_errors_of_the_library_name_no_flag_and_no_command(package: str) -> None:
    """Over HTTP `--kv-bits` is nonsense: errors carry Settings, which the command line words."""
    for path in (ROOT / package).rglob("*.py"):
        if path.parent.name == "cli":
            continue
        raised = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)]
        for node in [constant for error in raised for constant in ast.walk(error)]:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.search(r"(^|[^\w-])--[a-z]|`olmo3 ", node.value), f"{path}: {node.value}"


def test_files_and_functions_stay_small() -> None:
    for path in [p for folder in ("olmo3_mlx", "convert") for p in (ROOT / folder).rglob("*.py")]:
        text = path.read_text()
        assert len(text.splitlines()) <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                docstring = ast.get_docstring(node, clean=False) or ""
                lines = (node.end_lineno or 0) - node.lineno + 1 - len(docstring.splitlines())
                assert lines <= 50, f"{path}: {node.name} has {lines} lines"


@cache
def modules_of_the_first_token() -> frozenset[str]:
    """What is imported when the demo has said one token."""
    code = (
        "import sys\n"
        "from olmo3_mlx.cli import main\n"
        "code = main(['generate', 'Hello', '--max-tokens', '1', '--model', 'demo'])\n"
        "print(*sys.modules, sep='\\n')\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return frozenset(done.stdout.splitlines())


@pytest.mark.parametrize("heavy", ["transformers", "mlx_lm", "torch", "numpy", "huggingface_hub"])
def test_nothing_heavy_is_imported_on_the_way_to_the_first_token(heavy: str) -> None:
    assert "olmo3_mlx.model" in modules_of_the_first_token()
    assert heavy not in modules_of_the_first_token()


def test_no_first_token_waits_for_a_compiler() -> None:
    """mx.compile calls g++ on the CPU backend: without one on the PATH everything still works."""
    done = subprocess.run(
        [sys.executable, "-m", "olmo3_mlx", "generate", "Hi", "--max-tokens", "3", "--model", "demo"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/nonexistent"},
    )
    assert done.returncode == 0, done.stderr


def test_the_public_list_is_what_it_says() -> None:
    assert sorted(olmo3_mlx.__all__) == [
        "CacheError",
        "CacheOptions",
        "CachesNotSavedError",
        "Chat",
        "Checkpoint",
        "CheckpointError",
        "Completion",
        "ConfigError",
        "ConversationSummary",
        "ConvertError",
        "GenerationConfig",
        "HubError",
        "KVCache",
        "MemoryFitError",
        "NoTemplateError",
        "Olmo3",
        "Olmo3Config",
        "Olmo3Error",
        "OptionError",
        "OtherCachesError",
        "PromptError",
        "RopeConfig",
        "RotatingKVCache",
        "SavedConversation",
        "Session",
        "SessionError",
        "TemplateError",
        "Tokenizer",
        "TokenizerError",
        "UnknownNameError",
        "UnknownRevisionError",
        "generate",
        "list_conversations",
        "load",
        "open_conversation",
        "remove_conversation",
        "rewind",
        "stream",
    ]
    for name in olmo3_mlx.__all__:
        assert getattr(olmo3_mlx, name).__doc__, name

"""The house: imports go down only, nothing heavy on the way to the first token, a known public list."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import olmo3_mlx

ROOT = Path(__file__).parents[1]

# From the ground up: a module imports only from floors below its own.
FLOORS = [
    {"errors"},
    {"durable", "machine", "fields", "published"},
    {"quantization"},
    {"config"},
    {"attention", "buffer", "rope", "chat_template", "hub", "sampling", "stop"},
    {"kv_quantization", "options", "revisions"},
    {"blocks", "cache"},
    {"checkpoints", "model", "tokenizer", "generation", "session_files"},
    {"checkpoint", "identity", "session"},
    {"memory"},
    {"working_space"},
    {"memory_plan"},
    {"completion", "saved"},
    {"chat"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]


def imports(path: Path) -> set[str]:
    """The modules that a file names in imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def test_every_module_has_a_floor_and_imports_only_from_below() -> None:
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    for path in (ROOT / "olmo3_mlx").glob("*.py"):
        for module in imports(path):
            if module.startswith("olmo3_mlx."):
                below = module.split(".")[1]
                assert floor[below] < floor[path.stem], f"{path.stem} imports {below}"


def test_the_library_knows_neither_convert_nor_its_command_line() -> None:
    for path in (ROOT / "olmo3_mlx").rglob("*.py"):
        for module in imports(path):
            above = path.parent.name == "cli" or path.name == "__main__.py"
            assert not module.startswith("olmo3_mlx.cli") or above, path
            assert not module.startswith("convert") or path.name in ("convert.py", "compare.py"), path


def test_the_library_neither_prints_nor_exits() -> None:
    for folder in ("olmo3_mlx", "convert"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.parent.name in ("cli",) or path.name == "__main__.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    assert ast.unparse(node.func) not in ("print", "sys.exit", "exit"), path


def test_files_and_functions_stay_small() -> None:
    for path in [p for folder in ("olmo3_mlx", "convert") for p in (ROOT / folder).rglob("*.py")]:
        text = path.read_text()
        assert len(text.splitlines()) <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                docstring = ast.get_docstring(node, clean=False) or ""
                lines = (node.end_lineno or 0) - node.lineno + 1 - len(docstring.splitlines())
                assert lines <= 50, f"{path}: {node.name} has {lines} lines"


@pytest.mark.parametrize("heavy", ["transformers", "mlx_lm", "torch", "numpy", "huggingface_hub"])
def test_nothing_heavy_is_imported_on_the_way_to_the_first_token(heavy: str) -> None:
    code = (
        "import sys\n"
        "from olmo3_mlx.cli import main\n"
        "main(['generate', 'Hello', '--max-tokens', '1', '--model', 'demo'])\n"
        f"sys.exit({heavy!r} in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


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
        "Chat",
        "CheckpointError",
        "Completion",
        "ConfigError",
        "ConvertError",
        "GenerationConfig",
        "HubError",
        "KVCache",
        "MemoryFitError",
        "Olmo3",
        "Olmo3Config",
        "Olmo3Error",
        "OptionError",
        "PromptError",
        "RopeConfig",
        "RotatingKVCache",
        "Session",
        "SessionError",
        "TemplateError",
        "Tokenizer",
        "TokenizerError",
        "generate",
        "load",
        "rewind",
        "stream",
    ]
    for name in olmo3_mlx.__all__:
        assert getattr(olmo3_mlx, name).__doc__, name

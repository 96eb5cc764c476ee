"""What docs/ says is so: the map names every file, and nothing that is not there; every decision is in the
index; links lead somewhere.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))
DECISIONS = ROOT / "docs" / "decisions"
MAP = (ROOT / "docs" / "map.md").read_text(encoding="utf-8")
STEPS = re.findall(r"^(?:\d+)\. .+(?:\n   .+)*", MAP, flags=re.MULTILINE)


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def says_more_than_a_sentence(path: Path) -> bool:
    """False for the file that makes a folder a room, and for what only starts the command line."""
    if path.name == "__main__.py":
        return False
    return path.name != "__init__.py" or len(ast.parse(path.read_text(encoding="utf-8")).body) > 1


def test_the_map_has_every_file_with_a_line_and_every_listed_file_exists() -> None:
    listed: list[str] = []
    for block in re.findall(r"^```\n(.*?)^```", MAP, flags=re.DOTALL | re.MULTILINE):
        folder = ""
        for line in block.splitlines():
            name, *said = line.split()
            if not line.startswith(" "):
                folder = name
            else:
                assert said, f"{folder}{name} has no line"
                listed.append(folder + name)
    files = [path for top in ("olmo3_mlx", "convert") for path in (ROOT / top).rglob("*.py")]
    real = [path.relative_to(ROOT).as_posix() for path in files if says_more_than_a_sentence(path)]
    assert sorted(listed) == sorted(real)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.split("\n")[0][:60])
def test_a_step_of_the_map_names_files_and_names_that_there_are(step: str) -> None:
    named = re.findall(r"`([^`]+)`", step)
    files = [ROOT / name for name in named if "/" in name]
    for file in files:
        assert file.exists(), file
    text = "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    for name in named:
        if re.fullmatch(r"[A-Za-z_]\w*", name) and name != "convert":
            assert re.search(rf"\b{name}\b", text), name


def test_the_map_tells_where_to_add_things() -> None:
    wanted = ("kind of cache", "verb", "sampling option", "form of config.json", "error", "recipe")
    for thing in (*wanted, "figure on the quality card", "kind of session file"):
        assert re.search(rf"^### \.\.\. an? {thing}\?$", MAP, flags=re.MULTILINE), thing


def test_every_decision_is_in_the_index_under_its_date_and_title() -> None:
    index = (DECISIONS / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| \[(.+)\]\((\S+\.md)\) \| .+ \|$", index, flags=re.MULTILINE)
    found = []
    for path in DECISIONS.glob("2*.md"):
        head = re.match(r"# (.+)\n\nDate: (\S+)  \nStatus: \S.+\n\n", path.read_text(encoding="utf-8"))
        assert head, f"{path.name}: expected a title, a date and a status"
        title, date = head.groups()
        assert path.name.startswith(f"{date}-"), path.name
        found.append((date, title, path.name))
    assert sorted(rows) == sorted(found)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", page):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), target

"""What docs/ says is so: the map names every file, and nothing that is not there; every decision is in the
index; pictures are what their scripts draw; links lead somewhere; a wheel holds what it should.
"""

import ast
import importlib
import itertools
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))
DECISIONS = ROOT / "docs" / "decisions"
MAP = (ROOT / "docs" / "map.md").read_text(encoding="utf-8")
FAMILIES = {"monospace": "DejaVu Sans Mono", "sans-serif": "DejaVu Sans"}
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
        assert re.search(rf"^### An? {thing}$", MAP, flags=re.MULTILINE), thing


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


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of docs/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module


def test_the_picture_of_the_architecture_is_what_its_script_draws(script: Any) -> None:
    committed = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    assert script("architecture").picture() == committed


def test_the_picture_of_the_terminal_is_what_its_script_draws_of_the_recording(script: Any) -> None:
    recording = json.loads((ROOT / "docs" / "chat.json").read_text(encoding="utf-8"))
    committed = (ROOT / "docs" / "chat.svg").read_text(encoding="utf-8")
    assert script("terminal").picture(recording) == committed


@pytest.mark.slow
def test_the_recording_is_what_the_program_says(script: Any, shared: Path) -> None:
    """But for what is measured: times, speeds and memory."""
    terminal = script("terminal")
    recording = json.loads(terminal.RECORDING.read_text(encoding="utf-8"))
    measured = re.compile(r"[\d.]+(?= tokens/s| GB\b| s$)", flags=re.MULTILINE)
    steps = [measured.sub("-", step["output"]) for step in terminal.recorded()["steps"]]
    assert steps == [measured.sub("-", step["output"]) for step in recording["steps"]]


@pytest.mark.parametrize("name", ["architecture", "chat"])
def test_no_text_of_a_picture_lies_on_another_or_leaves_it(name: str) -> None:
    """In DejaVu, which is the widest of the fonts that the pictures ask for."""
    svg = ET.parse(ROOT / "docs" / f"{name}.svg").getroot()
    boxes = [box(element, svg[1].text or "") for element in svg.findall(".//{*}text")]
    assert len(boxes) > 20
    width, height = float(svg.attrib["width"]), float(svg.attrib["height"])
    for said, left, top, right, bottom in boxes:
        assert left >= 0 and top >= 0 and right <= width and bottom <= height, said
    for one, other in itertools.combinations(boxes, 2):
        apart = one[3] <= other[1] or other[3] <= one[1] or one[4] <= other[2] or other[4] <= one[2]
        assert apart, (one[0], other[0])


def box(element: ET.Element, style: str) -> tuple[str, float, float, float, float]:
    """A line of text, and the left, top, right and bottom of what it covers."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    kinds = ["text", *(rf"\.{kind}" for kind in element.get("class", "").split())]
    rules = " ".join(rule for kind in kinds for rule in re.findall(rf"{kind} {{(.*?)}}", style))
    size = float(re.findall(r"([\d.]+)px", rules)[-1])  # the last one counts
    weight = "bold" if re.search(r"\b[67]00\b", rules) else "normal"
    family = FAMILIES[re.findall(r"monospace|sans-serif", rules)[-1]]
    font = get_font(findfont(FontProperties(family=family, weight=weight)))
    font.set_size(size, 72)
    said = element.text or ""
    font.set_text(said)
    width = font.get_width_height()[0] / 64
    x, y = float(element.attrib["x"]), float(element.attrib["y"])
    x -= {"start": 0.0, "middle": width / 2, "end": width}[element.get("text-anchor", "start")]
    return said, x, y - 0.76 * size, x + width, y + 0.24 * size


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


@pytest.mark.slow
def test_the_wheel_holds_both_packages_whole_their_types_texts_and_the_demo(tmp_path: Path) -> None:
    """Builds one, for which pip fetches hatchling."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = [path for top in ("olmo3_mlx", "convert") for path in (ROOT / top).rglob("*") if path.is_file()]
    assert held == {p.relative_to(ROOT).as_posix() for p in files if "__pycache__" not in p.parts}
    assert {"olmo3_mlx/py.typed", "convert/py.typed", "olmo3_mlx/demo/model.safetensors"} <= held
    assert {
        f"convert/text/{name}" for name in ("evaluation/code.txt", "calibration/conversations.jsonl")
    } <= held

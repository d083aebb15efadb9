"""README and the pages of docs: links, length, and every command and snippet in them.

A block of commands that needs more than this repository says so after `sh`, by one of `NEEDS`. All
others are run, by script/test-slow. Of every block it is tested that its commands exist, that they
accept the options, and that the inputs are legal.
"""

import argparse
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from PIL import Image

from benchmarks import figures, hardware
from panorama.__main__ import parse_inputs
from panorama.request import Request

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("weights/*/README.md"))]
NEEDS = {"docker", "gpu", "network", "root", "hours"}
"""Requirements of a block of commands that keep it from running here."""
TOOLS = {
    *("apt-get", "cog", "cp", "curl", "docker", "export", "grep", "nginx", "printf", "python3"),
    *("service", "sleep"),
}
KEYWORDS = {"until", "do", "done"}
LONGEST = 600  # characters of a paragraph, five lines of 120

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    needs: frozenset[str]
    text: str


def blocks(page: Path, language: str) -> list[Block]:
    """Return the blocks of a page in a language."""
    found = re.findall(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```$", page.read_text(), re.M | re.S)
    every = [Block(name, frozenset(info.split()), dedent(text)) for _, name, info, text in found]
    return [block for block in every if block.language == language]


def prose(page: Path) -> str:
    """Return the text of a page without its blocks and comments."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.M | re.S)
    return re.sub(r"<!--.*?-->", "", text, flags=re.S)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.M):
        text = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        assert name not in found, f"{page.name}: two headings {heading!r}"
        found.add(name)
    return found


def links(page: Path) -> list[str]:
    """Return the targets of all links and images of a page."""
    text = prose(page)
    return [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r"^\[\w+\]: (\S+)$", text, re.M)]


def linked(page: Path) -> set[Path]:
    """Return the files of the repository that a page links to."""
    local = [target.partition("#")[0] for target in links(page) if "://" not in target]
    return {(page.parent / name).resolve() for name in local if name}


@each_page
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in links(page):
        if "://" in target:
            assert re.fullmatch(r"https://[\w.-]+(/[\w./@%=&?#-]*)?", target), target
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.exists(), target
        assert ROOT in place.parents, target
        assert not anchor or anchor in anchors(place), target


def test_every_page_is_at_most_two_clicks_from_readme():
    first = linked(README)
    second = {place for page in first & {*PAGES} for place in linked(page)}
    assert {*PAGES} - first - second == set()


def test_readme_is_short_and_answers_ten_questions_in_one_click():
    assert len(README.read_text().splitlines()) <= 250
    section = README.read_text().partition("## Common questions\n")[2].partition("\n## ")[0]
    questions = re.findall(r"^- \[[A-Z].+\?\]\((.+)\)$", section, re.M)
    assert len(questions) == len(set(questions)) >= 10


@each_page
def test_paragraphs_are_short(page):
    for line in prose(page).splitlines():
        if not line.startswith("|"):
            shown = re.sub(r"\]\([^)]*\)", "]", line)
            assert len(shown) <= LONGEST, shown


def commands(text: str) -> Iterator[list[str]]:
    """Yield the simple commands of a block as words, without leading keywords and variables."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";|&"):
                yield from [command] if command else []
                command = []
            elif command or not (word in KEYWORDS or re.match(r"[A-Z_]+=", word)):
                command.append(word)


class ParsedError(Exception):
    """A command line was parsed; raised in place of what would follow."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options


@pytest.fixture
def parse(monkeypatch, capsys):
    """Parse the arguments of a module's command line, by its own parser."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
        raise ParsedError(parse_args(parser, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)

    def parsed(name: str, arguments: Sequence[str]) -> argparse.Namespace:
        module = import_module(name)
        if hasattr(module, "__path__"):
            module = import_module(f"{name}.__main__")
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        try:
            module.main()
        except ParsedError as found:
            return found.options
        except SystemExit:
            pytest.fail(f"{name} {arguments}: {capsys.readouterr().err}")
        pytest.fail(f"{name} parses no arguments")

    return parsed


def check(words: Sequence[str], parse: Any) -> None:
    """Check that a command exists, accepts its arguments, and gets legal inputs."""
    program, *arguments = words
    if program.startswith("script/") and program != "script/python":
        assert os.access(ROOT / program, os.X_OK), program
        module = re.search(r'-m ([\w. ]+) "\$@"', (ROOT / program).read_text())
        if not module:
            assert not arguments or program == "script/supervise", words
            return
        arguments = ["-m", *module[1].split(), *arguments]
    elif program not in {"script/python", "python", "python3"}:
        assert program in TOOLS, words
        return check_tool(words, parse)
    if arguments[0] == "-c":
        compile(arguments[1], program, "exec")
        return
    assert arguments[0] == "-m", words
    options = parse(arguments[1], arguments[2:])
    if arguments[1] == "panorama":
        check_inputs(options.inputs, options.prompt)


def check_tool(words: Sequence[str], parse: Any) -> None:
    """Check what a program from elsewhere gets of this repository."""
    program, *arguments = words
    if program == "cp":
        assert all((ROOT / name).exists() for name in arguments[:-1])
    if program == "docker" and "panorama" in arguments:
        inside = arguments[arguments.index("panorama") + 1 :]
        if inside:
            check(inside, parse)
    if words[:2] == ["cog", "predict"]:
        pairs = itertools.pairwise(arguments)
        check_inputs([value for flag, value in pairs if flag == "-i"], [])
    if program in ("printf", "curl"):
        for text in (word for word in arguments if word.startswith("{")):
            inputs = json.loads(text)
            Request(**inputs.get("input", inputs))


def check_inputs(pairs: Sequence[str], words: Sequence[str]) -> None:
    """Check that inputs are legal, and that the files that they name exist."""
    inputs = parse_inputs(pairs, words)
    Request(**inputs)
    for value in inputs.values():
        assert not isinstance(value, Path) or value.name.startswith("FILE") or value.exists()


@each_page
def test_commands_exist_and_accept_their_arguments(page, parse, monkeypatch):
    monkeypatch.chdir(ROOT)
    for block in blocks(page, "sh"):
        assert block.needs <= NEEDS
        found = list(commands(block.text))
        assert found
        for words in found:
            check(words, parse)


@pytest.mark.parametrize(
    "text",
    [
        "script/dream sea",
        "script/predict sea -i colour=red",
        "script/predict sea --width 512",
        "script/predict sea -i width=1",
        "script/predict sea -i image=@none.png",
        "script/batch prompts.jsonl",
        "script/python -m benchmarks.nothing",
        "script/python -c 'print('",
        "script/serve & dream",
        "sudo script/serve",
        "cp none /etc",
        "docker run panorama python -m panorama.weights --online",
        "cog predict -i colour=red",
        """curl localhost -d '{"input": {"prompt": "sea", "width": 1}}'""",
    ],
)
def test_a_wrong_command_is_found(text, parse, monkeypatch):
    monkeypatch.chdir(ROOT)
    wrong = (AssertionError, ValueError, TypeError, SyntaxError, ModuleNotFoundError)
    with pytest.raises((*wrong, pytest.fail.Exception)):
        for words in commands(text):
            check(words, parse)


@each_page
def test_snippets_import_names_that_exist(page):
    code = "\n".join(block.text for block in blocks(page, "python"))
    compile(code, page.name, "exec")
    for module, names in re.findall(r"^from (panorama[\w.]*) import (.+)$", code, re.M):
        for name in names.split(", "):
            assert hasattr(import_module(module), name), f"{module} has no {name}"


def test_readme_shows_progress_in_python():
    (block,) = blocks(README, "python")
    assert "progress(step, steps, preview)" in block.text
    assert "generate(request, progress)" in block.text


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Return a folder with what commands need, as links where they only read."""
    for name in (
        *("script", "docs", "panorama", "benchmarks", "predict.py", ".cog", ".venv"),
        *("requirements.txt", "requirements-dev.txt"),
    ):
        (tmp_path / name).symlink_to(ROOT / name)
    ignored = shutil.ignore_patterns("hub", "work", "safety_checker")
    shutil.copytree(ROOT / "weights", tmp_path / "weights", symlinks=True, ignore=ignored)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


PAGES_TO_RUN = [p for p in PAGES if any(not block.needs for block in blocks(p, "sh"))]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", PAGES_TO_RUN, ids=lambda page: page.name)
def test_commands_run_and_write_their_images(page, workplace):
    port = str(free_port())
    text = "\n".join(block.text for block in blocks(page, "sh") if not block.needs)
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", text.replace("localhost:5000", f"localhost:{port}")],
        env=os.environ | {"PORT": port},
        start_new_session=True,
    )
    try:
        assert process.wait() == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a server may go on
    images = re.findall(r"[\w-]+\.(?:png|jpg)", " ".join(re.findall(r"-o \S+|open\(\"\S+", text)))
    for name in images:
        with Image.open(workplace / name) as image:
            image.verify()
    assert images or "script/predict" not in text


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_snippets_run(page, workplace, capsys):
    code = "\n".join(block.text for block in blocks(page, "python"))
    exec(compile(code, page.name, "exec"), {"__name__": "snippets"})
    assert page != README or "step 50 of 50" in capsys.readouterr().out
    for name in re.findall(r'save\("(.+?)"', code):
        assert (workplace / name).is_file()


def test_the_figures_are_those_that_the_layouts_give(tmp_path):
    figures.main([str(tmp_path)])
    drawn = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_bytes() for path in (ROOT / "docs" / "figures").iterdir()}
    assert drawn == committed
    assert max(map(len, drawn.values())) < 300_000


def calculated(test):
    """Mark a test that calculates memory on fake tensors, which takes minutes."""
    # Fake tensors look for a gradient everywhere, and hide the warning of that from printing alone.
    test = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")(test)
    return pytest.mark.slow(pytest.mark.timeout(3600)(test))


@calculated
def test_the_table_of_hardware_is_calculated():
    section = README.read_text().partition("## Hardware\n")[2].partition("\n## ")[0]
    written = [line for line in section.splitlines() if line.startswith("|")]
    assert written[2:] == list(hardware.table())


@calculated
def test_the_plot_of_memory_is_calculated(tmp_path):
    hardware.plot(tmp_path / "memory.svg")
    committed = (ROOT / "docs" / "memory.svg").read_bytes()
    assert (tmp_path / "memory.svg").read_bytes() == committed

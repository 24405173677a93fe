"""The documentation holds: command lines parse, links and named files exist, Python blocks run.

Commands are parsed, not executed. Python blocks of docs/ run, each page's in one namespace, but for those
after a comment `<!-- not run: why -->`, which are compiled; so are README.md's. YAML blocks load.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import tyro
import yaml

import arat_fast
from arat_fast import cli
from arat_fast.config import recipe_names, validated
from arat_fast.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"(?P<before>[^\n]*)\n```(?P<language>\w*)\n(?P<text>.*?)\n```", re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FOLDERS = (
    "arat_fast/",
    "kernels/",
    "loaders/",
    "bench/",
    "tests/",
    "scripts/",
    "docs/",
    "examples/",
    "recipes/",
)


class Block(NamedTuple):
    page: Path
    language: str
    text: str
    runs: bool


def page_id(page: object) -> str:
    return str(page.relative_to(ROOT)) if isinstance(page, Path) else str(page)


def blocks(page: Path) -> list[Block]:
    return [
        Block(page, m["language"], m["text"], not m["before"].startswith("<!-- not run: "))
        for m in FENCE.finditer(page.read_text())
    ]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def command_lines(page: Path) -> Iterator[str]:
    """Shell lines of the blocks without a language, continuations joined, and spans that are a command."""
    for block in blocks(page):
        if block.language == "":
            yield from block.text.replace("\\\n", " ").splitlines()
    for span in SPAN.findall(prose(page)):
        if span.startswith(("arat-fast ", "make ", "torchrun ")) and not re.search(r"…|\.\.\.|COMMAND", span):
            yield span


COMMANDS = [(page, line.strip()) for page in PAGES for line in command_lines(page)]
OURS = [
    (page, line) for page, line in COMMANDS if line.startswith("arat-fast ") or "-m arat_fast.cli " in line
]
SNIPPETS = [block for page in PAGES for block in blocks(page) if block.language == "python"]


class Parsed(Exception):
    """The command line was understood."""


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever parses a command line raises Parsed afterwards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("method: arat\n")
    by_tyro, by_argparse = tyro.cli, argparse.ArgumentParser.parse_args
    inside: list[bool] = []

    def tyro_cli(*args: Any, **options: Any) -> None:
        inside.append(True)
        try:
            by_tyro(*args, **options)
        finally:
            inside.pop()
        raise Parsed

    def parse_args(parser: argparse.ArgumentParser, *args: Any, **options: Any) -> Any:
        result = by_argparse(parser, *args, **options)
        if inside or options.get("namespace") is not None:
            return result
        raise Parsed

    monkeypatch.setattr(tyro, "cli", tyro_cli)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


def parse(line: str) -> None:
    """Raise unless the command line is one that arat-fast takes."""
    words = shlex.split(line, comments=True)
    words = words[words.index("arat_fast.cli") + 1 :] if "arat_fast.cli" in words else words[1:]
    if words[-1:] == ["--help"] or len(words) == 1:  # a mention of a command
        assert words[0] in ("--help", *cli.COMMANDS), words[0]
        return
    name, *rest = words
    assert name in cli.COMMANDS, f"no command {name}"
    module = __import__(cli.COMMANDS[name][0], fromlist=["main"])
    with pytest.raises(Parsed):
        module.main(rest)


@pytest.mark.usefixtures("parse_only")
@pytest.mark.parametrize(("page", "line"), OURS, ids=page_id)
def test_command_lines_parse(page: Path, line: str) -> None:
    try:
        parse(line)
    except SystemExit as wrong:
        pytest.fail(f"{page_id(page)}: `{line}` ends with exit code {wrong.code}")


@pytest.mark.usefixtures("parse_only")
@pytest.mark.parametrize(
    "line",
    [
        "arat-fast train --epoch 3",
        "arat-fast train --config arat-cifar10-resnet81",
        "arat-fast bench doctor --batches 3",
        "arat-fast bench ceilings --devise cpu",
        "arat-fast evalute runs/mine",
    ],
)
def test_wrong_command_lines_do_not(line: str) -> None:
    with pytest.raises((SystemExit, UserError, AssertionError)):
        parse(line)


def test_there_is_something_to_check() -> None:
    assert len(OURS) > 30
    assert len(SNIPPETS) > 10
    assert {"train", "evaluate", "analyze", "compare", "export", "data", "bench", "runs", "env"} <= {
        line.split()[1] for _, line in OURS if line.startswith("arat-fast ")
    }


def test_make_targets_and_scripts_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, line in COMMANDS:
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert {w for w in words[1:] if "=" not in w} <= targets, f"{page_id(page)}: {line}"
        if words[:1] in (["python"], ["bash"]) and words[1].endswith((".py", ".sh")):
            assert (ROOT / words[1]).is_file(), f"{page_id(page)}: {line}"


def anchors(page: Path) -> set[str]:
    """Anchors of the page's headings, as Markdown's toc makes them."""
    titles = re.findall(r"^#+ +(.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower() for title in titles]
    return {re.sub(r"[-\s]+", "-", title) for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_and_named_files_exist(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{page_id(page)} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page_id(page)} links to {target}"
    for span in SPAN.findall(prose(page)):
        if span.startswith(FOLDERS) and not re.search(r"[\s*{}<>…()]|/out/", span):
            place = ROOT / "arat_fast" / span if span.startswith("recipes/") else ROOT / span
            assert place.exists(), f"{page_id(page)} names {span}"


def test_every_page_is_in_the_navigation() -> None:
    # MkDocs' own tags need its loader.
    text = re.sub(r"!!python/\S+", "", (ROOT / "mkdocs.yml").read_text())

    def pages(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for inner in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from pages(inner)

    listed = set(pages(yaml.safe_load(text)["nav"]))
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_yaml_blocks_are_configurations(page: Path) -> None:
    for block in blocks(page):
        if block.language == "yaml":
            validated(yaml.safe_load(block.text), page_id(page))


@pytest.mark.parametrize("page", sorted({b.page for b in SNIPPETS}), ids=page_id)
def test_python_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "metrics.jsonl").write_text('{"epoch": 1, "accuracy_adv": 0.5}\n')
    namespace: dict[str, Any] = {"__name__": "page"}
    with torch.random.fork_rng():
        for number, block in enumerate((b for b in SNIPPETS if b.page == page), 1):
            code = compile(block.text, f"{page_id(page)}, block {number}", "exec")
            if block.runs and page.is_relative_to(DOCS):
                exec(code, namespace)


def test_every_recipe_is_listed() -> None:
    named: set[str] = set()
    for span in SPAN.findall((DOCS / "guide" / "train.md").read_text()):
        spans = [span]
        while any("{" in one for one in spans):  # {a,b}-c: each of them
            spans = [
                re.sub(r"\{[^}]*\}", choice, one, count=1)
                for one in spans
                for choice in re.findall(r"\{([^}]*)\}", one)[0].split(",")
            ]
        named |= set(spans)
    assert set(recipe_names()) <= named


def test_every_public_name_has_its_reference() -> None:
    text = (DOCS / "api" / "index.md").read_text() + (DOCS / "api" / "configuration.md").read_text()
    for name in arat_fast.__all__:
        assert re.search(rf"^::: arat_fast\.{name}$|^ +members: .*\b{name}\b", text, re.MULTILINE), name

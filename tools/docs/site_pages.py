"""The hooks of `mkdocs build`: pages from outside docs/, links to them, the navigation of folders, and MiniLM's report.

A page may link to any file of the repository. The site has README.md as its first page, and every other file outside docs/
that a page links to: Markdown as a page, code as a page that shows it, pictures as they are.
"""

from __future__ import annotations

import ast
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
HOMES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "reporting.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Documents outside docs/, each with its name on the site."""
FOLDERS = ("passes", "decisions", "schemes", "examples")
"""Entries of the navigation that stand for all pages of a folder."""
REPORT, REPORT_PAGE = "minilm-report.html", "minilm_report.md"
REPORT_PASSES = "prune-heads{keep=0.75},quantize"
_LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LIST_AFTER_TEXT = re.compile(r"^((?![-*] |\d+\. | |\||#|<!--|>).+\n)(?=[-*] |\d+\. )", re.MULTILINE)
_NESTED = re.compile(r"^ {2,3}(?=[-*] |\d+\. )", re.MULTILINE)
_SCHEMES_ORDER = (
    *("int8-dynamic", "int8-group", "int8-static", "int8-weight", "int4-weight", "int4-dynamic", "fp8"),
    *("mxfp4-weight", "mxfp8-weight", "nvfp4-weight"),
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Write the pages of folders into the navigation."""
    config.nav = _filled(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents, code and pictures that pages link to, and the report."""
    known = {file.src_uri for file in files}
    waiting = [ROOT / "README.md", ROOT / "CHANGELOG.md", DOCS / "decisions", DOCS / "schemes"]
    waiting += [*sorted(DOCS.rglob("*.md")), *_examples()]
    while waiting:
        path = waiting.pop()
        if site_uri(path) not in known:
            known.add(site_uri(path))
            files.append(_file(path, config))
        if path.suffix == ".md":
            waiting += [target for target in _targets(path) if site_uri(target) not in known]
    files.append(File.generated(config, REPORT_PAGE, content=_REPORT_TEXT))
    files.append(File.generated(config, REPORT, content=minilm_report()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links of the site, and GitHub's Markdown into MkDocs'."""
    uri = page.file.src_uri
    path = next((ROOT / home for home, name in HOMES.items() if name == uri), DOCS / uri)
    parts, start = [], 0
    for fence in _FENCED.finditer(markdown):
        parts += [_rewritten(markdown[start : fence.start()], path, uri), fence.group()]
        start = fence.end()
    return "".join([*parts, _rewritten(markdown[start:], path, uri)])


def site_uri(path: Path) -> str:
    """The name on the site of a file of the repository: `docs/python.md` is `python.md`, code is a page `….py.md`."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        name += "/index.md"
    name = HOMES.get(name, name.removeprefix("docs/"))
    return name if path.is_dir() or path.suffix in (".md", ".svg", ".png") else f"{name}.md"


def minilm_report() -> str:
    """The HTML page of a compile of MiniLM, with the times of its layers here."""
    import lissom
    from lissom.frontends.models.huggingface import load

    checkpoint = load("minilm")
    fast = lissom.compile(checkpoint.model, checkpoint.example_inputs, passes=REPORT_PASSES, goal=None)
    fast.report.kernels()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / REPORT
        fast.report.to_html(path)
        return path.read_text(encoding="utf-8")


_REPORT_TEXT = f"""---
hide: [navigation, toc]
---
# MiniLM's compile, interactive

The report of `lissom.compile` on all-MiniLM-L6-v2 with `passes="{REPORT_PASSES}"`, as `report.to_html` writes it.
[Look inside](inspection.md) says what it shows. <a href="{REPORT}">Open it alone.</a>

<iframe class="report-frame" src="{REPORT}" title="The report of MiniLM's compile" loading="lazy"></iframe>
"""


def _filled(entry: object) -> object:
    """The navigation with the pages of FOLDERS in place of their names."""
    if isinstance(entry, list):
        return [_filled(child) for child in entry]
    if isinstance(entry, dict):
        return {title: _folder(child) if child in FOLDERS else _filled(child) for title, child in entry.items()}
    return entry


def _folder(name: str) -> list[object]:
    """The pages of a folder, as navigation."""
    if name == "passes":
        return ["passes/index.md", *_passes()]
    if name == "examples":
        return [{path.name: f"examples/{path.name}.md"} for path in _examples()]
    if name == "schemes":
        return ["schemes/index.md", *(f"schemes/{scheme}.md" for scheme in _SCHEMES_ORDER)]
    return ["decisions/index.md", *(f"decisions/{path.name}" for path in sorted((DOCS / name).glob("*.md")))]


def _examples() -> list[Path]:
    """The scripts in examples/ by name, in Python and in C++."""
    return sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".cpp"))


def _passes() -> Iterator[dict[str, list[dict[str, str]]]]:
    """The groups of docs/passes/index.md, which follow the survey's sections, with their pages."""
    text = (DOCS / "passes" / "index.md").read_text(encoding="utf-8")
    for title, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL):
        pages = re.findall(r"^\| \[(\S+)\]\((\S+\.md)\)", body, re.MULTILINE)
        if pages:
            yield {title: [{name: f"passes/{page}"} for name, page in pages]}


def _targets(path: Path) -> Iterator[Path]:
    """The existing files and folders of the repository that a document links to."""
    for link in _LINK.finditer(_FENCED.sub("", path.read_text(encoding="utf-8"))):
        target = _target(path, link[2])
        if target is not None:
            yield target


def _target(path: Path, link: str) -> Path | None:
    """The file of the repository that a link of a document means; None for an address, and for a file that is missing."""
    target = Path(os.path.normpath(path.parent / unquote(link)))
    return target if "://" not in link and target.is_relative_to(ROOT) and target.exists() else None


def _file(path: Path, config: MkDocsConfig) -> File:
    """A file of the repository as one of the site."""
    uri = site_uri(path)
    if path.is_dir():
        pages = [f"- [{_title(page)}]({page.name})" for page in sorted(path.glob("*.md"))]
        return File.generated(config, uri, content="\n".join([f"# {path.name.capitalize()}", "", *pages, ""]))
    if not uri.endswith(f"{path.suffix}.md"):
        return File.generated(config, uri, abs_src_path=str(path))
    code = path.read_text(encoding="utf-8")
    about = ast.get_docstring(ast.parse(code)) if path.suffix == ".py" else None
    language = {".py": "python", ".cpp": "cpp"}.get(path.suffix, "text")
    name = path.relative_to(ROOT).as_posix()
    return File.generated(config, uri, content=f"# {name}\n\n{about or ''}\n\n```{language}\n{code.strip()}\n```\n")


def _title(path: Path) -> str:
    """The first heading of a document."""
    return path.read_text(encoding="utf-8").partition("# ")[2].partition("\n")[0]


def _rewritten(text: str, path: Path, uri: str) -> str:
    """A stretch of Markdown without code. path: the document in the repository. uri: its name on the site."""

    def moved(link: re.Match[str]) -> str:
        target = _target(path, link[2])
        if target is None:
            return link.group()
        return f"{link[1]}{_relative(site_uri(target), uri)}{link[3] or ''}{link[4]}"

    # GitHub needs no empty line before a list, and two spaces before a nested one.
    return _NESTED.sub("    ", _LIST_AFTER_TEXT.sub(r"\1\n", _LINK.sub(moved, text)))


def _relative(uri: str, page: str) -> str:
    """The link from one page of the site to another."""
    return os.path.relpath(uri, PurePosixPath(page).parent.as_posix() or ".").replace(os.sep, "/")

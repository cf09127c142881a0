"""The documentation: generated pages are current, links and paths exist, shown commands run, and the site builds."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from doc_cases import DOCS, NOT_OURS, ROOT, blocks, commands, furnish, run_page

import mopefuse

PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
LESSONS = [path for path in PAGES if path.parent.name in ("tutorials", "how-to") or path.name == "fusion-methods.md"]
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- generated pages


@pytest.mark.parametrize("name", ["cli_page", "settings_page"])
def test_a_generated_page_is_current(name: str) -> None:
    module = script(name)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), f"out of date: run python scripts/{name}.py"


def test_the_command_line_page_has_every_command_and_flag() -> None:
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    for known in ("## mopefuse train", "## mopefuse data check", "`--warm-start`", "`-o, --out`", "`--audit, --no-audit`"):
        assert known in page


# -- text


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_links_to_files_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text)
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_nothing_refers_to_documents_that_are_not_in_the_repository() -> None:
    files = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CITATION.cff")] + PAGES
    for folder, pattern in (("mopefuse", "*.py"), ("scripts", "*.py"), ("tests", "*.py"), ("recipes", "*.yaml")):
        files += (ROOT / folder).rglob(pattern)
    foreign = re.compile(r"\b(METHOD|FAULTS|STYLE|DESIGN)\b(?=[ ,.:;)]|$)|\bF-\d{2,3}\b(?!-)", re.MULTILINE)
    texts = {path.relative_to(ROOT): path.read_text("utf-8") for path in files if path != Path(__file__)}
    found = [f"{path}: {match.group()}" for path, text in texts.items() for match in foreign.finditer(text)]
    assert found == []


def test_paths_named_in_the_architecture_exist() -> None:
    named = set(re.findall(r"`((?:mopefuse|tests|scripts|docs|recipes)/[\w./-]*)`", ARCHITECTURE))
    assert len(named) > 40
    assert sorted(path for path in named if not (ROOT / path).exists()) == []


def test_the_architecture_lists_every_subpackage() -> None:
    rooms = {path.name for path in (ROOT / "mopefuse").iterdir() if (path / "__init__.py").is_file()}
    assert {room for room in rooms if f"| `mopefuse/{room}/` |" not in ARCHITECTURE} == set()


def test_the_architecture_has_short_walkthroughs_and_many_tasks() -> None:
    for walk in ("train", "predict"):
        (part,) = re.findall(rf"^## `mopefuse {walk}`.*?\n(.*?)(?=^## )", ARCHITECTURE, re.MULTILINE | re.DOTALL)
        assert 5 <= len(re.findall(r"^\d+\. `", part, re.MULTILINE)) <= 15, walk
    (tasks,) = re.findall(r"^## Where do I change .*?\n(.*)", ARCHITECTURE, re.MULTILINE | re.DOTALL)
    assert len(re.findall(r"^\| .*`mopefuse/", tasks, re.MULTILINE)) >= 10


def test_the_citation_names_the_software_and_both_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert [paper["url"][-10:] for paper in citation["references"]] == ["2312.03734", "2403.10568"]


def test_the_workflow_covers_every_supported_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python-version"] == ["3.10", "3.11", "3.12", "3.13"]
    assert {"python-version": "3.10", "dependencies": "oldest"} in matrix["include"]
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    targets = {step for step in steps if step.startswith("make ")}
    assert {"make check", "make docs", "make test"} <= targets
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target.removeprefix('make ')}:", makefile, re.MULTILINE) for target in targets)


# -- code that runs


@pytest.mark.matrix
@pytest.mark.parametrize("page", LESSONS, ids=lambda path: path.stem)
def test_every_command_and_python_block_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page.read_text(encoding="utf-8")
    furnish(tmp_path)
    for study in blocks(text, "yaml"):
        (tmp_path / ("my-search.yaml" if "search:" in study else "my-study.yaml")).write_text(study)
    monkeypatch.chdir(tmp_path)
    run_page(text)


def test_every_tutorial_and_how_to_shows_mopefuse_commands() -> None:
    shown = {page.stem: commands(page.read_text("utf-8")) for page in LESSONS}
    without = [page for page, lines in shown.items() if all(words[0] in NOT_OURS for words in lines)]
    assert without == ["python"]  # which has Python


@pytest.mark.process
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(DOCS / "quickstart.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    commands_folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{commands_folder}{os.pathsep}{os.environ['PATH']}")
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "run folder: runs/fusion" in printed
    assert "'probabilities'" in printed


@pytest.mark.process
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Without the notebook, which has its own test."""
    folders = ["-d", tmp_path / "trees", DOCS, tmp_path / "html"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", *map(str, folders)],
        capture_output=True,
        text=True,
        env=os.environ | {"DOCS_NOTEBOOK": "off"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "html" / "api.html").read_text(encoding="utf-8")
    assert [name for name in mopefuse.__all__ if name != "__version__" and f'id="mopefuse.{name}"' not in reference] == []
    assert (tmp_path / "html" / "quickstart.html").is_file()

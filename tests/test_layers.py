"""The shape of the code: imports go down only, and no file outgrows a reader."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mopefuse

ROOT = Path(mopefuse.__file__).parent
ORDER = (  # from below; a module imports from rows above its own line, or from its own package
    "errors shown",
    "settings",
    "setting_paths",
    "registry config signals threads precision gates pixels tokens bootstrap libraries regular_files",
    "space plugins modality sides shares pt2_words",
    "recipe checkpoint distributed metrics routing pt2_program",
    "folder_lock",
    "run_facts bundle_facts",
    "run device cache room spool pt2_archive",
    "adapter encoders prompts data grid",
    "fusion source card compare predictions",
    "graph",
    "predictor",
    "verify",
    "report optim losses testing answers resume",
    "evaluate",
    "trainer",
    "closed_form doubts",
    "train doctor",
    "swap run_model audit missing study",
    "predict reporting study_report search",
    "bundle",
    "export",
    "demo push bench",
    "cli",
)
LAYER = {name: level for level, names in enumerate(ORDER) for name in names.split()}
BETWEEN_NEIGHBOURS = {  # encoders, prompts and data know nothing of one another but the two types they hand over
    "prompts": {"encoders._attention"},  # the Prompt that an encoder's layer takes
    "data": {"encoders._base"},  # the Preprocess that an encoder brings
}
FILES = sorted(ROOT.rglob("*.py"))


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def imports(file: Path) -> set[str]:
    """The modules of ours that a file imports, below ``mopefuse.``, also inside functions."""
    modules = {name_of(path) for path in FILES}
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)} imports relatively"
            both = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name.removeprefix("mopefuse.") in modules else str(node.module) for name in both}
    return {name.removeprefix("mopefuse.") for name in found if name.startswith("mopefuse.")}


def allowed(importer: str, imported: str) -> bool:
    mine, theirs = importer.partition(".")[0], imported.partition(".")[0]
    if mine == theirs or LAYER[theirs] < LAYER[mine]:
        return True
    return imported in BETWEEN_NEIGHBOURS.get(mine, set())


@pytest.mark.parametrize("file", [file for file in FILES if name_of(file) not in ("", "__main__")], ids=name_of)
def test_imports_go_down_only(file: Path) -> None:
    importer = name_of(file)
    assert importer.partition(".")[0] in LAYER, f"give {importer} its place in ORDER"
    assert [imported for imported in sorted(imports(file)) if not allowed(importer, imported)] == []


def test_every_allowed_neighbour_is_needed() -> None:
    for package, modules in BETWEEN_NEIGHBOURS.items():
        used = set().union(*(imports(file) for file in FILES if name_of(file).startswith(f"{package}.")))
        assert modules <= used


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_file_has_more_than_400_lines(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400


NAMES_OF_MODALITIES = {"image", "img", "text", "audio"}
MAY_NAME_THEM = {  # modalities are data: all others ask `mopefuse.modality`
    "modality": "which two the Python interface takes by position",
    "config": "the defaults of text_col and img_col",
    "recipe": "what rows had in runs of a version that knew no other modality",
    "data.columns": "what is expected of a table where little is there, and the flags for it",
    "data.images": "the reader of images",
    "data.findings": "the key of --json output that names a file",
    "cli.predict": "--image and --text",
    "fusion.mmbt": "a method that is defined for an image and a text",
    **dict.fromkeys(("data._source", "data.food101", "data.prepare", "data.digit_questions"), "written in the native format"),
    **dict.fromkeys(("cli.data", "cli._prepare_display", "bench.loader"), "written in the native format"),
    **dict.fromkeys(
        ("bundle", "bundle_facts", "graph", "predictor", "verify"),
        "the format of bundles, whose inputs are pixels and tokens",
    ),
    **dict.fromkeys(("report.run_answers", "report.run_routing"), "a key of a template"),
    **dict.fromkeys(("report.drawing", "report.figures"), "a colour"),
    "demo": "the two baselines of the demo",
}


def test_only_readers_encoders_and_a_listed_few_name_modalities() -> None:
    found = set()
    for file in FILES:
        words = {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)}
        if words & NAMES_OF_MODALITIES and not name_of(file).startswith("encoders."):
            found.add(name_of(file))
    assert found == MAY_NAME_THEM.keys()


def test_nothing_loads_pickles() -> None:
    """No `pickle`, no `torch.load`, no `yaml.load` with a loader that makes objects: safetensors, JSON and plain YAML only."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {"pickle", "dill", "cloudpickle", "shelve"}, file
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                assert (node.func.value.id, node.func.attr) not in {("torch", "load"), ("pickle", "load")}, file

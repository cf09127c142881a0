"""The shape of the code: imports go down only, and no file outgrows a reader."""

from __future__ import annotations

import ast
from pathlib import Path

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
BELOW_THE_TOP = [file for file in FILES if file.relative_to(ROOT).as_posix() not in ("__init__.py", "__main__.py")]


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {name_of(path) for path in FILES}


def imports(file: Path) -> set[str]:
    """The modules of ours that a file imports, below ``mopefuse.``, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)} imports relatively"
            both = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name.removeprefix("mopefuse.") in MODULES else str(node.module) for name in both}
    return {name.removeprefix("mopefuse.") for name in found if name.startswith("mopefuse.")}


def allowed(importer: str, imported: str) -> bool:
    mine, theirs = importer.partition(".")[0], imported.partition(".")[0]
    if mine == theirs or LAYER[theirs] < LAYER[mine]:
        return True
    return imported in BETWEEN_NEIGHBOURS.get(mine, set())


def test_every_package_has_its_place() -> None:
    assert [name_of(file) for file in BELOW_THE_TOP if name_of(file).partition(".")[0] not in LAYER] == []


def test_imports_go_down_only() -> None:
    upward = [
        f"{name_of(file)} imports {imported}"
        for file in BELOW_THE_TOP
        for imported in sorted(imports(file))
        if not allowed(name_of(file), imported)
    ]
    assert upward == []


def test_every_allowed_neighbour_is_needed() -> None:
    for package, modules in BETWEEN_NEIGHBOURS.items():
        used = set().union(*(imports(file) for file in FILES if name_of(file).startswith(f"{package}.")))
        assert modules <= used


def test_no_file_has_more_than_400_lines() -> None:
    lines = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {name: count for name, count in lines.items() if count > 400} == {}


NAMES_OF_MODALITIES = {"image", "img", "text", "audio"}
MAY_NAME_THEM = {  # modalities are data: all others ask `mopefuse.modalities.base`
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

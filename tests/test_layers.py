"""The structure of the code: imports only go down, and files stay short."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterable
from graphlib import TopologicalSorter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

import mopefuse

ROOT = Path(mopefuse.__file__).parent
ORDER = (  # from the bottom up; a module imports only from lines above its own, or from its own subpackage
    "errors",
    "core",
    "config",
    "metrics modalities",
    "tasks",
    "encoders",
    "prompts data",
    "fusion",
    "runs",
    "inference",
    "evaluation",
    "training export testing serving",
    "studies bench autofit",
    "report",
    "cli",
)
LAYER = {name: level for level, names in enumerate(ORDER) for name in names.split()}
BETWEEN_NEIGHBOURS = {  # encoders, prompts and data are independent of each other, except for the types that they exchange
    "prompts": {"encoders.attention"},  # the Prompt that a layer of an encoder takes
    "data": {"encoders.base", "encoders.frozen", "encoders.sharding"},  # an encoder's Preprocess and its features
}
FILES = sorted(ROOT.rglob("*.py"))


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {name_of(file) for file in FILES}


@functools.cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def imports(file: Path, *, for_types: bool = True) -> frozenset[str]:
    """The modules of mopefuse that a file imports, without the prefix ``mopefuse.``, including imports in functions.

    Args:
        for_types: also those imported under ``if TYPE_CHECKING``.
    """
    found = set()
    body = tree_of(file).body
    if not for_types:
        body = [node for node in body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    for node in ast.walk(ast.Module(body, [])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)} imports relatively"
            both = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name.removeprefix("mopefuse.") in MODULES else str(node.module) for name in both}
    return frozenset(name.removeprefix("mopefuse.") for name in found if name.startswith("mopefuse."))


def allowed(importer: str, imported: str) -> bool:
    mine, theirs = importer.partition(".")[0], imported.partition(".")[0]
    if mine in BETWEEN_NEIGHBOURS and theirs == "encoders":
        return imported in BETWEEN_NEIGHBOURS[mine]
    return mine == theirs or LAYER[theirs] < LAYER[mine]


def test_imports_go_down_only() -> None:
    upward = []
    for file in FILES:
        importer = name_of(file)
        if importer not in ("", "__main__"):
            assert importer.partition(".")[0] in LAYER, f"add {importer} to ORDER"
            found = sorted(imports(file))
            upward += [f"{importer} imports {imported}" for imported in found if not allowed(importer, imported)]
    assert upward == []


def test_no_import_cycle() -> None:
    rooms = {name_of(file): imports(file, for_types=False) - {name_of(file)} for file in FILES}
    TopologicalSorter(rooms).prepare()  # raises CycleError


def test_the_package_has_few_subpackages_and_few_top_level_modules() -> None:
    modules = sorted(path.stem for path in ROOT.glob("*.py"))
    packages = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
    assert len(modules) <= 4, modules
    assert len(modules) + len(packages) <= 24, packages
    assert {*packages, "errors"} | set(modules) - {"__init__", "__main__"} == set(LAYER)


def test_every_exception_to_the_import_order_is_needed() -> None:
    for package, modules in BETWEEN_NEIGHBOURS.items():
        used = set().union(*(imports(file) for file in FILES if name_of(file).startswith(f"{package}.")))
        assert modules <= used


def test_no_file_has_more_than_400_lines() -> None:
    lines = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {name: count for name, count in lines.items() if count > 400} == {}

@pytest.fixture
def longest_functions() -> ModuleType:
    spec = spec_from_file_location("longest_functions", ROOT.parent / "scripts" / "longest_functions.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_function_has_more_than_60_lines(longest_functions: ModuleType) -> None:
    assert longest_functions.too_long() == set()


def test_long_functions_are_found_at_any_depth(longest_functions: ModuleType, tmp_path: Path) -> None:
    root = tmp_path / "package"
    root.mkdir()
    body = "\n        ".join(["pass"] * 60)
    code = f"class A:\n    def of_61(self, a, *b, c, **d):\n        {body}\n    def of_2(self):\n        pass\n"
    (root / "module.py").write_text(code)
    assert longest_functions.too_long(root) == {"module.A.of_61"}
    first = longest_functions.functions(root)[0]
    assert (first.lines, first.parameters, first.place) == (61, 5, "package/module.py:2")


def everything_imported_by(names: Iterable[str]) -> set[str]:
    """All modules that are imported by these, directly or indirectly, including imports in functions."""
    known = {name_of(file): file for file in FILES}
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in known and name not in found:
            found.add(name)
            waiting += imports(known[name], for_types=False)
    return found


def test_training_does_not_import_the_export_runtime() -> None:
    """Neither at import nor later: a training machine does not need onnxruntime, and a change to bundles cannot break
    training."""
    rooms = {name.partition(".")[0] for name in everything_imported_by(["training.train", "training.swap"])}
    assert {"runs", "evaluation"} <= rooms and not {"inference", "export"} & rooms
    code = "import sys, mopefuse.training.train; print(*(name for name in sys.modules if name.startswith('mopefuse.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = {name.split(".")[1] for name in done.stdout.split()}
    assert "training" in loaded and not {"inference", "export", "report", "cli"} & loaded


NAMES_OF_MODALITIES = {"image", "img", "text", "audio"}
MAY_NAME_THEM = {  # modalities are data: all other modules use `mopefuse.modalities.base`
    "modalities.base": "which two the Python interface takes by position",
    "config.data_section": "the defaults of text_col and img_col",
    "data.columns": "what is expected of a table where little is there, and the flags for it",
    "modalities.image": "the reader of images",
    "data.findings": "the key of --json output that names a file",
    "cli.predict": "--image and --text",
    "fusion._text_and_image": "methods that are defined for an image and a text",
    **dict.fromkeys(
        ("data.sets.food101", "data.prepare", "data.sets.digit_questions", "data.sets.digit_masks", "data.sets.digit_captions",
         "data.sets.photo_grids", "cli._prepare_display", "bench.loader"),
        "written in the native format",
    ),
    **dict.fromkeys(
        ("export.bundle_maker", "inference.bundle_manifest", "export.graph", "inference.bundle", "export.verify"),
        "the format of bundles, whose inputs are pixels and tokens",
    ),
    **dict.fromkeys(("report.run_errors", "report.run_routing", "report.run_data", "report.run_masks"), "a key of a template"),
    "report.themes": "a kind of mark in charts",
    "training.demo": "the two baselines of the demo",
    **dict.fromkeys(("cli.serve", "serving.server_settings", "serving.ray_settings"), "a form of the log"),
}


def test_only_listed_modules_name_concrete_modalities() -> None:
    found = set()
    for file in FILES:
        words = {node.value for node in ast.walk(tree_of(file)) if isinstance(node, ast.Constant)}
        if words & NAMES_OF_MODALITIES and not name_of(file).startswith("encoders."):
            found.add(name_of(file))
    assert found == MAY_NAME_THEM.keys()


def test_nothing_loads_pickles() -> None:
    """No `pickle`, no `torch.load`, no `yaml.load` with a loader that makes objects: safetensors, JSON and plain YAML only."""
    for file in FILES:
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {"pickle", "dill", "cloudpickle", "shelve"}, file
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                assert (node.func.value.id, node.func.attr) not in {("torch", "load"), ("pickle", "load")}, file

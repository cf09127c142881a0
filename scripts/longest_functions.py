"""Print the longest functions of the package, and fail if one has more than 60 lines.

    python scripts/longest_functions.py [COUNT]

Lines are those from ``def`` to the last statement, docstring and comments included.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1] / "mopefuse"
LIMIT = 60


class Function(NamedTuple):
    """A function or method; `name` is ``package.module.Class.function`` below mopefuse."""

    lines: int
    parameters: int
    name: str
    place: str


def functions(root: Path = ROOT) -> list[Function]:
    """All functions below a folder, nested ones too, longest first."""
    found: list[Function] = []
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += _inside(tree, _module(path, root), str(path.relative_to(root.parent)))
    return sorted(found, key=lambda function: (-function.lines, function.name))


def too_long(root: Path = ROOT) -> set[str]:
    """Names of the functions with more than `LIMIT` lines."""
    return {function.name for function in functions(root) if function.lines > LIMIT}


def _module(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def _inside(node: ast.AST, prefix: str, file: str) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        name = f"{prefix}.{child.name}" if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) else prefix
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            assert child.end_lineno is not None
            arguments = child.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            count = len(named) + (arguments.vararg is not None) + (arguments.kwarg is not None)
            yield Function(child.end_lineno - child.lineno + 1, count, name, f"{file}:{child.lineno}")
        yield from _inside(child, name, file)


def main() -> int:
    """Print a table; the exit code is 1 if a function is too long."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    print("lines  parameters  function")
    for function in functions()[:count]:
        print(f"{function.lines:5}  {function.parameters:10}  {function.name}  {function.place}")
    long = len(too_long())
    print(f"{long} of {len(functions())} functions have more than {LIMIT} lines")
    return 1 if long else 0


if __name__ == "__main__":
    sys.exit(main())

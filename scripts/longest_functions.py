"""Print the longest functions and files of the package.

``python scripts/longest_functions.py [--functions 10] [--files 10] [FOLDER]``
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def function_lengths(folder: Path) -> list[tuple[int, str]]:
    """Lines and place of every function below a folder, longest first; decorators are not counted."""
    found = []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                found.append((node.end_lineno - node.lineno + 1, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"))
    return sorted(found, key=lambda item: (-item[0], item[1]))


def file_lengths(folder: Path) -> list[tuple[int, str]]:
    """Lines and path of every file below a folder, longest first."""
    found = [(len(path.read_text(encoding="utf-8").splitlines()), str(path.relative_to(ROOT))) for path in folder.rglob("*.py")]
    return sorted(found, key=lambda item: (-item[0], item[1]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "mopefuse")
    parser.add_argument("--functions", type=int, default=10, help="how many functions to print")
    parser.add_argument("--files", type=int, default=10, help="how many files to print")
    arguments = parser.parse_args()
    rows = [
        *function_lengths(arguments.folder.resolve())[: arguments.functions],
        *file_lengths(arguments.folder.resolve())[: arguments.files],
    ]
    for lines, place in rows:
        print(f"{lines:5d}  {place}")

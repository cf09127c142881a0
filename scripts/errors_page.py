"""Write docs/errors.md: exit codes, and every ``MF-`` code in the source with its messages.

``python scripts/errors_page.py``; tests/test_errors.py checks that the page lists exactly the codes in the source.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from mopefuse import errors
from mopefuse.core import error_codes

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "errors.md"
KINDS: dict[str, type[errors.MopefuseError]] = {
    kind.__name__: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.MopefuseError) and kind.family not in ("INT", "STOP")
}
OUTSIDE = {  # literals in mopefuse.cli.app, or derived from the number of a signal
    "MF-INT-00": (1, ["a bug: please report it, with crash.log"]),
    "MF-USE-01": (2, ["the command line is invalid (with `--json`; otherwise the usage is shown)"]),
    "MF-STOP-02": (130, ["stopped at step … of … by Ctrl-C"]),
    "MF-STOP-15": (143, ["stopped at step … of … by SIGTERM"]),
}
NOTES = {  # for codes whose message is built from variables alone
    "MF-CFG-01": "settings that are unknown, missing or out of bounds, each by its path",
    "MF-CFG-09": "a file or folder cannot be used, with the system's message",
    "MF-CFG-343": "there is no training split to take the labels from, or the labels are not distinct names",
    "MF-CFG-442": "an option of `predict` that does not fit `--engine`, or needs it",
    "MF-CFG-64": "no input is given, or both a table and `--image` or `--text`",
    "MF-CFG-66": "the input is not a file",
    "MF-CFG-71": "no output folder is given, or two are",
    "MF-DATA-03": "a row is not valid: its line and the reason",
    "MF-DATA-231": "lists of labels that were read as one class each",
    "MF-DATA-232": "more labels than a third of the training rows",
    "MF-DATA-26": "too many bad rows to skip, with the first of them",
    "MF-DATA-27": "images or texts of train are also in val or test (`--strict`)",
    "MF-DATA-66": "no row of a split can be used, with the most frequent reasons",
    "MF-DATA-73": "the destination is inside the source folder",
    "MF-DATA-80": "`data check` found errors",
    "MF-DATA-81": "`data check --strict` found warnings",
    "MF-ENC-21": "an encoder that cannot be prompted as `--main`, and why",
    "MF-PLUG-01": "several plugins provide the same name",
    "MF-PLUG-02": "a plugin cannot be imported: its distribution, entry point and the reason",
    "MF-PLUG-03": "a run needs a plugin that is not installed, or not in this version: distribution and version",
    "MF-PLUG-05": "an installed plugin does not provide a name",
}
HEAD = """# Errors and exit codes

An error that you can fix is one line on stderr, without a traceback:

```
error[MF-DATA-11]: image not found: images/a.jpg · train.jsonl:17, id 4411 · fix: add the file
```

With `--json` it is one object on stdout, and nothing else is printed there:

```
{"ok": false, "error": {"code": "MF-DATA-11", "exit": 4, "message": "...", "where": "...", "hint": "..."}}
```

Codes are stable: their meaning does not change, and numbers are never reused.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | internal error, a bug: one line, and `crash.log` with the traceback (`mopefuse --debug ...` prints it too) |
| 2 | the command line is invalid |
| 3 | the configuration is invalid: a recipe, a flag, `--set`, the run folder |
| 4 | the data are invalid: a split, a row, an image |
| 5 | an encoder cannot be used, or a required package is missing or incompatible |
| 6 | a run, checkpoint or weights file is damaged, unsafe, or belongs to other encoders |
| 7 | out of disk space or memory, or a process was killed |
| 8 | a value that must be finite is NaN or infinite |
| 9 | a plugin cannot be used |
| 10 | a check failed: a quality gate (`eval --min`), or an exported graph that differs from its model |
| 11 | a request to a server of models failed, or the server cannot be started or reached |
| 130, 143 | stopped by Ctrl-C, by SIGTERM; training saves a checkpoint first, and `--resume` continues from it |
| 141 | the program that reads the output closed the pipe, as `head` does |

In the messages below, `…` stands for a value.

| code | exit code | message |
| --- | --- | --- |
"""


def codes() -> dict[str, tuple[int, list[str]]]:
    """Collect every code in the source with its exit code and messages, sorted."""
    found: dict[str, tuple[int, list[str]]] = dict(OUTSIDE)
    for path in sorted((ROOT / "mopefuse").rglob("*.py")):
        for kind, number, message in _raised(ast.parse(path.read_text(encoding="utf-8")), path):
            _, messages = found.setdefault(f"MF-{kind.family}-{number:02d}", (kind.exit_code, []))
            if message not in messages:
                messages.append(message)
    return dict(sorted(found.items(), key=lambda item: (item[1][0], item[0])))


def _raised(tree: ast.Module, path: Path) -> Iterator[tuple[type[errors.MopefuseError], int, str]]:
    """Iterate over class, number and message of every error that a module creates.

    A number is a constant of `mopefuse.core.error_codes`. Where it is a variable, it comes from tuples of the same module that
    start with a number and a message. A message that is a variable has the value last assigned to it above.
    """
    assigned = [*_assignments(tree)]
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS and node.args):
            continue
        kind, first = KINDS[node.func.id], node.args[0]
        pairs = [node.args[:2]] if _number(first) is not None else [_pair(other) for other in ast.walk(tree)]
        known = [(number, pair[1]) for pair in pairs if pair and (number := _number(pair[0])) is not None]
        if not known:
            raise ValueError(f"{path}:{node.lineno}: which number is {ast.unparse(first)}?")
        yield from ((kind, number, _template(_resolve(message, assigned))) for number, message in known)


def _assignments(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Iterate over variables and what is assigned to them, alone or in ``what, fix = ...``."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        target, value = node.targets[0], node.value
        both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts)
        pairs = zip(target.elts, value.elts, strict=True) if both else [(target, value)]
        yield from ((name.id, expression) for name, expression in pairs if isinstance(name, ast.Name))


def _resolve(message: ast.expr, assigned: list[tuple[str, ast.expr]]) -> ast.expr:
    """Resolve a variable to the expression last assigned to it."""
    if not isinstance(message, ast.Name):
        return message
    above = [value for name, value in assigned if name == message.id and value.lineno < message.lineno]
    return max(above, key=lambda value: value.lineno) if above else message


def _pair(node: ast.AST) -> list[ast.expr]:
    return node.elts[:2] if isinstance(node, ast.Tuple) and len(node.elts) > 1 else []


def _number(node: ast.expr) -> int | None:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id.endswith("Code"):
        return int(getattr(error_codes, node.value.id)[node.attr])
    return None


def _template(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return re.sub("…+", "…", "".join(map(_template, node.values)))
    return "…"


def page() -> str:
    """Generate the page."""
    lines = []
    for code, (exit_code, messages) in codes().items():
        texts = [NOTES[code]] if code in NOTES else [message for message in messages if re.search("[a-z]", message)]
        cell = "<br>".join(text.replace("|", "\\|").replace("<", "&lt;") for text in sorted(texts))
        lines.append(f"| `{code}` | {exit_code} | {cell} |\n")
    return HEAD + "".join(lines)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")

"""The contract that every modality must satisfy; see `mopefuse.modalities.base.Modality`. Checks are in `modality_checks`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mopefuse.core import registry
from mopefuse.modalities.base import Modality, get_modality
from mopefuse.testing._contract import Part, enforce
from mopefuse.testing.modality_checks import Equal, FileChecks, ModalityChecks, same


def check_modality(modality: str, *, values: Sequence[str] = (), root: Path | None = None, equal: Equal = same) -> Modality:
    """Check that a modality satisfies the contract of `mopefuse.modalities.base.Modality`; it is returned.

    Args:
        modality: its registered name.
        values: some values as they are stored in rows: paths of files relative to `root`, or the values themselves.
        root: folder of the files.
        equal: whether two values, as read() gives them, are the same; default by `==`, of arrays and images by their elements.

    Raises:
        AssertionError: the first part of the contract that is broken: what, where, and how to fix it.
    """
    found = registry.load(registry.MODALITIES, modality)
    assert isinstance(found, type) and issubclass(found, Modality), (
        f"{modality}: is not a subclass of mopefuse.modalities.base.Modality · fix: use a subclass in the entry point"
    )
    made: Any = get_modality(modality)
    if made.is_file:
        assert values and root is not None, f"{modality}: values are files · fix: pass values=[...] and root= to check_modality"
        checks: ModalityChecks = FileChecks(made, values, root, equal)
    else:
        checks = ModalityChecks(made, values, root or Path(), equal)
    enforce(_parts(checks))
    return get_modality(modality)


def _parts(check: ModalityChecks) -> list[Part]:
    mopefuse_error = "raise mopefuse.errors.DataError(number, what, where=where, fix=...) in place of other exceptions"
    parts = [
        Part("describes itself", check.attributes, "set plural, value_description and type_fix to plain words for messages"),
        Part(
            "has examples and a blank value",
            check.examples,
            "return at least two values, as read() gives them, from examples(), and a blank one from blank_value()",
        ),
        Part(
            "distinguishes a single value from a list of values",
            check.single_and_lists,
            "override is_single(): True for one value, False for a list or tuple of values",
        ),
        Part(
            "rejects objects that are not its values",
            check.other_objects_are_refused,
            f"override accepts(): False for what is not a value; in prepare(), {mopefuse_error}",
        ),
        Part("reads values the same each time", check.reading, f"keep nothing on self in read(); {mopefuse_error}"),
        Part(
            "prepares values from Python like those of rows",
            check.prepares_as_it_reads,
            "return from prepare() what read() returns for the same value",
        ),
        Part("has readers and values that can be sent to data workers", check.workers, "keep no open files, locks or lambdas"),
        Part("reports damaged values as errors", check.damaged, mopefuse_error),
    ]
    if isinstance(check, FileChecks):
        safe = "decode with a library for this format alone; numpy.load needs allow_pickle=False"
        inside = "let Files.read() find the file, and override decode() only"
        parts += [
            Part("never unpickles a file", check.no_pickle, safe),
            Part("reads no file outside the data folder", check.stays_inside, inside),
            Part(
                "inspects files exactly as it decodes them",
                check.inspects_whole_files,
                "raise in inspect() where decode() would, and nowhere else",
            ),
        ]
    return parts

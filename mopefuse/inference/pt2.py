"""Write pt2 archives without local paths and names, and read them without trusting them.

A pt2 archive is a zip file of JSON and of the raw bytes of tensors. torch's own reader unpickles and evaluates parts of it, so
it never sees the file: every record is read once and checked against `mopefuse.inference.pt2_program`, and only records that
pass are given to torch.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.export import ExportedProgram

from mopefuse.core.error_codes import CheckpointCode, EncoderCode
from mopefuse.errors import CheckpointError, EncoderError
from mopefuse.inference.pt2_program import PAYLOADS, PROGRAM, Payload
from mopefuse.inference.pt2_vocabulary import DTYPES

Graph = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]
T = TypeVar("T")

_LARGEST_JSON = 50_000_000  # bytes; a model of 48 layers has 2 million
_MAX_VALUES = 1_000_000  # maximum in a JSON record, each up to 2 kB while it is checked; 48 layers have 100,000
_MAX_EXPLAINED = 1000  # errors in a record; if there are more, they are not described
_MAX_RECORDS = 100_000
_PROGRAM, _WEIGHTS, _CONSTANTS = (
    "models/model.json",
    "data/weights/model_weights_config.json",
    "data/constants/model_constants_config.json",
)
_loading = threading.Lock()  # torch deserialises one archive at a time, and `silence_exporters` changes what all threads log
_EMPTY = "data/sample_inputs/model.pt"  # must be empty; any content would be a pickle
_MARKS = {
    "archive_format": rb"pt2", "archive_version": rb"\d{1,3}", "byteorder": rb"little", ".data/version": rb"\d{1,3}\n?",
    ".data/serialization_id": rb"\d{1,64}", ".format_version": rb"\d{1,3}", ".storage_alignment": rb"\d{1,5}",
}  # fmt: skip


def save_pt2(program: ExportedProgram, file: Path) -> None:
    """Write a pt2 archive: no pickle, and no trace of the files and functions that the graph was made from.

    Raises:
        EncoderError: the graph has an operator or size that `load_pt2` would refuse.
    """
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for word in ("stack_trace", "nn_module_stack", "torch_fn", "source_fn_stack", "from_node", "custom"):
                node.meta.pop(word, None)
    torch.export.save(program, file)
    try:
        read_pt2(file)
    except CheckpointError as error:
        raise EncoderError(
            EncoderCode.GRAPH_NOT_ARCHIVABLE, f"a pt2 archive cannot hold this graph: {error.what}", fix="use --format onnx"
        ) from error


def load_pt2(file: Path, device: torch.device) -> Graph:
    """Load the graph in a pt2 archive as a function.

    Raises:
        CheckpointError: it contains something that exported graphs do not need, or it cannot be read.
    """
    from torch._export.serde.serialize import SerializedArtifact, deserialize

    program, weights, constants = read_pt2(file)
    try:
        with _loading, silence_exporters():
            exported = deserialize(SerializedArtifact(program, weights, constants, b""))  # type: ignore[arg-type]
            if device.type != "cpu":
                from torch.export.passes import move_to_device_pass

                exported = move_to_device_pass(exported, device)
            return exported.module(check_guards=False)  # `Bundle` checks the inputs
    except MemoryError:
        raise
    except Exception as error:  # for an inconsistent graph, torch can raise any exception
        raise _damaged(file, str(error).partition("\n")[0]) from error


def read_pt2(file: Path) -> tuple[bytes, dict[str, Tensor], dict[str, Tensor]]:
    """Read the program as JSON, the weights and the constants by name; everything is checked, nothing is executed.

    Raises:
        CheckpointError: see `load_pt2`.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            records = _records(archive, file)
            program = _parsed(PROGRAM, archive, records, _PROGRAM, file)
            payloads = [_parsed(PAYLOADS, archive, records, name, file)["config"] for name in (_WEIGHTS, _CONSTANTS)]
            for name, pattern in _MARKS.items():
                if name in records and not re.fullmatch(pattern, archive.read(records.pop(name))):
                    raise _refused(file, f"{name} of a different kind")
            weights = _tensors(archive, records, "data/weights/", payloads[0], file)
            constants = _tensors(archive, records, "data/constants/", payloads[1], file)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # zipfile and torch can raise any exception for a damaged archive
        raise _damaged(file, str(error).partition("\n")[0]) from error
    if records:
        raise _refused(file, f"a record {min(records)[:80]!r} that nothing refers to")
    return json.dumps(program).encode(), weights, constants


def _records(archive: zipfile.ZipFile, file: Path) -> dict[str, zipfile.ZipInfo]:
    """The records of an archive, by name without the outer folder: names are unique, and nothing is compressed."""
    records: dict[str, zipfile.ZipInfo] = {}
    roots = set()
    for entry in archive.infolist()[: _MAX_RECORDS + 1]:
        root, _, name = entry.filename.partition("/")
        roots.add(root)
        if name in records:
            raise _refused(file, f"two records {name[:80]!r}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            raise _refused(file, f"a compressed or encrypted record {name[:80]!r}")
        records[name] = entry
    if len(roots) != 1 or len(records) > _MAX_RECORDS or sum(e.file_size for e in records.values()) > file.stat().st_size:
        raise _refused(file, "records of several archives")
    missing = {_PROGRAM, _WEIGHTS, _CONSTANTS, "archive_format"} - records.keys()
    if missing:
        raise _damaged(file, f"it has no {min(missing)}")
    empty = records.pop(_EMPTY, None)
    if empty is not None and empty.file_size:
        raise _refused(file, f"pickled inputs in {_EMPTY}")
    return records


def _parsed(
    grammar: TypeAdapter[T], archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], name: str, file: Path
) -> T:
    entry = records.pop(name)
    if entry.file_size > _LARGEST_JSON:
        raise _refused(file, f"{entry.file_size:,} bytes of {name}")
    text = archive.read(entry)
    if sum(map(text.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise _refused(file, f"more than {_MAX_VALUES:,} values in {name}")
    try:
        return grammar.validate_json(text)
    except ValidationError as error:
        if error.error_count() > _MAX_EXPLAINED:
            raise _refused(file, f"{name}: {error.error_count():,} errors") from None
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"][-6:]))
        raise _refused(file, f"{name}: {place[:120]}: {first['msg'][:160]}") from None


def _tensors(
    archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], folder: str, payloads: Mapping[str, Payload], file: Path
) -> dict[str, Tensor]:
    """The tensors in a table of payloads; several may be views of one record."""
    flat: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, payload in payloads.items():
        meta, record = payload["tensor_meta"], folder + payload["path_name"]
        dtype = DTYPES[meta["dtype"]]
        if record not in flat:
            if record not in records:
                raise _damaged(file, f"it has no {record}")
            raw = bytearray(archive.read(records.pop(record)))
            flat[record] = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        size, stride = ([part["as_int"] for part in parts] for parts in (meta["sizes"], meta["strides"]))
        tensor = flat[record].view(dtype).as_strided(size, stride, meta["storage_offset"]["as_int"])
        found[name] = nn.Parameter(tensor, requires_grad=False) if payload["is_param"] else tensor
    return found


def _refused(file: Path, what: str) -> CheckpointError:
    fix = "do not load this file; ask its author for an ONNX export"
    what = f"{file.name} contains records that exported graphs never need and that could run code when loaded: {what}"
    return CheckpointError(CheckpointCode.UNSAFE_CONTENT, what, where=str(file), fix=fix)


def _damaged(file: Path, why: str) -> CheckpointError:
    return CheckpointError(
        CheckpointCode.FILE_DAMAGED, f"{file.name} is damaged: {why}", where=str(file), fix="export it again"
    )


@contextmanager
def silence_exporters() -> Iterator[None]:
    """Suppress the warnings and logs of tracers and converters, which are for their developers."""
    chatty = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "root", "")]
    levels = [logger.level for logger in chatty]
    for logger in chatty:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(chatty, levels, strict=True):
            logger.setLevel(level)

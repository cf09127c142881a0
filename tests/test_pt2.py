"""A pt2 archive of any origin runs no code: it loads as the graph that was exported, or not at all."""

from __future__ import annotations

import json
import random
import shutil
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pt2_cases
import pytest
import torch
from conftest import TINY, call, matrix
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_export import reseal

from mopefuse.errors import CheckpointError, NumericError
from mopefuse.inference.bundle import Bundle
from mopefuse.inference.pt2 import load_pt2, read_pt2

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pt2(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pt2 bundle; tests must not change it."""
    folder = tmp_path_factory.mktemp("exports")
    run, out = folder / "run", folder / "pt2"
    for command in (
        ("train", *TINY, "--method", "late-concat", "--data", pairs, "--out", run, "--steps", "1"),
        ("export", run, "-o", out, "--format", "pt2"),
    ):
        done = call(*command)
        assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def content(pt2: Path) -> pt2_cases.Content:
    """The records of its archive."""
    return pt2_cases.read(pt2 / "model.pt2")


def sample() -> dict[str, torch.Tensor]:
    """The inputs of one sample."""
    ids = torch.tensor([[1, 2, 3]])
    return {"main_pixels": torch.full((1, 16, 16, 3), 90, dtype=torch.uint8), "comp_ids": ids, "comp_mask": ids > 0}


def run_graph(file: Path) -> list[np.ndarray[Any, Any]]:
    """Run the graph in a file."""
    return [output.numpy() for output in load_pt2(file, CPU)(sample())]


@pytest.mark.parametrize("name", matrix(pt2_cases.ATTACKS, list(pt2_cases.ATTACKS)[::3]))
def test_a_hostile_archive_is_refused_and_runs_no_code(
    name: str, pt2: Path, content: pt2_cases.Content, tmp_path: Path
) -> None:
    hostile, canary = dict(content), tmp_path / "canary"
    pt2_cases.ATTACKS[name](hostile, canary)
    bad = Path(shutil.copytree(pt2, tmp_path / "bad"))
    pt2_cases.write(bad / "model.pt2", hostile)
    reseal(bad)
    for command in (("predict", bad, "--image", bad / "example.png", "--text", "a"), ("export", "verify", bad)):
        done = call(*command)
        assert done.returncode == 6, done.stderr
        assert "model.pt2" in done.stderr and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    assert not canary.exists()


@pytest.mark.parametrize("name", matrix(pt2_cases.RUNS_CODE, list(pt2_cases.RUNS_CODE)[:1]))
def test_torch_alone_would_run_the_code_of_hostile_archives(name: str, content: pt2_cases.Content, tmp_path: Path) -> None:
    """Otherwise the test above would prove nothing."""
    hostile, canary = dict(content), tmp_path / "canary"
    pt2_cases.RUNS_CODE[name](hostile, canary)
    pt2_cases.write(tmp_path / "model.pt2", hostile)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(Exception):
            torch.export.load(tmp_path / "model.pt2").module()(sample())
    assert canary.exists()


SIZES = {  # that sympy would multiply out
    "a product of sums": "Mul(" + ", ".join(f"Add(Symbol('s{i}'), Integer({i + 1}))" for i in range(30)) + ")",
    "a power of a sum": "Pow(Add(" + ", ".join(f"Symbol('s{i}')" for i in range(90)) + "), Integer(8))",
    "a remainder": "PythonMod(Pow(Add(" + ", ".join(f"Symbol('s{i}')" for i in range(60)) + "), Integer(8)), Symbol('s1'))",
}


@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_takes_hours_to_compare_is_refused(name: str, content: pt2_cases.Content, tmp_path: Path) -> None:
    hostile = dict(content)
    pt2_cases.edit(hostile, pt2_cases.PROGRAM, lambda value: pt2_cases.first_value(value, "expr_str", SIZES[name]))
    pt2_cases.write(tmp_path / "model.pt2", hostile)
    with pytest.raises(CheckpointError, match="too many terms"):
        read_pt2(tmp_path / "model.pt2")


FLOODS: dict[str, tuple[bytes, str]] = {
    "wrong entries": (b'{"graph_module":{"graph":{"nodes":[' + b"0," * 5000 + b"0]}}}", "5,0.. errors"),
    "entries": (b'{"graph_module":{"graph":{"nodes":[' + b"0," * 3_000_000 + b"0]}}}", "more than 1,000,000 values"),
    "objects": (b'{"graph_module":{"module_call_graph":[' + b"{}," * 3_000_000 + b"{}]}}", "more than 1,000,000 values"),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_small_archive_cannot_exhaust_memory(name: str, content: pt2_cases.Content, tmp_path: Path) -> None:
    """Each value of a record takes hundreds of bytes while it is checked, and each error a thousand."""
    text, message = FLOODS[name]
    pt2_cases.write(tmp_path / "model.pt2", {**content, pt2_cases.PROGRAM: text})
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message):
        read_pt2(tmp_path / "model.pt2")
    assert tracemalloc.get_traced_memory()[1] < 4 * len(text) + 20_000_000
    tracemalloc.stop()


@pytest.mark.process
def test_threads_can_load_archives_concurrently(pt2: Path) -> None:
    """torch deserialises one archive at a time, and raises an error for a second one."""
    with ThreadPoolExecutor(4) as pool:
        graphs = [*pool.map(lambda _: load_pt2(pt2 / "model.pt2", CPU), range(4))]
    assert all(torch.equal(graph(sample())[0], graphs[0](sample())[0]) for graph in graphs)


def duplicate(file: Path, content: pt2_cases.Content) -> None:
    pt2_cases.write(file, content)
    with zipfile.ZipFile(file, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr(pt2_cases.PROGRAM, b"{}")


ZIPS: dict[str, Callable[[Path, pt2_cases.Content], None]] = {
    "two records of one name": duplicate,
    "compressed": lambda file, content: pt2_cases.write(file, content, compression=zipfile.ZIP_DEFLATED),
    "empty": lambda file, content: file.write_bytes(b""),
    "no records": lambda file, content: pt2_cases.write(file, {}),
    "no archive": lambda file, content: file.write_bytes(b"PK\x03\x04" + b"\0" * 100),
    "a bomb": lambda file, content: pt2_cases.write(
        file, {**content, pt2_cases.WEIGHTS: b" " * 50_000_000}, compression=zipfile.ZIP_DEFLATED
    ),
}


@pytest.mark.parametrize("name", ZIPS)
def test_a_zip_file_of_another_kind_is_refused(name: str, content: pt2_cases.Content, tmp_path: Path) -> None:
    ZIPS[name](tmp_path / "model.pt2", content)
    with pytest.raises(CheckpointError, match=r"model\.pt2"):
        read_pt2(tmp_path / "model.pt2")


def test_parts_that_a_graph_does_not_need_are_never_read(pt2: Path, content: pt2_cases.Content, tmp_path: Path) -> None:
    """Guards and notes on nodes contain code or names of code; a graph with other ones is the same graph."""
    hostile, canary = dict(content), tmp_path / "canary"

    def change(program: Any) -> None:
        program["guards_code"] = [pt2_cases.code(canary)]
        notes = {"stack_trace": f"\n{pt2_cases.code(canary)}", "source_fn_stack": "x,torch.load", "custom": "{"}
        for node in pt2_cases.graph(program)["nodes"]:
            node["metadata"] = notes

    pt2_cases.edit(hostile, pt2_cases.PROGRAM, change)
    pt2_cases.write(tmp_path / "model.pt2", hostile)
    for mine, theirs in zip(run_graph(tmp_path / "model.pt2"), run_graph(pt2 / "model.pt2"), strict=True):
        assert np.array_equal(mine, theirs)
    assert not canary.exists()


def test_an_archive_reveals_nothing_about_the_machine_that_wrote_it(content: pt2_cases.Content) -> None:
    here = str(Path(__file__).resolve().parents[1]).encode()
    assert not any(here in data or b"site-packages" in data for data in content.values())
    assert not any(node["metadata"] for node in pt2_cases.graph(json.loads(content[pt2_cases.PROGRAM]))["nodes"])


def test_a_graph_with_unexpected_outputs_is_refused(pt2: Path, content: pt2_cases.Content, tmp_path: Path) -> None:
    changed = dict(content)

    def change(program: Any) -> None:
        for outputs in (pt2_cases.graph(program)["outputs"], program["graph_module"]["signature"]["output_specs"]):
            outputs.extend(outputs[:])
        leaf = {"type": None, "context": None, "children_spec": []}
        tree = {"type": "builtins.tuple", "context": "null", "children_spec": [leaf, leaf]}
        pt2_cases.first_value(program, "out_spec", json.dumps([1, tree]))

    pt2_cases.edit(changed, pt2_cases.PROGRAM, change)
    bad = Path(shutil.copytree(pt2, tmp_path / "bad"))
    pt2_cases.write(bad / "model.pt2", changed)
    reseal(bad)
    done = call("predict", bad, "--image", bad / "example.png", "--text", "a")
    assert done.returncode == 6 and "MF-CKPT-200" in done.stderr


# -- random changes


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [place for key, one in inner for place in places(one, (*path, key))]


def mutate_json(data: bytes, draw: random.Random, canary: Path) -> bytes:
    """Replace, remove or repeat one value."""
    value = json.loads(data)
    path = draw.choice(places(value)[1:])
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    odd = [None, True, -1, 0, 2**62, 1e300, "", "x", pt2_cases.code(canary), "torch.load", "__class__", [], {}, [[]]]
    kind = draw.randrange(4)
    if kind == 0:
        del parent[path[-1]]
    elif kind == 1 and isinstance(parent, list):
        parent.append(parent[path[-1]])
    elif kind == 2:
        other = draw.choice(places(value)[1:])
        found = value
        for key in other:
            found = found[key]
        parent[path[-1]] = json.loads(json.dumps(found))
    else:
        parent[path[-1]] = draw.choice(odd)
    return json.dumps(value).encode()


def mutate(content: pt2_cases.Content, seed: int, file: Path, canary: Path) -> None:
    """Make one change to an archive: to a JSON value, to bytes of a record or of the file, or to the name of a record."""
    draw, changed = random.Random(seed), dict(content)
    kind = seed % 4
    name = draw.choice(sorted(changed) if kind else [pt2_cases.PROGRAM, pt2_cases.WEIGHTS, pt2_cases.CONSTANTS])
    if kind == 0:
        changed[name] = mutate_json(changed[name], draw, canary)
    elif kind == 1:
        odd = ["x", "opaque_obj_0", "model.pt", "../x", name.upper(), name + "/", ""]
        changed[f"{name.rpartition('/')[0]}/{draw.choice(odd)}"] = changed.pop(name)
    elif kind == 2:
        data = bytearray(changed[name] or b"\0")
        data[draw.randrange(len(data))] = draw.randrange(256)
        changed[name] = bytes(data)
    pt2_cases.write(file, changed)
    if kind == 3:
        raw = bytearray(file.read_bytes())
        at = draw.randrange(len(raw)) if draw.random() < 0.3 else draw.randrange(len(raw) - 4000, len(raw))
        raw[at] = draw.randrange(256)
        file.write_bytes(raw[: draw.randrange(len(raw))] if draw.random() < 0.1 else raw)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.soak
def test_a_changed_archive_loads_or_is_refused(seed: int, pt2: Path, content: pt2_cases.Content, tmp_path: Path) -> None:
    file, canary = tmp_path / "model.pt2", tmp_path / "canary"
    mutate(content, seed, file, canary)
    bundle = Path(tmp_path / "bundle")
    if not bundle.exists():
        shutil.copytree(pt2, bundle)
    try:
        shutil.copyfile(file, bundle / "model.pt2")
        tried = Bundle(bundle, "cpu", manifest={"model": "pt2"})
        tried.run({name: tensor.numpy() for name, tensor in sample().items()})
    except (CheckpointError, NumericError):  # the latter for a weight that became NaN
        pass
    assert not canary.exists()


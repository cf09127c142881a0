"""Hostile pt2 archives: each would run code, or read a file that it should not, if torch opened it directly."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Content = dict[str, bytes]
Attack = Callable[[Content, Path], None]

PROGRAM, WEIGHTS = "model/models/model.json", "model/data/weights/model_weights_config.json"
CONSTANTS = "model/data/constants/model_constants_config.json"


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def read(file: Path) -> Content:
    """Read the records of an archive."""
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(file: Path, content: Content, *, compression: int = zipfile.ZIP_STORED) -> None:
    """Write an archive with these records."""
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def pickled(canary: Path) -> bytes:
    """Return the canary as `torch.save` writes it."""
    buffer = io.BytesIO()
    torch.save(Canary(canary), buffer)
    return buffer.getvalue()


def code(canary: Path) -> str:
    """Return an expression that touches the canary."""
    return f"__import__('pathlib').Path('{canary}').touch()"


def edit(content: Content, name: str, change: Callable[[Any], None]) -> None:
    """Change a JSON record."""
    value = json.loads(content[name])
    change(value)
    content[name] = json.dumps(value).encode()


def graph(program: Any) -> Any:
    return program["graph_module"]["graph"]


def find(value: Any, key: str) -> list[dict[str, Any]]:
    """Find all objects with a key, at any depth."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    here = [value] if isinstance(value, dict) and key in value else []
    return here + [found for one in inner for found in find(one, key)]


def first_value(program: Any, key: str, new: Any) -> None:
    find(program, key)[0][key] = new


def unpickle_payload(name: str, spaced: bool) -> Attack:
    """Mark a tensor as pickled in its table, with or without a space in the JSON."""

    def attack(content: Content, canary: Path) -> None:
        table = json.loads(content[name])
        payload = next(iter(table["config"].values()))
        payload["use_pickle"] = True
        content[f"{name.rpartition('/')[0]}/{payload['path_name']}"] = pickled(canary)
        content[name] = json.dumps(table, separators=None if spaced else (",", ":")).encode()

    return attack


def constant_object(path_name: str) -> Attack:
    """Add a constant that is an object and not a tensor."""

    def attack(content: Content, canary: Path) -> None:
        one = {"as_int": 1}
        meta = {"dtype": 1, "sizes": [one], "requires_grad": False, "strides": [one], "storage_offset": {"as_int": 0}}
        meta |= {"device": {"type": "cpu", "index": None}, "layout": 7}
        entry = {"path_name": path_name, "is_param": False, "use_pickle": False, "tensor_meta": meta}
        edit(content, CONSTANTS, lambda table: table["config"].update({"model.x": entry}))
        content[f"model/data/constants/{path_name}"] = pickle.dumps(Canary(canary))

    return attack


def program(change: Callable[[Any, Path], None]) -> Attack:
    """Change the JSON of the graph."""
    return lambda content, canary: edit(content, PROGRAM, lambda value: change(value, canary))


def record(name: str, data: bytes | None = None) -> Attack:
    """Add a record; by default a pickle."""
    return lambda content, canary: content.update({f"model/{name}": pickled(canary) if data is None else data})


def call(target: str, **argument: Any) -> Attack:
    """Add a node that calls something."""

    def change(value: Any, canary: Path) -> None:
        text = {"as_string": f"touch {canary}"}
        inputs = [{"name": "", "arg": argument or text, "kind": 1}]
        node = {"target": target, "inputs": inputs, "outputs": [], "metadata": {}, "name": "called"}
        graph(value)["nodes"].insert(0, node | {"is_hop_single_tensor_return": None})

    return program(change)


def rename(value: Any, canary: Path) -> None:
    """Give a tensor a name that is code; names are written into the source of the graph."""
    old = graph(value)["nodes"][-1]["outputs"][0]["as_tensor"]["name"]
    name = f"globals()[{code(canary)}]"
    text = json.dumps(value).replace(json.dumps(old), json.dumps(name))
    value.clear()
    value.update(json.loads(text))


def import_module(value: Any, canary: Path) -> None:
    factory = {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []}
    tree = {"type": "collections.defaultdict", "context": json.dumps(factory), "children_spec": []}
    first_value(value, "in_spec", json.dumps([1, tree]))


def subgraph_code(value: Any, canary: Path) -> None:
    """Put the same expression into the graph that another graph calls."""
    inner = json.loads(json.dumps(graph(value)))
    first_value(inner, "expr_str", code(canary))
    argument = {"as_graph": {"name": "inner", "graph": inner}}
    inputs = [{"name": "", "arg": argument, "kind": 1}]
    target = "torch.ops.higher_order.wrap_with_autocast"
    node = {"target": target, "inputs": inputs, "outputs": [], "metadata": {}, "name": "called"}
    graph(value)["nodes"].insert(0, node | {"is_hop_single_tensor_return": None})


RUNS_CODE: dict[str, Attack] = {  # when torch.export.load reads them, or when its result is first called
    "a weight is pickled": unpickle_payload(WEIGHTS, spaced=True),
    "a weight is pickled, without a space": unpickle_payload(WEIGHTS, spaced=False),
    "a constant is pickled, without a space": unpickle_payload(CONSTANTS, spaced=False),
    "an opaque object": constant_object("opaque_obj_0"),
    "an opaque object by the name of a JSON file": constant_object("opaque_obj_0.json"),
    "a size is code": program(lambda value, canary: first_value(value, "expr_str", code(canary))),
    "weights of the old kind": record("data/weights/model.pt"),
    "constants of the old kind": record("data/constants/model.pt"),
    "example inputs": record("data/sample_inputs/model.pt"),
}
OTHERS: dict[str, Attack] = {
    "a torchbind object": constant_object("custom_obj_0"),
    "a function of os": call("torch.serialization.os.system"),
    "a function of torch": call("torch.load"),
    "a library": call("torch.ops.load_library"),
    "a file is read": call("torch.ops.aten.from_file.default"),
    "an operator of another package": call("torch.ops.torchvision.nms.default"),
    "an attribute that is no overload": call("torch.ops.aten.add.overloads"),
    "a class": call("torch.ops.aten.add.__class__"),
    "a Python operator that calls methods": call("_operator.methodcaller"),
    "an extension": call("#extension:operator"),
    "a function as argument": call("torch.ops.higher_order.wrap_with_autocast", as_operator="torch.hub.load"),
    "an object as argument": call("torch.ops.aten.relu.default", as_custom_obj={"name": "x", "class_fqn": "y"}),
    "a string of two lines": call("torch.ops.aten.relu.default", as_string="a\nb"),
    "a graph in the graph": program(subgraph_code),
    "a module to import": program(import_module),
    "an attribute of a size": program(lambda v, _: first_value(v, "expr_str", "Symbol('s0').__class__")),
    "a size that calls": program(lambda v, _: first_value(v, "expr_str", "Mul(open('x'), Integer(2))")),
    "a size of keywords": program(lambda v, _: first_value(v, "expr_str", "Integer(2, **{})")),
    "a symbol that is code": program(lambda v, _: first_value(v, "expr_str", "Symbol('print()')")),
    "a power without end": program(lambda v, _: first_value(v, "expr_str", "Pow(Symbol('s0'), Integer(99999999))")),
    "a power of a power": program(lambda v, _: first_value(v, "expr_str", "Pow(Pow(Symbol('s0'), Integer(8)), Integer(8))")),
    "a power of nothing": program(lambda v, _: first_value(v, "expr_str", "Pow()")),
    "a size of many brackets": program(lambda v, _: first_value(v, "expr_str", "Integer(" + "(" * 3000 + ")" * 3000 + ")")),
    "a long size": program(lambda v, _: first_value(v, "expr_str", "Add(" + "Integer(1), " * 9000 + "Integer(1))")),
    "a range of code": program(lambda v, _: v["range_constraints"].update({"print()": {"min_val": 0, "max_val": None}})),
    "a weight in place of a method": program(lambda v, _: first_value(v, "parameter_name", "model.__class__")),
    "the name of an argument is code": program(lambda v, canary: first_value(v, "forward_arg_names", [f"a={code(canary)}"])),
    "the name of a tensor is code": program(rename),
    "arguments of no form": program(lambda v, _: first_value(v, "in_spec", "5")),
    "an unknown key": program(lambda v, _: v.update(hook="print()")),
    "another verifier": program(lambda v, _: v.update(verifiers=["print()"])),
    "numbers as words": program(lambda v, _: first_value(v, "is_single_tensor_return", "false")),
    "nothing but brackets": lambda content, _: content.update({PROGRAM: b"[" * 200_000}),
    "a compiled library": record("data/aotinductor/model/model.so", b"\x7fELF"),
    "a file beside it": record("extra/notes.txt", b"x"),
    "a second model": record("models/other.json", b"{}"),
    "a name with another case": record("Models/model.json", b"{}"),
    "a name with a way up": record("../model/models/model.json", b"{}"),
    "a second archive": lambda content, _: content.update({"other/models/model.json": b"{}"}),
    "of the first format": lambda content, canary: content.update(
        {"version": b"8.20", "serialized_state_dict.pt": pickled(canary), "serialized_exported_program.json": b"{}"}
    ),
    "another kind of archive": record("archive_format", b"zip"),
    "a weight outside its record": lambda content, _: edit(
        content, WEIGHTS, lambda table: first_value(table, "storage_offset", {"as_int": 2**40})
    ),
    "a weight of another place": lambda content, _: edit(
        content, WEIGHTS, lambda table: first_value(table, "path_name", "../../x")
    ),
}
ATTACKS = RUNS_CODE | OTHERS

"""A trained model as one graph from raw tensors to logits, for ONNX and for pt2 archives of torch.export.

Inputs are named by side: ``main_pixels`` (B, H, W, 3) of 8 bits, ``comp_ids`` and ``comp_mask`` (B, L), and ``comp_missing``
(B,) for sides that a sample may lack. The batch and the length of texts are dynamic, with the names ``batch`` and
``<side>_tokens``. Outputs: ``logits`` (B, N) and, with `routing`, ``routing`` (B, routed layers, K).

Shapes: B batch, L tokens, N labels, K experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mopefuse.core.dependencies import require
from mopefuse.core.error_codes import ConfigCode, EncoderCode
from mopefuse.data.base import Batch
from mopefuse.errors import ConfigError, EncoderError
from mopefuse.fusion.base import Fusion
from mopefuse.inference.pt2 import silence_exporters

OPSET = 20
LARGEST = 2_000_000_000  # bytes of weights in one ONNX file, which protobuf limits to 2 GiB; above, they go next to it


class Graph(nn.Module):
    """A fusion model as a function of named tensors."""

    def __init__(self, model: Fusion, *, routing: bool) -> None:
        super().__init__()
        self.model, self.routing = model, routing

    @property
    def outputs(self) -> list[str]:
        """The names of the outputs, in order."""
        return ["logits", "routing"] if self.routing else ["logits"]

    def collate(self, images: Sequence[Any], texts: Sequence[Any]) -> dict[str, Tensor]:
        """Pairs as named tensors on the CPU; None for a value that is missing, if the model can predict without it."""
        batch = self.model.collate(images, texts)
        named = {f"{side}_{name}": t.cpu() for side, inputs in batch.inputs.items() for name, t in inputs.items()}
        for side in (side for side in self.model.optional_sides if side in batch.inputs):
            none_B = torch.zeros(len(batch.index), dtype=torch.bool)
            named[f"{side}_missing"] = batch.missing.get(side, none_B).cpu()
        return named

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Logits (B, N), and routing (B, routed layers, K) with `routing`."""
        sides: dict[str, dict[str, Tensor]] = {}
        for name, tensor in inputs.items():
            side, _, own = name.partition("_")
            sides.setdefault(side, {})[own] = tensor
        missing = {side: own.pop("missing") for side, own in sides.items() if "missing" in own}
        output = self.model(Batch(sides, {}, None, torch.arange(1), missing))
        if not self.routing:
            return (output.logits,)
        assert output.routing_BLK is not None
        return output.logits, output.routing_BLK


def trace(graph: Graph, example: Mapping[str, Tensor], fixed_lengths: Mapping[str, int | None]) -> ExportedProgram:
    """Trace the graph of a model on the CPU with an example batch of at least two samples.

    Args:
        fixed_lengths: by text side, the only length that its encoder takes, or None for any.

    Raises:
        EncoderError: an encoder does something that torch.export cannot trace.
    """
    dims = {name: {axis: Dim.DYNAMIC for axis in axes} for name, axes in _axes(example, fixed_lengths).items()}
    try:
        with torch.no_grad(), silence_exporters():
            program = torch.export.export(graph.eval(), (dict(example),), dynamic_shapes={"inputs": dims})
    except Exception as error:  # torch.export can raise any exception
        specs = " and ".join(str(graph.model.encoder(side).spec) for side in graph.model.reads)
        raise EncoderError(
            EncoderCode.NOT_TRACEABLE,
            f"torch.export cannot trace {specs}: {str(error).splitlines()[0]}",
            fix="use --format adapter",
        ) from error
    program.example_inputs = None  # torch.export would write them as a pickle
    return program


def _axes(example: Mapping[str, Tensor], fixed_lengths: Mapping[str, int | None]) -> dict[str, dict[int, str]]:
    """The names of the dynamic axes of each input, by axis."""
    axes: dict[str, dict[int, str]] = {}
    for name, tensor in example.items():
        side = name.partition("_")[0]
        free = tensor.dim() == 2 and not fixed_lengths.get(side)
        axes[name] = {0: "batch", 1: f"{side}_tokens"} if free else {0: "batch"}
    return axes


def save_onnx(
    program: ExportedProgram, graph: Graph, example: Mapping[str, Tensor], fixed_lengths: Mapping[str, int | None], file: Path
) -> None:
    """Write an ONNX file that contains its weights; weights that are too large for it go to ``<file>.data`` next to it.

    Raises:
        PackageError: onnx or onnxscript is not installed.
    """
    require("onnx", "onnxscript", extra="export", what="export")
    with silence_exporters():
        made = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(example),
            output_names=graph.outputs,
            dynamic_shapes={"inputs": _axes(example, fixed_lengths)},
            external_data=False,
            verbose=False,
        )
    assert made is not None
    weights = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    made.save(str(file), external_data=weights > LARGEST)


def quantise(file: Path) -> None:
    """Quantise the weights of an ONNX file's matrix products to 8 bits, in place (onnxruntime's dynamic quantisation).

    Raises:
        PackageError: onnxruntime or onnx is not installed. ConfigError: the weights are too large to be in one file.
    """
    require("onnx", "onnxruntime", extra="export", what="export")
    import onnx
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    if file.with_name(f"{file.name}.data").exists():
        raise ConfigError(
            ConfigCode.TOO_LARGE_FOR_INT8,
            f"--int8 supports models of up to {LARGEST:,} bytes",
            where="--int8",
            fix="remove --int8",
        )
    ready, small = file.with_name("ready.onnx"), file.with_name("small.onnx")
    with silence_exporters():
        model = onnx.load(file)
        del model.graph.value_info[:]  # shapes of torch's own, which contradict those that onnxruntime infers
        onnx.save(model, file)
        del model
        quant_pre_process(file, ready, skip_symbolic_shape=True)
        quantize_dynamic(ready, small, weight_type=QuantType.QInt8)
    ready.unlink()
    small.replace(file)


def fixed_lengths(descriptions: Mapping[str, Mapping[str, Any]]) -> dict[str, int | None]:
    """The only number of tokens that the encoder of each text side takes; None for any."""
    texts = {side: how for side, how in descriptions.items() if how["modality"] == "text"}
    return {side: how.get("length") for side, how in texts.items()}

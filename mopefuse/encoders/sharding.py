"""Shard the weights of a frozen encoder over all processes, for encoders that are too large for one GPU.

PyTorch's FSDP2 (`torch.distributed.fsdp.fully_shard`) divides each tensor by rows. Before a layer runs, forward or backward,
all processes gather its weights, and drop those of others afterwards. Gathering copies bits, so outputs and gradients equal
those of the whole encoder bit for bit. Prompts and everything else that is trained are no weights of the encoder and stay
whole in every process.

Every process has to run the encoder equally often, because each run gathers from all. Where processes have different shares
of the work, `uneven_calls` lets those that have finished run it on a blank sample until all have.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mopefuse.core import distributed
from mopefuse.core.error_codes import EncoderCode
from mopefuse.encoders._prompted import PromptedEncoder
from mopefuse.encoders.base import Encoder, EncoderOutput, Inputs, Prefix
from mopefuse.encoders.frozen import run_and_record
from mopefuse.errors import EncoderError, MopefuseError

if TYPE_CHECKING:  # imported late, because few need it and it takes long
    from torch.distributed.device_mesh import DeviceMesh

_SHARDED = "_sharded"  # attribute of a sharded encoder: a `_Sharded`


def make_mesh(device: torch.device) -> DeviceMesh:
    """All processes, each with its device; to be called by all of them at once."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (distributed.world_size(),))


def shard(encoder: Encoder, mesh: DeviceMesh) -> None:
    """Keep only this process's part of the weights of a frozen encoder, on the devices of `mesh`.

    The encoder may be on the CPU: one layer at a time is moved whole to the device, then divided.
    """
    from torch.distributed.fsdp import fully_shard

    assert not (encoder.trainable or encoder.is_shared), "a trained encoder, or one that other models use"
    vars(encoder)[_SHARDED] = _Sharded(encoder)
    for layer in _layers(encoder):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(encoder, mesh=mesh, reshard_after_forward=True)
    vars(encoder)[_SHARDED].replace_methods(encoder)
    # no output of a layer is changed in place here
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")


def is_sharded(encoder: Encoder) -> bool:
    """Whether this process has only a part of the weights of an encoder."""
    return _SHARDED in vars(encoder)


@contextmanager
def uneven_calls(encoder: Encoder) -> Iterator[None]:
    """Let processes call a sharded encoder different numbers of times within the context, which all of them must enter.

    They must not exchange anything else within it. A `MopefuseError` may leave it. No-op for an encoder that is not sharded.
    """
    sharded: _Sharded | None = vars(encoder).get(_SHARDED)
    if sharded is None:
        yield
        return
    sharded.uneven = True
    try:
        yield
    except MopefuseError:  # the other processes still need this one
        sharded.join_others(encoder)
        raise
    else:
        sharded.join_others(encoder)
    finally:
        sharded.uneven = False


class _Sharded:
    """What a sharded encoder computed while it was whole, and the methods that it gets.

    Attributes:
        uneven: whether processes may call the encoder different numbers of times.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.fingerprint = encoder.fingerprint()
        self.uneven = False
        self._blank = encoder.blank_inputs(1)

    def replace_methods(self, encoder: Encoder) -> None:
        """Replace the methods of an encoder that need its weights, or that would not run all its layers."""
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(encoder, "encode")
        run: Callable[..., EncoderOutput] = encoder.encode

        def encode(inputs: Inputs, *args: Any, **options: Any) -> EncoderOutput:
            if self.uneven:
                distributed.is_any(True)
            return run(inputs, *args, **options)

        def compute_prefix(inputs: Inputs, layer: int) -> Prefix:
            """All layers run, because an exception that leaves FSDP2's modules would end the gathering half-way."""
            return run_and_record(encoder, inputs, layer)[0]

        def run_layer(*args: Any, **options: Any) -> Tensor:
            what = f"{encoder.spec} is sharded, so its layers cannot run on their own, as this method needs"
            raise EncoderError(EncoderCode.LAYER_SHARDED, what, where="--shard-encoders", fix="use --shard-encoders none")

        vars(encoder).update(encode=encode, compute_prefix=compute_prefix, run_layer=run_layer)
        vars(encoder)["fingerprint"] = lambda: self.fingerprint

    @torch.no_grad()
    def join_others(self, encoder: Encoder) -> None:
        """Run the encoder as often as any other process does before it has finished, too."""
        device = next(encoder.parameters()).device
        blank = {name: tensor.to(device) for name, tensor in self._blank.items()}
        self.uneven = False
        while distributed.is_any(False):
            encoder.encode(blank)


def _layers(encoder: Encoder) -> list[nn.Module]:
    """The modules that are gathered one at a time: promptable layers, else the entries of lists of modules."""
    if isinstance(encoder, PromptedEncoder) and encoder._slots:
        return list(dict.fromkeys(slot.block for slot in encoder._slots))
    lists = [module for module in encoder.modules() if isinstance(module, nn.ModuleList)]
    inner = {id(one) for module in lists for entry in module for one in entry.modules()}
    outer = [entry for module in lists if id(module) not in inner for entry in module]
    return [entry for entry in outer if next(entry.parameters(), None) is not None]

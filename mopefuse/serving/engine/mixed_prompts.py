"""Prompts and FiLM for a batch whose rows belong to different runs: the ``prompt_at`` callback of one forward pass.

Everything but the attention itself is computed before the forward pass, for all layers at once, because it depends on psi
only. Prompts of different lengths are filled up and masked; a row without prompts in a layer has a gate of 0 there.

Shapes: B rows, U runs, R rows of a run, N prompted layers, S static, P dynamic, M mapped tokens, K experts, C width of a psi, h
bottleneck, D width of a layer, T tokens of a prompt, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mopefuse.encoders.attention import Modulation, Prompt
from mopefuse.prompts.experts import keep_largest
from mopefuse.serving.engine.adapter_weights import PromptShape, PromptWeights, Trunk
from mopefuse.serving.engine.grouped import Groups, multiply, stack_padded


class FamilyPrompts:
    """Prompts of the rows of runs of equal `PromptShape`.

    Args:
        numbers: which rows of the batch they are. runs: weights of each run. group_B: number of the run of each of `rows`.
        psi_BC: normalised conditions of these rows, by side.

    Attributes:
        tokens_BNTD: None without tokens. mask_BT: None if all runs have prompts of equal lengths.
        modulation_BNX: scale and shift side by side (X = 2 D); None without FiLM. gate_BNH: None without gates.
        routing_BNK: weights of the experts, 0 for those that the run of a row does not have; None without routing.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        runs: Sequence[PromptWeights],
        group_B: Sequence[int],
        psi_BC: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        self.numbers, self.rows, self.shape = numbers, torch.tensor(numbers, device=device), runs[0].shape
        self._runs, self._groups = runs, Groups(group_B, device)
        self.layers = {layer: at for at, layer in enumerate(self.shape.layers)}
        conditions_URC = [self._groups.split(psi_BC[side]) for side in self.shape.conditions]
        self.routing_BNK: Tensor | None = None
        gates = [run.gate_NH for run in runs if run.gate_NH is not None]
        self.gate_BNH = self._groups.repeat(stack_padded(gates)) if gates else None
        trunks_URh = [self._trunk([run.trunks[at] for run in runs], x) for at, x in enumerate(conditions_URC) if runs[0].trunks]
        self.modulation_BNX = self._modulation(trunks_URh)
        self.tokens_BNTD, self.mask_BT = self._tokens(conditions_URC, trunks_URh)

    def _trunk(self, trunks: Sequence[Trunk], x_URC: Tensor) -> Tensor:
        """What the mappers and FiLM of all layers read, (U, R, h)."""
        x_URh = multiply(x_URC, [trunk.weight_Ch for trunk in trunks])
        x_URh = x_URh + stack_padded([trunk.bias_h for trunk in trunks])[:, None]
        if self.shape.layer_norm:
            x_URh = F.layer_norm(x_URh, x_URh.shape[-1:])
        scale_Uh, shift_Uh = (
            stack_padded([getattr(trunk, name) for trunk in trunks]) for name in ("norm_weight_h", "norm_bias_h")
        )
        return F.gelu(x_URh * scale_Uh[:, None] + shift_Uh[:, None])

    def _modulation(self, trunks_URh: Sequence[Tensor]) -> Tensor | None:
        if not self._runs[0].films:
            return None
        parts = []
        for at, trunk_URh in enumerate(trunks_URh):
            films = [run.films[at] for run in self._runs]
            product_URNX = multiply(trunk_URh, [film.weight_IO for film in films])
            parts.append(product_URNX + stack_padded([film.bias_O for film in films])[:, None])
        return self._groups.join(sum(parts[1:], parts[0]))

    def _tokens(self, conditions_URC: Sequence[Tensor], trunks_URh: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Static, dynamic and mapped tokens one after the other, and the mask of those that belong to the run of a row."""
        parts: list[Tensor] = []  # (U, R, N, T, D)
        lengths: list[list[int]] = []  # of each part, by run
        if self._runs[0].static_NSD is not None:
            static = [run.static_NSD for run in self._runs if run.static_NSD is not None]
            stacked_U1NSD = stack_padded(static)[:, None]
            parts.append(stacked_U1NSD.expand(-1, self._groups.largest, -1, -1, -1))
            lengths.append([part.shape[1] for part in static])
        if self._runs[0].experts_NKPD is not None:
            experts = [run.experts_NKPD for run in self._runs if run.experts_NKPD is not None]
            weights_UNRK = self._route(conditions_URC)
            parts.append(multiply(weights_UNRK, experts, leading=1).transpose(1, 2))
            lengths.append([part.shape[2] for part in experts])
        for at, trunk_URh in enumerate(trunks_URh if self._runs[0].mappers else ()):
            mappers = [run.mappers[at] for run in self._runs]
            product_URNMD = multiply(trunk_URh, [mapper.weight_IO for mapper in mappers])
            parts.append(F.gelu(product_URNMD + stack_padded([mapper.bias_O for mapper in mappers])[:, None]))
            lengths.append([mapper.bias_O.shape[1] for mapper in mappers])
        if not parts:
            return None, None
        tokens_BNTD = self._groups.join(torch.cat(parts, dim=3))
        if all(len({*of_part}) == 1 for of_part in lengths):
            return tokens_BNTD, None
        mask_UT = torch.cat([_lengths_mask(of_part, tokens_BNTD.device) for of_part in lengths], dim=1)
        return tokens_BNTD, self._groups.repeat(mask_UT)

    def _route(self, conditions_URC: Sequence[Tensor]) -> Tensor:
        """Weights of the experts of each layer, (U, N, R, K), with 0 for experts that a run does not have."""
        parts = []
        for at, condition_URC in enumerate(conditions_URC):
            parts.append(multiply(condition_URC, [run.router[at].weight_IO for run in self._runs]))
        biases = stack_padded([run.router[0].bias_O for run in self._runs], value=-torch.inf)
        temperatures = [run.temperature for run in self._runs if run.temperature is not None]
        temperature_U111 = stack_padded(temperatures)[:, None, None, None]
        clean_URNK = ((sum(parts[1:], parts[0]) + biases[:, None]) / temperature_U111).softmax(dim=-1)
        self.routing_BNK = self._groups.join(clean_URNK)
        return keep_largest(clean_URNK, self.shape.top_m).transpose(1, 2)


class MixedPrompts:
    """The callback for a batch: `families` cover its rows, or some of them; other rows run without prompts.

    Args:
        rows: B. joint: whether prompts and tokens share one softmax, see `AdapterWeights.joint_softmax`.
    """

    def __init__(self, families: Sequence[FamilyPrompts], rows: int, *, joint: bool) -> None:
        self.families, self.rows, self.joint = families, rows, joint

    @property
    def first_layer(self) -> int | None:
        """The first layer that is prompted in some row; None if there is none."""
        return min((min(family.shape.layers) for family in self.families), default=None)

    def __call__(self, layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Prompt | None:
        """See `mopefuse.encoders.base.Encoder.encode`."""
        families = [family for family in self.families if layer in family.layers]
        if not families:
            return None
        modulation = self._modulation(families, layer, tokens_BLD)
        prompted = [family for family in families if family.tokens_BNTD is not None]
        if not prompted:
            return Prompt(tokens_BLD[:, :0], modulation=modulation)
        if len(prompted) == 1 and len(prompted[0].numbers) == self.rows:
            family, at = prompted[0], prompted[0].layers[layer]
            assert family.tokens_BNTD is not None
            gate_BH = None if family.gate_BNH is None else family.gate_BNH[:, at]
            return Prompt(family.tokens_BNTD[:, at].to(tokens_BLD.dtype), gate_BH, modulation, family.mask_BT)
        return self._merged(prompted, layer, tokens_BLD, modulation)

    def _modulation(self, families: Sequence[FamilyPrompts], layer: int, tokens_BLD: Tensor) -> Modulation | None:
        scale_and_shift = [(family, family.modulation_BNX) for family in families if family.modulation_BNX is not None]
        if not scale_and_shift:
            return None
        both_BX = tokens_BLD.new_zeros(self.rows, 2 * tokens_BLD.shape[2], dtype=torch.float32)
        for family, of_rows in scale_and_shift:
            both_BX[family.rows] = of_rows[:, family.layers[layer]].float()
        scale_BD, shift_BD = both_BX.chunk(2, dim=-1)
        return Modulation(scale_BD, shift_BD)

    def _merged(
        self, families: Sequence[FamilyPrompts], layer: int, tokens_BLD: Tensor, modulation: Modulation | None
    ) -> Prompt:
        """Prompts of several families, filled up to one length."""
        each = [(family, family.layers[layer], family.tokens_BNTD) for family in families if family.tokens_BNTD is not None]
        length, width = max(tokens.shape[2] for _, _, tokens in each), tokens_BLD.shape[2]
        merged_BTD = tokens_BLD.new_zeros(self.rows, length, width)
        mask_BT = torch.zeros(self.rows, length, dtype=torch.bool, device=tokens_BLD.device)
        mask_BT[:, 0] = not self.joint  # a separate softmax needs a token, to which a gate of 0 gives no effect
        gate_BH = None
        for family, at, of_rows in each:
            own = of_rows.shape[2]
            merged_BTD[family.rows, :own] = of_rows[:, at].to(merged_BTD.dtype)
            mask_BT[family.rows, :own] = True if family.mask_BT is None else family.mask_BT
            if family.gate_BNH is not None:
                gate_BH = family.gate_BNH.new_zeros(self.rows, family.gate_BNH.shape[2]) if gate_BH is None else gate_BH
                gate_BH[family.rows] = family.gate_BNH[:, at]
        return Prompt(merged_BTD, gate_BH, modulation, mask_BT)


def _lengths_mask(lengths: Sequence[int], device: torch.device) -> Tensor:
    """True for the first tokens of each run, as many as it has: (U, T)."""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]


def in_families(
    weights: Sequence[PromptWeights | None], psi_BC: Mapping[str, Tensor], device: torch.device
) -> list[FamilyPrompts]:
    """Compute the prompts of a batch, by families of runs with equal `PromptShape`.

    Args:
        weights: of each row; None for a row without prompts. psi_BC: normalised conditions by side.
    """
    by_shape: dict[PromptShape, list[int]] = {}
    for row, one in enumerate(weights):
        if one is not None:
            by_shape.setdefault(one.shape, []).append(row)
    found = []
    for numbers in by_shape.values():
        runs: dict[int, PromptWeights] = {}
        for row in numbers:
            one = weights[row]
            assert one is not None
            runs.setdefault(id(one), one)
        order = {key: at for at, key in enumerate(runs)}
        whole = len(numbers) == len(weights)
        psi = psi_BC if whole else {side: values_BC[numbers] for side, values_BC in psi_BC.items()}
        groups = [order[id(weights[row])] for row in numbers]
        found.append(FamilyPrompts(numbers, list(runs.values()), groups, psi, device))
    return found

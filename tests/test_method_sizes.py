"""How many parameters each method trains, with ViT-B as main and BERT-base as complementary encoder and 101 labels.

Each number is written as the sum given by the method's definition. Models are built without memory for their weights.
"""

from __future__ import annotations

import pytest
import torch
from conftest import plain_config

from mopefuse.core import registry
from mopefuse.encoders.base import Encoder, create_encoder

D, DEPTH, N = 768, 12, 101
HEAD = N * D + N  # for the feature of one side
BOTH = N * 2 * D + N
STATIC, GATES = DEPTH * 6 * D, DEPTH * 12  # 6 tokens for images and 12 heads in each layer
CONDITIONAL = (
    STATIC + GATES
    + 16 * DEPTH * 6 * D  # experts
    + DEPTH * 16 * (D + 1)  # router
    + 80 * (D + 1) + 2 * 80 + DEPTH * (80 + 1) * D  # mapper: trunk, its norm, and a separate linear map for each layer
)  # fmt: skip
PROJECTION = D * D + D
MAPPING = (D + 1) * D // 2 + (D // 2 + 1) * D  # through half the width
PMF = 2 * 2 * (3 * 4 * D + MAPPING)  # in two encoders, two layers: prompts of three kinds, of 4 tokens each
NETWORK = 512 * (2 * D + 1) + N * (512 + 1)  # on both, with a hidden layer
READER = 2 * D + 2 * 128 * (D + 1) + 128 * D + 4 * 128  # norm, keys and values, one projection of psi, 4 offsets
W = 128
GATED = 2 * D + 2 * D * W + 2 * W * W + 2 * D + 2 * D * 256 + 2  # norm, attention of W, norm, feed-forward, two gates
RESAMPLER = (
    2 * D + W * (D + 1) + 16 * W  # norm, projection, queries
    + 2 * W + 4 * W * W + 2 * W + 2 * W * 256 + 2 * W  # one layer, and a norm
)  # fmt: skip
VIT, BERT = 85_798_656, 108_891_648  # without classifier and without pooler
SIZES: dict[str, int] = {
    "conditional": CONDITIONAL + HEAD,
    "conditional warm_start=linear": CONDITIONAL + BOTH,
    "linear": BOTH,
    "linear linear.features=average": 2 * HEAD,
    "mlp": NETWORK,
    "mlp head_hidden=0": BOTH,
    "cross-attention": READER + NETWORK + 512 * 4 * 128,
    "flamingo": DEPTH * GATED + RESAMPLER + HEAD,
    "flamingo prompts.layers=last:4 head_features=all": 4 * GATED + RESAMPLER + BOTH,
    "flamingo flamingo.resampled=0": DEPTH * GATED + 2 * D + W * (D + 1) + 2 * W + HEAD,
    "map": DEPTH * (16 + 16) * D + 2 * GATES + BOTH,
    "map data.on_missing=absent": DEPTH * (2 * 16 + 16) * D + 2 * GATES + BOTH + D,  # two cases of the main encoder
    "map data.on_missing=absent either=true": DEPTH * 2 * (16 + 16) * D + 2 * GATES + BOTH + 2 * D,
    "maple": DEPTH * (2 * D + D * D + D) + 2 * GATES + BOTH,
    "maple prompts.layers=first:9": 9 * (2 * D + D * D + D) + 2 * 9 * 12 + BOTH,
    "qmf": 2 * (512 * (D + 1) + N * (512 + 1)),
    "qmf head_hidden=0": 2 * HEAD,
    "late-concat": BOTH,
    "late-concat tune=full": VIT + BERT + BOTH,
    "p-late-concat": STATIC + DEPTH * 4 * D + 2 * GATES + BOTH,
    "p-late-concat prompts.gate=none": STATIC + DEPTH * 4 * D + BOTH,
    "p-sequential": STATIC + DEPTH * 4 * D + 2 * GATES + PROJECTION + HEAD,
    "p-sequential prompts.static=0": 12 + PROJECTION + HEAD,  # a gate for each head of the first layer
    "sequential": VIT + BERT + PROJECTION + HEAD,
    "sequential tune=probe": PROJECTION + HEAD,
    "mmbt": VIT + BERT + PROJECTION + HEAD,
    "p-mmbt": STATIC + DEPTH * 4 * D + 2 * GATES + PROJECTION + HEAD,
    "promptfuse": 20 * D + PROJECTION + HEAD,
    "promptfuse inserted.prompts=5": 5 * D + PROJECTION + HEAD,
    "blindprompt": 20 * D + PROJECTION + HEAD,
    "pmf": PMF + 2 * 2 * 12 + BOTH,
    "pmf prompts.gate=none": PMF + BOTH,
    "pmf pmf.layers=0": BOTH,
    "main-only": HEAD,
    "main-only tune=prompt": STATIC + GATES + HEAD,
    "main-only tune=full": VIT + HEAD,
    "comp-only": HEAD,
    "comp-only tune=prompt": DEPTH * 4 * D + GATES + HEAD,
    "comp-only tune=full": BERT + HEAD,
}


@pytest.fixture(scope="module")
def encoders() -> dict[str, Encoder]:
    """Encoders without memory for weights, created after the promptable layers are known."""
    specs = {"main": "timm:vit_base?pretrained=false", "comp": "hf:bert-base?pretrained=false"}
    return {side: create_encoder(spec).to("meta") for side, spec in specs.items()}


@pytest.mark.parametrize("variant", SIZES)
@pytest.mark.process
def test_trainable_parameters_match_the_definition_for_vit_and_bert(variant: str, encoders: dict[str, Encoder]) -> None:
    method, *settings = variant.split()
    values: dict[str, object] = {"main": "timm:vit_base", "comp": "hf:bert-base", "method": method}
    for text in settings:
        path, value = text.split("=")
        section, _, key = path.rpartition(".")
        values |= {section: {key: value}} if section else {key: value}
    for encoder in encoders.values():
        encoder.freeze()
    config = plain_config(values)
    with torch.device("meta"):
        model = registry.load(registry.FUSION, method)(config, encoders, N)
    assert sum(model.breakdown().values()) == SIZES[variant]
    assert "other" not in model.breakdown()


def test_every_built_in_method_has_its_size_here() -> None:
    ours = {name for name, found in registry.available(registry.FUSION).items() if found[0].value.startswith("mopefuse.")}
    assert ours <= {variant.split()[0] for variant in SIZES}

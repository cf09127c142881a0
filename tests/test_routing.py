"""Statistics of experts: their limits, and the words of each expert compared with a computation by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mopefuse.prompts import usage as routing

K = 8
EVEN, ONE = torch.full((1, K), 1 / K), torch.eye(K)[[3]]


@pytest.mark.parametrize(("share_LK", "entropy", "variation", "unused"), [(EVEN, 1, 0, 0), (ONE, 0, math.sqrt(K - 1), K - 1)])
def test_statistics_at_an_even_load_and_at_a_single_expert(
    share_LK: torch.Tensor, entropy: float, variation: float, unused: int
) -> None:
    assert float(routing.entropy(share_LK)) == pytest.approx(entropy, abs=1e-6)
    assert float(routing.variation(share_LK)) == pytest.approx(variation, abs=1e-6)
    assert int(routing.unused(share_LK).sum()) == unused


def test_statistics_are_means_over_layers_and_usage_of_each_expert() -> None:
    found = routing.statistics(torch.cat([30 * EVEN, 7 * ONE]))
    assert found["entropy"] == pytest.approx(0.5, abs=1e-6)
    assert found["unused_share"] == pytest.approx(7 / 16)
    assert found["usage"] == [[0.125] * K, [0.0] * 3 + [1.0] + [0.0] * 4]
    assert routing.statistics(torch.ones(2, 1))["entropy"] == 1.0


def test_routing_information_is_zero_for_uniform_and_one_for_distinct_routing() -> None:
    alike, each = EVEN.expand(K, 1, K), torch.eye(K).unsqueeze(1)
    both = torch.cat([alike, each], dim=1)
    assert routing.information(both).tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    assert routing.information(ONE.expand(5, 1, K)).tolist() == pytest.approx([0.0], abs=1e-6)


def test_weights_of_a_class_are_means_over_its_samples() -> None:
    weights_SK = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    one, several = torch.tensor([0, 0, 2]), torch.tensor([[1.0, 0, 0], [1, 0, 1], [0, 0, 1]])
    for targets, expected in ((one, [[0.75, 0.25], [0.0, 1.0]]), (several, [[0.75, 0.25], [0.25, 0.75]])):
        found = routing.by_class(weights_SK, targets, 3)
        assert found[[0, 2]].tolist() == expected
        assert found[1].isnan().all()


def test_words_are_ranked_by_log_odds_with_a_prior() -> None:
    texts = ["Red dog", "red cat, red!", "blue dog", "blue cat"] * 25
    weights_SK = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]]).repeat(25, 1)
    found = routing.words_of_experts(weights_SK, texts)
    assert [[word for word, _ in words] for words in found] == [["red"], ["blue"]]
    # by hand: each word is in 50 of 100 texts, so its prior is 10 / 4
    prior, red, blue, animal = 2.5, 50 * 0.9, 50 * 0.2, 25 * 0.9 + 25 * 0.2
    mine, all_mine = red + prior, red + blue + 2 * animal + 10
    rest, all_rest = 50 - red + prior, 200 - (red + blue + 2 * animal) + 10
    odds = math.log(mine / (all_mine - mine)) - math.log(rest / (all_rest - rest))
    assert found[0][0][1] == pytest.approx(odds / math.sqrt(1 / mine + 1 / rest))


def test_texts_without_words_are_not_an_error() -> None:
    assert routing.words_of_experts(torch.ones(2, 3) / 3, ["", "!?"]) == [[], [], []]
    assert routing.words_of_experts(torch.eye(2), ["one", "two"]) == [[], []]

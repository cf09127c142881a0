"""Re-ranking: ranks against a sort by hand, candidates, the choice of the weight, and both stages from end to end."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import call
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import mopefuse
from mopefuse.evaluation import rerank
from mopefuse.evaluation.candidates import assign_negatives, shuffle_first
from mopefuse.evaluation.outputs import SplitOutput
from mopefuse.evaluation.rerank import evaluate_reranked
from mopefuse.inference.rerank import MATCH, OTHER, STORED
from mopefuse.inference.run_model import RunModel
from mopefuse.metrics.reranking import WEIGHTS, BothWays, hard_negatives, shortlist
from mopefuse.metrics.retrieval import partner_ranks

SPECS = ("--main", "tiny:vision", "--comp", "tiny:text", "--device", "cpu")
PLAIN = ("--compat", "paper", "--gate", "zero", "--experts", "2", "--epochs", "1", "--batch", "16")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digit questions; four rows share an image."""
    folder = tmp_path_factory.mktemp("pairs") / "data"
    done = call("data", "make", "digit-questions", folder, "--train", "40", "--val", "24", "--test", "24")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def run(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(pairs, tmp_path_factory.mktemp("runs") / "first", "--task", "retrieval", "--epochs", "0")


@pytest.fixture(scope="module")
def candidates(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("candidates") / "data"
    done = call("data", "candidates", run, out, "--count", "3", "--among", "5", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert f"train a matcher: mopefuse train --data {out} --image-root " in done.stdout
    return out


@pytest.fixture(scope="module")
def matcher(pairs: Path, candidates: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "matcher"
    return train(candidates, out, "--image-root", pairs, *PLAIN)


def train(data: Path, out: Path, *more: object) -> Path:
    done = call("train", *SPECS, "--data", data, "--out", out, *more)
    assert done.returncode == 0, done.stderr
    return out


# -- ranks


def embeddings(samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    main, comp = (F.normalize(torch.randn(samples, 4, generator=draw), dim=1) for _ in range(2))
    return 5 * main, comp, torch.randint(0, samples, (samples, 2), generator=draw)


@given(st.integers(2, 20), st.integers(1, 25), st.integers(0, 99), st.sampled_from((0.0, 0.3, 5.0)))
def test_ranks_are_those_of_a_sort_of_the_best_candidates(samples: int, count: int, seed: int, weight: float) -> None:
    """Candidates below the best K keep their ranks; with the weight 0, so do all."""
    main, comp, keys = embeddings(samples, seed)
    best = shortlist(main, comp, keys, count)
    odds = torch.randn(best.place_SK.shape, generator=torch.Generator().manual_seed(seed))
    scores = (main @ comp.T).numpy()
    for query, (rank, order) in enumerate(
        zip(best.ranks(weight, odds).tolist(), best.order(weight, odds).tolist(), strict=True)
    ):
        first = np.argsort(-scores[query], kind="stable").tolist()
        top = {place: scores[query][place] + weight * float(odds[query][k]) for k, place in enumerate(first[:count])}
        wanted = sorted(top, key=lambda place: -top[place])
        partners = {place for place in range(samples) if (keys[place] == keys[query]).any()}
        in_order = [place in partners for place in wanted + first[count:]]
        assert order == wanted and rank == 1 + in_order.index(True)
    assert torch.equal(best.ranks(0.0, odds), partner_ranks(main, comp, keys))


def test_a_perfect_matcher_brings_partners_among_the_candidates_to_the_first_rank() -> None:
    main, comp, keys = embeddings(60, 0)
    both = BothWays.find(main, comp, keys, 8)
    same = (keys[both.pair_P2[:, 0]] == keys[both.pair_P2[:, 1]]).any(dim=1)
    before, after = both.ranks(0.0, same.float()), both.ranks(1.0, 100 * same.float())
    assert after.tolist() == [[1 if rank <= 8 else rank for rank in ranks] for ranks in before.tolist()]
    assert 1 < int((before <= 8).sum()) < before.numel()
    for way, order in zip(both.ways, both.orders(1.0, same.float()), strict=True):
        assert torch.equal(order.sort()[0], way.place_SK.sort()[0])
    assert len({*map(tuple, both.pair_P2.tolist())}) == len(both.pair_P2) < 2 * 60 * 8


def test_a_weight_is_chosen_only_if_it_is_better_by_more_than_noise() -> None:
    main, comp, _ = embeddings(80, 1)
    both = BothWays.find(main, comp, torch.arange(80)[:, None], 20)
    same = both.pair_P2[:, 0] == both.pair_P2[:, 1]
    draw = torch.Generator().manual_seed(0)
    assert both.choose_weight(9.0 * same) in WEIGHTS
    assert both.choose_weight(-9.0 * same) == 0
    assert both.choose_weight(torch.full((len(same),), 7.0)) == 0  # says the same of every pair
    chosen = [both.choose_weight(torch.randn(len(same), generator=draw)) for _ in range(20)]
    assert chosen.count(0.0) == 20
    one = same & (both.pair_P2[:, 0] == int(both.ways[0].partner_SK.any(dim=1).nonzero()[0]))
    assert one.any() and both.choose_weight(9.0 * one) == 0  # a single query is better


def test_negatives_are_the_best_candidates_that_are_no_partners() -> None:
    main, comp, keys = embeddings(12, 3)
    for query, found in enumerate(hard_negatives(main, comp, keys, 4)):
        order = (main[query] @ comp.T).argsort(descending=True, stable=True).tolist()
        assert found == [place for place in order if not (keys[place] == keys[query]).any()][:4]
    assert hard_negatives(main, comp, torch.zeros(12, 1), 4) == [[]] * 12


# -- candidates


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@given(st.integers(2, 24), st.integers(1, 4), st.integers(0, 99))
def test_negatives_are_the_first_that_are_left(samples: int, count: int, seed: int) -> None:
    """An earlier candidate is passed over only if it already is in as many negatives as any value may be, or in this one."""
    main, comp, keys = embeddings(samples, seed)
    names = [[str(key).encode() for key in keys[:, side].tolist()] for side in range(2)]
    best = [hard_negatives(main, comp, keys, 200), hard_negatives(comp, main, keys, 200)]
    negatives = assign_negatives(best, names, count)
    matches, pairs = {*zip(*names, strict=True)}, [pair for others in negatives for pair in others]
    written = [(names[0][one], names[1][other]) for one, other in pairs]
    assert len({*written}) == len(written) and not matches & {*written}
    limits = [Counter({key: count * times for key, times in Counter(of_side).items()}) for of_side in names]
    used = [Counter(pair[side] for pair in written) for side in range(2)]
    assert all(used[side][key] <= limits[side][key] for side in range(2) for key in used[side])
    for number, others in enumerate(negatives):
        assert len(others) <= count and all(number in pair for pair in others)
        for pair in others:
            kept = int(pair[0] != number)
            kept_in = [sum((row + turn) % 2 == 1 - kept for turn in range(count)) for row in range(samples)]
            for place in best[kept][number][: best[kept][number].index(pair[1 - kept])]:
                better = (number, place) if kept == 0 else (place, number)
                name = names[1 - kept][place]
                full = sum(kept_in[row] for row in range(samples) if names[1 - kept][row] == name)
                full += sum(
                    names[1 - kept][p[1 - kept]] == name for row, ps in enumerate(negatives) for p in ps if p[kept] == row
                )
                assert full >= limits[1 - kept][name] or (names[0][better[0]], names[1][better[1]]) in {*written} | matches


def test_candidates_are_pairs_and_negatives_of_the_same_split(run: Path, pairs: Path, candidates: Path) -> None:
    predictor = mopefuse.load(run, device="cpu")
    for split in ("train", "val", "test"):
        rows, source = read_rows(candidates / f"{split}.jsonl"), read_rows(pairs / f"{split}.jsonl")
        matches = [number for number, row in enumerate(rows) if row["label"] == MATCH]
        assert [(rows[number]["img"], rows[number]["text"]) for number in matches] == [(r["img"], r["text"]) for r in source]
        texts, images = [row["text"] for row in source], [row["img"] for row in source]
        true = {*zip(images, texts, strict=True)}
        others = [(row["img"], row["text"]) for row in rows if row["label"] == OTHER]
        assert others and not true & {*others} and {i for i, _ in others} <= {*images} and {t for _, t in others} <= {*texts}
        for column in ("img", "text"):  # a value alone says nothing about the label
            count = {label: Counter(row[column] for row in rows if row["label"] == label) for label in (MATCH, OTHER)}
            assert all(times <= 3 * count[MATCH][value] for value, times in count[OTHER].items())
        scores = predictor.embed(images=[pairs / image for image in images]) @ predictor.embed(texts=texts).T
        known = np.array([[(image, text) in true for text in texts] for image in images])
        row, column = (values.index(value) for values, value in zip((images, texts), others[0], strict=True))
        free = np.sort(np.where(known, -9, scores)[row])[::-1]
        assert scores[row, column] >= free[4] - 1e-5  # nothing was taken before it


def test_the_best_candidates_are_drawn_from_in_random_order(run: Path, candidates: Path, tmp_path: Path) -> None:
    """Otherwise a matcher would learn that what the first stage ranks first is not a match."""
    drawn = [shuffle_first(range(10), 5, random.Random(seed)) for seed in range(200)]
    assert all(sorted(one[:5]) == [*range(5)] and one[5:] == [*range(5, 10)] for one in drawn)
    assert len({one[0] for one in drawn}) == 5
    for seed, same in ((0, True), (1, False)):
        out = tmp_path / str(seed)
        assert (
            call("data", "candidates", run, out, "--count", "3", "--among", "5", "--seed", seed, "--device", "cpu").returncode
            == 0
        )
        assert ((out / "train.jsonl").read_bytes() == (candidates / "train.jsonl").read_bytes()) == same


def test_candidates_of_shards_have_copies_of_the_files(pairs: Path, tmp_path: Path) -> None:
    assert call("data", "pack", pairs, tmp_path / "shards", "--task", "retrieval").returncode == 0
    run = train(tmp_path / "shards", tmp_path / "run", "--task", "retrieval", "--method", "linear", "--epochs", "1")
    done = call("data", "candidates", run, tmp_path / "out", "--json")
    facts = json.loads(done.stdout)
    assert facts["rows"]["test"][MATCH] == 24 and "--image-root" not in facts["train"]
    assert len({*(tmp_path / "out" / "files").iterdir()}) == 22  # distinct images
    assert all((tmp_path / "out" / row["img"]).is_file() for row in read_rows(tmp_path / "out" / "val.jsonl"))
    assert "0 errors, 0 warnings" in call("data", "check", tmp_path / "out").stdout
    again = call("data", "candidates", run, tmp_path / "out")
    assert again.returncode == 4 and "MF-DATA-52" in again.stderr


# -- both stages


def fake_matcher(monkeypatch: pytest.MonkeyPatch, pairs: Path, sure: dict[str, float]) -> None:
    """A matcher that knows which pairs are partners; by split, the log-odds that it gives them."""
    real, true = rerank.run_split, {split: {r["text"]: r["img"] for r in read_rows(pairs / f"{split}.jsonl")} for split in sure}

    def run_split(model: Any, data: Any, split: str, *more: Any, **options: Any) -> SplitOutput:
        if data.task.compares_samples:
            return real(model, data, split, *more, **options)
        rows = data.splits[split].rows
        assert {row.labels for row in rows} == {(OTHER,)}  # the truth is nowhere
        odds = [sure[split] * (true[split][row.values["text"]] == row.values["image"]) for row in rows]
        return SplitOutput(torch.tensor([[one, 0.0] for one in odds]))

    monkeypatch.setattr(rerank, "run_split", run_split)


@pytest.mark.parametrize(("val", "test"), [(9.0, -9.0), (-9.0, 9.0)])
def test_the_weight_is_chosen_on_validation_only(
    run: Path, matcher: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, val: float, test: float
) -> None:
    """Where validation misleads, the test split pays for it."""
    fake_matcher(monkeypatch, pairs, {"val": val, "test": test})
    found = evaluate_reranked(run, matcher, candidates=10, device="cpu")
    key = "recall_at_1"
    if val < 0:
        assert found.stored.weight == 0 and found.metrics == found.without
    else:
        of_val = found.stored.metrics["val"]
        assert found.stored.weight > 0 and of_val["with"][key] > of_val["without"][key]
        assert found.metrics[key] < found.without[key]
    measured = json.loads(call("eval", run, "--json", "--device", "cpu").stdout)["metrics"]
    assert found.without == {name: value for name, value in measured.items() if name != "loss"}


def test_a_gallery_is_re_ranked_as_in_evaluation(
    run: Path, matcher: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test, out = pairs / "test.jsonl", tmp_path / "lines.jsonl"
    plain = ("predict", run, test, "--gallery", test, "--device", "cpu", "--gallery-of")
    command = (*plain[:-1], "--rerank", matcher, "--gallery-of")
    (run / STORED).unlink(missing_ok=True)
    done = call(*command, "text")
    assert done.returncode == 3 and f"fix: mopefuse eval {run} --rerank {matcher}" in done.stderr, done.stderr
    monkeypatch.setattr(BothWays, "choose_weight", lambda *_: 3.0)
    done = call("eval", run, "--rerank", matcher, "--candidates", "6", "--json", "--out", out, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["rerank"]["weight"] == 3 and facts["metrics"] != facts["without"]
    assert facts["rerank"]["metrics"]["test"] == {"without": facts["without"], "with": facts["metrics"]}
    for of, key in (("image", "ranked_comp_to_main"), ("text", "ranked")):
        rows = ranked(*command, of, "--top", "9")
        assert [[one["id"] for one in row[:6]] for row in rows] == [line[key] for line in read_rows(out)]
    assert all(["reranked" in one for one in row] == [True] * 6 + [False] * 3 for row in rows)
    before = ranked(*plain, "text", "--top", "9")
    assert [row[6:] for row in before] == [row[6:] for row in rows] and before != rows
    assert [{one["id"] for one in row} for row in before] == [{one["id"] for one in row} for row in rows]
    assert ranked(*command, "text", "--top", "2") == [row[:2] for row in rows]
    query, best = read_rows(test)[0], rows[0][0]
    text = next(row["text"] for row in read_rows(test) if row["id"] == best["id"])
    match = mopefuse.load(matcher, device="cpu").predict(str(pairs / query["img"]), text)[0]["probabilities"][MATCH]
    scale = float(mopefuse.load_model(run).scale.detach())
    assert best["reranked"] == pytest.approx(scale * best["score"] + 3 * np.log(match / (1 - match)), abs=1e-3)


def ranked(*command: object) -> list[list[dict[str, Any]]]:
    done = call(*command)
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["ranked"] for line in done.stdout.splitlines()]


def test_only_the_run_s_own_splits_are_stored_and_predictions_have_a_file(run: Path, matcher: Path, pairs: Path) -> None:
    (run / STORED).unlink(missing_ok=True)
    before = (run / "predictions.jsonl").read_bytes()
    command = ("eval", run, "--rerank", matcher, "--data", pairs / "train.jsonl", "--split", "val")
    done = call(*command, "--json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    facts, (stored,) = json.loads(done.stdout), json.loads((run / STORED).read_text()).values()
    assert [*stored["metrics"]] == ["val"] and stored["metrics"]["val"]["without"] != facts["without"]
    assert len(read_rows(Path(facts["predictions"]))) == len(read_rows(pairs / "train.jsonl"))
    assert Path(facts["predictions"]).parent == run and (run / "predictions.jsonl").read_bytes() == before


def test_a_matcher_that_is_no_better_changes_nothing(run: Path, matcher: Path, pairs: Path) -> None:
    """One epoch on 40 pairs teaches it nothing, as is measured and stored."""
    done = call("eval", run, "--rerank", matcher, "--device", "cpu", "--candidates", "5")
    assert done.returncode == 0 and "weight 0: no weight is better on val by more than noise" in done.stdout, done.stderr
    test = pairs / "test.jsonl"
    command = ("predict", run, test, "--gallery", test, "--gallery-of", "text", "--device", "cpu")
    done = call(*command, "--rerank", matcher)
    assert done.stdout == call(*command).stdout and "the weight of the matcher is 0" in done.stderr


@pytest.mark.parametrize("method", ["cross-attention", "conditional"])
def test_encoding_each_value_once_gives_the_outputs_of_each_pair(
    pairs: Path, candidates: Path, tmp_path: Path, method: str
) -> None:
    more = PLAIN if method == "conditional" else ("--epochs", "1")
    model = mopefuse.load(
        train(candidates, tmp_path / "run", "--image-root", pairs, "--method", method, *more), device="cpu"
    ).model
    assert isinstance(model, RunModel)
    rows = read_rows(pairs / "test.jsonl")[:6]
    images, texts = [str(pairs / row["img"]) for row in rows[::4]], [row["text"] for row in rows]
    places = {"image": np.array([0, 1, 0, 1, 1]), "text": np.array([5, 0, 0, 3, 5])}
    found = model.outputs_of_pairs({"image": images, "text": texts}, places, size=3)
    batch = model.collate([images[i] for i in places["image"]], [texts[i] for i in places["text"]])
    with torch.no_grad():
        np.testing.assert_allclose(found, model.fusion(batch).logits.numpy(), atol=1e-4)
    assert np.ptp(found[:, 0] - found[:, 1]) > 0


def test_what_cannot_be_re_ranked_is_said(run: Path, matcher: Path, pairs: Path, candidates: Path, tmp_path: Path) -> None:
    digits = train(pairs, tmp_path / "digits", "--method", "linear")
    text = train(candidates, tmp_path / "text", "--method", "comp-only", "--image-root", pairs, "--epochs", "1")
    test = pairs / "test.jsonl"
    gallery = ("--gallery", test, "--gallery-of", "text")
    adapter = tmp_path / "adapter"
    assert call("export", run, "-o", adapter, "--format", "adapter").returncode == 0
    for command, found in (
        (
            ("eval", run, "--rerank", digits),
            "predicts 0, 1, 2, 3, and a matcher predicts match or other · --rerank · fix: pass ",
        ),
        (("predict", run, test, *gallery, "--rerank", digits), "a matcher predicts match or other"),
        (("eval", run, "--rerank", text), "text reads text, and the first stage image and text · --rerank · fix: pass "),
        (("eval", digits, "--rerank", matcher), "only a search can be re-ranked · --rerank · fix: remove --rerank"),
        (
            ("eval", adapter, "--data", pairs, "--rerank", matcher),
            "an exported adapter has none · --rerank · fix: pass the run",
        ),
        (("eval", run, "--rerank", tmp_path / "none"), "run not found"),
        (("eval", run, "--rerank", matcher, "--missing", "text=0.5"), "re-ranking needs both values of every pair"),
        (("eval", run, "--candidates", "5"), "there is no matcher to re-rank candidates · --candidates · fix: add --rerank"),
        (("predict", digits, test, "--rerank", matcher), "and ranks nothing · --rerank · fix: remove --rerank"),
        (("predict", run, test, "--rerank", matcher), "MF-CFG-412"),
        (
            ("predict", run, test, "--rerank", matcher, "--engine", "local", "-o", tmp_path / "o"),
            "cannot be combined with --engine",
        ),
        (("data", "candidates", digits, tmp_path / "out"), "pass a run of mopefuse train --task retrieval"),
    ):
        done = call(*command)
        assert done.returncode in (3, 6) and found in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()

"""Retrieval: losses and ranks against a computation by hand, projections against scikit-learn, and runs from end to end."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call, matrix
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.cross_decomposition import CCA
from sklearn.gaussian_process.kernels import RBF
from torch.nn import functional as F

import mopefuse
from mopefuse.config.schema import Data, build_config
from mopefuse.core import cache
from mopefuse.data.load import load_data
from mopefuse.data.sets.digit_captions import make as make_captions
from mopefuse.data.sets.digit_questions import COLOURS
from mopefuse.errors import MopefuseError
from mopefuse.fusion.projection_fit import Landmarks, fit_projection
from mopefuse.inference.predict import Predictor
from mopefuse.metrics.bootstrap import difference
from mopefuse.metrics.retrieval import RankOutcome, best_candidates, partner_ranks
from mopefuse.tasks.base import get_task, task_from_facts
from mopefuse.tasks.retrieval import Retrieval
from mopefuse.testing import check_task

SPECS = ("--main", "tiny:vision", "--comp", "tiny:text", "--device", "cpu", "--task", "retrieval")
PAIRS = [[f"text {n:x}", f"image {n + 9:x}"] for n in range(10)] + [["text 1", "image 30"], ["text 40", "image b"]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digit questions without their labels."""
    folder = tmp_path_factory.mktemp("pairs") / "data"
    done = call("data", "make", "digit-questions", folder, "--train", "40", "--val", "16", "--test", "12")
    assert done.returncode == 0, done.stderr
    for file in folder.glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps({key: row[key] for key in row if key != "label"}) + "\n" for row in rows))
    (folder / "labels.txt").unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="module")
def run(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "conditional"
    done = call("train", *SPECS, "--data", pairs, "--out", out, "--epochs", "1", "--set", "retrieval.landmarks=64")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("task: retrieval, the partner of either value of a pair\n")
    return out


# -- the task


def test_the_contract_of_a_task_holds() -> None:
    check_task("retrieval", rows=PAIRS, known=Retrieval.ways)


def outputs_of(samples: int, seed: int, width: int = 4) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    main, comp = (F.normalize(torch.randn(samples, width, generator=draw), dim=1) for _ in range(2))
    return torch.cat([5 * main, comp], dim=1)


def test_the_loss_is_the_cross_entropy_of_both_ways() -> None:
    outputs, keys = outputs_of(6, 0), torch.arange(6)[:, None].expand(6, 2)
    logits = outputs[:, :4] @ outputs[:, 4:].T
    each = [F.cross_entropy(one, torch.arange(6), reduction="none") for one in (logits, logits.T)]
    torch.testing.assert_close(Retrieval(4).loss(outputs, keys), sum(each) / 2)


def test_rows_with_an_equal_value_are_no_negatives() -> None:
    """Two photos of one name: either answers the other's search, in the loss and in the ranks."""
    outputs = torch.tensor([[5.0, 0, 0, 1], [0, 5, 1, 0], [-5, 0, -1, 0]])
    apart, equal = torch.tensor([[1, 1], [2, 2], [3, 3]]), torch.tensor([[1, 1], [2, 1], [3, 3]])
    task = Retrieval(2)
    assert task.loss(outputs, equal)[0] < task.loss(outputs, apart)[0]
    assert task.tally(3, 4).ranks().shape == (3, 2)
    assert [task.count(outputs, keys).ranks().tolist()[0] for keys in (apart, equal)] == [[2, 3], [1, 1]]


@given(st.integers(2, 30), st.integers(0, 99))
def test_ranks_are_those_of_a_sort(samples: int, seed: int) -> None:
    outputs, keys = outputs_of(samples, seed), torch.arange(samples)[:, None]
    main, comp = outputs.chunk(2, dim=1)
    order = np.argsort(-(main @ comp.T).numpy(), axis=1)
    assert partner_ranks(main, comp, keys).tolist() == [order[i].tolist().index(i) + 1 for i in range(samples)]
    assert best_candidates(main, comp, 3).tolist() == order[:, :3].tolist()


def test_equal_scores_count_as_errors() -> None:
    """A model that gives everything the same embedding finds nothing."""
    task, same = Retrieval(4), torch.ones(20, 8)
    found = task.compute(same, torch.arange(20)[:, None])
    assert found["recall_at_10"] == 0 and found["median_rank_main_to_comp"] == 20


@pytest.mark.parametrize("metric", Retrieval.metrics)
def test_a_resample_has_the_metric_of_its_repeated_queries(metric: str) -> None:
    random = np.random.default_rng(0)
    rank_S2, chosen = random.integers(1, 30, (41, 2)), random.integers(0, 41, 41)
    weights = np.bincount(chosen, minlength=41).astype(float)[None]
    repeated = RankOutcome(rank_S2[chosen]).measure(metric, np.ones((1, 41)))
    assert RankOutcome(rank_S2).measure(metric, weights) == pytest.approx(repeated)
    best = RankOutcome(np.ones((41, 2), np.int64))
    worse = difference([RankOutcome(rank_S2)], [best], metric, resamples=200)
    assert (worse.value > 0) == metric.startswith("median") and worse.p < 0.05


def test_facts_that_do_not_fit_are_refused() -> None:
    for facts in ({"width": 0, "keys": 2}, {"width": 4}, {"width": "x", "keys": 2}):
        with pytest.raises(MopefuseError, match="facts of the task are damaged"):
            task_from_facts({"name": "retrieval", **facts})


# -- projections


def test_coordinates_of_landmarks_have_the_kernel_as_dot_products() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(12, 5, generator=draw)
    landmarks = Landmarks(5, 12)
    landmarks.place(features, 0.5)
    with torch.no_grad():
        coordinates = landmarks(features)
    wanted = RBF(length_scale=1.0)(F.normalize(features, dim=1).numpy())
    np.testing.assert_allclose((coordinates @ coordinates.T).numpy(), wanted, atol=1e-4)


def test_repeated_landmarks_do_not_amplify_rounding() -> None:
    """A difference of rounding in a feature is one in its coordinates."""
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(12, 5, generator=draw).repeat(4, 1)
    noise = 1e-6 * torch.randn(48, 5, generator=draw)
    landmarks = Landmarks(5, 48)
    landmarks.place(features, 0.5)
    with torch.no_grad():
        assert (landmarks(features + noise) - landmarks(features)).abs().max() < 3e-6


def test_projections_are_those_of_canonical_correlation_analysis() -> None:
    """Without regularisation, and up to the weight and the sign of each direction, they equal scikit-learn's."""
    draw = torch.Generator().manual_seed(0)
    shared = torch.randn(400, 2, generator=draw)
    one, other = (shared @ torch.randn(2, 4, generator=draw) + 0.5 * torch.randn(400, 4, generator=draw) for _ in range(2))
    pair = (one, other)
    keys = torch.arange(400)[:, None]
    found = fit_projection(pair, pair, 2, lambda outputs: Retrieval(2, 1).loss(outputs, keys).mean(), ridges=(0.0,))
    theirs = CCA(n_components=2, scale=False, max_iter=5000, tol=1e-12).fit(one.numpy(), other.numpy()).transform(one.numpy())
    ours = (one @ found.weights_EM[0].T + found.biases_E[0]).numpy()
    for number in range(2):
        assert abs(np.corrcoef(ours[:, number], theirs[:, number])[0, 1]) == pytest.approx(1, abs=1e-4)


# -- runs


def test_a_row_needs_no_label_and_every_value_has_a_key(pairs: Path) -> None:
    data = load_data(Data(path=str(pairs), task="retrieval"))
    keys = data.targets("train")
    assert keys.shape == (40, 2) and data.labels == Retrieval.ways
    texts = [row.values["text"] for row in data.splits["train"].rows]
    column = list(data.modalities).index("text")
    same = [[one == other for other in texts] for one in texts]
    assert (keys[:, None, column] == keys[None, :, column]).tolist() == same


def test_step_0_of_a_run_is_fitted_and_predictions_repeat_the_metrics(run: Path) -> None:
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert log[0]["step"] == 0 and log[0]["val"]["recall_at_10"] > 10 / 16
    metrics = json.loads((run / "metrics.json").read_text())["metrics"]["test"]
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and all(len(line["ranked"]) == 10 for line in lines)
    assert metrics["recall_at_5_main_to_comp"] == pytest.approx(np.mean([line["rank"] <= 5 for line in lines]))
    assert metrics["recall_at_1_comp_to_main"] == pytest.approx(np.mean([line["rank_comp_to_main"] == 1 for line in lines]))


def test_an_embedding_depends_on_its_value_alone(run: Path, pairs: Path) -> None:
    model, predictor = mopefuse.load_model(run), mopefuse.load(run, device="cpu")
    rows = [json.loads(line) for line in (pairs / "test.jsonl").read_text().splitlines()]
    texts, images = [row["text"] for row in rows], [pairs / row["img"] for row in rows]
    with torch.no_grad():
        main, comp = model(model.collate(images, texts)).logits.chunk(2, dim=1)
    main = F.normalize(main, dim=1)
    np.testing.assert_allclose(predictor.embed(images=images), main.numpy(), atol=1e-5)
    np.testing.assert_allclose(predictor.embed(texts=texts[3]), comp[3:4].numpy(), atol=1e-5)
    assert predictor.predict(images[:1], texts[:1])[0].keys() == {"main", "comp"}


@pytest.mark.parametrize("method", ["linear", "conditional"])
def test_a_model_can_be_trained_in_a_loop_of_your_own(pairs: Path, method: str) -> None:
    data = mopefuse.PairDataset(pairs, task="retrieval")
    settings = {"method": method, "retrieval": {"landmarks": 32, "dropout": 0.0}}
    model = mopefuse.build_fusion("tiny:vision", "tiny:text", labels=data.labels, task=data.task, **settings)
    batch = model.collate([data[number] for number in range(16)])
    assert batch.targets is not None and batch.targets.shape == (16, 2)
    optimizer, losses = torch.optim.Adam(model.trainable_parameters(), 1e-2), []
    for _ in range(30):
        losses.append(data.task.loss(model(batch).logits, batch.targets).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def predict(run: Path, *arguments: object) -> list[dict]:
    done = call("predict", run, *arguments, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_gallery_is_ranked_as_in_evaluation(
    run: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOPEFUSE_CACHE", str(tmp_path / "cache"))  # other tests may have embedded the same
    test = pairs / "test.jsonl"
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    for of, key in (("text", "ranked"), ("image", "ranked_comp_to_main")):
        found = predict(run, test, "--gallery", test, "--gallery-of", of, "--top", "5")
        assert [[one["id"] for one in row["ranked"]] for row in found] == [line[key][:5] for line in lines]
    assert all(row["ranked"][0]["score"] >= row["ranked"][4]["score"] for row in found)
    assert sum(kind == "galleries" for kind, *_ in cache.entries()) == 2  # each embedded once


def test_a_gallery_is_read_from_the_cache_until_it_or_the_model_changes(run: Path, pairs: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.csv"
    names.write_text("id,text\na,which digit is red\nb,which digit is blue\n")
    photo = pairs / json.loads((pairs / "test.jsonl").read_text().splitlines()[0])["img"]

    def ranked() -> list[str]:
        (row,) = predict(run, "--image", photo, "--gallery", names)
        return [one["id"] for one in row["ranked"]]

    def count() -> int:
        return sum(kind == "galleries" for kind, *_ in cache.entries())

    before = count()
    assert ranked() == ranked() and count() == before + 1
    names.write_text("id,text\na,which digit is red\nc,which digit is green\n")
    assert set(ranked()) == {"a", "c"} and count() == before + 2


def test_what_is_wrong_with_a_gallery_is_said(run: Path, pairs: Path, tmp_path: Path) -> None:
    test, bad = pairs / "test.jsonl", tmp_path / "bad.jsonl"
    bad.write_text('{"id": "1", "text": "x"}\n{"id": "2", "text": 3}\n')
    assert "MF-CFG-412" in call("predict", run, test).stderr
    assert "MF-CFG-413" in call("predict", run, test, "--gallery", test).stderr
    assert "MF-DATA-03" in call("predict", run, test, "--gallery", bad, "--gallery-of", "text").stderr
    assert "MF-CFG-66" in call("predict", run, test, "--gallery", tmp_path / "none.csv").stderr
    empty, other = tmp_path / "empty.jsonl", tmp_path / "other.csv"
    empty.write_text("")
    other.write_text("id,title\na,red\n")
    for gallery, of, found in (
        (test, "audio", "the model reads image and text, not audio · --gallery-of · fix: use image or text"),
        (test, "text", "the query is of the modality text, and only another one can be ranked for it · --gallery-of · "),
        (empty, "image", f"the gallery has no rows · {empty} · fix: add at least one row"),
        (
            other,
            "image",
            f"the gallery has no column img (image); its columns: id, title · {other} · fix: name its column with ",
        ),
    ):
        done = call("predict", run, "--text", "x", "--gallery", gallery, "--gallery-of", of)
        assert found in done.stderr, done.stderr
    done = call("predict", run, "--image", next((pairs / "images").rglob("*.png")), "--gallery", other)
    assert "no column text (text); its columns: id, title" in done.stderr and "did you mean --text-col title?" in done.stderr
    assert "MF-CFG-152" in call("eval", run, "--missing", "text=0.5").stderr
    assert "MF-CFG-403" in call("fit", pairs, "--task", "retrieval", "--out", tmp_path / "fit").stderr
    assert "MF-CFG-100" in call("swap-encoder", run, "--comp", "tiny:text", "-o", tmp_path / "new").stderr


def test_rows_that_share_an_image_have_one_landmark(run: Path) -> None:
    """Ten images for 40 rows."""
    found = mopefuse.load_model(run).state_dict()["head.main.0.landmark_MC"]
    assert int(found.any(dim=1).sum()) == 10


@pytest.mark.parametrize("method", ["linear", "conditional"])
def test_pairs_with_one_distinct_image_are_refused(pairs: Path, tmp_path: Path, method: str) -> None:
    data = shutil.copytree(pairs, tmp_path / "data")
    rows = [json.loads(line) for line in (pairs / "train.jsonl").read_text().splitlines()]
    (data / "train.jsonl").write_text("".join(json.dumps({**row, "img": rows[0]["img"]}) + "\n" for row in rows))
    done = call("train", *SPECS, "--data", data, "--out", tmp_path / "run", "--method", method, "--epochs", "1")
    assert done.returncode == 4, done.stderr
    assert "error[MF-DATA-07]: train has 1 distinct image, and a search needs at least two · train.jsonl · fix:" in done.stderr
    (data / "train.jsonl").write_text(json.dumps(rows[0]) + "\n")
    done = call("train", *SPECS, "--data", data, "--out", tmp_path / "run", "--method", method, "--epochs", "1")
    assert done.returncode == 4 and "a search needs at least two" in done.stderr, done.stderr


def test_a_search_among_equal_features_is_fitted_without_an_error() -> None:
    same, keys = (torch.ones(6, 3), torch.randn(6, 3)), torch.arange(6)[:, None]
    found = fit_projection(same, same, 2, lambda outputs: Retrieval(2, 1).loss(outputs, keys).mean())
    assert all(weight_EM.isfinite().all() for weight_EM in found.weights_EM)


@pytest.mark.parametrize("form", matrix(["adapter", "pt2", "onnx"], ["adapter"]))
def test_an_export_ranks_as_the_run_does(run: Path, pairs: Path, tmp_path: Path, form: str) -> None:
    out = tmp_path / form
    done = call("export", run, "-o", out, "--format", form)
    assert done.returncode == 0, done.stderr
    rows = load_data(Data(path=str(pairs), task="retrieval")).splits["test"].rows
    values = {"texts": [row.values["text"] for row in rows], "images": [pairs / str(row.values["image"]) for row in rows]}
    for name, each in values.items():
        ours, theirs = (mopefuse.load(path, device="cpu").embed(**{name: each}) for path in (run, out))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    command = ("--gallery", pairs / "test.jsonl", "--gallery-of", "text", "--top", "2")
    assert "has no effect" not in call("predict", run, pairs / "test.jsonl", *command).stderr
    ours, theirs = (predict(path, pairs / "test.jsonl", *command) for path in (run, out))
    assert [[one["id"] for one in row["ranked"]] for row in ours] == [[one["id"] for one in row["ranked"]] for row in theirs]


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (("--set", "train.accumulate=2"), "MF-CFG-410"),
        (("--batch", "1"), "MF-CFG-410"),
        (("--class-weights", "balanced"), "MF-CFG-400"),
        (("--on-missing", "absent"), "MF-CFG-400"),
        (("--shots", "2"), "MF-CFG-400"),
        (("--method", "mlp"), "MF-CFG-401"),
        (("--comp", "tiny:text"), "MF-CFG-142"),
        (("--either",), "MF-CFG-143"),
        (("--modality-dropout", "0.1"), "MF-CFG-144"),
        (("--main", "tiny:text"), "MF-CFG-411"),
        (("--select", "accuracy"), "MF-CFG-52"),
    ],
)
def test_settings_without_meaning_for_pairs_are_refused(pairs: Path, tmp_path: Path, more: tuple[str, ...], code: str) -> None:
    assert code in call("train", *SPECS, "--data", pairs, "--out", tmp_path / "run", *more, "--dry-run").stderr


def test_a_batch_is_not_divided_among_processes(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = load_data(Data(path=str(pairs), task="retrieval")).sparse_targets("train")
    config = build_config({"main": "tiny:vision", "comp": "tiny:text"})
    assert Retrieval().fitted(targets, config).keys == 2
    monkeypatch.setattr("mopefuse.core.distributed.world_size", lambda: 4)
    with pytest.raises(MopefuseError, match="cannot be divided among 4 processes"):
        Retrieval().fitted(targets, config)


def test_a_check_of_pairs_needs_no_labels(pairs: Path) -> None:
    done = call("data", "check", pairs, "--task", "retrieval")
    assert done.returncode == 0 and "0 errors" in done.stdout and "0 labels" not in done.stdout
    assert "MF-DATA" in call("data", "check", pairs).stdout + call("data", "check", pairs).stderr


def test_only_a_model_for_retrieval_embeds() -> None:
    model = SimpleNamespace(task=get_task("single-label"))
    with pytest.raises(MopefuseError, match="trained for the task single-label, and has no embeddings"):
        Predictor(model).embed(texts=["x"])  # type: ignore[arg-type]


def test_values_that_cannot_be_embedded_are_refused(run: Path) -> None:
    predictor = mopefuse.load(run, device="cpu")
    with pytest.raises(MopefuseError, match="a sample must be a string; got int"):
        predictor.embed(texts=[3])
    with pytest.raises(MopefuseError, match="expected values of one modality, got image and text"):
        predictor.embed(["x"], ["y"])
    with pytest.raises(MopefuseError, match="expected values of one modality, got none"):
        predictor.embed()


def test_a_linear_run_is_trained_compared_audited_and_reported(run: Path, pairs: Path, tmp_path: Path) -> None:
    linear = tmp_path / "linear"
    done = call("train", *SPECS, "--method", "linear", "--data", pairs, "--out", linear, "--epochs", "2", "--fraction", "0.5")
    assert done.returncode == 0, done.stderr
    assert json.loads((linear / "metrics.json").read_text())["rows"]["train"] == 20
    evaluated = call("eval", run, "--min", "recall_at_10=0.0", "--max", "median_rank_main_to_comp=12")
    assert evaluated.returncode == 0, evaluated.stderr
    compared = call("compare", run, linear)
    assert compared.returncode == 0 and "recall_at_10" in compared.stdout, compared.stderr
    reported = call("report", run, "-o", tmp_path / "page", "--audit")
    assert reported.returncode == 0, reported.stderr


# -- generated captions


def test_captions_of_neighbours_exchange_the_colours_of_two_digits(tmp_path: Path) -> None:
    make_captions(tmp_path / "data", train=40, val=6, test=7)
    make_captions(tmp_path / "again", train=40, val=6, test=7)
    rows = read_rows(tmp_path / "data", "train")
    assert rows == read_rows(tmp_path / "again", "train") and len(read_rows(tmp_path / "data", "test")) == 7
    named = [dict(re.findall(r"the (\w+) digit is (\d)", row["text"])) for row in rows]
    for one, other in zip(named[::2], named[1::2], strict=True):
        (first, a), (second, b) = one.items()
        assert other == {first: b, second: a} and a != b
    for row, colours in zip(rows, named, strict=True):
        image = np.array(Image.open(tmp_path / "data" / row["img"])).reshape(-1, 3)
        hues = {tuple(np.sign(pixel // 100)) for pixel in image[image.max(axis=1) > 200]}
        assert hues == {tuple(np.sign(np.array(COLOURS[colour]) // 100)) for colour in colours}


def read_rows(folder: Path, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]

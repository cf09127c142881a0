"""The page of a run: complete, harmless, with correct numbers, and rendered in a browser if there is one."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from chart_cases import rows_of, tips
from check_cases import ATTRIBUTE, HOSTILE
from conftest import TINY, call, make_pairs, matrix, write_rows
from PIL import Image
from report_cases import facts_of, keys, page_of
from test_data_pages import SERVED, Page

from mopefuse.config.schema import Data
from mopefuse.data.load import load_data
from mopefuse.report import run_errors, run_overview, run_routing
from mopefuse.report.pages import Section, fragment, sections_page
from mopefuse.report.run_report import report

SECTIONS = [
    "baselines", "audit", "task", "resources", "confusion", "scores", "calibration", "examples", "mistakes", "training",
]  # fmt: skip
ROUTING = ["usage", "routing-training", "classes", "experts"]


@pytest.fixture
def run(reported: Path) -> Path:
    """A run of two steps with its page; tests must not change it."""
    return reported


# -- the page


def test_the_page_has_every_section_and_explains_its_numbers(run: Path) -> None:
    page = page_of(run)
    assert keys(page) == SECTIONS + ROUTING
    result = json.loads((run / "metrics.json").read_text())
    assert f"{100 * result['metrics']['test']['accuracy']:.1f} %" in page.text
    assert f"{result['parameters']['trainable']:,}" in page.text
    for text in ("train 12, val 6, test 7", "tiny:vision (image, 4 layers)", "prompts.experts", "Guo et al. 2017", "Monroe"):
        assert text in page.text
    assert "with another sample's text, accuracy goes from" in page.text
    assert len(page.pictures()) >= 7


def test_the_page_says_how_to_try_the_model(run: Path) -> None:
    page = page_of(run)
    assert f"mopefuse serve {run}, then open {SERVED}run" in re.sub(r"\s+", " ", page.text)
    assert [link["href"] for link in page.all("a")] == [f"{SERVED}run"]


def test_odd_names_stay_text_in_the_command_and_the_link(run: Path) -> None:
    odd = f"a b'&\"<{HOSTILE}"
    facts = facts_of(run, path=f"runs/{odd}", name=odd)
    page = Page(sections_page("x", "x", [], [run_overview.task(facts)]))
    page.check_harmless()
    (address,) = (link["href"] for link in page.all("a"))
    assert parse_qs(urlsplit(address).query) == {"model": [odd]}
    command = re.search(r"mopefuse serve (.*), then open", page.text)
    assert command is not None and shlex.split(command[1]) == [f"runs/{odd}"]


def test_the_page_loads_nothing_and_runs_only_its_own_scripts(run: Path) -> None:
    page = page_of(run)
    page.check_harmless()
    assert len(page.scripts) == 3, "data, library, and the script for sorting and filtering"
    assert not {"link", "iframe", "object", "form"} & {tag for tag, _ in page.elements}
    html = (run / "report.html").read_text(encoding="utf-8")
    without = re.sub("<script.*?</script>", "", html, flags=re.DOTALL)
    assert "http" not in without.replace("http-equiv", "").replace(SERVED, "")
    assert len(html) < 1_500_000 and len(without) < 300_000


def test_every_chart_has_a_table_of_its_numbers(run: Path) -> None:
    page = page_of(run)
    names = page.charts()
    assert names >= {"audit", "parameters", "confusion", "calibration", "loss", "validation", "usage", "entropy", "classes"}
    numbers = [attributes for attributes in page.all("details") if attributes.get("class") == "numbers"]
    assert len(numbers) == len(names) - 1, "the audit's numbers are in its own table"
    assert "JavaScript is off" in page.text
    assert all(attributes["aria-label"] for attributes in page.all("div") if "data-chart" in attributes)


@pytest.mark.parametrize("multi", matrix([False, True], [True]))
def test_hostile_labels_texts_and_ids_are_shown_as_text(tmp_path: Path, multi: bool) -> None:
    data = make_pairs(tmp_path / "data", multi=multi)
    odd = f"{ATTRIBUTE}'><img src=x onerror=alert(1)>"
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        for row in rows:
            names = {"a": HOSTILE, "b": odd, "c": "<b>c</b> & 'd'"}
            label = [names[name] for name in row["label"]] if multi else names[row["label"]]
            row |= {"id": f"{row['id']}{odd}", "text": f"{row['text']} {HOSTILE} {odd}", "label": label}
        write_rows(data / f"{split}.jsonl", rows)
    run = tmp_path / f"run {HOSTILE.replace('/', '')}"
    assert call("train", *TINY, "--data", data, "--out", run, "--steps", "2").returncode == 0
    done = report(run, device="cpu", figures=tmp_path / "figures")
    page = page_of(run)
    assert {attributes.get("src", "")[:5] for attributes in page.all("img")} == {"data:"}
    page.check_harmless()
    tiles = [1 for div in page.all("div") if div.get("class") == "tile"]
    assert len(page.all("b")) == len(tiles) + 2, "the tiles, and this run among the baselines, are bold"
    assert HOSTILE in page.text and odd in page.text and "<b>c</b> & 'd'" in page.text
    for path in done.figures:
        if path.suffix == ".svg":
            assert not re.search("<(script|img|b)[ >]", path.read_text(encoding="utf-8"))


def test_multi_label_runs_have_scores_but_no_confusion_matrix(multi_pairs: Path, tmp_path: Path) -> None:
    assert call("train", *TINY, "--data", multi_pairs, "--out", tmp_path / "run", "--steps", "2").returncode == 0
    report(tmp_path / "run", device="cpu")
    page = page_of(tmp_path / "run")
    assert keys(page) == [key for key in SECTIONS if key != "confusion"] + ROUTING
    assert "labels" in page.charts()
    assert "any number of 3 labels: a, b, c" in page.text


def test_a_method_without_a_router_has_no_routing_section(pairs: Path, tmp_path: Path) -> None:
    flags = ("--method", "main-only", "--data", pairs, "--out", tmp_path / "run", "--steps", "2")
    assert call("train", *TINY, *flags).returncode == 0
    report(tmp_path / "run", device="cpu")
    page = page_of(tmp_path / "run")
    assert keys(page) == SECTIONS
    assert "The model ignores the text" in page.text


# -- numbers


def test_the_confusion_matrix_matches_the_predictions(run: Path) -> None:
    # classes of the test split are a, b, c, a, b, c, a
    logits_SN = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 1, 1, 0, 0]), 3).float()
    section = run_errors.confusion(facts_of(run, logits_SN=logits_SN))
    assert section is not None
    assert tips(section.charts[0]) == [
        "a predicted as a: 2 (66.7 %)", "a predicted as b: 1 (33.3 %)", "a predicted as c: 0 (0.0 %)",
        "b predicted as a: 0 (0.0 %)", "b predicted as b: 2 (100.0 %)", "b predicted as c: 0 (0.0 %)",
        "c predicted as a: 1 (50.0 %)", "c predicted as b: 0 (0.0 %)", "c predicted as c: 1 (50.0 %)",
    ]  # fmt: skip
    cells = rows_of(section.charts[0], "shade")
    assert [cell["shown"] for cell in cells] == list("210020101"), "counts are in the cells"
    assert [cell["shade"] for cell in cells] == pytest.approx([2 / 3, -1 / 3, 0, 0, 1, 0, -1 / 2, 0, 1 / 2])
    assert section.charts[0].rows == [["a", "2", "1", "0"], ["b", "0", "2", "0"], ["c", "1", "0", "1"]]


def test_scores_of_each_class_equal_scikit_learns(run: Path) -> None:
    from sklearn.metrics import precision_recall_fscore_support

    predicted = [0, 1, 2, 1, 1, 0, 0]
    facts = facts_of(run, logits_SN=torch.nn.functional.one_hot(torch.tensor(predicted), 3).float())
    page = Page(str(run_errors.scores(facts).body))
    found = [float(cell["data-value"]) for cell in page.all("td") if "data-value" in cell]
    expected = precision_recall_fscore_support(facts.targets.numpy(), predicted, zero_division=0)
    assert found == pytest.approx([float(value) for row in zip(*expected, strict=True) for value in row])


def test_with_many_classes_the_most_confused_pairs_are_listed(tmp_path: Path, run: Path) -> None:
    data = make_pairs(tmp_path / "data", counts={"train": 80, "test": 40, "val": 3})
    for split, count in {"train": 80, "test": 40, "val": 3}.items():
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        write_rows(data / f"{split}.jsonl", [{**row, "label": f"class {i % 40}"} for i, row in enumerate(rows[:count])])
    loaded = load_data(Data(path=str(data), allow_odd_labels=True))
    targets = loaded.targets("test")
    logits_SN = torch.nn.functional.one_hot(targets, 40).float()
    wrong = [i for i, label in enumerate(loaded.splits["test"].labels) if label[0] in ("class 3", "class 4")]
    logits_SN[wrong] = torch.nn.functional.one_hot(torch.tensor([loaded.labels.index("class 9")] * 2), 40).float()
    section = run_errors.confusion(facts_of(run, data=loaded, logits_SN=logits_SN))
    assert section is not None
    page = Page(str(section.body))
    assert section.charts == () and "1 of 1" in page.text
    assert len(page.all("tr")) == 1 + 2
    assert "class 3" in page.text and "class 9" in page.text and "class 7" not in page.text


def test_mistakes_are_wrong_predictions_with_the_highest_loss_first(run: Path) -> None:
    logits_SN = torch.zeros(7, 3)
    logits_SN[0, 0], logits_SN[1, 0], logits_SN[2, 1], logits_SN[4, 1] = 5, 2, 9, 1  # right, wrong, wrong, right
    logits_SN[5, 2], logits_SN[6, 0], logits_SN[3, 0] = 1, 1, 1
    section = run_errors.mistakes(facts_of(run, logits_SN=logits_SN))
    assert section is not None
    assert re.findall(r">(test-\d)</code>", section.body) == ["test-2", "test-1"] * 2, "on a card, and in the table"
    assert "2 of 7 predictions on test are wrong" in section.body
    right = torch.nn.functional.one_hot(facts_of(run).targets, 3).float()
    assert run_errors.mistakes(facts_of(run, logits_SN=right)) is None


def test_experts_show_the_samples_with_the_highest_weight_without_repeating_texts(run: Path) -> None:
    routing_SLK = torch.full((7, 2, 2), 0.5)
    routing_SLK[:, 1, 0] = torch.tensor([0.1, 0.2, 0.9, 0.3, 0.1, 0.8, 0.1])
    routing_SLK[:, 1, 1] = 1 - routing_SLK[:, 1, 0]
    sections = {section.key: section for section in run_routing.sections(facts_of(run, routing_SLK=routing_SLK))}
    assert "Layer 2, the most used experts first" in sections["experts"].body
    weights = re.findall(r"weight (\d\.\d\d)", sections["experts"].body)
    first, second = "0.90 0.90 0.20 0.90 0.80", "0.90 0.30 0.20 0.80 0.10"  # three texts, then the highest of the rest
    assert " ".join(weights) == f"{first} {second}"
    assert "layer 1, expert 1: 50.0 %" in tips(sections["usage"].charts[0])
    assert "a, expert 1: 16.7 %" in tips(sections["classes"].charts[-1])  # samples 0, 3 and 6
    assert [chart.name for chart in sections["usage"].charts] == ["usage"]


def test_classes_by_expert_are_shown_for_one_layer_at_a_time(run: Path) -> None:
    routing_SLK = torch.full((7, 6, 2), 0.5)
    routing_SLK[:, 4, 0] = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    routing_SLK[:, 4, 1] = 1 - routing_SLK[:, 4, 0]
    section = next(part for part in run_routing.sections(facts_of(run, routing_SLK=routing_SLK)) if part.key == "classes")
    names = ["classes-layer-1", "classes-layer-3", "classes", "classes-layer-6"]
    assert [chart.name for chart in section.charts] == names, "first, middle, most informative, last"
    page = Page(str(section.body))
    chosen = [attributes["id"] for attributes in page.all("input") if "checked" in attributes]
    assert (len(page.all("input")), chosen) == (4, ["layer-3"])
    assert [attributes["for"] for attributes in page.all("label")] == [f"layer-{number}" for number in range(1, 5)]


def test_with_one_expert_there_is_no_routing_section(run: Path) -> None:
    assert run_routing.sections(facts_of(run, routing_SLK=torch.ones(7, 2, 1))) == []


def test_routing_is_collapsed_if_the_model_does_not_use_its_condition(run: Path) -> None:
    routing_SLK, condition = torch.full((7, 2, 2), 0.5), {"name": "shuffled", "modality": "text"}
    for matters in (False, True):
        main = {"name": "shuffled", "modality": "image", "matters": True}
        audit = {"read": True, "modality": "text", "main": "image", "conditions": [condition | {"matters": matters}, main]}
        parts = run_routing.sections(facts_of(run, routing_SLK=routing_SLK, audit=audit))
        page = Page(sections_page("x", "x", [], parts))
        outer = [attributes for attributes in page.all("section") if attributes.get("class") == "folded"]
        assert len(outer) == (not matters)
        assert keys(page) == ROUTING
        assert ("The audit found no sign that the model uses the text" in page.text) == (not matters)
    open_ = run_routing.sections(facts_of(run, routing_SLK=routing_SLK))
    assert {section.folded for section in open_} == {""}, "without an audit it is unknown"


def test_routing_by_step_is_shown_for_a_few_layers(run: Path) -> None:
    usage = [[0.5, 0.5]] * 12
    log = [{"step": n, "routing": {"entropy": 1.0, "unused_share": 0.0, "usage": usage}} for n in (1, 2, 3)]
    facts = facts_of(run, routing_SLK=torch.full((7, 12, 2), 0.5), log=log)
    section = next(part for part in run_routing.sections(facts) if part.key == "routing-training")
    assert [chart.name for chart in section.charts] == ["entropy", *(f"usage-layer-{n}" for n in (1, 6, 12))]
    assert "step 2, expert 1: 50.0 %" in tips(section.charts[1])


# -- unfinished runs, and other folders


def test_an_unfinished_run_has_a_page_that_says_so(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "metrics.json").unlink()
    (run / "predictions.jsonl").unlink()
    done = report(run, device="cpu", audit=False)
    page = page_of(run)
    assert "This run is not finished: the page shows step 2" in page.text
    assert "The audit was skipped" in page.text and done.audit is None
    assert keys(page) == [key for key in SECTIONS if key not in ("audit", "resources")] + ROUTING


def test_without_a_test_split_validation_is_shown_and_labelled(pairs: Path, trained: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(pairs, data)
    (data / "test.jsonl").unlink()
    done = report(trained, out=tmp_path / "page.html", data=data, device="cpu", audit=False)
    assert done.split == "val"
    text = Page((tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert "There is no test split" in text and "have changed since the run was trained" not in text
    rows = (data / "val.jsonl").read_text().splitlines()
    (data / "val.jsonl").write_text("\n".join(rows[:-1]))
    done = report(trained, out=tmp_path / "page.html", data=data, device="cpu", audit=False)
    assert any("have changed since the run was trained" in note for note in done.notes)


def test_paths_that_are_not_runs_get_specific_errors(exported: Path, trained: Path, pairs: Path, tmp_path: Path) -> None:
    adapter, empty, moved = tmp_path / "adapter", tmp_path / "empty", tmp_path / "moved"
    assert call("export", trained, "--format", "adapter", "-o", adapter).returncode == 0
    shutil.copytree(trained, empty)
    shutil.rmtree(empty / "checkpoints")
    shutil.copytree(trained, moved)
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace(str(pairs), str(tmp_path / "gone")))
    (tmp_path / "file").write_text("")
    (tmp_path / "notes.html").write_text("mine")
    for arguments, code in (
        ((exported,), "MF-CKPT-20"),
        ((adapter,), "MF-CKPT-20"),
        ((empty,), "MF-CKPT-21"),
        ((tmp_path / "nothing",), "MF-CKPT-04"),
        ((moved,), "MF-DATA-01"),
        ((trained, "-o", pairs / "page.html"), "MF-DATA-84"),
        ((trained, "-o", tmp_path / "notes.html"), "MF-DATA-86"),
        ((trained, "-o", tmp_path / "page.html", "--figures", tmp_path / "file"), "MF-CFG-90"),
    ):
        done = call("report", *arguments, "--json")
        assert json.loads(done.stdout)["error"]["code"] == code, arguments
    assert (tmp_path / "notes.html").read_text() == "mine"
    done = call("report", moved, "--data", pairs, "--device", "cpu", "--no-audit")
    assert done.returncode == 0, done.stderr
    assert (moved / "report.html").exists()


# -- the command, figures and parts


def test_the_command_prints_what_it_wrote(trained: Path, tmp_path: Path) -> None:
    flags = ("-o", tmp_path / "page.html", "--figures", tmp_path / "figures", "--device", "cpu")
    found = json.loads(call("report", trained, *flags, "--json").stdout)
    assert (found["ok"], found["split"], found["step"]) == (True, "test", 2)
    assert found["bytes"] == (tmp_path / "page.html").stat().st_size
    assert [row["name"] for row in found["audit"]["conditions"]] == [
        "as is", "shuffled", "blank", "shuffled", "blank", "static", "dynamic", "mapped",
    ]  # fmt: skip
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    stems = {"audit", "parameters", "confusion", "calibration", "loss", "validation", "usage", "entropy", "classes"}
    assert {f"{stem}.{kind}" for stem in stems for kind in ("svg", "png")} <= names
    assert {str(tmp_path / "figures" / name) for name in names} == set(found["figures"])
    for name in names:
        path = tmp_path / "figures" / name
        if path.suffix == ".png":
            assert len(set(Image.open(path).convert("L").resize((60, 60)).tobytes())) > 3, f"{name} is not empty"
        else:
            assert Page(path.read_text(encoding="utf-8")).all("svg")[0]["xmlns"] == "http://www.w3.org/2000/svg"


def test_sections_are_assembled_and_escaped() -> None:
    halves = [Section(f"s{n}", f"title <{n}>", fragment("rows", [("<i>", "&")]), half=n < 3) for n in range(4)]
    page = Page(sections_page("<b>x</b>", "summary", [("name", "1 %")], halves, notes=["<note>"]))
    assert page.scripts == [], "without a chart or a table to sort"
    assert keys(page) == ["s0", "s1", "s2", "s3"]
    assert [attributes.get("class") for attributes in page.all("div")].count("pair") == 1
    assert "title <0>" in page.text and "<note>" in page.text and "<b>x</b>" in page.text

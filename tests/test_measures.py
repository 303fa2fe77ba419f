"""What is measured on a network: made once, and made again where a constant changed."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from cplib import datasets, train
from cplib.metrics import auroc_between
from cplib.run import Run
from cplib.score import Scorer, upsample_scores
from cplib.study import measures, store
from cplib.study.jobs import execute, execute_all
from cplib.study.measures import (
    MEASURES,
    brightness,
    constants,
    drawn,
    gradcam_copies,
    maps,
    measured,
    synthetic,
)
from cplib.study.profiles import PROFILES
from cplib.study.store import Places, checkpoint_file, load_network, run_folder
from cplib.study.synthetic import SYNTHETIC, paint
from cplib.study.workspace import Workspace

SIZES = {"dataset": "demo", "size": 64, "precision": "fp32"}
RUN = Run(method="cutpaste_3way", category="sieve", updates=2, sources=2, **SIZES)
UNTRAINED = Run(method="untrained", category="sieve", dataset="demo", size=64, updates=0)
NAMES = ["gradcam", "gradcam_copies", "synthetic-5", "density"]


@pytest.fixture
def places(demo_root, tmp_path, monkeypatch):
    monkeypatch.setenv("CPLIB_JOBS", "1")
    return Places(tmp_path, demo_root)


def test_a_training_and_all_its_measures_are_one_job_that_loads_nothing(places, monkeypatch):
    monkeypatch.setattr(store, "load_network", lambda *_: pytest.fail("loaded again"))
    twin = replace(RUN, window=32, stride=16)
    outcomes = execute_all({RUN: NAMES, twin: []}, places)
    assert [outcome.state for outcome in outcomes] == ["done", "done"]
    for name in NAMES:
        assert measured(RUN, name, places.results)


def test_what_is_missing_or_of_other_constants_is_measured_from_the_checkpoint(
    places, monkeypatch, capsys
):
    workspace = Workspace(replace(PROFILES["smoke"], categories=("sieve",)), ("sieve",), places)
    wanted = {RUN: ["density", "gradcam"]}
    assert workspace.missing(wanted) == wanted
    assert [o.state for o in workspace.execute({RUN: ["density"]})] == ["done"]
    assert workspace.missing(wanted) == {RUN: ["gradcam"]}
    monkeypatch.setattr(train, "step", lambda *_: pytest.fail("trained again"))
    workspace.execute(workspace.missing(wanted))
    assert workspace.missing(wanted) == {}
    file = run_folder(RUN, places.results) / "density.json"
    first = file.read_text()
    assert json.loads(first)["constants"] == constants("density")
    file.write_text(json.dumps(json.loads(first) | {"constants": {"regularisers": [1]}}))
    assert workspace.missing(wanted) == {RUN: ["density"]} and workspace.remarks(wanted) == []
    workspace.execute(workspace.missing(wanted))
    assert file.read_text() == first
    older = {k: v for k, v in json.loads(first).items() if k != "constants"}
    file.write_text(json.dumps(older))  # of a time when records named none
    assert workspace.missing(wanted) == {}
    file.write_text(json.dumps(older | {"regularisers": [1]}))  # but one of them in another field
    assert workspace.missing(wanted) == {RUN: ["density"]}
    file.write_text(json.dumps(older | {"constants": {}}))
    checkpoint_file(RUN, places.results).unlink()
    wanted[RUN].append("features")  # missing
    assert workspace.missing(wanted) == {}
    (line,) = workspace.remarks(wanted)
    assert line.startswith("Records of density, features are missing or were made with other con")
    assert measured(RUN, "density", places.results) is None  # not mixed with today's


def test_a_finished_run_is_measured_and_its_twin_scored_in_one_job(places, monkeypatch):
    twin = replace(RUN, window=32, stride=16)
    alone = places._replace(results=places.results / "alone")
    execute_all([RUN, twin], alone)
    for first in (RUN, UNTRAINED):
        second = replace(first, window=32, stride=16)
        execute_all([first], places)
        monkeypatch.setattr(train, "step", lambda *_: pytest.fail("trained again"))
        outcomes = execute_all({first: ["density"], second: []}, places)
        assert [o.state for o in outcomes] == ["done", "done"]
    ours, theirs = (run_folder(twin, p.results) / "scores.csv" for p in (places, alone))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_measure_that_fails_is_named_and_the_others_are_made(places):
    (outcome,) = execute_all({UNTRAINED: ["level7", "density"]}, places)
    assert outcome.state == "failed" and "only an EfficientNet" in outcome.message
    assert measured(UNTRAINED, "density", places.results)


def test_a_checkpoint_of_another_training_is_named(places):
    execute_all([RUN], places)
    history = run_folder(RUN, places.results) / "history.csv"
    pd.read_csv(history).assign(loss=9.0).to_csv(history, index=False)
    (outcome,) = execute_all({RUN: ["density"]}, places)
    assert outcome.state == "failed" and "of another training" in outcome.message


@pytest.mark.parametrize("content", ["", "[1]"])
def test_a_record_that_cannot_be_read_is_named_and_made_again(places, content):
    execute_all({UNTRAINED: ["density"]}, places)
    file = run_folder(UNTRAINED, places.results) / "density.json"
    first = file.read_text()
    file.write_text(content)
    workspace = Workspace(PROFILES["smoke"], ("sieve",), places)
    with pytest.warns(UserWarning, match=str(file)):
        todo = workspace.missing({UNTRAINED: ["density"]})
    assert todo == {UNTRAINED: ["density"]}
    workspace.execute(todo)
    assert file.read_text() == first


@pytest.fixture(scope="module")
def loaded(demo_root, tmp_path_factory):
    """A short trained network and its images."""
    places = Places(tmp_path_factory.mktemp("results"), demo_root)
    execute(RUN, places)
    images = (datasets.load(demo_root, "sieve", split, 64) for split in ("train", "test"))
    return load_network(RUN, places), *images


def test_table_6_is_the_auroc_of_normal_images_against_painted_ones(loaded):
    net, training, test = loaded
    found = synthetic(RUN, *loaded, least=5)
    assert list(found["image_auroc"]) == list(SYNTHETIC)
    assert (found["normal"], found["painted"]) == (4, 8)
    normal = test.pixels[test.labels == 0]
    scorer = Scorer.fit(RUN, net, training.pixels)
    for kind in ("digit_color", "ellipse_natural"):
        painted = scorer.score(paint(normal, *kind.split("_"), least=5)[0])
        expected = auroc_between(scorer.score(normal), painted)
        assert found["image_auroc"][kind] == pytest.approx(expected, abs=0.01)
    only = replace(test, pixels=test.pixels[test.labels == 1], labels=torch.ones(6))
    assert synthetic(RUN, net, training, only)["image_auroc"] == {}


def test_gradcam_is_judged_on_copies_whose_damage_is_known(loaded, monkeypatch):
    net, training, test = loaded
    ideal = {}

    def perfect(net, images):  # a map that marks what differs from the normal image
        normal = test.pixels[test.labels == 0]
        if len(images) == len(normal):
            return (images != normal).any(1).float()
        return ideal["masks"].float()

    monkeypatch.setattr(measures, "gradcam_maps", perfect)
    ideal["masks"] = test.masks[test.labels == 1]
    found = gradcam_copies(RUN, *loaded)
    assert found == dict.fromkeys(
        ["CutPaste copies", "CutPaste-scar copies", "real anomalies"], 100
    )
    assert gradcam_copies(RUN, net, training, replace(test, masks=None)) == {}


def test_brightness_finds_a_light_that_changed_and_says_below_50_where_normal_images_changed():
    def images(labels, light):
        pixels = (torch.ones(len(light), 3, 8, 8) * torch.tensor(light)[:, None, None, None]).byte()
        return datasets.Images(
            pixels, torch.tensor(labels), ("x",) * len(light), None, ("x",) * len(light)
        )

    training = images([0, 0, 0], [100.0, 110.0, 120.0])
    found = brightness(RUN, None, training, images([0, 0, 1, 1], [110.0, 112.0, 150.0, 60.0]))
    assert found["training"] == pytest.approx([110, 10]) and found["image_auroc"] == 100
    assert found["anomalous"] == pytest.approx([105, 63.64], abs=0.01)
    assert brightness(RUN, None, training, images([0, 1], [90.0, 111.0]))["image_auroc"] == 0


def test_recorded_maps_are_the_librarys_and_hold_no_pixel(loaded):
    net, training, test = loaded
    run = replace(RUN, window=32, stride=8)
    images = maps(run, *loaded)["images"]
    assert [image["kind"] for image in images] == ["good", *sorted({*test.kinds} - {"good"})]
    assert all(set(image) <= {"file", "kind", "scores", "mask"} for image in images)
    scorer = Scorer.fit(run, net, training.pixels)
    for image in images:
        i = test.names.index(image["file"])
        others = [
            n for n, kind in zip(test.names, test.kinds, strict=True) if kind == image["kind"]
        ]
        assert image["file"] == min(others)
        heat, mask = drawn(run, image)
        scores = scorer.position_scores(test.pixels[i][None])
        library = upsample_scores(run, scores, test.pixels.shape[2:])[0]
        torch.testing.assert_close(heat, library, rtol=0.005, atol=0)
        if image["kind"] == "good":
            assert mask is None
        else:  # 64 cells of 64 px
            assert torch.equal(mask > 0.5, test.masks[i])
    assert len(maps(run, *loaded, most=2)["images"]) == 2
    kept = scorer.position_scores(test.pixels).float()  # as ``store.write`` keeps them
    assert maps(run, None, None, test, kept)["images"] == images


def test_recorded_maps_are_small_and_keep_the_thinnest_mask(loaded):
    net, training, test = loaded
    run = replace(RUN, size=256, window=32, stride=16)
    training, test = (
        replace(part, pixels=part.pixels.repeat_interleave(4, 2).repeat_interleave(4, 3))
        for part in (training, test)
    )
    line = torch.zeros(len(test), 256, 256, dtype=torch.bool)
    line[:, :, 101] = test.labels[:, None] == 1
    images = maps(run, net, training, replace(test, masks=line))["images"]
    assert all(len(json.dumps(image)) < 4000 for image in images)
    _, mask = drawn(run, images[1])
    assert mask[:, 101].min() > 0.5 and mask[:, :96].max() == 0
    images = maps(run, net, training, replace(test, masks=None))["images"]
    assert all(drawn(run, image)[1] is None for image in images)


def test_every_measure_tells_its_constants():
    assert constants("synthetic-7") == {"least": 7, "side": [1 / 16, 1 / 8]}
    assert constants("level7") == {"level": 7} and constants("gradcam") == {}
    assert {"limit", "folds", "perplexity"} <= {*constants("features")}
    assert {*MEASURES} == {
        "gradcam",
        "gradcam_copies",
        "maps",
        "brightness",
        "level7",
        "synthetic",
        "density",
        "features",
    }

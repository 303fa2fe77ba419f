"""The detector: thresholds that mean what they say, files that give the same scores or one line."""

import hashlib
import json
import shutil
from dataclasses import replace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import beta
from sklearn.metrics import f1_score

from cplib import datasets, train
from cplib.apps import detector as module
from cplib.apps.cli import main
from cplib.apps.detector import (
    RECORD,
    TENSORS,
    Detector,
    choose_threshold,
    fit_detector,
    name_of,
    own_images,
)
from cplib.apps.notebooks import NOTEBOOKS, execute
from cplib.density import Gaussian
from cplib.metrics import auroc_between
from cplib.run import Run
from cplib.score import Scorer, fit_density, score_features
from cplib.study.measures import scores
from cplib.study.store import Places

# Not bf16: with a last map of one pixel, oneDNN leaves the gradient of unused weights undefined.
IMAGE = Run(method="cutpaste_3way", category="parts", dataset="own", size=32, updates=1, sources=2)
IMAGE = replace(IMAGE, precision="fp32")
WINDOWS = replace(IMAGE, crop=16, window=16, stride=8, gaussians="shared")
LEVELS = replace(module.LEVELS, size=32)
KINDS = {"image": IMAGE, "windows": WINDOWS, "places": replace(WINDOWS, gaussians="position")}
KINDS |= {name: replace(LEVELS, gaussians=name) for name in ("position", "shared")}


@pytest.fixture(scope="module")
def images(demo_root):
    """The demo's sieves: normal ones to fit to, and a test set of both kinds."""
    return [datasets.load(demo_root, "sieve", split, 32) for split in ("train", "test")]


@pytest.fixture(scope="module")
def pixels(images):
    """Normal images to fit to, and anomalous ones."""
    return images[0].pixels, images[1].pixels[images[1].labels == 1]


@pytest.fixture(scope="module")
def fitted(pixels, tmp_path_factory):
    """A detector of each kind, and the folder where it was saved."""
    places = Places(tmp_path_factory.mktemp("results"))
    folder = places.results / "detectors"
    fit = {
        k: fit_detector(run, *pixels, places=places, folder=folder / k) for k, run in KINDS.items()
    }
    return {k: (detector, folder / k) for k, detector in fit.items()}


@pytest.fixture(scope="module")
def saved(fitted):
    """The folder of a saved detector of whole images."""
    return fitted["image"][1]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_run_and_the_same_when_loaded(fitted, images, pixels, kind):
    detector, folder = fitted[kind]
    expected = scores(detector.run, detector.scorer.net, *images)[0].amax(1).double()
    torch.testing.assert_close(detector.score(images[1].pixels), expected, rtol=1e-4, atol=0)
    anomalous = expected[images[1].labels == 1]
    torch.testing.assert_close(detector.anomalous, anomalous, rtol=1e-4, atol=0)
    again = Detector.load(folder)
    for x in (pixels[1], pixels[1][:1]):
        assert torch.equal(again.score(x), detector.score(x))
    assert torch.equal(again.maps(pixels[1]), detector.maps(pixels[1]))
    for name in ("run", "threshold", "chosen", "images"):
        assert getattr(again, name) == getattr(detector, name)
    assert torch.equal(again.normal, detector.normal)
    assert torch.equal(again.anomalous, detector.anomalous)
    again.save(folder)  # in its own place
    assert sorted(path.name for path in folder.iterdir()) == [RECORD, TENSORS]


def test_files_of_any_shape_are_resized_as_the_data_sets_are(saved, tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (90, 200, 3), np.uint8)
    folder = tmp_path / "one" / "train" / "good"
    folder.mkdir(parents=True)
    Image.fromarray(values).save(folder / "wide.png")
    detector = Detector.load(saved)
    expected = detector.score(datasets.load(tmp_path, "one", "train", 32).pixels)
    assert torch.equal(detector.score([folder / "wide.png"]), expected)
    with pytest.raises(ValueError, match=r"uint8 \(N, 3, 32, 32\)"):
        detector.score(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.parametrize("size", [(200, 90), (90, 200), (64, 64), (700, 1)])
def test_padding_keeps_the_shape_of_an_image(size, tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    image = Image.fromarray(values)
    image.save(tmp_path / "a.png")
    (padded,) = datasets.read_images([tmp_path / "a.png"], 32, pad=True)[0].numpy()
    w, h = (max(1, round(32 * side / max(size))) for side in size)
    small = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    top, left = (32 - h) // 2, (32 - w) // 2
    rows, columns = (np.arange(32) - top).clip(0, h - 1), (np.arange(32) - left).clip(0, w - 1)
    np.testing.assert_array_equal(padded, small[:, rows][:, :, columns])


def test_images_that_differ_in_shape_are_found_by_their_headers(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    Image.new("L", (10, 21)).save(tmp_path / "b.jpg", exif=exif)
    Image.new("RGB", (10, 21)).save(tmp_path / "b.tif", exif=exif)
    assert not module.differ_in_shape(sorted(tmp_path.iterdir()))
    Image.new("L", (10, 21)).save(tmp_path / "c.jpg")
    assert module.differ_in_shape(sorted(tmp_path.iterdir()))
    (tmp_path / "d.png").write_bytes(b"no image")
    with pytest.raises(datasets.DataError, match="d.png"):
        module.differ_in_shape(sorted(tmp_path.iterdir()))


def test_what_cannot_be_is_refused_before_anything_is_trained(pixels, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fit", None)  # called, it would be a TypeError
    places = Places(tmp_path)
    with pytest.raises(ValueError, match="two normal images at least, not 1"):
        fit_detector(IMAGE, pixels[0][:1], places=places)
    with pytest.raises(ValueError, match="between 0 and 1"):
        fit_detector(IMAGE, pixels[0], places=places, quantile=95)
    broken = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for path in broken:
        path.write_bytes(b"no image")
    with pytest.raises(datasets.DataError) as caught:
        fit_detector(IMAGE, broken, places=places)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(path) for path in broken]


def test_training_is_done_once_for_the_same_images(pixels, tmp_path, monkeypatch):
    options = {"places": Places(tmp_path)}
    fit_detector(IMAGE, pixels[0], **options)
    monkeypatch.setattr(train, "step", None)  # called, it would be a TypeError
    again = fit_detector(replace(IMAGE, l2_normalise=True), *pixels, **options, quantile=0.9)
    assert len(again.anomalous) == 6
    with pytest.raises(TypeError):
        fit_detector(IMAGE, pixels[0][:5], **options)


@pytest.mark.parametrize(("kind", "folds"), [("windows", 7), ("places", 3), ("places", 7)])
def test_an_image_is_scored_by_a_gaussian_that_has_not_seen_it(kind, folds, monkeypatch):
    monkeypatch.setattr(module, "FOLDS", folds)
    run, z = KINDS[kind], torch.randn(7, 9, 5, generator=torch.Generator().manual_seed(1))
    scores = module.cross_validated(run, z)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(run.seed))
    for fold in order.tensor_split(folds):
        rest = [i for i in range(7) if i not in fold.tolist()]
        for i in fold.tolist():
            parts = [(z[rest].flatten(0, 1), z[i])]
            if kind == "places":
                parts = [(z[rest, p], z[[i], p]) for p in range(9)]
            each = [Gaussian.fit(a, reg_covar=run.reg_covar).score(b).max() for a, b in parts]
            assert scores[i].item() == pytest.approx(max(each).item(), rel=1e-4)


def test_the_quantile_gives_about_the_false_alarms_asked_for():
    """Over simulated features: the mean of 20 detectors' rates on images never seen."""
    generator = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(20):
        z, new = (torch.randn(n, 1, 6, generator=generator) for n in (150, 2000))
        normal = module.cross_validated(IMAGE, z)
        threshold, chosen = choose_threshold(normal, normal[:0], 0.9)
        rates.append((score_features(fit_density(IMAGE, z), new) >= threshold).double().mean())
        assert "90 % quantile" in chosen
    assert np.mean(rates) == pytest.approx(0.1, abs=0.02)


def test_the_expected_false_alarms_have_the_binomial_interval():
    normal = torch.arange(100.0)
    low, high = (100 * q for q in beta.ppf([0.025, 0.975], [5, 6], [96, 95]))  # 5 of 100
    text = module.false_alarms(normal, 95.0)
    assert text.endswith(f"5.0 % of normal images (95 % interval {low:.1f} to {high:.1f})")


def test_candidates_are_compared_on_anomalies_made_on_held_out_images(
    pixels, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "SIDE", (0.2, 0.3))  # of images of 32 pixels
    runs = {"places": replace(LEVELS, gaussians="position"), "trained": WINDOWS}
    table = module.compare(runs, pixels[0], places=Places(tmp_path))
    assert list(table.index) == ["places", "trained"]
    _, net = module._network(runs["places"], pixels[0], Places(tmp_path))
    held = torch.arange(len(pixels[0])) % 2 == 0  # few images: every second one
    scorer = Scorer.fit(runs["places"], net, pixels[0][~held])
    made = module.made_anomalies(runs["places"], pixels[0][held], side=(0.2, 0.3), opacity=0.5)
    scores = {kind: scorer.score(part) for kind, part in made.items()}
    kinds = [*made][1:]
    assert kinds == ["pasted piece", "pasted scar", "square (one colour)", "heart (natural image)"]
    for kind in kinds:
        assert table.loc["places", kind] == auroc_between(scores["normal"], scores[kind])
        changed = (made[kind] != made["normal"]).any(1).flatten(1).float().mean(1)
        assert (changed > 0).all() and (changed < 0.5).all()
    assert table["mean"].tolist() == pytest.approx(table[kinds].mean(axis=1).tolist())
    with pytest.raises(ValueError, match="four normal images"):
        module.compare(runs, pixels[0][:3], places=Places(tmp_path))


@pytest.mark.parametrize(
    ("bad", "first"),
    [
        (None, "shared"),  # the highest mean, not that of pasted pieces that training has seen
        ([70, 80, 90], "trained"),  # bad images decide
        ([90, 80, 90], "position"),  # two are best
        ([80, 90, 80], "shared"),
        ([90, 90, 90], "shared"),  # all are
    ],
)
def test_the_recommended_candidate_comes_first(bad, first):
    runs = {"trained": WINDOWS} | {k: replace(LEVELS, gaussians=k) for k in ("position", "shared")}
    table = pd.DataFrame({"mean": [80, 85, 90]}, index=["position", "shared", "trained"])
    assert module.ranked(table if bad is None else table.assign(bad=bad), runs).index[0] == first


SCORES = st.lists(st.integers(0, 12), min_size=1, max_size=15)


@settings(max_examples=40, deadline=None)
@given(SCORES, SCORES)
def test_the_threshold_with_anomalous_images_has_the_highest_f1_of_all(normal, anomalous):
    labels = [0] * len(normal) + [1] * len(anomalous)
    scores = np.array([*normal, *anomalous], dtype=float)
    best = max(f1_score(labels, scores >= t, zero_division=0) for t in np.unique(scores))
    tensors = (torch.tensor(x, dtype=torch.float64) for x in (normal, anomalous))
    threshold, chosen = choose_threshold(*tensors, 0.95)
    assert f1_score(labels, scores >= threshold) == pytest.approx(best)
    assert threshold not in scores or threshold == scores.min()  # rounding flips none
    said = float(chosen.removeprefix("F1-max (").split()[0])
    assert said == pytest.approx(100 * best, abs=0.0501)  # one digit


# The files


def spoilt(source, folder, record=lambda r: r, tensors=lambda t: t):
    """A copy whose record and tensors are changed, with the hash of the changed tensors."""
    folder.mkdir()
    save_file(tensors(load_file(source / TENSORS)), folder / TENSORS)
    old = json.loads((source / RECORD).read_text())
    old["sha256"] = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    (folder / RECORD).write_text(json.dumps(record(old)))
    return folder


def assert_refused(folder, *parts):
    """``load`` raises a ValueError of one line that names the folder and holds every part."""
    with pytest.raises(ValueError) as caught:
        Detector.load(folder)
    line = str(caught.value)
    assert line.startswith(f"{folder}: not a detector of this version")
    assert all(part in line for part in parts), line
    assert "\n" not in line
    assert len(line) < len(str(folder)) + 300


def changed(**fields):
    return lambda record: record | fields


def in_run(**fields):
    return lambda record: record | {"run": record["run"] | fields}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed(version=4), "version 4, not 5"),
        (changed(threshold="high"), "threshold"),
        (changed(threshold=[1.0, 2.0]), "threshold"),
        (changed(threshold=float("nan")), "not finite"),
        (changed(chosen=3), "chosen"),
        (in_run(colour=1), "colour"),
        (in_run(size=30_000), "at most 4096"),
        (in_run(head=[10**12]), "net.head"),
        (in_run(head=[1] * 100_000), "at most"),
        (in_run(window=100), "smaller than a 100-px window"),
        (in_run(window=16, gaussians="position"), "'density."),
        (in_run(backbone="efficientnet_lite0"), "missing or unknown"),
        (lambda record: [], ""),
    ],
)
def test_a_record_that_lies_is_one_line_and_takes_no_memory(saved, tmp_path, change, reason):
    assert_refused(spoilt(saved, tmp_path / "d", record=change), reason)


def with_tensor(name, change):
    return lambda tensors: tensors | {name: change(tensors[name]).contiguous()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_tensor("density.mean", lambda v: v[:-1]), "'density.mean'"),
        (with_tensor("density.factor", lambda v: v.float()), "'density.factor'"),
        (with_tensor("density.factor", lambda v: -v), "covariance"),
        (with_tensor("density.factor", lambda v: v.mT), "covariance"),
        (with_tensor("normal", lambda v: v[:, None]), "'normal'"),
        (with_tensor("net.head.0.weight", lambda v: v.half()), "net.head.0.weight"),
        (with_tensor("net.head.0.weight", lambda v: v / 0), "not finite"),
        (lambda tensors: tensors | {"extra": torch.zeros(1)}, "'extra'"),
        (lambda tensors: {k: v for k, v in tensors.items() if k != "density.mean"}, "density.mean"),
    ],
)
def test_tensors_that_cannot_be_are_one_line(saved, tmp_path, change, reason):
    assert_refused(spoilt(saved, tmp_path / "d", tensors=change), reason)


def test_gaussians_of_other_places_or_features_are_one_line(fitted, tmp_path):
    folder = fitted["position"][1]
    for change in (lambda v: v[1:], lambda v: v[..., 1:]):
        spoiled = spoilt(folder, tmp_path / "d", tensors=with_tensor("density.mean", change))
        assert_refused(spoiled, "'density.mean'")
        shutil.rmtree(spoiled)


def test_features_of_other_places_are_one_line(fitted, tmp_path):
    folder, change = fitted["places"][1], with_tensor("density.z", lambda v: v[:, 1:])
    assert Detector.load(spoilt(folder, tmp_path / "whole")).run == fitted["places"][0].run
    assert_refused(spoilt(folder, tmp_path / "d", tensors=change), "'density.z'")


# A person's own folders


def test_two_folders_of_one_name_have_detectors_of_their_own_names(tmp_path):
    screws, nuts = (name_of(tmp_path / kind / "OK_images") for kind in ("screws", "nuts"))
    assert screws != nuts
    assert screws[:-4] == nuts[:-4] == "OK_images-"
    assert name_of(tmp_path / "sieve" / "train" / "good").startswith("sieve-")


def test_bad_images_inside_the_folder_of_good_ones_are_not_normal(demo_root, tmp_path):
    good, bad = tmp_path / "parts", tmp_path / "parts" / "defects"
    shutil.copytree(demo_root / "sieve" / "train" / "good", good)
    shutil.copytree(demo_root / "sieve" / "test", bad)
    normal, anomalous, lines = own_images(good, bad)
    assert {path.parent for path in normal} == {good}
    assert len(anomalous) == len(datasets.image_files(bad))
    assert lines == [f"{bad}: its {len(anomalous)} images are not taken as normal"]
    assert own_images(good)[0] == datasets.image_files(good)
    with pytest.raises(datasets.DataError, match=f"^{good}: no image that can be read"):
        own_images(good, good)


def test_a_detector_of_other_images_is_not_replaced_in_silence(pixels, tmp_path, capsys):
    options = {"places": Places(tmp_path), "folder": tmp_path / "parts"}
    fit_detector(KINDS["shared"], pixels[0], **options)
    fit_detector(KINDS["shared"], pixels[0], **options)
    assert capsys.readouterr().out == ""
    fit_detector(KINDS["shared"], pixels[0][1:], **options)
    assert capsys.readouterr().out == f"{tmp_path / 'parts'}: replaces a detector of other images\n"


@pytest.mark.parametrize(
    ("shift", "bad", "most", "least"),
    [
        (0.0, 0.0, 0.02, 0.0),  # normal images like those it was fitted to
        (0.0, 0.75, 0.02, 0.0),  # most are anomalous
        (1.3, 0.0, 1.0, 0.9),  # other light: a third lies above a threshold of 5 %
        (1.3, 0.3, 1.0, 0.8),
        (4.0, 0.0, 1.0, 1.0),  # nearly all above
    ],
)
def test_scores_that_lie_higher_than_in_cross_validation_cast_doubt(
    fitted, shift, bad, most, least
):
    draws, told = np.random.default_rng(0), []
    for _ in range(200):
        normal = torch.from_numpy(draws.lognormal(size=150))
        detector = replace(
            fitted["image"][0], normal=normal, threshold=float(normal.quantile(0.95))
        )
        n = round(100 * bad)
        scores = draws.lognormal(shift, size=100)
        scores[:n] = draws.lognormal(5, size=n)
        told.append(detector.doubt(torch.from_numpy(scores)))
    assert least <= np.mean([line != "" for line in told]) <= most
    assert all("the threshold may not hold" in line for line in told if line)
    assert detector.doubt(torch.from_numpy(scores[:10])) == ""  # too few to tell


def test_the_command_fits_a_detector_that_the_other_command_scores_with(
    demo_root, tmp_path, capsys
):
    sieve, out = demo_root / "sieve", tmp_path / "detector"
    with pytest.raises(SystemExit) as stopped:
        main(
            ["fit", str(sieve / "train" / "good"), "--bad", str(sieve / "test"), "--out", str(out)]
        )
    assert stopped.value.code == 0
    told = capsys.readouterr()
    assert "F1-max" in told.out and f"cplib score {out} FOLDER" in told.out
    assert Detector.load(out).run.init == "imagenet"
    assert score(out, sieve / "test", "--out", tmp_path / "scores.csv") == 0
    assert len(pd.read_csv(tmp_path / "scores.csv")) == len(datasets.image_files(sieve / "test"))


def test_images_are_all_formats_below_a_folder_but_no_programs(tmp_path):
    names = ["a.png", "b.JPG", "d/e.jp2", "z.tiff"]
    for name in [*names, "h.eps", "i.txt", ".j.png", ".k/l.png", "m.pdf", "n.mpg"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name, "EPS")
    files = datasets.image_files(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in files] == names
    _, read, problems = datasets.read_images(files, 8)  # by another name a program is still one
    assert (read, len(problems)) == ([], 4)
    with pytest.raises(datasets.DataError, match="no such folder; expected a folder of images"):
        datasets.image_files(tmp_path / "nowhere")


def score(*arguments):
    """The exit status of ``python -m cplib score``."""
    with pytest.raises(SystemExit) as stopped:
        main(["score", *map(str, arguments), "--device", "cpu"])
    return stopped.value.code


def test_a_folder_is_scored_and_the_broken_image_named(saved, demo_root, tmp_path, capsys):
    folder, out = tmp_path / "mixed", tmp_path / "scores.csv"
    (folder / "below").mkdir(parents=True)
    image = Image.open(demo_root / "sieve" / "train" / "good" / "000.png").convert("RGB")
    image.save(folder / "below" / "whole.png")
    image.quantize(32).save(folder / "moving.gif", save_all=True, append_images=[image])
    image.convert("CMYK").resize((100, 30)).save(folder / "wide.jpg")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image, and not called one")
    assert score(saved, folder, "--out", out) == 1
    told = capsys.readouterr()
    broken, others = told.err.splitlines()
    assert broken.startswith(f"{folder / 'broken.png'}: ")
    assert others == f"{folder}: left out, no images by their names: 1 (.txt)"
    table = pd.read_csv(out).set_index("file")
    assert list(table) == ["score", "threshold", "anomalous"]
    assert list(table.index) == ["below/whole.png", "broken.png", "moving.gif", "wide.jpg"]
    assert table.loc["broken.png", ["score", "anomalous"]].isna().all()
    whole, detector = table.drop("broken.png"), Detector.load(saved)
    expected = detector.score([folder / name for name in whole.index])
    np.testing.assert_allclose(whole["score"], expected, rtol=1e-6)
    np.testing.assert_array_equal(whole["anomalous"], expected >= detector.threshold)
    assert f"{int(whole['anomalous'].sum())} at or above the threshold" in told.out
    maps = tmp_path / "maps"
    assert score(saved, folder / "below", "--out", out) == 0
    assert not maps.exists()
    assert capsys.readouterr().err == ""


def test_what_is_asked_for_wrongly_is_one_line_and_exit_2(saved, tmp_path, capsys):
    whole, wrong = (saved, tmp_path, tmp_path / "s.csv"), tmp_path / "nowhere" / "s.csv"
    for i in range(3):
        detector, folder, out = (wrong if i == j else one for j, one in enumerate(whole))
        assert score(detector, folder, "--out", out) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "nowhere" in line


def test_own_folders_make_a_detector_and_what_is_wrong_with_them_is_said(
    demo_root, tmp_path, monkeypatch
):
    monkeypatch.setenv("CPLIB_RESULTS", str(tmp_path / "results"))
    results = tmp_path / "results" / "smoke"

    def ran(**folders):
        parameters = {"profile": "smoke", "data": str(demo_root)}
        parameters |= {name: str(folder) for name, folder in folders.items()}
        path = NOTEBOOKS / "12_your_own_images.ipynb"
        return execute([path], results, parameters).get(path, "")

    sieve, good = demo_root / "sieve", tmp_path / "partA" / "ok"
    shutil.copytree(sieve / "train" / "good", good)
    (good / "broken.png").write_bytes(b"no image")
    (good / "phone.heic").write_bytes(b"no format of ours")
    bad = next(path for path in (sieve / "test").iterdir() if path.name != "good")
    assert ran(good=good, bad=bad, new=sieve / "test") == ""
    cells = nbformat.read(results / "notebooks" / "12_your_own_images.ipynb", 4).cells
    said = "".join(o.get("text", "") for c in cells for o in c.get("outputs", []))
    assert f"{good / 'broken.png'}: " in said
    assert "left out, no images by their names: 1 (.heic)" in said
    assert "recommended: ImageNet" in said
    folder = results / "detectors" / name_of(good)
    detector = Detector.load(folder)
    assert detector.run.dataset == "own"
    assert "F1-max" in detector.chosen
    table = pd.read_csv(folder / "scores.csv")
    assert len(table) == len(datasets.image_files(sieve / "test"))
    assert table["file"].str.startswith("test/").all()
    assert table["score"].is_monotonic_decreasing
    assert "name that folder, too" in ran(bad=bad)

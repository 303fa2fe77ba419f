"""The detector: thresholds that mean what they say, files that give the same scores or one line."""

import hashlib
import json
import pickle
import shutil
from dataclasses import replace
from unittest.mock import Mock

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import f1_score
from sklearn.mixture import GaussianMixture

from cplib import data, localize, runs, train
from cplib.__main__ import main
from cplib.config import Run
from cplib.density import FewGaussians, Gaussian
from cplib.detector import (
    RECORD,
    TENSORS,
    Detector,
    choose_threshold,
    cross_validated,
    fit_gaussian,
    name_of,
)
from cplib.notebooks import NOTEBOOKS, run_one
from cplib.workspace import open_workspace

IMAGE = Run(method="cutpaste_3way", category="parts", dataset="own", size=64, updates=1, sources=2)
PATCH = replace(IMAGE, crop=32, window=32, stride=16)
PLACES = replace(PATCH, gaussians="position")
KINDS = {"image": IMAGE, "patch": PATCH, "places": PLACES}


@pytest.fixture(scope="module")
def pixels(demo_root):
    """The demo's good gears to fit to, and its defective ones."""
    normal, test = (data.load(demo_root, "gear", split, 64) for split in ("train", "test"))
    return normal.pixels, test.pixels[test.labels == 1]


@pytest.fixture(scope="module")
def nets(pixels):
    """A network for whole pictures and one for patches, trained for one update."""
    image, patch = (train.fit(run, pixels[0])[0] for run in (IMAGE, PATCH))
    return {"image": image, "patch": patch, "places": patch}


@pytest.fixture(scope="module", params=KINDS)
def detector(request, pixels, nets):
    return Detector.fit(KINDS[request.param], *pixels, net=nets[request.param])


@pytest.fixture(scope="module")
def saved(pixels, nets, tmp_path_factory):
    """The folder of a saved detector of whole pictures."""
    folder = tmp_path_factory.mktemp("saved") / "detector"
    Detector.fit(IMAGE, pixels[0], net=nets["image"]).save(folder)
    return folder


# Scores


def test_scores_are_those_of_the_run(detector, pixels):
    """Independently of the detector's own way: as ``runs`` assesses a run."""
    normal, bad = (
        data.Images(x, torch.tensor([i] * len(x)), ("k",) * len(x), None, tuple(map(str, x)))
        for i, x in enumerate(pixels)
    )
    expected = runs.assess(detector.run, detector.net, normal, bad)[0].double()
    torch.testing.assert_close(detector.score(pixels[1]), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(detector.bad, expected, rtol=1e-4, atol=0)


def test_scores_and_heat_after_loading_are_the_same_to_the_byte(detector, pixels, tmp_path):
    detector.save(tmp_path / "d")
    again = Detector.load(tmp_path / "d")
    for x in (pixels[1], pixels[1][:1]):
        assert torch.equal(again.score(x), detector.score(x))
    assert torch.equal(again.heat(pixels[1]), detector.heat(pixels[1]))
    for name in ("run", "threshold", "chosen"):
        assert getattr(again, name) == getattr(detector, name)
    assert torch.equal(again.good, detector.good)
    assert torch.equal(again.bad, detector.bad)


def test_heat_maps_of_a_patch_model_are_those_of_the_run(detector, pixels):
    heat = detector.heat(pixels[1])
    assert heat.shape == (len(pixels[1]), 64, 64)
    assert torch.isfinite(heat).all()
    run = detector.run
    if run.window:
        options = {"window": 32, "stride": 16, "per_position": run.per_position}
        maps = localize.window_scores(detector.net, *pixels, **options)
        torch.testing.assert_close(heat, runs.heat_maps(run, maps), rtol=1e-3, atol=0)


def test_without_training_there_is_no_gradcam(pixels):
    bare = replace(IMAGE, method="untrained", updates=0)
    with pytest.raises(ValueError, match="GradCAM needs a trained ResNet"):
        Detector.fit(bare, pixels[0]).heat(pixels[1])


def test_a_detector_trains_the_network_where_none_is_given(pixels, nets):
    trained = Detector.fit(IMAGE, pixels[0])
    given = Detector.fit(IMAGE, pixels[0], net=nets["image"])
    assert torch.equal(trained.score(pixels[1]), given.score(pixels[1]))


def test_files_of_any_shape_are_resized_as_the_data_sets_are(saved, tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (90, 200, 3), np.uint8)
    folder = tmp_path / "one" / "train" / "good"
    folder.mkdir(parents=True)
    Image.fromarray(values).save(folder / "wide.png")
    detector = Detector.load(saved)
    expected = detector.score(data.load(tmp_path, "one", "train", 64).pixels)
    assert torch.equal(detector.score([folder / "wide.png"]), expected)
    assert detector.score(data.pictures(tmp_path)).shape == (1,)
    assert detector.score([]).shape == (0,)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 1, 64, 64), (3, 64, 64)])
def test_pixels_of_another_shape_are_refused(saved, shape):
    with pytest.raises(ValueError, match=r"uint8 \(N, 3, 64, 64\)"):
        Detector.load(saved).score(torch.zeros(shape, dtype=torch.uint8))


def test_every_file_that_is_no_picture_has_its_line(demo_root, tmp_path):
    good = data.pictures(demo_root / "gear" / "train" / "good")[:3]
    broken = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for path in broken:
        path.write_bytes(b"no picture")
    with pytest.raises(data.DataError) as caught:
        Detector.fit(IMAGE, [*good, *broken])
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    for line, path in zip(lines, broken, strict=True):
        assert line.startswith(f"{path}: ")


def test_one_picture_is_too_few(pixels, nets):
    with pytest.raises(ValueError, match="two good pictures at least, not 1"):
        Detector.fit(IMAGE, pixels[0][:1], net=nets["image"])
    with pytest.raises(ValueError, match="cross-validation needs two pictures"):
        cross_validated(IMAGE, torch.zeros(1, 1, 4))


def test_few_pictures_are_refused_before_anything_is_trained(pixels, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "fit", None)  # called, it would be a TypeError
    for n in (0, 1):
        with pytest.raises(ValueError, match=f"not {n}"):
            Detector.fit_in(tmp_path, IMAGE, pixels[0][:n])
    with pytest.raises(ValueError, match="between 0 and 1"):
        Detector.fit_in(tmp_path, IMAGE, pixels[0], quantile=95)
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(data.DataError, match=r"bad\.png"):
        Detector.fit_in(tmp_path, IMAGE, pixels[0], [tmp_path / "bad.png"])


# Fitted in a folder


def test_what_was_trained_on_the_same_pictures_is_not_trained_again(pixels, tmp_path, monkeypatch):
    first = Detector.fit_in(tmp_path, IMAGE, pixels[0])
    assert torch.equal(Detector.load(tmp_path).score(pixels[1]), first.score(pixels[1]))
    calls, fit = [], train.fit
    monkeypatch.setattr(train, "fit", lambda *a, **k: calls.append(a) or fit(*a, **k))
    again = Detector.fit_in(tmp_path, IMAGE, *pixels, quantile=0.9)
    assert not calls
    assert torch.equal(again.good, first.good)
    assert len(Detector.load(tmp_path).bad) == len(pixels[1])  # what is saved is the newest
    scored_otherwise = replace(IMAGE, reg_covar=1e-3, l2_normalise=True)
    Detector.fit_in(tmp_path, scored_otherwise, pixels[0])
    assert not calls
    Detector.fit_in(tmp_path, IMAGE, pixels[0][1:])
    Detector.fit_in(tmp_path, replace(IMAGE, learning_rate=0.01), pixels[0][1:])
    assert len(calls) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD, TENSORS]


def test_a_training_that_was_cut_off_is_gone_on_with(pixels, tmp_path):
    run = replace(IMAGE, updates=3, precision="fp32")
    with pytest.raises(train.OutOfTime, match="1 of 3 updates"):
        Detector.fit_in(tmp_path, run, pixels[0], deadline=0)
    other = pixels[0][:5]
    with pytest.raises(train.OutOfTime, match="1 of 3 updates"):  # not those pictures' training
        Detector.fit_in(tmp_path, run, other, deadline=0)
    with pytest.raises(train.OutOfTime, match="2 of 3 updates"):
        Detector.fit_in(tmp_path, run, pixels[0], deadline=0)
    found = Detector.fit_in(tmp_path, run, pixels[0], deadline=0)
    assert torch.equal(found.good, Detector.fit(run, pixels[0]).good)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/a/gear/train/good", "gear"),
        ("/a/partA/ok", "partA"),
        ("/a/partB/Good/", "partB"),
        ("/pictures of nuts", "pictures of nuts"),
        ("/good", "own"),
        ("/", "own"),
    ],
)
def test_a_detector_is_named_by_what_is_pictured(folder, name):
    assert name_of(folder) == name


def test_many_pictures_of_each_place_are_kept_as_covariances(tmp_path, pixels, nets):
    """Which takes less memory; the scores are the same."""
    z = torch.randn(9, 4, 8, generator=torch.Generator().manual_seed(0))
    new = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
    gaussian, few = fit_gaussian(PLACES, z), FewGaussians.fit(z.transpose(0, 1))
    assert isinstance(gaussian, Gaussian)
    assert isinstance(fit_gaussian(PLACES, z[:6]), FewGaussians)
    expected = few.score(new.transpose(0, 1))
    torch.testing.assert_close(gaussian.score(new.transpose(0, 1)), expected, rtol=1e-4, atol=0)
    run, many = replace(PLACES, stride=32), pixels[0][torch.arange(520) % len(pixels[0])]
    fitted = Detector.fit(run, many, net=nets["patch"], folds=2)
    assert isinstance(fitted.gaussian, Gaussian)
    fitted.save(tmp_path / "many")
    again = Detector.load(tmp_path / "many")
    assert torch.equal(again.score(pixels[1]), fitted.score(pixels[1]))


# The Gaussian, cross-validated


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(1, 8), st.integers(1, 4), st.integers(0, 99))
def test_gaussians_kept_as_samples_score_as_scikit_learns_do(n, width, places, seed):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(places, n, width, generator=generator)
    new = torch.randn(places, 3, width, generator=generator)
    found = FewGaussians.fit(z, reg_covar=1e-2).score(new)
    for place in range(places):
        reference = GaussianMixture(1, reg_covar=1e-2).fit(z[place].double().numpy())
        log_density = reference.score_samples(new[place].double().numpy())
        _, half = np.linalg.slogdet(reference.covariances_[0])
        expected = -log_density - half / 2 - width * np.log(2 * np.pi) / 2
        np.testing.assert_allclose(found[place], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("folds", [2, 3, 5, None])
@pytest.mark.parametrize("run", [PATCH, PLACES], ids=["shared", "position"])
def test_a_picture_is_scored_by_a_gaussian_that_has_not_seen_it(run, folds):
    z = torch.randn(7, 9, 5, generator=torch.Generator().manual_seed(1))
    scores = cross_validated(run, z, folds=folds)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(run.seed))
    for fold in order.tensor_split(folds or 7):
        rest = [i for i in range(7) if i not in fold.tolist()]
        for i in fold.tolist():
            if run is PLACES:
                parts = [(z[rest, p], z[[i], p]) for p in range(9)]
            else:
                parts = [(z[rest].flatten(0, 1), z[i])]
            each = [Gaussian.fit(a, reg_covar=run.reg_covar).score(b).max() for a, b in parts]
            assert scores[i].item() == pytest.approx(max(each).item(), rel=1e-4)


# The threshold


@pytest.mark.parametrize("quantile", [0.9, 0.95])
@pytest.mark.parametrize("folds", [5, None])
def test_the_quantile_gives_about_the_false_alarms_asked_for(quantile, folds):
    """Over simulated features: the mean of 20 detectors' rates on pictures never seen."""
    generator = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(20):
        z, new = (torch.randn(n, 1, 6, generator=generator) for n in (150, 2000))
        good = cross_validated(IMAGE, z, folds=folds)
        threshold, chosen = choose_threshold(good, good[:0], quantile)
        scores = fit_gaussian(IMAGE, z).score(new[:, 0])
        rates.append((scores >= threshold).float().mean().item())
        assert f"{100 * quantile:g} % quantile" in chosen
    assert np.mean(rates) == pytest.approx(1 - quantile, abs=0.02)


SCORES = st.lists(st.integers(0, 12), min_size=1, max_size=15)


@given(SCORES, SCORES)
def test_the_threshold_with_bad_pictures_has_the_highest_f1_of_all(good, bad):
    labels = [0] * len(good) + [1] * len(bad)
    scores = np.array([*good, *bad], dtype=float)
    best = max(f1_score(labels, scores >= t, zero_division=0) for t in np.unique(scores))
    tensors = (torch.tensor(x, dtype=torch.float64) for x in (good, bad))
    threshold, chosen = choose_threshold(*tensors, 0.95)
    assert f1_score(labels, scores >= threshold) == pytest.approx(best)
    assert f"F1-max ({100 * best:.1f} %)" in chosen


def test_the_threshold_lies_between_scores_so_that_rounding_flips_none():
    good, bad = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([7.0, 9.0]).double()
    assert choose_threshold(good, bad, 0.95)[0] == 5


@pytest.mark.parametrize("quantile", [0, 1, -0.5, 95])
def test_a_quantile_that_is_none_is_refused(quantile):
    with pytest.raises(ValueError, match="between 0 and 1"):
        choose_threshold(torch.ones(3), torch.ones(0), quantile)


# The files


def test_the_folder_holds_two_files_and_nothing_that_is_pickled(saved):
    assert sorted(path.name for path in saved.iterdir()) == [RECORD, TENSORS]
    json.loads((saved / RECORD).read_text())
    assert all(isinstance(v, torch.Tensor) for v in load_file(saved / TENSORS).values())
    for path in saved.iterdir():
        with pytest.raises(Exception):  # noqa: B017 - whatever pickle says of what is no pickle
            pickle.loads(path.read_bytes())


def spoilt(saved, folder, record=lambda r: r, tensors=lambda t: t):
    """A copy whose record and tensors are changed, with the hash of the changed tensors."""
    shutil.copytree(saved, folder)
    save_file(tensors(load_file(saved / TENSORS)), folder / TENSORS)
    old = json.loads((saved / RECORD).read_text())
    old["sha256"] = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    (folder / RECORD).write_text(json.dumps(record(old)))
    return folder


def test_a_copy_written_anew_is_still_loaded(saved, tmp_path):
    assert Detector.load(spoilt(saved, tmp_path / "d")).run.size == 64


def assert_refused(folder, *parts):
    """``load`` raises a ValueError of one line that names the folder and holds every part."""
    with pytest.raises(ValueError) as caught:
        Detector.load(folder)
    line = str(caught.value)
    assert line.splitlines() == [line]
    for part in (str(folder), "not a detector of this version", *parts):
        assert part in line


def changed(**fields):
    return lambda record: record | fields


def in_run(**fields):
    return lambda record: record | {"run": record["run"] | fields}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed(version=4), "version 4, not 3"),
        (in_run(size=30_000), "at most 4096"),
        (changed(data={"good": 64, "bad": 0, "sha256": 1}), "hash of the pictures"),
        (changed(data={"good": 64, "bad": 0}), "'sha256'"),
        (changed(threshold="high"), "threshold"),
        (changed(threshold=float("nan")), "not finite"),
        (changed(threshold=float("inf")), "not finite"),
        (changed(chosen=3), "threshold"),
        (changed(data={}), "'sha256'"),
        (changed(data={"sha256": ""}), "'good'"),
        (changed(data={"good": 9, "bad": 0, "sha256": ""}), "'good'"),
        (changed(data={"good": -1, "bad": 0, "sha256": ""}), ""),
        (changed(data={"good": 10**30, "bad": 0, "sha256": ""}), ""),
        (changed(sha256="0" * 64), "sha256"),
        (changed(run=[]), ""),
        (in_run(colour=1), "'colour'"),
        (in_run(method="telepathy"), "'telepathy'"),
        (in_run(head=[64]), "net.head"),
        (in_run(head=[10**12]), "net.head"),
        (in_run(head=[-1]), ""),
        (in_run(window=100), "smaller than a 100-px window"),
        (in_run(window=32, gaussians="position"), "'centred'"),
        (lambda record: [], ""),
        (lambda record: {}, "version"),
    ],
)
def test_a_record_that_cannot_be_is_one_line(saved, tmp_path, change, reason):
    assert_refused(spoilt(saved, tmp_path / "d", record=change), reason)


def with_tensor(name, change):
    return lambda tensors: tensors | {name: change(tensors[name]).contiguous()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_tensor("mean", lambda v: v[:-1]), "'mean'"),
        (with_tensor("factor", lambda v: v[:, :-1]), "'factor'"),
        (with_tensor("factor", lambda v: v.float()), "'factor'"),
        (with_tensor("factor", lambda v: v * float("nan")), "not finite"),
        (with_tensor("factor", lambda v: -v), "covariance"),
        (with_tensor("net.head.0.weight", lambda v: v.half()), "net.head.0.weight"),
        (with_tensor("net.head.0.weight", lambda v: v / 0), "not finite"),
        (lambda tensors: tensors | {"extra": torch.zeros(1)}, "'extra'"),
        (lambda tensors: {k: v for k, v in tensors.items() if k != "mean"}, "'mean'"),
    ],
)
def test_tensors_that_cannot_be_are_one_line(saved, tmp_path, change, reason):
    assert_refused(spoilt(saved, tmp_path / "d", tensors=change), reason)


class Bomb:
    """A pickle that would leave a file behind when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("honest_hash", [False, True])
def test_a_pickle_by_another_name_is_refused_and_not_run(saved, tmp_path, honest_hash):
    folder = tmp_path / "d"
    shutil.copytree(saved, folder)
    raw = pickle.dumps(Bomb(tmp_path / "run"))
    (folder / TENSORS).write_bytes(raw)
    if honest_hash:
        record = json.loads((folder / RECORD).read_text())
        record["sha256"] = hashlib.sha256(raw).hexdigest()
        (folder / RECORD).write_text(json.dumps(record))
    assert_refused(folder, "" if honest_hash else "sha256")
    assert not (tmp_path / "run").exists()
    pickle.loads(raw).close()
    assert (tmp_path / "run").exists()  # it would have


@pytest.mark.parametrize("name", [RECORD, TENSORS])
@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_truncated_file_is_refused(saved, tmp_path, name, share):
    folder = tmp_path / "d"
    shutil.copytree(saved, folder)
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(raw[: int(share * len(raw)) - (share > 0.9)])
    assert_refused(folder)


def test_one_flipped_bit_is_refused(saved, tmp_path):
    folder = tmp_path / "d"
    shutil.copytree(saved, folder)
    raw = bytearray((folder / TENSORS).read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / TENSORS).write_bytes(raw)
    assert_refused(folder, "sha256")


def test_what_is_not_there_is_refused(tmp_path):
    assert_refused(tmp_path / "nowhere")


def test_a_detector_replaces_another_and_leaves_nothing_else(saved, pixels, nets, tmp_path):
    folder = tmp_path / "d"
    shutil.copytree(saved, folder)
    other = Detector.fit(PATCH, pixels[0], net=nets["patch"])
    other.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == [RECORD, TENSORS]
    assert Detector.load(folder).run == other.run


def test_a_disk_that_is_full_leaves_the_old_detector(saved, pixels, nets, tmp_path, monkeypatch):
    folder = tmp_path / "d"
    shutil.copytree(saved, folder)
    other = Detector.fit(PATCH, pixels[0], net=nets["patch"])

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("cplib.detector.save_file", full)
    with pytest.raises(OSError, match=f"cannot write the detector {folder}: no space left"):
        other.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == [RECORD, TENSORS]
    assert Detector.load(folder).run.window == 0


# Reading a person's own pictures


def test_pictures_are_all_formats_below_a_folder_but_no_programs(tmp_path):
    names = ["a.png", "b.JPG", "c.gif", "d/e.jp2", "d/f.ppm", "g.webp", "z.tiff"]
    for name in [*names, "h.eps", "i.txt", ".j.png", ".k/l.png", "m.pdf", "n.mpg"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [p.relative_to(tmp_path).as_posix() for p in data.pictures(tmp_path)] == names


@pytest.mark.parametrize(("name", "reason"), [("nowhere", "no such folder"), ("", "no pictures")])
def test_a_folder_without_pictures_is_one_line(tmp_path, name, reason):
    with pytest.raises(
        data.DataError, match=f"{reason}.*; expected a folder of pictures"
    ) as caught:
        data.pictures(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1


def test_an_eps_by_another_name_is_not_read(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    _, read, problems = data.read([tmp_path / "a.png"], 8)
    assert (read, len(problems)) == ([], 1)


# python -m cplib score


@pytest.fixture(scope="module")
def mixed(demo_root, tmp_path_factory):
    """A folder with a picture of each kind, one of them broken, one in a folder below."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "below").mkdir()
    picture = Image.open(demo_root / "gear" / "train" / "good" / "000.png").convert("RGB")
    picture.save(folder / "below" / "good.png")
    picture.quantize(32).save(folder / "palette.png")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    grey = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(folder / "deep.png")
    frames = [Image.new("RGB", picture.size, colour) for colour in ("red", "blue")]
    picture.save(folder / "moving.gif", save_all=True, append_images=frames)
    picture.resize((100, 30)).save(folder / "wide.bmp")
    (folder / "broken.png").write_bytes((folder / "palette.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("no picture, and not called one")
    return folder


def scored(saved, folder, out, *more):
    return main(["score", str(saved), str(folder), "--out", str(out), "--device", "cpu", *more])


def test_a_folder_is_scored_and_the_broken_picture_named(saved, mixed, tmp_path, capsys):
    assert scored(saved, mixed, tmp_path / "scores.csv") == 1
    told = capsys.readouterr()
    broken, others = told.err.splitlines()
    assert broken.startswith(f"{mixed / 'broken.png'}: ")
    assert others == f"{mixed}: left out, no pictures by their names: 1 (.txt)"
    table = pd.read_csv(tmp_path / "scores.csv").set_index("file")
    assert list(table) == ["score", "threshold", "defective"]
    assert list(table.index) == [
        "below/good.png",
        "broken.png",
        "cmyk.jpg",
        "deep.png",
        "moving.gif",
        "palette.png",
        "wide.bmp",
    ]
    assert table.loc["broken.png", ["score", "defective"]].isna().all()
    whole = table.drop("broken.png")
    detector = Detector.load(saved)
    expected = detector.score([mixed / name for name in whole.index])
    np.testing.assert_allclose(whole["score"], expected, rtol=1e-6)
    np.testing.assert_array_equal(whole["defective"], expected >= detector.threshold)
    assert table["threshold"].tolist() == pytest.approx([detector.threshold] * 7)
    milliseconds = float(told.out.split("; ")[1].split(" ms")[0])
    assert milliseconds > 0
    assert f"{int(whole['defective'].sum())} at or above the threshold" in told.out


def test_a_folder_of_whole_pictures_exits_with_0(saved, mixed, tmp_path, capsys):
    assert scored(saved, mixed / "below", tmp_path / "scores.csv") == 0
    assert capsys.readouterr().err == ""
    assert (tmp_path / "scores.csv").read_text().splitlines()[0] == "file,score,threshold,defective"


def test_a_folder_of_broken_pictures_exits_with_1(saved, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"")
    assert scored(saved, tmp_path / "in", tmp_path / "scores.csv") == 1
    assert pd.read_csv(tmp_path / "scores.csv")["score"].isna().all()
    assert "pictures: 1;" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["detector", "folder", "out", "device"])
def test_what_is_asked_for_wrongly_is_one_line_and_exit_2(saved, mixed, tmp_path, capsys, wrong):
    asked = {"detector": saved, "folder": mixed, "out": tmp_path / "s.csv", "device": "cpu"}
    asked[wrong] = tmp_path / "nowhere" / "s.csv"
    options = ["--out", str(asked["out"]), "--device", str(asked["device"])]
    assert main(["score", str(asked["detector"]), str(asked["folder"]), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "nowhere" in lines[0]


def test_a_home_is_found_and_memory_that_is_short_is_said(
    saved, mixed, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("HOME", str(mixed))
    assert scored(saved, "~/below", tmp_path / "scores.csv") == 0
    assert pd.read_csv(tmp_path / "scores.csv")["file"].tolist() == ["good.png"]
    monkeypatch.setattr(Detector, "load", Mock(side_effect=MemoryError))
    capsys.readouterr()
    assert scored(saved, mixed, tmp_path / "scores.csv") == 2
    assert capsys.readouterr().err == "error: out of memory\n"


def test_a_folder_is_no_file_to_write_to(saved, mixed, tmp_path, capsys):
    assert scored(saved, mixed, tmp_path) == 2
    assert "a folder, not a file" in capsys.readouterr().err


# Notebook 12 on a person's own folders


def own_images(demo_root, tmp_path, **parameters):
    """Execute the notebook; whether it ran, and what it said."""
    results = tmp_path / "results"
    workspace = open_workspace("smoke", data_root=str(demo_root), results=str(results))
    parameters |= {"profile": "smoke", "data": str(demo_root), "results": str(results)}
    ran = run_one(NOTEBOOKS / "12_your_own_images.ipynb", workspace, parameters)
    cells = nbformat.read(results / "notebooks" / "12_your_own_images.ipynb", 4).cells
    return ran, "".join(o.get("text", "") for c in cells for o in c.get("outputs", []))


def test_own_good_bad_and_new_pictures_make_a_detector(demo_root, tmp_path):
    gear = demo_root / "gear"
    (tmp_path / "partA").mkdir()
    good = shutil.copytree(gear / "train" / "good", tmp_path / "partA" / "ok")
    (good / "broken.png").write_bytes(b"no picture")
    (good / "phone.heic").write_bytes(b"no format of ours")
    bad = next(path for path in (gear / "test").iterdir() if path.name != "good")
    folders = {"good": good, "bad": bad, "new": gear / "test"}
    ran, said = own_images(demo_root, tmp_path, **{k: str(v) for k, v in folders.items()})
    assert ran
    assert f"{good / 'broken.png'}: " in said
    assert "left out, no pictures by their names: 1 (.heic)" in said
    assert "2 updates at learning rate" in said  # of the model that is fitted
    detector = Detector.load(tmp_path / "results" / "detectors" / "partA")
    assert detector.run.dataset == "own"
    assert "F1-max" in detector.chosen
    table = pd.read_csv(tmp_path / "results" / "detectors" / "partA" / "scores.csv")
    assert len(table) == len(data.pictures(gear / "test"))
    assert table["file"].str.startswith("test/").all()
    assert table["score"].is_monotonic_decreasing


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"bad": "nowhere"}, "name that folder, too"),
        ({"method": "imagenet"}, "unknown method 'imagenet'"),
        ({"good": "nowhere"}, "no such folder"),
        ({"good": "broken"}, "not one picture could be read"),
    ],
)
def test_what_is_wrong_with_own_pictures_is_said(demo_root, tmp_path, capsys, parameters, reason):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"")
    paths = {k: v if k == "method" else str(tmp_path / v) for k, v in parameters.items()}
    assert not own_images(demo_root, tmp_path, **paths)[0]
    assert reason in capsys.readouterr().err

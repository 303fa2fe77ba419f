"""Table 6: anomalies inside the picture as asked, and AUROC of clean pictures against painted."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from cplib import data, records, runs, synthetic
from cplib.config import CATEGORIES, DEMO_OBJECTS, SYNTHETIC, Run
from cplib.published import against_paper, published, wide
from cplib.records import synthetic_metrics
from cplib.synthetic import FILLS, SHAPES, Anomaly, digit_pictures, natural_pictures, outline, paint
from cplib.tables import TABLES, compare
from cplib.workspace import open_workspace

TABLE = "table6_synthetic_anomalies"
ONCE = Anomaly(least=1)
AREAS = {"square": 0.5, "ellipse": np.pi / 8, "heart": 3.6595 / 2.5**2}  # of the box


def plain(n=2, height=64, width=64, value=0):
    return torch.full((n, 3, height, width), value, dtype=torch.uint8)


def box(mask):
    """First and last row and column of a mask, and its height and width."""
    rows, columns = (np.flatnonzero(np.asarray(mask).any(axis)) for axis in (1, 0))
    return rows[0], rows[-1], columns[0], columns[-1], np.ptp(rows) + 1, np.ptp(columns) + 1


# What is painted


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    fill=st.sampled_from(FILLS),
    sides=st.tuples(st.integers(30, 90), st.integers(30, 90)),
    high=st.floats(0.2, 0.6),
    margin=st.floats(0, 0.2),
    count=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_exactly_the_mask_is_painted_and_the_margin_is_free(
    shape, fill, sides, high, margin, count, seed
):
    anomaly = Anomaly(side=(0.2, high), margin=margin, count=count, least=1, seed=seed)
    height, width = sides
    dark, light = plain(1, height, width, 0), plain(1, height, width, 255)
    on_dark, masks = paint(dark, shape, fill, anomaly)
    on_light, same = paint(light, shape, fill, anomaly)
    # What is painted does not depend on what lies below: equal there, and only there.
    assert torch.equal((on_dark == on_light).all(1), masks)
    assert torch.equal(masks, same)
    assert torch.equal(on_dark.masked_fill(masks[:, None], 0), dark)
    assert (dark == 0).all()
    top, bottom, left, right, *_ = box(masks[0])
    free = int(margin * min(sides))
    assert free <= top <= bottom < height - free
    assert free <= left <= right < width - free


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_seed_paints_the_same_and_another_does_not(shape, fill):
    x = plain(3)
    first, again = (paint(x, shape, fill, Anomaly()) for _ in range(2))
    assert all(map(torch.equal, first, again))
    other, masks = paint(x, shape, fill, Anomaly(seed=1))
    assert not torch.equal(other, first[0])
    assert not torch.equal(masks, first[1])
    assert len({mask.numpy().tobytes() for mask in masks}) == len(masks)  # a draw for each


def test_a_picture_is_painted_alike_alone_and_among_others():
    few, many = (paint(plain(n), "heart", "natural", ONCE)[0] for n in (2, 7))
    assert torch.equal(few, many[:2])


@pytest.mark.parametrize(
    ("n", "least", "expected"), [(5, 1, 5), (5, 5, 5), (5, 6, 10), (3, 40, 42)]
)
def test_every_normal_picture_is_painted_as_often_as_it_takes(n, least, expected):
    x = torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1).expand(n, 3, 64, 64)
    painted, masks = paint(x, "square", "color", Anomaly(least=least))
    assert len(painted) == len(masks) == expected
    untouched = ~masks
    for i, (picture, mask) in enumerate(zip(painted, untouched, strict=True)):
        assert set(picture[:, mask].flatten().tolist()) == {i % n}


def test_all_shapes_and_fills_lie_at_the_same_place():
    x = plain(8, 96, 80)
    boxes = {}
    for shape in SHAPES[1:]:
        masks = [paint(x, shape, fill, ONCE)[1] for fill in FILLS]
        assert torch.equal(*masks)
        boxes[shape] = np.array([np.mean(np.nonzero(m.numpy()), axis=1) for m in masks[0]])
    assert abs(boxes["square"] - boxes["ellipse"]).max() < 0.6  # centres, in pixels
    assert abs(boxes["square"] - boxes["heart"]).max() < 3  # whose middle lies off its circle's


def test_a_colour_is_one_random_colour_a_shape():
    painted, masks = paint(plain(200), "ellipse", "color", ONCE)
    found = [np.unique(p[:, m].T, axis=0) for p, m in zip(painted, masks, strict=True)]
    assert {len(colours) for colours in found} == {1}
    channels = np.concatenate(found)
    assert channels.min() < 10
    assert channels.max() > 245
    np.testing.assert_allclose(channels.mean(0), 127.5, atol=20)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_there_are_as_many_shapes_as_asked(count):
    anomaly = Anomaly(side=(0.1, 0.1), count=count, least=1)
    painted, masks = paint(plain(30, 200, 200), "square", "color", anomaly)
    found = [len(np.unique(p[:, m].T, axis=0)) for p, m in zip(painted, masks, strict=True)]
    assert max(found) == count
    assert np.mean(found) > 0.9 * count  # one may hide another
    few = paint(plain(30, 200, 200), "square", "color", replace(anomaly, count=1))[1]
    assert not (few & ~masks).any()


def test_sizes_are_spread_over_their_range_of_the_shorter_side():
    anomaly = Anomaly(side=(0.2, 0.5), turn=0, least=300)
    masks = paint(plain(1, 100, 160), "ellipse", "color", anomaly)[1]
    widths = np.array([box(mask)[5] for mask in masks])  # upright, it fills its box's width
    assert 20 <= widths.min() <= 22
    assert 48 <= widths.max() <= 50
    assert np.mean(widths) == pytest.approx(35, abs=1.5)


def test_places_are_spread_over_the_whole_picture():
    masks = paint(plain(1, 100, 200), "square", "color", Anomaly(turn=0, least=400))[1]
    share = masks.float().mean(0)
    corners = [share[:50, :100], share[:50, 100:], share[50:, :100], share[50:, 100:]]
    means = np.array([float(c.mean()) for c in corners])
    np.testing.assert_allclose(means / means.mean(), 1, atol=0.2)


@pytest.mark.parametrize("shape", AREAS)
def test_no_turn_cuts_a_shape_off(shape):
    for turn in np.linspace(-np.pi, np.pi, 9):
        assert outline(shape, 101, turn).mean() == pytest.approx(AREAS[shape], rel=0.02)


def test_shapes_have_their_forms():
    square, ellipse, heart = (outline(shape, 101) for shape in ("square", "ellipse", "heart"))
    assert box(square)[4:] == (71, 71)
    assert square[15:86, 15:86].all()
    assert box(ellipse)[4:] == (51, 101)
    assert np.array_equal(heart, heart[:, ::-1])
    runs_of = [np.count_nonzero(np.diff(np.pad(row.astype(int), 1)) == 1) for row in heart]
    first = np.flatnonzero(heart.any(1))[0]
    assert runs_of[first + 2] == 2  # two lobes above
    assert np.flatnonzero(heart.any(1))[-1] >= 99  # and the tip at the bottom
    assert heart[-3].sum() < 10


def test_turns_are_counted_in_degrees_either_way():
    upright = paint(plain(20), "ellipse", "color", replace(ONCE, turn=0))[1]
    turned = paint(plain(20), "ellipse", "color", replace(ONCE, turn=10))[1]
    assert not torch.equal(upright, turned)
    for a, b in zip(upright, turned, strict=True):
        assert abs(box(a)[5] - box(b)[5]) <= 2  # ten degrees hardly shorten it
        assert box(b)[5] > box(b)[4]
    half = outline("heart", 51, np.pi)
    np.testing.assert_array_equal(half, outline("heart", 51)[::-1, ::-1])


# What it is made of


def test_digits_are_read_as_what_they_are(monkeypatch):
    images, labels = load_digits(return_X_y=True)
    reader = KNeighborsClassifier(3).fit(images[200:], labels[200:])
    anomaly = Anomaly(side=(0.5, 0.5), least=1)
    read = []
    for picture in digit_pictures("sklearn")[:100]:
        monkeypatch.setattr(synthetic, "digit_pictures", lambda source, p=picture: p[None])
        mask = paint(plain(1, 128, 128), "digit", "color", anomaly)[1][0]
        ink = Image.fromarray(255 * mask.numpy().astype(np.uint8))
        y, x = window(mask, picture)
        ink = ink.crop((x, y, x + 64, y + 64)).resize((8, 8), Image.Resampling.BOX)
        read.append(int(reader.predict(np.asarray(ink).reshape(1, 64) / 255 * 16)[0]))
    assert np.mean(np.array(read) == labels[:100]) > 0.9


def window(mask, picture):
    """Top and left of the 64-pixel box in which a digit of 8x8 pixels was painted."""
    ink = np.asarray(Image.fromarray(picture).resize((64, 64), Image.Resampling.BICUBIC))
    rows, columns = np.nonzero(ink >= ink.max() / 2)
    top, _, left, *_ = box(mask)
    return int(top - rows.min()), int(left - columns.min())


def test_the_digits_are_scikit_learns():
    np.testing.assert_allclose(digit_pictures("sklearn") / 255 * 16, load_digits().images, atol=0.1)


def test_many_digits_are_drawn():
    masks = paint(plain(40), "digit", "color", Anomaly(side=(0.5, 0.5), least=1))[1]
    shares = {round(float(mask.float().mean()), 5) for mask in masks}
    assert len(shares) > 20


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """Made-up test digits where torchvision would have unpacked MNIST."""
    digits = np.zeros((3, 28, 28), np.uint8)
    digits[:, 4:24, 12:16] = 200
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        head = np.array([0x803, *digits.shape], ">i4").tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(head + digits.tobytes())
        head = np.array([0x801, len(digits)], ">i4").tobytes()
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(head + bytes(len(digits)))
    monkeypatch.setenv("CPLIB_MNIST", str(tmp_path))
    digit_pictures.cache_clear()
    yield digits
    digit_pictures.cache_clear()


def test_mnist_is_read_where_torchvision_left_it(mnist):
    np.testing.assert_array_equal(digit_pictures("mnist"), mnist)
    anomaly = Anomaly(side=(0.5, 0.5), digits="mnist", least=1)
    mask = paint(plain(1, 112, 112), "digit", "color", anomaly)[1][0]
    assert box(mask)[4:] == pytest.approx((40, 8), abs=2)  # the bar, in a box of 56 pixels


def test_mnist_that_is_not_there_is_named_and_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("CPLIB_MNIST", str(tmp_path / "gone"))
    digit_pictures.cache_clear()
    with pytest.raises(ValueError, match=r"no MNIST.*gone"):
        paint(plain(), "digit", "color", Anomaly(digits="mnist"))
    assert not (tmp_path / "gone").exists()


def test_a_natural_filling_is_a_piece_of_a_natural_picture():
    anomaly = Anomaly(side=(0.15, 0.3), least=12)
    painted, masks = paint(plain(1, 64, 80), "heart", "natural", anomaly)
    used = [source(p.numpy(), m.numpy()) for p, m in zip(painted, masks, strict=True)]
    assert None not in used
    assert len({photo for photo, *_ in used}) > 1
    assert len(set(used)) == len(used)


def source(picture, mask):
    """The natural picture and the place in it that a painted piece was cut from."""
    top, _, left, _, height, width = box(mask)
    inside = mask[top : top + height, left : left + width]
    piece = picture[:, top : top + height, left : left + width][:, inside]
    for i, photo in enumerate(natural_pictures(64)):
        views = np.lib.stride_tricks.sliding_window_view(photo, (height, width), axis=(1, 2))
        same = (views[..., inside] == piece[:, None, None]).all((0, 3))
        if same.any():
            return i, *np.argwhere(same)[0]
    return None


def test_the_natural_pictures_are_scikit_images():
    photos = natural_pictures(50)
    originals = [getattr(skimage.data, n)() for n in ("astronaut", "chelsea", "coffee", "rocket")]
    for photo, original in zip(photos, originals, strict=True):
        assert min(photo.shape[1:]) == 50
        assert photo.shape[2] / photo.shape[1] == pytest.approx(
            original.shape[1] / original.shape[0], rel=0.02
        )
        np.testing.assert_allclose(photo.mean((1, 2)), original.mean((0, 1)), atol=2)


# What is refused


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"side": (0.0, 0.3)}, "side"),
        ({"side": (0.4, 0.3)}, "side"),
        ({"side": (0.1, 1.2)}, "side"),
        ({"side": (0.1, 0.6), "margin": 0.3}, "margin"),
        ({"margin": -0.1}, "margin"),
        ({"count": 0}, "count"),
        ({"least": 0}, "least"),
        ({"digits": "roman"}, "roman"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(fields, named):
    with pytest.raises(ValueError, match=named) as error:
        Anomaly(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("pixels", "shape", "fill", "named"),
    [
        (plain(), "star", "color", "star"),
        (plain(), "heart", "plaid", "plaid"),
        (plain(2, 20, 60), "heart", "color", "20x60"),
        (plain(0), "heart", "color", "0 pictures"),
    ],
)
def test_what_cannot_be_painted_is_named(pixels, shape, fill, named):
    with pytest.raises(ValueError, match=named):
        paint(pixels, shape, fill, Anomaly())


def test_records_of_other_anomalies_have_other_names():
    assert Anomaly().id == Anomaly(least=40, seed=0).id == "synthetic"
    changes = [{"least": 20}, {"seed": 1}, {"side": (0.1, 0.2)}, {"digits": "mnist"}]
    names = [Anomaly(**change).id for change in changes]
    assert len({*names, "synthetic"}) == 5
    assert all(name.startswith("synthetic-") for name in names)


# The record beside a run


@pytest.fixture(scope="module")
def done(demo_root, tmp_path_factory):
    """A finished run on the tests' demo set, and its places."""
    run = Run(method="untrained", category="gear", dataset="demo", size=64, updates=0)
    places = {"results": tmp_path_factory.mktemp("results"), "data_root": demo_root}
    runs.execute(run, **places)
    return run, places


def auroc_by_pairs(good, bad):
    return 100 * float(((bad[:, None] > good).float() + 0.5 * (bad[:, None] == good)).mean())


def test_the_record_holds_the_auroc_of_clean_against_painted(done):
    run, places = done
    record = synthetic_metrics(run, ONCE, **places)
    assert list(record["image_auroc"]) == list(SYNTHETIC)
    assert (record["clean"], record["painted"], record["anomaly"]["least"]) == (4, 4, 1)
    train, test = (data.load(places["data_root"], "gear", s, 64) for s in ("train", "test"))
    clean, net = test.pixels[test.labels == 0], runs.load_model(run, places["results"])
    good = runs.score(run, net, train.pixels, clean)
    for kind in ("digit_color", "ellipse_natural"):
        painted = paint(clean, *kind.split("_"), ONCE)[0]
        bad = runs.score(run, net, train.pixels, painted)
        assert record["image_auroc"][kind] == pytest.approx(auroc_by_pairs(good, bad), abs=0.01)


def test_an_anomaly_that_changes_nothing_is_at_chance(done, monkeypatch):
    monkeypatch.setattr(records, "paint", lambda pixels, *_: (pixels.clone(), None))
    record = synthetic_metrics(done[0], Anomaly(seed=7), **done[1])
    np.testing.assert_allclose(list(record["image_auroc"].values()), 50)


def test_the_record_is_written_once_and_read_again(done, monkeypatch):
    run, places = done
    anomaly = Anomaly(least=1, seed=3)
    first = synthetic_metrics(run, anomaly, **places)
    file = runs.run_folder(run, places["results"]) / f"{anomaly.id}.json"
    assert json.loads(file.read_text()) == first
    monkeypatch.setattr(records, "paint", None)
    assert synthetic_metrics(run, anomaly, **(places | {"data_root": None})) == first
    assert not list(file.parent.glob("*.tmp"))


def test_without_pictures_there_is_no_record(done):
    places = done[1] | {"data_root": None}
    assert synthetic_metrics(done[0], Anomaly(seed=4), **places) is None


def test_a_category_without_good_test_pictures_has_no_kinds(done, tmp_path):
    for name in ("train/good/0", "train/good/1", "test/bad/0"):
        file = tmp_path / "gear" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(file)
    places = done[1] | {"data_root": tmp_path}
    record = synthetic_metrics(done[0], Anomaly(seed=5), **places)
    assert (record["clean"], record["painted"], record["image_auroc"]) == (0, 0, {})


# The table


METHODS = ("untrained", "cutout", "cutpaste_3way")


def measured(sources=CATEGORIES, seeds=2, methods=METHODS):
    rng = np.random.default_rng(0)
    rows = [
        {"method": m, "category": kind, "source": s, "seed": i, "image_auroc": rng.uniform(50, 100)}
        for m in methods
        for kind in SYNTHETIC
        for s in sources
        for i in range(seeds)
    ]
    return pd.DataFrame(rows, columns=["method", "category", "source", "seed", "image_auroc"])


def cell(table, method, category):
    found = table[(table["method"] == method) & (table["category"] == category)]
    assert len(found) == 1
    return found.iloc[0]


def test_the_table_is_made_of_the_finished_runs_and_says_how_it_was_painted(demo_root, tmp_path):
    workspace = open_workspace(
        "smoke", data_root=str(demo_root), categories="gear", results=str(tmp_path)
    )
    (run,) = workspace.profile.runs(("untrained",), ("gear",))
    runs.execute(run, **workspace.places)
    values = TABLES[TABLE].values(workspace)
    record = synthetic_metrics(run, workspace.anomaly, **workspace.places)
    assert values["category"].tolist() == list(SYNTHETIC)
    assert values["image_auroc"].tolist() == list(record["image_auroc"].values())
    assert {*zip(values["method"], values["source"], strict=True)} == {("untrained", "gear")}
    table = compare(workspace, TABLE, values)
    assert cell(table, "untrained", "average_all")["seeds"] == 1
    protocol = (tmp_path / "tables" / f"{TABLE}.md").read_text().splitlines()[0]
    assert "of gear, at least 1 painted of each: 1 in a picture, 10 to 30 % of its side" in protocol


def test_mnist_is_asked_for_by_the_environment(monkeypatch, tmp_path, demo_root):
    workspace = open_workspace("smoke", data_root=str(demo_root), results=str(tmp_path))
    assert workspace.anomaly == Anomaly(least=1)
    monkeypatch.setenv("CPLIB_MNIST", "somewhere")
    assert workspace.anomaly == Anomaly(least=1, digits="mnist")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sources", [CATEGORIES, ("bottle", "screw")])
def test_a_cell_is_the_mean_over_sources_with_the_seeds_error(sources):
    values = measured(sources)
    table = against_paper(values, TABLE, methods=METHODS)
    part = values[(values["method"] == "cutout") & (values["category"] == "heart_natural")]
    found = cell(table, "cutout", "heart_natural")
    a, b = (part[part["seed"] == i]["image_auroc"].mean() for i in (0, 1))
    assert found["mean"] == pytest.approx((a + b) / 2)
    assert found["stderr"] == pytest.approx(abs(a - b) / 2)
    assert found["seeds"] == 2
    assert found["published_mean"] == 80.7


@pytest.mark.filterwarnings("error")
def test_the_average_is_over_the_seven_kinds_beside_the_papers():
    values = measured()
    table = against_paper(values, TABLE, methods=METHODS)
    assert {c for c in table["category"] if c.startswith("average")} == {"average_all"}
    found = cell(table, "cutpaste_3way", "average_all")
    mine = values[values["method"] == "cutpaste_3way"]["image_auroc"].mean()
    assert found["mean"] == pytest.approx(mine)
    assert found["published_mean"] == 98.3


def test_the_rows_stand_in_the_papers_order():
    order = published(TABLE).query("method == 'cutout'")["category"].tolist()
    assert order == [*SYNTHETIC, "average_all"]
    assert wide(against_paper(measured(), TABLE, methods=METHODS)).index.tolist() == order


def test_a_seed_that_lacks_a_source_is_not_averaged_over_the_rest():
    values = measured(seeds=1)
    gone = (values["method"] == "cutout") & (values["source"] == "wood")
    table = against_paper(values[~gone], TABLE, methods=METHODS)
    assert np.isnan(cell(table, "cutout", "square_color")["mean"])
    assert cell(table, "cutout", "square_color")["published_mean"] == 90.6
    assert cell(table, "untrained", "square_color")["mean"] > 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sources", [DEMO_OBJECTS, ()])
def test_other_pictures_stand_beside_no_published_number(sources):
    table = against_paper(measured(sources), TABLE, methods=METHODS)
    assert table["published_mean"].isna().all()
    assert len(table) == (8 * len(METHODS) if sources else 0)

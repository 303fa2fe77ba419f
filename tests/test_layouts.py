"""Other data sets as their archives unpack: made folders in the layouts of VisA, BTAD and MPDD."""

import csv

import numpy as np
import pytest
from PIL import Image

from cplib import runs
from cplib.config import Run
from cplib.data import DataError, categories, load
from cplib.layouts import VISA
from cplib.workspace import open_workspace

LEFT = np.zeros((12, 10), np.uint8)
LEFT[:, :5] = 255


def write(path, pixels=None, format=None):
    """A picture at a path, of noise that depends on the path unless pixels are given."""
    if pixels is None:
        random = np.random.default_rng(list(str(path.parts[-3:]).encode()))
        pixels = random.integers(0, 256, (12, 10, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format)


# VisA: folders by normal and anomalous, the splits in a table, masks that number the defects


def write_table(root, rows, header=("object", "split", "label", "image", "mask")):
    (root / VISA).parent.mkdir(parents=True, exist_ok=True)
    with (root / VISA).open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def visa(tmp_path):
    """Two objects: three normal pictures to train on, two and two anomalous ones to test on."""
    root, rows = tmp_path / "VisA", []
    for name in ("candle", "pcb1"):
        images, masks = f"{name}/Data/Images", f"{name}/Data/Masks/Anomaly"
        for i in (4, 0, 3, 1, 2):  # the table is in no order
            image = f"{images}/Normal/{i:04d}.JPG"
            write(root / image, format="JPEG")
            rows.append([name, "train" if i < 3 else "test", "normal", image, ""])
        for i in (1, 0):
            image, mask = f"{images}/Anomaly/{i:03d}.JPG", f"{masks}/{i:03d}.png"
            write(root / image, format="JPEG")
            write(root / mask, (LEFT > 0).astype(np.uint8) * (1 + 2 * i))
            rows.append([name, "test", "anomaly", image, mask])
        (root / name / "image_anno.csv").write_text("image,label,mask\n")
    write_table(root, rows)
    (root / "LICENSE-DATASET").write_text("CC BY 4.0")
    return root


def test_visa_has_its_objects(visa):
    assert categories(visa) == ["candle", "pcb1"]


def test_visas_splits_are_those_of_the_table(visa):
    train = load(visa, "candle", "train", (12, 10))
    assert train.names == tuple(f"Data/Images/Normal/{i:04d}.JPG" for i in range(3))
    assert train.kinds == ("good",) * 3
    assert train.masks is None
    test = load(visa, "candle", "test", (12, 10))
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert test.kinds == ("good", "good", "anomaly", "anomaly")
    normal = [f"Data/Images/Normal/{i:04d}.JPG" for i in (3, 4)]
    assert test.names == (*normal, "Data/Images/Anomaly/000.JPG", "Data/Images/Anomaly/001.JPG")


def test_visas_masks_are_whatever_is_not_zero(visa):
    masks = load(visa, "pcb1", "test", (12, 10)).masks
    assert not masks[:2].any()
    assert masks[2:, :, :5].all()
    assert not masks[2:, :, 5:].any()


def test_visa_relabelled_is_not_what_was_cached(visa):
    before = load(visa, "candle", "test", 8)
    (visa / VISA).write_text((visa / VISA).read_text().replace("anomaly", "melted"))
    assert before.kinds[-1] == "anomaly"
    assert load(visa, "candle", "test", 8).kinds[-1] == "melted"


def test_visa_with_the_tables_of_excel(visa):
    text = (visa / VISA).read_text()
    (visa / VISA).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert len(load(visa, "candle", "train", 8)) == 3


def test_what_visa_lacks_is_named(visa):
    with pytest.raises(DataError, match="no category 'wick'; expected one of candle, pcb1"):
        load(visa, "wick", "train")
    with pytest.raises(DataError, match="no split 'val'"):
        load(visa, "candle", "val")
    (visa / "candle/Data/Images/Normal/0001.JPG").unlink()
    with pytest.raises(DataError, match="0001.JPG"):
        load(visa, "candle", "train")


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (["candle", "train", "normal", "../secret.png", ""], "../secret.png"),
        (["candle", "train", "normal", "candle/../../secret.png", ""], "secret.png"),
        (["candle", "train", "normal", "/secret.png", ""], "/secret.png"),
        (["candle", "train", "normal", "pcb1/Data/Images/Normal/0000.JPG", ""], "pcb1"),
        (["candle", "train", "normal", "", ""], "''"),
        (["candle", "train", "normal"], "too short"),
        (["candle", "train", "normal", "candle/a\nb.JPG", ""], "on one line"),
    ],
)
def test_a_row_that_leaves_its_object_is_refused(visa, row, named):
    write_table(visa, [row])
    with pytest.raises(DataError, match="expected") as caught:
        load(visa, "candle", "train")
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_visas_masks_belong_to_every_anomaly_or_to_none(visa):
    text = (visa / VISA).read_text()
    (visa / VISA).write_text(text.replace("candle/Data/Masks/Anomaly/001.png", ""))
    with pytest.raises(DataError, match="expected the mask of .*001.JPG"):
        load(visa, "candle", "test")
    (visa / VISA).write_text(
        text.replace("candle/Data/Masks/Anomaly/001.png", "").replace(
            "candle/Data/Masks/Anomaly/000.png", ""
        )
    )
    assert load(visa, "candle", "test", 8).masks is None


@pytest.mark.parametrize(
    "content",
    [b"object,split\n1,2\n", b"\xff\xfe\x00", bytes(99)],
    ids=["other", "utf-16", "zeros"],
)
def test_a_table_that_is_none_is_refused(visa, content):
    (visa / VISA).write_bytes(content)
    with pytest.raises(DataError, match="1cls.csv") as caught:
        categories(visa)
    assert "object,split,label,image,mask" in str(caught.value)


# BTAD: "ok" and "ko", BMP and PNG, masks by the picture's own name


@pytest.fixture
def btad(tmp_path):
    """Three products; the second is in PNG, the masks of the first two as well."""
    root = tmp_path / "BTech_Dataset_transformed"
    for product, suffix, of_mask in (
        ("01", "bmp", "png"),
        ("02", "png", "png"),
        ("03", "bmp", "bmp"),
    ):
        for i in range(2):
            write(root / product / f"train/ok/{i:04d}.{suffix}")
            write(root / product / f"test/ok/{i:04d}.{suffix}")
            write(root / product / f"test/ko/{i:04d}.{suffix}")
            write(root / product / f"ground_truth/ko/{i:04d}.{of_mask}", LEFT)
    return root


def test_btad_has_three_products(btad):
    assert categories(btad) == ["01", "02", "03"]


@pytest.mark.parametrize(("product", "suffix"), [("01", "bmp"), ("02", "png"), ("03", "bmp")])
def test_btads_ok_is_good_and_ko_a_defect(btad, product, suffix):
    train = load(btad, product, "train", 8)
    assert train.names == (f"train/ok/0000.{suffix}", f"train/ok/0001.{suffix}")
    assert train.kinds == ("good", "good")
    test = load(btad, product, "test", (12, 10))
    assert test.kinds == ("good", "good", "ko", "ko")
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert test.names[1:3] == (f"test/ok/0001.{suffix}", f"test/ko/0000.{suffix}")
    assert test.masks[2:, :, :5].all()
    assert not test.masks[2:, :, 5:].any()
    assert not test.masks[:2].any()


def test_a_mask_that_btad_lacks_is_named(btad):
    (btad / "03/ground_truth/ko/0001.bmp").unlink()
    with pytest.raises(DataError, match="expected the mask of .*0001.bmp"):
        load(btad, "03", "test")


def test_a_run_on_btad_is_recorded_with_the_products_name(btad, tmp_path):
    run = Run(method="untrained", category="01", size=32, updates=0)
    runs.execute(run, data_root=btad, results=tmp_path / "results")
    table = runs.collect(tmp_path / "results")
    assert table["category"].tolist() == ["01"]
    assert table["image_auroc"].notna().all()


# MPDD: MVTec AD's layout, names of its own


@pytest.fixture
def mpdd(tmp_path):
    """Two of the six parts, with their kinds of defects."""
    root = tmp_path / "MPDD"
    parts = {
        "bracket_brown": ("bend_and_parts_mismatch", "parts_mismatch"),
        "tubes": ("anomalous",),
    }
    for part, kinds in parts.items():
        for i in range(2):
            write(root / part / f"train/good/{i:03d}.png")
            write(root / part / f"test/good/{i:03d}.png")
            for kind in kinds:
                write(root / part / f"test/{kind}/{i:03d}.png")
                write(root / part / f"ground_truth/{kind}/{i:03d}_mask.png", LEFT)
    return root


def test_mpdd_is_read_as_mvtec_is(mpdd):
    assert categories(mpdd) == ["bracket_brown", "tubes"]
    test = load(mpdd, "bracket_brown", "test", (12, 10))
    bent, other = "bend_and_parts_mismatch", "parts_mismatch"
    assert test.kinds == ("good", "good", bent, bent, other, other)
    assert test.masks[2:, :, :5].all()
    assert not test.masks[:2].any()
    assert len(load(mpdd, "tubes", "train", 8)) == 2


# All of them


def test_a_workspace_takes_a_sets_own_categories(visa, btad, mpdd, tmp_path):
    expected = {
        visa: ("candle", "pcb1"),
        btad: ("01", "02", "03"),
        mpdd: ("bracket_brown", "tubes"),
    }
    for root, names in expected.items():
        workspace = open_workspace("quick", data_root=str(root), results=str(tmp_path / "results"))
        assert workspace.categories == names

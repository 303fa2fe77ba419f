"""One style for every figure, saved by name."""

import zlib
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from cplib.augment import METHODS, example_batch
from cplib.datasets import DEMO, MVTEC, atomic
from cplib.study.claims import IMAGES, OURS
from cplib.study.tables import NAMES

# Seaborn's colour-blind palette without what cannot be read on white, and without its grey.
PALETTE = [c for i, c in enumerate(sns.color_palette("colorblind")) if i not in (6, 7, 8)]
_MEASURED = ("tile", "bottle", "pill", "screw", "transistor", "grid", "toothbrush")  # kept apart
_MARKED = {name: i for i, name in enumerate(DEMO.categories)}
_MARKED |= {name: i for i, name in enumerate(dict.fromkeys((*_MEASURED, *MVTEC.categories)))}
_COLOURED = (
    *("cutpaste_3way", "cutout", "cutpaste", "scar", "cutpaste_scar", "rotation"),
    *("cutpaste_union", "cutout_mean", "cutout_color"),
)


def _colour(i: int) -> tuple[float, float, float]:
    """The i-th of seven colours, then the same ones darker."""
    shade = 1 if i % 14 < 7 else 0.55
    return tuple(shade * v for v in PALETTE[i % 7])


def mark(category: str) -> dict:
    """Colour and marker of a category, the same in every figure; of an unknown one by its name."""
    i = _MARKED.get(category, zlib.crc32(category.encode()))
    return {"color": _colour(i), "marker": "os^vD<>P*X"[i % 10]}


def method_colour(method: str):
    """Colour of a method, the same in every figure: greys for what is not trained."""
    known = {"untrained": "0.65", "pretrained": "0.35"}
    known |= {name: _colour(i) for i, name in enumerate(_COLOURED)}
    return known.get(method, "black")


def use_style() -> None:
    """The companion's look: seaborn's colour-blind palette, light grid, small type.

    In a notebook figures are JPEG: photographs as PNG would make megabytes.
    """
    from IPython import get_ipython  # here: the command line needs none of it
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    if get_ipython():
        set_matplotlib_formats("jpeg", pil_kwargs={"quality": 90})
    plt.rcdefaults()  # whatever a person's own matplotlibrc says
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
    plt.rcParams.update(
        {
            "figure.constrained_layout.use": True,
            "figure.dpi": 100,
            "savefig.dpi": 80,
            "image.cmap": "viridis",
            "svg.hashsalt": "cplib",
        }
    )


def save_figure(fig: Figure, results: str | Path, name: str) -> Path:
    """Write ``results/figures/<name>.png`` and ``.pdf``; returns the image's path."""
    folder = Path(results) / "figures"
    for kind, note in (("pdf", "CreationDate"), ("png", "Software")):
        with atomic(path := folder / f"{name}.{kind}") as part:
            fig.savefig(part, format=kind, metadata={note: None})
    return path


def overlay(image, heat, limits: tuple[float, float], strength: float = 0.6):
    """An image (3, H, W), uint8, with its anomaly map (H, W) laid over it: (H, W, 3) in [0, 1].

    ``limits`` are the scores shown as cold and hot; where it is cold the image stays as it is.
    """
    level = ((heat - limits[0]) / max(limits[1] - limits[0], 1e-12)).clip(0, 1)
    colour = plt.get_cmap("inferno")(level.numpy())[..., :3]
    weight = strength * level.numpy()[..., None]
    return image.permute(1, 2, 0).numpy() / 255 * (1 - weight) + colour * weight


def image_grid(
    rows: dict[str, list], titles: list[str] | None = None, side: float = 1.25
) -> Figure:
    """Images in labelled rows; each is (3, H, W), (H, W, 3) or (H, W), uint8 or in [0, 1].

    ``titles`` stand above the columns; ``side`` is an image's width in inches.
    """
    columns = max(map(len, rows.values()))
    size = (side * columns + 0.8, side * len(rows) + (0.3 if titles else 0))
    fig, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for ax in line:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for ax, image in zip(line, images, strict=False):
            first = image.ndim == 3 and image.shape[0] == 3
            ax.imshow(image.permute(1, 2, 0) if first else image, cmap="gray")
    for ax, title in zip(axes[0], titles or [], strict=False):
        ax.set_title(title, fontsize="small")
    return fig


# Fig. 3's colours, each with a marker of its own for those who see no colour. Normal points are
# small and lie on top: a pasted copy that the features hardly move lies on its original.
GROUP_MARKS = {
    "normal": {"marker": "o", "facecolor": "C0", "edgecolor": "none", "s": 20, "zorder": 3},
    "anomaly": {"marker": "x", "facecolor": "C3", "s": 26},
    "cutpaste": {"marker": "^", "facecolor": "none", "edgecolor": "C2", "s": 34},
    "cutpaste_scar": {"marker": "s", "facecolor": "none", "edgecolor": "0.3", "s": 44},
}


def scatter(ax: Axes, groups: dict[str, list]) -> None:
    """Groups of points [[x, ...], [y, ...]] as Fig. 3 marks them, named, without ticks."""
    for group, points in groups.items():
        ax.scatter(*points, **GROUP_MARKS[group], label=IMAGES[group], linewidth=1.2)
    ax.set(xticks=[], yticks=[])


ANSWER_MARKS = {  # of a claim's answer here, in the order in which they are shown
    "yes": {"marker": "o", "color": "C2", "ms": 8},
    "yes, but a baseline, too": {"marker": "P", "color": "C0", "ms": 8},
    "no": {"marker": "X", "color": "C3", "ms": 8},
    "open": {"marker": "s", "color": "0.35", "ms": 7},
    "one seed": {"marker": "o", "color": "0.35", "ms": 5},
    "not measured": {"color": "none"},
}
PAPER_MARK = {"marker": "D", "mfc": "none", "mec": "black", "color": "black", "ms": 5, "lw": 1}
MARGIN_MARK = {"marker": "|", "color": "black", "ms": 12, "mew": 1.5}


def forest(table, limit: float = 40.0) -> Figure:
    """The claims, as ``study.claims`` judges them: effects with intervals, by the answer here.

    A heading counts the paper's claims and, apart from them, ours; these are marked. Percentage
    points; an arrow points to what is beyond ``limit`` on either side.
    """
    parts = {answer: table[table["here"] == answer] for answer in ANSWER_MARKS}
    parts = {answer: part for answer, part in parts.items() if len(part)}
    if len(parts) > 1:
        parts.pop("not measured", None)
    heights = [len(part) + 0.6 for part in parts.values()]
    size = (11, 0.4 * sum(heights) + 1)
    options = {"sharex": True, "squeeze": False, "height_ratios": heights}
    fig, axes = plt.subplots(len(parts), figsize=size, **options)
    for ax, (answer, part) in zip(axes[:, 0], parts.items(), strict=True):
        ours = part["source"] == OURS
        head = f"{answer.capitalize()}: {(~ours).sum()}"
        head += f", and {ours.sum()} {OURS.lower()}" if any(ours) else ""
        ax.set_title(head, loc="left", weight="bold", pad=5)
        ax.set(xlim=(-limit - 2, limit + 2), ylim=(len(part) - 0.5, -0.5))
        names = part["claim"].mask(ours, part["claim"].str.rstrip(".") + f" ({OURS.lower()})")
        ax.set_yticks(range(len(part)), [fill(name, 60) for name in names], fontsize="small")
        ax.axvline(0, color="black", lw=1)
        ax.grid(False, axis="y")
        for y, row in enumerate(part.itertuples()):
            _forest_row(ax, y, row, limit)
    ax.set_xlabel("difference in AUROC, percentage points")
    named = {"paper_effect": "the paper's difference", "margin": "margin"}
    looks = (PAPER_MARK, MARGIN_MARK)
    marks = [
        Line2D([], [], label=name, ls="", **look)
        for (column, name), look in zip(named.items(), looks, strict=True)
        if table[column].notna().any()
    ]
    if marks:
        fig.legend(handles=marks, loc="outside upper right", ncols=2, fontsize="small")
    return fig


def _forest_row(ax, y: int, row, limit: float) -> None:
    """One claim: our effect, its interval and the margin, and the paper's effect a little below."""
    mark = ANSWER_MARKS[row.here]
    ends = np.clip([row.here_low, row.here_high], -limit, limit)
    ax.plot(ends, [y, y], color=mark["color"], lw=2, solid_capstyle="butt")
    for end, arrow in ((-limit, "<"), (limit, ">")):
        if end in ends or abs(row.effect) > limit and row.effect * end > 0:
            ax.plot(1.02 * end, y, arrow, color=mark["color"], ms=7)
    ax.plot(np.clip(row.effect, -limit, limit), y, **mark)
    ax.plot(row.margin, y, **MARGIN_MARK)
    ax.plot([row.paper_low, row.paper_high], 2 * [y + 0.25], color="black", lw=1)
    ax.plot(row.paper_effect, y + 0.25, **PAPER_MARK)


def dot_plot(grid, names: dict[str, str] = NAMES) -> Figure:
    """Image AUROC of methods: a mark a category, a line for their mean.

    ``grid`` has a row a category and a column a method, as ``report.common`` gives it.
    """
    fig, ax = plt.subplots(figsize=(1.2 * grid.shape[1] + 3, 3.6))
    shifts = np.linspace(-0.25, 0.25, len(grid)) if len(grid) > 1 else [0.0]
    for shift, (category, row) in zip(shifts, grid.iterrows(), strict=True):
        x = np.arange(len(row)) + shift
        ax.plot(x, row, ls="", ms=7, label=category, clip_on=False, **mark(category))
    ax.plot(range(grid.shape[1]), grid.mean(), "_", color="black", ms=36, mew=2, zorder=1)
    ax.plot([], [], color="black", lw=2, label="mean")
    ax.axhline(50, color="0.3", lw=1, ls="--", label="chance")
    ax.set_xticks(range(grid.shape[1]), [names.get(m, m) for m in grid], rotation=20, ha="right")
    ax.set(ylabel="image AUROC, %", xlim=(-0.5, grid.shape[1] - 0.5), ylim=(None, 102))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return fig


def class_rows(x: Tensor, methods: tuple[str, ...], options: dict) -> dict[str, list]:
    """Normal images (B, 3, H, W) in [0, 1], then a row for each class that methods make of them.

    A class of several methods has one row. ``options`` are those of ``augment.example_batch``.
    """
    rows = {"normal": list(x)}
    for seed, method in enumerate(methods):
        images, _ = example_batch(x, method, options, seed)
        classes = [name for name in METHODS[method] if name != "normal"]
        for name, part in zip(classes, images.split(len(x))[1:], strict=True):
            rows.setdefault(NAMES[method if len(classes) == 1 else name], list(part))
    return rows


def close_up(image: Tensor, normal: Tensor) -> Tensor:
    """The part (3, H/4, W/4) of an image (3, H, W) around what differs from its normal original."""
    shape = image.shape[1:]
    middle = (image != normal).any(0).nonzero().double().mean(0).round().int().tolist()
    rows, columns = (
        slice(start := min(max(at - side // 8, 0), side - side // 4), start + side // 4)
        for at, side in zip(middle, shape, strict=True)
    )
    return image[:, rows, columns]


def every_category(table) -> Figure:
    """Table 1 at a glance: a mark for each method of ``SUMMARY`` in each category and on average.

    ``table`` is Table 1, tidy. A vertical line is the standard error over seeds. The last column is
    the mean of the categories to its left. The paper's CutPaste-3way stands where the paper has
    numbers for these categories.
    """
    points = summary(table)
    fig, ax = plt.subplots(figsize=(11, 4.4))
    places = {name: i for i, name in enumerate(dict.fromkeys(points["category"]))}
    for shift, (label, (_, _, look)) in zip(
        np.linspace(-0.2, 0.2, 4), SUMMARY.items(), strict=True
    ):
        part = points[points["label"] == label]
        if len(part):
            x = [places[name] + shift for name in part["category"]]
            ax.errorbar(x, part["value"], part["error"], fmt="none", ecolor="0.5", lw=1.5)
            ax.plot(x, part["value"], ls="", ms=12, mew=2, label=label, clip_on=False, **look)
    ax.set_xticks(range(len(places)), [name.replace("_", " ") for name in places], fontsize=14)
    ax.axvline(len(places) - 1.5, color="0.6", lw=1)
    ax.axhline(50, color="0.5", lw=1, ls="--")
    ax.text(len(places) - 0.5, 50.5, "chance", color="0.4", fontsize=13, ha="right", va="bottom")
    ax.set(ylim=(min(48, points["value"].min() - 2), 102), xlim=(-0.5, len(places) - 0.5))
    ax.set_ylabel("image AUROC, %", fontsize=14)
    ax.tick_params(axis="y", labelsize=14)
    ax.grid(False, axis="x")
    fig.legend(loc="outside upper center", ncols=4, fontsize=13, frameon=False)
    return fig


SUMMARY = {  # label: method, whose number, how it is drawn
    "CutPaste-3way, the paper": (
        *("cutpaste_3way", "published_mean"),
        {"marker": "D", "mfc": "white", "mec": "black"},
    ),
    "CutPaste-3way, ours": (*("cutpaste_3way", "mean"), {"marker": "o", "color": "C0"}),
    "ImageNet features": (*("pretrained", "mean"), {"marker": "s", "color": "0.35"}),
    "random network": (*("untrained", "mean"), {"marker": "X", "color": "0.65"}),
}


def summary(table):
    """The points of ``every_category``: label, category, value and standard error in percent.

    Categories are those that we measured with CutPaste-3way. "mean" averages a label's numbers and
    is there only where the label has one in every category.
    """
    cells = table[(table["metric"] == "image_auroc") & ~table["category"].str.startswith("average")]
    ours = cells[(cells["method"] == "cutpaste_3way") & cells["mean"].notna()]["category"]
    parts = []
    for label, (method, column, _) in SUMMARY.items():
        part = cells[(cells["method"] == method) & cells["category"].isin(ours)]
        columns = {column: "value", column.replace("mean", "stderr"): "error"}
        part = part[["category", *columns]].rename(columns=columns).dropna(subset="value")
        if 0 < len(part) == len(ours):
            mean = part[["value", "error"]].mean(skipna=False).to_dict() | {"category": "mean"}
            part = pd.concat([part, pd.DataFrame([mean])])
        parts.append(part.assign(label=label))
    return pd.concat(parts, ignore_index=True)


def pipeline(normal, scar, image, heat, windows, scores) -> Figure:
    """The method in one figure: training above, scoring below.

    ``normal`` and ``image`` are (3, H, W), uint8: a training image and a test image; ``scar`` is
    the former's CutPaste-scar copy, in [0, 1]. ``heat`` is the test image under its anomaly map
    (H, W, 3), ``windows`` the scores of its windows (rows, columns), ``scores`` the image-level
    scores of normal test images, of anomalous ones, and of this one.
    """
    side = normal.shape[-1]
    size, cut, paste = (round(side * share) for share in (0.3, 0.12, 0.55))
    pasted = normal.clone()
    left, right = slice(cut, cut + size), slice(paste, paste + size)
    pasted[:, left, right] = normal[:, right, left]
    fig = plt.figure(figsize=(11.1, 4.6))
    fig.set_layout_engine("none")
    _panel(fig, 0, 0, "normal image", normal)
    _outline(_panel(fig, 1, 0, "cut a patch", normal), cut, paste, size)
    _outline(_panel(fig, 2, 0, "paste it", pasted, arrow=False), paste, cut, size)
    closer = close_up((255 * scar).round().to(normal.dtype), normal)
    _panel(fig, 3, 0, "or a scar (closer)", closer)
    _say(_panel(fig, 4, 0, "train"), 0.5, 0.5, "network")
    _say(_panel(fig, 5, 0, "which of three?", arrow=False), 0.5, 0.5, "normal\npatch\nscar")
    _panel(fig, 0, 1, "new image", image)
    _say(_panel(fig, 1, 1, "features"), 0.5, 0.5, "same\nnetwork")
    _distances(_panel(fig, 2, 1, "distance from normal = score", arrow=False), *scores)
    _panel(fig, 4, 1, "score per window", windows)
    _panel(fig, 5, 1, "anomaly map", heat, arrow=False)
    look = {"fontsize": 15, "weight": "bold", "rotation": 90, "va": "center", "ha": "center"}
    fig.text(0.012, 0.71, "training", **look)
    fig.text(0.012, 0.22, "scoring", **look)
    return fig


def _panel(fig, column: int, row: int, title: str, image=None, *, arrow: bool = True) -> Axes:
    """A square of ``pipeline``, grey without an image, with an arrow to the next one."""
    ax = fig.add_axes((0.035 + column * 0.163, 0.53 - 0.49 * row, 0.136, 0.37))
    ax.set(xticks=[], yticks=[], box_aspect=1, facecolor="0.94")
    ax.set_title(title, fontsize=14, pad=5)
    if image is not None:
        first = image.ndim == 3 and image.shape[0] == 3
        ax.imshow(image.permute(1, 2, 0) if first else image)
    if arrow:
        style = {"arrowstyle": "-|>", "lw": 1.8, "color": "0.25", "mutation_scale": 16}
        ends = {"xycoords": "axes fraction", "textcoords": "axes fraction"}
        ax.annotate("", (1.19, 0.5), (1.01, 0.5), arrowprops=style, **ends)
    return ax


def _outline(ax: Axes, x: float, y: float, size: float) -> None:
    ax.add_patch(plt.Rectangle((x, y), size, size, fill=False, ec="white", lw=2))


def _say(ax: Axes, x: float, y: float, text: str, **look) -> None:
    ax.text(x, y, text, fontsize=14, ha="center", va="center", transform=ax.transAxes, **look)


def _distances(ax: Axes, good, bad, this: float) -> None:
    """Scores of normal and of anomalous images, and of one image, in a panel of two's width."""
    ax.set(position=(0.361, 0.04, 0.299, 0.37), box_aspect=None, facecolor="white")
    good, bad, this = np.log10(good), np.log10(bad), np.log10(this)
    ends = np.percentile([*good, *bad, this], (0, 100))
    for values, colour, name, y in ((good, "C0", "normal", 0.92), (bad, "C3", "defects", 0.78)):
        ax.hist(values, np.linspace(*ends, 30), color=colour, alpha=0.7)
        x = np.clip((np.median(values) - ends[0]) / np.ptp(ends), 0.14, 0.86)
        _say(ax, x, y, name, color=colour, weight="bold")
    ax.axvline(this, color="black", lw=2, ls="--")
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    x = np.clip((this - ends[0]) / np.ptp(ends), 0.2, 0.75)
    _say(ax, x, 0.62, "new image", bbox=white)
    ax.set_ylim(0, 1.5 * ax.get_ylim()[1])
    ax.grid(False)

"""One style for every figure, saved by name."""

from pathlib import Path

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure

NAMES = {
    "untrained": "untrained",
    "pretrained": "ImageNet features",
    "rotation": "Rotation",
    "cutout": "Cutout",
    "cutout_mean": "Cutout (mean)",
    "cutout_color": "Cutout (random colour)",
    "scar": "Scar",
    "confetti": "Confetti",
    "cutpaste": "CutPaste",
    "cutpaste_scar": "CutPaste-scar",
    "cutpaste_union": "Binary (union)",
    "cutpaste_3way": "CutPaste-3way",
    "cutpaste_3way_patch": "CutPaste-3way (patch)",
    "cutpaste_3way_gradcam": "CutPaste-3way (GradCAM)",
    "ensemble": "Ensemble",
    "docc": "DOCC (quoted)",
    "u_student": "U-Student (quoted)",
    "p_svdd": "P-SVDD (quoted)",
    "fcdd": "FCDD (quoted)",
}


def use_style() -> None:
    """The companion's look: seaborn's colour-blind palette, light grid, small type."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
    plt.rcParams.update(
        {
            "figure.constrained_layout.use": True,
            "figure.dpi": 60,
            "savefig.dpi": 110,
            "image.cmap": "viridis",
            "svg.hashsalt": "cplib",
        }
    )


def save_figure(fig: Figure, results: str | Path, name: str) -> Path:
    """Write ``results/figures/<name>.png`` and ``.pdf``; returns the picture's path."""
    folder = Path(results) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    fig.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    fig.savefig(folder / f"{name}.png", metadata={"Software": None})
    return folder / f"{name}.png"


def overlay(picture, heat, limits: tuple[float, float], strength: float = 0.6):
    """A picture (3, H, W), uint8, with its heat map (H, W) laid over it: (H, W, 3) in [0, 1].

    ``limits`` are the scores shown as cold and hot; where it is cold the picture stays as it is.
    """
    level = ((heat - limits[0]) / max(limits[1] - limits[0], 1e-12)).clip(0, 1)
    colour = plt.get_cmap("inferno")(level.numpy())[..., :3]
    weight = strength * level.numpy()[..., None]
    return picture.permute(1, 2, 0).numpy() / 255 * (1 - weight) + colour * weight


def image_grid(
    rows: dict[str, list], titles: list[str] | None = None, side: float = 1.25
) -> Figure:
    """Pictures in labelled rows; each is (3, H, W), (H, W, 3) or (H, W), uint8 or in [0, 1].

    ``titles`` stand above the columns; ``side`` is a picture's width in inches.
    """
    columns = max(map(len, rows.values()))
    size = (side * columns + 0.8, side * len(rows) + (0.3 if titles else 0))
    fig, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for line, (label, pictures) in zip(axes, rows.items(), strict=True):
        for ax in line:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for ax, picture in zip(line, pictures, strict=False):
            first = picture.ndim == 3 and picture.shape[0] == 3
            ax.imshow(picture.permute(1, 2, 0) if first else picture, cmap="gray")
    for ax, title in zip(axes[0], titles or [], strict=False):
        ax.set_title(title, fontsize="small")
    return fig

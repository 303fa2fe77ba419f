"""``Run``: one experiment, whole. Its defaults are the paper's protocol."""

import hashlib
import json
from dataclasses import asdict, replace
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

from cplib.augment import METHODS
from cplib.datasets import DATASETS

BASELINES = ("untrained", "pretrained")  # nothing is trained: random and ImageNet features
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
Sides = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]  # in pixels
Range = tuple[float, float]  # from the smallest to the largest value
Share = Annotated[float, Field(ge=0, le=1)]
# Fields of scoring alone: runs that differ only in these share one trained network.
SCORING = (
    "l2_normalise",
    "reg_covar",
    "window",
    "levels",
    "stride",
    "gaussians",
    "heat_std",
    "curve",
)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Run:
    """One experiment. The defaults are the paper's protocol and never change their meaning.

    Lengths of scars and confetti are in pixels of a 256-pixel image and scale with ``size``. Where
    the paper does not give a value (translate, jitter, head, reg_covar, aspect), the default is
    our choice. A list is read as a tuple, and 0 as 0.0. Raises ValueError for a value that is not
    allowed.
    """

    method: Literal[(*BASELINES, *METHODS)]
    category: str
    seed: NonNegativeInt = 0
    dataset: Literal[tuple(DATASETS)] = "mvtec"
    size: Annotated[int, Field(ge=8)] = 256  # pixels, both sides (A.1)
    pad: bool = False  # own images keep their shape: fitted into the square, edges repeated
    updates: NonNegativeInt = 65_536  # 256 "epochs" of 256 updates (A.1, footnote 5)
    sources: PositiveInt = 32  # normal images in a batch: 64 or 96 images with their copies (A.1)
    learning_rate: float = 0.03
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9  # of SGD
    weight_decay: float = 3e-5
    warmup: float = 0.0  # share of the updates in which the learning rate climbs from 0
    # Side in pixels of the crops trained on (4.2: 64); 0: whole images; several sides: in turn.
    crop: NonNegativeInt | Sides = 0
    backbone: Literal["resnet18", "resnet18_quarter", "efficientnet_b4", "efficientnet_lite0"] = (
        "resnet18"
    )
    init: Literal["random", "imagenet"] = "random"
    head_updates: NonNegativeInt = 0  # first updates, which train the head alone (A.4)
    head_learning_rate: float = 0.03  # constant in these (A.4)
    freeze_batchnorm: bool = False  # keep the backbone's BatchNorm as the initialisation has it
    head: tuple[int, ...] = (512, 128)  # hidden widths of the projection head
    head_batchnorm: bool = True  # after each hidden layer
    translate: float = 0.125  # largest shift of every image, a share of its side
    jitter: tuple[Share, Share, Share, Share] = (0.1, 0.1, 0.1, 0.0)  # see augment.jitter
    area: Range = (0.02, 0.15)  # of the patch, a share of the image (A.2)
    aspect: Range = (0.3, 3.3)  # drawn evenly from below or above one (A.2)
    scar_width: Range = (2.0, 16.0)
    scar_length: Range = (10.0, 25.0)
    scar_angle: float = 45.0  # degrees either way
    patch_jitter: Share = 0.1  # of what is pasted (A.2)
    confetti_side: Range = (9.0, 62.0)  # of Table 4's confetti, 8 to 54 of 224 in FCDD
    confetti_blur: float = 5.7  # standard deviation; 5 of 224 in FCDD
    l2_normalise: bool = False  # features of length one, as in the authors' earlier code
    reg_covar: float = 1e-6  # added to the covariance's diagonal
    window: NonNegativeInt = 0  # side in pixels of the windows that are scored (A.5: 32); 0: none
    stride: PositiveInt = 4  # pixels from one window to the next (A.5)
    levels: tuple[int, ...] = ()  # of an EfficientNet: score every cell of these feature maps
    gaussians: Literal["auto", "position", "shared"] = "auto"  # see per_position
    heat_std: float = 10.0  # of the upsampling kernel, in pixels (FCDD's)
    curve: NonNegativeInt = 0  # points of training at which the test AUROC is noted
    precision: Literal[PRECISIONS] = "auto"  # of training; "auto": the machine's best

    def __post_init__(self):
        """Refuse fields that contradict each other."""
        if self.levels and (self.window or not self.backbone.startswith("efficientnet")):
            raise ValueError("levels need an EfficientNet, and no window beside them")
        if self.freeze_batchnorm and self.init == "random":
            raise ValueError(
                "freeze_batchnorm needs init='imagenet': random statistics say nothing"
            )

    @classmethod
    def from_dict(cls, values: dict) -> "Run":
        """The run with these fields. Raises ValueError, one line that names the first wrong one."""
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"{part}: " for part in first["loc"])
            raise ValueError(where + first["msg"].removeprefix("Value error, ")) from None

    @property
    def id(self) -> str:
        """Method, category, seed, and a short hash of the fields that differ from their defaults.

        A field that is added later, with the old behaviour as its default, changes no id.
        """
        changed = {k: v for k, v in asdict(self).items() if v != getattr(Run, k, None)}
        digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
        return f"{self.method}-{self.category}-seed{self.seed}-{digest[:8]}"

    @property
    def training_id(self) -> str:
        """The id without the fields of scoring: runs that share it share one trained network."""
        return replace(self, **{name: getattr(Run, name) for name in SCORING}).id

    @property
    def stream(self) -> int:
        """The seed of the run's random numbers: each method and category has its own."""
        text = f"{self.seed}/{self.method}/{self.category}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides in pixels of the crops that updates use in turn; 0: a whole image."""
        return (self.crop,) if isinstance(self.crop, int) else self.crop

    @property
    def per_position(self) -> bool:
        """Whether each place has its own Gaussian, or all places share one.

        With "auto", each place of an aligned object has its own (A.5).
        """
        return self.gaussians == "position" or (
            self.gaussians == "auto" and self.category in DATASETS[self.dataset].aligned
        )

    @property
    def dense(self) -> bool:
        """Whether every place of an image is scored, not the image as a whole."""
        return bool(self.window or self.levels)

    @property
    def needs_training(self) -> bool:
        """Whether the run trains anything."""
        return self.total_updates > 0

    @property
    def total_updates(self) -> int:
        """All updates: those of the head alone (A.4), then the others."""
        return self.head_updates + self.updates

    @property
    def classes(self) -> int:
        """Classes of the pretext task; two where nothing is trained."""
        return len(METHODS.get(self.method, (0, 1)))

    @property
    def images(self) -> int:
        """Number of images that training uses: updates x sources x classes."""
        return self.total_updates * self.sources * self.classes

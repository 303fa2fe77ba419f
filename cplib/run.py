"""``Run``: one experiment, whole. Its defaults are the paper's protocol."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import get_args, get_origin

from cplib.augment import METHODS
from cplib.datasets import DATASETS

BASELINES = ("untrained", "pretrained")  # nothing is trained: random and ImageNet features
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
CHOICES = {
    "method": (*BASELINES, *METHODS),
    "backbone": ("resnet18", "resnet18_quarter", "efficientnet_b4", "efficientnet_lite0"),
    "init": ("random", "imagenet"),
    "optimizer": ("sgd", "adamw"),
    "gaussians": ("auto", "position", "shared"),
    "precision": PRECISIONS,
    "dataset": tuple(DATASETS),
}
LEAST = {"size": 8, "sources": 1, "stride": 1} | dict.fromkeys(
    ("updates", "head_updates", "seed", "curve", "crop", "window"), 0
)
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


def named(name: str, values) -> str:
    """The name and a short hash of the dataclass's fields that differ from their defaults, if any.

    A field that is added later, with the old behaviour as its default, leaves names as they are.
    """
    changed = {k: v for k, v in asdict(values).items() if v != getattr(type(values), k, None)}
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
    return f"{name}-{digest[:8]}" if changed else name


@dataclass(frozen=True, kw_only=True)
class Run:
    """One experiment. The defaults are the paper's protocol and never change their meaning.

    Lengths of scars and confetti are in pixels of a 256-pixel image and scale with ``size``. Where
    the paper is silent (translate, jitter, head, covariance, aspect) the default is our choice.
    ValueError for what cannot be run.
    """

    method: str
    category: str
    seed: int = 0
    dataset: str = "mvtec"  # a name of ``cplib.datasets.DATASETS``
    size: int = 256  # pixels, both sides (A.1)
    pad: bool = False  # own images keep their shape: fitted into the square, edges repeated
    updates: int = 65_536  # 256 "epochs" of 256 updates (A.1, footnote 5)
    sources: int = 32  # normal images a batch: 64 or 96 images with their copies (A.1)
    learning_rate: float = 0.03
    optimizer: str = "sgd"  # or "adamw"
    momentum: float = 0.9  # of SGD
    weight_decay: float = 3e-5
    warmup: float = 0.0  # share of the updates in which the learning rate climbs from 0
    crop: int = 0  # side in pixels of the crops that training looks at (4.2: 64); 0: whole images
    whole: float = 0.0  # share of the updates, the last ones, on whole images in spite of ``crop``
    backbone: str = "resnet18"
    init: str = "random"  # or "imagenet"
    head_updates: int = 0  # before the others, with the encoder left as it is (A.4)
    head_learning_rate: float = 0.03  # constant in those (A.4)
    freeze_batchnorm: bool = False  # keep the backbone's BatchNorm as the initialisation has it
    head: tuple[int, ...] = (512, 128)  # hidden widths of the projection head
    head_batchnorm: bool = True  # after each hidden layer
    translate: float = 0.125  # largest shift of every image, a share of its side
    jitter: tuple[float, ...] = (0.1, 0.1, 0.1, 0.0)  # of every image: see augment.jitter
    area: tuple[float, float] = (0.02, 0.15)  # of the patch, a share of the image (A.2)
    aspect: tuple[float, float] = (0.3, 3.3)  # drawn evenly from below or above one (A.2)
    scar_width: tuple[float, float] = (2, 16)
    scar_length: tuple[float, float] = (10, 25)
    scar_angle: float = 45.0  # degrees either way
    patch_jitter: float = 0.1  # of what is pasted (A.2)
    confetti_side: tuple[float, float] = (9, 62)  # of Table 4's confetti, 8 to 54 of 224 in FCDD
    confetti_blur: float = 5.7  # standard deviation; 5 of 224 in FCDD
    l2_normalise: bool = False  # features of length one, as in the authors' earlier code
    reg_covar: float = 1e-6  # added to the covariance's diagonal
    window: int = 0  # side in pixels of the windows scored, and of their kernel (A.5: 32); 0: whole
    stride: int = 4  # between the windows (A.5)
    levels: tuple[int, ...] = ()  # of an EfficientNet, whose maps' places are scored: no windows
    gaussians: str = "auto"  # "position": one for each place; "shared"; "auto": as in A.5
    heat_std: float = 10.0  # of the upsampling kernel, in pixels (FCDD's)
    curve: int = 0  # updates on the way at which the test AUROC is noted (never used to choose)
    precision: str = "auto"  # of training: fp32, bf16, fp16, or what the machine is best at

    def __post_init__(self):
        """Turn lists into tuples (as JSON gives them) and refuse what cannot be run."""
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is float:  # 0 and 0.0 are one run, with one id
                object.__setattr__(self, f.name, float(value))
            elif isinstance(value, list | tuple) and get_args(f.type):
                kind = get_args(f.type)[0]
                object.__setattr__(self, f.name, tuple(map(kind, value)))
            elif not isinstance(value, get_origin(f.type) or f.type):
                raise ValueError(f"{f.name} cannot be {value!r}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                wanted = ", ".join(allowed)
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: one of {wanted}")
        for name, least in LEAST.items():
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"{name} must be a whole number of at least {least}")
        if self.levels and (self.window or not self.backbone.startswith("efficientnet")):
            raise ValueError("levels need an EfficientNet, and no window beside them")
        if self.freeze_batchnorm and self.init == "random":
            raise ValueError(
                "freeze_batchnorm needs init='imagenet': random statistics say nothing"
            )

    @property
    def id(self) -> str:
        """Readable slug and a short hash of every field that differs from its default."""
        return named(f"{self.method}-{self.category}-seed{self.seed}", self)

    @property
    def training_id(self) -> str:
        """As ``id``, of the fields that training depends on."""
        return replace(self, **{name: getattr(Run, name) for name in SCORING}).id

    @property
    def stream(self) -> int:
        """Seed of the run's random numbers: another for each method and category."""
        text = f"{self.seed}/{self.method}/{self.category}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])

    @property
    def per_position(self) -> bool:
        """Whether the patch model has one Gaussian for each place, or one for all."""
        return self.gaussians == "position" or (
            self.gaussians == "auto" and self.category in DATASETS[self.dataset].aligned
        )

    @classmethod
    def from_dict(cls, values: dict) -> "Run":
        """The run with these fields; ValueError names a field that this version does not know."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r}: written by another version of cplib")
        return cls(**values)

    @property
    def dense(self) -> bool:
        """Whether every place of an image is scored, not the image as a whole."""
        return bool(self.window or self.levels)

    @property
    def needs_training(self) -> bool:
        """Whether anything is trained in the run."""
        return self.total_updates > 0

    @property
    def total_updates(self) -> int:
        """Updates of both phases (A.4), or of the one."""
        return self.head_updates + self.updates

    @property
    def classes(self) -> int:
        """Classes of the pretext task; two where nothing is trained."""
        return len(METHODS.get(self.method, (0, 1)))

    @property
    def images(self) -> int:
        """Images that the run's training looks at: updates x sources x classes."""
        return self.total_updates * self.sources * self.classes

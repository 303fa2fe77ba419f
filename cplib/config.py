"""What one experiment is: a frozen ``Run``, and the profiles that are made of them."""

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import get_args, get_origin

TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
OBJECTS = (
    "bottle",
    "cable",
    "capsule",
    "hazelnut",
    "metal_nut",
    "pill",
    "screw",
    "toothbrush",
    "transistor",
    "zipper",
)
CATEGORIES = TEXTURES + OBJECTS
DEMO_TEXTURES = ("brick", "fabric")
DEMO_OBJECTS = ("coin", "gear")
# Always in the same place in the picture: a Gaussian for each position (A.5).
ALIGNED = {
    "mvtec": (
        "bottle",
        "cable",
        "capsule",
        "metal_nut",
        "pill",
        "toothbrush",
        "transistor",
        "zipper",
    ),
    "demo": DEMO_OBJECTS,
}
# Table 6's columns: a shape and its filling (5.3).
SYNTHETIC = (
    "digit_color",
    "square_color",
    "ellipse_color",
    "heart_color",
    "square_natural",
    "ellipse_natural",
    "heart_natural",
)

BASELINES = ("untrained", "pretrained")  # nothing is trained: random and ImageNet features
TABLE1 = ("rotation", "cutout", "scar", "cutpaste", "cutpaste_scar", "cutpaste_3way")
TRAINED = (*TABLE1, "cutout_mean", "cutout_color", "confetti", "cutpaste_union")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
BACKBONES = ("resnet18", "efficientnet_b4", "efficientnet_lite0")


LEAST = {"size": 8, "sources": 1, "stride": 1} | dict.fromkeys(
    ("updates", "head_updates", "seed", "curve", "crop", "window"), 0
)
# Fields of scoring alone: runs that differ only in these share one trained network.
SCORING = ("l2_normalise", "reg_covar", "window", "stride", "gaussians", "heat_std", "curve")


def named(name: str, values) -> str:
    """The name and a short hash of the dataclass's fields that differ from their defaults, if any.

    A field that is added later, with the old behaviour as its default, leaves names as they are.
    """
    changed = {k: v for k, v in asdict(values).items() if v != getattr(type(values), k, None)}
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
    return f"{name}-{digest[:8]}" if changed else name


@dataclass(frozen=True, kw_only=True)
class Run:
    """One experiment, whole. The defaults are the paper's protocol and never change their meaning.

    Lengths of scars and confetti are in pixels of a 256-pixel image and scale with ``size``. Where
    the paper is silent (translate, jitter, head, covariance, aspect) the default is our choice.
    """

    method: str
    category: str
    seed: int = 0
    dataset: str = "mvtec"
    size: int = 256  # pixels, both sides
    updates: int = 65_536  # 256 "epochs" of 256 updates (A.1, footnote 5)
    sources: int = 32  # source pictures a batch: 64 or 96 images with their copies (A.1)
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
    translate: float = 0.125  # largest shift of every picture, a share of its side
    jitter: tuple[float, ...] = (0.1, 0.1, 0.1, 0.0)  # of every picture: see augment.jitter
    area: tuple[float, float] = (0.02, 0.15)  # of the patch, a share of the picture (A.2)
    aspect: tuple[float, float] = (0.3, 3.3)  # of the patch: (0.3, 1) or (1, 3.3) (A.2)
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
    gaussians: str = "auto"  # "position": one for each place; "shared"; "auto": as in A.5
    heat_std: float = 10.0  # of the upsampling kernel, in pixels (FCDD's)
    curve: int = 0  # points on the way at which the test AUROC is noted (never used to choose)
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
        _one_of("method", self.method, BASELINES + TRAINED)
        _one_of("backbone", self.backbone, BACKBONES)
        _one_of("init", self.init, ("random", "imagenet"))
        _one_of("gaussians", self.gaussians, ("auto", "position", "shared"))
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("optimizer", self.optimizer, ("sgd", "adamw"))
        for name, least in LEAST.items():
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"{name} must be a whole number of at least {least}")
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
            self.gaussians == "auto" and self.category in ALIGNED.get(self.dataset, ())
        )

    @classmethod
    def from_dict(cls, values: dict) -> "Run":
        """The run with these fields; ValueError names a field that this version does not know."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r}: written by another version of cplib")
        return cls(**values)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}: one of {', '.join(allowed)}")


def grid(**axes) -> list[Run]:
    """Every combination of the axes, each a value or a list of values, as runs."""
    lists = [v if isinstance(v, list) else [v] for v in axes.values()]
    return [Run(**dict(zip(axes, values, strict=True))) for values in itertools.product(*lists)]


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Where and around what one setting at a time is changed, and to what.

    Those of Tables 7 and 8, then those that the paper does not state; of these the deepest head and
    the strongest jitter are the authors' earlier code's.
    """

    categories: tuple[str, ...] = ()  # empty: all
    seeds: int = 1
    protocol: dict = field(default_factory=dict)  # fields that differ from the profile's
    learning_rate: tuple[float, ...] = (10 / 3, 1, 1 / 3, 1 / 10)  # times the protocol's own
    updates: tuple[float, ...] = (0.5, 0.75, 1, 1.25, 1.5)  # times the protocol's own
    patch_jitter: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3)
    max_area: tuple[float, ...] = (0.1, 0.15, 0.2, 0.3)  # of the patch, a share of the picture
    unstated: tuple[str, ...] = ("screw", "transistor")  # categories of what follows
    head: tuple[tuple[int, ...], ...] = ((), (512, 128), (512,) * 8 + (128,))
    translate: tuple[float, ...] = (0.0, 0.125, 0.25)
    jitter: tuple[tuple[float, ...], ...] = (
        (0.0, 0.0, 0.0, 0.0),
        (0.1, 0.1, 0.1, 0.0),
        (0.125, 0.4, 0.4, 0.0),
    )


# The patch model trains on crops of 64 px (4.2) and scores windows of 32 px (A.5).
PATCH = {"crop": 64, "window": 32}

# The head alone for 10 "epochs", then all layers for 64, 24 images a batch (A.4).
FINETUNE = {
    "backbone": "efficientnet_b4",
    "init": "imagenet",
    "freeze_batchnorm": True,
    "optimizer": "sgd",
    "warmup": 0.0,
    "crop": 0,
    "head_batchnorm": True,
    "head_updates": 2560,
    "updates": 16_384,
    "sources": 8,
    "learning_rate": 1e-4,
}
# The same two phases, short, on weights that need no download; a CPU multiplies the depthwise
# convolutions 1.6 to 1.9 times faster in fp32 than in bf16 (measured).
FINETUNE_SHORT = FINETUNE | {
    "backbone": "efficientnet_lite0",
    "head_updates": 40,
    "updates": 40,
    "learning_rate": 0.001,
    "precision": "fp32",
    "curve": 0,
}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A named set of runs: which categories, methods and seeds, under which protocol."""

    name: str
    dataset: str
    categories: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: int  # of cutpaste_3way, the method that the ensemble is made of
    other_seeds: int  # of every other method
    protocol: dict = field(default_factory=dict)  # fields of Run that differ from the paper's
    ablation: tuple[str, ...] = ()  # categories of Tables 3 to 6; empty: all
    patch: dict = field(default_factory=lambda: PATCH)  # the patch model's fields
    pretrained_backbone: str = "resnet18"
    finetune: dict = field(default_factory=lambda: FINETUNE)  # Table 3's fields of Run
    sensitivity: Sensitivity = Sensitivity()
    anomaly: dict = field(default_factory=dict)  # Table 6's fields of synthetic.Anomaly
    cut_short: int = 0  # updates of the paper's schedule that stand beside (notebook 09); 0: none

    def runs(self, methods=None, categories=None, seeds=None, **changes) -> list[Run]:
        """The profile's runs, or those of the methods, categories and number of seeds named."""
        return [
            self.run(method, category, seed, **changes)
            for category in (categories or self.categories)
            for method in (methods or self.methods)
            for seed in range(self._seeds(method, seeds))
        ]

    @property
    def small(self) -> bool:
        """Whether a notebook may execute what it finds missing: minutes on any machine."""
        return self.dataset == "demo"

    def patch_runs(self, categories=None, seeds=None) -> list[Run]:
        """The patch model's runs (Table 2), and the baselines scored on the same patches."""
        runs = [
            self.run(method, category, seed)
            for category in (categories or self.categories)
            for method in (*BASELINES, "cutpaste_3way")
            for seed in range(1 if method in BASELINES else seeds or self.other_seeds)
        ]
        return [replace(run, **({"curve": 0} | self._patch(run))) for run in runs]

    def _patch(self, run: Run) -> dict:
        """The patch model's fields; for a baseline those of scoring alone."""
        names = ("window", "stride", "gaussians", "heat_std")
        bare = run.method in BASELINES
        return {k: v for k, v in self.patch.items() if k in names or not bare}

    def _seeds(self, method: str, wanted: int | None) -> int:
        if method == "pretrained":  # the same features whatever the seed
            return 1
        return wanted or (self.seeds if method == "cutpaste_3way" else self.other_seeds)

    def run(self, method: str, category: str, seed: int = 0, **changes) -> Run:
        """One run under this profile's protocol; a baseline keeps only what it depends on."""
        run = Run(
            method=method,
            category=category,
            seed=seed,
            dataset=self.dataset,
            **(self.protocol | changes),
        )
        if method not in BASELINES:
            # Four classes in the batch that two take (A.1: 64 images): half the sources.
            sources = max(1, run.sources // 2) if method == "rotation" else run.sources
            return replace(run, sources=sources, curve=run.curve * (method == "cutpaste_3way"))
        bare = Run(method=method, category=category, seed=seed, dataset=run.dataset)
        bare = replace(bare, size=run.size, updates=0)
        if method == "pretrained":
            backbone = changes.get("backbone", self.pretrained_backbone)
            return replace(bare, init="imagenet", backbone=backbone)
        return replace(bare, backbone=run.backbone)


# A schedule made for few flops, from scratch: chosen without a test image (notebook 09).
FEW_FLOPS = {
    "optimizer": "adamw",
    "learning_rate": 0.0005,
    "warmup": 0.1,
    "crop": PATCH["crop"],
    "head_batchnorm": False,
    "sources": 16,
}

QUICK = Profile(
    name="quick",
    dataset="mvtec",
    categories=CATEGORIES,
    methods=BASELINES + TABLE1,
    seeds=3,
    other_seeds=3,
    protocol=FEW_FLOPS | {"updates": 640, "curve": 4},
    # A quarter of the paper's positions. The network is Table 1's, whose crops are as large.
    patch=PATCH | {"stride": 8},
    finetune=FINETUNE_SHORT,
    sensitivity=Sensitivity(categories=("screw", "transistor")),
    cut_short=100,
)

PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="smoke",
            dataset="demo",
            categories=("brick", "gear"),
            methods=BASELINES + TABLE1,
            seeds=2,
            other_seeds=1,
            protocol={"size": 64, "updates": 2, "sources": 4},
            patch={"crop": 32, "window": 32, "stride": 16},
            pretrained_backbone="efficientnet_lite0",
            anomaly={"least": 1},
            finetune=FINETUNE_SHORT | {"head_updates": 1, "updates": 1, "sources": 4},
            sensitivity=Sensitivity(
                categories=("gear",),
                learning_rate=(1, 1 / 3),
                updates=(1, 1.5),
                patch_jitter=(0.1, 0.3),
                max_area=(0.15, 0.3),
                unstated=("gear",),
                head=((), (512, 128)),
                translate=(0.125,),
                jitter=((0.1, 0.1, 0.1, 0.0),),
            ),
        ),
        Profile(
            name="demo",
            dataset="demo",
            categories=DEMO_TEXTURES + DEMO_OBJECTS,
            methods=BASELINES + TABLE1,
            seeds=2,
            other_seeds=1,
            protocol={"size": 128, "updates": 80, "sources": 16},
            ablation=("gear",),
            patch={"crop": 32, "window": 32, "stride": 8},
            pretrained_backbone="efficientnet_lite0",
            finetune=FINETUNE_SHORT,
            sensitivity=Sensitivity(
                categories=("gear",), protocol={"updates": 20}, unstated=("gear",)
            ),
            anomaly={"least": 20},
        ),
        QUICK,
        # As quick, 13 times as long: an hour or two of a CPU core a run.
        replace(
            QUICK,
            name="long",
            other_seeds=1,
            protocol=QUICK.protocol | {"updates": 8192, "curve": 8},
            cut_short=0,
        ),
        Profile(
            name="paper",
            dataset="mvtec",
            categories=CATEGORIES,
            methods=BASELINES + TABLE1,
            seeds=5,
            other_seeds=5,
            protocol={"precision": "fp16"},  # every GPU since 2017 multiplies in it
            sensitivity=Sensitivity(seeds=5),
        ),
    )
}

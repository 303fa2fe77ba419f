"""Does a device compute what a CPU computes? It is meant to take three minutes on a GPU.

    python tests/gpu/check.py [--device cuda]

Prints a line for each check, and exits with status 1 if one failed. The images are made here.
"""

import argparse
import math
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from cplib import augment, train  # noqa: E402
from cplib.model import PretextNet, build, embed  # noqa: E402
from cplib.run import Run  # noqa: E402
from cplib.score import Scorer  # noqa: E402

METHOD = "cutpaste_3way"
SIZE, SMALL = 64, 32  # pixels, both sides
FEW = {"category": "any", "size": SMALL, "sources": 4}  # a small training
GIB = 12  # a training or a scoring may take
# A GPU adds numbers in another order each time. So a resumed training ends elsewhere, by a share of
# the way that a tensor went; the median of all tensors is compared. Measured on a CPU, after three
# updates: 0.02 where 1e-6 of each gradient is random, 0.18 or more where a resumed training lost
# its optimiser's state or its place among the random numbers.
ELSEWHERE = 0.1
Found = tuple[float, float, str]  # what was measured, the most that is right, in words
Check = Callable[[], Found]


def images(n: int, size: int, seed: int = 0) -> Tensor:
    """Smooth random images, uint8 (N, 3, size, size), bright at the top."""
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    coarse = coarse * torch.linspace(1, 0.3, 8).view(8, 1)
    return (255 * F.interpolate(coarse, size, mode="bilinear")).to(torch.uint8)


def augmented(device: str, make: Callable[[Tensor, Tensor], Tensor], draws: int) -> Found:
    """The same images and draws, augmented on the device and on a CPU.

    A few pixels at the border of a patch may differ: there a position is rounded.
    """
    x = images(16, SIZE).float() / 255
    u = torch.rand(len(x), draws, generator=torch.Generator().manual_seed(1))
    gaps = (make(x.to(device), u.to(device)).cpu() - make(x, u)).abs().amax(1)
    percent = 100 * (gaps > 1e-4).float().mean().item()
    return percent, 0.1, f"% of pixels differ (largest difference {gaps.max():.1g})"


def augmentations(device: str) -> dict[str, Check]:
    """A check of each method's classes, and of what every method begins with."""
    made = {
        "shift": (augment.shift_and_crop, augment.shift_and_crop.draws),
        "crop": (partial(augment.shift_and_crop, side=SMALL), augment.shift_and_crop.draws),
        "jitter": (partial(augment.jitter, strength=(0.1,) * 4), augment.jitter.draws),
    }
    for method in augment.METHODS:
        made[method] = partial(pretext_images, method), augment.draws_of(method)
    return {f"augment: {name}": partial(augmented, device, *one) for name, one in made.items()}


def pretext_images(method: str, x: Tensor, u: Tensor) -> Tensor:
    """Images of all classes of a method."""
    options = train.augmentation_kwargs(Run(method=method, category="any", size=SIZE))
    return augment.pretext_batch(x, u, method, options)[0]


def falling(device: str, precision: str) -> Found:
    """Train on an easy task: which way is up."""
    run = Run(method="rotation", updates=24, precision=precision, **FEW)
    loss = train.fit(run, images(8, SMALL), device)[1]["loss"]
    finite = loss.map(math.isfinite).all()
    share = loss[-6:].mean() / loss[:6].mean() if finite else math.inf
    return share, 0.7, "of the first losses are the last ones"


def first_loss(device: str) -> Found:
    """The first loss in fp32, with the same weights and the same batch."""
    run, pixels = Run(method=METHOD, precision="fp32", **FEW), images(8, SMALL)
    drawn = train.batch(run, pixels, torch.Generator().manual_seed(0))

    def loss(device: str) -> float:
        net = build(run).to(device, memory_format=torch.channels_last)
        rest = torch.Generator(device), train.grad_scaler(run, device)
        with mock.patch.object(train, "batch", lambda *_: [part.to(device) for part in drawn]):
            loss, _ = train.step(run, net, train.optimiser(run, net), pixels.to(device), *rest)
        return loss.item()

    return abs(loss(device) - loss("cpu")), 1e-3, "is the difference"


def resumed(device: str, **fields) -> Found:
    """A training that stops after one update and resumes, against one that never stopped."""
    run = Run(method=METHOD, updates=3, precision="fp32", **FEW, **fields)
    fit = partial(train.fit, run, images(8, SMALL), device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "checkpoint.safetensors")
        try:
            fit(checkpoint=file, deadline=0)
            raise AssertionError("a training went on after its deadline")
        except train.OutOfTime:
            ways = torch.tensor([*apart(fit(checkpoint=file)[0], fit()[0], build(run))])
    if torch.device(device).type == "cpu":
        return ways.max().item(), 0, "of its way is the tensor off that is most off"
    return ways.median().item(), ELSEWHERE, "of its way is the median tensor off"


def apart(one: PretextNet, other: PretextNet, start: PretextNet) -> Iterator[float]:
    """How far apart two networks are, tensor by tensor, as shares of the way from the start."""
    states = (net.state_dict().values() for net in (one, other, start))
    for a, b, c in zip(*states, strict=True):
        a, b, c = (x.double().cpu() for x in (a, b, c))
        yield ((a - b).norm() / (b - c).norm().clamp(min=1e-12)).item()


def embedded(device: str) -> Found:
    """Features of whole images."""
    net, pixels = build(Run(method=METHOD, **FEW)), images(8, SIZE)
    here = embed(net, pixels)
    gap = (embed(net.to(device, memory_format=torch.channels_last), pixels) - here).abs().max()
    return gap.item(), 1e-3, "is the largest difference"


def window_scores(device: str, category: str) -> Found:
    """Scores of windows. Each place has its own Gaussian, or all places share one."""
    run = Run(method="untrained", category=category, size=SIZE, window=32, stride=16)

    def scores(device: str) -> Tensor:
        net = build(run).to(device, memory_format=torch.channels_last)
        return Scorer.fit(run, net, images(12, SIZE)).position_scores(images(6, SIZE, seed=1))

    return difference(scores(device), scores("cpu"))


def difference(scores: Tensor, right: Tensor) -> Found:
    """The largest difference of scores, relative to how much they vary."""
    gap = (scores.cpu() - right).abs().max() / right.std()
    return gap.item(), 1e-3, "standard deviations of the scores is the largest difference"


def saved_detector(device: str) -> Found:
    """A detector that was trained on the device, saved, and loaded on a CPU."""
    from cplib.apps.detector import Detector, fit_detector  # here: it needs more packages
    from cplib.study.store import Places

    own = {"category": "own", "dataset": "own", "size": SIZE, "gaussians": "shared"}
    run = Run(method=METHOD, updates=2, sources=4, crop=SMALL, window=SMALL, stride=16, **own)
    with tempfile.TemporaryDirectory() as folder:
        places = Places(Path(folder), device=device)
        made = fit_detector(run, images(8, SIZE), places=places, folder=folder)
        loaded = Detector.load(folder)
    pixels = images(6, SIZE, seed=1)
    return difference(made.score(pixels), loaded.score(pixels))


def peak(device: str, work: Callable[[], object]) -> Found:
    """The most memory of the GPU that some work takes."""
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) / 2**30, GIB, "GiB"


def paper_step(device: str) -> None:
    """One update of the paper's protocol."""
    run = Run(method=METHOD, category="any")
    net, pixels = build(run).to(device, memory_format=torch.channels_last), images(32, run.size)
    rest = torch.Generator(device), train.grad_scaler(run, device)
    train.step(run, net, train.optimiser(run, net), pixels.to(device), *rest)


def paper_scores(device: str) -> None:
    """Scores of whole images and of windows, with the strides of the paper."""
    for run in (Run(method=METHOD, category="any"), Run(method=METHOD, category="any", window=32)):
        net, few = build(run).to(device, memory_format=torch.channels_last), images(8, run.size)
        Scorer.fit(run, net, few).score(few)


def checks(device: str) -> dict[str, Check]:
    """All checks of a device, by name."""
    made = augmentations(device)
    for precision in filter(partial(train.computes_in, device=device), train.DTYPES):
        made[f"train: {precision}"] = partial(falling, device, precision)
    made["train: first loss"] = partial(first_loss, device)
    made["resume: SGD"] = partial(resumed, device)
    made["resume: AdamW"] = partial(resumed, device, optimizer="adamw", learning_rate=1e-3)
    made["features"] = partial(embedded, device)
    made["scores: a Gaussian per place"] = partial(window_scores, device, "bottle")
    made["scores: one Gaussian"] = partial(window_scores, device, "tile")
    made["detector: loaded on a CPU"] = partial(saved_detector, device)
    if torch.device(device).type == "cuda":
        made["memory: training"] = partial(peak, device, partial(paper_step, device))
        made["memory: scoring"] = partial(peak, device, partial(paper_scores, device))
    return made


def outcome(name: str, check: Check) -> str:
    """The line of one check."""
    try:
        found, most, words = check()
    except ImportError as error:
        return f"skipped {name}: {error}"
    except Exception as error:  # the other checks go on
        traceback.print_exc()
        return f"FAILED {name}: {type(error).__name__}: {error}"
    state = "passed" if found <= most else "FAILED"
    return f"{state} {name}: {found:.2g} {words}; at most {most:g}"


def report(device: str) -> Iterator[str]:
    """Do all checks, one after the other, and print a line for each."""
    for name, check in checks(device).items():
        line = outcome(name, check)
        print(line, flush=True)
        yield line


def main() -> int:
    """Check the device of the command line, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU that PyTorch can use")
    lines = [*report(device)]
    return int(any(line.startswith("FAILED") for line in lines))


if __name__ == "__main__":
    sys.exit(main())

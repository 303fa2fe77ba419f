"""A GPU for a quarter of an hour: checks, speed, then the paper's protocol cut to an eighth.

    python tests/gpu/lease.py --data DIR --categories screw,transistor --minutes 7 --out FOLDER

Run it in the repository's root; it needs no network. FOLDER then holds ``checks.txt``,
``speed.json`` and ``runs.tgz`` (run folders: small records). ``--device cpu --updates 2
--sources 2`` tries it without a GPU.
"""

import argparse
import json
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path

sys.path.insert(0, os.getcwd())

import torch  # noqa: E402

from cplib import datasets, train  # noqa: E402
from cplib.model import build  # noqa: E402
from cplib.run import Run  # noqa: E402
from cplib.study.jobs import execute_all  # noqa: E402
from cplib.study.store import Places, run_folder  # noqa: E402

from check import METHOD, report  # noqa: E402

SCHEDULES = {"paper": {}, "patch": {"crop": 64}, "quick": {"crop": 64, "optimizer": "adamw"}}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder in the MVTec layout")
    parser.add_argument("--categories", default="screw,transistor")
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "lease-out")))
    parser.add_argument("--updates", type=int, default=8192, help="65,536 in the paper")
    parser.add_argument("--sources", type=int, default=32, help="normal images a batch")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def seconds(run: Run, pixels: torch.Tensor, device: torch.device) -> float:
    """Seconds of one update; on a GPU the work of 20 is waited for once."""
    gpu = device.type == "cuda"
    net = build(run).to(device, memory_format=torch.channels_last)
    parts = train.optimiser(run, net), pixels.to(device), torch.Generator(device).manual_seed(0)
    scaler, steps = train.grad_scaler(run, device), 20 if gpu else 1
    for k in range(-5 if gpu else 0, steps):
        if k == 0:
            torch.cuda.synchronize() if gpu else None
            began = time.time()
        train.step(run, net, *parts, scaler, 0)
    torch.cuda.synchronize() if gpu else None
    return (time.time() - began) / steps


def speeds(pixels: torch.Tensor, device: torch.device, sources: int) -> dict:
    """Milliseconds of an update and images a second, by schedule and precision."""
    found = {}
    for precision in ("bf16", "fp16", "fp32") if device.type == "cuda" else ("fp32",):
        for name, fields in SCHEDULES.items():
            few = sources // 2 if name == "quick" else sources
            own = {"category": "any", "sources": few, "precision": precision}
            run = Run(method=METHOD, **own, **fields)
            each = seconds(run, pixels, device)
            row = {"ms": 1000 * each, "images_per_second": 3 * few / each}
            found[f"{name} {precision}"] = row
            print(name, precision, row, flush=True)
    return found


def main() -> None:
    """Check, time and train; what is worth keeping goes to ``--out``."""
    args, began = options(), time.time()
    device, categories = torch.device(args.device), args.categories.split(",")
    args.out.mkdir(parents=True, exist_ok=True)
    print(torch.__version__, train.device_name(device), flush=True)
    pixels = datasets.load(args.data, categories[0], "train", 256).pixels
    (args.out / "checks.txt").write_text("\n".join(report(args.device)), encoding="utf-8")
    found = speeds(pixels, device, args.sources)
    (args.out / "speed.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    os.environ["CPLIB_JOBS"] = "1"  # whole images fill the device: one after the other
    fields = {"updates": args.updates, "sources": args.sources, "seed": args.seed, "curve": 8}
    runs = [Run(method=METHOD, category=category, **fields) for category in categories]
    with tempfile.TemporaryDirectory() as results:
        places = Places(Path(results), Path(args.data).resolve(), None, args.device)
        budget = began + 60 * args.minutes - time.time()
        wanted = {run: ["gradcam", "density"] for run in runs}
        for outcome in execute_all(wanted, places, budget=budget):
            print(outcome.run.id, outcome.state, outcome.message, flush=True)
        with tarfile.open(args.out / "runs.tgz", "w:gz") as tar:
            for folder in (run_folder(run, results) for run in runs):
                if folder.exists():
                    print(folder.name, (folder / "metrics.json").read_text(encoding="utf-8"))
                    tar.add(folder, f"runs/{folder.name}")
    print(f"done after {(time.time() - began) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()

"""What the benchmarks share: timing a call, the most memory used, the table, the options."""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from cplib.datasets import DataError
from cplib.run import PRECISIONS
from cplib.train import device_name

Row = tuple[str, float, str]  # what, value, unit


class Seconds(NamedTuple):
    """What a call takes: by the clock, and of this process's cores (none of its workers')."""

    clock: float
    cores: float

    def spent(self, device: str) -> float:
        """What other programs on the machine disturb least."""
        return self.clock if device == "cuda" else self.cores


def seconds_of(
    work: Callable[[], object], device: str, budget: float, *, warm: bool = True, least: int = 2
) -> Seconds:
    """Seconds a call takes, after one to warm up; calls go on for ``budget`` seconds."""
    if warm:
        work()
        finish(device)
    began, busy, calls = time.perf_counter(), time.process_time(), 0
    while calls < least or time.perf_counter() - began < budget:
        work()
        finish(device)
        calls += 1
    return Seconds(
        (time.perf_counter() - began) / calls,
        (time.process_time() - busy) / calls,
    )


def finish(device: str) -> None:
    """Wait for what the device has to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: str) -> Row:
    """The most memory taken so far; on a CPU by the whole process."""
    if device == "cuda":
        return "peak memory of the GPU", torch.cuda.max_memory_allocated() / 2**30, "GiB"
    unit = 1 if sys.platform == "darwin" else 2**10
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return "peak memory of the process", used / 2**30, "GiB"


def cores() -> int:
    """Of this machine, as many as this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def options(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder in the MVTec layout")
    parser.add_argument("--category", default="bottle")
    parser.add_argument("--size", type=int, default=256, help="pixels, both sides")
    parser.add_argument("--seconds", type=float, default=60, help="for both ways together")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="auto", choices=PRECISIONS)
    parser.add_argument("--threads", type=int, default=cores(), help="of both ways")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser


def machine(args: argparse.Namespace) -> dict:
    """Where and how it was measured."""
    return {
        "device": device_name(torch.device(args.device)),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "load": [round(load, 1) for load in os.getloadavg()],
        "torch": torch.__version__,
        "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
    }


def markdown(rows: list[Row]) -> str:
    """The table."""
    lines = ["| what | value | unit |", "| --- | ---: | --- |"]
    return "\n".join(lines + [f"| {what} | {value:.3g} | {unit} |" for what, value, unit in rows])


def report(measure: Callable[[argparse.Namespace], list[Row]], args: argparse.Namespace) -> int:
    """Measure, print the table, write the numbers; the exit status."""
    torch.set_num_threads(args.threads)
    try:
        rows = measure(args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    about = machine(args)
    print(f"{about['device']}; {about['threads']} threads, PyTorch {about['torch']}\n")
    print(markdown(rows))
    if args.json:
        values = {what: {"value": value, "unit": unit} for what, value, unit in rows}
        asked = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        note = {"machine": about, "options": asked, "rows": values}
        args.json.write_text(json.dumps(note, indent=1) + "\n")
    return 0

"""What train.py and dense.py share: timing, counting, the options, the table."""

import argparse
import os
import resource
import statistics
import sys
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

from cplib.datasets import DataError
from cplib.train import device_name

Row = tuple[str, float, str]  # what, value, unit


def seconds(work: Callable[[], object], budget: float) -> float:
    """Mean seconds of a call, after at least one to warm up. Calls go on for ``budget`` seconds."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=budget).mean


class Launches(TorchDispatchMode):
    """Count what a GPU has to launch: operations that are neither views nor allocations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count an operation, and do it."""
        self.count += func.namespace == "aten" and not func.is_view and "empty" not in func.name()
        return func(*args, **(kwargs or {}))


def launches(work: Callable[[], object]) -> int:
    """How many kernels a call launches."""
    with Launches() as counter:
        work()
    return counter.count


def ratios(ours: list[float], theirs: list[float]) -> list[Row]:
    """How many times faster our way is, over neighbouring turns."""
    pairs = [b / a for a, b in zip(ours, theirs, strict=True)]
    return [
        ("plain way against ours", statistics.median(pairs), "times"),
        ("... smallest of the pairs", min(pairs), "times"),
        ("... largest of the pairs", max(pairs), "times"),
    ]


def peak_memory(device: str) -> Row:
    """The most memory used so far, on a CPU by the whole process."""
    if device == "cuda":
        return "peak memory of the GPU", torch.cuda.max_memory_allocated() / 2**30, "GiB"
    unit = 1 if sys.platform == "darwin" else 2**10
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return "peak memory of the process", used / 2**30, "GiB"


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def options(description: str) -> argparse.ArgumentParser:
    """The options of both benchmarks."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder in the MVTec layout")
    parser.add_argument("--category", default="bottle")
    parser.add_argument("--size", type=int, default=256, help="pixels, both sides")
    parser.add_argument("--seconds", type=float, default=60, help="for both ways together")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=cores(), help="of both ways")
    return parser


def report(measure: Callable[[argparse.Namespace], list[Row]], args: argparse.Namespace) -> int:
    """Measure, print the machine and a Markdown table, and return the exit status."""
    torch.set_num_threads(args.threads)
    try:
        rows = measure(args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = device_name(torch.device(args.device))
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(f"{device}; {args.threads} threads, PyTorch {torch.__version__}, {load}\n")
    print("| what | value | unit |\n| --- | ---: | --- |")
    for what, value, unit in rows:
        print(f"| {what} | {value:{'.3g' if value < 1000 else '.0f'}} | {unit} |")
    return 0

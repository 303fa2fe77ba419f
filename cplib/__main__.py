"""The command line: ``python -m cplib``; run_all.sh calls its ``notebooks``."""

import argparse
import sys
import time
from pathlib import Path

from cplib import data, download, runs
from cplib.config import PROFILES
from cplib.readme import filled
from cplib.sweep import ENGINES
from cplib.workspace import ROOT, find_device


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(prog="cplib", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("notebooks", prog="./run_all.sh", allow_abbrev=False)
    run.add_argument("--profile", default="demo", help="one of " + ", ".join(PROFILES))
    run.add_argument("--data", default="", help="folder in the MVTec layout (else $MVTEC_ROOT)")
    run.add_argument("--categories", default="", help="a,b: only these")
    run.add_argument("--seeds", type=int, default=0, help="how many (default: the profile's)")
    run.add_argument("--only", default="", help="NN,NN: only these notebooks")
    run.add_argument("--from", dest="start", default="", help="NN: from this notebook on")
    run.add_argument("--engine", default="local", choices=ENGINES, help="local (default) or ray")
    run.add_argument("--budget", default="", help="stop training after 90s, 45m, 2h")
    run.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    run.add_argument("--weights", default="", help="folder of ImageNet weights")
    run.add_argument("--results", default="", help="where to write (default: results/PROFILE)")
    again = commands.add_parser("rerun", help="repeat a stored run and compare its scores")
    again.add_argument("folder", help="results/PROFILE/runs/RUN_ID")
    again.add_argument(
        "--data", dest="data_root", metavar="DATA", required=True, help="folder in the MVTec layout"
    )
    again.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    again.add_argument("--weights", default=None, help="folder of ImageNet weights")
    fetch = commands.add_parser("download", help="fetch MVTec AD (5.3 GB), or go on with it")
    fetch.add_argument("folder", help="new or empty; where the categories go")
    fetch.add_argument("--accept-licence", action="store_true", help="CC BY-NC-SA 4.0, unasked")
    judge = commands.add_parser("score", help="score a folder of pictures with a saved detector")
    judge.add_argument("detector", help="folder with detector.json, as notebook 12 writes it")
    judge.add_argument("folder", help="pictures of any size and format, also in folders below it")
    judge.add_argument("--out", required=True, help="CSV: file, score, threshold, defective")
    judge.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    page = commands.add_parser("report", help="write a profile's results as a page to start from")
    page.add_argument("--profile", default="demo", help="one of " + ", ".join(PROFILES))
    page.add_argument("--results", default="", help="where they lie (default: results/PROFILE)")
    commands.add_parser("badges", help="write the notebooks' Colab badges and first cells")
    commands.add_parser("readme", help="write the README's tables from results/")
    return top


def rerun(folder: str, data_root: str, device: str, weights: str | None) -> int:
    """Repeat a run and say whether its scores came out the same."""
    same, line = runs.rerun(folder, data_root=data_root, device=device, weights=weights)
    print(f"{folder}: {'the same' if same else 'NOT the same'} ({line})")
    return 0 if same else 1


def fetch(folder: str, accept_licence: bool) -> int:
    """Fetch MVTec AD; stopped by the keyboard, it can be gone on with."""
    try:
        download.download(folder, accept_licence=accept_licence, archive=download.MVTEC)
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


def notebooks(**options) -> int:
    """Execute the notebooks; what that needs is imported only here."""
    from cplib.notebooks import run_notebooks

    return run_notebooks(**options)


def score(detector: str, folder: str, out: str, device: str) -> int:
    """Score every picture below a folder into a CSV; 1 if one of the files could not be read."""
    from cplib.detector import Detector, score_folder

    if not Path(out).absolute().parent.is_dir():
        raise ValueError(f"no such folder for --out: {Path(out).parent}")
    if Path(out).is_dir():
        raise ValueError(f"a folder, not a file, for --out: {out}")
    tool = Detector.load(detector, find_device(device))
    began = time.perf_counter()
    table, problems = score_folder(tool, folder)
    each = 1000 * (time.perf_counter() - began) / len(table)
    others = data.left_out(folder)  # before the CSV may be one of them
    table.to_csv(out, index=False, float_format="%.9g")
    for line in filter(None, [*problems, others]):
        print(line, file=sys.stderr)
    flagged = int(table["defective"].sum())
    print(f"pictures: {len(table)}; {each:.1f} ms each; {flagged} at or above the threshold")
    return 1 if problems else 0


def report(profile: str, results: str) -> int:
    """Write the report and print its path; what that needs is imported only here."""
    from cplib.report import report as write

    print(write(profile, results))
    return 0


def write_badges() -> int:
    """Write every notebook's badge and Colab cell from the address in pyproject.toml."""
    from cplib.badges import write

    write(ROOT)
    return 0


def write_readme() -> int:
    """Fill the README's tables from the committed results."""
    (ROOT / "README.md").write_text(filled(ROOT))
    return 0


COMMANDS = {
    "notebooks": notebooks,
    "download": fetch,
    "rerun": rerun,
    "score": score,
    "report": report,
    "readme": write_readme,
    "badges": write_badges,
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 if all went well, 1 if not, 2 if it was asked for wrongly."""
    options = vars(parser().parse_args(argv))
    command = COMMANDS[options.pop("command")]
    try:
        return command(**options)
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {str(error) or 'out of memory'}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

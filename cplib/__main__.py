"""The command line: ``python -m cplib notebooks`` executes the notebooks (see run_all.sh)."""

import argparse
import sys

from cplib.notebooks import run_notebooks


def parser() -> argparse.ArgumentParser:
    """The options, as run_all.sh shows them."""
    top = argparse.ArgumentParser(prog="cplib", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("notebooks", prog="./run_all.sh", allow_abbrev=False)
    run.add_argument("--profile", default="demo", help="smoke, demo (default), quick or paper")
    run.add_argument("--data", default="", help="folder in the MVTec layout (else $MVTEC_ROOT)")
    run.add_argument("--categories", default="", help="a,b: only these")
    run.add_argument("--seeds", type=int, default=0, help="how many (default: the profile's)")
    run.add_argument("--only", default="", help="NN,NN: only these notebooks")
    run.add_argument("--from", dest="start", default="", help="NN: from this notebook on")
    run.add_argument("--budget", default="", help="stop training after 90s, 45m, 2h")
    run.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    run.add_argument("--weights", default="", help="folder of ImageNet weights")
    run.add_argument("--results", default="", help="where to write (default: results/PROFILE)")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 if all went well, 1 if a notebook failed, 2 if it was asked for wrongly."""
    options = vars(parser().parse_args(argv))
    del options["command"]
    try:
        return run_notebooks(**options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

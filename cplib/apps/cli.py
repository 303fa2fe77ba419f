"""The command line: ``python -m cplib``; run_all.sh calls its ``notebooks``."""

import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import click

from cplib.settings import setting
from cplib.study.profiles import PROFILES

profile_option = click.option(
    "--profile", default="demo", help=f"{', '.join(PROFILES)} (default: demo)"
)
device_option = click.option("--device", default="auto", help="auto (default), cpu or cuda")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def commands() -> None:
    """A reproducible companion to CutPaste (Li et al., CVPR 2021)."""


@commands.command()
@profile_option
@click.option("--data", default="", help="folder in the MVTec layout (else $MVTEC_ROOT)")
@click.option("--categories", default="", help="a,b: execute only these; tables show all")
@click.option("--seeds", default="", help="execute only so many (default: the profile's)")
@click.option("--only", default="", help="NN,NN: only these notebooks")
@click.option("--from", "start", default="", help="NN: from this notebook on")
@click.option("--engine", default="", help="local (default) or ray")
@click.option("--budget", default="", help="stop training after 90s, 45m, 2h")
@device_option
@click.option("--weights", default="", help="folder of ImageNet weights (else $CPLIB_WEIGHTS)")
def notebooks(profile, data, categories, only, start, device, **options) -> int:
    """Execute the notebooks: every table and figure of a profile.

    Ctrl-C or SIGTERM stops it, with status 130; the same command resumes.
    """
    from cplib.apps.notebooks import choose, run_notebooks
    from cplib.apps.workspace import open_workspace

    chosen = choose(only, start)
    # ``open_workspace`` reads these, here and in the notebooks.
    os.environ |= {f"CPLIB_{name.upper()}": value for name, value in options.items() if value}
    if profile == "smoke" and not setting("CPLIB_RESULTS"):
        os.environ["CPLIB_RESULTS"] = tempfile.mkdtemp(prefix="cplib-")
    return run_notebooks(open_workspace(profile, data, categories, device), chosen)


@commands.command()
@click.argument("folder")
@click.option("--data", required=True, help="folder in the MVTec layout")
@device_option
@click.option("--weights", default=None, help="folder of ImageNet weights")
def rerun(folder, data, device, weights) -> int:
    """Repeat a stored run (results/PROFILE/runs/ID) and compare its scores."""
    from cplib.apps.workspace import find_device
    from cplib.study.jobs import rerun as repeat
    from cplib.study.store import Places

    same, line = repeat(folder, Places(Path(), Path(data), weights, find_device(device)))
    print(f"{folder}: {'the same' if same else 'NOT the same'} ({line})")
    return 0 if same else 1


@commands.command()
@click.argument("folder")
@click.option("--accept-licence", is_flag=True, help="CC BY-NC-SA 4.0, without being asked")
def download(folder, accept_licence) -> None:
    """Fetch MVTec AD (5.3 GB) into a new folder, or resume its download."""
    from cplib.apps.download import download as fetch

    fetch(folder, accept_licence=accept_licence)


@commands.command()
@click.argument("good")
@click.option("--bad", default="", help="folder of anomalous images, if there are any")
@click.option("--out", required=True, help="folder for the detector")
@click.option("--quantile", default=0.95, help="of normal images below the threshold, without bad")
@click.option("--weights", default=None, help="folder of ImageNet weights")
@device_option
def fit(good, bad, out, quantile, weights, device) -> int:
    """Fit a detector to the normal images below a folder, as notebook 12 does."""
    from cplib.apps.detector import (
        candidates,
        compare,
        differ_in_shape,
        fit_detector,
        own_images,
    )
    from cplib.apps.workspace import find_device
    from cplib.study.store import Places

    places = Places(Path(out), None, weights, find_device(device))
    normal, anomalous, lines = own_images(good, bad)
    for line in lines:
        print(line, file=sys.stderr)
    runs = candidates("own", pad=differ_in_shape([*normal, *anomalous]))
    table = compare(runs, normal, anomalous, places=places)
    print(table.round(1).to_string())
    options = {"folder": out, "places": places, "quantile": quantile}
    detector = fit_detector(runs[table.index[0]], normal, anomalous, **options)
    print(f"taken: {table.index[0]}; {len(normal)} normal images, {len(anomalous)} anomalous")
    print(f"threshold {detector.threshold:.4g}: {detector.chosen}")
    print(f"python -m cplib score {out} FOLDER --out scores.csv")
    return 0


@commands.command()
@click.argument("detector")
@click.argument("folder")
@click.option("--out", required=True, help="CSV: file, score, threshold, anomalous")
@click.option("--maps", help="folder for a PNG an image with its anomaly map laid over it")
@device_option
def score(detector, folder, out, maps, device) -> int:
    """Score every image below a folder with a detector that notebook 12 saved."""
    import torch

    from cplib.apps.detector import Detector, score_folder
    from cplib.apps.workspace import find_device
    from cplib.datasets import left_out

    if not Path(out).absolute().parent.is_dir():
        raise ValueError(f"no such folder for --out: {Path(out).parent}")
    if Path(out).is_dir():
        raise ValueError(f"a folder, not a file, for --out: {out}")
    tool = Detector.load(detector, find_device(device))
    began = time.perf_counter()
    table, problems = score_folder(tool, folder, maps)
    each = 1000 * (time.perf_counter() - began) / len(table)
    others = left_out(folder)  # before the CSV may be one of them
    table.to_csv(out, index=False, float_format="%.9g")
    for line in filter(None, [*problems, others]):
        print(line, file=sys.stderr)
    if doubt := tool.doubt(torch.tensor(table["score"].dropna().to_numpy())):
        print(doubt, file=sys.stderr)
    flagged = int(table["anomalous"].sum())
    print(f"images: {len(table)}; {each:.1f} ms each; {flagged} at or above the threshold")
    return 1 if problems else 0


@commands.command()
@profile_option
def pages(profile) -> None:
    """Make pages of a profile's committed results."""
    from cplib.apps.pages import write_pages
    from cplib.apps.workspace import ROOT

    folder = ROOT / "results" / profile
    if not folder.is_dir():
        raise ValueError(f"no such folder of results: {folder}")
    print(write_pages(folder))


@commands.command()
def maintain() -> None:
    """Write README.md from its template and the records, and the notebooks' Colab badges."""
    from cplib.apps import colab, readme
    from cplib.apps.workspace import ROOT
    from cplib.datasets import write_text

    text = readme.TEMPLATE.read_text(encoding="utf-8")
    write_text(ROOT / "README.md", readme.filled(text))
    colab.write_badges()


def _repeat(lost) -> None:
    """Repeat an interrupt that came in a weak reference's callback, where Python ignores it."""
    if lost.exc_type is KeyboardInterrupt:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    else:
        sys.__unraisablehook__(lost)


def main(argv: list[str] | None = None) -> None:
    """Run a command and exit: 0 if all went well, 1 if not, 2 if it was asked for wrongly.

    130 if Ctrl-C or SIGTERM stopped it.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    if hasattr(sys.stdout, "reconfigure"):  # a name that the terminal cannot show is no error
        sys.stdout.reconfigure(errors="backslashreplace")
    usual, sys.unraisablehook = sys.unraisablehook, _repeat
    try:
        status = commands(argv, standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        print("\nstopped: the same command resumes", file=sys.stderr)
        status = 130
    except click.ClickException as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
        status = 2
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {str(error) or 'out of memory'}", file=sys.stderr)
        status = 2
    finally:
        sys.unraisablehook = usual
    sys.exit(status if isinstance(status, int) else 0)

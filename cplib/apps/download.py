"""MVTec AD from its archive: fetched with resumption, checked, unpacked whole or not at all."""

import shutil
import tarfile
import time
from pathlib import Path

import pooch

from cplib.datasets import LAYOUT, DataError, as_data_error, categories

ADDRESS = (
    "https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/"
    "download/420938113-1629960298/mvtec_anomaly_detection.tar.xz"
)
SHA256 = "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d"
PAGE = "https://www.mvtec.com/company/research/datasets/mvtec-ad"  # where the address may be found
LICENCE = (
    "CC BY-NC-SA 4.0 (https://creativecommons.org/licenses/by-nc-sa/4.0): not for commercial use; "
    "name the authors (Bergmann et al., CVPR 2019)"
)
GIGABYTES = 5.3  # of the archive; unpacked images take about as much again
ATTEMPTS = 5
PAUSE = 1.0  # seconds after the first attempt that failed, doubled after each


def download(folder: str | Path, *, accept_licence: bool = False) -> Path:
    """Fetch MVTec AD into ``folder``, which must be new or empty, and return its path.

    Called again after it was cut off, it resumes. The licence is asked for once, on the keyboard,
    unless ``accept_licence``. Nothing is unpacked whose SHA-256 was not checked. Raises DataError,
    in one line.
    """
    folder = Path(folder).expanduser().resolve()
    part = folder.with_name(f"{folder.name}.tar.xz.part")
    if folder.is_dir() and any(folder.iterdir()):
        with as_data_error(folder, "a new or empty folder"):
            print(f"{folder} holds {', '.join(categories(folder))} already")
    else:
        _prepare(folder, part, accept_licence)
        fetch(part)
        unpack(part, folder)
    part.unlink(missing_ok=True)
    return folder


def _prepare(folder: Path, part: Path, accept_licence: bool) -> None:
    """What can be refused is refused before anything is fetched."""
    if not (accept_licence or part.exists()):  # what is there was agreed to
        try:
            answer = input(f"The images are under {LICENCE}. Do you accept? [y/N] ")
        except (EOFError, RuntimeError):  # no keyboard; a notebook without one raises RuntimeError
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            raise DataError(f"licence not accepted: {LICENCE}; expected yes, or --accept-licence")
    with as_data_error(folder, "a folder that can be made"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            folder.rmdir()  # unpacked beside it, then renamed
        held = part.stat().st_size if part.exists() else 0
        free = (shutil.disk_usage(folder.parent).free + held) / 1e9
    if free < 2 * GIGABYTES:
        raise DataError(f"{folder.parent}: {free:.1f} GB free; expected {2 * GIGABYTES:.1f} GB")


def fetch(part: Path) -> None:
    """Append to the file ``part`` until it is whole, then check its SHA-256; DataError if not."""
    for attempt in range(ATTEMPTS):
        have = part.stat().st_size if part.exists() else 0
        try:
            with part.open("ab") as file:
                headers = {"Range": f"bytes={have}-"} if have else {}
                pooch.HTTPDownloader(progressbar=True, headers=headers)(ADDRESS, file, None)
            break
        except OSError as error:  # all that requests raises, too
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if status == 416 and have:  # nothing beyond what is there
                break
            gone = status < 500 and status != 429
            if gone or attempt == ATTEMPTS - 1:
                reason = " ".join(str(error).split())
                raise DataError(f"{ADDRESS}: {reason}; {_by_hand(part)}") from None
            time.sleep(PAUSE * 2**attempt)
    if (found := pooch.file_hash(str(part))) != SHA256:
        part.unlink()
        raise DataError(f"{ADDRESS}: SHA-256 {found}, not {SHA256}. Removed; {_by_hand(part)}")


def _by_hand(part: Path) -> str:
    folder = part.with_name(part.name.removesuffix(".tar.xz.part"))
    return f"try again, or download by hand from {PAGE} and unpack into {folder}: {LAYOUT}"


def unpack(part: Path, folder: Path) -> None:
    """Unpack a ``.tar.xz``; ``folder`` appears whole or not at all."""
    scratch = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(scratch, ignore_errors=True)  # of one that was cut off
    try:
        with as_data_error(part, f"a whole archive in {LAYOUT}"):
            with tarfile.open(part) as tar:
                tar.extractall(scratch, filter="data")
            categories(scratch)
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

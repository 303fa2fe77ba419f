"""MVTec AD from its archive: fetched with resumption, checked, unpacked whole or not at all."""

import errno
import hashlib
import http.client
import lzma
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from cplib.layouts import LAYOUT, DataError, categories

BLOCK = 2**18  # bytes


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A data set's ``.tar.xz`` on a server, and how patiently it is asked for."""

    address: str
    sha256: str
    page: str  # where a person finds it when the address has changed
    licence: str
    gigabytes: float  # of the archive; unpacked pictures take about as much again
    timeout: float = 30.0  # seconds without a byte
    attempts: int = 5  # in a row without a byte more than before
    pause: float = 1.0  # seconds after the first of them, doubled after each


MVTEC = Archive(
    address="https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/"
    "download/420938113-1629960298/mvtec_anomaly_detection.tar.xz",
    sha256="cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d",
    page="https://www.mvtec.com/company/research/datasets/mvtec-ad",
    licence="CC BY-NC-SA 4.0 (https://creativecommons.org/licenses/by-nc-sa/4.0): not for "
    "commercial use; name the authors (Bergmann et al., CVPR 2019)",
    gigabytes=5.3,
)


def download(folder: str | Path, *, accept_licence: bool = False, archive: Archive = MVTEC) -> Path:
    """Fetch MVTec AD into ``folder``, which must be new or empty, and return its path.

    Called again after it was cut off, it goes on where it was. The licence is asked for once, on
    the keyboard, unless ``accept_licence``. Beside the pictures only the archive itself takes
    space, until they are unpacked: nothing is unpacked whose SHA-256 was not checked. Raises
    DataError, in one line.
    """
    folder = Path(folder).expanduser().resolve()
    part = folder.with_name(f"{folder.name}.tar.xz.part")
    if folder.is_dir() and any(folder.iterdir()):
        print(f"{folder} holds {', '.join(_held(folder))} already")
    else:
        _prepare(folder, part, archive, accept_licence)
        fetch(archive, part)
        check(archive, part)
        unpack(part, folder)
    part.unlink(missing_ok=True)
    return folder


def _held(folder: Path) -> list[str]:
    try:
        return categories(folder)
    except DataError:
        raise DataError(f"{folder}: holds other things; expected a new or empty folder") from None


def _prepare(folder: Path, part: Path, archive: Archive, accept_licence: bool) -> None:
    """What can be refused is refused before anything is fetched."""
    if not (accept_licence or part.exists()):  # what is there was agreed to
        _ask(archive.licence)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            folder.rmdir()  # unpacked beside it, then renamed
        free = shutil.disk_usage(folder.parent).free + (part.stat().st_size if part.exists() else 0)
    except OSError as error:
        expected = f"a folder to be made{f', such as {folder}/mvtec' if folder.is_dir() else ''}"
        raise DataError(f"{folder}: {error.strerror}; expected {expected}") from None
    if free < 2 * archive.gigabytes * 1e9:
        need = f"{2 * archive.gigabytes:.1f} GB: half for the archive until it is unpacked"
        raise DataError(f"{folder.parent}: {free / 1e9:.1f} GB free; expected {need}")


def _ask(licence: str) -> None:
    try:
        answer = input(f"The pictures are under {licence}. Do you accept? [y/N] ")
    except (EOFError, RuntimeError):  # no keyboard; a notebook without one raises RuntimeError
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        expected = "yes, or --accept-licence on the command line"
        raise DataError(f"licence not accepted: {licence}; expected {expected}")


def fetch(archive: Archive, part: Path) -> None:
    """Append to the file ``part`` until the server has no more; a broken connection is resumed."""
    part.touch()
    best, failures, reason = part.stat().st_size, 0, ""
    options = {"desc": "download", "unit": "B", "unit_scale": True, "file": sys.stdout}
    with tqdm(initial=best, **options) as bar:
        while failures < archive.attempts:
            try:
                return _receive(archive, part, bar)
            except urllib.error.HTTPError as error:
                if error.code == 416 and part.stat().st_size:  # nothing beyond what is there
                    return None
                reason = f"the server says {error.code} {error.reason}"
                if error.code < 500 and error.code != 429:
                    break
            except (OSError, http.client.HTTPException) as error:
                if getattr(error, "errno", None) == errno.ENOSPC:
                    raise DataError(f"{part}: no space left; expected more to go on") from None
                reason = str(getattr(error, "reason", None) or error or type(error).__name__)
            have = part.stat().st_size
            best, failures = (have, 0) if have > best else (best, failures + 1)
            time.sleep(archive.pause * 2**failures if failures < archive.attempts else 0)
    raise DataError(f"{archive.address}: {' '.join(reason.split())}; {_by_hand(archive, part)}")


def _receive(archive: Archive, part: Path, bar: tqdm) -> None:
    """One connection's worth, written behind what is there."""
    have = part.stat().st_size
    headers = {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(archive.address, headers=headers)
    with urllib.request.urlopen(request, timeout=archive.timeout) as reply, part.open("r+b") as out:
        start = _start(reply) if reply.status == 206 else 0  # a server may ignore the range
        if start > have:
            raise http.client.HTTPException(f"sent from byte {start}, not {have}")
        length = reply.headers.get("Content-Length", "")
        bar.n, bar.total = start, start + int(length) if length.isdigit() else None
        out.seek(start)
        out.truncate()
        while block := reply.read1(BLOCK):
            out.write(block)
            bar.update(len(block))
        if bar.total and bar.n < bar.total:
            raise ConnectionError(f"closed after {bar.n} of {bar.total} bytes")


def _start(reply: http.client.HTTPResponse) -> int:
    """The first byte's position, from ``Content-Range: bytes 5-9/10``."""
    said = reply.headers.get("Content-Range", "")
    try:
        return int(said.removeprefix("bytes ").split("-")[0])
    except ValueError:
        raise http.client.HTTPException(f"no position in Content-Range {said!r}") from None


def check(archive: Archive, part: Path) -> None:
    """DataError, and the file removed, where its SHA-256 is not the archive's."""
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != archive.sha256:
        size = part.stat().st_size
        part.unlink()
        raise DataError(
            f"{archive.address}: {size} bytes with SHA-256 {found}; expected {archive.sha256}. "
            f"Removed; {_by_hand(archive, part)}"
        )


def _by_hand(archive: Archive, part: Path) -> str:
    folder = part.with_name(part.name.removesuffix(".tar.xz.part"))
    return (
        f"try again, or download by hand from {archive.page} and unpack into a folder such as "
        f"{folder}: {LAYOUT}"
    )


def unpack(part: Path, folder: Path) -> None:
    """Unpack a ``.tar.xz`` of plain files and folders; ``folder`` appears whole or not at all."""
    scratch = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(scratch, ignore_errors=True)  # of one that was cut off
    try:
        with (
            part.open("rb") as file,
            tqdm.wrapattr(
                file, "read", desc="unpack", total=part.stat().st_size, file=sys.stdout
            ) as shown,
            lzma.open(shown) as raw,
            tarfile.open(fileobj=raw, mode="r|") as tar,
        ):
            tar.extractall(scratch, filter=_plain)
            while raw.read(BLOCK):  # the checksum stands at the end
                pass
        categories(scratch)
        scratch.rename(folder)
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise DataError(f"{part}: {reason}; expected a whole archive in {LAYOUT}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _plain(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """Links and devices are refused as well: no picture needs one."""
    if not (member.isfile() or member.isdir()):
        raise tarfile.SpecialFileError(member)
    return tarfile.data_filter(member, folder)

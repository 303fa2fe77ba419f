"""Run every notebook alone, as on Colab: ``./run_all.sh test --colab [NN,NN]`` calls this.

It runs in an environment with Colab's versions, each notebook as its only file in a folder, with a
stand-in for google.colab and a folder for Drive: the first cell unpacks an archive of the last
commit from there, installs what is missing and keeps the runs there. Exit status 1 if a notebook
fails or writes to stderr, or if the cell changed what was installed.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def installed() -> dict[str, str]:
    """Names and versions of all packages."""
    return {d.name: d.version for d in distributions()}


def prepared(path: Path) -> nbformat.NotebookNode:
    """The notebook without the repository's address, and the smoke profile for a parameter."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code[0].source = re.sub('repository = ".*?"', 'repository = ""', code[0].source)
    parameters = next(c for c in code if "parameters" in c.metadata.get("tags", []))
    parameters.source += '\nprofile = "smoke"'
    return notebook


def problems(notebook: nbformat.NotebookNode, folder: Path) -> list[str]:
    """What went wrong when it ran: an error, or a line on stderr."""
    client = NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    try:
        client.execute()
    except (CellExecutionError, DeadKernelError) as error:
        return [str(error)]
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.text for output in outputs if output.get("name") == "stderr"]


def main(only: str = "") -> int:
    """Run the notebooks, a line each."""
    paths = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    paths = [path for path in paths if not only or path.name[:2] in only.split(",")]
    if not paths:
        print(f"error: no notebook {only}", file=sys.stderr)
        return 2
    content = Path(tempfile.mkdtemp(prefix="cplib-colab-"))
    archive = content / "drive" / "MyDrive" / "cutpaste.zip"
    archive.parent.mkdir(parents=True)
    command = ["git", "archive", "--format=zip", "--prefix=cutpaste/", "-o", str(archive), "HEAD"]
    subprocess.run(command, cwd=ROOT, check=True)
    os.environ |= {"PYTHONPATH": str(HERE), "TQDM_MININTERVAL": "5"}
    os.environ |= {"PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    before, failed = installed(), []
    for path in paths:
        print(path.stem, "...", end=" ", flush=True)
        began = time.time()
        wrong = problems(prepared(path), content)
        print("FAILED" if wrong else "ran", f"in {time.time() - began:.0f} s", flush=True)
        failed += [f"{path.name}: {line}" for line in wrong]
    after = installed()
    failed += [
        f"{name} is {after.get(name)}, was {v}"
        for name, v in before.items()
        if after.get(name) != v
    ]
    if not only and not list(content.glob("drive/MyDrive/cutpaste/smoke/runs/*/run.json")):
        failed.append("no run was kept on Drive")
    added = sorted(set(after) - set(before))
    print("the first cell installed", ", ".join(added) or "nothing")
    print("\n".join(failed), file=sys.stderr, end="\n" if failed else "")
    if added:  # so that it has to do so the next time
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", *added], check=True)
    shutil.rmtree(content)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

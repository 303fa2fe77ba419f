"""Stands in for Colab's Google Drive: a folder on this disk."""

import os


def mount(mountpoint):
    """Make the folder that a mounted Drive has; a person may refuse (the tests' variable)."""
    if os.environ.get("REFUSE_DRIVE"):
        raise ValueError("mount failed")
    os.makedirs(os.path.join(mountpoint, "MyDrive"), exist_ok=True)

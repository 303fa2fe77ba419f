"""Stands in for Colab's Google Drive: a folder on this disk."""

import os


def mount(mountpoint):
    """Make the folder that a mounted Drive has."""
    os.makedirs(os.path.join(mountpoint, "MyDrive"), exist_ok=True)

"""``python -m cplib``: the command line."""

from cplib.apps.cli import main

main()

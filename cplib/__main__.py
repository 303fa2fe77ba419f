"""``python -m cplib``: the command line of ``cplib.apps.cli``."""

import sys

try:
    from cplib.apps.cli import main

    main()
except KeyboardInterrupt:  # before or after ``main`` listens
    print("\nstopped: the same command resumes", file=sys.stderr)
    sys.exit(130)

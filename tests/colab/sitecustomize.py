"""On Colab the module is imported before a notebook's first cell."""

import google.colab  # noqa: F401

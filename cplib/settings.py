"""The environment variables of the package: the one place that reads them.

Each has a default here, and a comment that says what it means.
"""

import os

DEFAULTS = {
    "MVTEC_ROOT": "",  # folder of the data set; empty: only what needs no images works
    "CPLIB_RESULTS": "",  # folder of all results; empty: results/ beside the package
    "CPLIB_CACHE": "",  # folder of decoded images; empty: cplib/ in the next one
    "XDG_CACHE_HOME": "~/.cache",  # folder of the user's caches
    "CPLIB_WEIGHTS": "",  # folder of ImageNet weights; empty: torchvision's downloads
    "CPLIB_MNIST": "",  # torchvision's folder of MNIST; empty: scikit-learn's digits
    "CPLIB_PRECISION": "auto",  # of training: fp32, bf16, fp16, or what the hardware is best at
    "CPLIB_CHECKPOINT_SECONDS": "30",  # between two checkpoints of a training
    "CPLIB_JOBS": "",  # trainings at the same time; empty: as many as the machine holds
    "CPLIB_ENGINE": "local",  # what runs the trainings: local or ray
    "RAY_ADDRESS": "",  # the Ray cluster; empty: a new one on this machine
    "CPLIB_SEEDS": "",  # number of seeds that are trained; empty: the profile's
    "CPLIB_MAX_CATEGORIES": "",  # number of categories that are trained; empty: all
    "CPLIB_BUDGET": "",  # time after which training stops (90s, 45m, 2h); empty: no limit
}


def setting(name: str) -> str:
    """The value of an environment variable, or its default if it is unset or empty.

    Raises KeyError for a variable that is not listed in ``DEFAULTS``.
    """
    default = DEFAULTS[name]
    return os.environ.get(name) or default

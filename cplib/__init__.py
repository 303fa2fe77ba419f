"""The paper, as code: the method here, its tables in ``study``, tools for people in ``apps``."""

import warnings

# tqdm says so when a library asks for notebook widgets: none are needed here.
warnings.filterwarnings("ignore", message="IProgress not found")

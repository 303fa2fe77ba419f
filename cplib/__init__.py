"""The paper, as code: the method here, its tables in ``study``, tools for people in ``apps``."""

"""advlearn: the code of an interactive textbook on adversarial robustness."""

from importlib.metadata import version as _version

__version__ = _version("advlearn")

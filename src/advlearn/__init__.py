"""advlearn: the code of an interactive textbook on adversarial robustness."""

from importlib.metadata import version as _version

try:
    __version__ = _version("advlearn")
except Exception:
    __version__ = "0"

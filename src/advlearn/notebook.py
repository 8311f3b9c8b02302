"""What every chapter does first: pick the profile, set the style, say where it runs."""

from __future__ import annotations

import base64
import io
import os
import platform
from collections.abc import Callable

import torch
from matplotlib.figure import Figure

from advlearn import __version__, plotting, provenance

PROFILES = ("smoke", "cpu", "gpu", "paper")


def resolve(profile: str = "auto") -> str:
    """ "auto" -> `$ADVLEARN_PROFILE`, else "gpu" where CUDA is there, else "cpu".

    Raises:
        ValueError: not a profile.
    """
    if profile == "auto":
        profile = os.environ.get("ADVLEARN_PROFILE") or "auto"
    if profile == "auto":
        profile = "gpu" if torch.cuda.is_available() else "cpu"
    if profile not in PROFILES:
        raise ValueError(f"profile={profile!r}, allowed are auto, {', '.join(PROFILES)}")
    return profile


def begin(profile: str = "auto", seed: int = 0) -> tuple[str, torch.device]:
    """Resolve the profile, set the figures' style, print device, versions and seed.

    Returns:
        (profile, device): the GPU for "gpu" and "paper" where there is one, else the CPU.
    """
    profile = resolve(profile)
    cuda = profile in ("gpu", "paper") and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    plotting.style()
    print(f"profile {profile}, seed {seed}, on {provenance.hardware(device)}")
    print(f"advlearn {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    return profile, device


def interact(draw: Callable[..., Figure], **controls: object) -> None:
    """Sliders and menus that redraw a figure; abbreviations as in `ipywidgets.interact`.

    `ipywidgets.interact` captures output through an Output widget, which now and then blocks a
    notebook that runs without a browser (nbclient issue 312). Here the figure is the value of an
    HTML widget, and nothing can block.

    Args:
        draw: function of the controls' values that returns a matplotlib figure.
        controls: name -> (low, high), (low, high, step), a list of choices, or a widget.
    """
    import ipywidgets
    from IPython.display import display
    from matplotlib import pyplot as plt

    widgets = {name: ipywidgets.interactive.widget_from_abbrev(value)
               for name, value in controls.items()}  # fmt: skip
    picture = ipywidgets.HTML()

    def update(change: object = None) -> None:
        figure = draw(**{name: widget.value for name, widget in widgets.items()})
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        plt.close(figure)
        code = base64.b64encode(buffer.getvalue()).decode()
        picture.value = f'<img alt="" style="max-width:100%" src="data:image/png;base64,{code}">'

    for name, widget in widgets.items():
        widget.description = name
        widget.observe(update, "value")
    update()
    display(ipywidgets.VBox([*widgets.values(), picture]))

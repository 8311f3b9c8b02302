"""Draw logo.svg and favicon.svg: the three balls, one inside the other, and a step to a corner.

Run from anywhere: python book/_static/make_logo.py
"""

from pathlib import Path

HERE = Path(__file__).parent
BLUE, ORANGE = "#3b8fb5", "#e08a2c"


def svg(stroke, arrow):
    c, r = 32, 25
    diamond = f"M{c} {c - r}L{c + r} {c}L{c} {c + r}L{c - r} {c}Z"
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64" role="img" aria-label="Three nested norm balls and a step to a corner">
<g fill="none" stroke="{BLUE}" stroke-width="{stroke}" stroke-linejoin="round">
<rect x="{c - r}" y="{c - r}" width="{2 * r}" height="{2 * r}" rx="1.5" fill="{BLUE}" fill-opacity=".12"/>
<circle cx="{c}" cy="{c}" r="{r}" fill="{BLUE}" fill-opacity=".12"/>
<path d="{diamond}" fill="{BLUE}" fill-opacity=".16"/>
</g>
<g stroke="{ORANGE}" stroke-width="{arrow}" stroke-linecap="round" stroke-linejoin="round" fill="none">
<path d="M{c} {c}L{c + r - 3} {c - r + 3}"/>
<path d="M{c + r - 13} {c - r + 3}H{c + r - 3}V{c - r + 13}"/>
</g>
<circle cx="{c}" cy="{c}" r="{arrow + 0.6}" fill="{ORANGE}"/>
</svg>
"""


if __name__ == "__main__":
    (HERE / "logo.svg").write_text(svg(2, 3.4), encoding="utf8")
    (HERE / "favicon.svg").write_text(svg(3.2, 5), encoding="utf8")

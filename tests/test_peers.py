"""From the same start, pgd and fgsm return what other libraries' attacks returned.

Their outputs are stored; tests/make_peer_fixture.py says how they were made.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from advlearn import models, threats
from advlearn.attacks import fgsm, pgd
from advlearn.tensors import norms

with np.load(Path(__file__).parent / "fixtures" / "peers.npz", allow_pickle=False) as file:
    STORED = dict(file)
CASES = sorted({key.split("/")[0] for key in STORED if key.endswith("/x_adv")})


@pytest.fixture(scope="module")
def model():
    network = models.small_conv((1, 8, 8), width=0.25).double()
    network.load_state_dict({key.removeprefix("weights/"): torch.from_numpy(value)
                             for key, value in STORED.items() if key.startswith("weights/")})
    return network  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    prefix = request.param + "/"
    values = {key.removeprefix(prefix): value for key, value in STORED.items()
              if key.startswith(prefix)}  # fmt: skip
    tensors = {key: torch.from_numpy(values[key]) for key in ("x", "start", "x_adv")}
    threat = getattr(threats, str(values["threat"]))(float(values["eps"]))
    return {"name": request.param, "threat": threat, "steps": int(values["steps"]),
            "step_size": float(values["step_size"]), **tensors}  # fmt: skip


def test_equals_peer(model, case):
    x, y, start = case["x"], torch.from_numpy(STORED["labels"]), case["start"]
    if "FastGradient" in case["name"]:
        z = fgsm(model, x, y, case["threat"])
    else:
        z = pgd(model, x, y, case["threat"], steps=case["steps"], step_size=case["step_size"],
                start=start)  # fmt: skip
    assert z.dtype == torch.float64
    torch.testing.assert_close(z, case["x_adv"], rtol=0, atol=1e-6)


def test_case_is_not_empty(case):
    """The attack moved every image, the ball was reached, and the box only where it should be."""
    x, start, x_adv, threat = case["x"], case["start"], case["x_adv"], case["threat"]
    assert threat.contains(start, x).all() and threat.contains(x_adv, x).all()
    assert (norms(x_adv - start, threat.p) > 0.1 * threat.eps).all()
    assert (norms(x_adv - x, threat.p) > 0.999 * threat.eps).double().mean() > 0.5
    at_box = bool(((x_adv == 0) | (x_adv == 1)).any())
    assert at_box == (threat.p == torch.inf)

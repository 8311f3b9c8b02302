import json
from functools import partial

import pytest
import torch
from helpers import digits
from torch import nn

from advlearn import models
from advlearn.attacks import fgsm, pgd
from advlearn.data import load
from advlearn.evaluation import accuracy
from advlearn.losses import margin
from advlearn.tensors import Keyed
from advlearn.threats import L2, Linf
from advlearn.training import (
    State,
    adversarial,
    drops,
    fgsm_training,
    fit,
    free,
    gradient_regularised,
    held_out,
    mixture,
    natural,
    trades,
    trapezoid,
)

ATTACK = partial(pgd, steps=2)


def train_set(n=320):
    return load("digits", "train").subset(n)


def network(seed=0):
    return models.mlp((1, 8, 8), (24,), seed=seed)


def objectives():
    """One of each kind."""
    threat = Linf(0.15)
    return {"natural": natural(),
            "adversarial": adversarial(threat, ATTACK, step_size=0.1, ramp=0.5),
            "fgsm": fgsm_training(threat, ramp=0.5),
            "fgsm from center": fgsm_training(threat, random_start=False),
            "free": free(threat, ramp=0.5),
            "trades": trades(threat, ATTACK, 2.0, step_size=0.1, ramp=0.5),
            "gradients": gradient_regularised(0.1),
            "mixture": mixture(0.3, natural(), free(threat))}  # fmt: skip


def irregular(model):
    """A validation whose best epoch is anyone's guess, the same in every process."""
    return {"score": float(torch.sin(1e3 * weights(model).sum()))}


def variants():
    """(objective, options of fit) of everything that an interrupted training must bring back."""
    cases = {name: (objective, {}) for name, objective in objectives().items()}
    cases["free"] = cases["free"][0], {"replays": 3}
    cases["averaged"] = objectives()["adversarial"], {"average": 0.9}
    cases["best"] = natural(), {"validate": irregular, "best_by": "score"}
    cases["all"] = objectives()["free"], {"replays": 2, "average": 0.9, "precision": "bf16-mixed",
                                          "validate": irregular, "best_by": "score"}  # fmt: skip
    return cases


def run(model, objective, checkpoint=None, **options):
    settings = {"epochs": 3, "batch_size": 64, "progress": False, "seed": 4} | options
    return fit(model, train_set(), objective, checkpoint=checkpoint, **settings)


def weights(model):
    return torch.cat([v.flatten().double() for v in model.state_dict().values()])


def interrupted_after(objective, calls, error=KeyboardInterrupt):
    """The same objective, stopped by hand in the middle of an epoch."""
    count = 0

    def stopping(model, x, y, state):
        nonlocal count
        count += 1
        if count > calls:
            raise error
        return objective(model, x, y, state)

    stopping.description = objective.description
    return stopping


@pytest.mark.parametrize("name", variants())
@pytest.mark.parametrize("calls", [2, 5, 7, 13])  # 5 batches an epoch
def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, name, calls):
    (objective, options), path = variants()[name], tmp_path / "training.safetensors"
    whole = network()
    history = run(whole, objective, **options)
    model = network()
    with pytest.raises(KeyboardInterrupt):
        run(model, interrupted_after(objective, calls * options.get("replays", 1)), path, **options)
    assert path.is_file() and [p.name for p in tmp_path.iterdir()] == [path.name]
    again = run(model, objective, path, **options)  # the same call on the half-trained network
    assert torch.equal(weights(model), weights(whole)) and again.rows == history.rows
    fresh = network(seed=9)  # and in another process, on any network of that architecture
    assert run(fresh, objective, path, **options).rows == history.rows
    assert torch.equal(weights(fresh), weights(whole))


def test_a_second_interrupt_and_a_finished_training(tmp_path):
    objective, path = objectives()["adversarial"], tmp_path / "t.safetensors"
    whole, model = network(), network()
    run(whole, objective)
    for calls in (3, 7):
        with pytest.raises(KeyboardInterrupt):
            run(model, interrupted_after(objective, calls), path)
    run(model, objective, path)
    assert torch.equal(weights(model), weights(whole))
    run(model, interrupted_after(objective, 0), path)  # finished: not one step more
    assert torch.equal(weights(model), weights(whole))


class Buffered(nn.Module):
    """Batch norm: its running statistics and counter must come back too."""

    def __init__(self):
        super().__init__()
        self.body = models.mlp((1, 8, 8), (24,))
        self.norm = nn.BatchNorm1d(10)

    def forward(self, x):
        return self.norm(self.body(x))


def test_buffers_and_carried_state_resume_too(tmp_path):
    seen = []

    def objective(model, x, y, state):
        total = state.carry.get("total", torch.zeros(()))
        seen.append(float(total))
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        return losses, State(state.progress, state.keys, {"total": total + losses.detach().sum()})

    objective.description = "sums"
    whole, model, path = Buffered(), Buffered(), tmp_path / "t.safetensors"
    run(whole, objective)
    expected = list(seen)
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        run(model, interrupted_after(objective, 8), path)
    del seen[5:]  # what the interrupted epoch did is done again
    run(model, objective, path)
    assert seen == expected and torch.equal(weights(model), weights(whole))


def test_training_does_not_depend_on_the_global_random_state(tmp_path):
    a, b = network(), network()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    run(a, objectives()["adversarial"])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    run(b, objectives()["adversarial"])
    assert torch.equal(weights(a), weights(b))
    run(other := network(), objectives()["adversarial"], seed=5)
    assert not torch.equal(weights(a), weights(other))


@pytest.mark.parametrize("change, message", [
    ({"epochs": 4}, "its epochs is 3, asked for is 4"),
    ({"batch_size": 32}, "its batch_size is 64, asked for is 32"),
    ({"lr": 1e-3}, "its lr is 0.002, asked for is 0.001"),
    ({"seed": 1}, "its seed is 4, asked for is 1"),
    ({"objective": natural()}, "its objective is .adversarial"),
    ({"objective": adversarial(Linf(0.1), ATTACK, step_size=0.1, ramp=0.5)}, "its objective"),
    ({"objective": adversarial(Linf(0.15), partial(pgd, steps=3), step_size=0.1, ramp=0.5)}, "its objective"),
    ({"objective": adversarial(Linf(0.15), ATTACK, step_size=0.2, ramp=0.5)}, "its objective"),
    ({"model": models.mlp((1, 8, 8), (25,))}, "belongs to another network"),
    ({"schedule": trapezoid(0.1)}, "its schedule is 'trapezoid"),
    ({"replays": 2}, "its replays is 1, asked for is 2"),
    ({"average": 0.9}, "its average is 0.0, asked for is 0.9"),
    ({"validate": irregular, "best_by": "score"}, "its best_by is None, asked for is 'score'"),
])  # fmt: skip
def test_a_checkpoint_of_another_training_is_refused(tmp_path, change, message):
    path = tmp_path / "t.safetensors"
    run(network(), objectives()["adversarial"], path)
    before = path.read_bytes()
    model = change.pop("model", network())
    objective = change.pop("objective", objectives()["adversarial"])
    with pytest.raises(ValueError, match=message):
        run(model, objective, path, **change)
    assert path.read_bytes() == before


def test_a_checkpoint_of_other_images_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    run(network(), natural(), path)
    other = load("digits", "train").subset(320, seed=1)
    with pytest.raises(ValueError, match="its data is"):
        fit(network(), other, natural(), checkpoint=path, epochs=3, batch_size=64, seed=4, progress=False)


def test_descriptions_do_not_change_from_process_to_process():
    text = adversarial(Linf(0.1), partial(pgd, steps=3, loss=margin), step_size=0.1).description
    assert "margin" in text and "0x" not in text
    assert text == "adversarial(ℓ∞, ε = 0.1, pgd {'steps': 3, 'loss': 'margin'}, step_size=0.1, ramp=0.0)"


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04N.", "safetensors"])
def test_a_damaged_training_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "t.safetensors"
    if content == "safetensors":  # readable, but of something else
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a training checkpoint of advlearn.*Delete it"):
        run(network(), natural(), path)


# --- objectives, ramps, schedules -------------------------------------------------------------


def state_at(progress, n):
    return State(progress, Keyed((0, 0), torch.arange(n)))


def test_natural_is_the_cross_entropy():
    f, (x, y) = network(), digits(20).tensors()
    losses, state = natural()(f, x, y, state_at(0.3, 20))
    assert torch.equal(losses, nn.functional.cross_entropy(f(x), y, reduction="none"))
    assert losses.requires_grad and state.progress == 0.3


@pytest.mark.parametrize("progress, scale", [(0.0, 0), (0.1, 0.25), (0.4, 1), (0.9, 1)])
def test_ramp(progress, scale):
    """ε and step size grow together, linearly over the first share of the training."""
    seen = []

    def watching(f, x, y, threat, *, start, step_size):
        seen.append((threat.eps, step_size, float((start - x).abs().max())))
        return start

    f, (x, y) = network(), digits(50).tensors()
    objective = adversarial(Linf(0.2), watching, step_size=0.04, ramp=0.4)
    objective(f, x, y, state_at(progress, 50))
    (eps, step_size, reach), = seen
    assert eps == pytest.approx(0.2 * scale) and step_size == pytest.approx(0.04 * scale)
    assert reach <= 0.2 * scale + 1e-6 and reach >= 0.19 * scale


def test_adversarial_trains_on_what_the_attack_finds():
    f, (x, y) = network(), digits(30).tensors()
    f.train()
    modes = []

    def attack(f, x, y, threat, *, start):
        with torch.no_grad():
            modes.append(f.training)
        return fgsm(f, x, y, threat, start=start)

    losses, _ = adversarial(L2(1.0), attack)(f, x, y, state_at(0.5, 30))
    expected = nn.functional.cross_entropy(f(fgsm(f, x, y, L2(1.0))), y, reduction="none")
    assert torch.equal(losses, expected)
    losses.mean().backward()
    assert all(p.grad is not None for p in f.parameters())
    starts = []

    def record(f, x, y, threat, *, start):
        starts.append(start)
        return x

    for progress in (0.1, 0.2):
        adversarial(Linf(0.1), record)(f, x, y, state_at(progress, 30))
    assert torch.equal(*starts), "starts are keyed by seed, epoch and image alone"


def test_trapezoid():
    factor = trapezoid(warmup=0.1, decay_from=0.6)
    points = {0: 1e-3, 0.05: 0.5, 0.1: 1, 0.5: 1, 0.6: 1, 0.8: 0.5, 1: 0}
    for progress, expected in points.items():
        assert factor(progress) == pytest.approx(expected, abs=1e-12)
    assert trapezoid(warmup=0)(0) == 1
    assert trapezoid(decay_from=1)(0.99) == 1


def test_drops():
    factor = drops(0.5, 0.75, factor=0.2)
    points = {0: 1, 0.49: 1, 0.5: 0.2, 0.7: 0.2, 0.75: 0.04, 1: 0.04}
    assert {at: factor(at) for at in points} == pytest.approx(points)
    assert factor.description == "drops(0.5, 0.75, factor=0.2)"


def test_schedule_is_used(monkeypatch):
    seen = []
    step = torch.optim.Adam.step

    def recording(self, *args, **kwargs):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", recording)
    run(network(), natural(), schedule=lambda progress: 1 - progress, epochs=2, lr=0.01)
    assert seen == pytest.approx([0.01 * (1 - k / 10) for k in range(10)])


# --- the loop ---------------------------------------------------------------------------------


def test_training_learns_and_reports():
    data, kept = load("digits", "train").split_off(200)
    model = network()
    history = fit(model, data, natural(), epochs=8, batch_size=32, progress=False,
                  validate=held_out(kept))  # fmt: skip
    assert [row["epoch"] for row in history.rows] == list(range(1, 9))
    assert history["loss"][-1] < 0.6 < history["loss"][0]
    x, y = kept.tensors()
    assert history["clean"][-1] == accuracy(model, x, y) > 0.9
    assert all(p.requires_grad for p in model.parameters())


def test_adversarial_training_makes_robust():
    data, kept = load("digits", "train").split_off(200)
    attack = partial(pgd, steps=10, step_size=0.04)
    threat, inner = Linf(0.2), partial(pgd, steps=3)
    robust = {}
    for name, objective in {
        "natural": natural(), "adversarial": adversarial(threat, inner, step_size=0.1),
        "fgsm": fgsm_training(threat), "free": free(threat),
        "trades": trades(threat, inner, step_size=0.1), "gradients": gradient_regularised(1.0),
        "mixture": mixture(0.5, natural(), adversarial(threat, inner, step_size=0.1)),
    }.items():  # fmt: skip
        history = fit(network(), data, objective, epochs=8, batch_size=32, progress=False,
                      replays=2 if name == "free" else 1,
                      validate=held_out(kept, threat, attack))  # fmt: skip
        robust[name] = history["robust"][-1]
    undefended = robust.pop("natural")
    assert min(robust.values()) > undefended + 0.1 and robust["adversarial"] > undefended + 0.2


def test_every_image_is_seen_once_an_epoch_in_a_new_order():
    seen = []

    def objective(model, x, y, state):
        seen.append(state.keys.rows)
        assert list(state.keys.seed) == [4, (len(seen) - 1) // 5]
        return natural()(model, x, y, state)

    run(network(), objective, epochs=2)
    first, second = torch.cat(seen[:5]), torch.cat(seen[5:])
    everything = train_set().index.sort().values
    assert torch.equal(first.sort().values, everything) and torch.equal(second.sort().values, everything)
    assert not torch.equal(first, second)


def test_replays_use_a_batch_again_with_new_random_numbers():
    seen = []

    def objective(model, x, y, state):
        seen.append((list(state.keys.seed), state.keys.rows, state.progress))
        return natural()(model, x, y, state)

    run(network(), objective, epochs=2, replays=3)
    assert len(seen) == 2 * 5 * 3
    seeds, images, progress = zip(*seen, strict=True)
    assert [tuple(s) for s in seeds[15:18]] == [(4, 1), (4, 1, 1), (4, 1, 2)]
    for i in range(0, 30, 3):
        assert torch.equal(images[i], images[i + 1]) and torch.equal(images[i], images[i + 2])
    assert torch.equal(torch.cat(images[:15:3]).sort().values, train_set().index.sort().values)
    assert progress == pytest.approx([k / 30 for k in range(30)])


def test_the_checkpoint_is_a_plain_safetensors_file(tmp_path):
    from safetensors import safe_open

    path = tmp_path / "deep" / "t.safetensors"
    history = run(network(), natural(), path)
    with safe_open(path, "pt") as file:
        saved = json.loads(file.metadata()["advlearn"])
        assert {key.split(".")[0] for key in file.keys()} == {"model", "optimizer"}  # noqa: SIM118
    assert saved["history"] == history.rows and saved["config"]["seed"] == 4

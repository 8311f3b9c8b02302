"""`check_training`: a training loop, watched from batch to batch and held against `training.fit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advlearn import models, training
from advlearn.attacks import Attack
from advlearn.data import Dataset
from advlearn.exercises.report import Report, Unusable, examine
from advlearn.exercises.watched import same
from advlearn.tensors import generator
from advlearn.threats import Linf, Threat

N, BATCH, EPOCHS, LR, THREAT = 12, 4, 3, 1e-2, Linf(0.2)


class Train(Protocol):
    """What the reader writes."""

    def __call__(
        self, model: nn.Module, images: Dataset, threat: Threat, attack: Attack, *,
        epochs: int, batch_size: int, lr: float, seed: int,
    ) -> object: ...  # fmt: skip


def _images() -> Dataset:
    """Twelve images of pixels between 0.3 and 0.7, so that no start is cut by the box."""
    pixels = torch.randint(77, 178, (N, 1, 4, 4), generator=generator(2), dtype=torch.uint8)
    labels = torch.randint(0, 3, (N,), generator=generator(3))
    return Dataset("planted", "train", pixels, labels, ("0", "1", "2"), 5 * torch.arange(N) + 40)


def _network() -> nn.Module:
    return models.mlp((1, 4, 4), (16,), 3, seed=1).eval()


def _weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


class _Lesson:
    """One run of a loop with a planted attack.

    Attributes:
        calls: what the attack was given, and the weights at that moment.
        passes: (input, train mode?) of every pass through the network that asks for gradients.
    """

    def __init__(self, train: Train, batch_size: int = BATCH, trace: str = "") -> None:
        self.images, self.model, self.trace = _images(), _network(), trace
        self.calls: list[dict] = []
        self.passes: list[tuple[Tensor, bool]] = []
        self.before = _weights(self.model)
        self.inside = False
        self.model.register_forward_pre_hook(self._seen)
        train(self.model, self.images, THREAT, self.attack, epochs=EPOCHS, batch_size=batch_size,
              lr=LR, seed=0)  # fmt: skip
        self.after = _weights(self.model)

    def _seen(self, model: nn.Module, inputs: tuple[Tensor]) -> None:
        if torch.is_grad_enabled() and not self.inside:
            self.passes.append((inputs[0].detach().clone(), model.training))

    def attack(self, f: nn.Module, x: Tensor, y: Tensor, threat: Threat, *,
               start: Tensor | None = None) -> Tensor:  # fmt: skip
        """A pattern that depends on the label; with a `trace`, it leaves one behind."""
        pattern = torch.where((torch.arange(16) + y[:, None]) % 3 == 0, 0.2, -0.2)
        z = x.detach() + pattern.view_as(x)
        self.calls.append({"f": f, "x": x.detach().clone(), "y": y.clone(), "z": z.clone(),
                           "start": None if start is None else start.detach().clone(),
                           "weights": _weights(self.model)})  # fmt: skip
        if self.trace == "grad":
            for p in self.model.parameters():
                p.grad = torch.full_like(p, 3.0) + (0 if p.grad is None else p.grad)
        if self.trace == "graph":
            self.inside = True
            with torch.enable_grad():
                drift = self.model(x.detach()).sum(1).view(-1, 1, 1, 1)
            self.inside = False
            return z + 5 * (drift - drift.detach())
        return z

    def rows(self, x: Tensor) -> list[int]:
        """Which images these are."""
        known = self.images.tensors()[0]
        if x.dtype != known.dtype or float(x.max()) > 1:
            raise Unusable("the attack is given pixels outside [0, 1]: "
                           "images.take(rows).tensors() scales them")  # fmt: skip
        distance = (x[:, None] - known).flatten(2).abs().amax(2)
        if (distance.amin(1) > 1e-6).any():
            raise Unusable("the attack is given something else than the images: it gets x, "
                           "and its start apart")  # fmt: skip
        return distance.argmin(1).tolist()


def _keeps_images(train: Train) -> str | None:
    lesson, fresh = _Lesson(train), _images()
    kept = torch.equal(lesson.images.images, fresh.images)
    kept = kept and torch.equal(lesson.images.labels, fresh.labels)
    return None if kept else "the training images were edited in place: x + δ is a new tensor"


def _covers(train: Train) -> str | None:
    lesson = _Lesson(train)
    steps, given = N // BATCH, [lesson.rows(call["x"]) for call in lesson.calls]
    if len(given) > EPOCHS and any(len(rows) != BATCH for rows in given):
        return f"batches of {len(given[0])} images, batch_size is {BATCH}"
    if len(given) != EPOCHS * steps:
        return (f"the attack is called {len(given)} times for {EPOCHS} epochs of {steps} batches: "
                "once for each step, inside the loop")  # fmt: skip
    for call, rows in zip(lesson.calls, given, strict=True):
        if not torch.equal(call["y"], lesson.images.labels[rows]):
            return "the attack is given other labels than those of its images"
    epochs = [sum(given[i : i + steps], []) for i in range(0, len(given), steps)]
    if any(sorted(rows) != list(range(N)) for rows in epochs):
        return "an epoch does not take every image once: shuffle, then cut into batches"
    return None if epochs[0] != epochs[1] else "the order is the same in every epoch: shuffle anew"


def _starts(train: Train) -> str | None:
    lesson, seen = _Lesson(train), {}
    for call in lesson.calls:
        x, start = call["x"], call["start"]
        if start is None:
            return "start=None: every inner search begins at x, draw threat.sample(x, …)"
        if start.shape != x.shape or not THREAT.contains(start, x).all():
            return "the start is not in S(x): threat.sample gives images x + δ, not δ"
        delta = start - x
        if same(start, x):
            return "the start is x itself: draw threat.sample(x, …)"
        if same(delta[1:], delta[:-1]):
            return "one δ for the whole batch: every image has its own draw"
        for row, d in zip(lesson.rows(x), delta, strict=True):
            if any(same(d, old) for old in seen.get(row, [])):
                return "an image starts at the same point in every epoch: the epoch is part of the key"
            seen.setdefault(row, []).append(d)
    first, second = (call["start"] - call["x"] for call in lesson.calls[:2])
    return "every batch draws the same δs: make the generator once, before the loops" if same(
        first, second) else None  # fmt: skip


def _current(train: Train) -> str | None:
    lesson = _Lesson(train)
    if any(call["f"] is not lesson.model for call in lesson.calls):
        return "the attack is given another network than the one that is trained"
    if same(lesson.before, lesson.after):
        return "the weights have not moved: backward, then optimizer.step()"
    at = [call["weights"] for call in lesson.calls]
    stale = any(torch.equal(a, b) for a, b in zip(at, at[1:], strict=False))
    return ("images are attacked with weights of an earlier step: attack the batch "
            "immediately before its step") if stale else None  # fmt: skip


def _passes(train: Train) -> str | None:
    lesson = _Lesson(train)
    if len(lesson.passes) < len(lesson.calls):
        return "a step without a forward pass that asks for gradients"
    inputs = [z for z, _ in lesson.passes]
    if len(inputs) > len(lesson.calls):
        clean = any(same(z, call["x"]) for z in inputs for call in lesson.calls)
        return ("the loss of the clean images is added: that is a mixture, the equation has "
                "attacked images only" if clean else "more than one pass per step")  # fmt: skip
    for z, call in zip(inputs, lesson.calls, strict=True):
        if same(z, call["x"]):
            return "the loss is taken at x: the attacked images are thrown away"
        if call["start"] is not None and same(z, call["start"]):
            return "the loss is taken at the start: the attacked images are thrown away"
        if not same(z, call["z"]):
            return "the loss is taken elsewhere than at the images that the attack returns"
    mode = all(in_train for _, in_train in lesson.passes)
    return None if mode else ("the step is taken in eval mode: model.train() before the loop, "
                              "the attack looks after itself")  # fmt: skip


def _descent(trace: str = "", **kind: bool) -> Tensor:
    """Weights after full-batch steps with one mistake."""

    def train(model, images, threat, attack, *, epochs, batch_size, lr, seed):
        def adam():
            return torch.optim.Adam(model.parameters(), lr, maximize="ascent" in kind)

        optimizer = torch.optim.SGD(model.parameters(), lr) if "sgd" in kind else adam()
        if "lr" in kind:
            optimizer = torch.optim.Adam(model.parameters())
        x, y = images.tensors()
        for _ in range(epochs):
            optimizer = adam() if "fresh" in kind else optimizer
            if "early" in kind:
                optimizer.zero_grad()
            z = attack(model, x, y, threat)
            if not {"early", "never"} & set(kind):
                optimizer.zero_grad()
            z = z if "attached" in kind else z.detach()
            target = (y + 1) % 3 if "labels" in kind else y
            F.cross_entropy(model(z), target).backward()
            optimizer.step()

    return _Lesson(train, N, trace).after


def _alike(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=LR / 50)


def _follows(train: Train) -> str | None:
    lesson = _Lesson(train, N)
    truth = _Lesson(lambda model, images, threat, attack, *, seed, **settings: training.fit(
        model, images, training.adversarial(threat, attack), schedule=lambda progress: 1.0,
        progress=False, **settings), N).after  # fmt: skip
    if _alike(lesson.after, truth):
        return None
    for message, kind in {
        "gradients add up from step to step: optimizer.zero_grad()": "never",
        "the loss goes up: the outer player descends": "ascent",
        "plain gradient steps: wanted is torch.optim.Adam(model.parameters(), lr)": "sgd",
        "lr is not passed to the optimiser": "lr",
        "a new optimiser in every step forgets Adam's moments: make it once": "fresh",
        "the loss has other labels than y": "labels",
    }.items():
        if _alike(lesson.after, _descent(**{kind: True})):
            return message
    return "the weights differ from those of training.fit"


def _traceless(train: Train) -> str | None:
    for trace in ("grad", "graph"):
        after = _Lesson(train, N, trace).after
        if _alike(after, _Lesson(train, N).after):
            continue
        if trace == "grad":
            return ("gradients that the attack left in .grad go into the step: zero_grad() "
                    "directly before the loss")  # fmt: skip
        return ("the gradient flows back through the attack: δ* is held, so z.detach() "
                "(Danskin)")  # fmt: skip
    return None


def check_training(train: Train) -> Report:
    r"""Try `train(model, images, threat, attack, *, epochs, batch_size, lr, seed)`, in place.

    $$\theta \leftarrow \theta - \eta\,\frac1m \sum_i \nabla_\theta L(\theta, z_i, y_i), \qquad
      z_i = \text{attack}(f_\theta, x_i, y_i)$$

    Madry et al., arXiv:1706.06083, with Adam. The attack is planted: it records what it is given.
    With a single batch the weights are held against those of `training.fit`.
    """
    claims: list[tuple[str, Callable[[Train], str | None]]] = [
        ("leaves the images as they are", _keeps_images),
        ("attacks every image once per epoch, in a new order", _covers),
        ("every inner search has a random start of its own", _starts),
        ("attacks the network as it is at this step", _current),
        ("learns from the attacked images, in train mode", _passes),
        ("the steps are those of training.fit", _follows),
        ("holds the attacked images, whatever the attack leaves behind", _traceless),
    ]
    return examine(train, [(claim, lambda test=test: test(train)) for claim, test in claims])

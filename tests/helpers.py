"""What several test files need: small networks with known answers, and copies of states."""

import copy

import torch
from torch import nn

from advlearn.data import load
from advlearn.tensors import generator


def uniform01(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=generator(seed), dtype=dtype)


class Opposed(nn.Module):
    """Three classes with logits (−s, s, −10), s = ⟨w, x − 1/2⟩: every loss rises along ±w."""

    def __init__(self, shape=(1, 4, 4), seed=0):
        super().__init__()
        w = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
        self.w = nn.Parameter(w / 4)

    def forward(self, x):
        s = ((x - 0.5) * self.w).flatten(1).sum(1)
        return torch.stack([-s, s, torch.full_like(s, -10)], 1)


def mixed_network(shape=(1, 8, 8), classes=10):
    """A network with batch norm and dropout, mixed modes, mixed flags and gradients set."""
    torch_state = torch.get_rng_state()
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(shape[0], 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    size = 4 * shape[1] * shape[2]
    model = nn.Sequential(inner, nn.Flatten(), nn.Dropout(0.5), nn.Linear(size, classes)).double()
    torch.set_rng_state(torch_state)
    model.train()
    inner[2].eval()
    inner[0].bias.requires_grad_(False)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, 0.25)
    return model


def state_of(model):
    """Everything an attack could change: weights, buffers, modes, flags, gradients, hooks."""
    return copy.deepcopy((
        {k: v.clone() for k, v in model.state_dict().items()},
        [(m.training, len(m._forward_hooks)) for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
    ))  # fmt: skip


def same_state(a, b):
    def equal(u, v):
        return u is v is None or (u is not None and v is not None and torch.equal(u, v))

    return (a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])
            and a[1:3] == b[1:3] and all(map(equal, a[3], b[3])))  # fmt: skip


def digits(n=None, split="test"):
    data = load("digits", split)
    return data if n is None else data.subset(n)

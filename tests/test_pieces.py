"""The pieces that tests/README.md offers to other projects: each is taken out by name, with what the table says comes along
and nothing else, into a file of its own, and shown to work there."""
import ast
import importlib.util
import re

import pytest
import torch
from conftest import ROOT

pytestmark = pytest.mark.quick

HEADER = """
import copy
import dataclasses
import functools
import itertools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
"""


def table():
    """Rows | piece | `file` | `name` `name` ... | of tests/README.md: {piece: (file, names)}."""
    text = (ROOT / "tests/README.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| `(\w+\.py)` \| ((?:`\w+` ?)+)\|", text, re.MULTILINE)
    return {piece: (file, re.findall(r"`(\w+)`", names)) for piece, file, names in rows}


def definitions(file):
    """{name: source} of a file's functions, classes and assignments, in its order."""
    source, found = (ROOT / file).read_text(), {}
    for node in ast.parse(source).body:
        names = [target.id for target in node.targets if isinstance(target, ast.Name)] \
            if isinstance(node, ast.Assign) else [getattr(node, "name", None)]
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        for name in filter(None, names):
            found[name] = "\n".join(source.splitlines()[start - 1:node.end_lineno])
    return found


def taken(tmp_path, *pieces):
    """A module that holds the pieces alone."""
    parts = {}
    for piece in pieces:
        file, names = table()[piece]
        all_of = definitions(file)
        assert set(names) <= set(all_of), f"{piece}: {set(names) - set(all_of)} is not in {file}"
        parts |= {name: all_of[name] for name in all_of if name in names}
    (tmp_path / "pieces.py").write_text("\n\n\n".join([HEADER, *parts.values()]) + "\n")
    spec = importlib.util.spec_from_file_location("pieces", tmp_path / "pieces.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Toy(torch.nn.Module):
    """Somebody else's model: one layer of attention over latent frames of one token, with a place and a time added.

    What `rollout` asks of it: make_cache, and a forward that takes a chunk with a cache and its start.
    """

    def __init__(self, pieces, dim=8, heads=2):
        super().__init__()
        torch.manual_seed(0)
        self.pieces, self.num_heads, self.dim, self.num_layers = pieces, heads, dim, 1
        self.qkv, self.out = torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim)

    def make_cache(self, batch, frames, tokens, sink=0, rolling=False):
        return self.pieces.KVCache(self, batch, frames, tokens, sink, rolling)

    def forward(self, x, t, context, layout=None, cache=None, start=0):
        B, C, frames, H, W = x.shape  # four pixels, one token
        position = torch.arange(start, start + frames) if layout is None else torch.tensor(layout.position)
        t = t.view(B, -1, 1).expand(B, frames, 1)
        tokens = x.permute(0, 2, 1, 3, 4).flatten(2)[..., :self.dim] + position.view(1, -1, 1).sin() + t / 1000 + context
        q, k, v = (y.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for y in self.qkv(tokens).chunk(3, -1))
        visible = ((True,) * frames,) * frames if layout is None else layout.visible
        if cache is not None:
            k, v = cache.extend(0, start, k, v)
            visible = ((True,) * k.shape[2],) * frames
        seen = self.pieces.attend_rectangles(q, k, v, visible)
        y = self.out(seen.transpose(1, 2).flatten(2)).unflatten(2, (C, H, W))
        return y.permute(0, 2, 1, 3, 4)


def test_attention_cache_rollout_and_interleaved_forward(tmp_path):
    """A cached rollout of somebody else's model = one interleaved forward on what it has left."""
    pieces = taken(tmp_path, "attention over a KV cache", "the rollout", "the interleaved forward")
    model, chunks, steps = Toy(pieces), [2, 1, 2], [1000.0, 800.0, 400.0]
    random = torch.Generator().manual_seed(1)
    noise, context = torch.randn(2, 2, 5, 2, 2, generator=random), torch.zeros(1)
    with torch.no_grad():
        parts = list(pieces.rollout(model, noise, context, steps, chunks, record=True, generator=random))
        clean = torch.cat([part.x0 for part in parts], dim=2)
        for k, t in enumerate(steps):
            x_t = torch.cat([part.states[k] for part in parts], dim=2)
            again = pieces.interleaved_x0(model, x_t, torch.full((2, 5), t), clean, context, chunks)
            torch.testing.assert_close(again, torch.cat([part.predictions[k] for part in parts], dim=2))


def test_the_streamed_autoencoder_and_the_rewards_gradient(tmp_path):
    pieces = taken(tmp_path, "the streamed VAE", "the reward's gradient")
    torch.manual_seed(0)
    vae = pieces.WanVAE(dim=4, num_res_blocks=1).eval().requires_grad_(False)
    latents, memory = torch.randn(1, 16, 3, 2, 2), {}
    whole = vae.decode(latents, at_once=3)
    streamed = [vae.decode(latents[:, :, i:i + 1], memory) for i in range(3)]
    torch.testing.assert_close(torch.cat(streamed, dim=2), whole, atol=1e-5, rtol=1e-4)
    gradients = []
    for video in (lambda z: vae.decode(z)[:, :, [8]], lambda z: pieces.rewarded_video(vae, z, [8])):
        z = latents.clone().requires_grad_()
        video(z).square().sum().backward()
        gradients.append(z.grad)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    assert (gradients[0][:, :, 0] != 0).any()


def test_the_surrogate_of_cm_grpo(tmp_path):
    """Its gradient is the closed form -w A d log pi / d x0, here for N((1 - s) x0, s^2)."""
    pieces = taken(tmp_path, "CM-GRPO's surrogate", "its advantages")
    torch.manual_seed(0)
    x0, z = torch.randn(2, 3, 4, 2, 2, requires_grad=True), torch.randn(2, 3, 4, 2, 2)
    s, weights = 0.6, torch.tensor([0.5, 0.5, 1.5, 1.5])
    advantage = pieces.group_advantages(torch.tensor([[[1.0], [3.0]]]), torch.ones(1))[0].float()
    mean = (1 - s) * x0
    pieces.surrogate(x0, z, mean, s, 1 - s, advantage, weights).backward()
    score = torch.autograd.grad(-((z - (1 - s) * x0) ** 2).sum() / (2 * s ** 2), x0)[0]
    expected = -weights.view(1, 1, 4, 1, 1) * advantage.view(2, 1, 1, 1, 1) * score / x0.numel()
    torch.testing.assert_close(x0.grad, expected)


def test_the_loss_of_distribution_matching(tmp_path):
    pieces = taken(tmp_path, "DMD's loss")
    torch.manual_seed(0)
    x0, fake, real = (torch.randn(2, 3, 4, 2, 2) for _ in range(3))
    x0.requires_grad_()
    pieces.dmd_loss(x0, pieces.dmd_direction(x0.detach(), fake, real)).backward()
    scale = (x0 - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True).detach()
    torch.testing.assert_close(x0.grad, (fake - real) / scale / x0.numel())


def test_the_whole_transformer(tmp_path):
    pieces = taken(tmp_path, "the causal DiT")
    from conftest import random_dit
    import wan_causal
    ours = random_dit()
    theirs = pieces.WanModel(ours.config)
    theirs.load_state_dict(ours.state_dict())
    x, t, context = torch.randn(1, 16, 3, 4, 4), torch.rand(1, 3) * 1000, torch.randn(1, 8, 16)
    layout = wan_causal.block_causal([1, 2])
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, t, context, layout), ours(x, t, context, layout))


def test_every_piece_is_shown_to_work():
    used = set(re.findall(r'"((?:the|its|DMD|CM-GRPO|attention)[^"\n]*)"[,)]', (ROOT / "tests/test_pieces.py").read_text()))
    assert set(table()) <= used, set(table()) - used
    assert len(table()) == 9

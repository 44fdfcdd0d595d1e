"""What every stage shares: the causal Wan 2.1 DiT and its KV cache, the flow schedule, the
few-step rollout, the reward's gradient; the VAE, the text encoder, ImageReward; loading and
saving.

Papers: Wan 2.1 (arXiv 2503.20314), CausVid (2412.07772), Self Forcing (2506.08009),
Reward-Forcing (2601.16933), RAVEN (2605.15190), ImageReward (2304.05977).

Conventions
  Latents   (B, C, F, H, W): C = 16 channels, F latent frames, 1/8 of the picture's height
            and width.
  Video     (B, 3, T, H, W) in [-1, 1]; T = 1 + 4(F - 1).
  Tokens    L = F * S, S = (H/2)(W/2) of them per latent frame; N heads of D dimensions.
  Noise     sigma in [0, 1] and 1 is pure noise: x_t = (1 - sigma) x0 + sigma eps,
            v = eps - x0, t = 1000 sigma. t is a number, one per sample (B,), or one per
            latent frame (B, F).
  Chunk     the latent frames that are denoised together; `chunks` is the list of their
            sizes, e.g. [3] * 7.
Latents are float32 everywhere; the networks convert to their own dtype and back.

Part 1 is what the papers change, to be read from top to bottom: schedule, who sees whom,
attention and cache, DiT, rollout, the reward's gradient. Part 2 are the frozen networks,
part 3 files and runs.
"""
import argparse
import contextlib
import copy
import dataclasses
import datetime
import errno
import fcntl
import functools
import hashlib
import html
import importlib
import io
import itertools
import json
import math
import operator
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import unicodedata
from pathlib import Path, PurePosixPath

try:
    import numpy as np
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
    import torch.utils.checkpoint
    from torch.utils._pytree import tree_leaves, tree_map
    from tqdm import tqdm
except KeyboardInterrupt:  # these take seconds, so the scripts import this file first
    print('error: stopped by Ctrl-C', file=sys.stderr)
    sys.exit(130)

# Recompute in the backward pass instead of keeping activations; nothing in them is random.
checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False,
                               preserve_rng_state=False)


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what, where
    and what to do."""


def first_line(error):
    """The first line of what an exception says, which a sentence can quote."""
    return (str(error).strip() or 'no reason').splitlines()[0]


# ========================================================================================
# PART 1: what the papers change
# ========================================================================================

# ----------------------------------------------------------------------------------------
# Schedule: the only place where x0, v, eps and sigma are converted
#
# Rectified flow: x_t lies on the straight line from x0 to eps, and v is its direction. So each
# of x0, eps and v follows from any other and x_t.

FEW_STEPS = (1000, 750, 500, 250)  # the student's timesteps before the shift (Self Forcing)


def shift_sigma(sigma, shift):
    """Timestep shift: more steps at high noise. sigma' = shift sigma / (1 + (shift - 1) sigma)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def warped_steps(shift=5.0):
    """The timesteps the network really sees: at shift 5 [1000, 937.5, 833.33, 625]."""
    return [1000 * shift_sigma(t / 1000, shift) for t in FEW_STEPS]


def sigma_of(t, x):
    """t (number, (B,) or (B, F)) -> sigma, a number or broadcastable to x (B, C, F, H, W)."""
    sigma = t / 1000
    if not torch.is_tensor(sigma):
        return sigma
    if sigma.shape not in ((x.shape[0],), (x.shape[0], x.shape[2])):
        raise ValueError(f't of shape {tuple(sigma.shape)} fits neither (B,) nor (B, F) of '
                         f'{tuple(x.shape)}')
    return sigma.view(x.shape[0], 1, -1, 1, 1)


def add_noise(x0, eps, t):
    """x_t = (1 - sigma) x0 + sigma eps; all (B, C, F, H, W)."""
    sigma = sigma_of(t, x0)
    return (1 - sigma) * x0 + sigma * eps


def x0_from_v(x_t, v, t):
    """x0 = x_t - sigma v."""
    return x_t - sigma_of(t, x_t) * v


def v_from_x0(x_t, x0, t):
    """v = (x_t - x0) / sigma; t > 0."""
    return (x_t - x0) / sigma_of(t, x_t)


def gaussian(shape, generator, device):
    """Standard normal noise, float32. With a list of generators, one per sample, every sample
    has its own stream, so that it does not depend on the batch it is in."""
    if isinstance(generator, (list, tuple)):
        return torch.cat([gaussian((1, *shape[1:]), g, device) for g in generator])
    where = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=where).to(device)


def guided_velocity(model, x, t, context, negative, guidance):
    """Classifier-free guidance: v_uncond + guidance (v_cond - v_uncond); t a number, or (B,)."""
    t = t if torch.is_tensor(t) else torch.full((x.shape[0],), float(t), device=x.device)
    v = model(x, t, context)
    if guidance == 1:  # half the work
        return v
    v_uncond = model(x, t, negative)
    return v_uncond + guidance * (v - v_uncond)


# ----------------------------------------------------------------------------------------
# Who sees whom: one rule, as data

@dataclasses.dataclass(frozen=True)
class Layout:
    """What the DiT must know of each latent frame of a sequence, besides its content.

    position: RoPE position; an interleaved sequence has each twice.
    chunk:    the chunk it belongs to.
    history:  whether later chunks may see it.
    window, sink: a frame sees at most `window` latent frames, its own chunk included, of which
              the first `sink` of the video are always kept. None: everything.
    """
    position: tuple
    chunk: tuple
    history: tuple
    window: int | None = None
    sink: int = 0

    def __len__(self):
        return len(self.position)

    def sees(self, q, k):
        """The visibility rule: its own chunk (the noisy or the clean one), and the history
        before it."""
        if self.chunk[q] == self.chunk[k]:
            return self.history[q] == self.history[k]  # noisy sees noisy, clean sees clean
        if not (self.history[k] and self.chunk[k] < self.chunk[q]):
            return False  # the future, and what was still noisy
        if self.window is None or self.position[k] < self.sink:
            return True
        # the window ends with the query's chunk, and the sink takes its part of it
        end = 1 + max(p for p, c in zip(self.position, self.chunk) if c == self.chunk[q])
        return self.position[k] >= end - (self.window - self.sink)

    @functools.cached_property
    def visible(self):
        """The rule as rows of booleans, F x F: visible[q][k]. None when everything sees
        everything."""
        rows = tuple(tuple(self.sees(q, k) for k in range(len(self))) for q in range(len(self)))
        return None if all(map(all, rows)) else rows


def bidirectional(frames):
    """All frames see all frames."""
    return Layout(tuple(range(frames)), (0,) * frames, (True,) * frames)


def block_causal(chunks):
    """Every chunk sees itself and the chunks before it, as they are in the sequence (diffusion
    forcing)."""
    chunk = tuple(i for i, n in enumerate(chunks) for _ in range(n))
    return Layout(tuple(range(len(chunk))), chunk, (True,) * len(chunk))


def interleaved(chunks, window=None, sink=0):
    """noisy 1, clean 1, noisy 2, clean 2, ..., noisy T: 2T - 1 segments (RAVEN's training-time
    test).

    A noisy chunk sees itself and the clean chunks before it, a clean one itself and the clean
    ones before it, nothing else sees a noisy chunk. Both carry the same positions. See
    `interleave`.
    """
    position, chunk, history, start = [], [], [], 0
    for i, n in enumerate(chunks):
        last = i == len(chunks) - 1  # nothing would see its clean states
        for clean in (False,) if last else (False, True):
            position += range(start, start + n)
            chunk += [i] * n
            history += [clean] * n
        start += n
    return Layout(tuple(position), tuple(chunk), tuple(history), window, sink)


def interleave(noisy, clean, chunks):
    """Noisy and clean latents (B, C, F, H, W), or their timesteps (B, F) -> one sequence in
    `interleaved` order."""
    axis = 1 if noisy.ndim == 2 else 2
    pairs = zip(noisy.split(list(chunks), axis), clean.split(list(chunks), axis))
    return torch.cat([part for pair in pairs for part in pair][:-1], axis)


def noisy_part(sequence, chunks):
    """The noisy chunks of an interleaved output (B, C, F', H, W) -> (B, C, F, H, W)."""
    sizes = [n for n in chunks for _ in range(2)][:-1]
    return torch.cat(sequence.split(sizes, dim=2)[::2], dim=2)


def chunk_sizes(frames, chunk=3, first=None):
    """Split `frames` latent frames into chunks: the first of size `first`, the rest of size
    `chunk`, the last one what is left. chunk_sizes(7, 3, 1) -> [1, 3, 3]."""
    if frames < 1 or chunk < 1 or (first is not None and first < 1):
        raise ValueError(f'cannot split {frames} latent frames into chunks of {chunk} (first: '
                         f'{first})')
    sizes = [min(first or chunk, frames)]
    while sum(sizes) < frames:
        sizes.append(min(chunk, frames - sum(sizes)))
    return sizes


def draw_per_chunk(count, chunks, generators, device):
    """A random index below `count` for each chunk of each sample, repeated over the chunk's
    frames: (B, F)."""
    index = torch.stack([torch.randint(count, (len(chunks),), generator=g, device=g.device)
                         for g in generators])  # (B, chunks)
    sizes = torch.tensor(chunks, device=index.device)
    return index.repeat_interleave(sizes, dim=1, output_size=sum(chunks)).to(device)


def chunk_weights(chunks, shift):
    """Loss weight of each latent frame (F,), constant within a chunk, mean 1: RAVEN's
    chunk-wise weighting.

    shift < 0 weights later chunks more, > 0 earlier ones, 0 all alike. With p_j the share of
    frames in chunks j..T and pi_a(p) = a p / (1 + (a - 1) p), which is `shift_sigma`:
    pi_|shift|(p_T / p_j) where shift < 0, pi_shift(p_j) where it is > 0.
    """
    total = sum(chunks)
    p = [sum(chunks[j:]) / total for j in range(len(chunks))]
    if shift < 0:
        weights = [shift_sigma(p[-1] / q, -shift) for q in p]  # 1 for the last chunk
    elif shift > 0:
        weights = [shift_sigma(q, shift) for q in p]  # 1 for the first one
    else:
        weights = [1.0] * len(p)
    weights = torch.tensor([w for w, n in zip(weights, chunks) for _ in range(n)])  # (F,)
    return weights / weights.mean()


def runs(indices):
    """Integers -> their runs of neighbours as (start, stop), in order:
    [5, 6, 0, 1, 2] -> [(5, 7), (0, 3)]."""
    out = []
    for i in indices:
        if out and out[-1][1] == i:
            out[-1] = (out[-1][0], i + 1)
        else:
            out.append((i, i + 1))
    return out


# ----------------------------------------------------------------------------------------
# Attention

@functools.lru_cache(maxsize=None)
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention
    # Each length and mask is a kernel of its own. Past the limit of 8 torch would go on without
    # compiling, in words that nobody reads, and hold all scores at once: 165 GiB at full size.
    # With fullgraph it raises instead.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@functools.lru_cache(maxsize=64)
def flex_mask(visible, tokens, device, block=128):
    """Rows of booleans over frames -> flex attention's BlockMask over tokens, made from the
    frames: torch's own create_block_mask looks at each pair of tokens, which takes gigabytes
    for a long interleaved sequence."""
    from torch.nn.attention.flex_attention import BlockMask
    table = torch.tensor(visible, device=device)  # (Fq, Fk)

    def rule(b, h, q, k):
        return table[q // tokens, k // tokens]

    def by_block(frames, reduce):
        """What holds for some, or for all, tokens of each block: (F, n) -> (n, blocks)."""
        rows = frames.repeat_interleave(tokens, dim=0)
        rows = F.pad(rows, (0, 0, 0, -len(rows) % block))  # to whole blocks
        return reduce(rows.unflatten(0, (-1, block)), dim=1).T

    def listed(blocks):
        """(blocks of q, of k) -> how many are True in each row, and their numbers first."""
        count = blocks.sum(1, dtype=torch.int32)
        order = blocks.int().argsort(dim=1, descending=True, stable=True).int()
        # contiguous: the kernel on CUDA reads a row's numbers one after the other,
        # whatever their strides are
        return count[None, None], order.contiguous()[None, None]

    some = by_block(by_block(table, torch.any), torch.any)
    every = by_block(by_block(table, torch.all), torch.all)
    return BlockMask.from_kv_blocks(
        *listed(some & ~every),  # blocks in which the rule is asked
        *listed(every),  # blocks that are seen whole
        BLOCK_SIZE=block, mask_mod=rule,
        seq_lengths=tuple(n * tokens for n in table.shape))


def attend(q, k, v, visible=None, backend='auto'):
    """Softmax attention in which query frame i sees the key frames j with visible[i][j].

    q (B, N, Fq * S, D), k and v (B, N, Fk * S, D) -> (B, N, Fq * S, D).
    visible: Fq rows of Fk booleans, or None: everything sees everything.
    backend: how a mask is computed, 'rectangles', 'flex', or 'auto': flex for more than two
             groups of query frames on CUDA, else rectangles (flex has no backward on a CPU).
             All are exact.
    """
    if visible is None:
        return F.scaled_dot_product_attention(q, k, v)
    if backend == 'auto':
        backend = 'flex' if q.is_cuda and len(set(visible)) > 2 else 'rectangles'
    masked = attend_flex if backend == 'flex' else attend_rectangles
    return masked(q, k, v, visible)


def attend_flex(q, k, v, visible):
    """One flex-attention kernel for the whole mask. On a CPU uncompiled: slow, forward only,
    good for proofs."""
    from torch.nn.attention.flex_attention import flex_attention
    mask = flex_mask(visible, q.shape[2] // len(visible), q.device)
    return (compiled_flex() if q.is_cuda else flex_attention)(q, k, v, block_mask=mask)


def attend_rectangles(q, k, v, visible):
    """A mask over whole frames is a union of full rectangles: one unmasked call for each group
    of neighbouring query frames that see the same keys. Needs no compiler and runs anywhere."""
    tokens, out, start = q.shape[2] // len(visible), [], 0
    for seen, group in itertools.groupby(visible):
        stop = start + len(list(group))
        where = runs([j for j, sees in enumerate(seen) if sees])
        queries = q[:, :, start * tokens:stop * tokens]
        keys, values = (take_frames(x, where, tokens) for x in (k, v))
        out.append(F.scaled_dot_product_attention(queries, keys, values))
        start = stop
    return torch.cat(out, dim=2)


def take_frames(x, where, tokens):
    """The tokens of some runs of frames, x (B, N, F * S, D): a view for one run, else a copy."""
    parts = [x[:, :, a * tokens:b * tokens] for a, b in where] or [x[:, :, :0]]
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


class KVCache:
    """Self-attention keys (after RoPE) and values of past latent frames, and the prompt's
    cross-attention ones.

    Preallocated: per layer (B, N, frames * S, D). With fewer `frames` than the video has, it is
    a ring: softmax does not care about order, so a new frame overwrites the oldest one, except
    the first `sink` frames, which stay. Frames come in order from 0 on, so which slot holds
    which follows from their numbers, and nothing waits for the device.
    """

    def __init__(self, config, batch, frames, tokens, sink=0, rolling=True, dtype=torch.float32,
                 device='cpu'):
        """frames: capacity in latent frames; tokens: S; rolling: whether frames may be
        overwritten."""
        if not 0 <= sink < frames:
            raise ValueError(f'a cache of {frames} latent frames cannot keep a sink of {sink}')
        shape = (batch, config.num_heads, frames * tokens, config.dim // config.num_heads)
        layers = range(config.num_layers)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        # per layer (keys, values) of the prompt, computed at the first forward
        self.cross = None
        self.frames, self.tokens, self.sink, self.rolling = frames, tokens, sink, rolling

    def slots(self, start, count):
        """The slots of latent frames start .. start + count - 1. ValueError if there are none
        for them."""
        ring = self.frames - self.sink
        if start + count - max(start, self.sink) > ring:
            raise ValueError(f'a chunk of {count} latent frames does not fit a cache of '
                             f'{self.frames} with a sink of {self.sink}: window must be at '
                             f'least chunk + sink = {count + self.sink}')
        if not self.rolling and start + count > self.frames:
            raise ValueError(f'latent frames {start} to {start + count - 1} do not fit a cache '
                             f'of {self.frames}')
        # the first frames fill the slots in order; from then on those behind the sink go round
        return [p if p < self.frames else self.sink + (p - self.sink) % ring
                for p in range(start, start + count)]

    def extend(self, layer, start, k, v):
        """The keys and values that latent frames start, start + 1, ... see: their own and those
        before them.

        k, v (B, N, count * S, D) -> both (B, N, seen * S, D). Without gradient the new ones are
        written into the ring, over what an earlier denoising step of the same frames has left
        there, and views of it are returned. With gradient nothing is written: the history is a
        constant, and gradient reaches the new ones.
        """
        count = k.shape[2] // self.tokens
        slots = self.slots(start, count)
        if torch.is_grad_enabled():
            # what this chunk would overwrite is its own earlier step, or has left the window
            old = runs([slot for slot in range(min(start, self.frames)) if slot not in slots])
            return tuple(torch.cat([take_frames(past[layer], old, self.tokens), new], dim=2)
                         for past, new in ((self.k, k), (self.v, v)))
        where = runs(slots)  # one, but two where the ring's end lies within the chunk
        sizes = [(b - a) * self.tokens for a, b in where]
        for ring, new in ((self.k[layer], k), (self.v[layer], v)):
            for (a, b), part in zip(where, new.split(sizes, dim=2)):
                ring[:, :, a * self.tokens:b * self.tokens] = part
        # whatever lies in the ring is within the window, in any order
        seen = min(start + count, self.frames) * self.tokens
        return self.k[layer][:, :, :seen], self.v[layer][:, :, :seen]


# ----------------------------------------------------------------------------------------
# DiT; weights under Wan's own key names

@dataclasses.dataclass
class WanConfig:
    """Sizes of a Wan 2.1 text-to-video DiT, under the field names of Wan's config.json."""
    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    in_dim: int = 16
    out_dim: int = 16
    patch_size: tuple = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self):
        self.patch_size = tuple(self.patch_size)
        even = self.dim % self.num_heads == 0 and (self.dim // self.num_heads) % 2 == 0
        if self.patch_size != (1, 2, 2) or not even:
            raise InputError(f'unsupported DiT sizes: patch {self.patch_size} must be (1, 2, '
                             f'2), and {self.dim} dimensions over {self.num_heads} heads must '
                             'give an even head size')
        if self.in_dim != self.out_dim:
            raise InputError(f'a DiT that reads {self.in_dim} channels and predicts '
                             f'{self.out_dim} is no text-to-video model: only those are '
                             'supported')


CONFIGS = {
    'tiny': WanConfig(dim=192, ffn_dim=768, num_heads=6, num_layers=6, freq_dim=64, text_dim=64,
                      text_len=32),
    '1.3B': WanConfig(),
    '14B': WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
}
MAX_POSITION = 1024  # rows of Wan's RoPE tables


@functools.lru_cache(maxsize=8)
def rope_axis(count, device):
    """cos and sin (1024, count, 2) of the `count` angles of each position along one axis."""
    theta = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    angles = torch.arange(MAX_POSITION)[:, None] * theta
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float().to(device)


@functools.lru_cache(maxsize=64)
def rope_table(position, height, width, head_dim, device):
    """cos and sin (L, 1, D/2, 2) of each token's angles: D/2 - 2(D/6) of them for time, D/6 for
    height and for width.

    position: the RoPE position of each latent frame; height and width in tokens. Wan's tables
    end at 1024; they are on the device once, so that a new chunk's table is made of views and
    waits for nothing.
    """
    highest = max(*position, height - 1, width - 1)
    if highest >= MAX_POSITION:
        raise ValueError(f'position {highest} is past the RoPE table: Wan has {MAX_POSITION} '
                         f'positions per axis ({1 + 4 * (MAX_POSITION - 1)} video frames)')
    n = head_dim // 2
    time, space = rope_axis(n - 2 * (n // 3), device), rope_axis(n // 3, device)
    parts = (torch.stack([time[p] for p in position])[:, None, None],  # (F, 1, 1, .., 2)
             space[None, :height, None],  # (1, h, 1, .., 2)
             space[None, None, :width])  # (1, 1, w, .., 2)
    size = (len(position), height, width, -1, 2)
    table = torch.cat([x.expand(size) for x in parts], dim=3)  # (F, h, w, D/2, 2)
    return table.flatten(0, 2).unsqueeze(1)


def rotate(x, rope):
    """RoPE on neighbouring numbers, (a, b) -> (a cos - b sin, a sin + b cos): x (B, L, N, D),
    rope as `rope_table`."""
    (a, b), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), rope.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


def sinusoid(t, dim):
    """Timestep features [cos, sin]: t (...) -> (..., dim), float32 computed in float64."""
    i = torch.arange(dim // 2, dtype=torch.float64, device=t.device)
    angle = t.double().unsqueeze(-1) * 10000.0 ** (-i / (dim // 2))
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


class RMSNorm(nn.Module):
    """RMS norm over the last dimension, computed in float32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32."""

    def forward(self, x):
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        y = F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)
        return y.to(x.dtype)


def modulate(x, shift, scale):
    """x (B, L, C) by shift and scale (B, F or 1, 1, C), one per latent frame."""
    frames = x.unflatten(1, (shift.shape[1], -1))  # (B, F or 1, S or L, C)
    return torch.addcmul(shift, frames, 1 + scale).flatten(1, 2).to(x.dtype)


def gated(x, y, gate):
    """x + y gate: x and y (B, L, C), gate (B, F or 1, 1, C)."""
    x, y = (z.unflatten(1, (gate.shape[1], -1)) for z in (x, y))
    return torch.addcmul(x, y, gate).flatten(1, 2).to(y.dtype)


class Attention(nn.Module):
    """The projections and norms of self- and cross-attention: q, k, v, o, norm_q, norm_k."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)

    def split(self, x, rope=None):
        x = x.unflatten(-1, (self.heads, -1))  # (B, L, N, D)
        return (x if rope is None else rotate(x, rope)).transpose(1, 2)  # (B, N, L, D)

    def queries(self, x, rope=None):
        return self.split(self.norm_q(self.q(x)), rope)

    def keys_values(self, x, rope=None):
        return self.split(self.norm_k(self.k(x)), rope), self.split(self.v(x))

    def output(self, x):
        return self.o(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward; the first and last modulated by the
    timestep."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.self_attn = Attention(config)
        self.norm3 = LayerNorm(config.dim, config.eps)
        self.cross_attn = Attention(config)
        self.norm2 = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(config.dim, config.ffn_dim), nn.GELU('tanh'),
                                 nn.Linear(config.ffn_dim, config.dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim ** 0.5)

    def forward(self, x, e, text, rope, visible=None, backend='auto', extend=None):
        """x (B, L, C); e (B, F or 1, 6, C) float32; text: (B, L', C), or its keys and values;
        visible: see `attend`.

        extend: takes the new keys and values and returns all that the queries may read, see
        `KVCache.extend`.
        """
        q, k, v = self.before(x, e, rope)
        if extend is not None:
            k, v = extend(k, v)
        return self.after(x, attend(q, k, v, visible, backend), e, text)

    def read(self, text):
        """The prompt's cross-attention keys and values (B, N, L', D), outside of a forward;
        text (B, L', C)."""
        return self.cross_attn.keys_values(text)

    def before(self, x, e, rope):
        """Queries, keys and values of self-attention; like `after`, it has static shapes and
        compiles well."""
        shift, scale = (self.modulation.float() + e)[:, :, :2].chunk(2, dim=2)
        y = modulate(self.norm1(x), shift, scale)
        return self.self_attn.queries(y, rope), *self.self_attn.keys_values(y, rope)

    def after(self, x, attended, e, text):
        """What follows self-attention."""
        gate1, shift, scale, gate2 = (self.modulation.float() + e)[:, :, 2:].chunk(4, dim=2)
        x = gated(x, self.self_attn.output(attended), gate1)
        k, v = text if isinstance(text, tuple) else self.cross_attn.keys_values(text)
        x = x + self.cross_attn.output(attend(self.cross_attn.queries(self.norm3(x)), k, v))
        return gated(x, self.ffn(modulate(self.norm2(x), shift, scale)), gate2)


class Head(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.out_dim * math.prod(config.patch_size))
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim ** 0.5)

    def forward(self, x, e):
        shift, scale = (self.modulation.float() + e.unsqueeze(2)).chunk(2, dim=2)
        return self.head(modulate(self.norm(x), shift, scale))


class WanModel(nn.Module):
    """Wan 2.1's diffusion transformer: predicts v = eps - x0.

    checkpointing: recompute each block in the backward pass, not keeping its activations.
    autocast: compute in this dtype while the weights stay float32 (mixed-precision training);
              None: in theirs.
    backend: how masked attention is computed, see `attend`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing, self.autocast, self.backend = False, None, 'auto'
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size,
                                         stride=config.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU('tanh'),
                                            nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(),
                                            nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    def forward(self, x, t, context, layout=None, cache=None, start=0):
        """One forward for every use; what differs is data.

        x        (B, C, F, H, W) latents; H and W even.
        t        timesteps in [0, 1000], one per sample (B,) or per latent frame (B, F).
        context  (B, L', text_dim) text embeddings; without gradient ignored when the cache
                 already holds the prompt.
        layout   positions and visibility of the frames; default: `bidirectional`.
        cache    a KVCache, instead of a layout: the frames are a chunk at positions start,
                 start + 1, ... that sees itself and the history. Without gradient its keys and
                 values are written into the cache, so a clean pass at t = 0 after the last
                 step leaves the history there; see `KVCache.extend`.
        Returns v (B, C, F, H, W), float32.
        """
        self.check_input(x, t, context, layout, cache)
        # No cache: a weight is cast where it is used, once in a forward. Kept, the casts would be
        # a second model in memory, whole even where this one is sharded.
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None,
                            cache_enabled=False):
            return self.compute(x, t, context, layout, cache, start)

    def prompt_keys_values(self, context):
        """The prompt's cross-attention keys and values (B, N, L', D) of each layer."""
        text = self.text_embedding(context.to(self.dtype))
        return [block.read(text) for block in self.blocks]

    def make_cache(self, batch, frames, tokens, sink=0, rolling=False):
        """An empty KVCache for this model, see there."""
        return KVCache(self.config, batch, frames, tokens, sink, rolling, self.dtype,
                       self.patch_embedding.weight.device)

    @property
    def dtype(self):
        """What the activations, and the keys and values in a cache, are computed in."""
        return self.autocast or self.patch_embedding.weight.dtype

    def compute(self, x, t, context, layout, cache, start):
        """`forward` on checked input."""
        B, C, F_, H, W = x.shape
        p, q = H // self.config.patch_size[1], W // self.config.patch_size[2]
        layout, dtype = layout or bidirectional(F_), self.dtype
        recompute = self.checkpointing and torch.is_grad_enabled()

        # what every block is told: places, times, and the prompt
        position = layout.position if cache is None else tuple(range(start, start + F_))
        rope = rope_table(position, p, q, self.config.dim // self.config.num_heads, x.device)
        times = sinusoid(t.view(B, -1), self.config.freq_dim).to(dtype)
        e = self.time_embedding(times)  # (B, F or 1, C)
        e6 = self.time_projection(e).unflatten(-1, (6, -1)).float()  # (B, F or 1, 6, C)
        if cache is None or torch.is_grad_enabled():
            texts = [self.text_embedding(context.to(dtype))] * len(self.blocks)
        else:  # the prompt's keys and values are the same in every forward of a rollout
            texts = cache.cross = cache.cross or self.prompt_keys_values(context)

        x = self.patch_embedding(x.to(dtype)).flatten(2).transpose(1, 2)  # (B, L, C)
        x = x.contiguous()  # token after token in memory, or every norm would copy it
        for i, block in enumerate(self.blocks):
            extend = None if cache is None else functools.partial(cache.extend, i, start)
            args = (x, e6, texts[i], rope, layout.visible, self.backend, extend)
            x = checkpoint(block, *args) if recompute else block(*args)
        x = self.head(x, e.float()).float()  # (B, L, 4 C')
        x = x.view(B, F_, p, q, *self.config.patch_size[1:], self.config.out_dim)
        x = x.permute(0, 6, 1, 2, 4, 3, 5)  # (B, C', F, p, 2, q, 2)
        return x.reshape(B, self.config.out_dim, F_, H, W)

    def check_input(self, x, t, context, layout, cache):
        """Shapes that do not fit raise a ValueError with the shapes."""
        c = self.config
        shapes = f'x {tuple(x.shape)}, t {tuple(t.shape)}, context {tuple(context.shape)}'
        if x.ndim != 5 or x.shape[1] != c.in_dim or x.shape[3] % 2 or x.shape[4] % 2:
            raise ValueError(f'x must be (B, {c.in_dim}, F, H, W) with even H and W: {shapes}')
        if tuple(t.shape) not in ((x.shape[0],), (x.shape[0], x.shape[2])):
            raise ValueError(f't must be (B,) or (B, F): {shapes}')
        if context.ndim != 3 or context.shape[0] != x.shape[0] or context.shape[2] != c.text_dim:
            raise ValueError(f'context must be (B, tokens, {c.text_dim}): {shapes}')
        if layout is not None and len(layout) != x.shape[2]:
            raise ValueError(f'a layout of {len(layout)} frames is for x of as many frames: '
                             f'{shapes}')
        if layout is not None and cache is not None:
            raise ValueError('a forward with a cache takes one chunk, so no layout')
        if cache is not None and (cache.k[0].shape[0] != x.shape[0] or
                                  cache.tokens * 4 != x.shape[3] * x.shape[4]):
            raise ValueError(f'a cache for batch {cache.k[0].shape[0]} and {cache.tokens} '
                             f'tokens per frame: {shapes}')


# ----------------------------------------------------------------------------------------
# The rollout: training as at inference, and the interleaved forward

@dataclasses.dataclass
class Chunk:
    """One chunk of a rollout; latents (B, C, f, H, W)."""
    start: int  # its first latent frame
    x0: torch.Tensor  # the clean endpoint
    states: list  # with record=True: the noisy state at each step that was run
    predictions: list  # with record=True: the x0 predicted from each of them, without graph


def consistency_kernel(x, x0, t, s):
    """Where the consistency sampler goes from x at t, having predicted x0: N((1 - sigma_s) x0,
    sigma_s^2 I) at s.

    Returns (mean, standard deviation, d mean / d x0).
    """
    return (1 - s / 1000) * x0, s / 1000, 1 - s / 1000


def rollout(model, noise, context, steps, chunks, *, window=None, sink=0, init=None,
            init_chunk=None, exit_step=None, grad_from=0, record=False,
            kernel=consistency_kernel, generator=None):
    """Generate a video chunk by chunk with the KV cache, and yield each `Chunk` as soon as it
    exists.

    Self Forcing's algorithm 1. Each chunk is denoised by the consistency sampler: from x_t
    predict x0, and re-noise it with fresh noise to the next of `steps`. The last prediction is
    the endpoint. A forward of the endpoint at t = 0 then leaves the chunk's clean keys and
    values in the cache, for the chunks after it.

    model      the DiT (or its DDP wrapper).
    noise      (B, C, F, H, W): the pure noise that the F new latent frames start from.
    context    (B, L', text_dim).
    steps      the timesteps that the network sees, falling from 1000, see `warped_steps`.
    chunks     sizes of the chunks, summing to F; [F] with a bidirectional model is its
               few-step sampling.
    window     latent frames a frame may see, its own chunk included; None: all.
    sink       how many of these are the video's first ones.
    init       (B, C, F', H, W) clean latents that are already there; the rollout goes on
               after them.
    init_chunk the size of the chunks that these were made in; None: of the largest new one.
    exit_step  index of the step at which every chunk stops; its prediction is the endpoint
               and carries gradient (if gradients are enabled). None: all steps, no gradient.
    grad_from  chunks that start before this latent frame carry no gradient.
    record     keep the noisy states and predictions.
    kernel     where the sampler goes from a prediction:
               (x, x0, t, next t) -> (mean, standard deviation, ...).
    generator  of the re-noising noise: None, a torch.Generator, or one for each sample.
    """
    net = getattr(model, 'module', model)
    B, C, F_, H, W = noise.shape
    begin = 0 if init is None else init.shape[2]
    if sum(chunks) != F_:
        raise ValueError(f'chunks {list(chunks)} do not sum to the {F_} latent frames of noise '
                         f'{tuple(noise.shape)}')
    if exit_step is not None and not 0 <= exit_step < len(steps):
        raise ValueError(f'exit_step {exit_step} is not the index of one of {len(steps)} steps')
    cache = None  # a single chunk without history, as a bidirectional student's, needs none
    if len(chunks) > 1 or begin:
        frames = min(window or begin + F_, begin + F_)
        cache = net.make_cache(B, frames, H * W // 4, sink, rolling=window is not None)

    def forward(x, t, start):
        t = torch.full((B,), float(t), device=x.device)
        return model(x, t, context, cache=cache, start=start)

    # What is given goes into the cache as a rollout would have left it there, in whole chunks
    # after an independent first frame (1 + 3 latent frames: [1, 3]).
    start, whole = 0, init_chunk or max(chunks)
    for n in chunk_sizes(begin, whole, begin % whole or None) if begin else ():
        with torch.no_grad():
            forward(init[:, :, start:start + n], 0, start)
        start += n

    for i, n in enumerate(chunks):
        x = noise[:, :, start - begin:start - begin + n]  # (B, C, n, H, W)
        states, predictions = [], []
        for k, t in enumerate(steps):
            # Only the step that the chunk ends at carries gradient, and only to the chunk's
            # own keys and values: the history in the cache is a constant.
            carries = k == exit_step and start >= grad_from and torch.is_grad_enabled()
            with torch.set_grad_enabled(carries):
                x0 = x0_from_v(x, forward(x, t, start), t)
            if record:
                states.append(x)
                predictions.append(x0.detach())
            if k == exit_step or k == len(steps) - 1:
                break
            # re-noise the prediction to the next timestep, with fresh noise
            mean, std, *_ = kernel(x, x0, t, steps[k + 1])
            x = mean + std * gaussian(x0.shape, generator, x0.device)
        # the caller may decode it, or take its gradient, at once
        yield Chunk(start, x0, states, predictions)

        # The clean pass: what later chunks see of this one are its endpoint's keys and values.
        if i < len(chunks) - 1:
            if carries and cache.rolling:
                # the backward pass of this chunk still reads the ring as it is now
                cache = copy.deepcopy(cache)
            with torch.no_grad():
                forward(x0.detach(), 0, start)
        start += n


@torch.no_grad()
def recorded_rollout(model, noise, context, steps, chunks, generator=None,
                     kernel=consistency_kernel):
    """The rollout as at inference, with all it went through: (states, endpoints).

    states: for each of `steps` the noisy latents of all chunks (B, C, F, H, W);
    endpoints: (B, C, F, H, W).
    """
    parts = list(rollout(model, noise, context, steps, chunks, record=True, kernel=kernel,
                         generator=generator))
    states = [torch.cat([part.states[k] for part in parts], dim=2) for k in range(len(steps))]
    return states, torch.cat([part.x0 for part in parts], dim=2)


def interleaved_x0(model, x_t, t, clean, context, chunks):
    """x0 predicted from every noisy chunk given the clean chunks before it, in one forward
    (RAVEN's I_u).

    x_t, clean (B, C, F, H, W), t (B, F). On a rollout's own states and endpoints this is what
    the cached rollout computed, but the history is encoded inside the graph: later chunks'
    losses reach the weights that encode it.
    """
    sequence = interleave(x_t, clean, chunks)  # noisy 1, clean 1, noisy 2, ...
    times = interleave(t, torch.zeros_like(t), chunks)  # what is clean is at t = 0
    v = model(sequence, times, context, interleaved(chunks))
    return x0_from_v(x_t, noisy_part(v, chunks), t)


# ----------------------------------------------------------------------------------------
# The reward's gradient

def latent_frames(frames):
    """Latent frames of a video of 1 + 4k frames."""
    return 1 + (frames - 1) // 4


def latent_frame(frame):
    """The latent frame that a video frame is decoded from: 0 | 1 1 1 1 | 2 2 2 2 | ..."""
    return (frame + 3) // 4


def rewarded_video(vae, latents, frames, past=None):
    """The video frames that a reward looks at, with gradient to the latents.

    latents (B, C, F, H, W); frames: their numbers, ascending -> (B, 3, len(frames), 8H, 8W).

    A frame depends on its own latent frame, and through what the decoder remembers on all those
    before it. past: the gradient goes on in that memory through so many latent frames before a
    rewarded one; what lies further back is a constant, unless a rewarded one between them hands
    the gradient on. None: through all of them, which is exact.

    Each latent frame (with gradient to all of them: every three) is decoded under a checkpoint
    of its own: what stays until the backward pass is the memory before it (1.9 GB at 480x832
    in bfloat16), not its activations.
    """
    where = {latent_frame(frame) for frame in frames}
    count = 1 + max(where)  # nothing after the last rewarded frame is needed
    if past and len(where) == count:
        past = None  # each is rewarded and hands the gradient on, so it reaches all anyhow
    # Latent frames per checkpoint. With gradient to all of them every third memory is kept,
    # or 80 GB would be too few at full size.
    n = 1 if past is not None else 3
    past = count if past is None else past
    memory, video = {}, []
    for i in range(0, count, n):
        last = min(i + n, count) - 1
        rewarded = any(i <= w <= last for w in where)
        remembered = any(last < w <= last + past for w in where)  # by a later rewarded one
        graph = torch.is_grad_enabled() and (rewarded or remembered)
        with torch.set_grad_enabled(graph):
            video.append(recomputed(vae.decode, latents[:, :, i:last + 1], memory))
        if not remembered:  # from here on it is a constant
            memory = {module: x.detach() if torch.is_tensor(x) else x
                      for module, x in memory.items()}
    return torch.cat(video, dim=2)[:, :, frames]


# ========================================================================================
# PART 2: the frozen networks
# ========================================================================================

# ----------------------------------------------------------------------------------------
# VAE: Wan 2.1's causal 3-D autoencoder, 8x in space and 4x in time; keys as in Wan2.1_VAE.pth
#
# Every module that looks back in time takes an optional `cache`: a plain dict, module -> the
# last frames it saw. Without one a call starts a clip; with one it goes on where the last call
# stopped. Both run the same lines, so a streamed clip equals the whole one however it is cut.
# In memory the channels come last throughout, as the fast convolution kernels want them.

class CausalConv3d(nn.Conv3d):
    """3-D convolution that sees the present and the past: (B, C, T, H, W) -> (B, C', T, H, W)."""

    def __init__(self, c_in, c_out, kernel):
        kt, kh, kw = kernel if isinstance(kernel, tuple) else (kernel,) * 3
        super().__init__(c_in, c_out, (kt, kh, kw), padding=(0, kh // 2, kw // 2))

    def forward(self, x, cache=None):
        past = self.kernel_size[0] - 1
        if past:
            before = None if cache is None else cache.get(self)
            if before is None:  # a clip's start: zeros before it
                x = F.pad(x, (0, 0, 0, 0, past, 0))
            else:
                x = torch.cat([before, x], dim=2)
            if cache is not None:
                # a copy: a view would keep all of x alive
                cache[self] = x[:, :, -past:].clone(memory_format=torch.channels_last_3d)
        # not before: padding and joining may lose it
        x = x.contiguous(memory_format=torch.channels_last_3d)
        one = x.shape[0] == 1 and x.device.type == 'cpu' and x.dtype == torch.float32
        if not torch.compiler.is_compiling() and one and torch.backends.mkldnn.is_available():
            # for one small clip torch would take a plain kernel, which is ten times as slow
            return torch.mkldnn_convolution(x, self.weight, self.bias, self.padding,
                                            self.stride, self.dilation, 1)
        if x.is_cuda and past and self.in_channels % 64:
            return self.by_time_steps(x)
        return super().forward(x)

    def by_time_steps(self, x):
        """The same as a sum of 2-D convolutions, one for each time step of the kernel: for the
        decoder's widest pictures, of 96 channels, cuDNN has a fast kernel on Hopper in 2-D
        alone (310 against 216 TFLOP/s)."""
        B, _, T, H, W = x.shape
        steps = self.kernel_size[0]
        out = self.bias.view(-1, 1, 1)
        for k in range(steps):
            # (B T', C, H, W)
            frames = x[:, :, k:k + T - steps + 1].transpose(1, 2).flatten(0, 1)
            out = out + F.conv2d(frames, self.weight[:, :, k], padding=self.padding[1:])
        return out.unflatten(0, (B, -1)).transpose(1, 2)


class ChannelNorm(nn.Module):
    """RMS norm over channels, with gain `gamma` (C, 1, 1[, 1]); then SiLU, if asked for."""

    def __init__(self, dim, spatial_dims=3, silu=False):
        super().__init__()
        self.gamma, self.silu = nn.Parameter(torch.ones(dim, *[1] * spatial_dims)), silu

    def forward(self, x):
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-24) * self.gamma
        return F.silu(x) if self.silu else x


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus the input. The empty places keep Wan's key
    numbers."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.residual = nn.Sequential(
            ChannelNorm(c_in, silu=True), nn.Identity(), CausalConv3d(c_in, c_out, 3),
            ChannelNorm(c_out, silu=True), nn.Identity(), nn.Identity(),
            CausalConv3d(c_out, c_out, 3))
        self.shortcut = CausalConv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, cache=None):
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        return conv2(norm2(conv1(norm1(x), cache)), cache) + self.shortcut(x)


class FrameAttention(nn.Module):
    """Single-head self-attention inside each frame."""

    def __init__(self, dim):
        super().__init__()
        self.norm = ChannelNorm(dim, spatial_dims=2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x, cache=None):
        B, C, T, H, W = x.shape
        frames = x.transpose(1, 2).reshape(B * T, C, H, W)
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).unsqueeze(1)
        out = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))  # (B T, 1, H W, C)
        out = self.proj(out.squeeze(1).transpose(1, 2).reshape(B * T, C, H, W))
        return x + out.view(B, T, C, H, W).transpose(1, 2)


class Resample(nn.Module):
    """Halve or double height and width, and with `time` also the frames (the first frame stays
    single)."""

    def __init__(self, dim, up, time):
        super().__init__()
        self.up = up
        if up:
            self.resample = nn.Sequential(nn.Upsample(scale_factor=2., mode='nearest-exact'),
                                          nn.Conv2d(dim, dim // 2, 3, padding=1))
            self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1)) if time else None
        else:
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)),
                                          nn.Conv2d(dim, dim, 3, stride=2))
            self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def double_time(self, x, cache):
        """The clip's first frame passes as it is and is no past to those after it (Wan's
        'Rep')."""
        first = None
        if cache is None or self not in cache:
            first, x = x[:, :, :1], x[:, :, 1:]
            if cache is not None:
                cache[self] = True
            if x.shape[2] == 0:
                return first
        B, C, T, H, W = x.shape
        # (B, T, 2, H, W, C)
        x = self.time_conv(x, cache).view(B, 2, C, T, H, W).permute(0, 3, 1, 4, 5, 2)
        # for T = 1 the reshape is but a view
        x = x.reshape(B, 2 * T, H, W, C).contiguous().movedim(-1, 1)
        return x if first is None else torch.cat([first, x], dim=2)

    def halve_time(self, x, cache):
        """The clip's first frame passes as it is; each later pair is merged with the frame
        before it."""
        last = None if cache is None else cache.get(self)
        if cache is not None:
            cache[self] = x[:, :, -1:].clone()
        if last is not None:
            return self.time_conv(torch.cat([last, x], dim=2))
        return torch.cat([x[:, :, :1], self.time_conv(x)], dim=2) if x.shape[2] > 1 else x

    def forward(self, x, cache=None):
        if self.up and self.time_conv is not None:
            x = self.double_time(x, cache)
        B, C, T, H, W = x.shape
        x = self.resample(x.transpose(1, 2).reshape(B * T, C, H, W))
        x = x.view(B, T, *x.shape[1:]).transpose(1, 2)
        if not self.up and self.time_conv is not None:
            x = self.halve_time(x, cache)
        return x


def middle_and_head(dim, head_in, head_out):
    middle = nn.ModuleList([ResidualBlock(dim, dim), FrameAttention(dim),
                            ResidualBlock(dim, dim)])
    head = nn.ModuleList([ChannelNorm(head_in, silu=True), nn.Identity(),
                          CausalConv3d(head_in, head_out, 3)])
    return middle, head


class Encoder(nn.Module):
    """Video (B, 3, T, H, W) -> mean and log-variance (B, 2 z_dim, F, H/8, W/8)."""

    def __init__(self, dim, z_dim, dim_mult, num_res_blocks, time_down):
        super().__init__()
        dims = [dim * m for m in [1] + dim_mult]
        self.conv1 = CausalConv3d(3, dims[0], 3)
        self.downsamples = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip(dims[:-1], dims[1:])):
            for j in range(num_res_blocks):
                self.downsamples.append(ResidualBlock(c_out if j else c_in, c_out))
            if i < len(dim_mult) - 1:
                self.downsamples.append(Resample(c_out, up=False, time=time_down[i]))
        self.middle, self.head = middle_and_head(dims[-1], dims[-1], 2 * z_dim)

    def forward(self, x, cache=None):
        x = self.conv1(x, cache)
        for layer in [*self.downsamples, *self.middle]:
            x = layer(x, cache)
        norm, _, conv = self.head
        return conv(norm(x), cache)


class Decoder(nn.Module):
    """Latents (B, z_dim, F, H/8, W/8) -> video (B, 3, T, H, W), not clamped.

    `checkpointing`: recompute each layer in the backward pass instead of keeping its
    activations.
    """
    checkpointing = False

    def __init__(self, dim, z_dim, dim_mult, num_res_blocks, time_up):
        super().__init__()
        dims = [dim * m for m in [dim_mult[-1]] + dim_mult[::-1]]
        self.conv1 = CausalConv3d(z_dim, dims[0], 3)
        self.upsamples = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip(dims[:-1], dims[1:])):
            c_in = c_in // 2 if i else c_in  # the upsampler before it has halved the channels
            for j in range(num_res_blocks + 1):
                self.upsamples.append(ResidualBlock(c_out if j else c_in, c_out))
            if i < len(dim_mult) - 1:
                self.upsamples.append(Resample(c_out, up=True, time=time_up[i]))
        self.middle, self.head = middle_and_head(dims[0], dims[-1], 3)

    def forward(self, x, cache=None):
        x = self.conv1(x, cache)
        for layer in [*self.middle, *self.upsamples]:
            recompute = self.checkpointing and torch.is_grad_enabled()
            x = recomputed(layer, x, cache) if recompute else layer(x, cache)
        norm, _, conv = self.head
        return conv(norm(x), cache)


def recomputed(layer, x, cache):
    """layer(x, cache), whose activations are computed again in the backward pass, from the past
    as it is now.

    The past is given as inputs and comes back as outputs: what a checkpoint within another one
    closes over would stay alive, what is given to it is recomputed with the rest.
    """
    if cache is None:
        return checkpoint(layer, x)
    before, after = tuple(cache), []

    def run(x, *past):
        memory = dict(zip(before, past))
        out = layer(x, memory)
        after[:] = memory
        return out, *memory.values()
    out, *remembered = checkpoint(run, x, *cache.values())
    cache.update(zip(after, remembered))
    return out


# Per-channel statistics of Wan 2.1's latents (Wan2.1/wan/modules/vae.py); the model sees
# (mu - mean) / std.
LATENT_MEAN = [-.7571, -.7089, -.9113, .1075, -.1745, .9653, -.1517, 1.5508,
               .4134, -.0715, .5517, -.3632, -.1922, -.9497, .2503, -.2921]
LATENT_STD = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]


@functools.lru_cache(maxsize=16)
def per_channel(values, device):
    """One number per channel -> (1, C, 1, 1, 1) float32, whatever the dtype of the weights."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1, 1)


class WanVAE(nn.Module):
    """Wan 2.1's video autoencoder. Video (B, 3, 1 + 4(F - 1), H, W) in [-1, 1] <-> latents
    (B, 16, F, H/8, W/8).

    Encoding gives the posterior mean, normalised per channel; decoding clamps to [-1, 1].
    """

    def __init__(self, dim=96, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2,
                 temporal_downsample=(False, True, True), latent_mean=LATENT_MEAN,
                 latent_std=LATENT_STD):
        super().__init__()
        # frames, height, width
        self.stride = (2 ** sum(temporal_downsample), *[2 ** (len(dim_mult) - 1)] * 2)
        self.z_dim = z_dim
        self.encoder = Encoder(dim, z_dim, list(dim_mult), num_res_blocks, temporal_downsample)
        self.conv1 = CausalConv3d(2 * z_dim, 2 * z_dim, 1)
        self.conv2 = CausalConv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(dim, z_dim, list(dim_mult), num_res_blocks,
                               temporal_downsample[::-1])
        self.latent_mean, self.latent_std = tuple(latent_mean), tuple(latent_std)

    @property
    def mean(self):
        return per_channel(self.latent_mean, self.conv2.weight.device)

    @property
    def std(self):
        return per_channel(self.latent_std, self.conv2.weight.device)

    def encode(self, video):
        """Video (B, 3, 1 + 4k, H, W) in [-1, 1] -> normalised latents
        (B, z_dim, 1 + k, H/8, W/8), float32."""
        st, sh, sw = self.stride
        B, C, T, H, W = video.shape
        if C != 3 or T % st != 1 or H % sh or W % sw:
            raise ValueError(f'cannot encode a video of shape {tuple(video.shape)}: it must be '
                             f'(B, 3, T, H, W) with T = 1 + {st}k frames, and height and width '
                             f'multiples of {sh}')
        cache, dtype = {}, self.conv1.weight.dtype
        # the first frame by itself, then as many at a time as make one latent frame
        parts = [self.encoder(v.to(dtype), cache)
                 for v in video.split([1] + [st] * (T // st), dim=2)]
        mu = self.conv1(torch.cat(parts, dim=2))[:, :self.z_dim]
        return (mu.float() - self.mean) / self.std

    def decode(self, latents, cache=None, at_once=1):
        """Normalised latents (B, z_dim, F, h, w) -> video (B, 3, T, 8h, 8w) in [-1, 1],
        float32.

        Without a cache (or with an empty dict) the first latent frame gives one video frame and
        each later one four; with the dict of an earlier call every latent frame gives four, and
        decoding goes on seamlessly.
        at_once: how many latent frames pass the decoder together; 1 takes least memory, more
        are faster.
        """
        if latents.ndim != 5 or latents.shape[1] != self.z_dim:
            raise ValueError(f'cannot decode latents of shape {tuple(latents.shape)}: '
                             f'expected (B, {self.z_dim}, F, H/8, W/8)')
        cache = {} if cache is None else cache
        z = self.conv2((latents * self.std + self.mean).to(self.conv2.weight.dtype))
        video = [self.decoder(part, cache) for part in z.split(at_once, dim=2)]
        return torch.cat(video, dim=2).float().clamp(-1, 1)


def to_frames(video):
    """Video (3, T, H, W) in [-1, 1] -> frames (T, H, W, 3), a numpy array of bytes."""
    return ((video + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


# ----------------------------------------------------------------------------------------
# Text

# Wan's negative prompt, used by every public repository of this family when none is given.
NEGATIVE_PROMPT = ('色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，'
                   'JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，'
                   '手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走')


# what ftfy, which Wan calls, makes of these characters
QUOTES = {**dict.fromkeys([0x02BC, *range(0x2018, 0x201C)], "'"),
          **dict.fromkeys(range(0x201C, 0x2020), '"'), 0xFEFF: None, 0x3000: ' '}


def clean_text(text):
    """A prompt as Wan cleans it: HTML escapes undone (twice), curly quotes straight, full-width
    letters and digits plain, composed (NFC), white space collapsed. Differs from Wan: mojibake,
    that is text decoded wrongly, stays."""
    text = html.unescape(html.unescape(text)).translate(QUOTES)
    text = re.sub('[\uFF01-\uFFEE]+', lambda wide: unicodedata.normalize('NFKC', wide[0]), text)
    return re.sub(r'\s+', ' ', unicodedata.normalize('NFC', text)).strip()


def check_text(prompt):
    """A prompt that is no UTF-8, as bytes of a command line may be, is an InputError."""
    if prompt.encode(errors='replace').decode() != prompt:
        raise InputError(f'the prompt {prompt!r} is no UTF-8 text')


def say_cut(process, prompts, reader, name):
    """Say how many prompts are longer than what `reader`, a TextEncoder or an ImageReward,
    takes of them."""
    if process.rank > 0:
        return  # a list may have hundreds of thousands
    words = reader.tokenizer([clean_text(p) for p in prompts]).input_ids
    count = sum(len(ids) > reader.text_len for ids in words)
    if count:
        process.print(f'{count} of {len(prompts)} prompts are cut at the {reader.text_len} '
                      f'tokens that {name} reads')


class TextEncoder:
    """UMT5 encoder and tokenizer: prompts -> (B, text_len, text_dim), rows past each prompt's
    length zero.

    A prompt is encoded once and by itself, so that its embedding does not depend on its
    neighbours, and the last 2048 are kept in CPU memory. offload: the encoder (11 GB for
    UMT5-XXL) is on `device` only while it encodes.
    """

    def __init__(self, encoder, tokenizer, device='cpu', offload=False):
        self.encoder, self.tokenizer = encoder.eval().requires_grad_(False), tokenizer
        self.device, self.offload = device, offload
        self.text_len = min(512, tokenizer.model_max_length)
        self.dim = encoder.config.d_model
        self.rows = functools.lru_cache(2048)(self.encode)

    @torch.no_grad()
    def encode(self, prompt):
        """str -> (its number of tokens, text_dim), on the CPU."""
        check_text(prompt)
        self.encoder.to(self.device)
        tokens = self.tokenizer(clean_text(prompt), padding='max_length',
                                max_length=self.text_len, truncation=True,
                                add_special_tokens=True, return_tensors='pt').to(self.device)
        out = self.encoder(input_ids=tokens.input_ids,
                           attention_mask=tokens.attention_mask).last_hidden_state
        return out[tokens.attention_mask.bool()].cpu()

    def __call__(self, prompts):
        """list of str -> (B, text_len, text_dim) in the encoder's dtype, on `device`."""
        rows = [self.rows(p) for p in prompts]
        if self.offload:
            self.encoder.to('cpu')
        out = torch.zeros(len(rows), self.text_len, self.dim, dtype=self.encoder.dtype)
        for padded, row in zip(out, rows):
            padded[:len(row)] = row
        return out.to(self.device)


# ----------------------------------------------------------------------------------------
# ImageReward on transformers' BLIP modules; keys as in ImageReward.pt

CLIP_MEAN, CLIP_STD = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)


def clip_preprocess(images, size):
    """(B, 3, H, W) in [-1, 1] -> (B, 3, size, size): antialiased bicubic resize of the shorter
    side, centre crop, CLIP's normalisation. Antialiasing is what PIL does, and so what agrees
    with the published scores."""
    H, W = images.shape[-2:]
    shape = (size, int(size * W / H)) if H <= W else (int(size * H / W), size)
    x = (images / 2 + 0.5).clamp(0, 1)
    if shape != (H, W):
        x = F.interpolate(x, shape, mode='bicubic', antialias=True,
                          align_corners=False).clamp(0, 1)
    top, left = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
    mean, std = (torch.tensor(c, device=x.device).view(1, 3, 1, 1)
                 for c in (CLIP_MEAN, CLIP_STD))
    return (x[:, :, top:top + size, left:left + size] - mean) / std


class ImageReward(nn.Module):
    """ImageReward (arXiv 2304.05977): BLIP's image encoder, BERT with cross-attention to it,
    and a linear head.

    Defaults: ImageReward v1.0's. `mean` and `std` standardise the head's output; the published
    scores are standardised so too: about 0 is average, and most images lie between -2 and 2.
    """
    text_len = 35  # tokens of a prompt

    def __init__(self, tokenizer=None, mean=0.16717362830052426, std=1.0333394966054072, *,
                 image_size=224, patch_size=16, vision_dim=1024, vision_layers=24,
                 vision_heads=16, text_dim=768, text_layers=12, text_heads=12, text_ffn=3072,
                 vocab_size=30524):
        from transformers import BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.configuration_blip import BlipTextConfig
        from transformers.models.blip.modeling_blip_text import BlipTextModel
        super().__init__()
        self.image_size, self.tokenizer = image_size, tokenizer
        self.mean, self.std = mean, std
        self.vision = BlipVisionModel(BlipVisionConfig(
            hidden_size=vision_dim, intermediate_size=4 * vision_dim,
            num_hidden_layers=vision_layers, num_attention_heads=vision_heads,
            image_size=image_size, patch_size=patch_size, hidden_act='gelu',
            layer_norm_eps=1e-6))
        self.text = BlipTextModel(BlipTextConfig(
            hidden_size=text_dim, intermediate_size=text_ffn, num_hidden_layers=text_layers,
            num_attention_heads=text_heads, vocab_size=vocab_size,
            encoder_hidden_size=vision_dim, max_position_embeddings=512, layer_norm_eps=1e-12,
            is_decoder=True,  # only builds the cross-attention
            bos_token_id=None, eos_token_id=None, sep_token_id=None), add_pooling_layer=False)
        widths = [text_dim, 1024, 128, 64, 16, 1]
        linears = [nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:])]
        # no activation between them; the dropouts (0.2, 0.2, 0.1) hold the published key
        # numbers
        self.mlp = nn.Sequential(linears[0], nn.Dropout(0.2), linears[1], nn.Dropout(0.2),
                                 linears[2], nn.Dropout(0.1), linears[3], linears[4])

    def forward(self, images, ids, mask):
        """Normalised images (B, 3, S, S), token ids and mask (B, 35) -> standardised rewards
        (B,)."""
        seen = self.vision(images).last_hidden_state  # (B, 1 + patches, C)
        words = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen,
                          is_decoder=False).last_hidden_state
        return (self.mlp(words[:, 0].float()).squeeze(-1) - self.mean) / self.std

    def score(self, images, prompts):
        """images (B, 3, H, W) in [-1, 1], B prompts -> rewards (B,); differentiable in the
        images."""
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[0] != len(prompts):
            raise ValueError(f'images {tuple(images.shape)} must be (B, 3, H, W) with one '
                             f'prompt each, got {len(prompts)} prompts')
        words = self.tokenizer(list(prompts), padding='max_length', truncation=True,
                               max_length=self.text_len, return_tensors='pt').to(images.device)
        return self(clip_preprocess(images, self.image_size), words.input_ids,
                    words.attention_mask)

    @staticmethod
    def published_key(key):
        """Our parameter name -> the name in ImageReward.pt."""
        key = rename(key, [
            ('vision.embeddings.class_embedding', 'blip.visual_encoder.cls_token'),
            ('vision.embeddings.position_embedding', 'blip.visual_encoder.pos_embed'),
            ('vision.embeddings.patch_embedding.', 'blip.visual_encoder.patch_embed.proj.'),
            ('vision.post_layernorm.', 'blip.visual_encoder.norm.'),
            ('vision.encoder.layers.', 'blip.visual_encoder.blocks.'),
            ('text.', 'blip.text_encoder.'), ('mlp.', 'mlp.layers.')])
        if key.startswith('blip.visual_encoder.blocks.'):
            key = rename(key, [('.layer_norm1.', '.norm1.'), ('.layer_norm2.', '.norm2.'),
                               ('.self_attn.qkv.', '.attn.qkv.'),
                               ('.self_attn.projection.', '.attn.proj.')])
        return key


def frame_reward(model):
    """An ImageReward model -> a reward of videos: the mean score of the frames."""
    def reward(video, prompts):
        frames = video.unbind(2)
        if len(frames) == 1:
            return model.score(frames[0], prompts)
        # one frame's activations at a time; the rest is recomputed in the backward pass
        return torch.stack([checkpoint(model.score, f, prompts) for f in frames]).mean(0)
    return reward


def checked_reward(reward, video, prompts):
    """reward(video, prompts) -> (B,), on the video's device. One that is not a number per
    prompt is an InputError, and so is one without gradient where the video has one; where none
    is needed, a list or NumPy's numbers do as well."""
    rewards, name = reward(video, prompts), getattr(reward, '__name__', type(reward).__name__)
    if not torch.is_tensor(rewards):
        with in_words(f'the reward {name} returned {type(rewards).__name__}, not a number for '
                      f'each of {len(prompts)} prompts'):
            rewards = torch.tensor(np.asarray(rewards, dtype=np.float32), device=video.device)
    if tuple(rewards.shape) != (len(prompts),):
        raise InputError(f'the reward {name} returned shape {tuple(rewards.shape)} for a video '
                         f'{tuple(video.shape)} and {len(prompts)} prompts: it must be '
                         f'({len(prompts)},)')
    if video.requires_grad and not rewards.requires_grad:
        raise InputError(f'the reward {name} has no gradient in the video: compute it with '
                         'torch, without no_grad')
    return rewards.to(video.device)


def load_function(name, flag, known):
    """The callable that `module:function` names; the module may lie in the current folder. flag
    and known: what the user wrote it after, and what else could stand there."""
    module, _, function = name.removeprefix('./').partition(':')
    path = Path(os.path.expanduser(module))
    if path.is_absolute() or '..' in path.parts:  # of another folder
        sys.path.insert(0, str(path.parent))
        module = path.name
    sys.path.insert(0, '')
    try:
        found = getattr(importlib.import_module(module.removesuffix('.py').replace('/', '.')),
                        function)
        if not callable(found):
            raise ValueError(f'{function} cannot be called')
        return found
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f'{flag} {name} cannot be loaded ({error}): give {known}, or '
                         'module:function of a callable (video (B, 3, T, H, W), prompts) -> '
                         '(B,)') from error


# ========================================================================================
# PART 3: files and runs
# ========================================================================================

# ----------------------------------------------------------------------------------------
# Loading: model folders and hub repositories in both public layouts, and every generator
# checkpoint in the wild

def lacks_memory(error):
    """Whether an exception says that there is too little: in the words of Python, torch or the
    system."""
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or 'DefaultCPUAllocator' in str(error) or 'Cannot allocate memory' in str(error))


@contextlib.contextmanager
def in_words(what, advice=''):
    """Around the few lines that use what the user or the machine gave: a file of another
    project, a package, a compiler. What goes wrong there becomes one sentence, '{what} ({why}):
    {advice}'."""
    try:
        yield
    except (InputError, ImportError):
        raise  # a sentence already, or the machine's
    except Exception as error:
        if lacks_memory(error):
            raise
        why = f'{type(error).__name__}: {first_line(error)}'
        raise InputError(f'{what} ({why})' + (f': {advice}' if advice else '')) from error


def pretrained(kind, name, dtype=torch.float32, **kwargs):
    """A transformers model of class `kind` from a folder or hub repository, frozen. One that
    lacks tensors is an InputError; transformers alone would fill them with random numbers."""
    from transformers.utils import logging
    # its "Loading weights" would be the first line that a user sees
    logging.disable_progress_bar()
    with in_words(f'cannot load the {kind.__name__} of {name}'):
        model, info = kind.from_pretrained(name, output_loading_info=True, dtype=dtype,
                                           **kwargs)
    if info['missing_keys']:
        raise InputError(f'{name} lacks {len(info["missing_keys"])} of its tensors; it must '
                         f'hold a {kind.__name__}')
    return model.eval().requires_grad_(False)


def load_tokenizer(name, kind='AutoTokenizer'):
    """A tokenizer of transformers from a folder or hub repository."""
    import transformers
    with in_words(f'cannot load the tokenizer of {name}'):
        return getattr(transformers, kind).from_pretrained(name)


def load_clip(name, device='cpu'):
    """CLIP from a folder or hub repository: (model, tokenizer)."""
    from transformers import CLIPModel
    return pretrained(CLIPModel, name).to(device), load_tokenizer(name)


def aesthetic_head(file, width, device='cpu'):
    """LAION's linear head on unit CLIP features: weight (1, width), bias (1,)."""
    state = read_state(find_file(file))[0]
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    if shapes != {'weight': (1, width), 'bias': (1,)}:
        raise InputError(f'{file} is no aesthetic head for CLIP features of {width} numbers: '
                         f'it must hold weight (1, {width}) and bias (1,)')
    return state['weight'].float().to(device), state['bias'].float().to(device)


def rename(key, pairs):
    """Replace key pieces. A piece that starts with a dot is replaced anywhere, any other only
    at the front."""
    for old, new in pairs:
        if old.startswith('.'):
            key = key.replace(old, new)
        elif key.startswith(old):
            key = new + key[len(old):]
    return key


def dit_diffusers_key(key):
    """Wan's DiT key -> the name in diffusers' WanTransformer3DModel."""
    return rename(key, [('time_embedding.0.', 'condition_embedder.time_embedder.linear_1.'),
                        ('time_embedding.2.', 'condition_embedder.time_embedder.linear_2.'),
                        ('text_embedding.0.', 'condition_embedder.text_embedder.linear_1.'),
                        ('text_embedding.2.', 'condition_embedder.text_embedder.linear_2.'),
                        ('time_projection.1.', 'condition_embedder.time_proj.'),
                        ('head.head.', 'proj_out.'), ('head.modulation', 'scale_shift_table'),
                        ('.modulation', '.scale_shift_table'), ('.self_attn.', '.attn1.'),
                        ('.cross_attn.', '.attn2.'), ('.q.', '.to_q.'), ('.k.', '.to_k.'),
                        ('.v.', '.to_v.'), ('.o.', '.to_out.0.'), ('.norm3.', '.norm2.'),
                        ('.ffn.0.', '.ffn.net.0.proj.'), ('.ffn.2.', '.ffn.net.2.')])


def vae_diffusers_key(key, num_res_blocks):
    """Wan2.1_VAE.pth's key -> the name in diffusers' AutoencoderKLWan."""
    def up(match):  # each level: num_res_blocks + 1 residual blocks, then the upsampler
        level, j = divmod(int(match[1]), num_res_blocks + 2)
        part = f'resnets.{j}.' if j <= num_res_blocks else 'upsamplers.0.'
        return f'decoder.up_blocks.{level}.{part}'
    key = re.sub(r'^decoder\.upsamples\.(\d+)\.', up, key)
    key = rename(key, [('conv1.', 'quant_conv.'), ('conv2.', 'post_quant_conv.'),
                       ('encoder.conv1.', 'encoder.conv_in.'),
                       ('decoder.conv1.', 'decoder.conv_in.'),
                       ('encoder.downsamples.', 'encoder.down_blocks.')])
    return rename(key, [('.head.0.', '.norm_out.'), ('.head.2.', '.conv_out.'),
                        ('.shortcut.', '.conv_shortcut.'),
                        ('.middle.0.', '.mid_block.resnets.0.'),
                        ('.middle.1.', '.mid_block.attentions.0.'),
                        ('.middle.2.', '.mid_block.resnets.1.'), ('.residual.0.', '.norm1.'),
                        ('.residual.2.', '.conv1.'), ('.residual.3.', '.norm2.'),
                        ('.residual.6.', '.conv2.')])


def t5_key(key):
    """models_t5_umt5-xxl-enc-bf16.pth's key -> the name in transformers' UMT5EncoderModel."""
    return rename(key, [
        ('token_embedding.', 'shared.'), ('norm.', 'encoder.final_layer_norm.'),
        ('blocks.', 'encoder.block.'), ('.norm1.', '.layer.0.layer_norm.'),
        ('.norm2.', '.layer.1.layer_norm.'), ('.attn.', '.layer.0.SelfAttention.'),
        ('.pos_embedding.embedding.', '.layer.0.SelfAttention.relative_attention_bias.'),
        ('.ffn.gate.0.', '.layer.1.DenseReluDense.wi_0.'),
        ('.ffn.fc1.', '.layer.1.DenseReluDense.wi_1.'),
        ('.ffn.fc2.', '.layer.1.DenseReluDense.wo.')])


LFS_SIGN = 'version https://git-lfs'
LFS_FILE = 'a Git-LFS pointer, not the file itself: fetch it with git lfs pull'
OTHER_FILES = {LFS_SIGN.encode(): LFS_FILE,
               b'GGUF': 'a GGUF file, whose quantised weights are not supported: take '
                        'safetensors',
               b'<': 'a web page, not weights: download the file itself, not the page that '
                     'shows it'}


def read_weights(path):
    """A safetensors file, or a pickle that holds only tensors -> (contents, metadata). Its
    first bytes say which."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f'no file {path}: check the path')
    try:
        with open(path, 'rb') as file:
            start = file.read(24)
    except OSError as error:
        raise InputError(f'cannot read {path}: {error.strerror}') from error
    safetensors = start[8:9] == b'{'  # after the header's length
    for sign, what in OTHER_FILES.items():
        if start.lstrip().startswith(sign) and not safetensors:
            raise InputError(f'{path} is {what}')
    try:
        if safetensors:
            from safetensors import safe_open
            with safe_open(path, 'pt') as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
        # not under that suffix, by which torch.load would take it for safetensors
        mapped = start[:2] == b'PK' and path.suffix != '.safetensors'
        source = path if mapped else io.BytesIO(path.read_bytes())
        return torch.load(source, map_location='cpu', weights_only=True, mmap=mapped), {}
    except Exception as error:
        if lacks_memory(error):
            raise MemoryError(f'for {path}') from error
        reason = 'it is damaged, truncated or not a weight file'
        if 'Unsupported global' in str(error):  # weights_only has refused a class or function
            reason = 'it holds objects other than tensors, which could run code'
        raise InputError(f'cannot read {path}: {reason}; download it again or convert it to '
                         'safetensors') from error


def read_state(path):
    """A weight file that must hold tensors by their names, and nothing else -> (state dict,
    metadata)."""
    state, metadata = read_weights(path)
    if not is_state(state):
        raise InputError(f'{path} holds no state dict: expected tensors by their names')
    return state, metadata


def is_state(x):
    return isinstance(x, dict) and all(
        isinstance(k, str) and torch.is_tensor(v) for k, v in x.items())


def read_folder(folder):
    """All tensors of a folder's safetensors, sharded (with its index) or not."""
    index = folder / 'diffusion_pytorch_model.safetensors.index.json'
    files = [folder / 'diffusion_pytorch_model.safetensors']
    if index.exists():
        with in_words(f'cannot load {index}'):
            names = sorted(set(read_json(index)['weight_map'].values()))
            files = [folder / name for name in names]
    return {key: tensor for file in files for key, tensor in read_state(file)[0].items()}


def read_text(path):
    """A text file in UTF-8, without its byte-order mark."""
    try:
        text = Path(path).read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, 'strerror', None) or error
        raise InputError(f'cannot read {path}: {why}') from error
    if text.startswith(LFS_SIGN):
        raise InputError(f'{path} is {LFS_FILE}')
    if '\0' in text:
        raise InputError(f'{path} is not text: it holds zero bytes')
    return text


def read_json(path, kind=None):
    """A JSON file; kind: what its top level must be, such as dict."""
    text = read_text(path)
    with in_words(f'cannot read {path} as JSON'):
        content = json.loads(text)
    if kind and not isinstance(content, kind):
        what = {dict: 'an object {"name": value}', list: 'a list'}[kind]
        raise InputError(f'{path} must hold {what}, not {json.dumps(content)[:40]}')
    return content


DIT_FILES = ['diffusion_pytorch_model*', 'transformer/*']
VAE_FILES = ['Wan2.1_VAE.pth', 'vae/*']
TEXT_FILES = ['models_t5_umt5-xxl-enc-bf16.pth', 'google/umt5-xxl/*', 'text_encoder/*',
              'tokenizer/*']


def find_folder(name, patterns=(*DIT_FILES, *VAE_FILES, *TEXT_FILES)):
    """--model: a folder, or a hub repository (owner/name), whose files that match `patterns`
    are downloaded."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r'[\w.-]+/[\w.-]+', str(name)) or path.parent.is_dir():
        raise InputError(f'no model folder {name}: give a folder, or a hub repository such as '
                         'Wan-AI/Wan2.1-T2V-1.3B')
    from huggingface_hub import snapshot_download
    return from_hub(f'{name} is no folder here', snapshot_download, str(name),
                    allow_patterns=['*.json', *patterns])


def find_file(name):
    """--checkpoint: a file, or repository:path on the hub."""
    path = Path(name)
    if path.exists() or ':' not in str(name):
        if not path.is_file():
            raise InputError(f'no file {name}: give a file, or repository:path on the hub')
        return path
    from huggingface_hub import hf_hub_download
    repository, file = str(name).split(':', 1)
    found = from_hub(f'{name} is no file here', hf_hub_download, repository, file)
    # what PEFT says of an adapter lies beside it, if at all
    if 'lora' in file.lower() or 'adapter' in file.lower():
        from huggingface_hub.errors import EntryNotFoundError
        with contextlib.suppress(EntryNotFoundError):
            hf_hub_download(repository, str(PurePosixPath(file).with_name('adapter_config.json')))
    return found


def from_hub(what, download, *args, **kwargs):
    """The path of a download; whatever goes wrong becomes one sentence that begins with `what`."""
    try:
        return Path(download(*args, **kwargs))
    except Exception as error:  # a package for its proxy that is not there, too
        raise InputError(f'{what}, and the hub did not give it ({type(error).__name__}: '
                         f'{first_line(error)})') from error


def load_exactly(model, state, source):
    """Load a state dict whose keys and shapes must all fit; otherwise an exact account of what
    does not."""
    if numbers := [key for key, value in state.items() if not value.is_floating_point()]:
        raise InputError(f'{source} holds {numbers[0]} as {state[numbers[0]].dtype}: only '
                         'weights of floating point are supported')
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    missing = [key for key in expected if key not in state]
    extra = [key for key in state if key not in expected]
    shapes = [f'{key} {tuple(state[key].shape)} instead of {expected[key]}' for key in expected
              if key in state and tuple(state[key].shape) != expected[key]]
    if missing or extra or shapes:
        wrong = {'missing': missing, 'unexpected': extra, 'of another shape': shapes}
        parts = [f'{len(keys)} {what} ({", ".join(keys[:3])}{", ..." * (len(keys) > 3)})'
                 for what, keys in wrong.items() if keys]
        raise InputError(f'{source} does not fit this model: of {len(expected)} tensors, ' +
                         '; '.join(parts))
    model.load_state_dict(state, assign=True)
    return model


def is_diffusers(folder):
    return (folder / 'model_index.json').exists()


def load_config(folder):
    """The DiT's sizes, from either layout's config.json."""
    if not is_diffusers(folder):
        if (folder / 'high_noise_model').is_dir():
            raise InputError(f'{folder} has two experts (high_noise_model): Wan 2.2 is not '
                             'supported')
        raw = read_json(folder / 'config.json', dict)
        if raw.get('model_type', 't2v') != 't2v':
            raise InputError(f'{folder} is a {raw["model_type"]} model: only text-to-video '
                             '(t2v) models are supported')
        known = {f.name for f in dataclasses.fields(WanConfig)}
        with in_words(f'cannot load {folder}/config.json'):
            return WanConfig(**{key: value for key, value in raw.items() if key in known})
    index = read_json(folder / 'model_index.json', dict)
    with in_words(f'cannot load {folder}/model_index.json'):
        if index.get('boundary_ratio') or any(index.get('transformer_2') or ()):
            raise InputError(f'{folder} has two experts (transformer_2, boundary_ratio): Wan '
                             '2.2 is not supported')
    raw = read_json(folder / 'transformer/config.json', dict)
    if raw.get('image_dim') or raw.get('added_kv_proj_dim'):
        raise InputError(f'{folder} is an image-to-video model: only text-to-video models are '
                         'supported')
    with in_words(f'cannot load {folder}/transformer/config.json'):
        return WanConfig(dim=raw['num_attention_heads'] * raw['attention_head_dim'],
                         ffn_dim=raw['ffn_dim'], num_heads=raw['num_attention_heads'],
                         num_layers=raw['num_layers'], freq_dim=raw['freq_dim'],
                         text_dim=raw['text_dim'], in_dim=raw['in_channels'],
                         out_dim=raw['out_channels'], patch_size=raw['patch_size'],
                         eps=raw['eps'])


def load_dit(name, dtype=torch.float32, device='cpu'):
    """The DiT of a model folder or hub repository."""
    folder = find_folder(name, DIT_FILES)
    config = load_config(folder)
    with torch.device('meta'), in_words(f'cannot load the config of {folder}'):
        model = WanModel(config)
    state = read_folder(folder / 'transformer' if is_diffusers(folder) else folder)
    return load_exactly(model, native_keys(state, model.state_dict()), folder).to(device, dtype)


def load_vae(name, dtype=torch.float32, device='cpu', **sizes):
    """The VAE of a model folder or hub repository. sizes: of one in Wan's own layout, which
    does not say them, where they are not the published ones; see `WanVAE`."""
    folder = find_folder(name, VAE_FILES)
    if is_diffusers(folder):
        raw = read_json(folder / 'vae/config.json', dict)
        if raw.get('is_residual') or raw.get('patch_size'):
            raise InputError(f'{folder}/vae has the Wan 2.2 layout: only the Wan 2.1 VAE is '
                             'supported')
        with in_words(f'cannot load {folder}/vae/config.json'):
            vae = WanVAE(dim=raw['base_dim'], z_dim=raw['z_dim'], dim_mult=raw['dim_mult'],
                         num_res_blocks=raw['num_res_blocks'],
                         temporal_downsample=raw['temperal_downsample'],
                         latent_mean=raw['latents_mean'], latent_std=raw['latents_std'])
        names = {vae_diffusers_key(key, raw['num_res_blocks']): key for key in vae.state_dict()}
        state = {names.get(key, key): value
                 for key, value in read_folder(folder / 'vae').items()}
    else:
        vae, state = WanVAE(**sizes), read_state(folder / 'Wan2.1_VAE.pth')[0]
    load_exactly(vae, state, f'{folder} (VAE)')
    return vae.to(device, dtype).eval().requires_grad_(False)


UMT5_XXL = dict(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24,
                num_heads=64)


def load_text_encoder(name, dtype=torch.float32, device='cpu', offload=False, sizes=UMT5_XXL):
    """The UMT5 encoder and tokenizer of a model folder or hub repository, as a `TextEncoder`.
    sizes: of an encoder in Wan's own layout, which does not say them."""
    from transformers import UMT5Config, UMT5EncoderModel
    folder = find_folder(name, TEXT_FILES)
    # By tokenizer.json, not AutoTokenizer: the T5Tokenizer that Wan's config names has another
    # unknown word.
    tokenizer = load_tokenizer(
        folder / ('tokenizer' if is_diffusers(folder) else 'google/umt5-xxl'),
        'PreTrainedTokenizerFast')
    if is_diffusers(folder):
        return TextEncoder(pretrained(UMT5EncoderModel, folder / 'text_encoder', dtype),
                           tokenizer, device, offload)
    file = folder / 'models_t5_umt5-xxl-enc-bf16.pth'
    state = {t5_key(key): value for key, value in read_state(file)[0].items()}
    with torch.device('meta'):
        encoder = UMT5EncoderModel(
            UMT5Config(**sizes, feed_forward_proj='gated-gelu', layer_norm_epsilon=1e-6))
    if 'shared.weight' in state:
        state['encoder.embed_tokens.weight'] = state['shared.weight']
    # one table again, not two
    load_exactly(encoder, state, file).set_input_embeddings(encoder.shared)
    return TextEncoder(encoder.to(dtype), tokenizer, device, offload)


def load_image_reward(name, device='cpu'):
    """ImageReward from a folder or hub repository: ImageReward.pt (the published sizes), or
    ImageReward.safetensors with its sizes as JSON under `config` in the metadata. Words: a
    tokenizer/ beside it, else bert-base-uncased."""
    folder = find_folder(name, ['ImageReward.*', 'tokenizer/*'])
    files = [folder / f'ImageReward.{kind}' for kind in ('safetensors', 'pt')]
    file = next((f for f in files if f.exists()), None)
    if file is None:
        raise InputError(f'{folder} holds neither ImageReward.pt nor ImageReward.safetensors')
    state, metadata = read_state(file)
    words = folder / 'tokenizer'
    tokenizer = load_tokenizer(words if words.is_dir() else 'bert-base-uncased')
    with in_words(f'cannot load {file}'):
        model = ImageReward(tokenizer, **json.loads(metadata.get('config', '{}')))
    names = {ImageReward.published_key(key): key for key in model.state_dict()}
    unused = ('blip.vision_proj.', 'blip.text_proj.',
              'blip.text_encoder.embeddings.position_ids')
    state = {names.get(key, key): value.float()
             for key, value in state.items() if not key.startswith(unused)}
    return load_exactly(model, state, file).to(device).eval().requires_grad_(False)


# A tensor of an adapter: its module, and which part it is.
ADAPTER = re.compile(r'(.+?)\.((?:lora_|dora_|hada_|lokr_|oft_|alpha$|diff$|diff_[bm]$).*)')
# what wrappers of training put into a name, and what projects put before it
INSIDE = re.compile(r'_(fsdp_wrapped_module|checkpoint_wrapped_module|orig_mod)\.|\.base_layer')
BEFORE = re.compile(r'^((base_model\.model|diffusion_model|transformer|model|net|module)\.'
                    r'|lora_unet_)+')


def native_keys(state, expected):
    """A DiT state dict under any public naming -> Wan's own keys. Parts of an adapter come out
    as <module>.lora_A.weight, lora_B.weight, lora_B.bias, alpha, diff, diff_b and diff_m;
    others under the name that they have. InputError for two tensors of one name.

    expected: the model's own state dict (for the diffusers names).
    """
    names = {dit_diffusers_key(key): key for key in expected}
    diffusers = any(piece in key for key in state for piece in
                    ('condition_embedder.', '.attn1.', '.attn2.', '.ffn.net.'))
    # kohya's adapters write a module's name, of either layout, with _ for every dot
    flat = {name.removesuffix('.weight').replace('.', '_'): key.removesuffix('.weight')
            for theirs, key in names.items() for name in (theirs, key)}
    # counters, a RoPE table, a critic's head: not the generator's
    besides = re.compile(r'freqs|n_averaged|accum_.*'
                         r'|.*(_cls_pred_branch\.|_register_tokens|_gan_ca_blocks\.).*')
    out = {}
    for key, value in state.items():
        theirs = key
        key = BEFORE.sub('', INSIDE.sub('', key))
        if besides.fullmatch(key):
            continue
        if adapter := ADAPTER.fullmatch(key):
            module, part = adapter.groups()
            module = flat.get(module, module)
            if diffusers:
                module = names.get(f'{module}.weight', module).removesuffix('.weight')
            part = part.replace('lora_down', 'lora_A').replace('lora_up', 'lora_B')
            # PEFT puts the adapter's own name in between: lora_A.default.weight
            part = re.sub(r'^(lora_[AB])\.[^.]+\.', r'\1.', part)
            key = f'{module}.{part}'
        elif diffusers:
            key = names.get(key, key)
        # some keep the patch convolution as a linear layer
        if key == 'patch_embedding.weight' and value.numel() == expected[key].numel():
            value = value.view(expected[key].shape)
        if key in out:
            raise InputError(f'{theirs} is a second tensor for {key}: keep one of them (of two '
                             'adapters in one file)')
        out[key] = value
    return out


# What an adapter's config may hold that does not change what it does to the weights.
HARMLESS = {
    'r', 'lora_alpha', 'use_rslora', 'alpha_pattern', 'rank_pattern', 'target_modules',
    'exclude_modules', 'peft_type', 'task_type', 'base_model_name_or_path', 'revision',
    'auto_mapping', 'inference_mode', 'lora_dropout', 'lora_bias', 'layers_to_transform',
    'layers_pattern', 'peft_version', 'megatron_core', 'runtime_config', 'parent_library',
    'eva_config', 'init_lora_weights', 'qalora_group_size'  # the last without use_qalora
}


def adapter_config(path, metadata):
    """What is said of an adapter: PEFT's adapter_config.json beside it, diffusers' entry in its
    header, and our own `lora_alpha` there. InputError for what would change the result and is
    not supported."""
    beside = path.parent / 'adapter_config.json'
    config = read_json(beside, dict) if beside.is_file() else {}
    if 'lora_adapter_metadata' in metadata:
        with in_words(f'cannot load {path}'):
            config = {key.removeprefix('transformer.'): value
                      for key, value in json.loads(metadata['lora_adapter_metadata']).items()}
    if 'lora_alpha' in metadata:
        config = {**config, 'lora_alpha': metadata['lora_alpha']}
    unknown = {key: value for key, value in config.items()
               if key not in HARMLESS and value not in (None, False, [], {}, 'none', '')}
    for key, known in (('peft_type', ('LORA', )),
                       ('init_lora_weights', (True, False, 'gaussian', 'orthogonal', 'eva'))):
        if config.get(key, known[0]) not in known:
            unknown[key] = config[key]
    if unknown:
        raise InputError(f'the adapter {path} has '
                         f'{", ".join(f"{k} = {v}" for k, v in unknown.items())}, which is not '
                         'supported: merge it into its weights with the package that made it')
    return config


def merge_lora(state, base, config=None):
    """W += scale B A in float32 for each pair <module>.lora_A.weight (r, in),
    <module>.lora_B.weight (out, r) in `state`.

    scale: alpha / r, or with config['use_rslora'] alpha / sqrt(r), of each module: alpha is
    <module>.alpha, or that of the config's alpha_pattern that its name ends in, or the config's
    lora_alpha, or r. A bias of B is added to the module's own, scaled alike; <module>.diff,
    diff_b and diff_m (of its modulation) are added as they are. When `state` holds nothing else
    (an adapter without its model), W is taken from `base`. InputError for what does not fit,
    and for any other part.
    """
    config, parts, full = config or {}, {}, {}

    def named(pattern, module):  # as PEFT has it, of the module's name in any layout
        names = module, dit_diffusers_key(f'{module}.weight').removesuffix('.weight')
        with in_words(f'the adapter\'s alpha_pattern names {pattern}, which is no regular '
                      'expression'):
            pattern = re.compile(rf'(.*\.)?({BEFORE.sub("", pattern)})$')
        return any(map(pattern.match, names))
    for key, value in state.items():
        if adapter := ADAPTER.fullmatch(key):
            parts.setdefault(adapter[1], {})[adapter[2]] = value
        else:
            full[key] = value
    full, patterns = full or dict(base), config.get('alpha_pattern') or {}
    if not isinstance(patterns, dict):
        raise InputError(f'the adapter\'s alpha_pattern is {patterns}, not {{module: alpha}}')
    if lost := [p for p in patterns if not any(named(p, module) for module in parts)]:
        raise InputError(f'the adapter\'s alpha_pattern names {lost[0]}, which is none of its '
                         'modules')
    for module, part in parts.items():
        A, B, bias = (part.pop(f'lora_{name}', None)
                      for name in ('A.weight', 'B.weight', 'B.bias'))
        alpha, *diffs = (part.pop(name, None) for name in ('alpha', 'diff', 'diff_b', 'diff_m'))
        # what is to be added to the module's parameters
        updates = list(zip(('weight', 'bias', 'modulation'), diffs))
        unfit = InputError(f'the LoRA of {module} does not fit this model')
        if part:
            raise InputError(f'the adapter has {module}.{next(iter(part))}: only LoRA without '
                             'DoRA, and differences of weights, are supported')
        if A is not None or B is not None or bias is not None:
            pair = A is not None and B is not None and A.ndim == B.ndim == 2
            if not pair or not 0 < len(A) == B.shape[1]:
                raise unfit
            if config.get('r', len(A)) != len(A) and not config.get('rank_pattern'):
                raise InputError(f'the adapter\'s config says rank {config["r"]}, but its LoRA '
                                 f'of {module} has {len(A)}: adapter_config.json belongs to '
                                 'another adapter; move it away')
            if alpha is None:  # the module's own comes before its pattern's and the config's
                alpha = next((a for p, a in patterns.items() if named(p, module)),
                             config.get('lora_alpha', len(A)))
            with in_words(f'the adapter\'s alpha of {module} is {alpha}, which is no number'):
                scale = float(alpha) / (len(A) ** 0.5 if config.get('use_rslora') else len(A))
            updates += [('weight', scale * (B.float() @ A.float())),
                        ('bias', None if bias is None else scale * bias.float())]
        for name, update in updates:
            if update is None:
                continue
            # in float32: in bfloat16 a small update would be rounded away
            key = f'{module}.{name}'
            old = full.get(key)
            if old is None or update.numel() != old.numel() or len(update) != len(old):
                raise unfit
            full[key] = old.float() + update.float().view(old.shape).to(old.device)
    return full


def load_checkpoint(model, name, ema=True, onto=False, above=()):
    """Load generator weights into a DiT from any layout of the field; return the file's
    metadata (a dict of str).

    Accepted: flat or under generator_ema / ema / generator / generator_lora / model /
    state_dict (the EMA is preferred, `ema=False` takes the other if it is there); FSDP, DDP,
    compile and PEFT prefixes; Wan's or diffusers' names; LoRA adapters, beside their base
    weights or alone (merged into the generator that their metadata name as `base`, else into
    the weights that the model has; the `kind` returned then says that these were not in the
    file). onto: `name` must be an adapter, and is merged into the weights that the model has,
    whatever `base` it names. above: the adapters that lead here, each the base of the one before.
    """
    path = find_file(name)
    state, metadata = read_weights(path)
    wrappers = ['generator_ema', 'ema', 'generator', 'generator_lora', 'model', 'state_dict']
    wrappers = wrappers if ema else wrappers[2:] + wrappers[:2]
    if isinstance(state, dict):
        # an empty one, of a run whose average has not begun, hides nothing
        inner = [state[w] for w in wrappers if isinstance(state.get(w), dict) and state[w]]
        if len(inner) > 1 and state.get('generator_lora'):
            raise InputError(f'{path} holds a generator and an adapter (generator_lora): save '
                             'each in a file of its own')
        state = inner[0] if inner else state
    if not is_state(state):
        raise InputError(f'{path} holds no state dict: expected tensors, or one of '
                         f'{", ".join(wrappers)}')
    # files that are often taken for a generator's
    for signs, what in (('blip.', 'an ImageReward model'),
                        (('encoder.downsamples.', 'encoder.down_blocks.'), 'a VAE'),
                        (('token_embedding.', 'encoder.block.'), 'a text encoder'),
                        ('trajectory', 'ODE trajectories')):
        if any(key.startswith(signs) for key in state):
            raise InputError(f'{path} is {what}, not generator weights')
    state = native_keys(state, model.state_dict())
    others = [key for key in state if not ADAPTER.fullmatch(key)]  # what no adapter has
    adapted = len(others) < len(state)
    if onto and others:
        why = 'a whole generator goes to --checkpoint'
        if adapted:
            why = f'beside its parts it has {others[0]}'
        raise InputError(f'{path} is no LoRA adapter: {why}')
    if adapted:
        if not others and not onto:
            if 'base' in metadata:
                if path in above:
                    raise InputError(f'the adapter {path} names itself as the generator that it '
                                     'belongs to, or another adapter that does')
                load_checkpoint(model, metadata['base'], above=(*above, path))
            else:
                metadata = {**metadata, 'kind': 'a LoRA adapter without its generator'}
        state = merge_lora(state, model.state_dict(), adapter_config(path, metadata))
    old = model.patch_embedding.weight
    load_exactly(model, state, path).to(old.device, old.dtype)
    check_finite(model.state_dict(), f'{path} holds weights that are not finite: it is damaged, '
                                     'or of a run that diverged')
    return metadata


def save_checkpoint(path, state, **metadata):
    """Write tensors to a safetensors file, whole or not at all: under a temporary name, then
    renamed.

    metadata: stage, kind ('causal' or 'bidirectional'), timesteps, shift, chunk, config, ...; what
    is no text becomes JSON. Read back by `load_checkpoint` and checked by `require`.
    Weights that are not finite: InputError.
    """
    check_finite(state, f'the weights for {path} are not finite; try a lower --lr')
    text = {key: value if isinstance(value, str) else
            json.dumps(value, default=dataclasses.asdict) for key, value in metadata.items()}
    replace_file(Path(path), lambda temporary: write_tensors(temporary, state, text))


def check_finite(state, sentence):
    """Tensors, nested in any way, all of which must be finite."""
    if not all(x.isfinite().all() for x in tree_leaves(state) if torch.is_tensor(x)):
        raise InputError(sentence)


def write_tensors(path, state, metadata):
    """A safetensors file: its header's length, the header, the tensors. The package itself
    writes a file that a kill leaves behind under another name, and that its owner alone may
    read."""
    names = {torch.float64: 'F64', torch.float32: 'F32', torch.float16: 'F16',
             torch.bfloat16: 'BF16'}
    # aligned, whatever the dtypes
    state = dict(sorted(state.items(), key=lambda item: -item[1].itemsize))
    header, end = {'__metadata__': metadata}, 0
    for key, x in state.items():
        header[key] = {'dtype': names[x.dtype], 'shape': [*x.shape],
                       'data_offsets': [end, end := end + x.nbytes]}
    text = json.dumps(header).encode()
    text += b' ' * (-(8 + len(text)) % 64)  # so that the tensors lie as in memory
    with open(path, 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for x in state.values():
            file.write(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def check_writable(folder):
    """Make a folder if need be; one that cannot be written to is an InputError."""
    with writing(f'to {folder}'):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def require_space(folder, need, what):
    """A disk that cannot hold `need` bytes more is an InputError before they are made."""
    if need > (free := shutil.disk_usage(folder).free):
        raise InputError(f'{folder} has {free / 1e9:.2f} GB free, but {what} '
                         f'{need / 1e9:.2f}: take an --out on another disk')


NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(what):
    """What goes wrong while a file is written becomes one sentence: 'cannot write {what}: ...'."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError, whose context the OSError is
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        why = 'no space left' if cause.errno in NO_SPACE else first_line(cause)
        raise InputError(f'cannot write {what}: {why}') from error


def temporary_name(path, mark=''):
    """Where a file is written before it is renamed. A killed process leaves it, so it is the
    same the next time and is replaced. It is short: the file's own name may be as long as the
    file system allows."""
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    return path.with_name(f'.{name}{mark}{path.suffix}')


@contextlib.contextmanager
def replacing(path, mark=''):
    """`with replacing(path) as temporary:` what is written to `temporary` becomes the file,
    whole or not at all."""
    temporary = temporary_name(path, mark)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, 'rb') as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def replace_file(path, write, mark=''):
    """write(temporary path), then rename; mark: of this process, where several write the same
    file."""
    with replacing(path, mark) as temporary:
        write(temporary)


# How videos are written: the colours' matrix is named, or players would guess another one.
VIDEO = dict(macro_block_size=2, output_params=[
    '-vf', 'scale=out_color_matrix=bt709:out_range=tv', '-color_range', 'tv',
    '-colorspace', 'bt709', '-color_primaries', 'bt709', '-color_trc', 'bt709'])


def require_ffmpeg():
    """A machine without ffmpeg is known before any model is loaded, not at the first video."""
    from imageio.plugins import ffmpeg
    with in_words('videos cannot be written'):
        subprocess.run([ffmpeg.get_exe(), '-version'], capture_output=True, check=True)


def frames_in(path):
    """How many frames a video file has; 0 if it is none, or is cut off."""
    import imageio
    try:
        with imageio.get_reader(path, format='ffmpeg') as reader:
            return reader.count_frames()
    except Exception:  # whatever the file is
        return 0


def is_cut_off(path):
    """Whether an MP4 file ends before the last of its boxes does, each of which begins with its
    size. ffmpeg reads such a file without a word, as a shorter video, where the index comes
    first (faststart)."""
    end, size = 0, os.path.getsize(path)
    with open(path, 'rb') as file:
        while end < size:
            file.seek(end)
            head = file.read(16)
            if end == 0 and head[4:8] != b'ftyp':
                return False  # another format
            # 1: the size, being large, comes after the name; 0: up to the end of the file
            box = int.from_bytes(head[:4], 'big')
            box = int.from_bytes(head[8:], 'big') if box == 1 else box or size - end
            end += max(box, 8)
    return end > size


def check_video(path, frames):
    """A video that ffmpeg did not write to its end is an OSError; imageio does not look at
    ffmpeg's exit code."""
    if (found := frames_in(path)) != frames:
        raise OSError(f'of its {frames} frames ffmpeg wrote {found}; is there space left?')


def saved_steps(metadata):
    """The few-step timesteps in a checkpoint's metadata, [] if it names none."""
    text = metadata.get('timesteps', '')
    try:
        steps = [float(t) for t in text.split(',') if t]
    except ValueError:
        steps = [math.nan]
    if not all(0 < t <= 1000 for t in steps) or steps != sorted(set(steps), reverse=True):
        raise InputError(f'the checkpoint names the timesteps {text}: they must fall, from at '
                         'most 1000 to above 0')
    return steps


def saved_number(metadata, key, default, kind):
    """A positive number in a checkpoint's metadata: `chunk` or `shift`."""
    try:
        value = kind(metadata.get(key, default))
    except ValueError:
        value = 0
    if not 0 < value < math.inf:
        raise InputError(f'the checkpoint names {key} = {metadata[key]}, which is no positive '
                         'number')
    return value


def load_generator(folder, init, kind, shift=5.0):
    """What a stage starts from: the DiT of a model folder with the weights of `init`, if given,
    which must be of this kind; and what these say of themselves: (net, timesteps, chunk,
    shift). shift: if they do not say it."""
    net = load_dit(folder)
    metadata = load_checkpoint(net, init) if init else {}
    require(metadata, init, kind=kind)
    shift = saved_number(metadata, 'shift', shift, float)
    steps = saved_steps(metadata) or warped_steps(shift=shift)
    return net, steps, saved_number(metadata, 'chunk', 3, int), shift


def require(metadata, path, kind):
    """Refuse a checkpoint that is not of this kind, 'causal' or 'bidirectional'. Files of other
    projects carry no metadata and are taken at their word."""
    if metadata.get('kind', kind) != kind:
        raise InputError(f'{path} was written by stage {metadata.get("stage", "unknown")} with '
                         f'kind = {metadata["kind"]}, but kind = {kind} is needed here')


class Trajectories:
    """The ODE trajectories that ode_init.py sample left in a folder: len(), and [i] -> (states,
    prompt).

    states (K + 1, C, F, H, W) float32: the teacher's ODE at the K few-step timesteps, then the
    clean endpoint.
    settings: the flags they were sampled with, `timesteps` among them.
    """

    def __init__(self, folder):
        from safetensors import safe_open
        self.where, self.files, self.settings, shape = [], {}, None, None
        for path in sorted(Path(folder).glob('trajectories_*.safetensors')):
            with in_words(f'{path} is not a shard of trajectories, or is damaged',
                          'delete it, then run ode_init.py sample again'):
                file = self.files[path] = safe_open(path, 'pt')
                settings, prompts = (json.loads(file.metadata()[key])
                                     for key in ('settings', 'prompts'))
                self.where += [(path, i, str(prompt)) for i, prompt in enumerate(prompts)]
                # (count, K + 1, C, F, H, W)
                count, *of_one = file.get_slice('trajectory').get_shape()
                shape = shape or of_one
                states = len(settings['timesteps']) + 1
                if (count, of_one, of_one[0]) != (len(prompts), shape, states):
                    raise ValueError('of another shape')
            if settings != (self.settings or settings):
                raise InputError(f'{path} was sampled with other settings than the shards '
                                 'before it: use one folder for each setting')
            self.settings = settings
        if not self.where:
            raise InputError(f'{folder} holds no trajectories: make them with ode_init.py '
                             f'sample --out {folder}')

    def __len__(self):
        return len(self.where)

    def __getitem__(self, i):
        path, row, prompt = self.where[i]
        return self.files[path].get_slice('trajectory')[row].float(), prompt


# ----------------------------------------------------------------------------------------
# Processes, seeds and errors, the same for every script

def is_sharded(x):
    """Whether x is a tensor of which this process holds a share."""
    return hasattr(x, 'full_tensor')


@dataclasses.dataclass
class Process:
    """This process among those that torchrun started; alone it is rank 0 of 1."""
    rank: int
    world: int
    device: torch.device
    shard: bool = False  # --shard: see `sharded`
    lock: object = None  # see `claim_folder`

    @property
    def quiet(self):
        """Whether progress bars are left out: on other ranks than 0, and in log files."""
        return self.rank > 0 or not sys.stderr.isatty()

    def print(self, *args):
        """Print on rank 0."""
        if self.rank == 0:
            print(*args, flush=True)

    def wrap(self, model):
        """A model to be trained, on the device: with --shard sharded, else under
        DistributedDataParallel when there are several processes."""
        if self.shard:
            return self.sharded(model)
        model.to(self.device)
        if self.world == 1:
            return model
        self.agree(model)
        devices = [self.device.index] if self.device.type == 'cuda' else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices,
                                                   gradient_as_bucket_view=True)

    def frozen(self, model):
        """A frozen model on the device, also sharded where there are several GPUs."""
        model.eval().requires_grad_(False)
        if self.shard or (self.world > 1 and self.device.type == 'cuda'):
            return self.sharded(model)
        return model.to(self.device)

    def sharded(self, model):
        """FSDP2, block by block: each process keeps a share of every weight, and of what
        belongs to it; a block's weights are gathered when it computes and freed after it. The
        model comes from the CPU's memory, so it never lies whole on a device. All processes
        have to call it, and the model, equally often."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
        self.agree(model)
        mesh = init_device_mesh(self.device.type, (self.world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
            register_fsdp_forward_method(block, 'read')
        # also what lies outside of the blocks is freed after a forward, since the averages
        # change places with the shares
        return fully_shard(model, mesh=mesh, reshard_after_forward=True)

    def agree(self, model):
        """Processes that hold other weights, or another torch, are an InputError: each would
        go on with its own."""
        digest = hashlib.sha256(torch.__version__.encode())
        for name, p in model.named_parameters():
            some = p.detach().flatten()[:64].float().cpu()
            digest.update(f'{name} {tuple(p.shape)}'.encode() + some.numpy().tobytes())
        mine = torch.tensor(int.from_bytes(digest.digest()[:7], 'big'), device=self.device)
        if len(self.gather(mine).unique()) > 1:
            raise InputError('the processes hold different weights, or different versions of '
                             'torch: give every machine the same files and packages')

    def whole(self, state):
        """Tensors nested in any way. What is sharded is gathered into rank 0's CPU memory, one
        tensor after the other (elsewhere: None); all processes have to call it.

        Not by full_tensor: the operation behind it has a race in gloo (torch 2.13) that now and
        then ends a process."""
        def gathered(x):
            if not is_sharded(x):
                return x
            share = x.to_local()
            rows = -(-len(x) // self.world)  # the last processes may have fewer, or none
            padded = share.new_zeros(rows, *x.shape[1:])
            padded[:len(share)] = share
            every = self.gather(padded).flatten(0, 1)[:len(x)]
            # a copy, without the padding
            return every.to('cpu', copy=True) if self.rank == 0 else None
        return tree_map(gathered, state)

    def sync(self, model, now):
        """Context of a backward pass. DDP averages gradients over processes only in the step's
        last one; sharded ones are averaged every time, since they would not fit whole. (Where
        several forwards share a backward pass, autograd holds them whole until its end.)"""
        if self.world == 1 or self.shard or now:
            return contextlib.nullcontext()
        return model.no_sync()

    def forget_gradients(self, optimizer):
        """Their memory is freed; but DDP's buckets stay, of which they are views: freed, they
        would come twice."""
        optimizer.zero_grad(set_to_none=self.world == 1 or self.shard)

    def mean(self, tensor):
        """The tensor, averaged over processes."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor / self.world

    def gather(self, tensor):
        """The tensors of all processes, stacked: (world, ...)."""
        if self.world == 1:
            return tensor.unsqueeze(0)
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        torch.distributed.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def barrier(self):
        if self.world > 1:
            torch.distributed.barrier()


# How long a process waits for the others: until all are there, and later for one that may have
# a long file to write
MEETING, PATIENCE = datetime.timedelta(minutes=10), datetime.timedelta(days=1)


@contextlib.contextmanager
def processes(device=None, shard=False):
    """`with processes() as process:` joins torchrun's process group (NCCL on CUDA, gloo on CPU)
    and leaves it.

    device: 'cpu', 'cuda', 'cuda:1', ...; None takes this rank's GPU if there is one.
    shard: see `Process.sharded`.

    Seeding rule of every script: what steers the loop (exit step, prompt order) is drawn from a
    generator seeded alike on all ranks; noise from one seeded by its sample's global index, so
    that neither the number of ranks nor the batch size changes the result.
    """
    names = ('WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
    given = {key: os.environ[key] for key in names if key in os.environ}

    def count(key, default):
        text = given.get(key, default)
        return int(text) if text.isdecimal() else -1
    world, rank, local = count('WORLD_SIZE', '1'), count('RANK', '0'), count('LOCAL_RANK', '0')
    complete = world == 1 or ({'RANK', 'MASTER_ADDR', 'MASTER_PORT'} <= set(given)
                              and given['MASTER_PORT'].isdecimal())
    if not 0 <= rank < world or local < 0 or not complete:
        raise InputError('the environment has '
                         f'{" ".join(f"{k}={v}" for k, v in given.items())}, which is not what '
                         'torchrun sets: start with torchrun, or unset it')
    try:
        device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    except RuntimeError as error:
        raise InputError(f'unknown device {device!r}: use cpu or cuda') from error
    if device.type not in ('cpu', 'cuda'):
        raise InputError(f'device {device}: nothing here has been tried on it; use cpu or cuda')
    if device.type == 'cuda':
        if not torch.cuda.is_available():
            raise InputError('no CUDA device is available here: use --device cpu')
        if world > 1 and (device.index is not None or torch.cuda.device_count() > 1
                          and 'LOCAL_RANK' not in given):
            raise InputError('each process takes a GPU of its own: give --device without a '
                             'number, and set LOCAL_RANK, as torchrun does')
        device = torch.device('cuda', local if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise InputError(f'there is no {device}: this machine has '
                             f'{torch.cuda.device_count()} GPUs, and each process takes one')
        torch.cuda.set_device(device)
    if world > 1:
        # Before the group exists: imported later, as DDP does, its functions' defaults would
        # hold the group, whose threads would then outlive it and could abort the interpreter's
        # exit.
        importlib.import_module('torch.distributed.nn')
        with in_words(f'{world} processes were to meet at {given["MASTER_ADDR"]}:'
                      f'{given["MASTER_PORT"]}, as WORLD_SIZE says, and did not',
                      'start them all, or unset WORLD_SIZE'):
            store, *_ = next(torch.distributed.rendezvous('env://', timeout=MEETING))
        store.set_timeout(PATIENCE)
        torch.distributed.init_process_group('nccl' if device.type == 'cuda' else 'gloo',
                                             store=store, rank=rank, world_size=world,
                                             timeout=PATIENCE)
    elif shard:
        raise InputError('--shard needs several processes: start with torchrun, or leave it out')
    yield Process(rank, world, device, shard)
    if world > 1:  # after an error `run_script` ends the process instead
        # A thread of gloo's may still have to free what the last collective held, for which it
        # needs Python's lock; the group's end would hold that and wait for the thread. So it is
        # given a moment.
        time.sleep(0.2)
        torch.distributed.destroy_process_group()


def seeded(seed, device='cpu'):
    """A torch.Generator on `device`. On a CPU torch takes 32 bits of a seed and drops what is
    above them, so that is mixed in."""
    if torch.device(device).type == 'cpu':
        seed = (seed + (seed >> 32) * 0x9E3779B1) % (1 << 32)  # the golden ratio's digits
    return torch.Generator(device).manual_seed(seed)


def format_steps(steps, digits=6):
    return ', '.join(f'{t:.{digits}g}' for t in steps)


def counted(n, thing):
    """1, 'latent frame' -> '1 latent frame'; 3 -> '3 latent frames'."""
    return f'{n} {thing}' + 's' * (n != 1)


INTERRUPTS = []  # every Ctrl-C


def on_ctrl_c(number, frame):
    """What Python does too, and keep it: the exception is lost where it arises in a destructor or
    under C code that drops what it did not raise. A training looks here at every step."""
    INTERRUPTS.append(number)
    raise KeyboardInterrupt


def run_script(main):
    """Call main(); what the user can mend is printed in one sentence, with exit code 2 (130
    after Ctrl-C) and no traceback. A fault of the code keeps its traceback. Under torchrun
    either comes from the first process that fails alone."""
    # closed, as a cron job's may be
    sys.stdout, sys.stderr = (stream or open(os.devnull, 'w')
                              for stream in (sys.stdout, sys.stderr))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # any prompt or path can be printed, whatever the encoding
        sys.stdout.reconfigure(errors='backslashreplace')
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not under nohup
        signal.signal(signal.SIGINT, on_ctrl_c)
    try:
        main()
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        sentence, first = cause_in_words(error), fails_first()
        for bar in list(getattr(tqdm, '_instances', ())):
            bar.close()  # else the sentence would stand behind it
        if first and sentence:
            start = '\n' * ('RANK' in os.environ)  # the bar of another process
            with contextlib.suppress(OSError):
                print(f'{start}error: {sentence}', file=sys.stderr, flush=True)
        interrupted = isinstance(error, KeyboardInterrupt)
        code = 130 if interrupted else 2 if sentence else 1
        if torch.distributed.is_initialized():
            # at once: the group's end could hang, see `processes`
            if first and not sentence:
                traceback.print_exc()
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(code)
        if first and not sentence:
            raise
        sys.exit(code)


def cause_in_words(error):
    """What ended a script, if the user or the machine did; None for a fault of the code."""
    if isinstance(error, KeyboardInterrupt):
        return 'stopped by Ctrl-C'
    if isinstance(error, BrokenPipeError):
        # what is still in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 'the pipe that the output goes to is closed'
    if lacks_memory(error):
        return ('no memory left, take a smaller --batch, fewer --frames or smaller ones: '
                f'{first_line(error)}')
    refusals = (*NO_SPACE, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG,
                errno.EIO, errno.ESTALE, errno.EMFILE)
    refused = isinstance(error, OSError) and error.errno in refusals
    return str(error) if refused or isinstance(error, InputError) else None


def fails_first():
    """Whether no other process of this torchrun has failed before; they share the launcher's
    store."""
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
        return True
    with contextlib.suppress(Exception):  # the launcher is gone
        store = torch.distributed.TCPStore(os.environ['MASTER_ADDR'],
                                           int(os.environ['MASTER_PORT']),
                                           wait_for_workers=False,
                                           timeout=datetime.timedelta(seconds=10))
        return store.add(f'failed {os.environ.get("TORCHELASTIC_RESTART_COUNT")}', 1) == 1
    return True


# ----------------------------------------------------------------------------------------
# Training: what every stage does alike

class Help(argparse.ArgumentDefaultsHelpFormatter):
    """--help with the defaults that hold: those of the model and of what else was asked for
    (see `parse_known`), and what a help text says of a default only where the flag has none."""

    def _get_help_string(self, action):
        if action.default in (None, argparse.SUPPRESS):
            return action.help
        said = re.sub(r' \(default: .*?\)', '', action.help)
        return f'{said} (default: %(default)s)'


def tiny_model():
    """The default --model, which lies beside the scripts, wherever one stands."""
    return os.path.relpath(Path(__file__).parent / 'tests/tiny')


class Parser(argparse.ArgumentParser):
    """argparse whose errors are an InputError and whose help has every default; a path may
    begin with ~/ also where no shell has seen it."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Help, **kwargs)

    def error(self, message):
        message = message.removeprefix('argument ')
        raise InputError(f'{message}; {self.prog} --help shows the flags')

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        words = [re.sub(r'^(--[\w-]+=)?(~/.*)',
                        lambda m: (m[1] or '') + os.path.expanduser(m[2]), w) for w in words]
        parsed, rest = super().parse_known_args(words, namespace)
        for action in self._actions:  # such as a variable of the shell that is not set
            empty = getattr(parsed, action.dest, None) == '' != action.default
            if empty and action.dest != 'negative':
                self.error(f'{"/".join(action.option_strings)} is empty')
        return parsed, rest


def number(low=None, high=None, above=None, below=None, kind=float, step=None):
    """An argparse type: a flag's text -> a finite number in a range; `low` and `high` are in
    it. step: from low on."""
    def checked(text):
        try:
            value = kind(text)
            if not math.isfinite(value):
                raise ValueError
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(
                f'{text} is no {"whole " * (kind is int)}number') from None
        for words, bound, holds in (('at least', low, operator.ge),
                                    ('at most', high, operator.le),
                                    ('more than', above, operator.gt),
                                    ('less than', below, operator.lt)):
            if bound is not None and not holds(value, bound):
                raise argparse.ArgumentTypeError(f'{text} must be {words} {bound}')
        if step and (value - low) % step:
            near = value - (value - low) % step
            raise argparse.ArgumentTypeError(f'{text} is not {low} + {step}k: take {near} or '
                                             f'{near + step}')
        return value
    return checked


def whole(low, high=(1 << 63) - 1, step=1):
    """An argparse type: a whole number from `low` to `high`."""
    return number(low, high, kind=int, step=step)


FRAMES = whole(1, 4 * MAX_POSITION - 3, 4)  # as far as the RoPE table goes
PIXELS = whole(16, 16 * MAX_POSITION, 16)
SEED = whole(0, (1 << 24) - 1)  # see `sample_generators`


def parse_known(p, argv):
    """The flags so far, before defaults depend on them; --help has to wait until they do."""
    argv = sys.argv[1:] if argv is None else argv
    return p.parse_known_args([word for word in argv if word not in ('-h', '--help')])[0]


def training_flags(p, **paper):
    """Add the flags that all training stages share; `paper`: the defaults of this stage for a
    real model."""
    g = p.add_argument_group('data')
    g.add_argument('--model', default=tiny_model(),
                   help='the Wan model: a folder or hub repository')
    g.add_argument('--prompts', default='gdhe17/Self-Forcing:vidprom_filtered_extended.txt',
                   metavar='FILE',
                   help='one prompt per line: a file, or repository:path on the hub')
    g.add_argument('--held-out', metavar='FILE',
                   help='prompts for the sample videos (default: the last 4 of --prompts, '
                        'which are not trained on; of up to 4 prompts all)')
    g.add_argument('--frames', type=FRAMES, default=81, help='video frames, 1 + 4k')
    g.add_argument('--height', type=PIXELS, default=480, help='pixels, a multiple of 16')
    g.add_argument('--width', type=PIXELS, default=832, help='pixels, a multiple of 16')
    g = p.add_argument_group('optimisation')
    g.add_argument('--steps', type=whole(1), help='optimizer steps')
    g.add_argument('--batch', type=whole(1), default=1,
                   help='samples per process and backward pass')
    g.add_argument('--accum', type=whole(1), default=1, help='backward passes per step')
    g.add_argument('--lr', type=number(0), default=2e-6, help='learning rate, constant')
    g.add_argument('--beta1', type=number(0, below=1), default=0.0,
                   help='of AdamW; beta2 is 0.999')
    g.add_argument('--weight-decay', type=number(0), default=0.01, help='of AdamW')
    g.add_argument('--grad-clip', type=number(above=0), default=10.0,
                   help='norm to which gradients are clipped')
    g.add_argument('--ema', type=number(0, below=1), default=0.99,
                   help='decay of the averaged weights, which are the result')
    g.add_argument('--ema-start', type=whole(0), default=0,
                   help='step from which they are averaged')
    g.add_argument('--seed', type=SEED, default=0, help='of everything random')
    g = p.add_argument_group('files and machine')
    g.add_argument('--out', help='the run\'s folder')
    g.add_argument('--resume', action='store_true',
                   help='go on with the run that --out holds, if any')
    g.add_argument('--save-every', type=whole(1), default=50,
                   help='steps between states to resume from')
    g.add_argument('--keep-every', type=whole(0), default=0, metavar='N',
                   help='steps between results kept as model_<step>.safetensors, 0: none; a '
                        'multiple of --save-every')
    g.add_argument('--sample-every', type=whole(0), default=50,
                   help='steps between sample videos, 0: none')
    g.add_argument('--motion-alarm', type=number(0), default=0.9, metavar='SHARE',
                   help='warn when the sample videos move less than this share of what they did '
                        'before the first step; 0: never')
    machine_flags(g)
    g.add_argument('--shard', action='store_true',
                   help='share weights, gradients, optimizers and averages out over the '
                        'processes (FSDP2), for models that do not fit whole')
    g.add_argument('--checkpointing', action=argparse.BooleanOptionalAction, default=True,
                   help='recompute activations in the backward pass: less memory, more time')
    p.set_defaults(**paper)


def machine_flags(p):
    """Add the flags of every script that runs the model."""
    p.add_argument('--device', help='cpu or cuda (default: cuda if there is one)')
    p.add_argument('--dtype', choices=['float32', 'bfloat16'],
                   help='of the computation; trained weights are float32 (default: bfloat16 on '
                        'cuda, else float32)')
    p.add_argument('--offload-text', action='store_true',
                   help='keep the text encoder off the GPU between prompts')


def model_defaults(name, stage=''):
    """What a local model folder's defaults.json says of flags: its top level, and on top its
    entry `stage`. Names of files beside it become paths."""
    file = Path(name) / 'defaults.json'
    given = read_json(file, dict) if file.is_file() else {}
    if not isinstance(given.get(stage, {}), dict):
        raise InputError(f'{file} is not {{flag: value, stage: {{flag: value}}}}')
    given = {**given, **given.get(stage, {})}
    for key in ('checkpoint', 'held_out'):  # which are read before the flags are checked
        if not isinstance(given.get(key, ''), str):
            raise InputError(f'{file}: {key} = {given[key]} is no name of a file')
    for key, value in given.items():
        if value and isinstance(value, str) and os.path.exists(file.parent / value):
            given[key] = str(file.parent / value)
    return given


def as_words(name, value, known):
    """A flag of a defaults.json as the words that one would type; known: its value without
    them."""
    flag = '--' + name.replace('_', '-')
    if isinstance(value, bool):
        return [flag if value else '--no-' + flag[2:]]
    if isinstance(value, list) and isinstance(known, list):
        return [flag, *map(str, value)]
    if isinstance(value, (str, int, float)):
        return [f'{flag}={value}']
    raise InputError(f'{flag} cannot be {json.dumps(value)}')


def parse_stage(p, stage, argv=None):
    """Parse and check a stage's flags. The defaults are the paper's, or those of the model's
    folder, which are checked as if they had been typed."""
    argv = sys.argv[1:] if argv is None else argv
    known = vars(parse_known(p, argv))
    given = {k: v for k, v in model_defaults(known['model'], stage).items() if k in known}
    try:
        words = [word for k, v in given.items() for word in as_words(k, v, known[k])]
        flags = argv.index('--') if '--' in argv else len(argv)  # behind it are none
        checked = vars(parse_known(p, [*argv[:flags], *words, *argv[flags:]]))
    except InputError as error:
        raise InputError(f'{known["model"]}/defaults.json: {error}') from error
    p.set_defaults(**{name: checked[name] for name in given})
    args = p.parse_args(argv)
    if (keep := getattr(args, 'keep_every', 0)) and keep % args.save_every:
        raise InputError(f'--keep-every {keep} must be a multiple of --save-every '
                         f'{args.save_every}')
    return args


def refuse_unused(p, args, why, *names):
    """A flag that was given another value than its default, and would change nothing, is an
    InputError."""
    for name in names:
        value, flag = getattr(args, name), name.replace('_', '-')
        if value != p.get_default(name):
            raise InputError(f'--{flag}{"" if value is True else f" {value}"} has no effect '
                             f'here: {why}')


def compute_dtype(args, device):
    """What --dtype says, by default bfloat16 on CUDA and float32 elsewhere."""
    return getattr(torch, args.dtype or ('bfloat16' if device.type == 'cuda' else 'float32'))


def latent_shape(args, config):
    """(C, F, H/8, W/8) of the videos that the flags ask for."""
    return config.in_dim, latent_frames(args.frames), args.height // 8, args.width // 8


def latent_motion(x0):
    """Mean absolute difference of neighbouring latent frames, x0 (B, C, F, H, W): falls when
    videos become static."""
    return x0.diff(dim=2).abs().mean() if x0.shape[2] > 1 else x0.new_zeros(())


def read_lines(path, aligned=False):
    """The lines of a text file, stripped, without empty ones; aligned: with those but for the
    ones at its end."""
    lines = [line.strip() for line in read_text(path).rstrip().split('\n')]
    return lines if aligned else [line for line in lines if line]


def read_prompts(args):
    """(training prompts, held-out prompts) as --prompts and --held-out say."""
    def lines(name):
        prompts = read_lines(find_file(name))
        if not prompts:
            raise InputError(f'the prompts file {name} is empty: it must hold one prompt per '
                             'line')
        return prompts
    prompts = lines(args.prompts)
    # a run goes on only with the same prompts, also where their file keeps its name
    args.prompts_hash = hashlib.sha256('\n'.join(prompts).encode()).hexdigest()[:16]
    if args.held_out:
        return prompts, lines(args.held_out)
    return prompts[:-4] or prompts, prompts[-4:]


def trainable(model, args, device, dtype):
    """A model whose weights are float32 and computed with in `dtype`; see --dtype and
    --checkpointing."""
    set_threads(model, device)
    model.to(torch.float32).train().requires_grad_(True)  # `Process.wrap` takes it to the device
    model.autocast = None if dtype == torch.float32 else dtype
    model.checkpointing = args.checkpointing
    return model


def set_threads(model, device):
    """On a CPU a small model gets one thread, unless the environment says how many: more would
    wait for each other at every one of its short operations as soon as another process needs
    their cores (tests/README.md: measured)."""
    said = {'OMP_NUM_THREADS', 'MKL_NUM_THREADS'} & set(os.environ)
    if device.type == 'cpu' and not said and sum(p.numel() for p in model.parameters()) < 10e6:
        torch.set_num_threads(1)


def sample_numbers(args, process, step, micro):
    """Which of the run's samples this process takes in a backward pass: a range of numbers.

    Step by step the run counts through its samples, however they are split over processes and
    --accum; prompts and noise belong to the number, so the split does not change the result.
    """
    first = ((step * args.accum + micro) * process.world + process.rank) * args.batch
    return range(first, first + args.batch)


def sample_generators(args, numbers, device='cpu'):
    """One random generator for each sample number; the run's seed are the upper bits of theirs.
    Stages of one --seed see the same noise in the same order: give another one to those that
    shall not."""
    return [seeded((args.seed << 40) + n, device) for n in numbers]


@functools.lru_cache(maxsize=4)
def permutation(size, seed):
    return torch.randperm(size, generator=seeded(seed)).tolist()


def shuffled(items, number, seed):
    """The run's item for a sample number: every epoch goes through all items in another order."""
    epoch, i = divmod(number, len(items))
    return items[permutation(len(items), (seed << 20) + epoch)[i]]


class EMA:
    """Exponential moving average of a model's trained weights, in float32; before step `start`
    simply those weights."""

    def __init__(self, model, decay, start=0):
        self.decay, self.start = decay, start
        self.average = {name: p.detach().clone()
                        for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model, step):
        now = dict(model.named_parameters())
        decay = self.decay if step >= self.start else 0
        torch._foreach_lerp_(list(self.average.values()), [now[name] for name in self.average],
                             1 - decay)

    @contextlib.contextmanager
    def swapped_in(self, model):
        """The model with the averaged weights, for as long as the context lasts."""
        self.swap(model)
        try:
            yield model
        finally:
            self.swap(model)

    @torch.no_grad()
    def swap(self, model):
        now = dict(model.named_parameters())
        for name, average in self.average.items():
            kept = now[name].detach().clone()
            now[name].copy_(average)
            average.copy_(kept)

    def state_dict(self):
        return self.average

    def load_state_dict(self, state):
        for name, value in self.average.items():
            value.copy_(state[name])


def claim_folder(args, process):
    """A training run's --out, before any model is loaded: rank 0 holds it until its process
    ends, however it ends. One that holds another run, or in which one is under way, is an
    InputError."""
    if process.rank > 0:
        return
    folder = Path(args.out)
    state, result = folder / 'state.pt', folder / 'model.safetensors'
    if args.sample_every:
        require_ffmpeg()
    if state.exists() and not args.resume:
        raise InputError(f'{folder} already holds a run: go on with --resume, or give another '
                         '--out')
    # a run that was killed while it saved leaves a temporary state
    if result.exists() and not state.exists() and not temporary_name(state).exists():
        raise InputError(f'{result} is the result of a run whose state.pt is gone: it is not '
                         'written over; move it away, or give another --out')
    settings = folder / 'settings.json'
    if not state.exists() and settings.exists() and 'stage' not in read_json(settings, dict):
        raise InputError(f'{settings} is not of a training run: give another --out')
    check_writable(folder)
    process.lock = open(folder / '.lock', 'w')
    try:
        fcntl.flock(process.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f'another process trains in {folder}: wait for it, or give another '
                         '--out') from error
    except OSError:  # a file system without locks
        pass


def cut_like(state, part):
    """A part's saved state, whole, in shares as the part itself is: a model's, an average's
    (name -> tensor), or an optimizer's."""
    def cut(x, like):
        if not is_sharded(like) or x.shape != like.shape:
            return x
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(x.to(like.device), like.device_mesh, like.placements,
                                 src_data_rank=None)  # each process has read it all
    if not isinstance(part, torch.optim.Optimizer):
        mine = part.state_dict()
        return {name: cut(x, mine.get(name)) for name, x in state.items()}
    weights = [p for group in part.param_groups for p in group['params']]
    moments = {i: {name: cut(x, weights[i]) for name, x in each.items()}
               for i, each in state['state'].items()}
    return {**state, 'state': moments}


class Run:
    """What a training run keeps in its folder: settings.json, state.pt to resume from,
    metrics.jsonl, samples/, and the result, with --keep-every also as it was at earlier steps.

    parts: name -> anything with state_dict and load_state_dict (models, optimizers, averages).
    Nothing random needs to be kept, as every generator is seeded by the run's seed and a
    sample's number or the step.
    """
    MAY_CHANGE = ('steps', 'batch', 'accum', 'out', 'resume', 'save_every', 'keep_every',
                  'sample_every', 'device', 'checkpointing', 'offload_text', 'motion_alarm',
                  'shard')

    def __init__(self, stage, args, process, then, **parts):
        """then: commands to try with the result, whose file comes after them; said at the end
        of the run."""
        self.then, self.args, self.process, self.parts = then, args, process, parts
        self.folder = Path(args.out)
        self.state, self.log = self.folder / 'state.pt', self.folder / 'metrics.jsonl'
        self.result = self.folder / 'model.safetensors'
        self.step = self.saved = self.began = 0
        self.warned = False  # of motion that falls
        settings = {k: v for k, v in vars(args).items() if k not in self.MAY_CHANGE}
        self.settings = {'stage': stage,
                         'samples per step': args.batch * args.accum * process.world,
                         **settings}
        if self.state.exists():
            self.load()
        if len(process.gather(torch.tensor(self.step, device=process.device)).unique()) > 1:
            raise InputError(f'not every process sees the run in {self.folder}: --out must lie '
                             'on storage that all of them see')
        if process.rank == 0:
            self.check_space()
            log = self.logged()
            replace_file(self.log, lambda path: path.write_text(log))
            written = {'stage': stage, 'processes': process.world,
                       'torch': torch.__version__, **vars(args)}
            replace_file(self.folder / 'settings.json', lambda path: path.write_text(
                json.dumps(written, indent=1, ensure_ascii=False, default=str) + '\n',
                encoding='utf-8', errors='backslashreplace'))
        self.bar = tqdm(total=args.steps, initial=self.step, desc=stage, disable=process.quiet,
                        mininterval=1)
        process.print(f'{stage}: {args.steps} steps of {self.settings["samples per step"]} '
                      f'samples ({args.batch} x {args.accum} accumulated x {process.world} '
                      f'processes), to {self.folder}'
                      + (f', from step {self.step}' if self.step else ''))

    def check_space(self):
        """A disk that cannot hold the state is known before the first step."""
        need = 0  # bytes
        for part in self.parts.values():
            if isinstance(part, torch.optim.Optimizer):  # two moments of each weight
                need += 2 * sum(p.nbytes for group in part.param_groups for p in group['params'])
            else:
                need += sum(x.nbytes for x in part.state_dict().values())
        self.folder.mkdir(parents=True, exist_ok=True)
        require_space(self.folder, need, 'a state to resume from takes')

    def load(self):
        """Take everything back to the saved step."""
        saved = read_weights(self.state)[0]
        with in_words(f'{self.state} does not hold the state of this run', 'give another --out'):
            for key, value in self.settings.items():
                if (old := saved['settings'].get(key)) != value:
                    raise InputError(f'{self.folder} was begun with {key} = {old}, not '
                                     f'{value}: resume it with the same flags, or give another '
                                     '--out')
            for name, part in self.parts.items():
                part.load_state_dict(cut_like(saved['parts'][name], part))
            self.step = self.saved = int(saved['step'])

    def logged(self):
        """The log up to the saved step, a line for each; those after it are to come again."""
        if not self.step or not self.log.exists():
            return ''
        with in_words(f'{self.log} is not a line of JSON for each step',
                      'mend it, or delete it to go on without those steps'):
            lines = self.log.read_text().splitlines()[:self.step]
            return ''.join(line + '\n' for line in lines if json.loads(line)['step'] <= self.step)

    def steps(self):
        """The steps to do, from 0 on. While one is under way, self.step is its number from 1
        on."""
        for step in range(self.step, self.args.steps):
            if INTERRUPTS:
                raise KeyboardInterrupt
            self.step, self.began = step + 1, time.perf_counter()
            yield step
            self.bar.update()
        self.bar.close()
        self.process.print(f'done: {self.result}; try')
        for command in self.then:
            self.process.print(f'  python {command} {self.result} --model {self.args.model}')

    def check(self, **metrics):
        """Metrics (numbers or tensors), averaged over processes; what is not finite stops the
        run in words."""
        # a norm of what is sharded is so too
        numbers = [float(x.full_tensor() if is_sharded(x) else x) for x in metrics.values()]
        means = self.process.mean(torch.tensor(numbers, device=self.process.device))
        values = dict(zip(metrics, means.tolist()))
        for name, value in values.items():
            if not math.isfinite(value):
                raise InputError(f'{name} is {value} at step {self.step}; {self.last_good()}')
        return values

    def last_good(self):
        """What to do when a run has diverged."""
        last = 'no step was saved'
        if self.saved:
            last = f'the last good state is step {self.saved} in {self.state}'
        return f'{last}; try a lower --lr'

    def report(self, **metrics):
        """Log the step: a line in metrics.jsonl and on the screen."""
        metrics = {'step': self.step, **metrics, 'seconds': time.perf_counter() - self.began,
                   'peak_gib': peak_memory(self.process.device)}
        if self.process.rank == 0:
            line = json.dumps({k: float(f'{v:.6g}') for k, v in metrics.items()})
            with writing(self.log), open(self.log, 'a') as file:
                file.write(line + '\n')
            shown = {k: v for k, v in metrics.items() if k != 'step' and 'held_out' not in k}
            tqdm.write(f'step {self.step:>6}  {columns(shown)}', file=sys.stdout)
            sys.stdout.flush()

    def warn_when_still(self, motion):
        """Warn, once, when the samples move less than --motion-alarm of what they did before the
        first step: the same prompts from the same noise, so a difference is the training's."""
        start = self.folder / 'samples/step_000000/measured.json'
        if self.warned or not start.exists():
            return
        before = read_json(start, dict).get('held_out_motion')
        if not isinstance(before, (int, float)):
            raise InputError(f'{start} has no number "held_out_motion": delete the file, and '
                             'motion is not watched any more')
        if motion < self.args.motion_alarm * before:
            self.warned = True
            tqdm.write(f'warning: the motion of the held-out videos fell from {before:.4f} to '
                       f'{motion:.4f}: look at samples/, and stop here, or go back to earlier '
                       'weights (--keep-every)', file=sys.stdout)

    def due(self, every):
        """Whether something that happens every so many steps, and after the last one, happens
        now."""
        return every > 0 and (self.step % every == 0 or self.step == self.args.steps)

    def save(self, result, timesteps, **metadata):
        """Write the result, weights for the next stage in model.safetensors, and then all that
        a resumed run needs: a run killed in between makes the result again. What is not finite
        is not written."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        parts, result = self.process.whole(parts), self.process.whole(result)
        if self.process.rank == 0:
            content = {'step': self.step, 'settings': self.settings, 'parts': parts}
            check_finite(content, f'the weights are not finite after step {self.step}; '
                                  f'{self.last_good()}')
            with replacing(self.state) as temporary:
                with open(temporary, 'wb') as file:
                    torch.save(content, file)
                    os.fsync(file.fileno())  # here: it may take long, and a Ctrl-C come
                files = [self.result]
                if self.args.keep_every and self.step % self.args.keep_every == 0:
                    files.insert(0, self.folder / f'model_{self.step:06d}.safetensors')
                for file in files:
                    save_checkpoint(file, result, stage=self.settings['stage'], step=self.step,
                                    timesteps=format_steps(timesteps, 10), **metadata)
        self.saved = self.step
        self.process.barrier()

    @torch.no_grad()
    def samples(self, model, vae, text, prompts, shape, steps, chunks, reward=None):
        """Videos of the held-out prompts, shared out over processes, in
        samples/step_<step>/<i>_<prompt>.mp4; prompt i has the same noise every time. Returns
        what was measured of them, which measured.json beside them keeps: {'held_out_motion':
        mean difference of neighbouring frames}, and with reward(video (1, 3, T, H, W), [prompt])
        -> (1,) also 'held_out'."""
        import imageio
        folder, began = self.folder / 'samples' / f'step_{self.step:06d}', time.perf_counter()
        sums = torch.zeros(3, device=self.process.device)  # motion, reward, how many
        for first in range(0, len(prompts), self.process.world):
            # a process without a prompt helps the others with the last one: a sharded model
            # computes on all of them together
            i = min(first + self.process.rank, len(prompts) - 1)
            random = seeded(i, self.process.device)
            noise = gaussian((1, *shape), random, self.process.device)
            rolled = rollout(model, noise, text(prompts[i:i + 1]), steps, chunks,
                             generator=random)
            video = vae.decode(torch.cat([chunk.x0 for chunk in rolled], dim=2))
            if i < first + self.process.rank:
                continue
            frames = to_frames(video[0])
            with replacing(folder / f'{i}_{file_name(prompts[i])}.mp4') as temporary:
                imageio.mimwrite(temporary, frames, fps=16, **VIDEO)
                check_video(temporary, len(frames))
            score = reward(video, prompts[i:i + 1])[0] if reward else sums.new_zeros(())
            motion = video.diff(dim=2).abs().mean() if len(frames) > 1 else sums.new_zeros(())
            sums += torch.stack([motion, score, sums.new_ones(())])
        sums = self.process.mean(sums)
        measured = {'held_out': (sums[1] / sums[2]).item()} if reward else {}
        measured['held_out_motion'] = (sums[0] / sums[2]).item()
        if self.process.rank == 0:
            tqdm.write(f'sample {self.step:>4}  {columns(measured)}  {folder}', file=sys.stdout)
            replace_file(folder / 'measured.json',
                         lambda path: path.write_text(json.dumps(measured) + '\n'))
            self.warn_when_still(measured['held_out_motion'])
        # a step's seconds are those of training alone
        self.began += time.perf_counter() - began
        return measured


def file_name(prompt):
    """The words of a prompt as the name of a file."""
    return re.sub(r'\W+', '_', prompt).strip('_')[:60] or 'video'


def columns(metrics):
    """{name: number} as columns of one width, whatever the numbers are."""
    return '  '.join(f'{name} {value:<10.4g}' for name, value in metrics.items())


def peak_memory(device):
    """GiB: of the GPU since the start, or of the process on CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (30 if sys.platform == 'darwin' else 20)  # bytes on macOS, KiB elsewhere

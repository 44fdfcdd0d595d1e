"""A tiny captioned world: one textured shape moves on a plain background.

`render` draws clips of it, `measure` reads everything the caption says back from the pixels alone, and
`scorecard` compares the two. Lengths are in "world pixels", of which a frame is always 64 wide: at another
size everything scales, speeds included. Image axes: x to the right, y down; a pixel's centre is at +0.5.
Linear motions wrap round the frame (a torus), so a clip of any length stays interesting.
"""
import argparse
import itertools
import json
import math
import re
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from wan_causal import (  # noqa: E402
    CONFIGS, MAX_POSITION, ImageReward, TextEncoder, WanModel, WanVAE, add_noise, chunk_sizes, clip_preprocess,
    dit_diffusers_key, gaussian, load_checkpoint, load_dit, load_image_reward, load_text_encoder, load_vae,
    permutation, read_weights, replace_file, rollout, saved_steps, shift_sigma, vae_diffusers_key)
from generate import ode_trajectory, sigma_schedule  # noqa: E402

COLOURS = {"red": (220, 40, 40), "green": (60, 200, 70), "blue": (50, 90, 240),  # RGB, 0..255
           "yellow": (240, 220, 40), "purple": (160, 50, 200), "orange": (250, 140, 20)}
BACKGROUNDS = {"navy": (15, 20, 80), "gray": (110, 110, 110), "teal": (0, 90, 100), "brown": (95, 55, 25)}
TEXTURES = ("plain", "striped", "dotted", "checkered")
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}
MOTIONS = (*DIRECTIONS, "moving in circles", "bouncing", "standing still")
WORLD = 64  # world pixels across a frame


# ------------------------------------------------------------------------------------------- captions

def all_captions():
    """All 2016 captions, in a fixed order."""
    return [f"a {colour} {texture} {shape} {motion} on a {background} background" for
            colour, texture, shape, motion, background
            in itertools.product(COLOURS, TEXTURES, SHAPES, MOTIONS, BACKGROUNDS)]


def split():
    """(1816 training captions, 200 held-out captions): always the same ones; every word is in both."""
    captions = all_captions()
    order = permutation(len(captions), 0)
    return [captions[i] for i in sorted(order[200:])], [captions[i] for i in sorted(order[:200])]


def parse(caption):
    """caption -> {'colour', 'texture', 'shape', 'motion', 'background'}."""
    fields = {"colour": COLOURS, "texture": TEXTURES, "shape": SHAPES, "motion": MOTIONS,
              "background": BACKGROUNDS}
    groups = {name: f"(?P<{name}>{'|'.join(words)})" for name, words in fields.items()}
    pattern = "a {colour} {texture} {shape} {motion} on a {background} background".format(**groups)
    match = re.fullmatch(pattern, caption)
    if match is None:
        raise ValueError(f"not a caption of the tiny world: {caption!r}")
    return match.groupdict()


# ------------------------------------------------------------------------------------------ rendering

def offsets(centre, height, width):
    """Where each pixel lies relative to the object: centre (T, 2) as x, y in pixels -> dx, dy (T, H, W).

    The shortest way round the torus, so an object at one side continues on the other.
    """
    dx = torch.arange(width) + 0.5 - centre[:, 0, None, None]
    dy = torch.arange(height)[:, None] + 0.5 - centre[:, 1, None, None]
    dx = torch.remainder(dx + width / 2, width) - width / 2
    dy = torch.remainder(dy + height / 2, height) - height / 2
    return torch.broadcast_tensors(dx, dy)


def shape_distance(shape, dx, dy, radius):
    """Signed distance to the outline, negative inside; all shapes have the area of a circle of `radius`.

    (0, 0) is the shape's centroid. Distances outside a corner are understated, which keeps it sharp.
    """
    if shape == "circle":
        return torch.hypot(dx, dy) - radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - radius * math.sqrt(math.pi) / 2
    inradius = radius * math.sqrt(math.pi / math.sqrt(27))  # equilateral, one corner up
    return torch.maximum(dy, dx.abs() * math.sqrt(3) / 2 - dy / 2) - inradius


def reach(shape, radius):
    """How far the shape reaches from its centroid: (to either side, up, down), in units of radius."""
    if shape == "circle":
        return radius, radius, radius
    if shape == "square":
        return (radius * math.sqrt(math.pi) / 2,) * 3
    inradius = radius * math.sqrt(math.pi / math.sqrt(27))
    return math.sqrt(3) * inradius, 2 * inradius, inradius


def whiteness(texture, dx, dy, pixel=1.0):
    """The white pattern on the object, 0 (its colour) to 1 (white); dx, dy and `pixel` in world pixels.

    The pattern is tied to the object's centre. Its edges are one `pixel` soft.
    """
    def wave(x, period):  # signed distance to the edges of a square wave, positive around x = 0
        return period / 4 - (torch.remainder(x + period / 2, period) - period / 2).abs()

    def soft(distance):
        return (distance / pixel + 0.5).clamp(0, 1)

    if texture == "plain":
        return torch.zeros_like(dx)
    if texture == "striped":
        return soft(wave(dx, 10))
    if texture == "dotted":
        return soft(3 - torch.hypot(wave(dx, 10) - 2.5, wave(dy, 10) - 2.5))
    return 0.5 - 2 * (soft(wave(dx - 3, 12)) - 0.5) * (soft(wave(dy - 3, 12)) - 0.5)


def trajectory(motion, shape, radius, frames, random):
    """The centroid's positions (frames, 2) as x, y in world pixels; random: 6 numbers in [0, 1)."""
    side, up, down = reach(shape, radius)
    t = torch.arange(frames, dtype=torch.float32)

    def inside(u, margin_before, margin_after):  # a place where the object keeps 1 px from both borders
        return 1 + margin_before + u * (WORLD - 2 - margin_before - margin_after)

    x, y = inside(random[0], side, side), inside(random[1], up, down)
    if motion in DIRECTIONS:
        (step_x, step_y), speed = DIRECTIONS[motion], 0.6 + 0.6 * random[2]
        start = WORLD * random[3]
        x, y = (start if step_x else x) + step_x * speed * t, (start if step_y else y) + step_y * speed * t
    elif motion == "moving in circles":
        rho = 9 + random[2] * (min(14, WORLD / 2 - 1 - side) - 9)
        turn = 1 if random[4] < 0.5 else -1
        angle = 2 * math.pi * (random[3] + turn * t / (36 + 21 * random[5]))
        x = inside(random[0], side + rho, side + rho) + rho * torch.cos(angle)
        y = inside(random[1], up + rho, down + rho) + rho * torch.sin(angle)
    elif motion == "bouncing":
        height = 14 + 8 * random[2]
        phase = random[3] + t / (18 + 10 * random[4])
        y = inside(random[1], up + height, down) - height * torch.sin(math.pi * phase).abs()
    return torch.stack([x + 0 * t, y + 0 * t], 1) % WORLD


def render(captions, frames=57, size=64, generator=None, return_state=False):
    """Clips that show what the captions say: (B, 3, frames, size, size) float32 in [-1, 1].

    What a caption leaves open (place, object size, speed, phase) is drawn from `generator`. With
    return_state, also {'centre': (B, frames, 2) the centroids as x, y, 'radius': (B,)}, in pixels.
    """
    scale = size / WORLD
    video, centres, radii = torch.empty(len(captions), 3, frames, size, size), [], []
    for clip, caption in zip(video, captions):
        words = parse(caption)
        random = torch.rand(7, generator=generator).tolist()
        radius = 13 + 2.5 * random[6]
        centre = trajectory(words["motion"], words["shape"], radius, frames, random)
        dx, dy = (d / scale for d in offsets(centre * scale, size, size))
        alpha = (0.5 - scale * shape_distance(words["shape"], dx, dy, radius)).clamp(0, 1)
        white = whiteness(words["texture"], dx, dy, 1 / scale)
        colours = zip(COLOURS[words["colour"]], BACKGROUNDS[words["background"]])
        for channel, (colour, background) in zip(clip, colours):
            channel[:] = torch.lerp(torch.tensor(float(background)), colour + (255 - colour) * white, alpha)
        centres.append(centre * scale)
        radii.append(radius * scale)
    video.div_(127.5).sub_(1)
    if return_state:
        return video, {"centre": torch.stack(centres), "radius": torch.tensor(radii)}
    return video


# ---------------------------------------------------------------------------------------- measurements

def length(vectors):
    """Lengths of vectors (N, ...) along the first axis."""
    return vectors.square().sum(0).sqrt()


def on_line(rgb, colour):
    """Nearest points to rgb (3, ...) on the line from colour (3,) to white -> (whiteness 0..1, distance)."""
    start = colour.view(3, *[1] * (rgb.dim() - 1))
    along = 1 - start
    share = (((rgb - start) * along).sum(0) / along.square().sum()).clamp(0, 1)
    return share, length(rgb - start - along * share)


def erode(mask, rim):
    """mask (T, H, W) less a rim that many pixels wide, on the torus."""
    outside = torch.nn.functional.pad((~mask)[None].float(), (rim,) * 4, mode="circular")
    return torch.nn.functional.max_pool2d(outside, 2 * rim + 1, stride=1)[0] == 0


def find_object(rgb):
    """Colours and mask of the object in rgb (3, T, H, W) in 0..1 -> (background, colour, mask (T, H, W)).

    The background is the clip's median colour; the object is what is far from it; the object's colour is the
    one whose line to white passes nearest to those pixels. In the final mask each pixel is nearer to that
    line than to the background. Without an object the mask is empty and the colour None.
    """
    palette = torch.tensor(list(COLOURS.values())) / 255
    backgrounds = torch.tensor(list(BACKGROUNDS.values())) / 255
    median = rgb[:, ::4].flatten(1).median(1).values  # every fourth frame will do
    background = list(BACKGROUNDS)[length((backgrounds - median).T).argmin()]
    from_background = length(rgb - median.view(3, 1, 1, 1))
    mask = from_background > 0.25
    if mask.float().mean() < 0.01:
        return background, None, torch.zeros_like(mask)
    core = erode(mask[::4], 2)  # without the outline: blurred, it has colours of its own
    pixels = rgb[:, ::4][:, core] if core.any() else rgb[:, mask]
    best = int(torch.stack([on_line(pixels, colour)[1].mean() for colour in palette]).argmin())
    mask = (on_line(rgb, palette[best])[1] < from_background) & (from_background > 0.15)
    return background, list(COLOURS)[best], mask


def centroids(mask):
    """mask (T, H, W), nonempty in each frame -> centroids (T, 2) as x, y in pixels, on the torus."""
    area = mask.sum((1, 2)).clamp(min=1)
    centre = []
    for axis, size in ((1, mask.shape[2]), (2, mask.shape[1])):  # a first guess: the circular mean
        angle = (torch.arange(size) + 0.5) * (2 * math.pi / size)
        profile = mask.sum(axis).float()
        centre.append(torch.atan2(profile @ angle.sin(), profile @ angle.cos()) * (size / (2 * math.pi)))
    centre = torch.stack(centre, 1)
    dx, dy = offsets(centre, *mask.shape[1:])
    return centre + torch.stack([(dx * mask).sum((1, 2)), (dy * mask).sum((1, 2))], 1) / area[:, None]


def unwrap(centre, height, width):
    """Centroids (T, 2) on the torus -> a path (T, 2) that leaves the frame instead of jumping."""
    size = torch.tensor([width, height])
    steps = torch.remainder(centre.diff(dim=0) + size / 2, size) - size / 2
    return torch.cat([centre[:1], centre[:1] + steps.cumsum(0)])


def classify_motion(path):
    """The motion of a path (T, 2) in world pixels, or None when it is none of this world's."""
    if len(path) >= 10:  # mean of 5 frames, against jitter
        path = path.unfold(0, 5, 1).mean(2)
    extent = path.amax(0) - path.amin(0)
    if extent.max() < 5:
        return "standing still"
    t = torch.linspace(-1, 1, len(path))[:, None]
    around = path - path.mean(0)
    drift = (around * t).sum(0) / t.square().sum() * 2  # by the straight line that fits best
    wander = (around - drift / 2 * t).square().sum(1).mean().sqrt()
    if wander < 0.15 * drift.norm():
        return max(DIRECTIONS, key=lambda name: float(drift @ torch.tensor(DIRECTIONS[name]).float()))
    # The area swept about the middle is radius * length for a circle and nothing for a to and fro.
    steps, arm = path.diff(dim=0), around[:-1]
    swept = (arm[:, 0] * steps[:, 1] - arm[:, 1] * steps[:, 0]).sum().abs()
    if swept > 0.5 * arm.norm(dim=1).mean() * steps.norm(dim=1).sum():
        return "moving in circles"
    return "bouncing" if extent[1] > extent[0] else None


def compare_shapes(mask, centre):
    """IoU of the mask with each shape of equal area at the centroid: {shape: mean over frames}."""
    dx, dy = offsets(centre, *mask.shape[1:])
    radius = (mask.sum((1, 2)) / math.pi).sqrt()[:, None, None]
    ious = {}
    for shape in SHAPES:
        ideal = shape_distance(shape, dx, dy, radius) < 0
        ious[shape] = float(((ideal & mask).sum((1, 2)) / (ideal | mask).sum((1, 2))).mean())
    return ious


def compare_textures(white, mask, centre, scale):
    """How well the pattern `white` (T, H, W) in the object fits each texture: {texture: mean over frames}.

    Correlation with the ideal pattern, at the best place within +-1 px of the centroid, over the object less
    its 2 px rim. For "plain": 1 - 2 * standard deviation, thus 1 for no pattern and about 0 for a full one.
    """
    inner = erode(mask, max(1, round(2 * scale)))
    steps = torch.linspace(-1, 1, 5)
    shift_x, shift_y = (s.reshape(-1, 1) for s in torch.meshgrid(steps, steps, indexing="ij"))
    scores = {texture: 0.0 for texture in TEXTURES}
    for where, pattern, dx, dy in zip(inner, white, *offsets(centre, *mask.shape[1:])):
        if where.sum() < 20:
            continue  # nothing to see in this frame: counts as 0
        pattern = pattern[where]
        deviation = pattern.std(correction=0)
        scores["plain"] += float(1 - 2 * deviation) / len(mask)
        x, y = dx[where] / scale + shift_x, dy[where] / scale + shift_y
        for texture in TEXTURES[1:]:
            ideal = whiteness(texture, x, y, 1 / scale)
            covariance = ((ideal - ideal.mean(1, keepdim=True)) * (pattern - pattern.mean())).mean(1)
            correlation = covariance / (ideal.std(1, correction=0) * deviation + 1e-3)
            scores[texture] += float(correlation.max()) / len(mask)
    return scores


def shift(frames, by):
    """Shift frames (C, T, H, W) round the torus by (T, 2) = x, y pixels, in Fourier space.

    Smooths by (1, 2, 1) / 4 both ways, as what the pixel grid does to an edge moves in no simple way.
    """
    height, width = frames.shape[2:]
    spectrum = torch.fft.rfft2(frames)
    for frequency, way in ((torch.fft.rfftfreq(width), by[:, 0, None, None]),
                           (torch.fft.fftfreq(height)[:, None], by[:, 1, None, None])):
        spectrum *= torch.cos(math.pi * frequency) ** 2 * torch.exp(-2j * math.pi * frequency * way)
    return torch.fft.irfft2(spectrum, s=(height, width))


def flicker(rgb, mask, path):
    """Mean |difference| (0..255 levels) of consecutive frames in the object, its motion taken out."""
    if len(path) < 2:
        return 0.0
    half = path.diff(dim=0) / 2  # both frames meet half way, so that both are treated alike
    change = (shift(rgb[:, :-1], half) - shift(rgb[:, 1:], -half)).abs().mean(0)
    return float(change[mask[:-1] | mask[1:]].mean() * 255)


def sharpness(rgb, mask):
    """Typical steepness of the object's edges: sum |gradient|^2 / sum |gradient|, in levels per pixel."""
    dx, dy = (rgb.roll(-1, axis) - rgb for axis in (3, 2))
    steep = length(torch.cat([dx, dy]))[mask]
    return float(steep.square().sum() / steep.sum().clamp(min=1e-6) * 255)


def measure(video, looks=12):
    """What the clips (B, 3, T, H, W) in [-1, 1] show, from the pixels alone: one dict per clip.

    background, colour, shape, texture, motion: words of the caption, or None
    object: share of the pixels; 0 when there is no object, and then all words are None and all scores 0
    shape_iou: overlap (IoU) of the object with the best shape of equal area at its centroid
    texture_scores: how well each texture fits, see compare_textures; texture_correlation: the best one
    path: mean distance from frame to frame, net: displacement (x, y), extent: (x, y) range, all in px
    flicker, sharpness: see there. Shape, texture and sharpness come from `looks` evenly spaced frames.
    """
    return [measure_clip(clip, looks) for clip in video.detach().float().cpu()]


def measure_clip(clip, looks):
    """The dict of `measure` for one clip (3, T, H, W)."""
    rgb = ((clip + 1) / 2).clamp(0, 1)
    height, width = rgb.shape[2:]
    scale = min(height, width) / WORLD
    background, colour, mask = find_object(rgb)
    seen = mask.float().mean((1, 2)) > 0.01  # frames without an object are left out
    if not seen.any():
        return {**dict.fromkeys(("background", "colour", "shape", "texture", "motion")), "object": 0.0,
                "shape_iou": 0.0, "texture_scores": dict.fromkeys(TEXTURES, 0.0), "texture_correlation": 0.0,
                "path": 0.0, "net": (0.0, 0.0), "extent": (0.0, 0.0), "flicker": 0.0, "sharpness": 0.0}
    share, rgb, mask = float(mask.float().mean()), rgb[:, seen], mask[seen]
    path = unwrap(centroids(mask), height, width)
    some = torch.linspace(0, len(path) - 1, min(looks, len(path))).round().long()
    shapes = compare_shapes(mask[some], path[some])
    white = on_line(rgb[:, some], torch.tensor(COLOURS[colour]) / 255)[0]
    textures = compare_textures(white, mask[some], path[some], scale)
    shape, texture = max(shapes, key=shapes.get), max(textures, key=textures.get)
    steps = path.diff(dim=0).norm(dim=1)
    return {"background": background, "colour": colour, "shape": shape, "texture": texture,
            "motion": classify_motion(path / scale), "object": share, "shape_iou": shapes[shape],
            "texture_scores": textures, "texture_correlation": textures[texture],
            "path": float(steps.mean()) if len(steps) else 0.0, "net": tuple((path[-1] - path[0]).tolist()),
            "extent": tuple((path.amax(0) - path.amin(0)).tolist()),
            "flicker": flicker(rgb, mask, path), "sharpness": sharpness(rgb[:, some], mask[some])}


def scores(video, captions, looks=12):
    """Of each clip what `scorecard` is the mean of: one dict of numbers per clip. looks: see `measure`."""
    rows = []
    for seen, caption in zip(measure(video, looks), captions, strict=True):
        words = parse(caption)
        row = {name: float(seen[name] == word) for name, word in words.items()}
        row["all"] = min(row.values())
        row["texture_correlation"] = seen["texture_scores"][words["texture"]]
        row |= {name: seen[name] for name in ("shape_iou", "path", "flicker", "sharpness", "object")}
        rows.append(row | {"net": math.hypot(*seen["net"]), "extent": max(seen["extent"])})
    return rows


def scorecard(video, captions):
    """Means over the clips: the shares that show what their caption says ('all': in every respect), the
    correlation with the caption's texture, the length of net, the longer side of extent, and the others
    of `measure` as they are."""
    rows = scores(video, captions)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def texture_fit(frames, captions):
    """Images (N, 3, 64, 64), captions -> each one's correlation with the texture of its caption, as in `scorecard`."""
    return [row["texture_correlation"] for row in scores(frames.unsqueeze(2), captions)]


# ----------------------------------------------------------------------------------------- training parts

class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al., 2024); convolution kernels count as matrices.

    The update is scaled by 0.2 sqrt(max(rows, columns)), so that it has the size of an AdamW update.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                average = self.state[p].setdefault("momentum", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                p.grad.lerp_(average, group["momentum"])  # Nesterov
            for size in dict.fromkeys(p.shape for p in params):  # all matrices of a size together
                same = [p for p in params if p.shape == size]
                x = torch.stack([p.grad.flatten(1) for p in same])
                long, tall = max(x.shape[1:]), x.shape[1] > x.shape[2]
                x = x.mT if tall else x
                x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
                for _ in range(5):  # Newton-Schulz: pushes all singular values towards 1
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = (x.mT if tall else x).float()
                for p, update in zip(same, x):
                    p.add_(update.view(size), alpha=-group["lr"] * 0.2 * long ** 0.5)


def fit(name, folder, model, loss_of, steps, lr, warmup=100, ema=None, matrices=None, every=250):
    """Minimise loss_of(step, generator) over `steps` steps; a killed run goes on where it was last saved.

    Muon on the weights for which matrices(name, p) holds (default: none) and AdamW on the rest, both with
    warm-up and cosine decay. Everything random comes from generators seeded by the step, so that a resumed run
    equals an uninterrupted one.
    """
    path = folder / f"{name}.pt"
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    big = [p for n, p in named if matrices and matrices(n, p)]
    small = [p for n, p in named if not (matrices and matrices(n, p))]
    optimizers = [torch.optim.AdamW(small, lr=lr, betas=(0.9, 0.98), weight_decay=0)]
    if big:
        optimizers.append(Muon(big, lr=lr))
    average = {n: p.detach().clone() for n, p in named} if ema else {}
    start = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        start, average = saved["step"], saved["ema"]
    bar, began = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10), time.time()
    for step in bar:
        scale = min(1, (step + 1) / warmup) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
        torch.manual_seed(step)  # for dropout
        loss = loss_of(step, torch.Generator().manual_seed(step))
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if ema:
            with torch.no_grad():
                decay = min(ema, (step + 1) / (step + 10))
                torch._foreach_lerp_(list(average.values()), [p for _, p in named], 1 - decay)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % every == 0 or step + 1 == steps:
            content = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                       "ema": average, "step": step + 1}
            replace_file(path, lambda temporary: torch.save(content, temporary))
            print(f"{name} step {step + 1} loss {loss.item():.4f} {time.time() - began:.0f} s", flush=True)
    if ema:
        model.load_state_dict({**model.state_dict(), **average})
    return model


def to_bytes(images):
    """Pixels in [-1, 1] as uint8, of any shape."""
    return ((images + 1) * 127.5).round().to(torch.uint8)


def library(captions, clips, frames, seed):
    """`clips` clips of random captions as uint8 (N, 3, T, 64, 64), their centroids and captions."""
    random = torch.Generator().manual_seed(seed)
    chosen = [captions[i] for i in torch.randint(len(captions), (clips,), generator=random)]
    parts = [render(chosen[i:i + 50], frames, generator=random, return_state=True) for i in range(0, clips, 50)]
    video = torch.cat([to_bytes(v) for v, _ in parts])
    return video, torch.cat([s["centre"] for _, s in parts]), chosen


# ------------------------------------------------------------------------------------------- the parts: VAE

VAE_CONFIG = dict(dim=16, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temporal_downsample=[False, True, True])


def train_vae(folder, steps):
    """Wan 2.1's VAE at base width 16, on crops round the object first, whole clips last."""
    torch.manual_seed(1)
    vae = WanVAE(**VAE_CONFIG, latent_mean=[0.] * 16, latent_std=[1.] * 16)
    for name, module in vae.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            # variance-preserving, since the default shrinks the signal through 15 convolutions without a skip
            gain = 0.3 if name.endswith("residual.6") else 1
            torch.nn.init.normal_(module.weight, std=gain * module.weight[0].numel() ** -0.5)
            torch.nn.init.zeros_(module.bias)
            layout = torch.channels_last if module.weight.ndim == 4 else torch.channels_last_3d
            module.weight.data = module.weight.data.contiguous(memory_format=layout)  # faster on CPU
    vae.conv1.bias.data[16:] = -6  # starts almost without posterior noise
    video, centre, captions = library(split()[0], 500, 57, seed=1)
    background = torch.tensor([BACKGROUNDS[parse(c)["background"]] for c in captions]).view(-1, 3, 1, 1, 1)
    # until which share of the run: (frames, clips) in turn, crop. At least 2 clips: one alone is slow on CPU. The
    # last part is as long as the clips to come, since the convolutions remember more than 17 frames.
    schedule = [(0.17, [(1, 20)], 32), (0.3, [(1, 20), (5, 5), (9, 3)], 32), (0.7, [(5, 4), (9, 3), (17, 2)], 40),
                (0.88, [(5, 3), (9, 2), (17, 2)], 64), (1.0, [(57, 2), (33, 3), (57, 2), (25, 4)], 40)]

    def loss_of(step, random):
        progress = step / steps
        _, sizes, crop = next(s for s in schedule if progress < s[0])
        frames, batch = sizes[step % len(sizes)]
        crops, weights = [], []
        for i in torch.randint(len(video), (batch,), generator=random).tolist():
            t = torch.randint(57 - frames + 1, (1,), generator=random).item()
            middle = centre[i, t + frames // 2] + (torch.rand(2, generator=random) - 0.5) * 24
            x, y = (int(min(max(m - crop / 2, 0), 64 - crop)) for m in middle)
            clip = video[i, :, t:t + frames, y:y + crop, x:x + crop]
            crops.append(clip / 127.5 - 1)
            weights.append(1 + 3 * ((clip - background[i]).abs().amax(0, keepdim=True) > 12).float())
        x, weight = torch.stack(crops).contiguous(memory_format=torch.channels_last_3d), torch.stack(weights)
        mu, log_var = vae.conv1(vae.encoder(x)).chunk(2, dim=1)
        log_var = log_var.clamp(-20, 4)
        noise = torch.randn(mu.shape, generator=random)
        out = vae.decoder(vae.conv2(mu + (0.5 * log_var).exp() * noise))
        kl = 0.5 * (mu.square() + log_var.exp() - 1 - log_var).mean()
        square = (weight * (out - x).square()).mean()
        if progress < 0.4:
            return 2 * square + 1e-4 * kl
        error = out - x
        gradient = sum((weight.narrow(d, 1, weight.shape[d] - 1) * error.diff(dim=d).abs()).mean() for d in (3, 4))
        return square + (weight * error.abs()).mean() + 0.3 * gradient + 1e-4 * kl

    fit("vae", folder, vae, loss_of, steps, lr=3e-3, matrices=is_kernel)
    return vae


def is_kernel(name, p):
    """Convolution weights that mix channels."""
    return p.ndim >= 4 and min(p.shape[0], p[0].numel()) > 1


def encode_library(folder, vae, clips, part, circles):
    """Latents (N, 16, 15, 8, 8) of training clips, before normalisation, and their captions; kept on disk in parts.

    From clip number `circles` on, half of them move in circles, which takes the most examples to learn.
    """
    latents, captions = [], []
    everything = split()[0]
    circling = 5 * [c for c in everything if parse(c)["motion"] == "moving in circles"]
    for k in range(0, clips, part):
        path = folder / f"latents{k}.pt"
        if not path.exists():
            mixture = everything + (circling if k >= circles else [])
            video, _, chosen = library(mixture, min(part, clips - k), 57, seed=2 + k)
            with torch.no_grad():
                z = torch.cat([vae.encode(video[i:i + 16] / 127.5 - 1)
                               for i in tqdm(range(0, len(video), 16), desc="latents", mininterval=10)])
            replace_file(path, lambda temporary: torch.save({"latents": z, "captions": chosen}, temporary))
        saved = torch.load(path, weights_only=True)
        latents.append(saved["latents"])
        captions += saved["captions"]
    return torch.cat(latents), captions


# ------------------------------------------------------------------------------------------ the parts: text

def words():
    """The vocabulary: every word of the captions, in the order of their first use."""
    return list(dict.fromkeys(word for caption in all_captions() for word in caption.split()))


def make_tokenizer():
    """A word-level tokenizer with UMT5's special tokens: <pad> 0, </s> 1, <unk> 2."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                                   unk_token="<unk>", model_max_length=CONFIGS["tiny"].text_len)


ATTRIBUTES = {"colour": list(COLOURS), "texture": list(TEXTURES), "shape": list(SHAPES), "motion": list(MOTIONS),
              "background": list(BACKGROUNDS)}


def train_text(folder, steps):
    """A two-layer UMT5 encoder: from the output at every token, linear probes must tell all the caption says."""
    from transformers import UMT5Config, UMT5EncoderModel
    torch.manual_seed(2)
    tokenizer, text_dim = make_tokenizer(), CONFIGS["tiny"].text_dim
    encoder = UMT5EncoderModel(UMT5Config(
        vocab_size=len(tokenizer), d_model=text_dim, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, tie_word_embeddings=True))
    probes = torch.nn.ModuleDict({a: torch.nn.Linear(text_dim, len(v)) for a, v in ATTRIBUTES.items()})
    captions, held_out = split()

    def probe(texts, labels):
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        out = encoder(**tokens).last_hidden_state[tokens.attention_mask.bool()]  # (tokens of all texts, C)
        count = tokens.attention_mask.sum(1)
        return {a: (probes[a](out), torch.tensor([labels_of[a] for labels_of in labels]).repeat_interleave(count))
                for a in ATTRIBUTES}

    def labels_of(caption):
        return {a: ATTRIBUTES[a].index(word) for a, word in parse(caption).items()}

    def loss_of(step, random):
        texts, labels = [], []
        for i in torch.randint(len(captions), (64,), generator=random).tolist():
            text, label = captions[i], labels_of(captions[i])
            for a, word in parse(text).items():  # leave something out now and then; it need not be told then
                if torch.rand(1, generator=random) < 0.1:
                    text, label[a] = text.replace(word + (" background" if a == "background" else ""), ""), -100
            texts.append(text)
            labels.append(label)
        return sum(torch.nn.functional.cross_entropy(*pair) for pair in probe(texts, labels).values())

    fit("text", folder, torch.nn.ModuleDict({"encoder": encoder, "probes": probes}), loss_of, steps, lr=3e-3)
    with torch.no_grad():
        right = {a: (logits.argmax(-1) == label).float().mean().item()
                 for a, (logits, label) in probe(held_out, [labels_of(c) for c in held_out]).items()}
    return encoder.eval().requires_grad_(False), tokenizer, right


# --------------------------------------------------------------------------------------- the parts: teacher

def init_weights(model):
    """A new DiT's weights as Wan draws them; the head starts at zero."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            if name.startswith(("text_embedding", "time_embedding")):
                torch.nn.init.normal_(module.weight, std=0.02)
            else:
                torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
    torch.nn.init.xavier_uniform_(model.patch_embedding.weight.flatten(1))
    torch.nn.init.zeros_(model.head.head.weight)
    return model


def train_teacher(name, folder, latents, captions, text, steps, start=None, short=0.0):
    """A bidirectional Wan by flow matching on normalised latents (N, 16, 15, 8, 8), from the weights of `start`.

    In bfloat16. Noise is drawn at the sampler's timestep shift: a clip's motion and the place of its texture are
    decided at high noise. The first share `short` of the steps sees short clips.
    """
    torch.manual_seed(3)
    model = init_weights(WanModel(CONFIGS["tiny"]))
    if start is not None:
        model.load_state_dict(start.state_dict())
    model.autocast = torch.bfloat16
    if steps > 100:  # else compiling would take longer than training
        for block in model.blocks:
            block.compile(dynamic=False)
    index = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    contexts, empty = torch.cat([text([c]) for c in index]), text([""])
    caption_of = torch.tensor([index[c] for c in captions])

    def loss_of(step, random):
        frames, batch = (7, 24) if step < short * steps else (latents.shape[2], 12)
        i = torch.randint(len(latents), (batch,), generator=random)
        x0, context = latents[i, :, :frames], contexts[caption_of[i]]
        dropped = torch.rand(batch, 1, 1, generator=random) < 0.1
        context = torch.where(dropped, empty, context)
        if step % 20 == 0:  # zero rows up to Wan's 512, so that the padded length does not matter
            context = torch.nn.functional.pad(context, (0, 0, 0, 512 - context.shape[1]))
        u = (torch.arange(batch) + torch.rand(batch, generator=random)) / batch  # stratified
        t = 1000 * shift_sigma(u, DEFAULTS["shift"])
        eps = torch.randn(x0.shape, generator=random)
        return (model(add_noise(x0, eps, t), t, context) - (eps - x0)).square().mean()

    fit(name, folder, model, loss_of, steps, lr=1.5e-3, warmup=200, ema=0.999,
        matrices=lambda n, p: n.startswith("blocks") and p.ndim == 2)
    model.backend, model.autocast = "auto", None
    return model


# ---------------------------------------------------------------------------------------- the parts: reward

REWARD_CONFIG = dict(image_size=64, patch_size=8, vision_dim=64, vision_layers=4, vision_heads=4, text_dim=64,
                     text_layers=2, text_heads=4, text_ffn=128, vocab_size=64)


def degrade(images, kind, strength, random):
    """Spoil images (B, 3, H, W) in [-1, 1]; strength (B,) in [0, 1], 0 leaves them as they are."""
    B, _, H, W = images.shape
    s = strength.view(B, 1, 1, 1)
    if kind == "blur":
        x = torch.arange(-6, 7.0)
        kernel = torch.exp(-0.5 * (x / (0.05 + 2.5 * strength[:, None])) ** 2)
        kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)  # one per image and channel
        out = torch.nn.functional.pad(images.reshape(1, B * 3, H, W), (6, 6, 6, 6), mode="replicate")
        out = torch.nn.functional.conv2d(out, kernel.view(B * 3, 1, 1, 13), groups=B * 3)
        return torch.nn.functional.conv2d(out, kernel.view(B * 3, 1, 13, 1), groups=B * 3).view_as(images)
    if kind == "noise":
        return images + 0.4 * s * torch.randn(images.shape, generator=random)
    # 'smear': the mean of copies along a line; 'warp': a smooth random displacement of texture and outline
    grid = torch.stack(torch.meshgrid(torch.linspace(-1, 1, W), torch.linspace(-1, 1, H), indexing="xy"), -1)
    if kind == "warp":
        bumps = torch.randn(B, 2, 7, 7, generator=random) * s * 5 / W
        field = torch.nn.functional.interpolate(bumps, (H, W), mode="bicubic", align_corners=True)
        return torch.nn.functional.grid_sample(images, grid + field.permute(0, 2, 3, 1), padding_mode="border",
                                               align_corners=True)
    angle = 2 * math.pi * torch.rand(B, generator=random)
    line = torch.stack([angle.cos(), angle.sin()], -1).view(B, 1, 1, 2) * s.view(B, 1, 1, 1) * 16 / W
    return sum(torch.nn.functional.grid_sample(images, grid + a * line, padding_mode="border", align_corners=True)
               for a in (-0.5, -0.25, 0, 0.25, 0.5)) / 5


def preference_pairs(captions, count, random):
    """`count` pairs: (better images, their captions, worse images, their captions, which kind of pair).

    'sharp': the same picture less and more spoiled; 'true': one picture with its caption and with one that errs in
    colour, texture, shape or background.
    """
    chosen = [captions[i] for i in torch.randint(len(captions), (count,), generator=random)]
    better = render(chosen, 1, generator=random)[:, :, 0]
    kind = ("blur", "warp", "smear", "noise")[torch.randint(4, (1,), generator=random)]
    sharp = torch.arange(count) < count // 2
    low = torch.rand(count, generator=random) * 0.6 * (torch.rand(count, generator=random) < 0.6)
    high = torch.where(sharp, low + 0.15 + (0.85 - low) * torch.rand(count, generator=random), low)
    state = random.get_state()
    worse, worse_captions = degrade(better, kind, high, random), list(chosen)
    random.set_state(state)  # the same noise and the same displacement, only less of it
    better = degrade(better, kind, low, random)
    for i in range(count // 2, count):
        name = ("colour", "texture", "shape", "background")[torch.randint(4, (1,), generator=random)]
        word = parse(chosen[i])[name]
        others = [w for w in ATTRIBUTES[name] if w != word]
        worse_captions[i] = chosen[i].replace(word, others[torch.randint(len(others), (1,), generator=random)])
    return better, chosen, worse, worse_captions, sharp


def quality(frames, caption):
    """How good frames (F, 3, 64, 64) are as pictures of a caption (F,): the fit of its texture plus the overlap with
    its shape, and -1 for a wrong colour or background."""
    words, scores = parse(caption), []
    for seen in measure(frames.unsqueeze(2)):
        right = seen["colour"] == words["colour"] and seen["background"] == words["background"]
        overlap = seen["shape_iou"] if seen["shape"] == words["shape"] else 0
        scores.append(max(0, seen["texture_scores"][words["texture"]]) + overlap if right else -1)
    return torch.tensor(scores)


def candidates(out, captions, steps=(4, 8), frames=9):
    """Frames of the teacher in `out` at few steps, 18 of each caption: uint8 (N, 18, 3, 64, 64), quality (N, 18)."""
    model, vae, text = load_dit(out).eval(), load_vae(out), load_text_encoder(out)
    shown = torch.cat([sample_teacher(model, vae, text, captions, n, seed=100_000 * n, frames=frames)[:, :, ::4]
                       for n in steps], dim=2).transpose(1, 2)
    scores = torch.stack([quality(f, caption) for f, caption in zip(shown, captions)])
    return to_bytes(shown), scores


def generated_pairs(frames, scores, captions, count, random, margin=0.2):
    """Pairs of `candidates` of one caption, their quality apart by more than `margin`: (better images, worse images,
    captions). Each picture is moved round the torus at random, or the model would know it by its place."""
    pairs = (scores[:, :, None] - scores[:, None] > margin).nonzero()  # (all pairs, 3): caption, better, worse
    chosen = pairs[(torch.rand(count if len(pairs) else 0, generator=random) * len(pairs)).long()]

    def pick(which):
        images = frames[chosen[:, 0], chosen[:, which]] / 127.5 - 1
        for image, by in zip(images, torch.randint(64, (len(images), 2), generator=random).tolist()):
            image.copy_(image.roll(by, (1, 2)))
        return images
    return pick(1), pick(2), [captions[i] for i in chosen[:, 0].tolist()]


def score_seen(model, seen, prompts):
    """The reward (B,) of images that its image encoder has seen (B, 1 + patches, C), which the probes look at too."""
    words = model.tokenizer(prompts, padding="max_length", truncation=True, max_length=model.text_len,
                            return_tensors="pt")
    words = model.text(input_ids=words.input_ids, attention_mask=words.attention_mask, encoder_hidden_states=seen,
                       is_decoder=False).last_hidden_state
    return (model.mlp(words[:, 0]).squeeze(-1) - model.mean) / model.std


def train_reward(folder, out, steps, count):
    """A small ImageReward on preference pairs, half of them of frames that the teacher in `out` made of `count`
    captions: (model, share of held-out pairs in the right order by kind)."""
    from transformers import BertTokenizer
    torch.manual_seed(4)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words()]) + "\n")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    model = ImageReward(tokenizer, mean=0.0, std=1.0, **REWARD_CONFIG)
    for module in model.modules():  # larger than BERT's 0.02, which is meant for wider layers
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features ** -0.5)
    names = ("colour", "texture", "shape", "background")
    probes = torch.nn.ModuleDict({a: torch.nn.Linear(REWARD_CONFIG["vision_dim"], len(ATTRIBUTES[a])) for a in names})
    captions, held_out = split()
    chosen, unseen = random_captions(captions, count), random_captions(held_out, max(2, count // 8))
    made = folder / "candidates.pt"
    if not made.exists():
        content = [candidates(out, chosen), candidates(out, unseen)]
        replace_file(made, lambda temporary: torch.save(content, temporary))
    (frames, scores), (unseen_frames, unseen_scores) = torch.load(made, weights_only=True)

    def loss_of(step, random):
        better, good, worse, bad, _ = preference_pairs(captions, 16, random)
        chosen_better, chosen_worse, same = generated_pairs(frames, scores, chosen, 16, random)
        images = clip_preprocess(torch.cat([better, chosen_better, worse, chosen_worse]), model.image_size)
        seen = model.vision(images).last_hidden_state
        high, low = score_seen(model, seen, good + same + bad + same).chunk(2)
        loss = -torch.nn.functional.logsigmoid(high - low).mean() + 1e-3 * (high.square() + low.square()).mean() / 2
        for a in names:  # the image encoder must tell what it sees; without this the pairs teach it nothing for long
            label = torch.tensor([ATTRIBUTES[a].index(parse(c)[a]) for c in good])
            loss = loss + 0.25 * torch.nn.functional.cross_entropy(probes[a](seen[:16].mean(1)), label)
        return loss

    fit("reward", folder, torch.nn.ModuleDict({"model": model, "probes": probes}).train(), loss_of, steps, lr=2e-3,
        matrices=lambda n, p: ".layer" in n and p.ndim == 2)
    model.eval()
    random, right, rewards = torch.Generator().manual_seed(5), {"sharp": [], "true": [], "generated": []}, []
    with torch.no_grad():
        for _ in range(32):
            better, good, worse, bad, sharp = preference_pairs(held_out, 64, random)
            a, b = model.score(better, good), model.score(worse, bad)
            right["sharp"] += (a > b)[sharp].tolist()
            right["true"] += (a > b)[~sharp].tolist()
            rewards += a.tolist() + b.tolist()
            better, worse, same = generated_pairs(unseen_frames, unseen_scores, unseen, 64, random)
            right["generated"] += (model.score(better, same) > model.score(worse, same)).tolist() if same else []
    model.mean, model.std = torch.tensor(rewards).mean().item(), torch.tensor(rewards).std().item()
    return model, {kind: sum(r) / max(1, len(r)) for kind, r in right.items()}


def random_captions(captions, count, seed=12):
    """`count` of the captions, each once."""
    return [captions[i] for i in permutation(len(captions), seed)[:count]]


# ------------------------------------------------------------------------------- assembling and evaluating

def save_half(state, folder, name="diffusion_pytorch_model.safetensors", metadata=None):
    """Tensors as a float16 safetensors file, whole or not at all."""
    from safetensors.torch import save_file
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().half().contiguous() for key, value in state.items()}
    replace_file(folder / name,
                 lambda temporary: save_file(state, temporary, metadata=metadata or {"format": "pt"}))


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def export(out, vae, mean, std, encoder, tokenizer, teacher):
    """Write the parts as a diffusers WanPipeline folder, with defaults.json and lists of captions beside them."""
    c = CONFIGS["tiny"]
    write_json(out / "vae/config.json", {
        "_class_name": "AutoencoderKLWan", "base_dim": VAE_CONFIG["dim"], "z_dim": 16,
        "dim_mult": VAE_CONFIG["dim_mult"], "num_res_blocks": 1, "attn_scales": [],
        "temperal_downsample": VAE_CONFIG["temporal_downsample"], "dropout": 0.0,
        "latents_mean": [round(x, 4) for x in mean], "latents_std": [round(x, 4) for x in std]})
    save_half({vae_diffusers_key(k, 1): v for k, v in vae.state_dict().items()}, out / "vae")
    write_json(out / "transformer/config.json", {
        "_class_name": "WanTransformer3DModel", "patch_size": list(c.patch_size), "num_attention_heads": c.num_heads,
        "attention_head_dim": c.dim // c.num_heads, "in_channels": c.in_dim, "out_channels": c.out_dim,
        "text_dim": c.text_dim, "freq_dim": c.freq_dim, "ffn_dim": c.ffn_dim, "num_layers": c.num_layers,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": c.eps, "rope_max_seq_len": MAX_POSITION})
    save_half({dit_diffusers_key(k): v for k, v in teacher.state_dict().items()}, out / "transformer")
    encoder.half().save_pretrained(out / "text_encoder")
    encoder.float()
    tokenizer.save_pretrained(out / "tokenizer")
    write_json(out / "scheduler/scheduler_config.json", {
        "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
        "flow_shift": DEFAULTS["shift"], "num_train_timesteps": 1000, "solver_order": 2})
    write_json(out / "model_index.json", {
        "_class_name": "WanPipeline", "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"], "vae": ["diffusers", "AutoencoderKLWan"]})
    write_json(out / "defaults.json",  # without a generator yet, the teacher is what generate.py samples
               {k: v for k, v in DEFAULTS.items() if k != "checkpoint" or (out / v).exists()})
    captions, held_out = split()
    for name, lines in (("prompts.txt", captions), ("held_out.txt", held_out), ("held_out_few.txt", held_out[3::50])):
        (out / name).write_text("\n".join(lines) + "\n")


def export_reward(out, reward):
    """Write the reward model, with its tokenizer, to <out>/reward_model."""
    sizes = {**REWARD_CONFIG, "mean": reward.mean, "std": reward.std}
    save_half({ImageReward.published_key(k): v for k, v in reward.state_dict().items()}, out / "reward_model",
              "ImageReward.safetensors", {"config": json.dumps(sizes)})
    reward.tokenizer.save_pretrained(out / "reward_model/tokenizer")


# How generate.py samples the tiny model (the teacher saw its training noise at the same shift), and what each stage's
# flags are for it instead of the paper's values.
DEFAULTS = {
    "height": 64, "width": 64, "frames": 57, "fps": 16, "shift": 5.0, "guidance": 2.0, "negative": "",
    "checkpoint": "reward_forced.safetensors", "prompts": "prompts.txt", "held_out": "held_out_few.txt",
    "reward_model": "reward_model", "checkpointing": False, "accum": 1, "batch": 8, "ema_start": 0,
    "distill_dmd bidirectional": {"batch": 4, "steps": 300, "lr": 2e-4, "critic_lr": 2e-4, "ratio": 2, "ema": 0.98,
                                  "sample_every": 100},
    "distill_dmd causal": {"batch": 4, "steps": 200, "lr": 1e-4, "critic_lr": 1e-4, "ratio": 2, "ema": 0.98,
                           "init": "ode.safetensors"},
    "ode_init sample": {"count": 200, "steps": 24, "batch": 8},
    "ode_init train": {"steps": 300, "lr": 3e-4, "ema": 0.98, "sample_every": 200},
    "reward_forcing": {"batch": 4, "steps": 200, "lr": 5e-5, "ema": 0.98,
                       "init": "ode.safetensors"},
    "cm_grpo": {"init": "raven_frame.safetensors", "frames": 5, "steps": 45, "lr": 2e-4, "ema": 0.9,
                "batch": 32, "group": 16, "prompts_per_step": 4, "lora_rank": 16, "lora_alpha": 16,
                "rewards": ["imagereward=1", "motion=0.35", "smoothness=0.75"]},
}


def reconstruct(vae, captions, seed=7):
    """VAE on held-out clips: PSNR in dB, and the scorecard of the reconstructions."""
    clips = render(captions, 57, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        out = torch.cat([vae.decode(vae.encode(clips[i:i + 4])) for i in range(0, len(clips), 4)])
    psnr = -10 * torch.log10(((out - clips) / 2).square().mean((1, 2, 3, 4))).mean().item()
    return {"psnr": psnr, **scorecard(out, captions)}


def sample_clips(captions, vae, solve, seed, batch=20, frames=15):
    """Videos (N, 3, T, 64, 64) of the captions; sample i's noise has seed + i. solve(noise, captions, generators) ->
    clean latents (B, 16, F, 8, 8)."""
    videos = []
    for i in tqdm(range(0, len(captions), batch), desc="samples", mininterval=10):
        some = captions[i:i + batch]
        generators = [torch.Generator().manual_seed(seed + i + j) for j in range(len(some))]
        with torch.no_grad():
            x = solve(gaussian((len(some), 16, frames, 8, 8), generators, "cpu"), some, generators)
            videos.append(torch.cat([vae.decode(x[j:j + 4]) for j in range(0, len(x), 4)]))
    return torch.cat(videos)


def sample_teacher(model, vae, text, captions, steps=50, seed=0, frames=15):
    """Bidirectional samples of the captions: the ODE, with guidance."""
    def solve(noise, some, generators):
        *_, x = ode_trajectory(model, noise, text(some), text([""] * len(some)),
                               sigma_schedule(steps, DEFAULTS["shift"]), DEFAULTS["guidance"])
        return x
    return sample_clips(captions, vae, solve, seed, frames=frames)


def sample_student(model, metadata, vae, text, captions, seed=0, frames=15):
    """Few-step samples of the captions as a checkpoint's metadata asks for them: whole, or chunk by chunk, of `frames`
    latent frames with a window of 15."""
    def solve(noise, some, generators):
        chunks = chunk_sizes(noise.shape[2], int(metadata.get("chunk", noise.shape[2])))
        parts = rollout(model, noise, text(some), saved_steps(metadata), chunks, window=15, generator=generators)
        return torch.cat([part.x0 for part in parts], dim=2)
    return sample_clips(captions, vae, solve, seed, frames=frames)


def frame_rewards(reward, video, captions):
    """Rewards (N, F) of the last video frame of each latent frame of video (N, 3, 4 F - 3, H, W)."""
    with torch.no_grad():
        return torch.stack([reward.score(frame, captions) for frame in video[:, :, ::4].unbind(2)], dim=1)


def sampler(out, name):
    """A generator, a file or 'teacher' for the model itself, as a function (captions, seed=0, frames=15) -> videos
    (N, 3, 4 frames - 3, 64, 64)."""
    model, vae, text = load_dit(out).eval(), load_vae(out), load_text_encoder(out)
    if name == "teacher":
        return lambda captions, seed=0, frames=15: sample_teacher(model, vae, text, captions, 50, seed, frames)
    metadata = load_checkpoint(model, name)
    return lambda captions, seed=0, frames=15: sample_student(model, metadata, vae, text, captions, seed, frames)


COMPARED = ("reward_last", "reward", "colour", "shape", "texture", "texture_correlation", "motion", "path", "flicker")
OVER_TIME = ("reward", "texture_correlation", "path", "flicker")


def compare(out, generators, results, count=200, seed=0):
    """What generators show of held-out captions, to <results>/measured/<label>.safetensors: each of COMPARED as
    (count,), a number for each sample.

    Sample i has the caption i of the held-out ones, from the first again when they are through, and the noise of
    seed + i: the same for every generator, so differences can be taken sample by sample.
    """
    captions, reward = list(itertools.islice(itertools.cycle(split()[1]), count)), load_image_reward(out / "reward_model")
    for name in generators:
        show, rows = sampler(out, name), []
        for first in range(0, count, 100):  # so many videos at a time
            some = captions[first:first + 100]
            video = show(some, seed + first)
            rewards = frame_rewards(reward, video, some)
            rows += [{**row, "reward": r.mean().item(), "reward_last": r[-1].item()}
                     for row, r in zip(scores(video, some), rewards)]
        keep_measured(results, label(name), {key: torch.tensor([row[key] for row in rows]) for key in COMPARED})
        print(label(name), *(f"{key} {sum(row[key] for row in rows) / count:.3f}" for key in COMPARED), flush=True)


def over_time(out, generators, results, count=24, frames=90, seed=0):
    """Measurements by latent frame of rollouts of so many of them (the teacher's: of 15), the window 15: to
    <results>/measured/<label>.long.safetensors, of each of OVER_TIME the mean over the captions, `time_<name>`
    (frames - 1,), and for each caption the mean over the second half of the rollout, `late_<name>` (count,).

    The first latent frame, a single picture, is left out. Of a latent frame its four video frames and the one before
    them are measured, as a clip of their own.
    """
    captions, reward = split()[1][::200 // count][:count], load_image_reward(out / "reward_model")
    for name in generators:
        length = 15 if name == "teacher" else frames
        video = sampler(out, name)(captions, seed, length)
        curves = {"reward": frame_rewards(reward, video, captions)[:, 1:]}  # (N, F - 1)
        pieces = [clip.unfold(1, 5, 4).permute(1, 0, 4, 2, 3) for clip in video]  # (F - 1, 3, 5, 64, 64) each
        rows = [scores(piece, [caption] * len(piece), looks=2) for piece, caption in zip(pieces, captions)]
        for key in OVER_TIME[1:]:
            curves[key] = torch.tensor([[row[key] for row in of_clip] for of_clip in rows])
        late = {key: curve[:, length // 2 - 1:].mean(1) for key, curve in curves.items()}
        keep_measured(results, f"{label(name)}.long",
                      {f"time_{key}": curve.mean(0) for key, curve in curves.items()} |
                      {f"late_{key}": value for key, value in late.items()})
        print(label(name), *(f"{key} {curve[:, :14].mean():.3f} and late {late[key].mean():.3f}"
                             for key, curve in curves.items()), flush=True)


def keep_measured(results, name, numbers):
    """Write <results>/measured/<name>.safetensors; half precision is more than the numbers are worth."""
    save_half(numbers, Path(results) / "measured", f"{name}.safetensors")


def agreement(score, video, captions, margin=0.15):
    """How often a reward orders two frames of one clip as their measured texture does: (share, number of pairs).

    score: images (B, 3, 64, 64), captions -> (B,). Of video (N, 3, T, 64, 64) the last frame of each latent frame
    counts, and the pairs of them whose fit of the caption's texture differs by more than `margin`.
    """
    right = pairs = 0
    for clip, caption in zip(video[:, :, ::4], captions):
        frames = clip.transpose(0, 1)  # (F, 3, 64, 64)
        fit = torch.tensor(texture_fit(frames, [caption] * len(frames)))
        with torch.no_grad():
            reward = score(frames, [caption] * len(frames))
        apart = fit[:, None] - fit > margin  # the first is the better one
        right += int((reward[:, None] > reward)[apart].sum())
        pairs += int(apart.sum())
    return right / max(1, pairs), pairs


def judge(out, checkpoints, count=100, seed=0):
    """Print `agreement` of the reward model on each generator's clips of held-out captions."""
    captions, reward = split()[1][:count], load_image_reward(out / "reward_model")
    for name in checkpoints:
        share, pairs = agreement(reward.score, sampler(out, name)(captions, seed), captions)
        print(f"{label(name)}: the reward orders {100 * share:.1f} % of {pairs} pairs of frames as their texture does",
              flush=True)


def label(name):
    """A generator's name: the folder of its model.safetensors, i.e. its run, or its file's name. What ends in -1, -2,
    ... are seeds of the same. raven-1's model_000050.safetensors, of step 50, is raven_50-1."""
    path = Path(name)
    of_run = re.fullmatch(r"model(_\d+)?", path.stem)
    step = f"_{int(of_run[1][1:])}" if of_run and of_run[1] else ""
    return re.sub(r"(-\d+)?$", rf"{step}\1", path.parent.name if of_run else path.stem, count=1)


def keep(out, checkpoint, name):
    """A float16 copy of a generator's file, with its metadata, in the model folder: <out>/<name>.safetensors."""
    state, metadata = read_weights(checkpoint)
    save_half(state, out, f"{name}.safetensors", metadata)


def evaluate(out, count=200):
    """What the models in `out` reach on held-out captions; written to measured.json there."""
    _, held_out = split()
    result, captions = {"vae": reconstruct(load_vae(out), held_out[:min(50, count)])}, held_out[:count]
    result["teacher"] = scorecard(sampler(out, "teacher")(captions), captions)
    result["real"] = scorecard(render(captions, generator=torch.Generator().manual_seed(8)), captions)
    return result


# ------------------------------------------------------------------------------------------- pictures

WORDS = {  # a generator's run, or its file in tests/tiny -> what it is called in a picture
    "teacher": "teacher, 50 steps", "student": "student, 4 steps", "ode": "ODE only", "reward": "reward forcing",
    "reward_forced": "reward forcing", "reward_random": "reward forcing, a random frame",
    "reward_all": "reward forcing, all frames", "reward_exact": "reward forcing, exact gradient",
    "reward_random_exact": "reward forcing, a random frame, exact gradient", "raven": "RAVEN",
    "self_forcing": "Self Forcing", "causvid": "CausVid", "teacher_forcing": "teacher forcing",
    "raven_uniform": "RAVEN, chunks weighted alike", "distill_reward": "reward + distillation",
    **{f"{run}_frame": f"{words} frame by frame" for run, words in (
        ("ode", "ODE only"), ("reward", "reward forcing"), ("raven", "RAVEN"), ("self_forcing", "Self Forcing"),
        ("causvid", "CausVid"))},
    "raven_cm": "RAVEN + CM-GRPO", "reward_cm": "reward forcing + CM-GRPO",
    "reward_em": "reward forcing + Euler-Maruyama GRPO"}


def in_words(name):
    """What a generator, a file or 'teacher', is called in a picture."""
    run = re.sub(r"-\d+$", "", label(name))
    return WORDS.get(run, run)


def fold(text, font, width):
    """The text in lines of at most `width` pixels, broken between words."""
    lines = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def grid(clips, rows, columns, title="", notes=None, margin=150, gap=8):
    """A labelled table of clips (R, C, 3, T, H, W) in [-1, 1] as frames (T, height, width, 3) uint8 of a white page.

    To the left of each row its label from `rows`, in a margin that wide; above each column its label from `columns`;
    between the clips white gutters, as whatever leaves a clip on one side comes back on the other. title: a line above
    all; notes: (R, C) short texts, each under its clip. Height and width are multiples of 16, as video codecs want it.
    """
    from PIL import Image, ImageDraw, ImageFont
    high, wide = clips.shape[-2:]
    font, small = ImageFont.load_default(size=16), ImageFont.load_default(size=13)
    heads = [fold(text, small, wide) for text in columns]
    top = 17 * max(text.count("\n") + 1 for text in heads) + 2 * gap + (24 if title else 0)
    below = 20 if notes else 0
    height, width = (math.ceil(n / 16) * 16 for n in (top + len(rows) * (high + below + gap),
                                                     margin + len(columns) * (wide + gap)))
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    lefts = [margin + c * (wide + gap) for c in range(len(columns))]
    tops = [top + r * (high + below + gap) for r in range(len(rows))]
    draw.text((margin + len(columns) * (wide + gap) / 2, gap), title, "black", font, "ma")
    for text, y in zip(rows, tops):
        draw.multiline_text((gap, y + high / 2), fold(text, font, margin - 2 * gap), "black", font, "lm")
    for text, x in zip(heads, lefts):
        draw.multiline_text((x + wide / 2, top - gap), text, "black", small, "md", align="center")
    for r, c in itertools.product(range(len(rows)), range(len(columns))) if notes else ():
        draw.text((lefts[c] + wide / 2, tops[r] + high + 3), notes[r][c], "black", small, "ma")
    frames = torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8).view(1, height, width, 3)
    frames = frames.repeat(clips.shape[3], 1, 1, 1)
    for r, c in itertools.product(range(len(rows)), range(len(columns))):
        clip = to_bytes(clips[r, c]).permute(1, 2, 3, 0)  # (T, H, W, 3)
        frames[:, tops[r]:tops[r] + high, lefts[c]:lefts[c] + wide] = clip
    return frames


def magnify(clips, factor):
    """Clips (..., H, W) with each pixel as a square of factor x factor."""
    return clips.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def picture(out, generators, path, count=5):
    """Generators on held-out captions as a table of videos that play side by side, a row per generator and a column per
    caption, from the same noise: an animated .webp, or an .mp4."""
    import imageio
    held_out = split()[1]  # each texture in turn, from all over the list
    captions = [next(c for c in held_out[200 // count * i:] if parse(c)["texture"] == TEXTURES[(i + 1) % 4])
                for i in range(count)]
    video = torch.stack([sampler(out, name)(captions) for name in generators])  # (G, N, 3, T, 64, 64)
    frames = grid(magnify(video, 2), [in_words(name) for name in generators], captions).numpy()
    how = {"duration": 1000 / 16, "loop": 0, "quality": 70, "method": 4}  # under 1 MB
    imageio.v3.imwrite(path, frames, **({"fps": 16} if path.suffix == ".mp4" else how))
    print("\n".join(captions))


def at_shares(values, shares):
    """Places of the values below which these shares of all values are: 0 of the lowest, 0.5 of the median."""
    order = sorted(range(len(values)), key=values.__getitem__)
    return [order[round(share * (len(order) - 1))] for share in shares]


def close_up(frame, side=48):
    """Image (3, 64, 64) -> (3, side, side) round its object, for which the image is shifted round the torus."""
    mask = find_object((frame[:, None] + 1) / 2)[2]
    if mask.any():
        x, y = centroids(mask)[0].round().int().tolist()
        frame = frame.roll((WORLD // 2 - y, WORLD // 2 - x), (1, 2))
    return frame[:, (WORLD - side) // 2:(WORLD + side) // 2, (WORLD - side) // 2:(WORLD + side) // 2]


GAINS = {0.1: "10 % lose this or more", 0.5: "the median", 0.9: "10 % gain this or more"}
GAINS_RULE = """\
Of {count} held-out captions, those of each texture but plain are put in the order of their gain in texture fit (the
last frame's texture correlation) from {before} to {after}. Shown are the captions a tenth, half and nine tenths
of the way from the largest loss to the largest gain."""


def closeup(out, before, after, path, count=200):
    """Last frames of two generators, magnified, a row for each texture: to the left the texture as it is drawn, then
    the two side by side for a caption that loses, the median and one that gains, which GAINS_RULE chooses, not taste.
    """
    import imageio
    captions, names = split()[1][::200 // count], [in_words(before), in_words(after)]
    last = torch.stack([sampler(out, name)(captions)[:, :, -1] for name in (before, after)])  # (2, N, 3, 64, 64)
    fit = [texture_fit(frames, captions) for frames in last]
    print(GAINS_RULE.format(count=len(captions), before=names[0], after=names[1]))
    chosen = []  # of each texture, the captions' places in the list, one for each of GAINS
    for texture in TEXTURES[1:]:
        own = [i for i, caption in enumerate(captions) if parse(caption)["texture"] == texture]
        chosen.append([own[i] for i in at_shares([fit[1][i] - fit[0][i] for i in own], GAINS)])
        for i in chosen[-1]:
            print(f"{captions[i]}: {fit[0][i]:.2f} to {fit[1][i]:.2f}")
    middle = [captions[own[len(GAINS) // 2]] for own in chosen]
    drawn = render(middle, 1, generator=torch.Generator().manual_seed(0))[:, :, 0]
    notes = [[f"texture fit {fitting:.2f}"] for fitting in texture_fit(drawn, middle)]
    drawn = torch.stack([close_up(frame) for frame in drawn])[:, None]  # (R, 1, 3, 48, 48)
    parts = [grid(magnify(drawn, 3).unsqueeze(3), TEXTURES[1:], ["as drawn"], " ", notes, margin=96)[0]]
    for title, some in zip(GAINS.values(), zip(*chosen)):
        pairs = torch.stack([torch.stack([close_up(frames[i]) for frames in last]) for i in some])  # (R, 2, 3, 48, 48)
        notes = [[f"texture fit {fitting[i]:.2f}" for fitting in fit] for i in some]
        parts.append(grid(magnify(pairs, 3).unsqueeze(3), [""] * len(some), names, title, notes, margin=20)[0])
    imageio.v3.imwrite(path, torch.cat(parts, 1).numpy())


def train(out, work, scale=1.0):
    """Make everything in `out` from nothing; `work` keeps what a killed run needs to go on. scale: of the steps."""
    work.mkdir(parents=True, exist_ok=True)
    steps = {name: max(2, int(n * scale)) for name, n in
             dict(text=800, vae=2500, reward=5000, part=1500, circles=4500, clips=7500, teacher=11500,
                  teacher2=8000, teacher3=3000).items()}
    encoder, tokenizer, words_right = train_text(work, steps["text"])
    vae = train_vae(work, steps["vae"]).eval().requires_grad_(False)
    latents, captions = encode_library(work, vae, steps["clips"], steps["part"], steps["circles"])
    some = latents[:steps["part"]]
    mean, std = some.mean((0, 2, 3, 4)), some.std((0, 2, 3, 4))
    latents = (latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
    # Three rounds of the teacher, each with its own warm-up and decay, in the last every checkered clip three times:
    # that texture takes the longest to learn. The mean of the last two rounds' weights is better than either.
    text = TextEncoder(encoder, tokenizer)
    first = train_teacher("teacher", work, latents, captions, text, steps["teacher"], short=0.2)
    second = train_teacher("teacher2", work, latents, captions, text, steps["teacher2"], start=first)
    checkered = [i for i, c in enumerate(captions) if parse(c)["texture"] == "checkered"]
    latents, captions = torch.cat([latents, *2 * [latents[checkered]]]), captions + 2 * [captions[i] for i in checkered]
    teacher = train_teacher("teacher3", work, latents, captions, text, steps["teacher3"], start=second)
    with torch.no_grad():
        torch._foreach_lerp_(list(teacher.parameters()), list(second.parameters()), 0.5)
    export(out, vae, mean.tolist(), std.tolist(), encoder, tokenizer, teacher)
    reward, pairs_right = train_reward(work, out, steps["reward"], max(4, int(600 * scale)))
    export_reward(out, reward)
    result = {**evaluate(out, max(2, min(200, int(200 * scale)))), "text": words_right, "reward": pairs_right}
    write_json(out / "measured.json", {part: {k: round(v, 4) for k, v in r.items()} for part, r in result.items()})
    print(json.dumps(result, indent=1))


SAMPLES = {"compare": 200, "over_time": 24, "closeup": 200, "judge": 100}  # without --count


def main():
    parser = argparse.ArgumentParser(description="The tiny world: train its models, or measure them.")
    parser.add_argument("verb", choices=["train", "evaluate", "picture", "closeup", "compare", "over_time",
                                         "judge", "keep"])
    parser.add_argument("generators", nargs="*",
                        help="for compare, over_time, judge, picture: generators' files, or `teacher`; for "
                             "closeup: two of them; for keep: a file and its name (default: for picture the teacher "
                             "and the committed generators, for closeup two of these, else the teacher)")
    parser.add_argument("--count", type=int, help="samples for " + ", ".join(
        f"{verb} (default: {count})" for verb, count in SAMPLES.items()))
    parser.add_argument("--length", type=int, default=90, help="for over_time: latent frames of a rollout")
    parser.add_argument("--seed", type=int, default=0, help="for compare, over_time and judge: of the noise")
    parser.add_argument("--to", type=Path, help="for picture: the file, .webp or .mp4 (default: tests/videos.webp); "
                        "for closeup: the file, .png (default: tests/closeup.png)")
    parser.add_argument("--captions", type=int, default=5, help="for picture: how many")
    parser.add_argument("--out", type=Path, default=HERE / "tiny", help="the model folder")
    parser.add_argument("--results", type=Path, default=Path("runs"),
                        help="for compare and over_time: figures go to RESULTS/measured (default: runs)")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny_world"), help="where a killed run goes on from")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the training steps, for a quick trial")
    args = parser.parse_args()
    kept = [str(HERE / f"tiny/{name}.safetensors") for name in ("ode", "reward_forced", "raven_frame")]
    default = {"picture": ["teacher", *kept], "closeup": kept[:2]}.get(args.verb, ["teacher"])
    generators, count = args.generators or default, args.count or SAMPLES.get(args.verb)
    if args.verb == "closeup" and len(generators) != 2:
        parser.error("closeup compares two generators")
    if args.verb == "train":
        train(args.out, args.work, args.scale)
    elif args.verb == "keep":
        keep(args.out, *generators)
    elif args.verb == "compare":
        compare(args.out, generators, args.results, count, args.seed)
    elif args.verb == "over_time":
        over_time(args.out, generators, args.results, count, args.length, args.seed)
    elif args.verb == "judge":
        judge(args.out, generators, count, args.seed)
    elif args.verb == "picture":
        picture(args.out, generators, args.to or HERE / "videos.webp", args.captions)
    elif args.verb == "closeup":
        closeup(args.out, *generators, args.to or HERE / "closeup.png", count)
    else:
        print(json.dumps(evaluate(args.out), indent=1))


if __name__ == "__main__":
    main()

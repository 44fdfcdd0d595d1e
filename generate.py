"""Prompt -> video: a causal few-step generator streams it chunk by chunk; a bidirectional
model samples it whole.

    prompt -> UMT5 -> rollout (DiT + KV cache, a few consistency steps per chunk)
           -> VAE, streamed -> mp4

Tiny model, on a CPU, offline; then one GPU; then prompts shared out over 8:
    python generate.py "a red striped circle moving left on a navy background"
    python generate.py "A corgi runs in a park." --model Wan-AI/Wan2.1-T2V-1.3B \\
        --checkpoint gdhe17/Self-Forcing:checkpoints/self_forcing_dmd.pt
    torchrun --standalone --nproc_per_node 8 generate.py --prompts prompts.txt ...

Without weights, neither by --checkpoint nor named by the model's folder, or with
--bidirectional alone, the model itself is sampled with a multi-step ODE solver and
classifier-free guidance, all frames at once: that is the teacher, and it cannot stream. A
few-step bidirectional student (--bidirectional --checkpoint) is sampled all at once too, at
its own timesteps.

Paper: Self Forcing (arXiv 2506.08009) alg. 2; UniPC (2302.04867) for the teacher's solver.
"""
import contextlib
import functools
import itertools
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from wan_causal import (MAX_POSITION, NEGATIVE_PROMPT, PIXELS, VIDEO, InputError, Parser,
                        check_text, check_video, check_writable, chunk_sizes, compute_dtype,
                        counted, file_name, find_folder, format_steps, frames_in, gaussian,
                        guided_velocity, in_words, is_cut_off, latent_frames, load_checkpoint,
                        load_dit, load_text_encoder, load_vae, machine_flags, model_defaults,
                        number, parse_stage, processes, read_lines, refuse_unused, replacing,
                        require, require_ffmpeg, rollout, rope_table, run_script, saved_number,
                        saved_steps, say_cut, seeded, set_threads, shift_sigma, tiny_model,
                        to_frames, warped_steps, whole, writing)

import imageio
import numpy as np
import torch
from tqdm import tqdm


def parse_args(argv=None):
    p = Parser(description='Generate videos from prompts.')
    g = p.add_argument_group('what')
    g.add_argument('prompt', nargs='*', help='one or more prompts')
    g.add_argument('--prompts', dest='prompt_file', metavar='FILE',
                   help='a text file with one prompt per line')
    g.add_argument('--jobs', metavar='FILE',
                   help='instead, lines of JSON {"prompt": text, "seed": number, "out": file}; '
                        'a file that is there already is left as it is')
    g.add_argument('--init', metavar='FILE',
                   help='go on from this video, or from this image as the first frame')
    g.add_argument('--frames', type=whole(1, step=4), default=81,
                   help='video frames, 1 + 4k, those of --init included')
    g.add_argument('--height', type=PIXELS, default=480, help='pixels, a multiple of 16')
    g.add_argument('--width', type=PIXELS, default=832, help='pixels, a multiple of 16')
    g.add_argument('--fps', type=whole(1, 1000), default=16,
                   help='frames per second of the file')
    g.add_argument('--seed', type=whole(1 - (1 << 63)), default=0,
                   help='of the noise; prompt i uses seed + i')
    g.add_argument('--out', default='samples', help='an .mp4 file for one prompt, or a folder')
    g = p.add_argument_group('model')
    g.add_argument('--model', default=tiny_model(),
                   help='a folder or hub repository, Wan\'s or diffusers\' layout')
    g.add_argument('--checkpoint', dest='weights', metavar='FILE',
                   help='generator weights: a file, or repository:path on the hub (default: '
                        'those that the model folder names, else the teacher is sampled)')
    g.add_argument('--lora', metavar='FILE',
                   help='a LoRA adapter for these weights, where it is not in their file')
    g.add_argument('--no-ema', action='store_true',
                   help='take the weights that are not averaged, if the file has both')
    g = p.add_argument_group('causal sampling')
    g.add_argument('--timesteps', type=number(above=0, high=1000), nargs='+', metavar='T',
                   help='those that the network sees, falling (default: the checkpoint\'s, '
                        'else 1000 750 500 250 at shift 5)')
    g.add_argument('--chunk', type=whole(1),
                   help='latent frames per chunk (default: the checkpoint\'s, else 3)')
    g.add_argument('--first-chunk', type=whole(1),
                   help='latent frames of the first chunk (default: as --chunk)')
    g.add_argument('--window', type=whole(1),
                   help='latent frames a frame may see, its chunk included (default: all)')
    g.add_argument('--sink', type=whole(0), default=0,
                   help='of these, how many are the video\'s first ones')
    g.add_argument('--overlap', type=whole(1), metavar='N',
                   help='long videos as CausVid makes them: rollouts of the model\'s length, '
                        'each of which starts from the last N latent frames before it, instead '
                        'of one rollout with a rolling cache')
    g = p.add_argument_group('bidirectional sampling')
    g.add_argument('--bidirectional', action='store_true',
                   help='all frames at once: the teacher, or a student')
    g.add_argument('--steps', type=whole(1), default=50, help='solver steps')
    g.add_argument('--solver', choices=['unipc', 'euler'], default='unipc', help='ODE solver')
    g.add_argument('--shift', type=number(above=0), default=5.0, help='timestep shift')
    g.add_argument('--guidance', type=number(), default=5.0,
                   help='classifier-free guidance, 1 is off')
    g.add_argument('--negative', default=NEGATIVE_PROMPT, help='negative prompt')
    g = p.add_argument_group('machine')
    machine_flags(g)
    g.add_argument('--compile', action='store_true',
                   help='compile DiT blocks and decoder (a minute or two, once)')
    args = parse_stage(p, 'generate', argv)
    args.segment = p.get_default('frames')  # the model's own length
    if not args.bidirectional:
        args.weights = args.weights or model_defaults(args.model).get('checkpoint')
    args.bidirectional = args.bidirectional or args.weights is None
    args.unused = functools.partial(refuse_unused, p, args)
    check(args)
    return args


def check(args):
    """Flags that cannot work, or not together, are an InputError before a model is loaded."""
    if latent_frames(args.frames) > MAX_POSITION and not args.overlap:
        raise InputError(f'--frames {args.frames} is past the RoPE table: Wan has '
                         f'{MAX_POSITION} positions, {1 + 4 * (MAX_POSITION - 1)} frames')
    if args.sink and args.window is None:
        raise InputError(f'--sink {args.sink} needs a --window')
    if args.timesteps and args.timesteps != sorted(set(args.timesteps), reverse=True):
        raise InputError(f'--timesteps {format_steps(args.timesteps)} must fall from at most '
                         '1000 to above 0')
    if args.bidirectional and (args.init or args.window or args.overlap):
        raise InputError('--init, --window and --overlap need a causal generator: give its '
                         'weights with --checkpoint')
    if args.overlap and (args.init or args.window):
        raise InputError('--overlap goes with neither --init nor --window: it is another way '
                         'to make long videos')
    if args.sink >= latent_frames(args.frames):
        raise InputError(f'--sink {args.sink} must be less than the '
                         f'{latent_frames(args.frames)} latent frames of {args.frames} frames')
    if args.overlap and args.frames <= args.segment:
        args.unused(f'{args.frames} frames are one segment of {args.segment}', 'overlap')
    if args.bidirectional:
        args.unused('all frames are made at once', 'chunk', 'first_chunk')
    if args.init:
        args.unused('--init holds the first frames, and the chunks after it are whole ones',
                    'first_chunk')
    if args.overlap:
        args.unused('every segment begins with a whole chunk', 'first_chunk')
    if args.jobs:
        args.unused('each line of --jobs has its own', 'seed', 'out')
    if not args.weights:
        args.unused('there are no weights; give them with --checkpoint', 'no_ema')


# Who writes one of these means a file, not a folder.
OTHER_VIDEOS = ('.avi', '.gif', '.jpeg', '.jpg', '.m4v', '.mkv', '.mov', '.mpeg', '.mpg', '.png',
                '.ts', '.webm', '.webp', '.wmv')


def read_jobs(args):
    """What to make: [(prompt, seed, path)]. A prompt's file is --out itself, or in that folder
    its words and seed."""
    if args.jobs:
        if args.prompt or args.prompt_file:
            raise InputError('give prompts or --jobs, not both')
        lines = read_lines(args.jobs)
        with in_words(f'{args.jobs} must hold lines such as {{"prompt": "a cat", "seed": 0, '
                      '"out": "cat.mp4"}'):
            rows = [json.loads(line) for line in lines]
            for row in rows:
                if set(row) != {'prompt', 'seed', 'out'}:
                    raise ValueError(f'{json.dumps(row)[:80]} has other keys')
                if not isinstance(row['prompt'], str) or type(row['seed']) is not int:
                    raise ValueError('"prompt" must be a text, "seed" a whole number')
            jobs = [(row['prompt'], row['seed'], Path(os.path.expanduser(row['out'])))
                    for row in rows]
            if not all(path.suffix.lower() == '.mp4' and '\0' not in str(path) and
                       os.fsencode(path) for *_, path in jobs):
                raise ValueError('"out" names no .mp4 file')
    else:
        prompts = args.prompt + (read_lines(args.prompt_file) if args.prompt_file else [])
        suffix = Path(args.out).suffix.lower()
        file = suffix == '.mp4'
        if suffix in OTHER_VIDEOS:
            raise InputError(f'--out {args.out}: videos are written as .mp4 files; give one, '
                             'or a folder')
        if file and len(prompts) > 1:
            raise InputError(f'--out {args.out} is one file, but there are {len(prompts)} '
                             'prompts: give a folder')
        jobs = [(prompt, seed, Path(args.out) if file else
                 Path(args.out) / f'{file_name(prompt)}-{seed}.mp4')
                for seed, prompt in enumerate(prompts, args.seed)]
    if any(abs(seed) >= 1 << 63 for _, seed, _ in jobs):
        raise InputError('a seed must be a whole number of at most 63 bits')
    if not jobs or not all(prompt.strip() for prompt, *_ in jobs):
        raise InputError('empty prompt: give at least one prompt, as text or with --prompts '
                         'FILE')
    if len({os.path.abspath(path) for *_, path in jobs}) < len(jobs):
        paths = [path for *_, path in jobs]
        raise InputError(f'several videos would be written to {max(paths, key=paths.count)}: '
                         'give each its own "out"')
    for prompt, _, path in jobs:
        check_text(prompt)
        with writing(path), contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # a name that is too long, for one
        if path.is_dir():
            raise InputError(f'{path} is a folder: give the video another name')
    for folder in {path.parent for *_, path in jobs}:
        check_writable(folder)
    return jobs


def read_frames(file, height, width, limit):
    """A video or an image -> (1, 3, T, height, width) in [-1, 1], resized to cover and cropped
    at the centre.

    Of a video the last T = 1 + 4k frames are taken; one of `limit` frames or more is an
    InputError.
    """
    if not Path(file).is_file():
        raise InputError(f'no file {file} to start from')
    with in_words(f'{file} cannot be read as an image or a video'):
        frames = [cover(picture, height, width)
                  for picture in itertools.islice(pictures(file), limit)]
    if len(frames) == limit:
        raise InputError(f'--init {file} already has {limit} frames or more: --frames {limit} '
                         'must be more')
    return torch.stack(frames[(len(frames) - 1) % 4:], dim=1).unsqueeze(0)


def pictures(file):
    """The pictures of an image, or the frames of a video, in turn: (H, W, 3) bytes. What the
    file holds decides, not its name. Grey of 16 bits is scaled to 8; what is transparent lies
    on white."""
    try:
        mode = imageio.v3.immeta(file, plugin='pillow')['mode']
    except OSError:  # no image
        if is_cut_off(file):
            raise ValueError('cut off')
        yield from imageio.v3.imiter(file, extension='.mp4')  # whatever its name says
        return
    if mode.startswith(('I', 'F')):
        grey = next(imageio.v3.imiter(file, plugin='pillow', rotate=True))
        if mode == 'F' or grey.min() < 0 or grey.max() > 65535:
            raise InputError(f'{file} holds numbers that are no 8 or 16 bits per pixel: save '
                             'it as an ordinary PNG')
        yield np.repeat((grey.astype(np.float32) / 257).round().astype(np.uint8)[..., None], 3,
                        axis=2)
        return
    with open(file, 'rb') as start:
        jpeg = start.read(2) == b'\xff\xd8'  # whose second picture is a phone's brightness map
    all_of_it = imageio.v3.imiter(file, plugin='pillow', mode='RGBA', rotate=True)
    for picture in itertools.islice(all_of_it, 1 if jpeg else None):
        alpha = picture[..., 3:] / 255
        yield (picture[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


def cover(picture, height, width):
    """A picture (H, W, 3) of bytes -> (3, height, width) in [-1, 1]."""
    picture = torch.from_numpy(picture).permute(2, 0, 1).unsqueeze(0).float() / 127.5 - 1
    scale = max(height / picture.shape[2], width / picture.shape[3])
    size = [max(height, round(picture.shape[2] * scale)),
            max(width, round(picture.shape[3] * scale))]
    if size != list(picture.shape[2:]):
        picture = torch.nn.functional.interpolate(picture, size, mode='bicubic',
                                                  antialias=True).clamp(-1, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return picture[0, :, top:top + height, left:left + width]


# ----------------------------------------------------------------------------------------
# The teacher: a multi-step ODE solver

def sigma_schedule(steps=50, shift=5.0):
    """Noise levels of the multi-step sampler, high to low, ending in 0: (steps + 1,) float64.

    As Wan's FlowUniPC: linspace(0.999, 0) without its end, shifted.
    """
    sigmas = torch.linspace(0.999, 0, steps + 1, dtype=torch.float64)[:-1]
    return torch.cat([shift_sigma(sigmas, shift), sigmas.new_zeros(1)])


@torch.no_grad()
def ode_trajectory(model, noise, context, negative, sigmas, guidance=5.0, solver='unipc'):
    """Solve the probability-flow ODE from noise; yield x at each sigma, the last one clean.

    noise (B, C, F, H, W); context, negative (B, L', text_dim); sigmas (n + 1,), falling, see
    `sigma_schedule`.
    solver: 'euler', or 'unipc' (order 2, B2(h), data prediction, as Wan uses it; there t is
    rounded down to a whole number, as Wan does).
    """
    step = {'euler': euler_step, 'unipc': UniPC().step}[solver]
    sigmas, x = [float(s) for s in sigmas], noise
    for i, sigma in enumerate(sigmas[:-1]):
        t = int(1000 * sigma) if solver == 'unipc' else 1000 * sigma
        v = guided_velocity(model, x, t, context, negative, guidance)
        yield x
        x = step(x, v, sigmas, i)
    yield x


def euler_step(x, v, sigmas, i):
    """x at sigmas[i] -> x at sigmas[i + 1]."""
    return x + (sigmas[i + 1] - sigmas[i]) * v


class UniPC:
    """UniPC of order 2 (arXiv 2302.04867, algorithm 1-2 with B2(h) = e^h - 1) for flow models.

    With alpha = 1 - sigma and lambda = log(alpha / sigma), one call corrects x with the model
    output at it, then predicts the next x. m are x0 predictions.
    """

    def __init__(self):
        # the last two outputs; the last corrected x; order of its predictor
        self.m, self.x, self.order = [], None, 0

    @staticmethod
    def log_snr(sigma):
        if sigma == 0:
            return math.inf
        return math.log1p(-sigma) - math.log(sigma) if sigma < 1 else -math.inf

    def step(self, x, v, sigmas, i):
        lam = [self.log_snr(s) for s in sigmas]
        m = x - sigmas[i] * v
        if i > 0:  # corrector, from i - 1 to i, which now knows m at i
            h = lam[i] - lam[i - 1]
            if self.order == 1:
                D = 0.5 * (m - self.m[-1])
            else:
                r = (lam[i - 2] - lam[i - 1]) / h
                b1 = math.expm1(-h) / -h - 1  # phi_2-like terms of eq. 9, divided by B below
                b2 = b1 / -h - 0.5
                b1, b2 = b1 / math.expm1(-h), 2 * b2 / math.expm1(-h)
                rho1 = (b1 - b2) / (1 - r)  # solves rho1 + rho2 = b1, r rho1 + rho2 = b2
                D = rho1 * (self.m[-2] - self.m[-1]) / r + (b1 - rho1) * (m - self.m[-1])
            x = self.update(self.x, self.m[-1], D, sigmas[i - 1], sigmas[i], h)
        self.m, self.x = [*self.m[-1:], m], x
        self.order = min(2, i + 1, len(sigmas) - 1 - i)  # lower order at both ends
        h, D = lam[i + 1] - lam[i], 0
        if self.order == 2:
            D = 0.5 * (self.m[-2] - m) / ((lam[i - 1] - lam[i]) / h)
        return self.update(x, m, D, sigmas[i], sigmas[i + 1], h)

    @staticmethod
    def update(x, m, D, sigma, sigma_next, h):
        """x' = sigma'/sigma x - alpha' (e^-h - 1)(m + D)."""
        return sigma_next / sigma * x - (1 - sigma_next) * math.expm1(-h) * (m + D)


# ----------------------------------------------------------------------------------------
# Compiling

def compile_for_inference(model, vae):
    """Compile the DiT's blocks around their attention, and on CUDA the decoder (a minute or
    two, once); there the DiT's forwards are also recorded, see `Graphed`. Returns the model to
    use. InputError if torch cannot compile here."""
    with in_words('torch cannot compile on this machine',
                  'install a C++ compiler, or leave --compile away'):
        torch.compile(torch.neg)(model.head.modulation)
    # past the limit of 8 shapes nothing would be compiled
    torch._dynamo.config.recompile_limit = 64
    for block in model.blocks:
        block.before, block.after = (torch.compile(part, dynamic=False)
                                     for part in (block.before, block.after))
    if not model.patch_embedding.weight.is_cuda:
        return model  # the decoder is faster as it is on a CPU
    # what it remembers is data: an input and an output
    vae.decoder.compile(dynamic=False, fullgraph=True)
    return Graphed(model)


class Graphed:
    """Stands in for the DiT in `rollout`: each kind of forward is recorded as a CUDA graph when
    it first comes, and replayed from then on. Else an early chunk, which has few keys, waits
    for Python to launch its 600 kernels.

    A graph knows addresses, not values. So there is one cache for all videos of a size, the
    prompt's keys and values are copied into the same places, and a result is valid until the
    next forward.
    """

    def __init__(self, model):
        self.model, self.config, self.dtype = model, model.config, model.dtype
        self.sizes = self.cache = self.pool = None
        self.new_prompt, self.graphs = True, {}

    def make_cache(self, batch, frames, tokens, sink=0, rolling=False):
        """See `WanModel.make_cache`; a rollout asks for it once, at its start."""
        sizes = batch, frames, tokens, sink, rolling
        if sizes != self.sizes:
            self.graphs.clear()  # before the cache that they point to
            self.cache = None
            self.sizes, self.cache = sizes, self.model.make_cache(*sizes)
        self.new_prompt = True
        return self.cache

    def __call__(self, x, t, context, layout=None, cache=None, start=0):
        # a ring that is full has other positions in every chunk
        if cache is None or cache.rolling:
            return self.model(x, t, context, layout, cache, start)
        if self.new_prompt:
            self.new_prompt, fresh = False, self.model.prompt_keys_values(context)
            cache.cross = cache.cross or fresh
            for kept, new in zip(cache.cross, fresh):
                for a, b in zip(kept, new):
                    a.copy_(b)
        if (start, x.shape) not in self.graphs:
            recorded = self.record(x.clone(), t.clone(), context, cache, start)
            self.graphs[start, x.shape] = recorded
        graph, inputs, v, _ = self.graphs[start, x.shape]
        for kept, new in zip(inputs, (x, t)):
            kept.copy_(new)
        graph.replay()
        return v

    def record(self, x, t, context, cache, start):
        """(graph, its inputs, its output, and a table that it reads and that others may
        forget)."""
        # what is compiled or made once comes before the recording
        self.model(x, t, context, cache=cache, start=start)
        # the graphs run one after the other in one memory
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            v = self.model(x, t, context, cache=cache, start=start)
        *_, F, H, W = x.shape
        return graph, (x, t), v, rope_table(tuple(range(start, start + F)), H // 2, W // 2,
                                            self.config.dim // self.config.num_heads, x.device)


# ----------------------------------------------------------------------------------------
# From a prompt to frames

def causal_video(model, vae, text, args, prompt, seed, init=None):
    """The causal path: yields pieces (3, T, H, W) of the video in [-1, 1], each as soon as it
    exists.

    init: clean latents (1, C, F', H/8, W/8) that the video goes on from, or None.
    With one chunk of all frames this is also how a bidirectional few-step student is sampled.
    """
    random = seeded(seed, vae.conv2.weight.device)
    context = text([prompt])  # (1, L', text_dim)
    given = 0 if init is None else init.shape[2]
    chunks = new_chunks(args, given)
    noise = gaussian(noise_shape(model, args, sum(chunks)), random, random.device)
    memory = {}  # what the decoder remembers of the chunks before
    if given:
        yield vae.decode(init, memory, at_once=3)[0]
    for chunk in rollout(model, noise, context, args.timesteps, chunks, window=args.window,
                         sink=args.sink, init=init, init_chunk=args.chunk, generator=random):
        yield vae.decode(chunk.x0, memory, at_once=3)[0]


def new_chunks(args, given):
    """Sizes of the chunks after `given` latent frames; what comes after a given start are whole
    chunks."""
    new = latent_frames(args.frames) - given
    return chunk_sizes(new, args.chunk, None if given else args.first_chunk)


def noise_shape(model, args, frames):
    return 1, model.config.in_dim, frames, args.height // 8, args.width // 8


def teacher_video(model, vae, text, args, prompt, seed):
    """The teacher, all frames at once: yields the video (3, T, H, W) as one piece."""
    random = seeded(seed, vae.conv2.weight.device)
    noise = gaussian(noise_shape(model, args, latent_frames(args.frames)), random,
                     random.device)
    negative = text([args.negative]) if args.guidance != 1 else None
    states = ode_trajectory(model, noise, text([prompt]), negative,
                            sigma_schedule(args.steps, args.shift), args.guidance, args.solver)
    for x in tqdm(states, total=args.steps + 1, desc='solver steps', leave=False,
                  disable=args.quiet):
        pass
    yield vae.decode(x, at_once=3)[0]


def overlapping_video(model, vae, text, args, prompt, seed):
    """CausVid's long videos (minimal_inference/longvideo_...): segments, each starting from the
    end of the one before.

    A segment gives up its last 4 (overlap - 1) + 1 frames, which the next one begins with: the
    first of them encoded anew as a picture, as a clip's first latent frame is, and the last
    overlap - 1 latent frames as they are. Positions start from 0 again. Yields pieces (3, T, H,
    W).
    """
    random = seeded(seed, vae.conv2.weight.device)
    context, again = text([prompt]), 4 * (args.overlap - 1) + 1
    init, left = None, args.frames
    while left:
        frames = min(args.segment, left)
        last = frames == left
        given = [] if init is None else [init]
        new = latent_frames(frames) - sum(x.shape[2] for x in given)
        noise = gaussian(noise_shape(model, args, new), random, random.device)
        rolled = rollout(model, noise, context, args.timesteps, chunk_sizes(new, args.chunk),
                         init=init, init_chunk=args.chunk, generator=random)
        memory, kept, video, shown = {}, [], [], 0
        for x0 in itertools.chain(given, (chunk.x0 for chunk in rolled)):
            kept.append(x0)
            piece = vae.decode(x0, memory, at_once=3)[0]
            # enough to hold the frames that are given up
            video = [*video, piece][-(again // 4 + 2):]
            yield piece if last else piece[:, :max(0, frames - again - shown)]
            shown += piece.shape[1]
        left -= frames if last else frames - again
        if not last:
            first = vae.encode(torch.cat(video, dim=1)[None, :, -again:][:, :, :1])
            kept = torch.cat(kept, dim=2)
            init = torch.cat([first, kept[:, :, kept.shape[2] - (args.overlap - 1):]], dim=2)


def video(model, vae, text, args, prompt, seed, init=None):
    """The pieces of a video, made as the flags ask for it."""
    if args.timesteps is None:
        return teacher_video(model, vae, text, args, prompt, seed)
    if args.overlap:
        return overlapping_video(model, vae, text, args, prompt, seed)
    return causal_video(model, vae, text, args, prompt, seed, init)


@contextlib.contextmanager
def video_file(path, args):
    """`with video_file(path, args) as write: write(piece)`: pieces (3, T, H, W) in [-1, 1]
    become an mp4 file, whole or not at all. A piece is encoded while the next one is made."""
    with replacing(path) as temporary:
        bar = tqdm(total=args.frames, unit='frame', desc=path.name[:30], disable=args.quiet)
        with imageio.get_writer(temporary, fps=args.fps, quality=8, **VIDEO) as writer, \
                ThreadPoolExecutor(1) as side, bar:
            encoding = []

            def write(piece):
                if not piece.isfinite().all():
                    raise InputError('the video is not finite: the weights are damaged, or '
                                     '--dtype float32 is needed')
                frames = to_frames(piece)
                wait()
                encoding.append(side.map(writer.append_data, frames))
                bar.update(len(frames))

            def wait():  # for the piece before; raises what went wrong with it
                while encoding:
                    list(encoding.pop())
            yield write
            wait()
        check_video(temporary, args.frames)


# ----------------------------------------------------------------------------------------

def load(args, folder, process):
    """The models in --model's folder and the weights that the flags name, on this process's
    device: (model, vae, text encoder). What the flags leave to the checkpoint is filled in:
    args.timesteps (None: the teacher's solver) and args.chunk."""
    dtype = compute_dtype(args, process.device)
    model, kind = load_dit(folder), 'bidirectional' if args.bidirectional else 'causal'
    metadata = load_checkpoint(model, args.weights, ema=not args.no_ema) if args.weights else {}
    require(metadata, args.weights, kind=kind)
    if args.lora:  # merged in float32: an update of bfloat16 weights would be rounded away
        adapter = load_checkpoint(model, args.lora, onto=True)
        require(adapter, args.lora, kind=kind)
        for key in ('timesteps', 'chunk'):
            theirs, its = metadata.get(key), adapter.get(key)
            if not getattr(args, key) and theirs and its and theirs != its:
                raise InputError(f'--checkpoint names {key} = {theirs}, --lora {key} = {its}: '
                                 f'say which by --{key}')
            metadata = {key: its, **metadata} if its else metadata
    set_threads(model, process.device)
    model = model.to(process.device, dtype).eval()
    vae = load_vae(folder, dtype, process.device)
    text = load_text_encoder(folder, dtype, process.device, args.offload_text)

    args.timesteps = args.timesteps or saved_steps(metadata)
    if not args.timesteps:
        args.timesteps = None if args.bidirectional else warped_steps()
    args.chunk = args.chunk or saved_number(metadata, 'chunk', 3, int)
    if args.bidirectional:
        args.chunk = latent_frames(args.frames)
    if args.timesteps:
        args.unused('a few-step generator is sampled at its timesteps, '
                    f'{format_steps(args.timesteps)}',
                    'steps', 'solver', 'shift', 'guidance', 'negative')
    elif args.guidance == 1:
        args.unused('--guidance 1 needs none', 'negative')
    if args.compile:
        model = compile_for_inference(model, vae)
    return model, vae, text


def check_chunks(args, given):
    """Windows and overlaps that do not go with the chunks, which the checkpoint may have set,
    are an InputError."""
    # what is given goes into the cache in whole chunks
    widest = max(*new_chunks(args, given), min(args.chunk, given))
    if args.window is not None and args.window < widest + args.sink:
        raise InputError(f'--window {args.window} is smaller than a chunk of {widest} and a '
                         f'sink of {args.sink} latent frames together')
    if args.overlap and (args.overlap % args.chunk or
                         args.overlap >= latent_frames(args.segment)):
        raise InputError(f'--overlap {args.overlap} must be a multiple of the chunk of '
                         f'{args.chunk}, and less than the {latent_frames(args.segment)} '
                         'latent frames of a segment')


def described(args):
    """What is about to be sampled, in one line."""
    if args.timesteps is None:
        return (f'{args.model} is sampled as the bidirectional teacher: {args.steps} '
                f'{args.solver} steps, shift {args.shift}, guidance {args.guidance}'
                + ('' if args.weights else '; a causal generator would come with --checkpoint'))
    how = 'all frames at once'
    if not args.bidirectional:
        how = f'chunks of {counted(args.chunk, "latent frame")}'
    return f'timesteps {format_steps(args.timesteps)}; {how}'


def still_to_make(jobs, args, process):
    """This process's share of the jobs, without those of a --jobs file whose video is there
    already."""
    mine = jobs[process.rank::process.world]
    if args.jobs:
        with ThreadPoolExecutor() as side:
            there = side.map(lambda path: path.exists() and frames_in(path),
                             (path for *_, path in mine))
            mine = [job for job, frames in zip(mine, there) if not frames]
        left = process.gather(torch.tensor(len(mine), device=process.device)).sum().item()
        process.print(f'{len(jobs)} videos, {left} of them to be made')
    return mine


@torch.no_grad()
def main():
    args = parse_args()
    require_ffmpeg()
    folder = find_folder(args.model)  # what is not there is said first
    jobs = read_jobs(args)
    given = read_frames(args.init, args.height, args.width, args.frames) if args.init else None
    with processes(args.device) as process:
        args.quiet = process.quiet
        model, vae, text = load(args, folder, process)
        say_cut(process, [prompt for prompt, *_ in jobs], text, 'the text encoder')
        init = None if given is None else vae.encode(given.to(process.device))
        check_chunks(args, 0 if init is None else init.shape[2])
        process.print(described(args))
        for prompt, seed, path in still_to_make(jobs, args, process):
            began = time.perf_counter()
            with video_file(path, args) as write:
                for piece in video(model, vae, text, args, prompt, seed, init):
                    write(piece)
            seconds = time.perf_counter() - began
            print(f'{path}: {args.frames} frames at {args.width}x{args.height} in '
                  f'{seconds:.1f} s ({args.frames / seconds:.1f} FPS)', flush=True)


if __name__ == '__main__':
    run_script(main)

"""Speed and memory, measured on this machine. Weights are random, so nothing is downloaded.

    python tests/bench.py generate --size 1.3B                  # 480x832, 81 frames; --size tiny runs on any CPU
    python tests/bench.py peers --size middle                   # the same work through diffusers, as ratios
    python tests/bench.py train                                 # a step of every stage, on the tiny model
    python tests/bench.py train -- --model DIR --frames 81      # what follows -- goes to every stage
    python tests/bench.py memory --size 1.3B                    # peak memory of every stage, simulated on any machine
    python tests/bench.py check                                 # all of it, and its correctness, on this machine's card

Times are medians. The limit that `generate` prints is counted: floating-point operations of the DiT in closed form, of
the decoder by torch's counter, over what this machine's own matrix product reaches in the same run.
"""
import argparse
import contextlib
import dataclasses
import io
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers import BatchEncoding

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
import cm_grpo  # noqa: E402
import distill_dmd  # noqa: E402
import generate as generation  # noqa: E402
import miniature  # noqa: E402
import ode_init  # noqa: E402
import reward_forcing  # noqa: E402
from wan_causal import (  # noqa: E402
    CONFIGS, UMT5_XXL, ImageReward, Process, WanConfig, WanModel, WanVAE, block_causal, chunk_sizes,
    compute_dtype, dit_diffusers_key, find_folder, latent_frames, peak_memory, processes, rollout, to_frames,
    vae_diffusers_key, warped_steps)

SIZES = {**CONFIGS, 'middle': WanConfig(dim=512, ffn_dim=2048, num_heads=8, num_layers=8, text_dim=64, text_len=32)}
VAE_SIZES = {'tiny': dict(dim=16, num_res_blocks=1), 'middle': dict(dim=32, num_res_blocks=1)}  # else the real one
PICTURE = {'tiny': (64, 64, 57), 'middle': (128, 128, 57)}  # height, width, frames


def picture(args):
    """(height, width, frames) as the flags or the size say."""
    given = args.height, args.width, args.frames
    return [flag or default for flag, default in zip(given, PICTURE.get(args.size, (480, 832, 81)))]


class Bench:
    """The machine, and how often to repeat."""

    def __init__(self, args):
        self.device = torch.device(args.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
        self.cuda = self.device.type == 'cuda'
        self.dtype = compute_dtype(args, self.device)
        self.warmup, self.repeats = args.warmup, args.repeats
        card = torch.cuda.get_device_name() if self.cuda else f'CPU, {torch.get_num_threads()} threads'
        self.name = f'{card}, torch {torch.__version__}, {str(self.dtype)[6:]}'
        print(f'{self.name}, {self.warmup} warm-up runs, median of {self.repeats}')

    def now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, *functions):
        """Median seconds of each function; they take turns, so that a busy machine slows all of them alike."""
        times = [[] for _ in functions]
        for i in tqdm(range(self.warmup + self.repeats), desc='runs', leave=False, disable=not sys.stderr.isatty()):
            for function, seen in zip(functions, times):
                start = self.now()
                function()
                seen.append(self.now() - start)
        return [statistics.median(seen[self.warmup:]) for seen in times]

    def flops(self):
        """Floating-point operations per second of a large matrix product."""
        n = 8192 if self.cuda else 1024
        layer = torch.nn.Linear(n, n, device=self.device, dtype=self.dtype)
        x = torch.randn(n, n, device=self.device, dtype=self.dtype)
        return 2 * n ** 3 / self.seconds(lambda: layer(x))[0]

    def bandwidth(self):
        """Bytes per second of a large copy, read and written."""
        a = torch.zeros(2 ** (30 if self.cuda else 26), device=self.device, dtype=torch.uint8)
        b = torch.empty_like(a)
        return 2 * len(a) / self.seconds(lambda: b.copy_(a))[0]

    def text(self, config):
        """Seconds of encoding a prompt of text_len tokens with random weights: UMT5-XXL, or the tiny encoder."""
        from transformers import UMT5Config, UMT5EncoderModel
        sizes = UMT5_XXL if config.text_dim == 4096 else dict(
            d_model=config.text_dim, d_kv=16, d_ff=128, num_heads=4, num_layers=2, vocab_size=64)
        with torch.device('meta'):
            encoder = UMT5EncoderModel(UMT5Config(feed_forward_proj='gated-gelu', **sizes))
        encoder = encoder.to(self.dtype).to_empty(device=self.device).eval()
        for weight in encoder.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        tokens = torch.ones(1, config.text_len, device=self.device, dtype=torch.long)
        return self.seconds(lambda: encoder(input_ids=tokens))[0]

    def attention(self, config, queries, keys):
        """The kernel that torch picks for full attention."""
        q, k = (torch.empty(1, config.num_heads, n, config.dim // config.num_heads, device=self.device,
                            dtype=self.dtype) for n in (queries, keys))
        return SDPBackend(torch._fused_sdp_choice(q, k, k)).name + (
            f', cuDNN {torch.backends.cudnn.version()}' if self.cuda else '')


def make_models(size, bench):
    """A DiT and a VAE with random weights; the DiT's head is not zero, as it is at the start of training."""
    torch.manual_seed(0)
    with torch.device(bench.device):
        model, vae = WanModel(SIZES[size]), WanVAE(**VAE_SIZES.get(size, {}))
    torch.nn.init.normal_(model.head.head.weight, std=0.02)
    return (m.to(bench.dtype).eval().requires_grad_(False) for m in (model, vae))


def dit_flops(config, queries, keys, texts, batch=1):
    """Operations of one DiT forward: 2 per weight and token, 4 per query, key and channel (texts' keys are cached)."""
    linear = 2 * queries * (6 * config.dim ** 2 + 2 * config.dim * config.ffn_dim)
    return batch * config.num_layers * (linear + 4 * queries * (keys + texts) * config.dim)


def decoder_flops(size, shape):
    """Operations of decoding latents of `shape`, counted layer by layer without computing anything."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device('meta'), FlopCounterMode(display=False) as counter:
        WanVAE(**VAE_SIZES.get(size, {})).decode(torch.empty(shape))
    return counter.get_total_flops()


@torch.no_grad()
def generate(args, bench):
    """Where the time of one streamed video goes, and how far it is from the machine's limit: yields (what,
    figure)."""
    config = SIZES[args.size]
    text = bench.text(config)  # before the other models, and gone before they are made
    model, vae = make_models(args.size, bench)
    h, w, frames = picture(args)
    shape = (args.batch, 16, latent_frames(frames), h // 8, w // 8)
    chunks, tokens = chunk_sizes(shape[2], args.chunk), shape[3] * shape[4] // 4
    noise = torch.randn(shape, device=bench.device)
    context = torch.randn(args.batch, config.text_len, config.text_dim, device=bench.device, dtype=bench.dtype)
    weights = sum(p.nbytes for p in model.parameters())
    if args.compile:
        model = generation.compile_for_inference(model, vae)

    def video(decode=True, mark=lambda: None):
        """One video; mark() is called after the DiT and after the decoder of each chunk."""
        memory = {}
        for chunk in rollout(model, noise, context, warped_steps(), chunks):
            mark()
            if decode:
                for clip in vae.decode(chunk.x0, memory, at_once=3):
                    to_frames(clip)
            mark()

    for _ in range(args.warmup):
        video()
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    rows = []  # seconds of DiT, decoder, DiT, decoder, ...
    for _ in range(args.repeats):
        times = [bench.now()]
        video(mark=lambda: times.append(bench.now()))
        rows.append([b - a for a, b in zip(times, times[1:])])
    median = [statistics.median(column) for column in zip(*rows)]
    whole, alone = bench.seconds(video, lambda: video(decode=False))
    memory = torch.cuda.max_memory_allocated() / 2 ** 30 if bench.cuda else None

    kept = 2 * config.num_layers * config.dim * tokens * args.batch * bench.dtype.itemsize  # of a latent frame
    operations, traffic, seen = 0, 0, 0
    for i, n in enumerate(chunks):
        passes = len(warped_steps()) + (i < len(chunks) - 1)
        seen += n
        operations += passes * dit_flops(config, n * tokens, seen * tokens, config.text_len, args.batch)
        traffic += passes * (weights + seen * kept)
    speed, decoding, copied = bench.flops(), decoder_flops(args.size, shape), bench.bandwidth()
    yield from [
        ('video', f'{args.size} at {w}x{h}, {frames} frames, batch {args.batch}, chunks of {args.chunk} latent frames'
                  + (', compiled' if args.compile else '')),
        ('attention', bench.attention(config, args.chunk * tokens, shape[2] * tokens)),
        ('text', f'{text:.3f} s'), ('DiT per chunk', ' '.join(f'{x:.3f}' for x in median[::2]) + ' s'),
        ('decoder per chunk', ' '.join(f'{x:.3f}' for x in median[1::2]) + ' s'),
        ('first chunk', f'{statistics.median(row[0] + row[1] for row in rows):.3f} s'),
        ('end to end, without text', f'{whole:.3f} s, {args.batch * frames / whole:.2f} FPS'),
        ('DiT alone', f'{alone:.3f} s, {args.batch * frames / alone:.2f} FPS'),
        ('matrix product here', f'{speed / 1e12:.2f} TFLOP/s'),
        ('limit of the DiT', f'{operations / 1e12:.3f} TFLOP, {operations / speed:.3f} s: '
                             f'{100 * operations / speed / alone:.0f} % reached'),
        ('least traffic of the DiT', f'{traffic / 1e9:.2f} GB of weights, keys and values, {traffic / copied:.3f} s'
                                     f' at {copied / 1e9:.0f} GB/s here'),
        ('limit of the decoder', f'{decoding / 1e12:.3f} TFLOP, {decoding / speed:.3f} s: '
                                 f'{100 * decoding / speed / max(whole - alone, 1e-9):.0f} % reached'),
        ('peak memory', f'{memory:.2f} GiB, without text encoder' if bench.cuda else 'not measured on a CPU')]


@torch.no_grad()
def video(more):
    """Where the time of a real video of generate.py goes, whose flags are `more`: the second of two runs."""
    flags = generation.parse_args(more)
    if flags.init:
        sys.exit('error: --init is not measured: leave it out')
    (prompt, seed, path), *_ = generation.read_jobs(flags)
    flags.quiet = True
    with processes(flags.device) as process:
        model, vae, text = generation.load(flags, find_folder(flags.model), process)
        generation.check_chunks(flags, 0)
        cuda, seconds = process.device.type == 'cuda', {}

        def timed(part, function):
            def call(*args, **kwargs):
                start = now()
                result = function(*args, **kwargs)
                seconds[part] = seconds.get(part, 0) + now() - start
                return result
            return call

        def now():
            if cuda:
                torch.cuda.synchronize()
            return time.perf_counter()
        encode, vae.decode = timed('text', text), timed('decoder', vae.decode)
        for _ in range(2):
            text.rows.cache_clear()  # else the second run finds the prompt encoded
            seconds.clear()
            began, marks = now(), []
            with generation.video_file(path, flags) as write:
                for piece in generation.video(model, vae, encode, flags, prompt, seed):
                    write(piece)
                    marks.append(now())
            seconds['total'] = now() - began
    rest = seconds['total'] - seconds['text']
    card = torch.cuda.get_device_name(process.device) if cuda else 'CPU'
    yield from [
        ('video', f'{flags.width}x{flags.height}, {flags.frames} frames; {card}, torch {torch.__version__}'),
        ('text', f'{seconds["text"]:.3f} s'), ('decoder', f'{seconds["decoder"]:.3f} s'),
        ('DiT and writing', f'{rest - seconds["decoder"]:.3f} s'),
        ('first chunk, without text', f'{marks[0] - began - seconds["text"]:.3f} s'),
        ('end to end', f'{seconds["total"]:.3f} s'),
        ('end to end, without text', f'{rest:.3f} s, {flags.frames / rest:.2f} FPS'),
        ('peak memory', f'{peak_memory(process.device):.2f} GiB')]


@torch.no_grad()
def peers(args, bench):
    """The same weights and the same work through diffusers' Wan classes, and the cache against no cache: yields (what,
    seconds here and there, and how many times as fast)."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    config = SIZES[args.size]
    model, vae = make_models(args.size, bench)
    h, w, _ = picture(args)
    theirs = WanTransformer3DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.dim // config.num_heads,
        text_dim=config.text_dim, freq_dim=config.freq_dim, ffn_dim=config.ffn_dim, num_layers=config.num_layers)
    theirs.load_state_dict({dit_diffusers_key(k): v for k, v in model.state_dict().items()})
    theirs = theirs.to(bench.device, bench.dtype).eval()
    sizes = VAE_SIZES.get(args.size, dict(dim=96, num_res_blocks=2))
    their_vae = AutoencoderKLWan(base_dim=sizes['dim'], num_res_blocks=sizes['num_res_blocks'])
    their_vae.load_state_dict({vae_diffusers_key(k, sizes['num_res_blocks']): v for k, v in vae.state_dict().items()})
    their_vae = their_vae.to(bench.device, bench.dtype).eval()
    if args.compile:
        model = generation.compile_for_inference(model, vae)
    context = torch.randn(1, config.text_len, config.text_dim, device=bench.device, dtype=bench.dtype)
    t = torch.tensor([500.0], device=bench.device)
    yield 'video', f'{args.size} at {w}x{h}{", compiled" * args.compile}: seconds here, in diffusers, times as fast'

    def row(name, ours, theirs):
        """Both compute the same; the largest difference says so."""
        same = (ours().float() - theirs().float()).abs().max().item()
        here, there = bench.seconds(ours, theirs)
        return name, f'{here:.3f} s  {there:.3f} s  {there / here:.2f}x   largest difference {same:.1e}'
    for frames in (3, 21):
        x = torch.randn(1, 16, frames, h // 8, w // 8, device=bench.device, dtype=bench.dtype)
        yield row(f'forward, {frames} latent frames', lambda: model(x, t, context), lambda: theirs(x, t, context).sample)
    z = torch.randn(1, 16, 6, h // 8, w // 8, device=bench.device, dtype=bench.dtype)
    scaled = (z.float() * vae.std + vae.mean).to(bench.dtype)
    yield row('decode, 6 latent frames', lambda: vae.decode(z, at_once=3), lambda: their_vae.decode(scaled).sample)
    if not args.compile:
        with torch.profiler.profile() as profile:
            model(x, t, context)
        spent = {event.key: event.self_device_time_total if bench.cuda else event.self_cpu_time_total
                 for event in profile.key_averages() if event.key.startswith(('aten::', 'mkldnn::'))}
        names = re.compile('addmm|mm$|attention')
        kernels = sum(time for key, time in spent.items() if names.search(key))
        share = 100 * kernels / sum(spent.values())
        yield '    matrix products, attention', f'{share:.0f} % of it'

    noise, chunks = torch.randn(1, 16, 21, h // 8, w // 8, device=bench.device), [3] * 7
    clean, steps = torch.zeros_like(noise), warped_steps()

    def recomputed(whole):  # a rollout without a cache: at every step all frames so far, or all there will be
        for i in range(len(chunks)):
            seen = chunks if whole else chunks[:i + 1]
            for _ in steps:
                model(clean[:, :, :sum(seen)], torch.zeros(1, sum(seen), device=bench.device), context,
                      block_causal(seen))
    cached, *others = bench.seconds(lambda: list(rollout(model, noise, context, steps, chunks)),
                                    lambda: recomputed(False), lambda: recomputed(True))
    yield 'rollout of 7 chunks', f'{cached:.3f} s with a cache'
    for other, what in zip(others, ('frames so far', 'the sequence')):
        yield f'    recomputing {what}', f'{other:.3f} s  {other / cached:.2f}x'


STAGES = ('student', 'ode', 'reward', 'reward_all', 'causvid', 'teacher_forcing', 'self_forcing', 'raven',
          'reward_cm')  # of the miniature


def train(args, more):
    """Seconds and peak memory of a step of each stage, each run by its own command line with the same batch."""
    bench = Bench(args)
    steps, medians = args.warmup + args.repeats, {}
    with tempfile.TemporaryDirectory() as folder:
        def run(*command):
            done = subprocess.run([sys.executable, *command, *more], cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f'error: {command[0]} failed: {(done.stderr.strip() or done.stdout).splitlines()[-1]}')
        run('ode_init.py', 'sample', '--count', str(max(4, args.batch)), '--steps', '4', '--out', f'{folder}/data')
        for name in STAGES:
            line, out = miniature.STAGES[name][0], Path(folder) / name
            flags = ['--batch', str(args.batch), '--steps', str(steps), '--sample-every', '0', '--out', str(out)]
            flags += [word for flag in ('device', 'dtype') if getattr(args, flag)
                      for word in (f'--{flag}', getattr(args, flag))]
            if name == 'reward_cm':
                flags += ['--prompts-per-step', '1', '--group', str(args.batch), '--chunk', str(args.chunk)]
                flags += [] if args.init else ['--frames', str(PICTURE['tiny'][2])]  # as the tiny model's other stages
            if args.init and name not in ('student', 'ode'):
                flags += ['--init', args.init]
            run(*line.format(data=f'{folder}/data').split(), *flags)
            logged = [json.loads(row) for row in (out / 'metrics.jsonl').read_text().splitlines()][args.warmup:]
            seconds = medians[name] = statistics.median(row['seconds'] for row in logged)
            print(f'{name:<28}{seconds:8.2f} s a step  {args.batch / seconds:6.2f} videos/s  '
                  f'{max(row["peak_gib"] for row in logged):6.2f} GiB', flush=True)
    print(f'a step of RAVEN takes {medians["raven"] / medians["reward"]:.2f} times as long as one of reward forcing '
          f'({bench.device})')


class Ledger(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, now and at most, in blocks of 512 as CUDA's allocator has it.

    shared: how many of these --shard would share out now; peaks: at most, on each of so many GPUs.
    """

    def __init__(self, gpus=(1,)):
        super().__init__()
        self.now = self.shared = 0
        self.known, self.peaks = set(), dict.fromkeys({1, *gpus}, 0)

    @property
    def peak(self):
        return self.peaks[1]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        self.known.add(key)
        self.now += size
        for gpus, peak in self.peaks.items():
            self.peaks[gpus] = max(peak, self.now - (1 - 1 / gpus) * self.shared)
        weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        self.known.discard(key)
        self.now -= size


class Unread(TorchFunctionMode):
    """Fake tensors have shapes and no values: whoever reads one gets zeros."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ == 'item':  # tolist calls it, too
            return 0.0 if args[0].is_floating_point() else 0
        reads = {'__float__': 0.0, '__bool__': False}
        return reads[function.__name__] if function.__name__ in reads else function(*args, **(kwargs or {}))


def random_model(make, dtype=torch.float32, device='cpu'):
    """A model with random weights of this dtype from the start; in a FakeTensorMode it has no values at all."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make().eval()
    finally:
        torch.set_default_dtype(torch.float32)


def random_stage(module, argv, sizes, size, batch, device=torch.device('cpu'), ledger=None):
    """Two steps of a stage's own train() with random models and without a text encoder; returns its metrics.

    In a FakeTensorMode nothing is computed, and shapes and memory are the real ones. Two timesteps instead of four take
    as much memory. size: height, width and frames of the videos. ledger: a Ledger, which is told what --shard would share
    out: weights, averages, gradients, the optimizers' moments, the frozen teacher.
    """
    height, width, frames = size
    simulated = torch._guards.detect_fake_mode() is not None

    def dit(name, dtype=torch.float32, *_):
        model = random_model(lambda: WanModel(sizes.get(name, sizes[None])), dtype, device)
        torch.nn.init.normal_(model.head.head.weight, std=0.02)
        return model

    def image_reward(*_):
        model = random_model(ImageReward, device=device).requires_grad_(False)
        model.tokenizer = lambda prompts, **_: BatchEncoding(dict.fromkeys(
            ('input_ids', 'attention_mask'), torch.ones(len(prompts), 35, dtype=torch.long, device=device)))
        return model

    def text(*_):
        return lambda prompts: torch.randn(len(prompts), sizes[None].text_len, sizes[None].text_dim, device=device)
    stand_ins = {
        'find_folder': lambda name: name, 'say_cut': lambda *_: None, 'load_dit': dit,
        'load_image_reward': image_reward, 'load_text_encoder': text,
        'load_vae': lambda *_: random_model(WanVAE, torch.bfloat16, device).requires_grad_(False),
        'Trajectories': lambda folder: Trajectory(*size),
        'load_generator': lambda folder, *_: (dit(folder), [1000.0, 625.0], 3, 5.0)}
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(tempfile.TemporaryDirectory())
        args = module.parse_args([
            *argv, '--model', 'Wan-AI/Wan2.1-T2V-1.3B', '--prompts', str(ROOT / 'tests/tiny/prompts.txt'), '--steps',
            '2', '--height', str(height), '--width', str(width), '--frames', str(frames), '--batch', str(batch),
            '--accum', '1', '--init', 'none', '--dtype', 'bfloat16', '--out', out])
        for name, value in stand_ins.items():
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, value))
        gradients = {}  # id of a weight -> the bytes of its gradient, if there is one

        def begun(weight):
            ledger.shared += weight.nbytes if id(weight) not in gradients else 0
            gradients[id(weight)] = weight.nbytes

        def due(run, every):  # neither samples nor saves
            if run.step == 0 and ledger:  # once, before the first step
                for part in run.parts.values():
                    if not isinstance(part, torch.optim.Optimizer):
                        ledger.shared += sum(x.nbytes for x in part.state_dict().values())
                        continue
                    for weight in (p for group in part.param_groups for p in group['params']):
                        ledger.shared += 2 * weight.nbytes
                        weight.register_post_accumulate_grad_hook(begun)
                ledger.peaks = dict.fromkeys(ledger.peaks, 0)  # what is loaded lies in the CPU's memory
            return False

        def forget_gradients(process, optimizer):
            optimizer.zero_grad()
            for weight in (p for group in optimizer.param_groups for p in group['params']):
                if ledger:
                    ledger.shared -= gradients.pop(id(weight), 0)

        def frozen(process, model):
            if ledger:
                ledger.shared += sum(p.nbytes for p in model.parameters())
            return model.eval().requires_grad_(False)
        for name, function in (('Run.due', due), ('Process.frozen', frozen),
                               ('Process.forget_gradients', forget_gradients)):
            stack.enter_context(mock.patch(f'wan_causal.{name}', function))
        if simulated:
            # one call over all keys: what flex attention keeps on a GPU, and not the groups of rectangles
            stack.enter_context(mock.patch('wan_causal.attend',
                                           lambda q, k, v, *_, **kw: scaled_dot_product_attention(q, k, v)))
            stack.enter_context(mock.patch('torch.nn.Module.to', lambda model, *_: model))
        module.train(args, Process(0, 1, device))
        return [json.loads(line) for line in (Path(out) / 'metrics.jsonl').read_text().splitlines()]


class Trajectory:
    """In place of a folder of ODE trajectories, which fake tensors cannot be read from: one without values."""

    def __init__(self, height, width, frames):
        self.settings = dict(timesteps=[1000.0, 625.0], shift=5.0, frames=frames, height=height, width=width, count=1)
        self.shape = (16, latent_frames(frames), height // 8, width // 8)

    def __len__(self):
        return 1

    def __getitem__(self, i):
        return torch.zeros(3, *self.shape), 'a prompt'


@torch.no_grad()
def fake_generation(config, bidirectional, size, batch):
    """What generate.py (batch 1) and ode_init.py sample do, on fake tensors."""
    height, width, frames = size
    model, vae = (random_model(make, torch.bfloat16) for make in (lambda: WanModel(config), WanVAE))
    noise = torch.randn(batch, 16, latent_frames(frames), height // 8, width // 8)
    text = torch.zeros(batch, config.text_len, config.text_dim)
    if bidirectional:
        *_, x = generation.ode_trajectory(model, noise, text, text, [0.999, 0.8, 0.5, 0.0])
        vae.decode(x, at_once=3)
        return
    memory = {}
    for chunk in rollout(model, noise, text, warped_steps(), chunk_sizes(noise.shape[2])):
        vae.decode(chunk.x0, memory, at_once=3)


def memory(args):
    """Peak memory of a process of each stage. Nothing is allocated: the stages' own code runs on fake tensors, which
    have shapes alone, and what is alive is added up. With --gpus N as --shard shares it out: 1/N of the weights and what
    belongs to them, and three blocks whole: the one that computes, the next, and a gradient."""
    config, giant = SIZES[args.size], 'Wan-AI/Wan2.1-T2V-14B'
    large = dataclasses.replace(CONFIGS['14B'], text_dim=config.text_dim)  # both read the same text
    height, width, frames = size = picture(args)
    causal = ['--ratio', '1', '--student', 'causal']

    def stage(module, *argv):
        return lambda: random_stage(module, argv, {None: config, giant: large}, size, args.batch, ledger=ledger)
    generating = {  # is not shared out
        'generate.py': lambda: fake_generation(config, False, size, args.batch),
        'generate.py --bidirectional': lambda: fake_generation(config, True, size, args.batch)}
    stages = {
        **(generating if args.gpus == [1] else {}),
        'ode_init.py train': stage(ode_init, 'train'),
        'reward_forcing.py': stage(reward_forcing),
        'distill_dmd.py': stage(distill_dmd, '--ratio', '1'),
        'distill_dmd.py, self-forcing': stage(distill_dmd, *causal),
        'distill_dmd.py, raven': stage(distill_dmd, *causal, '--history', 'raven'),
        'the same, 14B teacher': stage(distill_dmd, *causal, '--history', 'raven', '--teacher', giant),
        'cm_grpo.py, without CLIP': stage(cm_grpo, '--group', str(2 * args.batch), '--prompts-per-step', '1',
                                          '--rewards', 'imagereward', 'motion', 'smoothness')}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    print(f'{args.size} at {width}x{height}, {frames} frames, batch {args.batch}: peak GiB on each of '
          f'{", ".join(map(str, args.gpus))} GPUs, without text encoder and work space; a card of which a tenth is free')
    with torch.device('meta'):
        block = 4 * sum(p.numel() for p in WanModel(dataclasses.replace(config, num_layers=1)).blocks.parameters())
    for name, run in stages.items():
        if not re.search(args.only, name):
            continue
        ledger = Ledger(args.gpus)
        with mode, Unread(), ledger, contextlib.redirect_stdout(io.StringIO()):
            run()
        for gpus in args.gpus:
            peak = ledger.peaks[gpus] + 3 * block * (gpus > 1)
            card = next((f'{c} GB' for c in (24, 48, 80) if peak < 0.9 * c * 1e9), 'more than 80 GB')
            print(f'{name:<40}{gpus:3} GPUs{peak / 2 ** 30:8.1f}  on a card of {card}', flush=True)


def flags(argv):
    """The parsed flags; each verb has its own, and its own --help."""
    p = argparse.ArgumentParser(description='Speed and memory of this project on this machine.')
    verbs = p.add_subparsers(dest='verb', required=True, metavar='VERB')

    def verb(name, words, *groups):
        v = verbs.add_parser(name, help=words, description=words[0].upper() + words[1:] + '.')
        for group in groups:
            group(v)
        return v

    def models(v):
        v.add_argument('--size', choices=SIZES, default='tiny', help='of the random weights (default: tiny)')
        videos(v)

    def videos(v):
        v.add_argument('--height', type=int, help='pixels (default: the size\'s own)')
        v.add_argument('--width', type=int, help='pixels')
        v.add_argument('--frames', type=int, help='video frames, 1 + 4k')
        v.add_argument('--batch', type=int, default=1, help='videos at once')

    def machine(v):
        v.add_argument('--device', help='cpu or cuda (default: cuda if there is one)')
        v.add_argument('--dtype', choices=['float32', 'bfloat16'], help='default: bfloat16 on cuda, else float32')

    def repeats(v):
        v.add_argument('--warmup', type=int, default=1, help='runs that do not count')
        v.add_argument('--repeats', type=int, default=3, help='runs of which the median counts')

    def sampling(v):
        v.add_argument('--chunk', type=int, default=3, help='latent frames per chunk')
        v.add_argument('--compile', action='store_true', help='compile ours')
    verb('generate', 'where the time of a streamed video goes, and the limit', models, machine, repeats, sampling)
    verb('peers', 'the same work through diffusers\' Wan classes', models, machine, repeats, sampling)
    v = verb('video', 'a real video of generate.py, whose flags follow --')
    v = verb('train', 'a step of every stage; flags of all stages may follow --', machine, repeats)
    v.add_argument('--batch', type=int, default=1, help='videos at once')
    v.add_argument('--chunk', type=int, default=3, help='latent frames per chunk of CM-GRPO')
    v.add_argument('--init', help='the causal generator to start from (default: the tiny model\'s)')
    v = verb('memory', 'peak memory of every stage on a GPU, simulated', models)
    v.add_argument('--gpus', type=int, nargs='+', default=[1], help='that share the models with --shard')
    v.add_argument('--only', default='', help='those whose name has a match of this')
    v = verb('check', 'is everything right on this card, and how fast', videos, machine, repeats)
    v.set_defaults(chunk=3, compile=False)
    parts = ['correctness', 'stages', 'full', 'speed']
    v.add_argument('--parts', nargs='+', choices=parts, default=parts, help='which of its parts')
    v.add_argument('--only', default='', help='those whose name has a match of this')
    v.add_argument('--out', default='gpu.json', help='the file of its rows; Markdown goes beside it')
    return p.parse_args(argv)


def main():
    cut = sys.argv.index('--') if '--' in sys.argv else len(sys.argv)
    args, more = flags(sys.argv[1:cut]), sys.argv[cut + 1:]
    if args.verb == 'train':
        train(args, more)
    elif args.verb == 'memory':
        memory(args)
    elif args.verb == 'check':
        import check
        sys.exit(check.check(args))
    else:
        rows = video(more) if args.verb == 'video' else \
            {'generate': generate, 'peers': peers}[args.verb](args, Bench(args))
        for name, value in rows:
            print(f'{name:<31}{value}', flush=True)


if __name__ == '__main__':
    main()

"""One command that proves the code on this machine's card:

    python tests/bench.py check                       # on a GPU within ten minutes, on a CPU (tiny) in two
    python tests/bench.py check --parts correctness   # or stages (tiny), full (stages at 1.3B), speed
    python tests/bench.py check --only flex           # the checks whose name has a match

Nothing is downloaded: weights are random, or those of tests/tiny and tests/golden. Every check is a row: pass or fail,
and the figure that was seen. A failure does not stop the others. The rows also go to `--out` (gpu.json), and as
Markdown, for tests/README.md, to the file beside it (gpu.md).

A check is a function that returns either (error, bound), which passes when the error is no larger, or a sentence.
"""
import concurrent.futures
import copy
import functools
import gc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

import bench
import distill_dmd
import ode_init
from bench import ROOT
from cm_grpo import surrogate
from generate import compile_for_inference
from wan_causal import (
    CONFIGS, ImageReward, WanConfig, WanModel, WanVAE, attend, block_causal, chunk_weights, consistency_kernel,
    first_line, frame_reward, interleave, interleaved, interleaved_x0, load_exactly, load_image_reward,
    load_text_encoder, load_vae, noisy_part, rewarded_video, rollout, v_from_x0, warped_steps, x0_from_v)

GOLDEN, TINY = ROOT / 'tests/golden', ROOT / 'tests/tiny'
CHUNKS = [3, 3, 3]


def described(error):
    """An exception in one line."""
    return f'{type(error).__name__}: {first_line(error)[:300]}'


class Report:
    """The rows, printed as they come."""

    def __init__(self, device, only):
        self.device, self.only, self.rows = device, re.compile(only), []

    def check(self, part, name, function):
        """Run one check; whatever goes wrong in it is its row."""
        if not self.only.search(name):
            return
        began = time.perf_counter()
        try:
            result = function()
            passed, figure = True, result
            if not isinstance(result, str):
                error, bound = result
                passed, figure = error <= bound, f'{error:.1e} (bound {bound:.0e})'  # NaN does not pass
        except Exception as error:
            passed, figure = False, described(error)
        gc.collect()
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()
        self.add(part, name, passed, f'{figure}  [{time.perf_counter() - began:.1f} s]')

    def table(self, part, name, rows):
        """Rows that a benchmark measures as it goes: (what, figure)."""
        if not self.only.search(name):
            return
        try:
            for what, figure in rows():
                self.add(part, f'{name}: {what.strip()}', True, figure)
        except Exception as error:
            self.add(part, name, False, described(error))

    def add(self, part, name, passed, figure):
        self.rows.append(dict(part=part, name=name, passed=passed, figure=figure))
        print(f'{"pass" if passed else "FAIL"}  {name:<62} {figure}', flush=True)

    def write(self, path, machine):
        """gpu.json, and the same as Markdown beside it."""
        path.write_text(json.dumps({'machine': machine, 'rows': self.rows}, indent=1) + '\n')
        lines = [machine, '', '| checked | | seen |', '|---|---|---|']
        lines += [f'| {row["name"]} | {"pass" if row["passed"] else "**fail**"} | {row["figure"]} |'
                  for row in self.rows]
        path.with_suffix('.md').write_text('\n'.join(lines) + '\n')


# ----------------------------------------------------------------------------------------------------------
# Correctness

def largest(ours, theirs):
    """Largest absolute difference of two tensors, wherever they are."""
    return (ours.detach().cpu().double() - theirs.detach().cpu().double()).abs().max().item()


def relative(ours, theirs):
    """|ours - theirs| / |theirs| over all elements."""
    ours, theirs = (x.detach().cpu().double() for x in (ours, theirs))
    return ((ours - theirs).norm() / theirs.norm()).item()


@functools.lru_cache
def tiny_models():
    """A tiny DiT with random weights and a head that is not zero, and the committed VAE and reward model: on the CPU,
    in float32."""
    torch.manual_seed(0)
    dit = WanModel(CONFIGS['tiny'])
    torch.nn.init.normal_(dit.head.head.weight, std=0.05)
    return dit.eval(), load_vae(TINY), load_image_reward(TINY / 'reward_model')


def tiny_input(frames=9, batch=2):
    """(noise, clean latents, timesteps (B, F), context) on the CPU."""
    random = torch.Generator().manual_seed(1)
    x, clean = (torch.randn(batch, 16, frames, 8, 8, generator=random) for _ in range(2))
    t = torch.tensor([1000., 750., 500.] * 2).repeat_interleave(3)[:frames].expand(batch, frames)
    return x, clean, t, torch.randn(batch, 32, 64, generator=random)


def patterns(model, x, clean, t, context):
    """What the DiT makes of one input in each of its attention patterns."""
    yield model(x, t[:, 0], context)
    yield model(x, t, context, block_causal(CHUNKS))
    pair = interleave(x, clean, CHUNKS), interleave(t, 0 * t, CHUNKS)
    yield model(*pair, context, interleaved(CHUNKS))
    yield model(*pair, context, interleaved(CHUNKS, window=6, sink=1))


@torch.no_grad()
def dit_here(device):
    dit, inputs = tiny_models()[0], tiny_input()
    there = patterns(copy.deepcopy(dit).to(device), *(x.to(device) for x in inputs))
    return max(largest(a, b) for a, b in zip(there, patterns(dit, *inputs))), 1e-4


@torch.no_grad()
def vae_here(device):
    vae, video = tiny_models()[1], torch.rand(1, 3, 9, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    there, z = copy.deepcopy(vae).to(device), vae.encode(video)
    return max(largest(there.encode(video.to(device)), z), largest(there.decode(z.to(device)), vae.decode(z))), 1e-3


def text_here(device):
    prompts = ['a red striped circle moving left on a navy background', 'a blue plain square']
    return largest(load_text_encoder(TINY, device=device)(prompts), load_text_encoder(TINY)(prompts)), 1e-4


@torch.no_grad()
def reward_here(device):
    model, prompts = tiny_models()[2], ['a red circle', 'a blue square']
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return largest(copy.deepcopy(model).to(device).score(images.to(device), prompts), model.score(images, prompts)), 1e-3


def golden_model(name, make):
    with safe_open(GOLDEN / f'{name}_state_dict.safetensors', 'pt') as file:
        config = json.loads(file.metadata()['config'])
        return make(config, {key: file.get_tensor(key) for key in file.keys()}).eval().requires_grad_(False)


def golden_dit(device):
    """The public Self-Forcing code's tensors, by every pattern."""
    def make(config, state):
        sizes = {k: v for k, v in config.items() if k not in ('qk_norm', 'cross_attn_norm')}
        return load_exactly(WanModel(WanConfig(**sizes)), state, 'golden')
    g, model = load_file(GOLDEN / 'tensors.safetensors', str(device)), golden_model('dit', make).to(device)
    outs = list(patterns(model, g['x'], g['clean'], g['t_frames'], g['context']))
    error = max(largest(outs[1], g['block_causal.out']),
                largest(noisy_part(outs[2], CHUNKS), g['teacher_forcing.out']),
                largest(model(g['x'], g['t_batch'], g['context']), g['bidirectional.out']))
    return error, 1e-4


def golden_vae(device):
    def make(c, state):
        return load_exactly(WanVAE(c['dim'], c['z_dim'], c['dim_mult'], c['num_res_blocks'], c['temperal_downsample'],
                                   latent_mean=[0.] * 16, latent_std=[1.] * 16), state, 'golden')
    g, vae = load_file(GOLDEN / 'tensors.safetensors', str(device)), golden_model('vae', make).to(device)
    return max(largest(vae.encode(g['vae.video']), g['vae.latent']),
               largest(vae.decode(g['vae.latent']), g['vae.decoded'].clamp(-1, 1))), 1e-4


def golden_reward(device):
    """ImageReward's own score, and its gradient in the picture."""
    def make(config, state):
        model = ImageReward(**config)
        names = {ImageReward.published_key(key): key for key in model.state_dict()}
        model.load_state_dict({names[key]: value for key, value in state.items() if key in names})
        return model
    model = golden_model('imagereward', make).to(device)
    g = load_file(GOLDEN / 'imagereward_tensors.safetensors', str(device))
    image = g['image'].requires_grad_()
    reward = model(image, g['ids'], g['mask'])
    reward.sum().backward()
    return max(largest(reward, g['reward']), largest(image.grad, g['reward.grad_image'])), 1e-4


def flex_equals_rectangles(device, layout, heads, tokens, dim, dtype, bound):
    """Relative error of flex attention's output and gradients; rectangles are asked group by group by torch's own
    attention."""
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(1, heads, len(layout) * tokens, dim, device=device, dtype=dtype) for _ in range(4))
    parts = [x.requires_grad_() for x in (q, k, v)]
    outs = [attend(*parts, layout.visible, backend) for backend in ('flex', 'rectangles')]
    pairs = [outs, *zip(*(torch.autograd.grad(out, parts, g) for out in outs))]
    return max(relative(a, b) for a, b in pairs), bound


def cached_equals_interleaved(device, dtype, size='tiny', frames=9, height=8, width=8):
    """Relative error of a rollout's velocities with the cache against all of them by one interleaved forward."""
    config = bench.SIZES[size]
    torch.manual_seed(0)
    with torch.device(device):
        model = WanModel(config)
    torch.nn.init.normal_(model.head.head.weight, std=0.02)
    model = model.to(dtype).eval().requires_grad_(False)
    chunks, steps = [3] * (frames // 3), warped_steps()
    noise = torch.randn(1, 16, frames, height, width, device=device)
    context = torch.randn(1, config.text_len, config.text_dim, device=device)
    with torch.no_grad():
        parts = list(rollout(model, noise, context, steps, chunks, record=True))
        states, predicted, ends = (torch.cat([pick(part) for part in parts], dim=2) for pick in (
            lambda part: part.states[1], lambda part: part.predictions[1], lambda part: part.x0))
        t = torch.full((1, frames), steps[1], device=device)
        again = interleaved_x0(model, states, t, ends, context, chunks)
    error = relative(v_from_x0(states, again, t), v_from_x0(states, predicted, t))
    return error, 1e-4 if dtype == torch.float32 else 3e-2


@torch.no_grad()
def window_here(device):
    """A rolling window with a sink, chunk by chunk: the ring is overwritten."""
    dit, (noise, *_, context) = tiny_models()[0], tiny_input(15)

    def video(device):
        model, random = copy.deepcopy(dit).to(device), torch.Generator().manual_seed(3)
        chunks = rollout(model, noise.to(device), context.to(device), warped_steps(), [3] * 5, window=7, sink=1,
                         generator=random)
        return torch.cat([chunk.x0 for chunk in chunks], dim=2)
    return relative(video(device), video('cpu')), 1e-4


@torch.no_grad()
def compiled_here(device, dtype):
    """Two rollouts with different prompts, and their decoded videos, with compiled and recorded parts."""
    dit, vae = (copy.deepcopy(m).to(device, dtype) for m in tiny_models()[:2])
    noise, _, _, context = (x.to(device) for x in tiny_input(9, 2))

    def videos(model):
        for i in range(2):
            chunks = rollout(model, noise[:1], context[i:i + 1].to(dtype), warped_steps(), CHUNKS,
                             generator=torch.Generator().manual_seed(3))
            memory = {}
            yield torch.cat([vae.decode(chunk.x0, memory, at_once=3) for chunk in chunks], dim=2)
    plain = torch.cat(list(videos(dit)))
    try:
        compiled = torch.cat(list(videos(compile_for_inference(dit, vae))))
    finally:
        torch._dynamo.reset()
    return relative(compiled, plain), 1e-4 if dtype == torch.float32 else 5e-2


def losses(device):
    """Each stage's loss on the same fixed tensors: (name, function of the DiT)."""
    noise, clean, t, context = (x.to(device) for x in tiny_input())
    _, vae, judge = (copy.deepcopy(m).to(device) for m in tiny_models())
    weights, steps, prompts = chunk_weights(CHUNKS, -1).to(device), warped_steps(), ['a red circle', 'a blue square']

    def rolled(model):
        random = torch.Generator().manual_seed(3)
        parts = rollout(model, noise, context, steps, CHUNKS, exit_step=1, generator=random)
        return torch.cat([part.x0 for part in parts], dim=2)

    def reward(model):
        x0 = rolled(model)
        return -frame_reward(judge)(rewarded_video(vae, x0, [32]), prompts).mean()

    def policy(model):
        x0 = interleaved_x0(model, noise, t, clean, context, CHUNKS)
        mean, std, slope = consistency_kernel(noise, x0.detach(), 750, 500)
        return surrogate(x0, clean, mean, std, slope, torch.tensor([1., -1.], device=device), weights)
    return [
        ('ODE regression', lambda model: ode_init.regression_loss(
            x0_from_v(noise, model(noise, t, context, block_causal(CHUNKS)), t), clean, t)),
        ('critic, flow matching', lambda model: distill_dmd.flow_loss(model, clean, t[:, 3], context, noise)),
        ('DMD, Self Forcing', lambda model: distill_dmd.dmd_loss(rolled(model), clean.double())),
        ('DMD, RAVEN', lambda model: distill_dmd.dmd_loss(
            interleaved_x0(model, noise, t, clean, context, CHUNKS), clean.double(), weights)),
        ('reward forcing', reward), ('CM-GRPO', policy)]


def gradients_here(device, which):
    """Gradient of a loss in all weights of the DiT, on this device and on the CPU: relative error."""
    def gradient(device):
        model = copy.deepcopy(tiny_models()[0]).to(device)
        model.checkpointing = True
        losses(device)[which][1](model).backward()
        return torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
    return relative(gradient(device), gradient('cpu')), 1e-3


def correctness(report, full):
    """float32 here = on the CPU; full: also at the shapes of full size."""
    device = report.device
    cuda = device.type == 'cuda'

    def check(name, function, *args):
        report.check('correctness', name, lambda: function(*args))
    for name, function in (('DiT', dit_here), ('VAE', vae_here), ('UMT5', text_here), ('ImageReward', reward_here)):
        check(f'{name}, float32: here = CPU', function, device)
    for name, function in (('DiT', golden_dit), ('VAE', golden_vae), ('ImageReward', golden_reward)):
        check(f'{name} = the public code\'s tensors', function, device)
    if cuda:  # on a CPU flex attention has no backward
        shapes = [('small', [3] * 3, 2, 40, 64, torch.float32, 1e-3)]
        if full:
            shapes += [('81 frames at 480x832', [3] * 7, 12, 1560, 128, torch.bfloat16, 2e-2)]
        for words, chunks, *rest in shapes:
            for name, layout in (('block-causal', block_causal(chunks)), ('interleaved', interleaved(chunks))):
                check(f'flex = rectangles, with backward, {name}, {words}', flex_equals_rectangles, device, layout,
                      *rest)
    check('cached rollout = interleaved forward, float32', cached_equals_interleaved, device, torch.float32)
    check('the same in bfloat16', cached_equals_interleaved, device, torch.bfloat16)
    if full:
        check('the same, 1.3B, 81 frames', cached_equals_interleaved, device, torch.bfloat16, '1.3B', 21, 60, 104)
    check('rolling window with a sink: here = CPU', window_here, device)
    check('compiled = plain, float32', compiled_here, device, torch.float32)
    if cuda:
        check('compiled = plain, bfloat16', compiled_here, device, torch.bfloat16)
    for i, (name, _) in enumerate(losses('cpu')):
        check(f'gradient, {name}: here = CPU', gradients_here, device, i)


# ----------------------------------------------------------------------------------------------------------
# Stages

def run_script(*command, kill_after=None):
    """A script in a process of its own, killed once it has printed `kill_after`; its output."""
    with subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, env={**os.environ, 'PYTHONUNBUFFERED': '1'}) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if kill_after and kill_after in line:
                process.send_signal(signal.SIGKILL)
                return ''.join(lines)
    if process.returncode:
        said = [line.strip() for line in lines if 'rror' in line] or lines or ['no output']
        raise RuntimeError(f'exit code {process.returncode}: {said[-1]}')
    return ''.join(lines)


def tiny_stage(folder, device, line, name):
    """Two steps of a stage by its own command line, on tests/tiny, with the precision of this device."""
    out, began = folder / name, time.perf_counter()
    flags = ['--batch', 2, '--steps', 2, '--frames', 21, '--sample-every', 0, '--device', device.type, '--out', out]
    if name == 'reward_cm':
        flags += ['--group', 2, '--prompts-per-step', 1, '--frames', 5]
    run_script(*line.format(data=folder / 'data').split(), *flags)
    rows = [json.loads(row) for row in (out / 'metrics.jsonl').read_text().splitlines()]
    if len(rows) != 2 or not (out / 'model.safetensors').exists():
        raise RuntimeError(f'{out} holds {len(rows)} steps')
    return f'second step {rows[1]["seconds"]:.2f} s, {time.perf_counter() - began:.0f} s in all'


def kill_and_resume(folder, device):
    """Reward forcing, killed after two of four steps and resumed: its weights against those of a whole run."""
    flags = ['reward_forcing.py', '--batch', 1, '--frames', 21, '--steps', 4, '--save-every', 1, '--sample-every', 0,
             '--resume', '--device', device.type]
    run_script(*flags, '--out', folder / 'whole')
    run_script(*flags, '--out', folder / 'killed', kill_after='step      2')
    run_script(*flags, '--out', folder / 'killed')
    a, b = (load_file(folder / run / 'model.safetensors') for run in ('whole', 'killed'))
    start = load_file(TINY / 'ode.safetensors')
    moved = sum((a[key].double() - start[key].double()).square().sum().item() for key in a) ** 0.5
    apart = sum((a[key].double() - b[key].double()).square().sum().item() for key in a) ** 0.5
    return apart / moved, 0.0 if device.type == 'cpu' else 0.05  # a card's sums may differ from run to run


FULL = [  # name, module, flags
    ('ode_init.py train', 'ode_init', ['train']),
    ('reward_forcing.py', 'reward_forcing', []),
    ('distill_dmd.py', 'distill_dmd', ['--ratio', '1']),
    ('distill_dmd.py, self-forcing', 'distill_dmd', ['--ratio', '1', '--student', 'causal']),
    ('distill_dmd.py, raven', 'distill_dmd', ['--ratio', '1', '--student', 'causal', '--history', 'raven']),
    ('cm_grpo.py', 'cm_grpo', ['--group', '2', '--prompts-per-step', '1', '--rewards', 'imagereward', 'motion',
                               'smoothness']),
]


def full_stage(device, module, argv):
    """Two steps at 1.3B, 480x832, 81 frames; the seconds of the second."""
    torch.cuda.reset_peak_memory_stats()
    metrics = bench.random_stage(sys.modules[module], argv, {None: CONFIGS['1.3B']}, (480, 832, 81), 1, device)
    return f'{metrics[-1]["seconds"]:.1f} s a step, {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB'


def stages(report, folder):
    """Every stage on tests/tiny; they start together, as each waits for Python more than for the device."""
    device = report.device
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() // 2) as pool:
        runs = {}

        def start(name, *job):
            if report.only.search(name):
                runs[name] = pool.submit(*job)
        start('tiny: killed and resumed = whole run', kill_and_resume, folder, device)
        run_script('ode_init.py', 'sample', '--count', 2, '--frames', 21, '--steps', 4, '--device', device.type,
                   '--out', folder / 'data')  # which other stages read
        for name in bench.STAGES:
            line = bench.miniature.STAGES[name][0]
            start(f'tiny: {re.sub(" --(data|keep).*", "", line)}, 2 steps', tiny_stage, folder, device, line, name)
        for name, run in runs.items():
            report.check('stages', name, run.result)


def full_stages(report):
    """Every stage at full size with random weights."""
    for name, module, argv in FULL:
        report.check('full', f'1.3B, 480x832, 81 frames: {name}', lambda: full_stage(report.device, module, argv))


# ----------------------------------------------------------------------------------------------------------
# Speed

def attention_by_keys(timer, config, tokens, chunk, frames):
    """Seconds of one chunk's attention over each number of keys that a rollout has."""
    found = []
    for seen in range(chunk, frames + 1, chunk):
        q, k, v = (torch.randn(1, config.num_heads, n * tokens, config.dim // config.num_heads, device=timer.device,
                               dtype=timer.dtype) for n in (chunk, seen, seen))
        seconds = timer.seconds(lambda: attend(q, k, v))[0]
        work = 4 * chunk * seen * tokens ** 2 * config.dim
        found.append(f'{1e3 * seconds:.2f} ms ({work / seconds / 1e12:.0f})')
    return ', '.join(found) + ' (TFLOP/s)'


def speed(report, timer, arguments):
    size = arguments.size
    height, width, frames = bench.picture(arguments)
    report.check('speed', 'attention of a chunk over the keys of a rollout', lambda: attention_by_keys(
        timer, bench.SIZES[size], height * width // 256, 3, 1 + (frames - 1) // 4))
    for compiled in (False, True):
        arguments.compile, words = compiled, f'{size}{", compiled" * compiled}'
        report.table('speed', f'generate {words}', lambda: bench.generate(arguments, timer))
        torch._dynamo.reset()
    if importlib.util.find_spec('diffusers'):  # a requirement of the tests alone
        once = copy.copy(timer)
        once.repeats = 1  # recomputing whole sequences takes half a minute at 1.3B
        arguments.compile = False
        report.table('speed', f'peers {size}', lambda: bench.peers(arguments, once))


def check(arguments):
    """All parts that --parts names; exit code 1 if a row failed."""
    began = time.perf_counter()
    timer = bench.Bench(arguments)
    full = timer.cuda and torch.cuda.get_device_properties(timer.device).total_memory > 40e9
    arguments.size = '1.3B' if full else 'tiny'
    report, out = Report(timer.device, arguments.only), Path(arguments.out)
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.parts:
            torch.backends.cudnn.allow_tf32 = part != 'correctness'  # there float32 means float32
            if part == 'correctness':
                correctness(report, full)
            elif part == 'stages':
                stages(report, Path(folder))
            elif part == 'full' and full:
                full_stages(report)
            elif part == 'speed':
                speed(report, timer, arguments)
            report.write(out, timer.name)  # after every part: what was seen stays
    failed = [row['name'] for row in report.rows if not row['passed']]
    print(f'{len(report.rows) - len(failed)} of {len(report.rows)} passed in {time.perf_counter() - began:.0f} s; '
          f'{out} and {out.with_suffix(".md")} hold the table')
    return 1 if failed else 0

"""Both papers in miniature: every stage through its own command line, in the tiny world, on a laptop's CPU.

    python tests/miniature.py                   # everything; a killed run goes on where it was
    python tests/miniature.py ode reward        # what these runs need, and these
    python tests/miniature.py --fast            # every stage for a few steps: shows that it runs, proves nothing

Each stage leaves RUNS/<name>-<seed>/model.safetensors; what it shows of held-out captions goes to RUNS/results.json and
RUNS/drift.json (`tests/tiny_world.py compare` and `drift`). At the end the tables of both and of the papers' claims are
printed, and drawn: claims.svg, curves.svg (rewards of CM-GRPO), generators.mp4 (a column for each run).
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import tiny_world  # noqa: E402

# run: (script and flags, the runs whose weights it starts from, seeds without --seeds: two of the papers' own methods,
# for a spread). {data} is the folder of the trajectories. What all share is in tests/tiny/defaults.json.
STAGES = {
    'student': ('distill_dmd.py', None, 1),
    'ode': ('ode_init.py train --data {data}', 'student', 1),
    'reward': ('reward_forcing.py --keep-every 50', 'ode', 2),
    'reward_random': ('reward_forcing.py --reward-frames random', 'ode', 1),
    'reward_all': ('reward_forcing.py --reward-frames all --batch 2', 'ode', 1),  # 57 decoded frames each cost enough
    'raven': ('distill_dmd.py --student causal --history raven', 'ode', 2),
    'self_forcing': ('distill_dmd.py --student causal --history self-forcing', 'ode', 1),
    'causvid': ('distill_dmd.py --student causal --history diffusion-forcing --data {data}', 'ode', 1),
    'teacher_forcing': ('distill_dmd.py --student causal --history teacher-forcing --data {data}', 'ode', 1),
    'raven_uniform': ('distill_dmd.py --student causal --history raven --chunk-weight-shift 0', 'ode', 1),
    'distill_reward': ('distill_dmd.py --student causal --history self-forcing --reward-weight 1', 'ode', 1),
    'raven_cm': ('cm_grpo.py --steps 180 --save-every 45 --keep-every 45', 'raven', 2),
    'reward_cm': ('cm_grpo.py', 'reward', 1),
    'reward_em': ('cm_grpo.py --policy em', 'reward', 1),
}
ONCE = ('student', 'ode')  # whatever --seeds says: all others start from them
KEPT = {'reward': (50, 100), 'raven_cm': (45,)}  # are also measured as they were after these steps
FRAME_WISE = ('raven', 'reward')  # are also measured with chunks of one latent frame, as CM-GRPO trains them here
LONG = ('ode', 'reward', 'raven', 'self_forcing', 'causvid', 'teacher_forcing', 'raven_uniform', 'distill_reward')
# LONG are also measured over rollouts three times as long as in training.

CLAIMS = [  # what the papers say: (words, left figure, right figure, factor): left > factor x right
    ('ODE only has the motion (4-step student)', 'ode path', 'student path', 0.9),
    ('ODE only lacks the texture', 'student texture_correlation', 'ode texture_correlation', 1),
    ('reward forcing brings the texture', 'reward texture_correlation', 'ode texture_correlation', 1),
    ('reward forcing raises the reward of all frames', 'reward reward', 'ode reward', 1),
    ('reward forcing keeps the motion', 'reward path', 'ode path', 0.9),
    ('a random frame instead of the last one costs motion', 'reward path', 'reward_random path', 1),
    ('all frames cost motion', 'reward path', 'reward_all path', 1),
    ('reward forcing beats reward + distillation', 'reward reward', 'distill_reward reward', 1),
    ('RAVEN is better than Self Forcing', 'raven reward', 'self_forcing reward', 1),
    ('also late in a long video (our question: the paper has none)', 'raven last_reward', 'self_forcing last_reward', 1),
    ('Self Forcing is better than CausVid', 'self_forcing reward', 'causvid reward', 1),
    ('later chunks weighted more help', 'raven last_reward', 'raven_uniform last_reward', 1),
    ('CM-GRPO raises the reward of RAVEN', 'raven_cm reward', 'raven_chunk1 reward', 1),
    ('CM-GRPO raises the reward of reward forcing', 'reward_cm reward', 'reward_chunk1 reward', 1),
    ('CM-GRPO keeps the motion', 'raven_cm path', 'raven_chunk1 path', 0.9),
    ('the consistency kernel learns more than Euler-Maruyama', 'reward_cm reward', 'reward_em reward', 1),
]


def claims(runs):
    """Of each claim what was measured: (words, left figure, its values over the seeds, right figure, its values,
    factor, spread, verdict). spread: the largest standard deviation of that measurement over the seeds of any run; a
    smaller difference is unclear, and so is every one while no run has two seeds (spread None)."""
    files = [json.loads(f.read_text()) if f.exists() else {} for f in (runs / 'results.json', runs / 'drift.json')]
    results, drift = map(tiny_world.by_run, files)

    def figures(figure):  # 'run measurement' -> its values over the seeds that are there, and its spread
        run, key = figure.split()
        measured = drift if key.startswith('last_') else results
        values = {name: [row[key] for row in rows] for name, rows in measured.items() if key in rows[0]}
        return values.get(run, []), max((statistics.stdev(v) for v in values.values() if len(v) > 1), default=None)
    for words, left, right, factor in CLAIMS:
        (a, spread), (b, _) = figures(left), figures(right)
        if a and b:
            gap = statistics.mean(a) - factor * statistics.mean(b)
            verdict = 'unclear' if spread is None or abs(gap) < spread else 'yes' if gap > 0 else 'no'
            yield words, left, a, right, b, factor, spread, verdict


def claims_table(runs):
    """The papers' claims beside what was measured, as Markdown."""
    lines = ['| the papers say | measured | holds |', '|---|---|---|']
    for words, left, a, right, b, factor, spread, verdict in claims(runs):
        times = '' if factor == 1 else f'{factor} × '
        known = 'no spread' if spread is None else f'spread {spread:.2f}'
        lines.append(f'| {words} | {left} {statistics.mean(a):.2f} against {times}{right} {statistics.mean(b):.2f} '
                     f'({known}, {len(a)} and {len(b)} seeds) | {verdict} |')
    return '\n'.join(lines)


def draw_claims(path, rows, width=760, line=24):
    """`claims` as an SVG: for each a bar of what is claimed to be larger, the line being what it is compared with."""
    colours = {'yes': '#2a8f4a', 'no': '#d1541f', 'unclear': '#999'}
    height, zero, unit = line * len(rows) + 40, 500, 150  # the line's place; pixels per 100 %
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
             f'font-size="12"><rect width="100%" height="100%" fill="white"/>']
    for i, (words, _, a, _, b, factor, spread, verdict) in enumerate(rows):
        scale = abs(factor * statistics.mean(b)) or 1
        gap = unit * (statistics.mean(a) - factor * statistics.mean(b)) / scale
        gap, error, y = max(-unit, min(gap, 1.4 * unit)), unit * (spread or 0) / scale, 20 + line * i
        parts.append(f'<text x="8" y="{y + 12}">{words}</text>'
                     f'<rect x="{zero + min(gap, 0):.1f}" y="{y}" width="{abs(gap):.1f}" height="16" '
                     f'fill="{colours[verdict]}"><title>{verdict}</title></rect>'
                     f'<path d="M{zero + gap - error:.1f} {y + 8}h{2 * error:.1f}" stroke="black"/>')
    parts.append(f'<path d="M{zero} 10V{height - 24}" stroke="black"/><text x="{width - 8}" y="{height - 8}" '
                 'text-anchor="end">to the right: as the papers say; green yes, red no, grey unclear</text></svg>')
    path.write_text('\n'.join(parts) + '\n')


def plan(runs, names, fast, seeds):
    """Jobs in order: {name: (command, the jobs before it)}. Every stage's run is followed by its measurements."""
    wanted = set(names or STAGES)
    for name in reversed(STAGES):  # and what they start from
        if name in wanted and STAGES[name][1]:
            wanted.add(STAGES[name][1])
    short = ['--steps', '2', '--batch', '1'] if fast else []
    data, count = runs / 'trajectories', ['--count', '2'] if fast else []
    measured = ['--results', str(runs), '--count', '2' if fast else '100']
    measured_long = ['--results', str(runs), *count]
    jobs = {'trajectories': (['ode_init.py', 'sample', '--out', str(data), *count], [])}
    number = {name: 1 if fast or name in ONCE else seeds or STAGES[name][2] for name in STAGES}
    for name in (name for name in STAGES if name in wanted):
        line, start, _ = STAGES[name]
        for seed in range(number[name]):
            out, needs = runs / f'{name}-{seed}', []
            command = [*line.format(data=data).split(), '--out', str(out), '--seed', str(seed), '--resume', *short]
            if fast and line.startswith('cm_grpo.py'):
                command += ['--group', '2', '--prompts-per-step', '1']
            if start:
                before = f'{start}-{seed % number[start]}'
                command += ['--init', str(runs / before / 'model.safetensors')]
                needs.append(before)
            jobs[out.name] = (command, needs + (['trajectories'] if '{data}' in line else []))
            file = str(out / 'model.safetensors')
            jobs[f'{out.name} compare'] = (['tests/tiny_world.py', 'compare', file, *measured], [out.name])
            for step in () if fast else KEPT.get(name, ()):
                early = str(out / f'model_{step:06d}.safetensors')
                jobs[f'{out.name} step {step} compare'] = (
                    ['tests/tiny_world.py', 'compare', early, *measured], [out.name])
            if name in FRAME_WISE:
                jobs[f'{out.name} chunk 1 compare'] = (
                    ['tests/tiny_world.py', 'compare', file, '--chunk', '1', *measured], [out.name])
            if name == 'student' and not fast:  # here, since the first runs are waited for
                jobs['teacher compare'] = (['tests/tiny_world.py', 'compare', 'teacher', *measured], [])
            if name in LONG:
                jobs[f'{out.name} drift'] = (['tests/tiny_world.py', 'drift', file, *measured_long], [out.name])
    first = [name for name in jobs if name.endswith('-0')]
    files = [str(runs / name / 'model.safetensors') for name in first]
    jobs[f'video of {len(first)} runs'] = (
        ['tests/tiny_world.py', 'picture', *files, '--to', str(runs / 'generators.mp4'),
         '--captions', '1' if fast else '4'], first)
    return jobs


def execute(jobs, runs, at_once):
    """Run the jobs, `at_once` of them side by side, each on one thread; a failure stops everything with its log."""
    done = {name for name in jobs if (runs / f'logs/{name}.done').exists()}
    left, lock, failed = [name for name in jobs if name not in done], threading.Condition(), []
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE'}
    (runs / 'logs').mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(jobs), initial=len(done), desc='miniature', unit='job')

    def worker():
        while True:
            with lock:
                while left and not failed and not (ready := [n for n in left if set(jobs[n][1]) <= done]):
                    lock.wait()
                if not left or failed:
                    return
                name = min(ready, key=lambda n: n.endswith((' compare', ' drift')))  # what others wait for comes first
                left.remove(name)
                bar.set_postfix_str(name)
            command, log = jobs[name][0], runs / f'logs/{name}.log'
            if command[0] != 'tests/tiny_world.py':
                command = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=1', *command]
            began = time.monotonic()
            with open(log, 'w') as file:
                code = subprocess.run([sys.executable, *command], cwd=HERE.parent, env=environment, stdout=file,
                                      stderr=subprocess.STDOUT).returncode
            with lock:
                if code:
                    failed.append(f'{name} failed, exit code {code}; its messages are in {log}')
                else:
                    log.with_suffix('.done').write_text(f'{time.monotonic() - began:.0f} seconds\n')
                    done.add(name)
                    bar.update()
                lock.notify_all()

    threads = [threading.Thread(target=worker) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bar.close()
    if failed:
        sys.exit(f'error: {failed[0]}')


def read_curves(runs, name, key, window):
    """Moving averages of a logged number over the seeds of a run: (seeds, steps - window + 1)."""
    rows = [[json.loads(line)[key] for line in file.read_text().splitlines()]
            for file in sorted(runs.glob(f'{name}-[0-9]/metrics.jsonl'))]
    steps = min(map(len, rows))
    return torch.tensor([row[:steps] for row in rows]).unfold(1, min(window, steps), 1).mean(2)


def draw_curves(path, curves, title, width=640, height=300):
    """{name: (seeds, steps)} as an SVG: the mean of each, and a band from the lowest to the highest seed."""
    colours = ('#1f6fb4', '#d1541f', '#2a8f4a', '#8a4fb0')
    low, high = min(c.min().item() for c in curves.values()), max(c.max().item() for c in curves.values())
    longest = max(c.shape[1] for c in curves.values()) - 1

    def y_of(value):
        return height - 30 - (height - 60) * (value - low) / max(high - low, 1e-9)

    def points(values):
        return [f'{50 + (width - 60) * i / max(longest, 1):.1f},{y_of(v):.1f}' for i, v in enumerate(values.tolist())]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
             f'font-size="12"><rect width="100%" height="100%" fill="white"/><text x="50" y="18">{title}</text>']
    for value in (low, (low + high) / 2, high):
        parts.append(f'<text x="8" y="{y_of(value) + 4:.1f}">{value:.2f}</text>'
                     f'<path d="M50 {y_of(value):.1f}H{width - 10}" stroke="#ddd"/>')
    parts.append(f'<text x="{width - 10}" y="{height - 10}" text-anchor="end">step {longest}</text>')
    for i, ((name, curve), colour) in enumerate(zip(curves.items(), colours)):
        band = ' '.join(points(curve.amin(0)) + points(curve.amax(0))[::-1])
        parts.append(f'<polygon points="{band}" fill="{colour}" opacity="0.2"/><polyline '
                     f'points="{" ".join(points(curve.mean(0)))}" fill="none" stroke="{colour}" stroke-width="2"/>'
                     f'<text x="{60 + 150 * i}" y="{height - 10}" fill="{colour}">{name}</text>')
    path.write_text('\n'.join([*parts, '</svg>']) + '\n')


def main():
    p = argparse.ArgumentParser(description='All stages of both papers in the tiny world, one after the other.')
    p.add_argument('names', nargs='*', metavar='RUN', help=f'only these of {", ".join(STAGES)}, and what they need')
    p.add_argument('--runs', type=Path, help='the folder of all runs (default: runs/miniature, or runs/miniature_fast)')
    p.add_argument('--seeds', type=int, help='seeds of each but student and ode (default: one, or two where it counts)')
    p.add_argument('--jobs', type=int, default=2, help='stages side by side, each on one thread')
    p.add_argument('--fast', action='store_true', help='a few steps of each stage')
    args = p.parse_args()
    if unknown := [name for name in args.names if name not in STAGES]:
        p.error(f'no run {unknown[0]}: the runs are {", ".join(STAGES)}')
    runs = (args.runs or Path('runs/miniature_fast' if args.fast else 'runs/miniature')).resolve()
    jobs = plan(runs, args.names, args.fast, args.seeds)
    execute(jobs, runs, args.jobs)
    minutes = sum(int((runs / f'logs/{name}.done').read_text().split()[0]) for name in jobs) / 60
    print(f'{len(jobs)} jobs of {minutes:.0f} minutes together, {minutes / args.jobs:.0f} with {args.jobs} at a time\n')
    for file, columns in (('results.json', tiny_world.RESULTS), ('drift.json', tiny_world.DRIFT)):
        if (runs / file).exists():
            print(tiny_world.results_table(json.loads((runs / file).read_text()), columns), '\n')
    print(claims_table(runs))
    draw_claims(runs / 'claims.svg', list(claims(runs)))
    curves = {name: read_curves(runs, name, 'reward_imagereward', 20) for name in ('raven_cm', 'reward_cm', 'reward_em')
              if (runs / f'{name}-0/metrics.jsonl').exists()}
    if curves:
        draw_curves(runs / 'curves.svg', curves, 'Reward of the rollouts (mean of 20 steps), lowest to highest seed')


if __name__ == '__main__':
    main()

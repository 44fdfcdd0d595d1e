"""Both papers in miniature: every stage through its own command line, in the tiny world, on a laptop's CPU.

    python tests/miniature.py                   # everything; a killed run goes on where it was
    python tests/miniature.py ode reward        # what these runs need, and these
    python tests/miniature.py --fast            # every stage for a few steps: shows that it runs, proves nothing
    python tests/miniature.py --draw tests/tiny # no runs: the tables and pictures again, of the figures kept there

Each stage leaves RUNS/<name>-<seed>/model.safetensors; what it shows of held-out captions goes to RUNS/results.json and
RUNS/drift.json (`tests/tiny_world.py compare` and `drift`), the rewards during CM-GRPO to RUNS/curves.json. At the end
the tables and the papers' claims are printed, and drawn: claims.png, curves.png, generators.mp4 (a row for each run).
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
from matplotlib.figure import Figure  # here, so that it is missed before the hours of running, not after
from matplotlib.patches import Patch
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


COLOURS = {'yes': '#2a8f4a', 'unclear': '#999999', 'no': '#d1541f'}  # of a verdict
VERDICTS = {'yes': 'holds', 'unclear': 'is unclear: less than the spread', 'no': 'does not hold'}
WINDOW = 20  # steps that each point of a curve is the mean of
MEASURES = {'path': 'pixels per frame', 'reward': 'reward', 'texture_correlation': 'texture correlation',
            'last_reward': 'reward, last third'}


def claim_bars(rows):
    """`claims` as what is drawn of them: [(words, what is compared, bar, half its interval, both figures, verdict)].

    The bar is by how much the left figure is above what it is compared with, as a share of that, and at most from -1 to
    1.5; its interval is the spread to either side.
    """
    bars = []
    for words, left, a, right, b, factor, spread, verdict in rows:
        (run, measure), (other, _) = left.split(), right.split()
        compared = f'{MEASURES[measure]}: {tiny_world.WORDS[run]} against {tiny_world.WORDS[other]}'
        ours, theirs = statistics.mean(a), statistics.mean(b)
        unit, times = abs(factor * theirs) or 1, '' if factor == 1 else f'{factor} × '
        bars.append((words, compared, max(-1, min((ours - factor * theirs) / unit, 1.5)), (spread or 0) / unit,
                     f'{ours:.2f} against {times}{theirs:.2f}', verdict))
    return bars


def draw_claims(path, bars):
    """`claim_bars` as a picture: each claim and what is compared for it, a bar from the line of no difference, and at
    its end both figures."""
    figure = Figure(figsize=(10, 1.2 + 0.42 * len(bars)), dpi=100, layout='constrained')
    axes = figure.subplots()
    for place, (words, compared, length, error, figures, verdict) in enumerate(bars):
        axes.barh(place, length, 0.6, color=COLOURS[verdict])
        axes.errorbar(length, place, xerr=error, ecolor='black', elinewidth=1, capsize=2)
        axes.text(max(0, length + error) + 0.02, place, figures, va='center', fontsize=10)
        for text, side, style in ((words, 'bottom', {'fontsize': 10}),
                                  (compared, 'top', {'fontsize': 8, 'color': '#666666'})):
            axes.text(-0.01, place, text, ha='right', va=side, transform=axes.get_yaxis_transform(), **style)
    low, high = (f(0, *(f(b[2] - b[3], b[2] + b[3]) for b in bars)) for f in (min, max))
    axes.set_xlim(low - 0.05, high + 0.45)  # room for the figures
    axes.set_xticks([share / 4 for share in range(-4, 7) if low <= share / 4 <= high])
    axes.xaxis.set_major_formatter(lambda share, _: f'{100 * share:+.0f} %' if share else 'equal')
    axes.set_ylim(len(bars) - 0.4, -0.6)  # the first claim on top
    axes.set_yticks([])
    axes.axvline(0, color='black', linewidth=1)
    axes.spines[['top', 'right', 'left']].set_visible(False)
    figure.supxlabel('bar: how much larger the first is than the second; line: the spread over seeds', fontsize=10)
    figure.legend([Patch(color=colour) for colour in COLOURS.values()],
                  [f'the claim {VERDICTS[verdict]}' for verdict in COLOURS],
                  loc='outside upper center', ncols=3, frameon=False)
    figure.savefig(path)
    return figure


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


def curve_bands(curves):
    """{run: (seeds, steps)} as what is kept and drawn: {run: {mean, lowest, highest: a number for each step}}."""
    return {name: {key: [round(value, 4) for value in line.tolist()] for key, line in
                   (('mean', curve.mean(0)), ('lowest', curve.amin(0)), ('highest', curve.amax(0)))}
            for name, curve in curves.items()}


def draw_curves(path, bands, window):
    """`curve_bands` as a picture: each run's mean as a line, in a band from its lowest to its highest seed."""
    figure = Figure(figsize=(8, 4), dpi=100, layout='constrained')
    axes = figure.subplots()
    for (name, band), colour in zip(bands.items(), ('#1f6fb4', '#d1541f', '#2a8f4a', '#8a4fb0')):
        steps = range(len(band['mean']))
        axes.fill_between(steps, band['lowest'], band['highest'], color=colour, alpha=0.2, linewidth=0)
        axes.plot(steps, band['mean'], color=colour, linewidth=2, label=tiny_world.WORDS.get(name, name))
    axes.set_xlabel(f'training step (each point: the mean of {window} steps from there)')
    axes.set_ylabel('reward of the training rollouts')
    axes.grid(color='#dddddd')
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(loc='lower right', title='line: mean, band: lowest to highest seed', frameon=False)
    figure.savefig(path)
    return figure


def report(figures, pictures):
    """Print the tables of the figures in a folder, and draw the claims and curves into the folder `pictures`."""
    for file, columns in (('results.json', tiny_world.RESULTS), ('drift.json', tiny_world.DRIFT)):
        if (figures / file).exists():
            print(tiny_world.results_table(json.loads((figures / file).read_text()), columns), '\n')
    print(claims_table(figures))
    if bars := claim_bars(claims(figures)):
        draw_claims(pictures / 'claims.png', bars)
    if (figures / 'curves.json').exists():
        draw_curves(pictures / 'curves.png', json.loads((figures / 'curves.json').read_text()), WINDOW)


def main():
    p = argparse.ArgumentParser(description='All stages of both papers in the tiny world, one after the other.')
    p.add_argument('names', nargs='*', metavar='RUN', help=f'only these of {", ".join(STAGES)}, and what they need')
    p.add_argument('--runs', type=Path, help='the folder of all runs (default: runs/miniature, or runs/miniature_fast)')
    p.add_argument('--seeds', type=int, help='seeds of each but student and ode (default: one, or two where it counts)')
    p.add_argument('--jobs', type=int, default=2, help='stages side by side, each on one thread')
    p.add_argument('--fast', action='store_true', help='a few steps of each stage')
    p.add_argument('--draw', type=Path, metavar='FOLDER',
                   help='no runs: print the tables of the figures in FOLDER and draw them into tests/')
    args = p.parse_args()
    if args.draw:
        return report(args.draw, HERE)
    if unknown := [name for name in args.names if name not in STAGES]:
        p.error(f'no run {unknown[0]}: the runs are {", ".join(STAGES)}')
    runs = (args.runs or Path('runs/miniature_fast' if args.fast else 'runs/miniature')).resolve()
    jobs = plan(runs, args.names, args.fast, args.seeds)
    execute(jobs, runs, args.jobs)
    minutes = sum(int((runs / f'logs/{name}.done').read_text().split()[0]) for name in jobs) / 60
    print(f'{len(jobs)} jobs of {minutes:.0f} minutes together, {minutes / args.jobs:.0f} with {args.jobs} at a time\n')
    curves = {name: read_curves(runs, name, 'reward_imagereward', WINDOW) for name in
              ('raven_cm', 'reward_cm', 'reward_em') if (runs / f'{name}-0/metrics.jsonl').exists()}
    if curves:
        (runs / 'curves.json').write_text(json.dumps(curve_bands(curves)) + '\n')
    report(runs, runs)


if __name__ == '__main__':
    main()

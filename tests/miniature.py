"""Both papers in miniature: every stage through its own command line, in the tiny world, on a laptop's CPU.

    python tests/miniature.py                   # everything; a killed run goes on where it was
    python tests/miniature.py ode reward        # what these runs need, and these
    python tests/miniature.py --seeds 2 3       # these seeds only; another machine's figures.safetensors in RUNS is added to
    python tests/miniature.py --fast            # every stage for a few steps: shows that it runs, proves nothing
    python tests/miniature.py --draw tests/tiny # no runs: the tables and pictures again, of the figures kept there

Each stage leaves RUNS/<name>-<seed>/model.safetensors; what it shows of held-out captions goes to RUNS/measured
(`tests/tiny_world.py compare` and `over_time`), all of that together to RUNS/figures.safetensors, and the rewards during
CM-GRPO to RUNS/curves.json. At the end the tables and the papers' claims are printed, and drawn: claims.png, over_time.png,
trades.png, curves.png, generators.mp4 (a row for each run). How a claim is decided: RULE below.
"""
import argparse
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure  # here, so that it is missed before the hours of running, not after
from matplotlib.patches import Patch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import tiny_world  # noqa: E402

# run: (script and flags, the run whose weights it starts from, seeds without --seeds: four of what a claim compares).
# Seed s starts from its start's seed s, but from the student's 0. {data} is the folder of the trajectories. What all
# share is in tests/tiny/defaults.json; *_frame: chunks of one latent frame, in every stage from ode_frame on.
CAUSAL = 'distill_dmd.py --student causal --history'
STAGES = {
    'student': ('distill_dmd.py', None, 4),
    'ode': ('ode_init.py train --data {data}', 'student', 4),
    'ode_frame': ('ode_init.py train --data {data} --chunk 1', 'student', 4),
    'reward': ('reward_forcing.py --keep-every 50', 'ode', 4),
    'reward_frame': ('reward_forcing.py', 'ode_frame', 4),
    'raven': (f'{CAUSAL} raven', 'ode', 4),
    'raven_frame': (f'{CAUSAL} raven', 'ode_frame', 4),
    'self_forcing': (f'{CAUSAL} self-forcing', 'ode', 4),
    'self_forcing_frame': (f'{CAUSAL} self-forcing', 'ode_frame', 4),
    'causvid': (f'{CAUSAL} diffusion-forcing --data {{data}}', 'ode', 4),
    'causvid_frame': (f'{CAUSAL} diffusion-forcing --data {{data}}', 'ode_frame', 4),
    'raven_cm': ('cm_grpo.py', 'raven_frame', 4),
    'reward_cm': ('cm_grpo.py', 'reward_frame', 4),
    'reward_em': ('cm_grpo.py --policy em', 'reward_frame', 4),
    'raven_uniform': (f'{CAUSAL} raven --chunk-weight-shift 0', 'ode', 4),
    'distill_reward': (f'{CAUSAL} self-forcing --reward-weight 1', 'ode', 4),
    'reward_random': ('reward_forcing.py --reward-frames random --keep-every 50', 'ode', 4),
    'reward_all': ('reward_forcing.py --reward-frames all --batch 2 --keep-every 50', 'ode', 4),  # 57 frames cost enough
    'reward_exact': ('reward_forcing.py --reward-past all --keep-every 50', 'ode', 1),
    'reward_random_exact': ('reward_forcing.py --reward-frames random --reward-past all --keep-every 50', 'ode', 1),
    'teacher_forcing': (f'{CAUSAL} teacher-forcing --data {{data}}', 'ode', 1),
}
KEPT = (50, 100, 150)  # what has --keep-every is also measured as it was after these steps
COUNT, COUNT_KEPT = 200, 100  # samples: each held-out caption once; of a run on its way
COUNT_LONG, COUNT_LATE = 24, 100  # samples over time: of most runs; of those whose late reward a claim compares
LONG = 90  # latent frames of a rollout over time: six times the trained length

# What the papers say: (words, left run, right run, measurement, what is claimed of left and right, the paper's figure).
# VBench: total score, or its dynamic degree; VLM: RAVEN's judge of motion. RF: Reward-Forcing.
CLAIMS = [
    ('ODE only has the motion', 'ode', 'student', 'path', 'keeps', 'RF: figure 3, no number'),
    ('ODE only lacks the texture', 'student', 'ode', 'texture_correlation', 'more', 'RF, VBench: ODE only 68.77'),
    ('reward forcing brings the texture', 'reward', 'ode', 'texture_correlation', 'more', 'RF, VBench: 84.92 against 68.77'),
    ('the same frame by frame', 'reward_frame', 'ode_frame', 'texture_correlation', 'more', 'RF: –'),
    ('reward forcing raises the reward of all frames', 'reward', 'ode', 'reward', 'more', 'RF: –'),
    ('the same frame by frame', 'reward_frame', 'ode_frame', 'reward', 'more', 'RF: –'),
    ('reward forcing keeps the motion', 'reward', 'ode', 'path', 'keeps', 'RF, dynamic degree: 81.94, Self Forcing 72.22'),
    ('the same frame by frame', 'reward_frame', 'ode_frame', 'path', 'keeps', 'RF: –'),
    ('a random frame instead of the last one costs motion', 'reward', 'reward_random', 'path', 'more',
     'RF: dynamic degree falls by more than 10 points'),
    ('all frames cost motion', 'reward', 'reward_all', 'path', 'more', 'RF: "static content", no number'),
    ('reward forcing beats reward + distillation', 'reward', 'distill_reward', 'reward', 'more',
     'RF, VBench: 84.92 against 82.55'),
    ('RAVEN is better than Self Forcing', 'raven', 'self_forcing', 'reward', 'more', 'RAVEN, VBench: 85.15 against 84.27'),
    ('the same frame by frame', 'raven_frame', 'self_forcing_frame', 'reward', 'more', 'RAVEN: –'),
    ('RAVEN moves more than Self Forcing', 'raven', 'self_forcing', 'path', 'more', 'RAVEN, VLM: 2.951 against 2.543'),
    ('the same frame by frame', 'raven_frame', 'self_forcing_frame', 'path', 'more', 'RAVEN: –'),
    ('RAVEN is better late in a long video', 'raven', 'self_forcing', 'late_reward', 'more',
     'our question: RAVEN has no number'),
    ('the same frame by frame', 'raven_frame', 'self_forcing_frame', 'late_reward', 'more', 'our question'),
    ('Self Forcing is better than CausVid', 'self_forcing', 'causvid', 'reward', 'more', 'RF, VBench: 84.31 against 81.20'),
    ('the same frame by frame', 'self_forcing_frame', 'causvid_frame', 'reward', 'more', 'RF, VBench: 84.26 against 81.20'),
    ('Self Forcing frame by frame is as good as in chunks', 'self_forcing_frame', 'self_forcing', 'reward', 'keeps',
     'RF, VBench: 84.26 against 84.31'),
    ('later chunks weighted more help', 'raven', 'raven_uniform', 'reward', 'more', 'RAVEN, VBench: 85.15 against 83.82'),
    ('CM-GRPO raises the reward of RAVEN', 'raven_cm', 'raven_frame', 'reward', 'more', 'RAVEN, VBench: 85.46 against 85.15'),
    ('CM-GRPO raises the reward of reward forcing', 'reward_cm', 'reward_frame', 'reward', 'more',
     'our question (RAVEN: Causal Forcing 85.08, 84.96 before)'),
    ('CM-GRPO keeps the motion', 'raven_cm', 'raven_frame', 'path', 'keeps', 'RAVEN, VLM: 2.962 against 2.951'),
    ('the consistency kernel learns more than Euler-Maruyama', 'reward_cm', 'reward_em', 'reward', 'more',
     'RAVEN, VBench: 85.46 against 85.03 to 85.27'),
]
RULE = """\
Written before the runs. Difference: left minus right, the mean over seeds and samples; every generator has the same captions
and noise. Its interval, 95 %: t sqrt(s^2 (1/n + 1/m) + v), with n and m seeds; s the standard deviation of a measurement
over the seeds of a run, pooled over all runs, which give t its degrees of freedom; v the variance of the mean over captions
of the difference caption by caption, itself the mean over seeds. A size that matters, for each measurement: half of what
ODE only lacks to the teacher (mean of chunk-wise and frame by frame), and nothing else. "more" is yes above 0, no below;
"keeps" is yes above minus that size, no below. Where the interval holds both, it is an answer if it reaches no further than
that size to either side of its middle: no difference larger than what it reaches to. Else it is unclear."""
MEASUREMENTS = {'reward': 'reward', 'texture_correlation': 'texture correlation', 'path': 'pixels per frame',
                'flicker': 'flicker', 'late_reward': 'reward, late'}  # what they are called
COLOURS = {'yes': '#2a8f4a', 'alike': '#1f6fb4', 'no': '#d1541f', 'unclear': '#999999'}  # of a verdict
VERDICTS = {'yes': 'yes', 'alike': 'no difference larger than what the line reaches to', 'no': 'no', 'unclear': 'unclear'}


# ------------------------------------------------------------------------------------------ figures and verdicts

def gather(runs):
    """All that was measured (RUNS/measured) in one file, RUNS/figures.safetensors: <label>/<measurement>. What is there
    already stays, so that another machine's figures, copied there before, and these become one."""
    file = runs / 'figures.safetensors'
    together = load_file(file) if file.exists() else {}
    for measured in sorted((runs / 'measured').glob('*.safetensors')):
        together |= {f'{measured.name.split(".")[0]}/{key}': value for key, value in load_file(measured).items()}
    tiny_world.replace_file(file, lambda temporary: save_file(together, temporary))


def read_figures(folder):
    """{run: {measurement: {seed: a number for each sample, or each latent frame}}} of a folder's figures.safetensors."""
    figures = {}
    file = folder / 'figures.safetensors'
    for key, value in load_file(file).items() if file.exists() else ():
        run, seed, measurement = re.fullmatch(r'(.+?)(?:-(\d+))?/(\w+)', key).groups()
        figures.setdefault(run, {}).setdefault(measurement, {})[int(seed or 0)] = value.float()
    return figures


def over_seeds(figures, run, measurement):
    """The means over all samples of a run's seeds, (seeds,)."""
    return torch.stack([samples.mean() for samples in figures[run][measurement].values()])


def pooled_spread(figures, measurement):
    """(standard deviation of a measurement over the seeds of a run, pooled over all runs; its degrees of freedom)."""
    runs = [over_seeds(figures, run, measurement) for run in STAGES if measurement in figures.get(run, {})]
    freedom = sum(len(values) - 1 for values in runs)
    squares = sum(float((values - values.mean()).square().sum()) for values in runs)
    return (squares / freedom) ** 0.5 if freedom else math.inf, freedom


def t_quantile(share, freedom):
    """Student's t with so many degrees of freedom: the value below which this share lies."""
    # t = sqrt(freedom) tan(angle), where an angle's density is as cos^(freedom - 1)
    angle = torch.linspace(-math.pi / 2, math.pi / 2, 100_001, dtype=torch.float64)
    density = angle.cos().clamp(min=0) ** (freedom - 1)
    below = density.cumsum(0) / density.sum()
    return freedom ** 0.5 * math.tan(angle[torch.searchsorted(below, share)])


def by_caption(figures, run, measurement):
    """The means over all seeds and all samples of a caption, which are every 200th, (captions,)."""
    return torch.stack([torch.stack([samples[i::200].mean() for i in range(min(200, len(samples)))])
                        for samples in figures[run][measurement].values()]).mean(0)


def size_that_matters(figures, measurement):
    """Half of the teacher's distance to ODE only, the mean of its two families; None while these were not measured."""
    measurement = measurement.removeprefix('late_')
    if not all(run in figures for run in ('teacher', 'ode', 'ode_frame')):
        return None
    means = {run: over_seeds(figures, run, measurement).mean() for run in ('teacher', 'ode', 'ode_frame')}
    return float(sum(abs(means['teacher'] - means[run]) for run in ('ode', 'ode_frame'))) / 4


def judge(gap, half, size, kind):
    """RULE's verdict of a difference and half of its interval's width."""
    border = -size if kind == 'keeps' else 0
    if abs(gap - border) > half:
        return 'yes' if gap > border else 'no'
    return 'alike' if half <= size else 'unclear'


def claims(figures):
    """Of each claim whose runs are there: a dict of its words and of what RULE makes of it."""
    for words, left, right, measurement, kind, paper in CLAIMS:
        size = size_that_matters(figures, measurement)
        if size is None or not all(measurement in figures.get(run, {}) for run in (left, right)):
            continue
        ours, theirs = (over_seeds(figures, run, measurement) for run in (left, right))
        captions = by_caption(figures, left, measurement) - by_caption(figures, right, measurement)
        gap = float(ours.mean() - theirs.mean())
        spread, freedom = pooled_spread(figures, measurement)
        of_captions = float(captions.var()) / len(captions)
        half = own = math.inf
        if freedom:
            variance = spread ** 2 * (1 / len(ours) + 1 / len(theirs)) + of_captions
            half = t_quantile(0.975, freedom) * variance ** 0.5
        if min(len(ours), len(theirs)) > 1:  # beside RULE: with the two runs' own spreads (Welch)
            parts = [(float(run.var()) / len(run), len(run) - 1) for run in (ours, theirs)]
            of_seeds = sum(part for part, _ in parts)
            freedom = of_seeds ** 2 / sum(part ** 2 / n for part, n in parts)
            own = t_quantile(0.975, freedom) * (of_seeds + of_captions) ** 0.5
        yield dict(words=words, left=left, right=right, measurement=measurement, kind=kind, paper=paper, gap=gap,
                   ours=float(ours.mean()), theirs=float(theirs.mean()), seeds=(len(ours), len(theirs)), half=half,
                   own=own, size=size, verdict=judge(gap, half, size, kind), own_verdict=judge(gap, own, size, kind))


def verdict_words(claim):
    """A claim's verdict, the bound with it where there is one, rounded up."""
    if claim['verdict'] != 'alike':
        return claim['verdict']
    return f'no difference larger than {math.ceil(100 * (abs(claim["gap"]) + claim["half"])) / 100:.2f}'


def of_same_seeds(figures, left, right, measurement):
    """The difference over the seeds that both runs have, which decides nothing; None where there are none."""
    ours, theirs = (figures[run][measurement] for run in (left, right))
    both = ours.keys() & theirs.keys()
    return sum(float(ours[seed].mean() - theirs[seed].mean()) for seed in both) / len(both) if both else None


def claims_table(figures):
    """The papers' claims beside what was measured, as Markdown."""
    lines = ['| the papers say | their figure | measured here | seeds | difference | holds | with the runs\' own spreads '
             '| difference of the same seeds |', '|---|---|---|---|---|---|---|---|']
    decided = {(c['left'], c['right'], c['measurement']): c for c in claims(figures)}
    for words, left, right, measurement, _, paper in CLAIMS:
        names = [tiny_world.WORDS[run] for run in (left, right)]
        if (c := decided.get((left, right, measurement))) is None:
            lines.append(f'| {words} | {paper} | {MEASUREMENTS[measurement]}: {", ".join(names)} | not run | – | – | – | – |')
            continue
        half = f'± {c["half"]:.2f}' if math.isfinite(c['half']) else '(no spread)'
        word = 'no difference' if c['own_verdict'] == 'alike' else c['own_verdict']
        own = f'± {c["own"]:.2f}: {word}' if math.isfinite(c['own']) else '–'
        same = of_same_seeds(figures, left, right, measurement)
        lines.append(f'| {words} | {paper} | {MEASUREMENTS[measurement]}: {names[0]} {c["ours"]:.2f}, {names[1]} '
                     f'{c["theirs"]:.2f} | {c["seeds"][0]}, {c["seeds"][1]} | {c["gap"]:+.2f} {half} | {verdict_words(c)} | '
                     f'{own} | {"–" if same is None else f"{same:+.2f}"} |')
    return '\n'.join(lines)


def sizes_table(figures):
    """What RULE decides by, as Markdown: of each measurement the size that matters and the spread."""
    lines = ['| measurement | size that matters | spread over seeds |', '|---|---|---|']
    for measurement, words in MEASUREMENTS.items():
        size, (spread, freedom) = size_that_matters(figures, measurement), pooled_spread(figures, measurement)
        if size is not None and measurement in {claim[3] for claim in CLAIMS}:
            lines.append(f'| {words} | {size:.3f} | {spread:.3f} ({freedom} degrees of freedom) |')
    return '\n'.join(lines)


RESULTS = {'reward_last': 'reward, last frame', 'reward': 'reward, all', 'colour': 'colour, %', 'shape': 'shape, %',
           'texture': 'texture, %', 'texture_correlation': 'texture correlation', 'motion': 'motion, %',
           'path': 'px per frame', 'flicker': 'flicker', 'late_reward': 'reward, late', 'late_path': 'px per frame, late'}


def results_table(figures):
    """All runs as a Markdown table: means over seeds, and their standard deviation."""
    lines = ['| run | seeds | ' + ' | '.join(RESULTS.values()) + ' |', '|---' * (len(RESULTS) + 2) + '|']
    for run in ('teacher', *STAGES):
        if 'reward' not in figures.get(run, {}):
            continue
        cells = []
        for key, title in RESULTS.items():
            if key not in figures[run] or (run == 'teacher' and key.startswith('late')):
                cells.append('–')
                continue
            values, digits = over_seeds(figures, run, key), 2
            if '%' in title:
                values, digits = 100 * values, 1
            some = f' ± {values.std():.{digits}f}' if len(values) > 1 else ''
            cells.append(f'{values.mean():.{digits}f}{some}')
        lines.append(f'| {run} | {len(figures[run]["reward"])} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


# ------------------------------------------------------------------------------------------ pictures

def new_figure(width, height, *grid, **how):
    """A figure of so many pixels / 100 and its axes, without the lines above and to the right."""
    figure = Figure(figsize=(width, height), dpi=100, layout='constrained')
    axes = figure.subplots(*grid, squeeze=False, **how)
    for some in axes.flat:
        some.spines[['top', 'right']].set_visible(False)
        some.grid(color='#dddddd')
        some.set_axisbelow(True)
    return figure, axes


def draw_claims(path, rows):
    """`claims` as a picture: each difference as a point in its interval, in sizes that matter."""
    figure, ((axes,),) = new_figure(11, 1.4 + 0.4 * len(rows), 1, 1)
    halves = [c['half'] if math.isfinite(c['half']) else 0 for c in rows]
    limit = min(12, 1 + max((abs(c['gap']) + half) / c['size'] for c, half in zip(rows, halves)))
    axes.axvspan(-1, 1, color='#f0f0f0')
    axes.axvline(0, color='black', linewidth=1)
    for place, c in enumerate(rows):
        gap, half = (max(-limit, min(c[key] / c['size'], 2 * limit)) for key in ('gap', 'half'))  # what is seen of it
        axes.errorbar(gap, place, xerr=half, color=COLOURS[c['verdict']], fmt='o', elinewidth=3)
        if c['kind'] == 'keeps':
            axes.plot([-1, -1], [place - 0.4, place + 0.4], color='black', linewidth=1)
        compared = f'{MEASUREMENTS[c["measurement"]]}: {tiny_world.WORDS[c["left"]]} against {tiny_world.WORDS[c["right"]]}'
        for text, side, style in ((c['words'], 'bottom', {'fontsize': 10}),
                                  (compared, 'top', {'fontsize': 8, 'color': '#666666'})):
            axes.text(-0.01, place, text, ha='right', va=side, transform=axes.get_yaxis_transform(), **style)
        axes.text(1.01, place, f'{c["ours"]:.2f} − {c["theirs"]:.2f}', va='center', fontsize=9,
                  transform=axes.get_yaxis_transform())
    axes.set_xlim(-limit, limit)
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first claim on top
    axes.set_yticks([])
    axes.spines['left'].set_visible(False)
    axes.set_xlabel('difference and its 95 % interval, in sizes that matter (grey: less than one;\n'
                    'a short black line: what "keeps" has to stay above)')
    figure.legend([Patch(color=colour) for colour in COLOURS.values()], VERDICTS.values(),
                  loc='outside upper center', ncols=4, frameon=False)
    figure.savefig(path)
    return figure


FAMILIES = {'chunks of three latent frames': '', 'frame by frame': '_frame'}
METHODS = {'ode': '#999999', 'causvid': '#8a4fb0', 'self_forcing': '#1f6fb4', 'raven': '#2a8f4a', 'reward': '#d1541f'}


def draw_over_time(path, figures, window=5):
    """Each measurement by latent frame, to six times the trained length: a row each, and a column for each family. Lines
    are means over captions, seeds and `window` latent frames; dashed: the teacher, over its own length."""
    figure, axes = new_figure(11, 11, len(tiny_world.OVER_TIME), 2, sharex=True, sharey='row')
    for row, key in zip(axes, tiny_world.OVER_TIME):
        for some, (title, family) in zip(row, FAMILIES.items()):
            for method, colour in METHODS.items():
                curves = figures.get(method + family, {}).get(f'time_{key}')
                if curves:
                    line = torch.stack(list(curves.values())).mean(0).unfold(0, window, 1).mean(1)
                    some.plot(torch.arange(len(line)) + 1 + window // 2, line, color=colour,
                              label=tiny_world.WORDS[method])
            if 'time_' + key in figures.get('teacher', {}):
                some.axhline(float(figures['teacher']['time_' + key][0].mean()), color='black', linestyle='--',
                             linewidth=1, label='teacher, at its own length')
            for times in (1, 3):
                some.axvline(15 * times, color='black', linewidth=0.5)
            some.set_title(f'{MEASUREMENTS[key]}, {title}', fontsize=10)
    for some in axes[-1]:
        some.set_xlabel('latent frame (lines: one and three times the trained length)')
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside upper center', ncols=6, frameon=False)
    figure.savefig(path)
    return figure


TRADES = {'reward': '#d1541f', 'reward_exact': '#f0a070', 'reward_random': '#1f6fb4', 'reward_random_exact': '#8fc0e8',
          'reward_all': '#2a8f4a'}


def trades(figures):
    """Of each way of reward forcing its way: {run: [(step, reward, pixels per frame), ...]}, from ODE only on, the means
    over the seeds and the samples that every step was measured with."""
    last, ways = 200, {}
    for run in TRADES:
        names = {0: 'ode', **{step: f'{run}_{step}' for step in KEPT}, last: run}
        measured = {step: figures[name] for step, name in names.items() if 'reward' in figures.get(name, {})}
        seeds = set.intersection(*(set(step['reward']) for step in measured.values())) if measured else set()
        if len(measured) > 1 and seeds:
            ways[run] = [(step, *(float(torch.stack([some[key][seed][:COUNT_KEPT] for seed in sorted(seeds)]).mean())
                                  for key in ('reward', 'path'))) for step, some in measured.items()]
    return ways


def trades_table(ways):
    """`trades` as Markdown: reward, pixels per frame after so many steps."""
    steps = sorted({step for way in ways.values() for step, *_ in way})
    lines = ['| reward, px per frame | ' + ' | '.join(f'{step} steps' if step else 'ODE only' for step in steps) + ' |',
             '|---' * (len(steps) + 1) + '|']
    for run, way in ways.items():
        cells = {step: f'{reward:.2f}, {path:.2f}' for step, reward, path in way}
        lines.append(f'| {tiny_world.WORDS[run]} | ' + ' | '.join(cells.get(step, '–') for step in steps) + ' |')
    return '\n'.join(lines)


def draw_trades(path, ways):
    """`trades` as a picture: reward against pixels per frame, a point for every 50 steps."""
    figure, ((axes,),) = new_figure(8, 5, 1, 1)
    for run, way in ways.items():
        steps, rewards, paths = zip(*way)
        axes.plot(paths, rewards, 'o-', color=TRADES[run], label=tiny_world.WORDS[run])
        axes.annotate(f'{steps[-1]} steps', (paths[-1], rewards[-1]), fontsize=8, color='#666666')
    axes.set_xlabel('pixels per frame (right: moves more)')
    axes.set_ylabel('reward of all frames')
    axes.legend(title='every 50 steps, from ODE only on', frameon=False)
    figure.savefig(path)
    return figure


def plan(runs, names, fast, seeds):
    """Jobs in order: {name: (command, the jobs before it)}. Every stage's run is followed by its measurements, and all
    of one seed come before the next one's."""
    wanted = set(names or STAGES)
    for name in reversed(STAGES):  # and what they start from
        if name in wanted and STAGES[name][1]:
            wanted.add(STAGES[name][1])
    of = {name: {0} if fast else set(seeds or range(STAGES[name][2])) for name in STAGES}
    of['student'] = {0} if names and 'student' not in names else of['student'] | {0}  # 0: the one that all start from
    for name in reversed(STAGES):  # a start has all seeds of what starts from it
        start = STAGES[name][1]
        if name in wanted and start not in (None, 'student'):
            of[start] |= of[name]
    data, some = runs / 'trajectories', ['--count', '2'] if fast else []
    short = ['--steps', '2', '--batch', '1'] if fast else []

    def measure(verb, file, count, *flags):
        return ['tests/tiny_world.py', verb, str(file), '--results', str(runs), '--count', str(2 if fast else count),
                *flags]
    jobs = {'trajectories': (['ode_init.py', 'sample', '--out', str(data), *some], [])}
    for seed, name in itertools.product(sorted(set.union(*of.values())), STAGES):
        if name not in wanted or seed not in of[name]:
            continue
        line, start, _ = STAGES[name]
        out, needs = runs / f'{name}-{seed}', []
        command = [*line.format(data=data).split(), '--out', str(out), '--seed', str(seed), '--resume', *short]
        if fast and line.startswith('cm_grpo.py'):
            command += ['--group', '2', '--prompts-per-step', '1']
        if start:
            needs.append(f'{start}-{seed if start != "student" else 0}')
            command += ['--init', str(runs / needs[0] / 'model.safetensors')]
        jobs[out.name] = (command, needs + (['trajectories'] if '{data}' in line else []))
        file = out / 'model.safetensors'
        jobs[f'{out.name} compare'] = (measure('compare', file, COUNT), [out.name])
        for step in KEPT if '--keep-every' in line and not fast else ():
            jobs[f'{out.name} step {step} compare'] = (
                measure('compare', out / f'model_{step:06d}.safetensors', COUNT_KEPT), [out.name])
        if name == 'student':
            if not fast:  # the teacher's 50 steps with guidance take as long as a short stage
                jobs['teacher compare'] = (measure('compare', 'teacher', COUNT), [])
        else:
            late = any(name in compared and what.startswith('late') for _, *compared, what, _, _ in CLAIMS)
            jobs[f'{out.name} over time'] = (
                measure('over_time', file, COUNT_LATE if late else COUNT_LONG, '--length', str(18 if fast else LONG)),
                [out.name])
    first = [name for name in jobs if name in ('student-0', *(f'{run}-{min(of[run])}' for run in STAGES))]
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
                name = ready[0]
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


WINDOW = 20  # steps that each point of a curve is the mean of


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
    figure, ((axes,),) = new_figure(8, 4, 1, 1)
    for (name, band), colour in zip(bands.items(), ('#1f6fb4', '#d1541f', '#2a8f4a', '#8a4fb0')):
        steps = range(len(band['mean']))
        axes.fill_between(steps, band['lowest'], band['highest'], color=colour, alpha=0.2, linewidth=0)
        axes.plot(steps, band['mean'], color=colour, linewidth=2, label=tiny_world.WORDS.get(name, name))
    axes.set_xlabel(f'training step (each point: the mean of {window} steps from there)')
    axes.set_ylabel('reward of the training rollouts')
    axes.legend(loc='lower right', title='line: mean, band: lowest to highest seed', frameon=False)
    figure.savefig(path)
    return figure


def report(folder, pictures):
    """Print the tables of the figures in a folder, and draw its pictures into the folder `pictures`."""
    figures = read_figures(folder)
    print(results_table(figures), '\n')
    print(sizes_table(figures), '\n')
    print(claims_table(figures), '\n')
    print(trades_table(trades(figures)))
    if rows := list(claims(figures)):
        draw_claims(pictures / 'claims.png', rows)
    draw_over_time(pictures / 'over_time.png', figures)
    if ways := trades(figures):
        draw_trades(pictures / 'trades.png', ways)
    if (folder / 'curves.json').exists():
        draw_curves(pictures / 'curves.png', json.loads((folder / 'curves.json').read_text()), WINDOW)


def main():
    p = argparse.ArgumentParser(description='All stages of both papers in the tiny world, one after the other.')
    p.add_argument('names', nargs='*', metavar='RUN', help=f'only these of {", ".join(STAGES)}, and what they need')
    p.add_argument('--runs', type=Path, help='the folder of all runs (default: runs/miniature, or runs/miniature_fast)')
    p.add_argument('--seeds', type=int, nargs='+', metavar='S', help='these seeds (default: 0 to 3 of what a claim compares, '
                   '0 of the rest); every run starts from the student of seed 0')
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
              ('raven_cm', 'reward_cm', 'reward_em') if any(runs.glob(f'{name}-[0-9]/metrics.jsonl'))}
    if curves:
        (runs / 'curves.json').write_text(json.dumps(curve_bands(curves)) + '\n')
    gather(runs)
    report(runs, runs)


if __name__ == '__main__':
    main()

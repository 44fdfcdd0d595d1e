"""VBench, the papers' benchmark: sample its prompts, score the videos, aggregate 16
dimensions to the total score.

VBench (arXiv 2311.17982), as Reward-Forcing 4.1 and RAVEN use it: 946 prompts, 5 videos of
each (25 of the 75 prompts for temporal flickering), 16 scores in [0, 1].

sample  every prompt's videos by generate.py, whose flags follow --, ->
        OUT/videos/{prompt}-{i}.mp4, named by the original prompt whatever text the generator
        was given; text and seed of each in OUT/samples.json, the list of prompts in
        OUT/full_info.json. Goes on with what is there.
score   videos -> OUT/results/{dimension}_eval_results.json, VBench's own format. Five
        dimensions here; the others by VBench itself, whose packages fit no environment of
        ours, from another one: --vbench-python.
table   n_d = (x_d - min_d) / (max_d - min_d);  Quality, Semantic = weighted means of n_d;
        Total = (4 Q + S) / 5, beside the papers' rows. A dimension that is missing is said
        to be, not counted as 0.

Differs from VBench: CLIP runs in float32 (VBench: float16 on CUDA); the result of several
processes is that of one (VBench's own is not: over GPUs it averages means of videos, and of
appearance style only each video's last frame).

The tiny model, whose captions the pretrained scorers do not know, is scored by the tiny
world's measurements, on a CPU, offline:
    python eval_vbench.py sample && python eval_vbench.py score && python eval_vbench.py table
VBench's own list comes with `pip install --no-deps vbench`, or with --full-info:
    torchrun --standalone --nproc_per_node 8 eval_vbench.py sample \\
        --model Wan-AI/Wan2.1-T2V-1.3B --extended all_dimension_extended.txt \\
        --out runs/vbench_reward -- --checkpoint runs/reward/model.safetensors
    torchrun --standalone --nproc_per_node 8 eval_vbench.py score --out runs/vbench_reward \\
        --aesthetic-head sa_0_4_vit_l_14_linear.pth --vbench-python vbench-env/bin/python
    python eval_vbench.py table runs/vbench_reward/results --name "reward forcing"
"""
import functools
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

from wan_causal import (CLIP_MEAN, CLIP_STD, InputError, Parser, aesthetic_head,
                        check_writable, find_file, in_words, is_cut_off, load_clip, model_defaults,
                        number, pretrained, processes, read_json, read_lines, refuse_unused,
                        replace_file, require_ffmpeg, run_script, tiny_model, whole)

import imageio
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

# ----------------------------------------------------------------------------------------
# Constants: VBench's scripts/constant.py, and the papers' tables

VBENCH = {  # dimension: (group, min, max, weight)
    'subject_consistency': ('quality', 0.1462, 1, 1),
    'background_consistency': ('quality', 0.2615, 1, 1),
    'temporal_flickering': ('quality', 0.6293, 1, 1),
    'motion_smoothness': ('quality', 0.7060, 0.9975, 1),
    'dynamic_degree': ('quality', 0, 1, 0.5),
    'aesthetic_quality': ('quality', 0, 1, 1),
    'imaging_quality': ('quality', 0, 1, 1),
    'object_class': ('semantic', 0, 1, 1),
    'multiple_objects': ('semantic', 0, 1, 1),
    'human_action': ('semantic', 0, 1, 1),
    'color': ('semantic', 0, 1, 1),
    'spatial_relationship': ('semantic', 0, 1, 1),
    'scene': ('semantic', 0, 0.8222, 1),
    'appearance_style': ('semantic', 0.0009, 0.2855, 1),
    'temporal_style': ('semantic', 0, 0.3640, 1),
    'overall_consistency': ('semantic', 0, 0.3640, 1),
}
# The tiny world's: how well what is seen is drawn, and the shares of videos that show what the
# caption says.
TINY = {
    'shape_iou': ('quality', 0, 1, 1), 'texture_correlation': ('quality', 0, 1, 1),
    'steadiness': ('quality', 0, 1, 1),
    **dict.fromkeys(('colour', 'texture', 'shape', 'motion', 'background'), ('semantic', 0, 1, 1))
}
# these need no prompt: of any video, as VBench's custom input has it
CUSTOM = ('subject_consistency', 'background_consistency', 'motion_smoothness',
          'dynamic_degree', 'aesthetic_quality', 'imaging_quality')
# these are computed here
NATIVE = ('subject_consistency', 'background_consistency', 'temporal_flickering',
          'aesthetic_quality', 'appearance_style')
# of these the mean is over all frames; of the others over videos
OVER_FRAMES = ('subject_consistency', 'background_consistency', 'appearance_style')

TABLE_1 = {  # Reward-Forcing, table 1: total, quality, semantic
    'LTX-Video': (80.00, 82.30, 70.79), 'Wan2.1 1.3B': (84.26, 85.30, 80.09),
    'NOVA': (80.12, 80.39, 79.05), 'Pyramid Flow': (81.72, 84.74, 69.62),
    'Self Forcing, frame-wise': (84.26, 85.25, 80.30), 'SkyReels-V2': (82.67, 84.70, 74.53),
    'MAGI-1': (79.18, 82.04, 67.74), 'CausVid': (81.20, 84.05, 69.80),
    'Self Forcing': (84.31, 85.07, 81.28), 'ODE only': (68.77, 73.27, 50.81),
    'Reward-Forcing': (84.92, 85.91, 80.97)
}
TABLE_3 = {  # Reward-Forcing, table 3: the dimensions in VBENCH's order
    'CausVid': (96.32, 94.65, 99.38, 98.00, 73.61, 62.24, 67.82, 78.01, 60.75, 74.00, 82.34,
                67.74, 14.03, 21.23, 18.85, 22.50),
    'Self Forcing': (95.32, 96.30, 99.05, 98.35, 72.22, 65.75, 69.02, 93.75, 83.92, 97.00,
                     89.28, 83.38, 57.34, 24.40, 20.48, 26.72),
    'Reward-Forcing': (96.15, 95.83, 97.88, 97.99, 81.94, 70.51, 68.84, 93.20, 87.58, 97.00,
                       89.04, 83.78, 54.36, 24.06, 21.19, 26.14)
}
RAVEN = {  # RAVEN's table of causal generators: total, quality, semantic
    'CausVid': (83.01, 84.18, 78.34), 'LongLive': (83.05, 83.70, 80.46),
    'Rolling Forcing': (83.25, 84.00, 80.25), 'Self Forcing': (84.27, 85.10, 80.97),
    'Causal Forcing': (84.96, 86.00, 80.76), 'RAVEN': (85.15, 86.18, 81.04),
    'RAVEN + CM-GRPO': (85.46, 86.54, 81.17)
}
TABLE_3_NOTE = ('Table 3\'s cells reproduce Table 1\'s Quality of Self Forcing and of '
                'Reward-Forcing; they reproduce neither CausVid\'s Quality nor any Semantic, '
                'and so no Total.')
ENVIRONMENT = ('make an environment for it (python3.10 -m venv vbench-env; vbench-env/bin/pip '
               'install "torch<2.6" torchvision "setuptools<81" vbench; vbench-env/bin/pip '
               'install --no-build-isolation '
               'git+https://github.com/facebookresearch/detectron2) and give --vbench-python '
               'vbench-env/bin/python')


def aggregate(scores):
    """{dimension: raw score} -> {'quality', 'semantic', 'total'}, None where a dimension is
    missing, and 'missing'."""
    constants = TINY if set(scores) & set(TINY) else VBENCH
    result = {'missing': [name for name in constants if name not in scores]}
    for group in ('quality', 'semantic'):
        rows = [(name, *row[1:]) for name, row in constants.items() if row[0] == group]
        # VBench does not clip the normalised scores
        if all(name in scores for name, *_ in rows):
            result[group] = (sum(w * (scores[name] - low) / (high - low)
                                 for name, low, high, w in rows) / sum(w for *_, w in rows))
        else:
            result[group] = None
    whole = not result['missing']
    result['total'] = (4 * result['quality'] + result['semantic']) / 5 if whole else None
    return result


# ----------------------------------------------------------------------------------------
# The suite: prompts, their dimensions, and the names of their videos

def read_suite(path):
    """VBench_full_info.json -> [{'prompt_en', 'dimension': [names], 'auxiliary_info'?}],
    checked."""
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise InputError(f'{path} is not a list of prompts such as VBench_full_info.json')
    return checked_suite(entries, path)


def checked_suite(entries, path):
    """The entries, if each has what is needed, and a prompt that can name its videos."""
    for i, entry in enumerate(entries):
        entry = entry if isinstance(entry, dict) else {}
        prompt, names = entry.get('prompt_en'), entry.get('dimension')
        fits = isinstance(prompt, str) and prompt.strip() and isinstance(names, list)
        if not fits or not all(isinstance(name, str) for name in names):
            raise InputError(f'{path}: entry {i} is not {{"prompt_en": text, "dimension": '
                             '[names]}')
        if unknown := [name for name in names if name not in VBENCH and name not in TINY]:
            raise InputError(f'{path}: entry {i} has the unknown dimension {unknown[0]!r}')
        if '/' in prompt or '\0' in prompt or len(prompt.encode(errors='replace')) > 230:
            raise InputError(f'{path}: the prompt of entry {i} cannot be a file name: '
                             f'{prompt[:60]!r}')
        if 'appearance_style' in names and not isinstance(style(entry), str):
            raise InputError(f'{path}: entry {i} has no auxiliary_info for '
                             'appearance_style')
    return entries


def style(entry):
    """What appearance style compares with: auxiliary_info = {'appearance_style':
    {'appearance_style': text}}."""
    try:
        return entry['auxiliary_info']['appearance_style']['appearance_style']
    except (KeyError, TypeError):
        return None


def installed_list():
    """VBench_full_info.json of an installed vbench package, which is not imported."""
    spec = importlib.util.find_spec('vbench')
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / 'VBench_full_info.json').is_file():
            return file
    raise InputError('no list of prompts: install VBench\'s without its packages (pip install '
                     '--no-deps vbench), or give --full-info VBench_full_info.json')


def video_names(entries, wanted, samples=5):
    """{file name: (entry, sample)} of the wanted dimensions; 5 times as many for temporal
    flickering.

    A prompt that appears twice has one set of videos, which belongs to its first entry.
    """
    videos, first = {}, {}
    for n, entry in enumerate(entries):
        prompt = entry['prompt_en']
        place = first.setdefault(prompt, n)
        if set(wanted) & set(entry['dimension']):
            count = 5 * samples if 'temporal_flickering' in entry['dimension'] else samples
            for i in range(count):
                videos[f'{prompt}-{i}.mp4'] = place, i
    return videos


def chosen(args, entries):
    """--dimensions, checked, or all that the suite has, in the order of the constants."""
    here = {name for entry in entries for name in entry['dimension']}
    for name in args.dimensions or []:
        if name not in here:
            known = name in VBENCH or name in TINY
            raise InputError(f'--dimensions {name}: ' + (
                'no prompt of this suite is for it' if known else 'unknown; the dimensions are '
                f'{", ".join(n for n in (*VBENCH, *TINY) if n in here)}'))
    return [name for name in (*VBENCH, *TINY) if name in (args.dimensions or here)]


# ----------------------------------------------------------------------------------------
# Scores of one video: functions (frames (T, 3, H, W) uint8, entry) -> a score for each frame or
# pair of frames

IMAGENET = (.485, .456, .406), (.229, .224, .225)
CLIP = CLIP_MEAN, CLIP_STD


def new_shape(frames, size):
    """torchvision's Resize: the shorter side becomes `size`, the longer one int(size long /
    short)."""
    short = min(frames.shape[2:])
    return [size if side == short else int(size * side / short) for side in frames.shape[2:]]


def resize(frames, shape, mode, antialias=False):
    """Of float tensors: not clamped, not rounded."""
    return F.interpolate(frames, shape, mode=mode, align_corners=False, antialias=antialias)


def crop(frames, size):
    """torchvision's CenterCrop."""
    top, left = (int(round((side - size) / 2)) for side in frames.shape[2:])
    return frames[:, :, top:top + size, left:left + size]


def standardise(frames, statistics):
    """0..255 -> a network's input."""
    mean, std = (torch.tensor(values, device=frames.device).view(3, 1, 1)
                 for values in statistics)
    return (frames / 255 - mean) / std


def dino_input(frames, size):
    """Bilinear, no antialiasing, and no crop: 480x832 becomes 224x388, 14x24 patches."""
    return standardise(resize(frames, new_shape(frames, size), 'bilinear'), IMAGENET)


def clip_input(frames, size):
    """From tensors: bicubic without antialiasing, not clamped, so that it overshoots 0..255."""
    return standardise(crop(resize(frames, new_shape(frames, size), 'bicubic'), size), CLIP)


def pil_resize(frames, size):
    """As PIL does it (appearance style alone): antialiased, rows before columns, each to whole
    levels in 0..255."""
    height, width = new_shape(frames, size)
    for shape in ((frames.shape[2], width), (height, width)):
        frames = resize(frames, shape, 'bicubic', antialias=True).clamp(0, 255).round()
    return frames


def clip_image_input(frames, size):
    """From PIL images."""
    return standardise(crop(pil_resize(frames, size), size), CLIP)


def consistency(features):
    """Unit features (T, D) -> (T - 1,): half the cosine with the previous frame, half that with
    the first one."""
    previous, first = (features[1:] * features[:-1]).sum(1), features[1:] @ features[0]
    return (previous.clamp(min=0) + first.clamp(min=0)) / 2


def flickering(frames, entry=None):
    """1 - mean |difference| / 255 of neighbouring frames, (T - 1,)."""
    return torch.stack([1 - (a.float() - b.float()).abs().mean() / 255
                        for a, b in zip(frames, frames[1:])])


def encoder(network, prepare, size, device):
    """A function frames (T, 3, H, W) uint8 -> unit features (T, D), 16 frames at a time."""
    def encode(frames):
        parts = [prepare(part.to(device).float(), size) for part in frames.split(16)]
        return F.normalize(torch.cat([network(part) for part in parts]))
    return encode


def clip_encoder(clip, prepare):
    return encoder(lambda x: clip.visual_projection(clip.vision_model(x).pooler_output),
                   prepare, clip.config.vision_config.image_size, clip.device)


def native_scorers(dimensions, args, device):
    """{dimension: its function} for those of `dimensions` that are computed here; loads only
    what they need."""
    from transformers import CLIPModel, ViTModel
    scorers = {'temporal_flickering': flickering}
    if 'subject_consistency' in dimensions:
        dino = pretrained(ViTModel, args.dino, add_pooling_layer=False).to(device)
        see_subject = encoder(
            lambda x: dino(x, interpolate_pos_encoding=True).last_hidden_state[:, 0],
            dino_input, dino.config.image_size, device)
        scorers['subject_consistency'] = lambda frames, entry: consistency(see_subject(frames))
    if {'background_consistency', 'appearance_style'} & set(dimensions):
        clip, tokenizer = load_clip(args.clip, device)
        see, see_image = clip_encoder(clip, clip_input), clip_encoder(clip, clip_image_input)

        def appearance(frames, entry):  # VBench: CLIP's logit / 100
            words = tokenizer([style(entry)], truncation=True, return_tensors='pt').to(device)
            text = F.normalize(clip.text_projection(clip.text_model(**words).pooler_output))
            return see_image(frames) @ text[0] * clip.logit_scale.exp() / 100
        scorers['background_consistency'] = lambda frames, entry: consistency(see(frames))
        scorers['appearance_style'] = appearance
    if 'aesthetic_quality' in dimensions:
        large = pretrained(CLIPModel, args.clip_large).to(device)
        see_large = clip_encoder(large, clip_input)
        head = aesthetic_head(args.aesthetic_head, large.config.projection_dim, device)

        def aesthetic(frames, entry):  # LAION's scores go to 10
            return F.linear(see_large(frames), *head)[:, 0] / 10
        scorers['aesthetic_quality'] = aesthetic
    return {name: scorers[name] for name in dimensions if name in scorers}


def tiny_scorers(dimensions):
    """The same from tests/tiny_world.py; one look gives all dimensions."""
    file = Path(__file__).resolve().parent / 'tests/tiny_world.py'  # no other: it is run
    if not file.is_file():
        raise InputError(f'no {file}: the tiny captions are scored by the tiny world\'s own '
                         'measurements, which come with this project')
    spec = importlib.util.spec_from_file_location('tiny_world', file)
    world = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(world)

    @functools.lru_cache(maxsize=1)
    def measured(frames, caption):
        row = world.scorecard(frames.float().div(127.5).sub(1).transpose(0, 1)[None], [caption])
        return {**row, 'steadiness': 1 - row['flicker'] / 255}

    def scorer(name):
        return lambda frames, entry: torch.tensor([measured(frames, entry['prompt_en'])[name]])
    return {name: scorer(name) for name in dimensions if name in TINY}


# ----------------------------------------------------------------------------------------

def sample_flags(p):
    g = p.add_argument_group('sample')
    g.add_argument('--full-info', metavar='FILE',
                   help='VBench_full_info.json (default: the tiny model\'s captions, else the '
                        'installed vbench package\'s)')
    g.add_argument('--held-out', metavar='FILE',
                   help='captions of the tiny world (default: the tiny model\'s)')
    g.add_argument('--extended', metavar='FILE',
                   help='what the generator is given instead: a line for each entry')
    g.add_argument('--dimensions', nargs='+', metavar='NAME',
                   help='only the prompts for these (default: all)')
    g.add_argument('--samples', type=whole(1, 200), default=5,
                   help='videos per prompt, and 5 times as many for flickering')
    g.add_argument('--seed', type=whole(0, 1 << 40), default=0,
                   help='sample i of entry n has the seed 10^6 seed + 1000 n + i')
    g.add_argument('--out', default='runs/vbench', help='the folder of videos and results')
    g.add_argument('--model', default=tiny_model(),
                   help='the Wan model: a folder or hub repository')
    p.epilog = 'What follows -- are flags of generate.py: -- --checkpoint FILE --window 21'


def score_flags(p):
    p.add_argument('--out', default='runs/vbench',
                   help='the folder that `sample` left, and of the results')
    p.add_argument('--videos', metavar='FOLDER', help='default: OUT/videos')
    p.add_argument('--custom', action='store_true',
                   help='score every .mp4 in --videos, whatever its prompt, for the dimensions '
                        'that need none (VBench\'s custom input)')
    p.add_argument('--filtered', metavar='FOLDER',
                   help='for temporal flickering, the static videos alone, as `vbench '
                        'static_filter` left them (default: static or not)')
    p.add_argument('--full-info', metavar='FILE',
                   help='VBench_full_info.json (default: what `sample` left, else the '
                        'installed vbench package\'s)')
    p.add_argument('--dimensions', nargs='+', metavar='NAME',
                   help='only these (default: all that can be scored)')
    p.add_argument('--samples', type=whole(1, 200), default=5,
                   help='videos per prompt that must be there')
    p.add_argument('--dino', default='facebook/dino-vitb16',
                   help='DINO ViT-B/16: a folder or hub repository')
    p.add_argument('--clip', default='openai/clip-vit-base-patch32', help='CLIP ViT-B/32')
    p.add_argument('--clip-large', default='openai/clip-vit-large-patch14',
                   help='CLIP ViT-L/14')
    p.add_argument('--aesthetic-head', metavar='FILE',
                   help='LAION\'s sa_0_4_vit_l_14_linear.pth')
    p.add_argument('--vbench-python', metavar='FILE',
                   help='Python of an environment with VBench, for the other ones')
    p.add_argument('--vbench-gpus', type=whole(1), default=1, help='GPUs that VBench uses')
    p.add_argument('--device', help='cpu or cuda (default: cuda if there is one)')


def table_flags(p):
    p.add_argument('results', nargs='*',
                   help='result files, VBench\'s or ours, or folders of them (default: '
                        'runs/vbench/results)')
    p.add_argument('--percentages', type=number(0, 100), nargs=16, metavar='P',
                   help='instead of files, 16 numbers in the papers\' order: '
                        + ', '.join(VBENCH))
    p.add_argument('--name', default='this run', help='of the row')
    p.add_argument('--format', choices=['text', 'markdown', 'json'], default='text',
                   help='of the output')


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    p = Parser(description='VBench: sample its suite, score the videos, aggregate the scores.')
    flags = {'sample': sample_flags, 'score': score_flags, 'table': table_flags}
    p.add_argument('verb', choices=flags,
                   help='what to do; `eval_vbench.py VERB --help` shows its flags')
    verb = argv[0] if argv else None
    flags.get(verb, lambda p: None)(p)
    cut = argv.index('--') if verb == 'sample' and '--' in argv else len(argv)
    args = p.parse_args(argv[:cut])
    if verb == 'sample':
        if args.full_info and args.held_out:
            raise InputError('give --full-info or --held-out, not both: each is the list of '
                             'prompts')
        args.held_out = args.held_out or model_defaults(args.model).get('held_out')
        args.generate = ['--model', args.model, *argv[cut + 1:]]
    args.unused = functools.partial(refuse_unused, p, args)
    return args


# ----------------------------------------------------------------------------------------
# sample

RANK = os.environ.get('RANK', '')


def sampling_suite(args):
    """(entries, the text that the generator is given for each)."""
    if args.full_info is None and args.held_out:
        captions = read_lines(find_file(args.held_out), aligned=True)
        entries = [{'prompt_en': caption, 'dimension': list(TINY)} for caption in captions]
        checked_suite(entries, args.held_out)
    else:
        entries = read_suite(args.full_info or installed_list())
    texts = [entry['prompt_en'] for entry in entries]
    if args.extended:
        texts = read_lines(find_file(args.extended), aligned=True)
    if len(texts) != len(entries) or not all(texts):
        raise InputError(f'{args.extended} has {sum(map(bool, texts))} prompts in {len(texts)} '
                         f'lines, but the suite has {len(entries)} entries: it must have one '
                         'line for each, in the same order')
    return entries, texts


def record(out, entries, videos, flags):
    """samples.json and full_info.json; another run's flags or texts in the same folder are
    refused."""
    file, started = out / 'samples.json', any((out / 'videos').glob('[!.]*.mp4'))
    if started and not file.exists():
        raise InputError(f'{out}/videos holds videos, but {file}, which says of what texts and '
                         'seeds, is gone: take another --out')
    old = read_json(file) if started else {'generate': flags, 'videos': {}}
    if not isinstance(old, dict) or not isinstance(old.get('videos'), dict):
        raise InputError(f'{file} is not what eval_vbench.py sample wrote: take another --out')
    if old.get('generate') != flags or any(old['videos'].get(name, video) != video
                                           for name, video in videos.items()):
        raise InputError(f'{out} holds videos of another seed, other texts or other flags '
                         f'({old.get("generate")}): give the same to go on, or another --out')
    for path, content in ((file, {'generate': flags, 'videos': {**old['videos'], **videos}}),
                          (out / 'full_info.json', entries)):
        replace_file(path,
                     lambda temporary: temporary.write_text(json.dumps(content, indent=1)),
                     RANK)


def sample(args):
    """Under torchrun every process writes the same files, whole; generate.py shares out the
    videos."""
    entries, texts = sampling_suite(args)
    names, out = video_names(entries, chosen(args, entries), args.samples), Path(args.out)
    videos = {name: {'prompt': texts[n], 'seed': 1_000_000 * args.seed + 1000 * n + i}
              for name, (n, i) in names.items()}
    record(out, entries, videos, args.generate)
    if len({name.lower() for name in videos}) < len(videos) and (out / 'SAMPLES.json').exists():
        twice = sorted(videos, key=str.lower)
        a, b = next((a, b) for a, b in zip(twice, twice[1:]) if a.lower() == b.lower())
        raise InputError(f'{out} lies on a disk that cannot tell {a!r} from {b!r}: take an '
                         '--out on another one')
    jobs = [json.dumps({**video, 'out': str(out / 'videos' / name)})
            for name, video in videos.items()]
    replace_file(out / 'jobs.jsonl', lambda temporary: temporary.write_text('\n'.join(jobs)),
                 RANK)
    generate = Path(__file__).with_name('generate.py')
    sys.argv = [str(generate), '--jobs', str(out / 'jobs.jsonl'), *args.generate]
    runpy.run_path(str(generate), run_name='__main__')


# ----------------------------------------------------------------------------------------
# score

def read_video(path):
    """(T, 3, H, W) uint8."""
    with in_words(f'{path} cannot be read as a video of at least two frames', 'make it again'):
        if is_cut_off(path):
            raise ValueError('cut off')
        frames = np.stack([frame[..., :3] for frame in imageio.v3.imiter(path)])
        if frames.ndim != 4 or len(frames) < 2:
            raise ValueError('fewer than two frames')
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def videos_to_score(args, entries, dimensions):
    """[(dimension, path, entry)]: samples 0, 1, ... of each prompt, all of which must be there."""
    folder = Path(args.videos or Path(args.out) / 'videos')
    jobs = []
    for dimension in dimensions:
        filtered = args.filtered if dimension == 'temporal_flickering' else None
        # a Mac's disk keeps names decomposed
        there = {unicodedata.normalize('NFC', path.name): path
                 for path in Path(filtered or folder).glob('*.mp4')}
        names = [(dimension, f'{entry["prompt_en"]}-{i}.mp4', entry) for entry in entries
                 if dimension in entry['dimension']
                 for i in range(1 if args.custom else args.samples)]
        mine = [(dimension, entry['file'] if args.custom else
                 there.get(unicodedata.normalize('NFC', name), folder / name), entry)
                for dimension, name, entry in names]
        found = [job for job in mine if job[1].is_file()]
        missing = [job[1] for job in mine if not job[1].is_file()]
        if missing and not (filtered and found):  # the filter may keep fewer than 5 of a prompt
            raise InputError(f'{len(missing)} of the {len(mine)} videos for {dimension} are '
                             f'missing, the first of them {missing[0]}: make them with '
                             'eval_vbench.py sample, or lower --samples')
        jobs += found
    return jobs


def result_file(out, dimension):
    return Path(out) / 'results' / f'{dimension}_eval_results.json'


def write_results(out, dimension, total, videos):
    """One dimension in VBench's format."""
    text = json.dumps({dimension: [total, videos]}, indent=1)
    replace_file(result_file(out, dimension), lambda temporary: temporary.write_text(text))


def check_results(args, dimensions):
    """Scores of the videos in another folder are not written over."""
    default = (Path(args.out) / 'videos').resolve()
    mine = {Path(folder).resolve() for folder in (args.videos or default, args.filtered)
            if folder}
    for file in (result_file(args.out, name) for name in dimensions):
        if not file.exists():
            continue
        try:
            (_, videos), = read_json(file).values()
            theirs = {Path(video['video_path']).resolve().parent for video in videos}
            if not args.videos:  # wherever this --out lay when they were scored
                theirs = {path for path in theirs if path.parts[-2:] != default.parts[-2:]}
        except (TypeError, ValueError, KeyError, AttributeError):
            theirs = {'other videos'}
        if other := theirs - mine:
            raise InputError(f'{file} holds scores of {min(map(str, other))}: give another '
                             '--out, or delete it')


@torch.no_grad()
def score(args, process, entries, dimensions):
    # --- setup
    here = [name for name in dimensions if name in NATIVE or name in TINY]
    jobs = videos_to_score(args, entries, here)
    if 'temporal_flickering' in here and not args.filtered:
        process.print('temporal_flickering: the first of each prompt\'s videos count; '
                      'VBench\'s protocol counts the static ones alone, see --filtered')

    # --- models
    tiny = any(name in TINY for name in here)
    scorers = {**(tiny_scorers(here) if tiny else {}),
               **native_scorers(here, args, process.device)}

    # --- loop: each video is read once
    of_video = {}
    for i, (_, path, _) in enumerate(jobs):
        of_video.setdefault(path, []).append(i)
    # of each job: the sum of its scores, and how many they are
    sums = torch.zeros(len(jobs), 2, dtype=torch.float64, device=process.device)
    for path in tqdm(list(of_video)[process.rank::process.world], desc='videos', unit='',
                     disable=process.quiet):
        frames = read_video(path)
        for i in of_video[path]:
            values = scorers[jobs[i][0]](frames, jobs[i][2]).double()
            if not values.isfinite().all():
                raise InputError(f'{jobs[i][0]} of {path} is not finite: the scorer\'s weights '
                                 'are damaged')
            sums[i, 0], sums[i, 1] = values.sum(), len(values)
    sums = process.gather(sums).sum(0)  # every row has been filled by one process

    # --- results
    for dimension in here:
        mine = [i for i, job in enumerate(jobs) if job[0] == dimension]
        each = sums[mine, 0] / sums[mine, 1]
        total = each.mean()
        if dimension in OVER_FRAMES:
            total = sums[mine, 0].sum() / sums[mine, 1].sum()
        if process.rank == 0:
            write_results(args.out, dimension, total.item(),
                          [{'video_path': str(jobs[i][1]), 'video_results': value}
                           for i, value in zip(mine, each.tolist())])
        process.print(f'{dimension:<24}{total.item():.4f}  {len(mine)} videos')


def score_with_vbench(args, dimensions):
    """The other dimensions, each by a run of VBench in its own environment."""
    for dimension in dimensions:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([
                args.vbench_python, '-m', 'torch.distributed.run', '--standalone',
                '--nproc_per_node', str(args.vbench_gpus),
                '-m', 'vbench.launch.evaluate', '--dimension', dimension,
                '--videos_path', args.videos or str(Path(args.out) / 'videos'),
                '--output_path', folder,
                *(['--mode', 'custom_input'] if args.custom else
                  ['--full_json_dir', str(args.full_info)])])
            files = list(Path(folder).glob('*_eval_results.json'))
            if done.returncode or len(files) != 1:
                raise InputError(f'VBench failed on {dimension} (exit code {done.returncode}): '
                                 'its messages are above')
            total = read_results(files)[dimension]
            write_results(args.out, dimension, total, read_json(files[0])[dimension][1])
            print(f'{dimension:<24}{total:.4f}  by VBench', flush=True)


def check_scoring(args):
    """(entries, dimensions to score, those of them for VBench); whatever is not there is said
    before any work."""
    if args.custom:
        files = []
        if args.videos and Path(args.videos).is_dir():
            # not a killed run's temporary files, nor macOS's
            files = sorted(path for path in Path(args.videos).iterdir()
                           if path.suffix.lower() == '.mp4' and not path.name.startswith('.'))
        if not files or args.full_info or args.filtered:
            raise InputError('--custom needs --videos, a folder with .mp4 files, and neither '
                             '--full-info nor --filtered')
        entries = [{'prompt_en': path.stem, 'dimension': list(CUSTOM), 'file': path}
                   for path in files]
    else:
        left = Path(args.out) / 'full_info.json'
        args.full_info = args.full_info or (left if left.is_file() else installed_list())
        entries = read_suite(args.full_info)
    dimensions = chosen(args, entries)
    check_results(args, dimensions)
    others = [name for name in dimensions if name not in NATIVE and name not in TINY]
    if not args.vbench_python:
        args.unused('VBench itself is not asked, see --vbench-python', 'vbench_gpus')
    if args.custom:
        args.unused('every video of the folder is scored', 'samples')
    for flag, of in (('filtered', ['temporal_flickering']), ('dino', ['subject_consistency']),
                     ('clip', ['background_consistency', 'appearance_style']),
                     ('aesthetic_head', ['aesthetic_quality']),
                     ('clip_large', ['aesthetic_quality'])):
        if not {*of} & {*dimensions}:
            words = ' and '.join(of).replace('_', ' ')
            args.unused(f'{words} {"is" if len(of) == 1 else "are"} not scored', flag)
    if others and args.dimensions and not args.vbench_python:
        raise InputError(f'{others[0]} is scored by VBench itself: {ENVIRONMENT}')
    if 'aesthetic_quality' in dimensions and not args.aesthetic_head:
        raise InputError('aesthetic_quality needs --aesthetic-head sa_0_4_vit_l_14_linear.pth, '
                         'from github.com/LAION-AI/aesthetic-predictor; or choose others with '
                         '--dimensions')
    if others and args.vbench_python:
        code = 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vbench") is None)'
        try:
            found = subprocess.run([args.vbench_python, '-c', code],
                                   capture_output=True).returncode == 0
        except OSError:
            found = False
        if not found:
            raise InputError(f'--vbench-python {args.vbench_python} is no Python that has '
                             f'VBench: {ENVIRONMENT}')
        videos_to_score(args, entries, others)
    results = Path(args.out) / 'results'
    check_writable(results if results.exists() else Path(args.out))
    return entries, dimensions, others


# ----------------------------------------------------------------------------------------
# table

def read_results(paths):
    """Result files and folders of them, VBench's or ours -> {dimension: score}."""
    files = [file for path in map(Path, paths) for file in
             (sorted(path.glob('*_eval_results.json')) if path.is_dir() else [path])]
    if not files:
        raise InputError(f'no *_eval_results.json in {", ".join(map(str, paths))}: make them '
                         'with eval_vbench.py score')
    scores, source = {}, {}
    for file in files:
        content = read_json(file)
        if not isinstance(content, dict) or not content:
            raise InputError(f'{file} is no result file: expected {{dimension: [score, '
                             '[videos]]}')
        for key, value in content.items():
            name = key.replace(' ', '_')
            if isinstance(value, list) and value:  # [the score, [videos]]
                value = value[0]
            if name not in VBENCH and name not in TINY:
                raise InputError(f'{file} has the unknown dimension {key!r}')
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not -1 <= value <= 1:
                raise InputError(f'{file}: the score of {name} is {str(value)[:40]}, not a '
                                 'number up to 1')
            if scores.get(name, value) != value:
                raise InputError(f'{name} is {scores[name]} in {source[name]} and {value} in '
                                 f'{file}: give one of them')
            scores[name], source[name] = float(value), file
    if set(scores) & set(TINY) and set(scores) & set(VBENCH):
        raise InputError('results of the tiny world and of VBench have no common total: give '
                         'one kind')
    return scores


def percent(value):
    return '-' if value is None else f'{100 * value:.2f}'


def lay_out(rows, markdown):
    """Rows of cells, the first the header -> aligned text, or Markdown."""
    if markdown:
        rows = [rows[0], ['---'] + ['---:'] * (len(rows[0]) - 1), *rows[1:]]
        return '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(c.rjust(w) if i else c.ljust(w)
                               for i, (c, w) in enumerate(zip(row, widths))) for row in rows)


def table(args):
    if args.percentages and args.results:
        raise InputError('give result files or --percentages, not both')
    if args.percentages:
        scores = {name: p / 100 for name, p in zip(VBENCH, args.percentages)}
        if max(args.percentages) <= 1:
            raise InputError('--percentages are 16 numbers from 0 to 100, such as 96.15, as '
                             'the papers print them')
    else:
        scores = read_results(args.results or ['runs/vbench/results'])
    groups, tiny = ('quality', 'semantic', 'total'), bool(set(scores) & set(TINY))
    papers = {}
    if not tiny:
        papers = {name: dict(zip(VBENCH, (p / 100 for p in row)))
                  for name, row in TABLE_3.items()}
    sums, theirs = aggregate(scores), {name: aggregate(row) for name, row in papers.items()}
    if args.format == 'json':
        result = {'name': args.name, 'scores': scores, **sums}
        if not tiny:
            result['papers'] = {
                'Reward-Forcing table 1': TABLE_1, 'RAVEN': RAVEN,
                'Reward-Forcing table 3': {name: {'scores': papers[name], **theirs[name]}
                                           for name in papers},
                'note': TABLE_3_NOTE}
        print(json.dumps(result, indent=1))
        return
    rows = [['dimension', args.name, *(f'{name} (table 3)' for name in papers)]]
    rows += [[name, percent(scores.get(name)), *(percent(row[name]) for row in papers.values())]
             for name in (TINY if tiny else VBENCH)]
    for i, group in enumerate(groups):
        rows.append([f'{group}, of these', percent(sums[group]),
                     *(percent(row[group]) for row in theirs.values())])
        if not tiny:
            column = (1, 2, 0)[i]  # table 1 begins with the total
            rows.append([f'{group}, in table 1', '',
                         *(f'{TABLE_1[name][column]:.2f}' for name in papers)])
    parts = [lay_out(rows, args.format == 'markdown')]
    if not tiny:
        order = ('total', 'quality', 'semantic')
        rows = [['method', *order, 'from'],
                [args.name, *(percent(sums[group]) for group in order), 'above']]
        rows += [[name, *(f'{x:.2f}' for x in row), source] for source, paper in
                 (('Reward-Forcing', TABLE_1), ('RAVEN', RAVEN)) for name, row in paper.items()]
        parts += [TABLE_3_NOTE, lay_out(rows, args.format == 'markdown')]
    if sums['missing']:
        parts.append(f'missing, and not counted as 0: {", ".join(sums["missing"])}')
    print('\n\n'.join(parts))


def main():
    args = parse_args()
    if args.verb == 'table':
        return table(args)
    if args.verb == 'sample':
        return sample(args)
    require_ffmpeg()  # videos are read by it
    entries, dimensions, others = check_scoring(args)
    with processes(args.device) as process:
        score(args, process, entries, dimensions)
    if others and process.rank == 0:  # VBench starts its own processes
        if args.vbench_python:
            score_with_vbench(args, others)
        else:
            print(f'not scored: {", ".join(others)}; VBench itself does: {ENVIRONMENT}')


if __name__ == '__main__':
    run_script(main)

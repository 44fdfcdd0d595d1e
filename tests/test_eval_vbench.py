"""eval_vbench.py: its constants, each dimension against a second computation, and the script as a user runs it."""
import argparse
import contextlib
import gzip
import hashlib
import io
import json
import math
import os
import sys
import time
from pathlib import Path

import imageio
import numpy as np
import pytest
import torch
from conftest import ROOT, frames_apart, ranks, run, start_script, torchrun
from PIL import Image

import eval_vbench as ev
import generate
import tiny_world
import wan_causal as wc

TINY = ROOT / "tests/tiny"


def call(*argv, script=ev):
    """A script's main() in this process -> (exit code, stdout, stderr)."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv, code = [script.__file__, *map(str, argv)], 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            wc.run_script(script.main)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


# ------------------------------------------------------------------------------------------- constants and table

# Two rows of VBench's public leaderboard, with their published quality, semantic and total.
LEADERBOARD = {
    "LaVie": ([91.41, 97.47, 98.30, 96.38, 49.72, 54.94, 61.90, 91.82, 33.32, 96.80, 86.39, 34.09, 52.69, 23.56, 25.93,
               26.41], (78.78, 70.31, 77.08)),
    "ModelScope": ([89.87, 95.29, 98.28, 95.79, 66.39, 52.06, 58.57, 82.25, 38.98, 92.40, 81.72, 33.68, 39.26, 23.39,
                    25.37, 25.67], (78.05, 66.54, 75.75))}


def from_percent(row):
    return {name: x / 100 for name, x in zip(ev.VBENCH, row)}


@pytest.mark.parametrize("row, published", LEADERBOARD.values(), ids=LEADERBOARD)
def test_the_leaderboard_comes_out(row, published):
    result = ev.aggregate(from_percent(row))
    for group, value in zip(("quality", "semantic", "total"), published):
        assert 100 * result[group] == pytest.approx(value, abs=0.02)
    assert result["missing"] == []


def test_what_table_3_reproduces_of_table_1():
    """Two Quality values to the rounding of the cells (0.0086, and 0.005 of the value), and nothing else."""
    reproduced = set()
    for name, row in ev.TABLE_3.items():
        result = ev.aggregate(from_percent(row))
        for group, value in zip(("total", "quality", "semantic"), ev.TABLE_1[name]):
            if abs(100 * result[group] - value) < 0.0136:
                reproduced.add((name, group))
    assert reproduced == {("Self Forcing", "quality"), ("Reward-Forcing", "quality")}
    quality = {name: 100 * ev.aggregate(from_percent(row))["quality"] for name, row in ev.TABLE_3.items()}
    assert round(quality["Self Forcing"], 2) == 85.08 and round(quality["Reward-Forcing"], 2) == 85.91
    for name in ev.TABLE_3:  # the 4 : 1 combination of Table 1's own columns does
        total, q, s = ev.TABLE_1[name]
        assert (4 * q + s) / 5 == pytest.approx(total, abs=0.0101)


def test_the_papers_totals_are_four_to_one():
    for total, q, s in [*ev.TABLE_1.values(), *ev.RAVEN.values()]:
        assert (4 * q + s) / 5 == pytest.approx(total, abs=0.02)


def test_constants_in_closed_form():
    """At the minima all is 0, at the maxima 1; half a dimension's weight for dynamic degree."""
    assert len(ev.VBENCH) == 16 and sum(row[3] for row in ev.VBENCH.values() if row[0] == "quality") == 6.5
    low, high = ({name: row[i] for name, row in ev.VBENCH.items()} for i in (1, 2))
    assert ev.aggregate(low)["total"] == 0 and ev.aggregate(high)["total"] == pytest.approx(1)
    assert ev.aggregate({**low, "dynamic_degree": 1})["quality"] == pytest.approx(0.5 / 6.5)
    assert ev.aggregate({**low, "scene": 0.8222})["semantic"] == pytest.approx(1 / 9)
    assert ev.aggregate({**high, "scene": 1})["semantic"] > 1  # not clipped


def test_a_missing_dimension_is_named_and_not_counted_as_zero(tmp_path):
    scores = from_percent(ev.TABLE_3["Reward-Forcing"])
    (tmp_path / "a_eval_results.json").write_text(json.dumps({k: [v, []] for k, v in scores.items() if k != "scene"}))
    code, out, _ = call("table", tmp_path)
    assert code == 0 and "missing, and not counted as 0: scene" in out
    rows = {line.split("  ")[0]: line.split()[-4:] for line in out.splitlines()}
    assert rows["quality, of these"] == ["85.91", "84.25", "85.08", "85.91"]
    assert rows["semantic, of these"][0] == rows["total, of these"][0] == rows["scene"][0] == "-"


def test_table_of_any_mixture_of_files_in_every_format(tmp_path):
    scores = from_percent(ev.TABLE_3["Self Forcing"])
    names = list(scores)
    (tmp_path / "results_2026-01-01-00:00:00_eval_results.json").write_text(json.dumps(
        {name: [scores[name], [{"video_path": "x.mp4", "video_results": True}]] for name in names[:9]}))
    other = tmp_path / "other.json"  # as in a leaderboard's zip: spaces, and a score alone
    other.write_text(json.dumps({name.replace("_", " "): scores[name] for name in names[9:]}))
    code, out, _ = call("table", tmp_path, other, "--format", "json", "--name", "mine")
    result = json.loads(out)
    assert code == 0 and result["name"] == "mine" and result["missing"] == [] and result["scores"] == scores
    assert result["papers"]["Reward-Forcing table 3"]["Self Forcing"]["total"] == result["total"]
    assert 100 * result["quality"] == pytest.approx(85.0805, abs=1e-4)

    given = ["table", "--percentages", *ev.TABLE_3["Self Forcing"]]
    _, text, _ = call(*given)
    _, markdown, _ = call(*given, "--format", "markdown")
    for out in (text, markdown):
        assert "85.08" in out and "RAVEN + CM-GRPO" in out and ev.TABLE_3_NOTE in out and "missing" not in out
    assert "| quality, of these | 85.08 | 84.25 | 85.08 | 85.91 |" in markdown
    assert len({len(line) for line in text.split("\n\n")[0].splitlines()}) == 1  # aligned


@pytest.mark.parametrize("content, words", [
    ("{", "as JSON"), ("[1]", "is no result file"), ('{"nonsense": [0.5, []]}', "unknown dimension 'nonsense'"),
    ('{"scene": ["high", []]}', "not a number up to 1"), ('{"scene": [54.36, []]}', "the score of scene is 54.36"),
    ('{"scene": [NaN, []]}', "the score of scene is nan"), ('{"scene": [true, []]}', "the score of scene is True"),
    ('{"scene": []}', "the score of scene is []"), ('{"scene": [0.5, []], "shape_iou": [0.5, []]}', "no common total")])
def test_a_malformed_result_is_one_sentence(tmp_path, content, words):
    (tmp_path / "x.json").write_text(content)
    code, out, err = call("table", tmp_path / "x.json")
    assert code == 2 and out == "" and err.count("error: ") == 1 and len(err.splitlines()) == 1 and words in err


def test_two_different_scores_of_one_dimension_are_refused(tmp_path):
    for name, value in (("a", 0.5), ("b", 0.6)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"scene": [value, []]}))
    code, _, err = call("table", tmp_path / "a.json", tmp_path / "b.json")
    assert code == 2 and "scene is 0.5 in" in err and "0.6 in" in err
    assert call("table", tmp_path / "a.json", tmp_path / "a.json")[0] == 0


@pytest.mark.parametrize("args, words", [
    (["table", "nowhere"], "cannot read nowhere"), (["table", "--percentages", *[0.5] * 16], "as the papers print"),
    (["table", "x.json", "--percentages", *[50] * 16], "not both"),
    (["table", "tests"], "no *_eval_results.json in tests"),
    (["sample", "--", "--frames", 8], "not 1 + 4k"), (["sample", "--samples", 0], "--samples: 0 must be at least 1"),
    (["sample", "--full-info", "LIST", "--dimensions", "niceness"], "--dimensions niceness: unknown"),
    (["sample", "--full-info", "LIST", "--dimensions", "scene"], "no prompt of this suite is for it"),
    (["sample", "--full-info", "nowhere.json"], "cannot read nowhere.json"),
    (["sample", "--full-info", "README.md"], "cannot read README.md as JSON"),
    (["sample", "--full-info", "BAD"], "entry 1 is not"), (["sample", "--full-info", "ODD"], "unknown dimension 'x'"),
    (["sample", "--full-info", "NESTED"], "entry 0 is not"), (["sample", "--full-info", "TEXTS"], "entry 0 is not"),
    (["sample", "--full-info", "LONG"], "cannot be a file name"), (["sample", "--extended", "LIST"], "4 entries"),
    (["sample", "--full-info", "NOSTYLE"], "no auxiliary_info"), (["sample", "--held-out", "none.txt"], "none.txt"),
    (["sample", "--full-info", "NOSTYLE", "--held-out", "none.txt"], "give --full-info or --held-out, not both"),
    (["sample", "--", "--sink", 3], "needs a --window"),
    (["sample", "--", "--bidirectional", "--window", 6], "causal generator"),
    (["sample", "--", "--timesteps", 500, 900], "must fall"), (["sample", "--", "--frames", 4097], "RoPE table"),
    (["sample", "--", "--window", 3, "--sink", 1, "--frames", 21],
     "--window 3 is smaller than a chunk of 3 and a sink of 1"),
    (["score"], "no list of prompts: install VBench's without its packages"),
    (["score", "--full-info", "LIST"], "needs --aesthetic-head"),
    (["score", "--full-info", "LIST", "--dimensions", "color"], "color is scored by VBench itself: make an"),
    (["score", "--full-info", "LIST", "--dimensions", "color", "--vbench-python", sys.executable], "that has VBench"),
    (["score", "--full-info", "LIST", "--dimensions", "color", "--vbench-python", "/no/such"], "no Python that has"),
    (["score", "--full-info", "LIST", "--dimensions", "temporal_flickering"], "5 of the 5 videos for temporal_flick"),
])
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(ROOT)
    lists = {"LIST": SUITE, "BAD": [SUITE[0], {"prompt": "x"}], "ODD": [{"prompt_en": "a", "dimension": ["x"]}],
             "LONG": [{"prompt_en": "a" * 240, "dimension": []}], "NESTED": [{"prompt_en": "a", "dimension": [["x"]]}],
             "TEXTS": ["a"],
             "NOSTYLE": [{"prompt_en": "a", "dimension": ["appearance_style"]}]}
    for name, entries in lists.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    args = [tmp_path / f"{a}.json" if a in lists else a for a in args]
    verb, *flags = args
    more = {"sample": ["--out", tmp_path / "out"], "score": ["--out", tmp_path / "out", "--device", "cpu"], "table": []}
    code, _, err = call(verb, *more[verb], *flags)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and words in errors[0], err
    assert not list(tmp_path.rglob("*.mp4"))


# -------------------------------------------------------------------------------------------------- the suite

SUITE = [
    {"prompt_en": "a blue plain circle bouncing on a gray background", "dimension": ["temporal_flickering"]},
    {"prompt_en": "façades, oil painting", "dimension": ["appearance_style"],
     "auxiliary_info": {"appearance_style": {"appearance_style": "oil painting"}}},
    {"prompt_en": "a red cat", "dimension": ["subject_consistency", "background_consistency", "color"],
     "auxiliary_info": {"color": {"color": "red"}}},
    {"prompt_en": "façades, oil painting", "dimension": ["overall_consistency", "aesthetic_quality"]}]


@pytest.fixture(scope="module")
def vbench_list(tmp_path_factory):
    """VBench's own list (Apache-2.0), byte for byte as in its wheel."""
    content = gzip.decompress((ROOT / "tests/VBench_full_info.json.gz").read_bytes())
    assert hashlib.sha256(content).hexdigest() == "5dd2de80ee43cda750b2b72ea7023657c0b90d3702041c7e4608c65dbe50dccd"
    path = tmp_path_factory.mktemp("list") / "VBench_full_info.json"
    path.write_bytes(content)
    return path


def test_names_of_all_946_entries(vbench_list, tmp_path):
    entries = ev.read_suite(vbench_list)
    assert len(entries) == 946
    videos = ev.video_names(entries, ev.VBENCH)
    # each entry's files by its own count, as the protocol says: 871 * 5 + 75 * 25, of which two prompts' are shared
    expected = [f"{e['prompt_en']}-{i}.mp4" for e in entries for i in range(25 if e["dimension"] == [
        "temporal_flickering"] else 5)]
    assert len(expected) == 6230 and set(videos) == set(expected) and len(videos) == 6220
    assert videos["The bund Shanghai, oil painting-3.mp4"] == (503, 3)
    assert videos["In a still frame, a stop sign-24.mp4"] == (0, 24)
    odd = [name for name in videos if not name.isascii()]
    assert len(odd) == 25 and all(name.rsplit("-", 1)[0].endswith("rock-carved façades") for name in odd)
    for name in (*odd, max(videos, key=lambda n: len(n.encode()))):  # the file system takes them, temporary names too
        wc.replace_file(tmp_path / name, lambda temporary: temporary.touch())
        assert name in os.listdir(tmp_path)
    # the same file and the same seed whichever dimension asks for it
    some = ev.video_names(entries, ["overall_consistency"])
    assert len(some) == 93 * 5 and all(videos[name] == where for name, where in some.items())
    assert len(ev.video_names(entries, ev.VBENCH, samples=1)) == 869 + 75 * 5


def test_the_installed_list_is_found_without_importing_the_package(tmp_path, monkeypatch, vbench_list):
    (tmp_path / "vbench").mkdir()
    (tmp_path / "vbench/__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "vbench/VBench_full_info.json").write_bytes(vbench_list.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    assert len(ev.read_suite(ev.installed_list())) == 946


# -------------------------------------------------------------------------------- dimensions, computed again

def bicubic(x):
    """Keys' kernel with a = -0.75, torch's; PIL's has a = -0.5."""
    x, a = abs(x), -0.75
    if x <= 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a if x < 2 else 0


def interpolation(size, new, kernel, reach):
    """(new, size) weights of an interpolation without antialiasing, with edge pixels repeated."""
    matrix = np.zeros((new, size))
    for i in range(new):
        where = (i + 0.5) * size / new - 0.5
        if kernel != bicubic:
            where = max(where, 0)
        for j in range(math.floor(where) - reach + 1, math.floor(where) + reach + 1):
            matrix[i, min(max(j, 0), size - 1)] += kernel(where - j)
    return matrix


def resized(frame, shape, kernel, reach):
    """frame (H, W, 3) uint8 -> (*shape, 3) float64, not clamped."""
    rows, columns = (interpolation(*sizes, kernel, reach) for sizes in zip(frame.shape, shape))
    return np.einsum("ih,hwc,jw->ijc", rows, frame.astype(float), columns)


def network_input(image, mean, std):
    return torch.tensor((image / 255 - mean) / std).float().permute(2, 0, 1)[None]


CLIP_MEAN, CLIP_STD = np.array([.48145466, .4578275, .40821073]), np.array([.26862954, .26130258, .27577711])


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Small random DINO, CLIP and aesthetic head, saved as the public ones are; inputs of 32 pixels."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, ViTConfig, ViTModel
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                 initializer_range=0.3)
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder / "dino")
    vocabulary = {word: i for i, word in enumerate(["<start>", "<end>", "oil", "painting", "van", "gogh", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<start> $A <end>", special_tokens=[("<start>", 0),
                                                                                                 ("<end>", 1)])
    for name in ("clip", "clip_large"):
        config = CLIPConfig(text_config=dict(**sizes, vocab_size=7, max_position_embeddings=16, eos_token_id=1,
                                             bos_token_id=0, pad_token_id=1),
                            vision_config=dict(**sizes, image_size=32, patch_size=8), projection_dim=24)
        CLIPModel(config).save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", model_max_length=16).save_pretrained(
            folder / name)
    torch.save({"weight": torch.randn(1, 24), "bias": torch.randn(1)}, folder / "head.pth")
    return folder


def synthetic(seed, frames, height=48, width=83):
    """Frames (T, H, W, 3) uint8 of noise that fades from one picture to another: sharp edges, many levels."""
    random = np.random.default_rng(seed)
    a, b = (random.choice([0, 255, 90], (height, width, 3)) for _ in range(2))
    return np.stack([np.uint8(a + (b - a) * t / (2 * frames)) for t in range(frames)])


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder with the videos of SUITE; of two lengths, so that frames and videos weigh differently."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "full_info.json").write_text(json.dumps(SUITE))
    (folder / "videos").mkdir()
    for n, name in enumerate(ev.video_names(SUITE, ev.VBENCH, samples=2)):
        imageio.mimwrite(folder / "videos" / name, synthetic(n, 3 + 2 * (n % 2)), fps=16, macro_block_size=1, quality=9,
                         pixelformat="yuv444p")
    return folder


def scoring(networks, *more):
    return ["--samples", 2, "--dino", networks / "dino", "--clip", networks / "clip", "--clip-large",
            networks / "clip_large", "--aesthetic-head", networks / "head.pth", "--device", "cpu", *more]


@pytest.fixture(scope="module")
def scored(videos, networks):
    """({dimension: [total, videos]}, the output) of `score`."""
    code, out, err = call("score", "--out", videos, *scoring(networks))
    assert code == 0, err
    files = (videos / "results").iterdir()
    return {k: v for file in files for k, v in json.loads(file.read_text()).items()}, out


def frames_of(videos, prompt, i):
    return np.stack(list(imageio.v3.imiter(videos / "videos" / f"{prompt}-{i}.mp4")))


def consistent(features):
    """VBench's loop."""
    unit = [f / np.linalg.norm(f) for f in features]
    return [(max(0, unit[i - 1] @ unit[i]) + max(0, unit[0] @ unit[i])) / 2 for i in range(1, len(unit))]


def compare(result, videos, prompt, per_video, over_frames):
    """A dimension's result against lists of scores, one for each video."""
    total, rows = result
    assert [row["video_path"] for row in rows] == [str(videos / "videos" / f"{prompt}-{i}.mp4") for i in (0, 1)]
    for row, values in zip(rows, per_video):
        assert row["video_results"] == pytest.approx(np.mean(values), abs=2e-5)
    assert len(per_video[0]) != len(per_video[1])
    expected = np.mean(np.concatenate(per_video)) if over_frames else np.mean([np.mean(v) for v in per_video])
    assert total == pytest.approx(expected, abs=2e-5)


@torch.no_grad()
def test_subject_consistency_again(scored, videos, networks):
    """Bilinear without antialiasing and without a crop: 48x83 -> 32x55, of which DINO sees 4x6 patches."""
    from transformers import ViTModel
    dino = ViTModel.from_pretrained(networks / "dino", add_pooling_layer=False).eval()
    mean, std = np.array([.485, .456, .406]), np.array([.229, .224, .225])
    values = []
    for i in (0, 1):
        images = [network_input(resized(f, (32, 55), lambda x: max(0, 1 - abs(x)), 1), mean, std)
                  for f in frames_of(videos, "a red cat", i)]
        states = [dino(x, interpolate_pos_encoding=True).last_hidden_state for x in images]
        assert states[0].shape[1] == 1 + 4 * 6
        values.append(consistent([s[0, 0].double().numpy() for s in states]))
    compare(scored[0]["subject_consistency"], videos, "a red cat", values, over_frames=True)


@torch.no_grad()
def test_background_consistency_and_aesthetic_quality_again(scored, videos, networks):
    """Bicubic without antialiasing, not clamped, then the middle 32 of 55 columns, from column 12 (11.5 to even)."""
    from transformers import CLIPModel
    head = torch.load(networks / "head.pth")
    for name, folder, prompt in (("background_consistency", "clip", "a red cat"),
                                 ("aesthetic_quality", "clip_large", "façades, oil painting")):
        clip, values = CLIPModel.from_pretrained(networks / folder).eval(), []
        for i in (0, 1):
            images = [resized(f, (32, 55), bicubic, 2) for f in frames_of(videos, prompt, i)]
            assert images[0].min() < 0 and images[0].max() > 255
            features = [clip.get_image_features(pixel_values=network_input(x[:, 12:44], CLIP_MEAN, CLIP_STD))
                        .pooler_output[0].double().numpy() for x in images]
            if name == "background_consistency":
                values.append(consistent(features))
            else:
                values.append([(head["weight"][0].double().numpy() @ f / np.linalg.norm(f) + head["bias"].item()) / 10
                               for f in features])
        compare(scored[0][name], videos, prompt, values, over_frames=name == "background_consistency")


def test_temporal_flickering_again(scored, videos):
    prompt = SUITE[0]["prompt_en"]
    values = [[(255 - np.abs(a.astype(float) - b).mean()) / 255 for a, b in zip(f, f[1:])] for f in
              (frames_of(videos, prompt, i) for i in (0, 1))]
    compare(scored[0]["temporal_flickering"], videos, prompt, values, over_frames=False)
    assert "static ones alone, see --filtered" in scored[1]


@torch.no_grad()
def test_appearance_style_again(scored, videos, networks):
    """Through PIL itself, which antialiases; without that the scores would be others."""
    from transformers import AutoTokenizer, CLIPModel
    clip, values, coarse = CLIPModel.from_pretrained(networks / "clip").eval(), [], []
    words = AutoTokenizer.from_pretrained(networks / "clip")(["oil painting"], return_tensors="pt")
    assert words["input_ids"].tolist() == [[0, 2, 3, 1]]

    def logit(image):
        return clip(pixel_values=network_input(image, CLIP_MEAN, CLIP_STD), **words).logits_per_image.item() / 100
    for i in (0, 1):
        frames = frames_of(videos, "façades, oil painting", i)
        images = [np.asarray(Image.fromarray(f).resize((55, 32), Image.BICUBIC)).astype(float) for f in frames]
        values.append([logit(x[:, 12:44]) for x in images])
        coarse.append([logit(resized(f, (32, 55), bicubic, 2)[:, 12:44]) for f in frames])
        mine = ev.pil_resize(torch.tensor(frames).permute(0, 3, 1, 2).float(), 32).permute(0, 2, 3, 1).numpy()
        assert np.abs(mine - np.stack(images)).max() <= 1  # levels
    total, rows = scored[0]["appearance_style"]
    assert total == pytest.approx(np.mean(np.concatenate(values)), abs=3e-4)
    assert [row["video_results"] for row in rows] == pytest.approx([np.mean(v) for v in values], abs=3e-4)
    assert abs(np.mean(np.concatenate(coarse)) - total) > 1e-3


def test_negative_cosines_count_as_zero():
    features = torch.tensor([[1, 0], [0.6, 0.8], [-1, 0]])  # previous: 0.6, -0.6; first: 0.6, -1
    assert ev.consistency(features).tolist() == pytest.approx([0.6, 0])


def test_sizes_at_832_by_480():
    frames = torch.rand(1, 3, 480, 832) * 255
    assert ev.dino_input(frames, 224).shape == (1, 3, 224, 388) and ev.clip_input(frames, 224).shape == (1, 3, 224, 224)
    ramp = torch.arange(388.).expand(1, 3, 224, 388)
    assert ev.crop(ramp, 224)[0, 0, 0, 0] == 82  # (388 - 224) / 2


def test_what_is_left_to_vbench_is_said(scored):
    assert set(scored[0]) == set(ev.NATIVE)
    assert "not scored: color, overall_consistency; VBench itself does: make an environment" in scored[1]


def test_two_ranks_score_as_one(scored, videos, networks, tmp_path):
    done = torchrun(2, "eval_vbench.py", "score", "--out", tmp_path, "--videos", videos / "videos", "--full-info",
                    videos / "full_info.json", *scoring(networks))
    assert done.returncode == 0, done.stderr
    for name in ev.NATIVE:
        (total, rows), (theirs, their_rows) = json.loads(
            (tmp_path / f"results/{name}_eval_results.json").read_text())[name], scored[0][name]
        assert total == pytest.approx(theirs, abs=1e-6)
        assert [row["video_path"] for row in rows] == [row["video_path"] for row in their_rows]
        assert [row["video_results"] for row in rows] == pytest.approx([row["video_results"] for row in their_rows],
                                                                       abs=1e-6)


def test_missing_and_unreadable_videos(videos, networks, tmp_path):
    copies = tmp_path / "videos"
    copies.mkdir()
    for file in (videos / "videos").glob("a *"):
        (copies / file.name).write_bytes(file.read_bytes())
    some = ["--samples", 2, "--device", "cpu", "--full-info", videos / "full_info.json", "--out", tmp_path,
            "--dimensions"]
    gone, broken = copies / "a red cat-1.mp4", copies / "a blue plain circle bouncing on a gray background-1.mp4"
    gone.unlink()
    code, _, err = call("score", *some, "background_consistency")
    assert code == 2 and f"1 of the 2 videos for background_consistency are missing, the first of them {gone}" in err
    frames = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
    imageio.mimwrite(tmp_path / "index first.mp4", frames, output_params=["-movflags", "+faststart"])
    first = (tmp_path / "index first.mp4").read_bytes()
    assert first.index(b"moov") < first.index(b"mdat") and len(ev.read_video(tmp_path / "index first.mp4")) == 40
    for content in (b"", b"no video", broken.read_bytes()[:2000], first[:len(first) // 2]):
        broken.write_bytes(content)
        code, _, err = call("score", *some, "temporal_flickering")
        assert code == 2 and f"error: {broken} cannot be read as a video of at least two frames" in err
        assert "Traceback" not in err
    assert not (tmp_path / "results").exists()
    broken.unlink()  # of the filtered ones, those that are there count
    code, out, _ = call("score", *some, "temporal_flickering", "--filtered", copies)
    assert code == 0 and "1 videos" in out and "see --filtered" not in out


def test_networks_that_do_not_fit_are_one_sentence(videos, networks):
    for flags, words in ((["--dino", networks / "clip"], "it must hold a ViTModel"),
                         (["--dino", "no/such"], "cannot load the ViTModel of no/such"),
                         (["--clip", networks], "cannot load the CLIPModel"), (["--aesthetic-head", "none"], "none"),
                         (["--aesthetic-head", networks / "dino/model.safetensors"], "is no aesthetic head")):
        code, _, err = call("score", "--out", videos, *scoring(networks), *flags)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1 and words in errors[0], err


def test_vbench_in_another_environment(tmp_path, videos, monkeypatch):
    """A stand-in package with VBench's command line and output; torchrun, arguments and result are real."""
    package = tmp_path / "site/vbench/launch"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "evaluate.py").write_text("""
import argparse, json, os
p = argparse.ArgumentParser()
for flag in ('--output_path', '--full_json_dir', '--videos_path'):
    p.add_argument(flag, required=True)
p.add_argument('--dimension', nargs='+', required=True)
args = p.parse_args()
prompts = [e['prompt_en'] for e in json.load(open(args.full_json_dir)) if args.dimension[0] in e['dimension']]
videos = [f'{args.videos_path}/{p}-{i}.mp4' for p in prompts for i in range(5)]
found = [{'video_path': v, 'video_results': 1.0} for v in videos if os.path.exists(v)]
if os.environ['RANK'] == '0' and 'FAIL' not in os.environ:
    name = os.path.join(args.output_path, 'results_2026-01-01-00:00:00_eval_results.json')
    json.dump({args.dimension[0]: [len(found) / len(videos), found]}, open(name, 'w'))
""")
    monkeypatch.setenv("PYTHONPATH", str(package.parent.parent))
    args = ["score", "--out", tmp_path, "--videos", videos / "videos", "--full-info", videos / "full_info.json",
            "--samples", 2, "--dimensions", "color", "--device", "cpu", "--vbench-python", sys.executable]
    code, out, err = call(*args)
    assert code == 0, err
    total, rows = json.loads((tmp_path / "results/color_eval_results.json").read_text())["color"]
    assert total == 2 / 5
    assert [row["video_path"] for row in rows] == [f"{videos}/videos/a red cat-{i}.mp4" for i in (0, 1)]
    assert "color                   0.4000  by VBench" in out
    monkeypatch.setenv("FAIL", "1")
    code, _, err = call(*args)
    assert code == 2 and "error: VBench failed on color (exit code 0): its messages are above" in err


# -------------------------------------------------------------------------------------------------- sampling

FAST = ["--", "--frames", 5, "--checkpoint", TINY / "reward_forced.safetensors", "--device", "cpu"]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """The tiny captions, 2 samples each, without interruption."""
    out = tmp_path_factory.mktemp("sampled")
    done = run("eval_vbench.py", "sample", "--samples", 2, "--out", out, *FAST)
    assert done.returncode == 0, done.stderr
    return out


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_tiny_model_through_all_verbs(sampled):
    captions = (TINY / "held_out_few.txt").read_text().split("\n")[:4]
    files = contents(sampled / "videos")
    assert set(files) == {f"{caption}-{i}.mp4" for caption in captions for i in (0, 1)}
    assert len(set(files.values())) == 8  # another seed each
    code, out, err = call("score", "--samples", 2, "--out", sampled, "--device", "cpu")
    assert code == 0 and "motion                  " in out, err
    code, out, _ = call("table", sampled / "results", "--format", "json")
    result = json.loads(out)
    assert code == 0 and set(result["scores"]) == set(ev.TINY) and result["missing"] == [] and "papers" not in result
    # the tiny world's own scorecard of the same files
    video = torch.stack([torch.tensor(np.stack(list(imageio.v3.imiter(sampled / "videos" / f"{caption}-{i}.mp4"))))
                         for caption in captions for i in (0, 1)]).permute(0, 4, 1, 2, 3) / 127.5 - 1
    card = tiny_world.scorecard(video, [caption for caption in captions for _ in (0, 1)])
    card["steadiness"] = 1 - card["flicker"] / 255
    assert result["scores"] == pytest.approx({name: card[name] for name in ev.TINY}, abs=1e-5)
    quality, semantic = ([result["scores"][n] for n in ev.TINY if ev.TINY[n][0] == g] for g in ("quality", "semantic"))
    assert result["total"] == pytest.approx((4 * np.mean(quality) + np.mean(semantic)) / 5)
    _, text, _ = call("table", sampled / "results")
    assert "colour" in text and "RAVEN" not in text  # no common scale with the papers' rows


def test_samples_are_those_of_generate(sampled, tmp_path):
    """The recorded seed and text give the same video."""
    record = json.loads((sampled / "samples.json").read_text())["videos"]
    assert len({video["seed"] for video in record.values()}) == len(record) == 8
    name = sorted(record)[-1]
    code, _, err = call(record[name]["prompt"], "--seed", record[name]["seed"], *FAST[1:], "--out", tmp_path / "x.mp4",
                        script=generate)
    assert code == 0, err
    assert frames_apart(tmp_path / "x.mp4", sampled / "videos" / name) < 1


def test_killed_and_gone_on_with_under_two_ranks(sampled, tmp_path):
    """Killed without warning in the middle, then resumed by two processes: the same videos as without."""
    args = ["eval_vbench.py", "sample", "--samples", 2, "--out", tmp_path, *FAST]
    process = start_script(os.devnull, os.devnull, *args)
    while len(list(tmp_path.glob("videos/[!.]*.mp4"))) < 1 and process.is_alive():
        time.sleep(0.02)
    process.kill()
    process.join()
    done = contents(tmp_path / "videos")
    finished = {name for name in done if not name.startswith(".")}
    assert 1 <= len(finished) < 8
    assert all(frames_apart(tmp_path / "videos" / name, sampled / "videos" / name) < 1 for name in finished)  # whole
    before = {name: (tmp_path / "videos" / name).stat().st_mtime_ns for name in finished}
    half = next(name for name in contents(sampled / "videos") if name not in finished)
    wc.temporary_name(tmp_path / "videos" / half).write_bytes(b"half")

    resumed = ranks(2, *args)
    assert resumed.returncode == 0, resumed.stderr
    assert f"8 videos, {8 - len(finished)} of them to be made" in resumed.stdout
    assert set(contents(tmp_path / "videos")) == set(contents(sampled / "videos"))  # and nothing else is left there
    assert all(frames_apart(file, sampled / "videos" / file.name) < 1 for file in (tmp_path / "videos").iterdir())
    assert all((tmp_path / "videos" / name).stat().st_mtime_ns == when for name, when in before.items())
    for name in ("samples.json", "full_info.json"):
        assert (tmp_path / name).read_text() == (sampled / name).read_text()


def test_another_setting_in_the_same_folder_is_refused(sampled, tmp_path):
    for mine, generators in ([], ["--frames", 9]), (["--seed", 1], []), ([], ["--chunk", 1]):
        code, _, err = call("sample", "--samples", 2, "--out", sampled, *mine, *FAST, *generators)
        assert code == 2 and "other flags" in err and "give the same to go on, or another --out" in err
    (tmp_path / "samples.json").write_text("[]")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a cat-0.mp4").touch()
    code, _, err = call("sample", "--out", tmp_path, *FAST)
    assert code == 2 and "samples.json is not what eval_vbench.py sample wrote" in err
    (tmp_path / "samples.json").unlink()  # whose videos these are is not known any more
    code, _, err = call("sample", "--out", tmp_path, *FAST)
    assert code == 2 and "samples.json, which says of what texts and seeds, is gone: take another --out" in err
    assert [file.name for file in tmp_path.iterdir()] == ["videos"]


def test_extended_prompts_are_named_by_the_original(tmp_path):
    """The generator is given the line of the entry, the teacher here; the file keeps VBench's name."""
    (tmp_path / "list.json").write_text(json.dumps(SUITE))
    lines = ["a", "b", "a red plain circle bouncing on a gray background", "d"]
    (tmp_path / "extended.txt").write_text("\n".join(lines) + "\n")
    flags = ["--frames", 5, "--bidirectional", "--steps", 2, "--device", "cpu"]
    code, _, err = call("sample", "--full-info", tmp_path / "list.json", "--extended",
                        tmp_path / "extended.txt", "--dimensions", "color", "--samples", 1, "--seed", 3,
                        "--out", tmp_path / "out", "--", *flags)
    assert code == 0, err
    assert [file.name for file in (tmp_path / "out/videos").iterdir()] == ["a red cat-0.mp4"]
    assert json.loads((tmp_path / "out/samples.json").read_text())["videos"] == {
        "a red cat-0.mp4": {"prompt": lines[2], "seed": 3_002_000}}
    code, _, err = call(lines[2], "--seed", 3_002_000, *flags, "--out", tmp_path / "same.mp4", script=generate)
    assert code == 0, err
    assert frames_apart(tmp_path / "same.mp4", tmp_path / "out/videos/a red cat-0.mp4") < 1


def test_any_folder_of_videos_is_scored_without_prompts(networks, tmp_path):
    """As VBench's custom input: the mean over frames of all videos in the folder."""
    (tmp_path / "mine").mkdir()
    for n, name in enumerate(("one.mp4", "Some other film.mp4")):
        imageio.mimwrite(tmp_path / "mine" / name, synthetic(n, 3 + n), fps=16, macro_block_size=1,
                         pixelformat="yuv444p")
    (tmp_path / "mine/one.mp4").rename(tmp_path / "mine/one.MP4")
    flags = ["--custom", "--videos", tmp_path / "mine", "--out", tmp_path / "out", "--dino", networks / "dino",
             "--device", "cpu"]
    code, _, err = call("score", *flags, "--dimensions", "subject_consistency")
    assert code == 0, err
    total, rows = json.loads((tmp_path / "out/results/subject_consistency_eval_results.json").read_text())[
        "subject_consistency"]
    assert [Path(row["video_path"]).name for row in rows] == ["Some other film.mp4", "one.MP4"]
    a, b = (row["video_results"] for row in rows)
    assert total == pytest.approx((3 * a + 2 * b) / 5)  # of 3 and 2 pairs of frames
    for flag, words in ((("--samples", 3), "--samples 3 has no effect here: every video"),
                        (("--aesthetic-head", "x.pth"), "--aesthetic-head x.pth has no effect here: aesthetic quality"),
                        (("--clip", "x"), "--clip x has no effect here"),
                        (("--vbench-gpus", 2), "--vbench-gpus 2 has no effect here")):
        code, _, err = call("score", *flags, "--dimensions", "subject_consistency", *flag)
        assert code == 2 and words in err
    (tmp_path / "others").mkdir()
    (tmp_path / "mine/one.MP4").rename(tmp_path / "others/one.mp4")
    result = tmp_path / "out/results/subject_consistency_eval_results.json"
    before = result.read_text()
    code, _, err = call("score", *flags, "--videos", tmp_path / "others", "--dimensions", "subject_consistency")
    assert code == 2 and f"{result} holds scores of {tmp_path / 'mine'}: give another --out" in err
    assert result.read_text() == before
    args = argparse.Namespace(out=tmp_path / "out", videos=None, filtered=None)  # its own videos, out/videos
    with pytest.raises(wc.InputError, match="holds scores of .*mine: give another --out"):
        ev.check_results(args, ["subject_consistency"])
    ev.write_results(args.out, "subject_consistency", 0.5, [{"video_path": "/once/out/videos/a.mp4", "video_results": 0.5}])
    ev.check_results(args, ["subject_consistency"])  # wherever it lay then
    (tmp_path / "full").mkdir()
    (tmp_path / "full/results").touch()
    code, _, err = call("score", *flags, "--out", tmp_path / "full", "--dimensions", "subject_consistency")
    assert code == 2 and f"cannot write to {tmp_path / 'full/results'}" in err
    result.write_text('["not", "a result"]')
    code, _, err = call("score", *flags, "--dimensions", "subject_consistency")
    assert code == 2 and f"{result} holds scores of other videos" in err
    code, _, err = call("score", "--custom", "--videos", tmp_path / "mine", "--dimensions", "scene")
    assert code == 2 and "no prompt of this suite is for it" in err
    code, _, err = call("score", "--custom", "--out", tmp_path / "out", "--device", "cpu")
    assert code == 2 and "--custom needs --videos" in err


def test_names_that_a_disk_keeps_decomposed_are_found(tmp_path):
    entry = {"prompt_en": "a caf\u00e9", "dimension": ["subject_consistency"]}
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a cafe\u0301-0.mp4").touch()
    args = argparse.Namespace(videos=None, out=tmp_path, filtered=None, custom=False, samples=1)
    assert [job[1].name for job in ev.videos_to_score(args, [entry], ["subject_consistency"])] == ["a cafe\u0301-0.mp4"]


@pytest.mark.parametrize("verb", ["sample", "score", "table"])
def test_help_of_each_verb(verb):
    code, out, _ = call(verb, "--help")
    assert code == 0 and {"sample": "--extended", "score": "--vbench-python", "table": "--percentages"}[verb] in out

"""The miniature's plan and its runner; the stages themselves are run by the other tests."""
import json
import math
from pathlib import Path

import miniature
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_house import refused_commands


def test_every_command_of_the_plan_is_accepted_by_its_script(tmp_path):
    jobs = miniature.plan(tmp_path, [], fast=False, seeds=[0, 1, 2])
    assert refused_commands([command for command, _ in jobs.values()]) == ""
    assert len(jobs) > 150
    jobs = miniature.plan(tmp_path, [], fast=False, seeds=None)
    counts = {name: jobs[f"{name}-0 over time"][0][-3] for name in ("raven", "self_forcing_frame", "ode", "raven_cm")}
    assert counts == {"raven": "100", "self_forcing_frame": "100", "ode": "24", "raven_cm": "24"}
    starts = {name: command[command.index("--init") + 1].split("/")[-2] for name, (command, _) in
              jobs.items() if "--init" in command}
    assert starts["reward-3"] == "ode-3" and starts["ode-3"] == "student-0" and "teacher_forcing-1" not in starts
    assert starts["raven_cm-2"] == "raven_frame-2" and starts["raven_frame-2"] == "ode_frame-2"
    for *_, left, right, _, _, _ in miniature.CLAIMS:  # at least four seeds of what a claim compares
        assert f"{left}-3" in jobs and f"{right}-3" in jobs


def test_seeds_of_a_start(tmp_path):
    """One seed after the other, and no start is missing whatever is asked for."""
    jobs = [name for name in miniature.plan(tmp_path, ["raven_cm"], False, None) if " " not in name]
    assert jobs == ["trajectories", "student-0", *(f"{name}-{seed}" for seed in range(4) for name in
                                                  ("ode_frame", "raven_frame", "raven_cm"))]
    other = miniature.plan(tmp_path, ["raven_cm"], False, [2])  # on another machine
    assert [name for name in other if " " not in name] == ["trajectories", "student-0", "ode_frame-2", "raven_frame-2",
                                                           "raven_cm-2"]
    assert {name: other[name] for name in other if "2" in name} == {
        name: job for name, job in miniature.plan(tmp_path, ["raven_cm"], False, [1, 2, 3]).items() if "-2" in name}
    everything = [name for name in miniature.plan(tmp_path, [], False, [6]) if name.startswith(("student", "ode-"))]
    assert everything[:2] == ["student-0", "student-0 compare"] and {"student-6", "ode-6"} <= set(everything)


def test_a_run_comes_after_what_it_starts_from(tmp_path):
    for names in ([], ["raven_cm"], ["reward"]):
        seen = set()
        for name, (command, needs) in miniature.plan(tmp_path, names, fast=True, seeds=[0, 1]).items():
            assert set(needs) <= seen
            for word in command:  # whatever it reads below the runs' folder is written by a job that it waits for
                before = command[command.index(word) - 1]
                if word.startswith(str(tmp_path)) and before in ("--init", "--data", "compare", "over_time", "picture"):
                    assert Path(word).relative_to(tmp_path).parts[0] in needs
            seen.add(name)
    assert {"raven_frame-0", "ode_frame-0", "student-0", "trajectories"} <= set(miniature.plan(tmp_path, ["raven_cm"], True, None))


def test_the_runner_goes_on_where_it_was_and_stops_at_a_failure(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, pathlib\nfolder, name = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
                      "(folder / 'ran').open('a').write(name)\n"
                      "sys.exit(name == 'c' and not (folder / 'mended').exists())\n")
    jobs = {name: ([str(script), str(tmp_path), name], needs) for name, needs in
            (("a", []), ("b", ["a"]), ("c", ["b"]), ("d", ["c"]))}
    with pytest.raises(SystemExit, match=r"c failed, exit code 1; its messages are in .*c\.log"):
        miniature.execute(jobs, tmp_path, at_once=2)
    assert (tmp_path / "ran").read_text() == "abc"
    (tmp_path / "mended").touch()
    miniature.execute(jobs, tmp_path, at_once=2)
    assert (tmp_path / "ran").read_text() == "abccd"


def test_curves(tmp_path):
    for seed, shift in ((0, 0.0), (1, 1.0)):
        folder = tmp_path / f"run-{seed}"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("\n".join(json.dumps({"reward": i + shift}) for i in range(6)))
    curve = miniature.read_curves(tmp_path, "run", "reward", 2)
    assert torch.equal(curve, torch.tensor([[.5, 1.5, 2.5, 3.5, 4.5], [1.5, 2.5, 3.5, 4.5, 5.5]]))
    bands = miniature.curve_bands({"reward_cm": curve})
    assert bands == {"reward_cm": {"mean": [1, 2, 3, 4, 5], "lowest": [.5, 1.5, 2.5, 3.5, 4.5],
                                   "highest": [1.5, 2.5, 3.5, 4.5, 5.5]}}
    figure = miniature.draw_curves(tmp_path / "x.png", bands, 2)
    assert min(Image.open(tmp_path / "x.png").size) >= 400
    axes, = figure.axes
    line, = axes.lines
    assert list(line.get_ydata()) == bands["reward_cm"]["mean"]
    assert (axes.dataLim.y0, axes.dataLim.y1) == (0.5, 5.5)  # the band's
    assert [text.get_text() for text in axes.get_legend().texts] == ["reward forcing + CM-GRPO"]


def kept_figures():
    return miniature.read_figures(ROOT / "tests/tiny")


def test_pictures_of_kept_figures(tmp_path):
    """`--draw` on the committed figures: the pictures beside the tests are of these."""
    miniature.report(ROOT / "tests/tiny", tmp_path)
    for name in ("claims.png", "curves.png", "over_time.png", "trades.png"):
        sizes = [Image.open(folder / name).size for folder in (tmp_path, ROOT / "tests")]
        assert sizes[0] == sizes[1] and min(sizes[0]) >= 400
    kept = json.loads((ROOT / "tests/tiny/curves.json").read_text())
    assert {len(band["mean"]) for band in kept.values()} == {26}
    for band in kept.values():
        assert all(low <= mean <= high for low, mean, high in zip(*map(band.get, ("lowest", "mean", "highest"))))


def test_every_run_that_is_drawn_has_words():
    drawn = {run for claim in miniature.CLAIMS for run in claim[1:3]}
    assert drawn <= set(miniature.STAGES) <= set(miniature.tiny_world.WORDS)
    assert {method + family for method in miniature.METHODS for family in miniature.FAMILIES.values()} <= \
        set(miniature.STAGES)


def made_up(captions=200, **runs):
    """Figures as `read_figures` gives them: run=([mean of each seed], noise over the captions), of every measurement."""
    made = {}
    for run, (means, noise) in runs.items():
        wave = torch.linspace(-1, 1, captions)
        made[run] = {key: {seed: mean + noise * (wave - wave.mean()) for seed, mean in enumerate(means)}
                     for key in ("reward", "path", "texture_correlation", "late_reward")}
    return made


def test_students_t():
    for freedom, value in ((1, 12.706), (3, 3.182), (10, 2.228), (60, 2.000)):  # as tables have it
        assert miniature.t_quantile(0.975, freedom) == pytest.approx(value, rel=0.003)


def test_verdicts():
    for gap, half, size, kind, verdict in (
            (0.3, 0.2, 0.1, "more", "yes"), (-0.3, 0.2, 0.1, "more", "no"), (0.05, 0.1, 0.1, "more", "alike"),
            (-0.05, 0.1, 0.1, "more", "alike"), (0.05, 0.2, 0.1, "more", "unclear"), (0.1, math.inf, 0.1, "more", "unclear"),
            (-0.05, 0.04, 0.1, "keeps", "yes"), (-0.2, 0.05, 0.1, "keeps", "no"), (-0.1, 0.05, 0.1, "keeps", "alike"),
            (-0.1, 0.15, 0.1, "keeps", "unclear"), (0.5, 0.15, 0.1, "keeps", "yes")):
        assert miniature.judge(gap, half, size, kind) == verdict


def test_the_interval_is_of_seeds_and_captions():
    figures = made_up(teacher=([1.0], 0), ode=([0.4, 0.6], 0), ode_frame=([0.1, 0.3], 0),
                      reward=([0.8, 1.0, 0.9], 0), student=([0.5], 0))
    spread, freedom = miniature.pooled_spread(figures, "reward")
    assert freedom == 4 and spread == pytest.approx(((0.02 + 0.02 + 0.02) / 4) ** 0.5)
    assert miniature.size_that_matters(figures, "late_reward") == pytest.approx((0.5 + 0.8) / 4)
    one, = (c for c in miniature.claims(figures) if c["left"] == "reward" and c["measurement"] == "reward")
    assert one["gap"] == pytest.approx(0.4) and one["seeds"] == (3, 2) and one["verdict"] == "yes"
    assert one["half"] == pytest.approx(miniature.t_quantile(0.975, 4) * spread * (1 / 3 + 1 / 2) ** 0.5)
    # Welch: variances 0.01 of 3 seeds and 0.02 of 2, so 1.685 degrees of freedom
    own = 0.01 / 3 + 0.02 / 2
    freedom = own ** 2 / ((0.01 / 3) ** 2 / 2 + (0.02 / 2) ** 2)
    assert freedom == pytest.approx(1.684, abs=1e-3)
    assert one["own"] == pytest.approx(miniature.t_quantile(0.975, freedom) * own ** 0.5, rel=1e-4)
    assert one["own_verdict"] == "unclear"
    # what captions have in common does not widen it, what they have not does
    both = made_up(teacher=([1.0], 0), ode=([0.4, 0.6], 1), ode_frame=([0.2], 1), reward=([0.8, 1.0, 0.9], 1))
    same, = (c for c in miniature.claims(both) if c["left"] == "reward" and c["measurement"] == "reward")
    apart = {**both, **made_up(reward=([0.8, 1.0, 0.9], -1))}
    wide, = (c for c in miniature.claims(apart) if c["left"] == "reward" and c["measurement"] == "reward")
    assert same["half"] == pytest.approx(one["half"], rel=0.2) and wide["half"] > same["half"]
    apart["ode"]["reward"][0] = apart["ode"]["reward"][0].repeat(2)  # more samples are no more captions
    twice, = (c for c in miniature.claims(apart) if c["left"] == "reward" and c["measurement"] == "reward")
    assert twice["half"] == pytest.approx(wide["half"], rel=1e-4)


def test_what_stands_beside_a_claim():
    """The difference of the seeds that both runs have, and a bound that is never below its figure."""
    figures = made_up(teacher=([1.0], 0), ode=([0.4, 0.6, 0.9], 0), ode_frame=([0.1], 0), reward=([0.8, 1.1], 0))
    assert miniature.of_same_seeds(figures, "reward", "ode", "reward") == pytest.approx((0.4 + 0.5) / 2)
    figures["reward"]["reward"] = {7: torch.ones(3)}
    assert miniature.of_same_seeds(figures, "reward", "ode", "reward") is None
    assert miniature.verdict_words(dict(verdict="alike", gap=-0.0301, half=0.03)) == "no difference larger than 0.07"


def test_without_seeds_nothing_is_decided(tmp_path):
    figures = made_up(teacher=([1.0], 0), ode=([0.4], 0), ode_frame=([0.2], 0), reward=([0.9], 0))
    assert {c["verdict"] for c in miniature.claims(figures)} == {"unclear"}
    assert "+0.50 (no spread) | unclear | – | +0.50 |" in miniature.claims_table(figures)
    miniature.draw_claims(tmp_path / "claims.png", list(miniature.claims(figures)))  # lines without an end
    assert list(miniature.claims({})) == [] and miniature.claims_table({}).count("not run") == len(miniature.CLAIMS)


def test_claims_are_drawn_as_they_are_decided(tmp_path):
    figures = made_up(teacher=([1.0], 0), ode=([0.4, 0.6], 0), ode_frame=([0.1, 0.3], 0), student=([0.5], 0),
                      reward=([0.8, 1.0, 0.9], 0))
    rows = list(miniature.claims(figures))
    figure = miniature.draw_claims(tmp_path / "claims.png", rows)
    axes, = figure.axes
    drawn = {text.get_text() for text in axes.texts}
    assert {c["words"] for c in rows} <= drawn and "0.90 − 0.50" in drawn
    points = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert points == pytest.approx([c["gap"] / c["size"] for c in rows])
    assert axes.get_xlim()[1] > max((abs(c["gap"]) + c["half"]) / c["size"] for c in rows)  # whole bars


def test_figures_are_gathered_from_the_measurements(tmp_path):
    numbers = {"reward": torch.tensor([0.25, 0.5]), "path": torch.tensor([1.0, 2.0])}
    miniature.tiny_world.keep_measured(tmp_path, "raven_50-1", numbers)
    miniature.tiny_world.keep_measured(tmp_path, "raven_50-1.long", {"late_reward": torch.tensor([0.75])})
    miniature.tiny_world.keep_measured(tmp_path, "teacher", numbers)
    miniature.gather(tmp_path)
    figures = miniature.read_figures(tmp_path)
    assert set(figures) == {"raven_50", "teacher"} and list(figures["raven_50"]["reward"]) == [1]
    assert figures["raven_50"]["late_reward"][1].tolist() == [0.75]
    assert figures["teacher"]["path"][0].tolist() == [1, 2]
    # what another machine measured stays, and is written over by what is measured here
    (tmp_path / "measured/raven_50-1.safetensors").rename(tmp_path / "measured/raven_50-2.safetensors")
    miniature.tiny_world.keep_measured(tmp_path, "teacher", {"path": torch.tensor([3.0])})
    miniature.gather(tmp_path)
    figures = miniature.read_figures(tmp_path)
    assert sorted(figures["raven_50"]["reward"]) == [1, 2] and figures["teacher"]["path"][0].tolist() == [3]
    assert figures["teacher"]["reward"][0].tolist() == [0.25, 0.5]


def test_reward_against_motion():
    """Points of one way are of the same seeds and the same samples."""
    figures = made_up(ode=([0.5, 0.7], 0), reward_50=([0.6, 0.8], 0), reward=([0.9, 1.1, 9.0], 0),
                      reward_exact=([0.9], 0))  # seed 2 was measured after the last step alone
    assert miniature.trades(figures) == {
        "reward": [(0, pytest.approx(0.6), pytest.approx(0.6)), (50, pytest.approx(0.7), pytest.approx(0.7)),
                   (200, pytest.approx(1.0), pytest.approx(1.0))],
        "reward_exact": [(0, pytest.approx(0.5), pytest.approx(0.5)), (200, pytest.approx(0.9), pytest.approx(0.9))]}
    assert miniature.trades_table(miniature.trades(figures)).splitlines()[2:] == [
        "| reward forcing | 0.60, 0.60 | 0.70, 0.70 | 1.00, 1.00 |",
        "| reward forcing, exact gradient | 0.50, 0.50 | – | 0.90, 0.90 |"]


def test_the_page_has_what_was_measured():
    page, figures = (ROOT / "tests/claims.md").read_text(), kept_figures()
    for part in (miniature.RULE, miniature.sizes_table(figures), miniature.claims_table(figures),
                 miniature.trades_table(miniature.trades(figures)), miniature.results_table(figures)):
        assert part in page, part

"""The miniature's plan and its runner; the stages themselves are run by the other tests."""
import json
from pathlib import Path

import miniature
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_house import refused_commands


def test_every_command_of_the_plan_is_accepted_by_its_script(tmp_path):
    jobs = miniature.plan(tmp_path, [], fast=False, seeds=3)
    assert refused_commands([command for command, _ in jobs.values()]) == ""
    assert len(jobs) > 60
    starts = {name: command[command.index("--init") + 1].split("/")[-2] for name, (command, _) in
              miniature.plan(tmp_path, [], fast=False, seeds=None).items() if "--init" in command}
    assert starts["reward-1"] == "ode-0" and starts["raven_cm-1"] == "raven-1" and "causvid-1" not in starts


def test_a_run_comes_after_what_it_starts_from(tmp_path):
    for names in ([], ["raven_cm"], ["reward"]):
        seen = set()
        for name, (command, needs) in miniature.plan(tmp_path, names, fast=True, seeds=2).items():
            assert set(needs) <= seen
            for word in command:  # whatever it reads below the runs' folder is written by a job that it waits for
                before = command[command.index(word) - 1]
                if word.startswith(str(tmp_path)) and before in ("--init", "--data", "compare", "drift", "picture"):
                    assert Path(word).relative_to(tmp_path).parts[0] in needs
            seen.add(name)
    assert {"raven-0", "ode-0", "student-0", "trajectories"} <= set(miniature.plan(tmp_path, ["raven_cm"], True, 2))


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


def test_pictures_of_kept_figures(tmp_path):
    """`--draw` on the committed figures: the pictures beside the tests are of these."""
    miniature.report(ROOT / "tests/tiny", tmp_path)
    for name in ("claims.png", "curves.png"):
        sizes = [Image.open(folder / name).size for folder in (tmp_path, ROOT / "tests")]
        assert sizes[0] == sizes[1] and min(sizes[0]) >= 400
    kept = json.loads((ROOT / "tests/tiny/curves.json").read_text())
    steps = {name: len(band["mean"]) for name, band in kept.items()}
    assert steps == {"raven_cm": 161, "reward_cm": 26, "reward_em": 26}
    for band in kept.values():
        assert all(low <= mean <= high for low, mean, high in zip(*map(band.get, ("lowest", "mean", "highest"))))


def test_every_run_that_is_drawn_has_words():
    assert {*miniature.STAGES, *(figure.split()[0] for claim in miniature.CLAIMS for figure in claim[1:3])} <= \
        set(miniature.tiny_world.WORDS)


def test_claims(tmp_path):
    """yes, no, and unclear where the seeds differ more than the runs; a run that is not there is left out."""
    rows = {"student-0": {"path": 1.0, "texture_correlation": 0.6}, "ode-0": {"path": 1.2, "texture_correlation": 0.5,
            "reward": 0.5}, "reward-0": {"path": 0.1, "texture_correlation": 0.9, "reward": 0.4},
            "reward-1": {"path": 0.2, "texture_correlation": 0.0, "reward": 0.4}}
    (tmp_path / "results.json").write_text(json.dumps(rows))
    verdicts = [line.split(" | ")[-1].strip(" |") for line in miniature.claims_table(tmp_path).splitlines()[2:]]
    assert verdicts == ["yes", "unclear", "unclear", "no", "no"]
    assert "against 0.9 × student path 1.00" in miniature.claims_table(tmp_path)
    bars = miniature.claim_bars(miniature.claims(tmp_path))
    assert [bar[-1] for bar in bars] == verdicts
    assert bars[0][:2] == (miniature.CLAIMS[0][0], "pixels per frame: ODE only against student, 4 steps")
    assert bars[0][2] == pytest.approx(1 / 3) and bars[0][4] == "1.20 against 0.9 × 1.00"
    assert bars[4][2] == pytest.approx(0.15 / 1.08 - 1)  # to the left of the line
    assert bars[0][3] == pytest.approx(0.005 ** 0.5 / 0.9)  # the spread of reward's path
    figure = miniature.draw_claims(tmp_path / "claims.png", bars)
    assert min(Image.open(tmp_path / "claims.png").size) >= 300
    axes, = figure.axes
    assert [patch.get_width() for patch in axes.patches] == pytest.approx([bar[2] for bar in bars])
    drawn = {text.get_text() for text in axes.texts}
    assert drawn == {text for bar in bars for text in (bar[0], bar[1], bar[4])}
    (tmp_path / "results.json").write_text(json.dumps({k: v for k, v in rows.items() if k != "reward-1"}))
    assert {verdict for *_, verdict in miniature.claims(tmp_path)} == {"unclear"}  # no run has two seeds
    assert "(no spread, 1 and 1 seeds)" in miniature.claims_table(tmp_path)
    miniature.draw_claims(tmp_path / "claims.png", miniature.claim_bars(miniature.claims(tmp_path)))


def test_the_readme_has_the_claims_as_measured():
    readme = (ROOT / "tests/README.md").read_text()
    assert miniature.claims_table(ROOT / "tests/tiny") in readme

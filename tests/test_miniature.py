"""The miniature's plan and its runner; the stages themselves are run by the other tests."""
import json
import re
from pathlib import Path

import miniature
import pytest
import torch
from conftest import ROOT
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
    miniature.draw_curves(tmp_path / "x.svg", {"run": curve}, "title")
    svg = (tmp_path / "x.svg").read_text()
    assert svg.startswith("<svg") and svg.count("<polyline") == 1 and "step 4" in svg


def test_claims(tmp_path):
    """yes, no, and unclear where the seeds differ more than the runs; a run that is not there is left out."""
    rows = {"student-0": {"path": 1.0, "texture_correlation": 0.6}, "ode-0": {"path": 1.2, "texture_correlation": 0.5,
            "reward": 0.5}, "reward-0": {"path": 0.1, "texture_correlation": 0.9, "reward": 0.4},
            "reward-1": {"path": 0.2, "texture_correlation": 0.0, "reward": 0.4}}
    (tmp_path / "results.json").write_text(json.dumps(rows))
    verdicts = [line.split(" | ")[-1].strip(" |") for line in miniature.claims_table(tmp_path).splitlines()[2:]]
    assert verdicts == ["yes", "unclear", "unclear", "no", "no"]
    assert "against 0.9 × student path 1.00" in miniature.claims_table(tmp_path)
    miniature.draw_claims(tmp_path / "claims.svg", list(miniature.claims(tmp_path)))
    drawn = (tmp_path / "claims.svg").read_text()
    bars = re.findall(r'<rect x="([^"]+)" y="\d+" width="([^"]+)".*?<title>(\w+)', drawn)
    assert [verdict for *_, verdict in bars] == verdicts
    assert bars[0][:2] == ("500.0", "50.0")  # ODE's path is a third above 0.9 of the student's
    assert float(bars[4][0]) + float(bars[4][1]) == 500  # to the left of the line
    (tmp_path / "results.json").write_text(json.dumps({k: v for k, v in rows.items() if k != "reward-1"}))
    assert {verdict for *_, verdict in miniature.claims(tmp_path)} == {"unclear"}  # no run has two seeds
    assert "(no spread, 1 and 1 seeds)" in miniature.claims_table(tmp_path)
    miniature.draw_claims(tmp_path / "claims.svg", list(miniature.claims(tmp_path)))


def test_the_readme_has_the_claims_as_measured():
    readme = (ROOT / "README.md").read_text()
    assert miniature.claims_table(ROOT / "tests/tiny") in readme

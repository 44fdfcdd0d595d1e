"""The form of the project: its files, its dependencies, and a README whose commands are real."""
import ast
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, python

pytestmark = pytest.mark.quick

SCRIPTS = ["wan_causal.py", "distill_dmd.py", "ode_init.py", "reward_forcing.py", "cm_grpo.py", "generate.py",
           "eval_vbench.py"]
PRESENT = [name for name in SCRIPTS if (ROOT / name).exists()]
READMES = ["README.md", "tests/README.md"]
RUNTIME = {"torch", "safetensors", "transformers", "huggingface_hub", "numpy", "imageio", "tqdm"}


def test_no_other_python_file_at_the_top():
    assert {p.name for p in ROOT.glob("*.py")} <= set(SCRIPTS)


@pytest.mark.parametrize("name", PRESENT)
def test_imports(name):
    """Scripts import the runtime packages, the standard library and wan_causal; nothing else."""
    allowed = RUNTIME | set(sys.stdlib_module_names) | ({"wan_causal"} if name != "wan_causal.py" else set())
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else \
            [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {m.split(".")[0] for m in modules} <= allowed


def test_importing_has_no_effect():
    code = f"import sys; sys.argv = ['x', '--nonsense']; import {', '.join(name[:-3] for name in PRESENT)}, torch; " \
           "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()"
    done = python("-c", code)
    assert done.returncode == 0 and done.stdout == "", done.stderr


def test_requirements_are_pinned_and_are_the_runtime_packages():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert all("==" in line for line in lines)
    assert {re.split(r"[\[=]", line)[0].replace("-", "_") for line in lines} == RUNTIME


def readme_commands():
    """[script, arguments] of every command in the shell blocks of both READMEs."""
    text = "\n".join((ROOT / name).read_text() for name in READMES)
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        script = next((w for w in words if w.endswith(".py")), None)
        if script:
            arguments = words[words.index(script) + 1:]
            yield [script, *arguments]
            if "--" in arguments:  # what eval_vbench.py sample hands on
                yield ["generate.py", *arguments[arguments.index("--") + 1:]]


def refused_commands(commands):
    """What is wrong with [script, arguments ...]: each is given to its script's own parser, which is asked to stop
    there; one process for all."""
    code = f"""
import argparse, runpy, sys
class Accepted(BaseException):
    pass
parse = argparse.ArgumentParser.parse_args
def stop(self, *a, **k):
    parse(self, *a, **k)
    raise Accepted
argparse.ArgumentParser.parse_args = stop
sys.path.insert(0, '.')
for sys.argv in {list(commands)!r}:
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
        print('not parsed:', sys.argv)
    except Accepted:
        pass
    except SystemExit:
        print('refused:', sys.argv)
"""
    done = python("-c", code)
    return done.stdout + (done.stderr if done.returncode else "")


def test_readme_commands_parse():
    assert refused_commands(readme_commands()) == ""
    assert len(list(readme_commands())) > 40


def test_the_front_page_is_short_and_leads_somewhere():
    """README.md is read in a few minutes; whatever either README shows or links to is there."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 265
    assert not re.search(r"^[A-Z]{6,}$", "".join((ROOT / name).read_text() for name in READMES), re.MULTILINE)
    for name in READMES:
        folder, text = (ROOT / name).parent, (ROOT / name).read_text()
        for link in re.findall(r"\]\((?!http)([^)#]*)(?:#[^)]*)?\)", text):
            assert (folder / link).exists(), f"{name} links to {link}"
        for anchor in re.findall(r"\]\(#([^)]*)\)", text):
            headings = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)]
            assert anchor in headings, f"{name} links to #{anchor}"


def test_readme_line_counts():
    """The table of files quotes each file's length, rounded to ten."""
    for name in PRESENT:
        lines = len((ROOT / name).read_text().splitlines())
        row = re.search(rf"\| `{name}` .*\| (\d+) \|", (ROOT / "README.md").read_text())
        assert row and abs(int(row[1]) - lines) <= 10, f"{name} has {lines} lines"


def test_the_project_is_under_version_control_without_stray_files():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert not [f for f in listed.stdout.split() if f.endswith((".pt", ".tmp", ".mp4", ".pyc"))]

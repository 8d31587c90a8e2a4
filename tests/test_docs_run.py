"""The fenced commands of README and docs, page by page in their order, really run on tiny models:
`make test-docs`.

What a page runs on `configs/smollm2.yaml` or the 8B model runs here on `configs/tiny.yaml`, its
`outputs/` is a folder of the test's own, and its cluster is a pretended Slurm. What is not run here
is named in `ELSEWHERE` with the reason; `tests/test_docs.py` holds the arguments of every command
against its program.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from sarm.config import ROOT, Config
from tests.fakes import slurm as fake
from tests.fakes.site import PROFILE
from tests.test_docs import PAGES, fences, recipe
from tests.tiny import tiny_config

pytestmark = [pytest.mark.docs, pytest.mark.timeout(1800)]

ELSEWHERE = {
    r"make test$|make check$": "they are what a change runs beside these",
    r"make images$": "takes root and a quarter of an hour: make test-cluster builds them",
    r"sbatch ": "takes a real Slurm: tests/cluster/test_run.py and test_profiles.py send them",
    r"export SARM_REWARD_URL=.*serving/url": "reads what the sbatch above it leaves",
    r"(SARM_REWARD_URL=\S+ )?(trl|ray) ": "takes another trainer: tests/serving asks as each does",
    r"python benchmarks/ppo.py": "takes a GPU",
}
"""By the beginning of a command: why it is not run here."""
SILENT = r"(cp|mkdir|export) "
"""Commands of the shell, which say nothing where they do what they should."""
INSTEAD = (
    (r"^make demo$", "make run CONFIG=configs/smollm2.yaml RUN=outputs/smollm2"),
    (r"^make watch$", "make watch RUN=outputs/smollm2"),
    (r"^make sbatch .*", "python -m slurm.sbatch --cluster generic --out $PLACE/sbatch"),
    # a tiny SARM has no card: what one would hold is measured
    (r"^make check-sarm .*", "make check-sarm CONFIG=$PLACE/measured.yaml RUN=outputs/measured"),
    (r"configs/train-smollm2\.yaml", "$PLACE/train.yaml"),
    (r"(?<!-)configs/[\w-]+\.yaml", "$PLACE/tiny.yaml"),
    (r"\blonger\.yaml", "$PLACE/longer.yaml"),
    (r"slurm/clusters/mysite\.yaml", "$PLACE/mysite.yaml"),
    (r"CLUSTER=(mysite|generic)\b", "CLUSTER=$PLACE/site.yaml"),
    (r"\boutputs/", "$PLACE/outputs/"),
    (r"latent: \d+", "latent: 7"),
    (r"^make serve-reward", "serve"),
)
"""What stands for what of a documented command."""
PRELUDE = """
set -eu
make() { command make --no-print-directory VENV="$PLACE/venv" "$@"; }
serve() {  # a server runs until it is stopped
  make serve-reward "$@" serve.port=0 >"$PLACE/served" 2>&1 & server=$!
  until grep -q ' serves ' "$PLACE/served"; do
    kill -0 $server || { cat "$PLACE/served"; return 1; }
    sleep 0.2
  done
  kill -TERM $server; wait $server || true; cat "$PLACE/served"
}
"""


def commands_of(page: Path) -> list[str]:
    """The lines of a page's blocks fenced as bash, in order, comments cut off."""
    lines = (
        line.split("#")[0].strip()
        for language, text in fences(page)
        if language == "bash"
        for line in text.splitlines()
    )
    return [line for line in lines if line]


def why_not(command: str) -> str:
    """Why a command is not run here; empty where it is."""
    return next((why for start, why in ELSEWHERE.items() if re.match(start, command)), "")


def here(command: str, of: Sequence[tuple[str, str]] = INSTEAD) -> str:
    """A documented command as it is run here."""
    for stands, instead in of:
        command = re.sub(stands, instead, command)
    return command


RUN = [page for page in PAGES if any(not why_not(command) for command in commands_of(page))]


class Tiny(NamedTuple):
    """A folder that has what pages begin with."""

    place: Path
    config: Config

    def write(self, name: str, config: Config) -> None:
        text = yaml.safe_dump(config.model_dump(mode="json"))
        (self.place / name).write_text(text, encoding="utf-8")

    def run(self, command: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", f"{PRELUDE}\n{command}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"PLACE": str(self.place), "HF_HUB_OFFLINE": "1"} | env,
        )


def environment(place: Path) -> dict[str, str]:
    """This Python's environment under a name that `make` takes for set up, and a pretended Slurm
    first on PATH.
    """
    venv = place / "venv"
    venv.mkdir(parents=True)
    for entry in Path(sys.prefix).iterdir():
        if entry.name != ".installed":
            (venv / entry.name).symlink_to(entry)
    (venv / ".installed").touch()
    (place / "slurm").mkdir()
    (place / "site.yaml").write_text(PROFILE, encoding="utf-8")
    path = f"{fake.install(place / 'bin')}:{venv / 'bin'}:{os.environ['PATH']}"
    return {"PATH": path, "FAKE_SLURM": str(place / "slurm"), "SARM_CACHE": str(place / "cache")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Tiny models, and the run that `make demo` would leave, made by its own recipe."""
    place = tmp_path_factory.mktemp("finished")
    tiny = Tiny(place, tiny_config(place))
    tiny.write("tiny.yaml", tiny.config)
    done = tiny.run(here("make demo"), environment(place))
    assert done.returncode == 0, done.stdout + done.stderr
    report = place / "outputs" / "smollm2" / "final_report.txt"
    assert done.stdout.splitlines()[-1].endswith(str(report)) and report.is_file()
    return tiny


@pytest.fixture
def tiny(finished: Tiny, tmp_path: Path) -> Tiny:
    """A copy of it for a page, with what the page takes for there: runs by their names there."""
    tiny = Tiny(tmp_path, finished.config)
    outputs, whole = tmp_path / "outputs", finished.place / "outputs" / "smollm2"
    for name in ("smollm2", "a", "b", "first", "llama31-8b"):
        shutil.copytree(whole, outputs / name)
    for phase in ("ppo", "evaluate", "report"):
        shutil.rmtree(outputs / "llama31-8b" / phase)
    tiny.write("tiny.yaml", tiny.config)
    ppo = tiny.config.ppo.model_copy(
        update={"steps": tiny.config.ppo.steps + 2, "continue_from": str(outputs / "first")}
    )
    tiny.write("longer.yaml", tiny.config.model_copy(update={"ppo": ppo}))
    split = {"data.sources.demo.split": {"sarm_train": 0.6, "test": 0.4}}
    split |= {"data.sources.demo.limit": 60, "train_sarm.head_l2": [0.01]}
    split |= {"train_sarm.output": str(tmp_path / "trained")}
    tiny.write("train.yaml", tiny_config(finished.place, **split))
    measured = {"check_sarm.measure": True, "data.sources.demo.split": {"discovery": 1.0}}
    tiny.write("measured.yaml", tiny_config(finished.place, **measured))
    return tiny


def test_every_reason_not_to_run_a_command_is_needed_and_most_commands_run():
    every = [command for page in PAGES for command in commands_of(page)]
    for start in ELSEWHERE:
        assert any(re.match(start, command) for command in every), start
    run = [command for command in every if not why_not(command)]
    assert len(run) > 20 and len(RUN) > 6
    demo, instead = (
        recipe(command) for command in ("make demo", here("make demo", of=INSTEAD[:1]))
    )
    assert [shlex.split(line) for line in demo] == [shlex.split(line) for line in instead]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_commands_of_a_page_run_in_their_order_and_each_ends_in_a_line(tiny, page):
    env, exported = environment(tiny.place), ""
    for command in commands_of(page):
        if why_not(command):
            continue
        done = tiny.run(f"{exported}{here(command)}", env)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        said = (done.stdout + done.stderr).strip()
        if re.match(SILENT, command):
            exported += f"{here(command)}\n" if command.startswith("export") else ""
            continue
        assert said, f"{command} ends in silence"
        assert re.search(r"[\w)]", said.splitlines()[-1]), said


def test_the_readme_says_how_long_the_demo_takes_and_what_it_cannot_say():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = readme[readme.index("`make demo` takes") :].split("\n\n")[0]
    assert re.search(r"minutes", told) and "no verdict" in told and "cannot show" in told
    assert (ROOT / "configs" / "smollm2-gpu.yaml").is_file()

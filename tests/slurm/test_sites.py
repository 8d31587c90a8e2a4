"""Sites that are not the developers': profiles in their grammar, what a login environment brings,
make's variables, folders that others may write in, status for people and programs.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sarm.config import ROOT, UserError, load_config
from sarm.run import Attempt, RunDir
from slurm import doctor, queue
from slurm.entry import failed_units, first_host
from slurm.environment import ISOLATE, forgotten, isolated
from slurm.joblogs import complaint
from slurm.profile import Profile, flags, gpu_hours, resources
from slurm.profile_file import load_profile
from slurm.sbatch import main as write_scripts
from slurm.script import own_line, path_line, sbatch_line, script, setup_lines
from slurm.site_checks import gpus_of_a_node
from slurm.state import Look
from slurm.status import main as status
from slurm.words import waits_for
from tests.fakes.site import PROFILE, Site, batch_of
from tests.slurm.test_submit import batch_script


def profile_of(tmp_path: Path, text: str, name: str = "site.yaml") -> Profile:
    path = tmp_path / name
    path.write_text(f"description: x\n{text}\n")
    return load_profile(str(path))


# Profiles


@pytest.mark.parametrize(
    "features", ["a100|h100", "a100&nvlink", "[rack1|rack2]", "[a*2&b*1]", "!x"]
)
def test_constraints_as_sbatch_takes_them(tmp_path: Path, features: str) -> None:
    profile = profile_of(tmp_path, f'constraint: "{features}"')
    line = sbatch_line("constraint", flags(profile, "ppo")["constraint"])
    assert line in script(profile, "ppo", "x").splitlines()
    word = subprocess.run(
        ["bash", "-c", f"printf %s {line.removeprefix('#SBATCH --constraint=')}"],
        capture_output=True,
        text=True,
    ).stdout
    assert word == features


@pytest.mark.parametrize("features", ["a;b", "$(id)", "a b", "a'b", "a\\\\b", "`id`", "a>b"])
def test_constraints_that_are_no_features_are_refused(tmp_path: Path, features: str) -> None:
    with pytest.raises(UserError, match="constraint: only features"):
        profile_of(tmp_path, f'constraint: "{features}"')


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("extra: {clusters: gpu}", "sbatch's --clusters, .*; use clusters$"),
        ("extra: {gres: gpu:1}", "use gpu_type and phases.PHASE.gpus, or more_gres for what is"),
        ("extra: {gpus-per-n: '1'}", "use gpu_request, gpu_type and phases.PHASE.gpus"),
        ("extra: {time: '1'}", "use phases.PHASE.time_min"),
        ("extra: {chdir: /x}", "no profile may change it"),
        ("clusters: a,b", "name one"),
        ("clusters: all", "name one"),
        ("gpu_type: h100:4", "how many as gpus"),
        ("gpu_type: 'a100,lscratch'", "other resources as more_gres"),
        ("phases: {probe: {gpu_type: gpu:a100}}", "phases.probe.gpu_type: gpu:a100 holds more"),
        ("gres: gpu:h100", "the type as gpu_type"),
        ("gres: 'lscratch:10,gpu'", "other resources as more_gres"),
        ("exclude: [n1, n2]", "must be one text, such as a,b"),
        ("partition: no", "put what YAML takes for a number or a date in quotes"),
        ("phases: {ppo: null}", "phases.ppo: must be a mapping of keys, or left out"),
        ("environment: {LD_LIBRARY_PATH: '/x:$PATH'}", "only PATH may hold .PATH"),
        ("environment: {PATH: '/x:$HOME/bin'}", "only letters, digits"),
        ("phases: {probe: {nodes: 2}}", "only ppo works on several nodes"),
        ("phases: {probe: {throttle: 2}}", "array_throttle"),
        ("phases: {ppo: {retry_mem_gb: 480}}", "480 is no more than mem_gb, 480"),
        (
            "phases: {ppo: {time_min: 4:00:00}}",
            r"ppo.time_min: 4:00:00 is 14400 .* write 240, in min",
        ),
        ("phases: {ppo: {time_min: 90:30}}", "90:30 is 5430 .* write 91, in minutes"),
        ("phases: {ppo: {time_min: 08:30}}", "08:30 is no number of minutes; write 9$"),
        ("phases: {ppo: {time_min: 1-12:00:00}}", "1-12:00:00 is no number .* write 2160$"),
        ("phases: {ppo: {time_min: 2-3}}", "write 3060$"),
        (
            "phases: {ppo: {time_min: '240'}}",
            "a whole number of minutes without quotes, .* not 240",
        ),
        ("phases: {ppo: {mem_gb: 480G}}", "a whole number of GiB without quotes, .* not 480G"),
        ("signal_lead_s: 2m", "a whole number of seconds without quotes"),
        ("extra: {begin: 16:30}", 'extra.begin: 16:30 is 990 .* write "16:30" in quotes'),
        ("extra: {nice: 0100}", 'nice: 0100 is 64 to YAML, an octal; write 100, or "0100" in'),
        ("extends: none", "none.yaml does not exist"),
        ("extends: site.yaml", "extends itself"),
        ("extends: [a]", "name or path"),
    ],
)
def test_what_is_refused_with_the_right_spelling(tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        profile_of(tmp_path, line)


def test_a_profile_extends_a_sites_shared_one(tmp_path: Path) -> None:
    (tmp_path / "shared.yaml").write_text(
        "description: site\naccount: all\nmodules: [a, b]\nenvironment: {X: '1', Y: '2'}\n"
        "phases: {ppo: {time_min: 100, gpus: 8}, encode: {mem_gb: 5}}\n"
    )
    (tmp_path / "between.yaml").write_text("extends: shared.yaml\naccount: ours\n")
    mine = profile_of(
        tmp_path,
        "extends: between.yaml\nmodules: [c]\nenvironment: {Y: '3'}\nphases: {ppo: {gpus: 2}}",
    )
    assert (mine.account, mine.modules, mine.description) == ("ours", ("c",), "x")
    assert mine.environment == {"X": "1", "Y": "3"}
    ppo = resources(mine, "ppo")
    assert (ppo.time_min, ppo.gpus, resources(mine, "encode").mem_gb) == (100, 2, 5)


def test_gres_by_another_name_and_mig_slices(tmp_path: Path) -> None:
    slices = "gres: mig\ngpu_type: h100\nphases: {probe: {gpu_type: a100_1g.10gb, gpus: 2}}"
    profile = profile_of(tmp_path, slices)
    assert flags(profile, "probe")["gres"] == "mig:a100_1g.10gb:2"
    assert flags(profile, "ppo")["gres"] == "mig:h100:4"


@pytest.mark.parametrize("by", ["gres", "gpus-per-node"])
def test_other_resources_are_asked_for_beside_gpus_and_without(tmp_path: Path, by: str) -> None:
    more = f"gpu_request: {by}\ngpu_type: a100\nmore_gres: 'lscratch:100,nvme:1'"
    profile = profile_of(tmp_path, more)
    found = flags(profile, "ppo")
    assert flags(profile, "select")["gres"] == "lscratch:100,nvme:1"
    assert "gpus-per-node" not in flags(profile, "select")
    if by == "gres":
        assert found["gres"] == "gpu:a100:4,lscratch:100,nvme:1" and "gpus-per-node" not in found
    else:
        assert found["gres"] == "lscratch:100,nvme:1" and found["gpus-per-node"] == "a100:4"


@pytest.mark.parametrize(
    ("gres", "kind", "most"),
    [
        ("gpu:h100:4(S:0-1)", None, 4),
        ("gpu:4", None, 4),
        ("gpu:4", "h100", 0),
        ("gpu:h100:2,gpu:a100_3g.20gb:6(S:0)", "a100_3g.20gb", 6),
        ("gpu:h100:2,gpu:a100:6", None, 8),
        ("craynetwork:4,gpu:h100:1", None, 1),
        ("(null)", None, 0),
    ],
)
def test_gpus_that_sinfo_tells_of(site: Site, gres: str, kind: str | None, most: int) -> None:
    site.fault(sinfo=f"main|main*|{gres}")
    assert gpus_of_a_node(Profile(description="x"), None, kind) == most


def test_another_cluster_is_named_to_every_command(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.profile.write_text(PROFILE + "clusters: gpu\n")
    site.fault(says="Submitted batch job {id} on cluster gpu")
    assert site.submit() == 0 and site.submit() == 0 and len(site.jobs) == 14
    assert {job["cluster"] for job in site.jobs.values()} == {"gpu"}
    capsys.readouterr()
    assert status(["--run", str(site.path)]) == 1
    assert "pending" in capsys.readouterr().out
    assert status(["--run", str(site.path), "--cancel"]) == 0
    assert {job["state"] for job in site.jobs.values()} == {"CANCELLED"}
    asked = [words for words in site.state["commands"] if words[0] != "sacct"]
    assert all("--clusters=gpu" in words for words in asked)


def test_several_nodes(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    more = "interface: ib0\nphases: {ppo: {nodes: 2, time_min: 60}}\n"
    site.profile.write_text(PROFILE + more)
    assert site.submit("--dry-run") == 0
    # two arms on two nodes of four GPUs for an hour, eleven other GPU jobs
    assert "ppo         2 jobs     16.0 GPU-hours" in capsys.readouterr().out
    assert site.submit() == 0
    assert "2 nodes, 8 tasks, 8 GPUs" in capsys.readouterr().out
    text = next(j["text"] for j in site.jobs.values() if batch_of(j) == "ppo.penalty-seed1")
    for line in ("--nodes=2", "--ntasks-per-node=4", "--gres=gpu:h100:4", "--mem=480G"):
        assert f"#SBATCH {line}\n" in text
    assert "--nodes=2 --ntasks=8 " in text
    for name in ("NCCL", "GLOO"):
        assert f"export {name}_SOCKET_IFNAME=ib0\n" in text
        assert "SOCKET" not in next(
            j["text"] for j in site.jobs.values() if batch_of(j) == "select"
        )
    assert gpu_hours(load_profile(str(site.profile)), "ppo", 2) == 16.0


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("g1", "g1"),
        ("g[1-2]", "g1"),
        ("g[001-003,7]", "g001"),
        ("g[5,7-9],h1", "g5"),
        ("a1,b[2-3]", "a1"),
        ("rack-a[1-2]-ib,c", "rack-a1-ib"),
        ("rack[0-1]_blade[02-03,7],c", "rack0_blade02"),
    ],
)
def test_ranks_meet_on_the_first_node(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


# What a login environment brings


LOGIN = {
    "PYTHONHOME": "/opt/conda",
    "PYTHONPATH": "/evil",
    "PYTHONWARNINGS": "error",
    "APPTAINERENV_PYTHONHOME": "/opt/conda",
    "APPTAINERENV_PATH": "/opt/conda/bin",
    "SINGULARITYENV_PYTHONPATH": "/evil",
    "APPTAINERENV_HF_TOKEN": "hf_x",
    "SINGULARITYENV_HUGGING_FACE_HUB_TOKEN": "hf_x",
    "APPTAINERENV_HF_HUB_OFFLINE": "0",
    "SINGULARITYENV_TMPDIR": "/nowhere",
    "APPTAINERENV_SLURM_PROCID": "3",
    "APPTAINER_CLEANENV": "1",
    "APPTAINER_CONTAINALL": "1",
    "SINGULARITY_NO_MOUNT": "x",
    "SLURM_CLUSTERS": "all",
    "SQUEUE_STATES": "RUNNING",
    "SRUN_EXPORT_ENV": "NONE",
}
STAYS = {
    "APPTAINER_BIND": "/site",
    "APPTAINER_BINDPATH": "/a",
    "SINGULARITY_CACHEDIR": "/c",
    "APPTAINERENV_NCCL_DEBUG": "INFO",
    "APPTAINERENV_PREPEND_PATH": "/x",
    "APPTAINERENV_HF_ENDPOINT": "https://mirror",
    "SINGULARITYENV_PATHS": "/x",
    "LD_LIBRARY_PATH": "/l",
    "SLURM_JOB_ID": "5",
}


def test_jobs_and_make_fetch_forget_the_same_variables_and_keep_a_sites_binds() -> None:
    env = {**LOGIN, **STAYS, "PATH": "/usr/bin:/bin"}
    words = ["bash", "-ec", f"{ISOLATE}; env -0"]
    left = subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout
    names = {pair.partition("=")[0] for pair in left.split("\0") if pair}
    assert names - {"_", "PWD", "SHLVL", "OLDPWD"} == {*STAYS, "PATH"}
    assert isolated(env).keys() == {*STAYS, "PATH"}
    assert all(map(forgotten, LOGIN))


def test_a_jobs_path_is_its_nodes_and_more(site: Site) -> None:
    """Slurm's commands are where a node's login files say, not where this launcher guesses."""
    site.submit()
    text = next(job["text"] for job in site.jobs.values() if batch_of(job) == "select")
    (line,) = [line for line in text.splitlines() if line.startswith("export PATH=")]
    home = shutil.which("sbatch")
    assert home is not None
    folders = line.removeprefix("export PATH=").split(":")
    assert folders[:2] == ["$PATH", str(Path(home).parent)] and "/usr/bin" in folders
    own = Profile(description="x", environment={"PATH": "/mine:/bin"})
    assert path_line(own, "/opt/slurm/bin") == "export PATH=/mine:/bin"
    before = Profile(description="x", environment={"PATH": "/opt/my+x/bin:$PATH:/z"})
    words = [path_line(before, None), "printf %s $PATH"]
    said = subprocess.run(
        ["/bin/bash", "-c", "\n".join(words)], env={"PATH": "/a:/b"}, capture_output=True, text=True
    ).stdout
    assert said == "/opt/my+x/bin:/a:/b:/z"
    lines = setup_lines(own, "ppo", {}, Path("/f"), "/opt/slurm/bin")
    assert sum("PATH=" in one for one in lines if one.startswith("export PATH=")) == 1


def test_gpus_that_login_files_name_are_none_of_a_job_that_asked_for_none(
    site: Site, tmp_path: Path
) -> None:
    site.submit()
    say = f'echo "${{CUDA_VISIBLE_DEVICES-none}}" >{tmp_path}/said'
    for batch, said in (("select", "none"), ("ppo.penalty-seed1", "0,1,2,3")):
        assert batch_script(site, batch, say, CUDA_VISIBLE_DEVICES="0,1,2,3")[0] == 0
        assert (tmp_path / "said").read_text().strip() == said
    for phase, lines in (("report", 1), ("ppo", 0)):
        text = script(Profile(description="x"), phase, "x")
        assert text.count("\nunset CUDA_VISIBLE_DEVICES\n") == lines


def test_srun_is_found_where_the_login_files_put_it(site: Site) -> None:
    site.submit()
    ran = site.home / "ran"
    # batch_script puts its srun before the rest; here it is on the node's own PATH alone
    code, _ = batch_script(site, "select", f"touch {ran}")
    assert code == 0 and ran.exists()
    ran.unlink()
    text = next(job["text"] for job in site.jobs.values() if batch_of(job) == "select")
    path = f"{site.home / 'bin'}:/usr/bin:/bin"
    subprocess.run(["bash"], input=text, text=True, env={"SLURM_JOB_ID": "5", "PATH": path})
    assert ran.exists()


def test_doctor_asks_a_node_what_it_has(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--cluster", str(site.profile), "--config", str(site.config), "--run", str(site.path)]
    site.fault(srun="asked")
    assert doctor.main(words) == 0
    assert "ok        node: it finds srun, scontrol" in capsys.readouterr().out
    site.fault(srun="missing srun\nasked")
    assert doctor.main(words) == 2
    assert "a node does not find srun on its PATH; put the folder" in capsys.readouterr().out


def test_doctor_knows_limits_accounting_and_what_waits(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--cluster", str(site.profile), "--config", str(site.config), "--run", str(site.path)]
    site.profile.write_text(PROFILE + "submit_limit: 10\n")
    assert doctor.main(words) == 2
    # two encode, five probe, select, steer, cards, calibrate, two ppo, three evaluate, report
    assert "17 jobs are more than this cluster's submit_limit of 10" in capsys.readouterr().out
    site.profile.write_text(PROFILE)
    site.profile.write_text(PROFILE + "phases: {probe: {qos: short}, ppo: {qos: long}}\n")
    # of 17 jobs five are probe's, two ppo's, and ten under the account's own QOS
    for qos, says in (
        ("short|4|\nlong||\n", "the run is 5 jobs and QOS short may queue 4 (MaxSubmitJobs)"),
        ("short|5|\nlong||1\n", "the run is 2 jobs and QOS long may queue 1"),
        ("long|2|9\nusual|9|\n", "the run is 10 jobs and QOS usual may queue 9"),
        ("short|5|\nusual|10|\n", "17 jobs; your account may queue 17, QOS short may queue 5, QOS"),
    ):
        site.fault(sacctmgr={"assoc": "17||usual\n", "qos": qos})
        doctor.main(words)
        assert says in capsys.readouterr().out
    asked = [words for words in site.state["commands"] if words[:5][-1:] == ["qos"]]
    assert {tuple(words[5:7]) for words in asked} == {("where", "name=usual,short,long")}
    site.profile.write_text(PROFILE)
    site.fault(sacctmgr={"assoc": "12||\n100|200|\n"}, no_sacct=False)
    assert doctor.main(words) == 2
    said = capsys.readouterr().out
    assert "the run is 17 jobs and your account may queue 12" in said
    assert "ok        accounting: it answers" in said
    site.profile.write_text(PROFILE + "clusters: gpu\n")
    doctor.main(words)
    asked = [words for words in site.state["commands"] if words[0] == "sacctmgr"]
    named = [w for words in asked for w in words if "cluster=" in w]
    assert named[-2:] == ["cluster=here", "cluster=gpu"], "another cluster's limits are not ours"
    site.profile.write_text(PROFILE)
    capsys.readouterr()
    site.fault()
    site.submit()
    state = site.state
    state["jobs"]["101"]["reason"] = "JobHeldAdmin"
    site.remember(state)
    doctor.main(words)
    assert "jobs of this run wait: JobHeldAdmin (held by the site's" in capsys.readouterr().out
    assert waits_for("Priority") == "Priority" and waits_for("Dependency") == "Dependency"
    assert "submit again" in waits_for("DependencyNeverSatisfied")


# Make


def made(*words: str, **env: str) -> str:
    """The command that make would run at last."""
    clean = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "RUN", "CONFIG")}
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", *words],
        cwd=ROOT,
        env={**clean, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1]


def words_of(command: str) -> list[str]:
    """The arguments that the shell would hand to Python."""
    _, _, rest = command.partition(" -m ")
    rest = rest.removesuffix(" || test $? -eq 1")
    shown = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {rest}"], capture_output=True, text=True, check=True
    )
    return shown.stdout.split("\0")[:-1]


NAMES = [
    "outputs/a b",
    "new;run",
    "it's",
    'say "x"',
    "a$b",
    "$(shell touch pwned)",
    "`id`",
    "Lauf-ü",
    "a&b",
]


@pytest.mark.parametrize("name", NAMES)
def test_make_takes_a_variable_for_the_word_it_is(name: str) -> None:
    for target in ("status", "cancel", "watch", "submit-all"):
        given = words_of(made(target, f"RUN={name}"))
        assert given[given.index("--run") + 1] == name
        given = words_of(made(target, RUN=name))
        assert given[given.index("--run") + 1] == name
    given = words_of(made("submit-all", f"CONFIG={name}.yaml", f"CLUSTER={name}"))
    assert given[given.index("--config") + 1] == f"{name}.yaml"
    assert given[given.index("--cluster") + 1] == name
    assert given[given.index("--run") + 1] == f"outputs/{Path(name).name}"
    assert not (ROOT / "pwned").exists()


def test_make_hands_overrides_unit_and_dry_run_on() -> None:
    more = ["ppo.steps=2", "ppo.arms=[penalty, no_penalty]", "UNIT=penalty-seed0"]
    given = words_of(made("submit-all", *more, "DRY_RUN=1"))
    assert {"ppo.steps=2", "ppo.arms=[penalty, no_penalty]", "--dry-run"} <= set(given)
    assert given[given.index("--unit") + 1] == "penalty-seed0"
    for no in ("0", "no", "false", "False", "OFF", ""):
        assert "--dry-run" not in words_of(made("submit-all", f"DRY_RUN={no}"))
    assert "stepps=2" in words_of(made("run", "stepps=2")), "refused by name, not passed over"
    assert words_of(made("cancel", "UNIT=ppo/x"))[-2:] == ["--unit", "ppo/x"]
    assert words_of(made("ppo", "UNIT=penalty-seed0"))[-2:] == ["--unit", "penalty-seed0"]


@pytest.mark.parametrize("name", NAMES)
def test_make_takes_lists_and_folders_for_the_words_they_are(name: str, tmp_path: Path) -> None:
    given = words_of(made("compare", f"RUNS=x {name}", f"OUT={name}"))
    assert given == ["reports.compare", "x", *name.split(" "), "--out", name]
    folder = tmp_path / name
    folder.mkdir(parents=True)
    lines = subprocess.run(
        ["make", "-n", "probe-study", f"DATA={folder}"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    recipe = lines[lines.index("data=$(") :].replace(".venv/bin/python", "printf '%s\\n'")
    said = subprocess.run(["bash", "-c", recipe], capture_output=True, text=True).stdout
    assert said.splitlines().count(f"data.sources.rmb.path={folder}/rmb_harmlessness") == 5
    image = made("images", f"BASE={name}", "KIND=light gpu;id")
    assert "for kind in 'light' 'gpu;id'; do" in image
    base = subprocess.run(
        ["bash", "-c", f"printf %s {image.partition(' env ')[2].partition(' containers')[0]}"],
        capture_output=True,
        text=True,
    ).stdout
    assert base == f"BASE={name}"
    assert not (ROOT / "pwned").exists()


def refused_by_make(*words: str) -> str:
    # as by a user, who runs no tests from a make of his own, which would name the folders it enters
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout, done.stdout
    return done.stderr


def test_make_refuses_line_breaks_and_overrides_that_nothing_would_use() -> None:
    for variable in ("RUN", "CONFIG", "CLUSTER", "UNIT", "ppo.steps"):
        said = refused_by_make("submit-all", f"{variable}=a'\ntouch pwned #")
        assert f"{variable} holds a line break" in said
    for target in ("status", "watch", "cancel", "sbatch", "verify", "demo", "help"):
        assert f"make {target} takes no ppo.steps" in refused_by_make(target, "ppo.steps=2")
    assert "ppo.steps=2" in words_of(made("plan", "ppo.steps=2"))
    elsewhere = made("submit-all", "HF_HOME=/x", "SARM_CACHE=/y", "https_proxy=z")
    assert not [word for word in words_of(elsewhere) if "=" in word], "the environment's"


def test_make_takes_a_run_that_is_there_under_its_own_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    given = words_of(made("plan", f"RUN={tmp_path}"))
    assert given[given.index("--config") + 1] == f"{tmp_path}/config.yaml"
    assert "--config" not in words_of(made("run", f"RUN={tmp_path}"))
    assert (
        "no config.yaml"
        in subprocess.run(
            [sys.executable, "-m", "slurm.local", "--run", str(tmp_path / "none")],
            cwd=ROOT,
            capture_output=True,
            text=True,
        ).stderr
    )


def test_make_sbatch_writes_where_no_commit_is_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurm.sbatch.ROOT", tmp_path)
    assert write_scripts(["--cluster", "development"]) == 0
    assert (tmp_path / "outputs" / "sbatch" / "development" / "ppo.sbatch").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


def test_mmdebstrap_gets_no_open_descriptors(tmp_path: Path) -> None:
    """Its dash knows descriptors of one digit, and a caller may leave many open."""
    text = (ROOT / "tests" / "cluster" / "cluster").read_text()
    start = text.index("without_descriptors() (")
    function = text[start : text.index("\n)\n", start) + 3]
    code = f"{function}\nexec 8>{tmp_path}/a 9>{tmp_path}/b\nwithout_descriptors ls /proc/self/fd"
    with open(tmp_path / "c", "w") as kept:
        done = subprocess.run(
            ["bash", "-c", code], pass_fds=[kept.fileno()], capture_output=True, text=True
        )
    assert done.stdout.split() == ["0", "1", "2", "3"], "3 is the folder that ls reads"


# Safety


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022])
def test_a_run_and_what_jobs_unpickle_are_the_owners_alone(
    site: Site, tmp_path: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        site.path = tmp_path / "parent" / "new"
        RunDir.create(site.path, load_config(site.config))
        site.do("fetch")
        assert site.submit() == 0
    finally:
        os.umask(before)
    for folder in (site.path, site.path / "submissions", *site.path.glob("submissions/*/")):
        assert folder.stat().st_mode & 0o7777 == 0o700, folder
    assert site.submit() == 0, "what it made it takes again"


@pytest.mark.parametrize(("mode", "says"), [(0o2775, "chmod g-w it"), (0o777, "chmod o-w it")])
def test_a_run_that_others_may_write_in_is_refused(
    site: Site, mode: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    site.path.chmod(mode)
    assert site.submit() == 2 and says in capsys.readouterr().err and not site.jobs


def test_a_folder_put_in_the_place_of_a_submissions_is_not_unpickled(
    site: Site, tmp_path: Path
) -> None:
    """As whoever may write in a folder above could do."""
    site.submit()
    (folder,) = site.path.glob("submissions/*/")
    for job in site.jobs.values():
        lines = job["text"].splitlines()
        assert lines.index(own_line(folder)) < next(i for i, s in enumerate(lines) if "srun" in s)
    theirs = tmp_path / "it's theirs"
    theirs.mkdir()
    if os.getuid() == 0:
        os.chown(theirs, 1, 1)
    else:
        theirs = Path("/etc")
    for place, code in ((folder, 0), (theirs, 1)):
        done = subprocess.run(["bash", "-ec", own_line(place)], capture_output=True, text=True)
        assert done.returncode == code
    assert f"error: {theirs} is not yours, and jobs would run code from it" in done.stderr


@pytest.mark.parametrize(("share", "mode"), [("none", 0o600), ("group", 0o640)])
def test_what_a_submission_writes_its_group_may_not_change_under_any_umask(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: str, mode: int
) -> None:
    monkeypatch.setattr("slurm.submit.check_named", lambda config: None)  # no such model is there
    site.profile.write_text(PROFILE + f"share: {share}\nfetch: job\n")
    site.path = tmp_path / "new"
    before = os.umask(0o002)
    try:
        assert site.submit("--phase", "fetch") == 0
    finally:
        os.umask(before)
    assert site.path.joinpath("config.yaml").stat().st_mode & 0o777 == mode
    for path in site.path.rglob("*"):
        assert not path.stat().st_mode & 0o027, path


def test_share_lets_the_group_read_results_and_never_what_jobs_unpickle(site: Site) -> None:
    site.profile.write_text(PROFILE + "share: group\n")
    assert site.submit() == 0
    assert site.path.stat().st_mode & 0o777 == 0o750
    for folder in (site.path / "submissions", *site.path.glob("submissions/*/")):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert all("\numask 027\n" in job["text"] for job in site.jobs.values())
    assert "umask 027\n" in script(load_profile(str(site.profile)), "ppo", "x")
    assert "umask 077\n" in script(Profile(description="x"), "ppo", "x")


def test_the_login_nodes_limits_stay_there(site: Site) -> None:
    site.submit()
    assert all("#SBATCH --propagate=NONE\n" in job["text"] for job in site.jobs.values())
    assert "#SBATCH --propagate=NONE\n" in script(Profile(description="x"), "ppo", "x")


# Telling


def test_status_ends_with_what_there_is_to_know(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--run", str(site.path)]
    assert status(words) == 1
    assert "make submit-all" in capsys.readouterr().out.splitlines()[-1]
    site.submit()
    capsys.readouterr()
    assert status(words) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"make watch RUN={site.path}"
    odd = site.path.with_name("it's $a run")
    site.path.rename(odd)
    assert status(["--run", str(odd)]) == 1
    command = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(command) == ["make", "watch", f"RUN={odd}"], "as a shell takes it"
    odd.rename(site.path)
    site.set_state("FAILED", only="encode")
    assert status(words) == 3
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("2 failed while others go on; sent again by make submit-all")
    site.do("encode", "probe", "select", "steer", "cards", "calibrate", "ppo", "evaluate", "report")
    site.set_state("COMPLETED")
    assert status(words) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("final_report.txt")


def test_status_for_programs(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.submit()
    site.set_state("FAILED", only="probe.1")
    site.set_state("RUNNING", only="ppo.penalty-seed1")
    capsys.readouterr()
    assert status(["--run", str(site.path), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["queue_answered"]) == ("failed", True)
    units = {(unit["phase"], unit["unit"]): unit for unit in found["units"]}
    assert len(units) == 18
    failed = units["probe", "shard-0003-of-0005"]
    assert (failed["state"], failed["kind"], failed["job"]) == ("FAILED", "failed", "103_1")
    assert units["fetch", "all"]["kind"] == "done" and units["fetch", "all"]["job"] is None
    # 26.05 hours on four GPUs; planned: seven shards, cards and calibrate of 1 h, three
    # evaluations of 2 h, 2 x 16 h
    assert found["gpu_hours"]["used"] == pytest.approx(4 * (26 * 3600 + 3 * 60 + 4) / 3600)
    assert found["gpu_hours"]["planned"] == 9 * 1 + 3 * 2 + 2 * 4 * 4


def test_a_failed_job_without_accounting_or_log_is_told_as_failed(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.submit()
    site.set_state("FAILED", only="encode")
    for log in site.path.glob("submissions/*/*_log.out"):
        log.unlink()  # it could not be written
    capsys.readouterr()
    assert status(["--run", str(site.path)]) == 3
    line = next(
        s for s in capsys.readouterr().out.splitlines() if s.startswith("encode/shard-0001")
    )
    assert "FAILED: it left no log; could it write in" in line and "cancelled" not in line
    site.remember({"jobs": {}, "calls": 0})  # forgotten
    assert status(["--run", str(site.path)]) == 3
    line = next(
        s for s in capsys.readouterr().out.splitlines() if s.startswith("encode/shard-0001")
    )
    assert "failed: its job left the queue without a log" in line and "cancelled" not in line


@pytest.mark.parametrize("forgets", [False, True])
def test_a_cancelled_job_is_told_as_cancelled(
    site: Site, capsys: pytest.CaptureFixture[str], forgets: bool
) -> None:
    site.submit()
    assert status(["--run", str(site.path), "--cancel"]) == 0
    if forgets:
        site.remember({"jobs": {}, "calls": 0})
    capsys.readouterr()
    assert status(["--run", str(site.path)]) == 3
    assert "not run: its job was cancelled before it began" in capsys.readouterr().out


def test_a_look_reads_each_manifest_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.submit()
    site.do("encode", "probe", "select")
    read: list[str] = []
    true = RunDir.manifest
    monkeypatch.setattr(
        RunDir, "manifest", lambda self, *node: read.append(str(node)) or true(self, *node)
    )
    assert status(["--run", str(site.path)]) == 1
    assert len(read) == len(set(read))


def test_the_report_hears_how_its_units_jobs_ended_by_name(tmp_path: Path) -> None:
    log = tmp_path / "ab" / "12_1_0_log.out"
    log.parent.mkdir()
    log.write_text("slurmstepd-n1: error: *** JOB 12 ON n1 CANCELLED AT T DUE TO TIME LIMIT ***\n")
    (tmp_path / "cd").mkdir()
    (tmp_path / "cd" / "13_0_log.out").touch()
    jobs = {
        "probe/a": ("12_1", "probe.x-ab", "ab"),
        "probe/b": ("12_0", "probe.x-ab", "ab"),
        "ppo/c": ("13", "ppo.x-ab", "ab"),
        "ppo/d": ("14", "ppo.y-cd", "cd"),
    }
    states = "12_1 TIMEOUT probe.x-ab\n13 FAILED ppo.x-ab\n14 FAILED some other's job\n12_0\n"
    env = {"SARM_JOBS": json.dumps(jobs), "SARM_FAILED_JOBS": states}
    found = json.loads(failed_units(tmp_path, env)["SARM_FAILED_UNITS"])
    assert found == {
        "probe/a": "TIMEOUT: JOB 12 ON n1 CANCELLED AT T DUE TO TIME LIMIT",
        "ppo/c": "",  # another submission's log has its number
    }
    assert failed_units(tmp_path, {}) == {}


def test_killed_tasks_are_told_of_where_nothing_else_says_why(tmp_path: Path) -> None:
    log, killed = tmp_path / "5_0_log.out", "srun: error: g2: tasks 2-3: Killed\n"
    log.write_text(f"{killed}srun: Terminating StepId=5.0\nsrun: error: g1: task 1: Exited\n")
    assert complaint([log]) == "g2: tasks 2-3: Killed"
    log.write_text(f"slurmstepd: error: Detected 1 oom_kill event in StepId=5.0\n{killed}")
    assert complaint([log]) == "Detected 1 oom_kill event in StepId=5.0"


def test_a_job_that_did_a_unit_once_is_not_the_one_that_fails_now(site: Site) -> None:
    site.submit()
    look = Look(site.run)
    node = next(task.node for task in look.tasks if task.node.phase == "encode")
    assert look.jobs[node].id == "101_0" and look.job_logs(node) == []
    Attempt(site.run, *node)
    site.set_state("RUNNING", only="encode")
    assert [path.name for path in Look(site.run).job_logs(node)] == ["101_0_0_log.out"]
    assert queue.known_jobs()[0].id == "101_0"

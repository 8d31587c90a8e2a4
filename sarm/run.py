"""The run directory: every path of a run, atomic writes, manifests, and what counts as done.

A job opens an `Attempt`, writes files under names of its own, and publishes a manifest last.
No manifest, or one that does not match its files, config or inputs, means not done.
What is done is decided here alone, which is why the file is long. Imports no torch: login nodes
use it.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sarm.config import ROOT, Config, Phase, UserError, config_yaml, load_config
from sarm.config.reading import stored_tree
from sarm.config.reads import READS, changed, values, values_sha256
from sarm.launched import ATTEMPT, JOB, PATIENCE, now
from sarm.records import Manifest, Output, json_text


def _is_runs(path: Path) -> bool:
    """Whether a run's folder may hold this before it has a config."""
    name = path.name
    return (
        name in READS
        # a stand-alone script's, which is there before its phase is
        or (name == "submissions" and {p.name for p in path.iterdir()} <= {"by-hand"})
        or name in ("logs", "progress", "configs")
        or name.endswith(".lock")
        or name.startswith(".config.yaml.")  # a creation that was killed
    )


class Published(NamedTuple):
    """A finished unit as its manifest tells it."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """The verified file behind a logical output name. Raises UserError where missing or
        altered.
        """
        output = self.manifest.outputs.get(name)
        if output is None:
            raise UserError(
                f"{self.folder} has no output {name!r}; it has"
                f" {', '.join(sorted(self.manifest.outputs))}"
            )
        path = self.folder / output.file
        problem = damage(path, output.tree())
        if problem:
            raise UserError(f"{path} {problem}; run its phase again, it will be redone")
        return path

    def directory(self, name: str) -> Path:
        """The folder written by `Attempt.directory(name)`, or one within it (`kept/kl-0.5`), every
        file of it verified.
        """
        members = [n for n in self.manifest.outputs if n.startswith(name + "/")]
        if not members:
            raise UserError(f"{self.folder} has no output folder {name!r}")
        for member in members:
            self.path(member)
        file, within = self.manifest.outputs[members[0]].file, members[0].removeprefix(name)
        return self.folder / file.removesuffix(within)

    def json(self, name: str) -> Any:
        """A JSON output, verified and parsed."""
        return json.loads(self.path(name).read_text(encoding="utf-8"))


class RunDir:
    """A run directory and its frozen config."""

    def __init__(self, path: str | Path, config: Config) -> None:
        self.path = Path(path).absolute()
        self.config = config
        self._today: tuple[Config, dict[str, dict[str, Any]]] = (config, {})

    @staticmethod
    def open(path: str | Path) -> RunDir:
        """Open a run that has a config. Raises UserError where there is none."""
        return RunDir(path, config_of(path))

    @staticmethod
    def create(path: str | Path, config: Config) -> RunDir:
        """Create the run, or open it. Where its config is another one, this one takes its place,
        and what is done of phases that read what differs counts as undone; the earlier one is kept
        under configs/.

        Raises UserError where the run is of a config of another name, and something of it is done.
        """
        run = RunDir(path, config)
        stored = run.path / "config.yaml"
        if not stored.is_file():
            run._make()
            write_atomic(stored, config_yaml(config).encode())
        elif told := run.change():
            earlier = stored.read_bytes()
            kept = run.path / "configs" / f"{hashlib.sha256(earlier).hexdigest()[:12]}.yaml"
            kept.parent.mkdir(exist_ok=True)
            write_atomic(kept, earlier)
            write_atomic(stored, config_yaml(config).encode())
            print(told, file=sys.stderr, flush=True)
        return run

    def _make(self) -> None:
        """The folder. Raises UserError where something else than a run stands there."""
        try:
            # jobs unpickle what lies in it: its owner's alone, whatever the umask
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except (FileExistsError, FileNotFoundError) as error:
            raise UserError(
                f"{self.path} can be no run's folder ({error.strerror}); use another RUN"
            ) from None
        foreign = sorted(p.name for p in self.path.iterdir() if not _is_runs(p))
        if foreign:
            raise UserError(
                f"{self.path} holds {listed(foreign)} and no config.yaml, so it is no run; give a"
                " new folder as RUN, or put the run's config.yaml back"
            )

    def change(self) -> str:
        """What taking this config in place of the stored one means, in a sentence; empty where they
        are the same or none is stored.

        Raises UserError where the run is of a config of another name, and something of it is done.
        """
        stored = self.path / "config.yaml"
        if not stored.is_file():
            return ""
        found = load_config(stored, stored=True)
        if found == self.config:
            return ""
        told = listed(differences(found, self.config))
        before = RunDir(self.path, found)
        done = [unit for unit in before.published() if before.done(*unit, hashes=False)]
        if done and found.name != self.config.name:
            raise UserError(
                f"{self.path} is a run of the config {found.name!r}, and this one is"
                f" {self.config.name!r} ({told}); use another RUN or the stored config"
            )
        undone = [f"{phase}/{unit}" for phase, unit in done if self._foreign_now(phase, unit)]
        again = f"{listed(undone)} will be done again" if undone else "nothing done reads that"
        return f"note: the config of {self.path} changes ({told}): {again}"

    def _foreign_now(self, phase: str, unit: str) -> str | None:
        manifest = self.manifest(phase, unit)
        return self._foreign(manifest, phase, unit) if manifest else None

    def published(self) -> list[tuple[str, str]]:
        """Every phase and unit that has a manifest, of this config or another."""
        files = sorted(self.path.glob("*/*/manifest.json"))
        found = [(file.parent.parent.name, file.parent.name) for file in files]
        return [(phase, unit) for phase, unit in found if phase in READS]

    def folder(self, phase: Phase | str, unit: str = "all") -> Path:
        """Where a unit's files lie."""
        return self.path / phase / unit

    def log(self, phase: Phase | str, unit: str = "all") -> Path:
        """The append-mode log of a unit."""
        return self.path / "logs" / f"{phase}.{unit}.log"

    def progress_file(self, phase: Phase | str, unit: str = "all") -> Path:
        return self.path / "progress" / f"{phase}.{unit}.json"

    def manifest(self, phase: Phase | str, unit: str = "all") -> Manifest | None:
        """The manifest as it stands, unverified; None where there is none or it is no JSON.

        Raises UserError where it is of a schema that this version does not know.
        """
        file = self.folder(phase, unit) / "manifest.json"
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return Manifest.parse(tree, str(file)) if isinstance(tree, dict) else None

    def why_not_done(
        self, phase: Phase | str, unit: str = "all", *, hashes: bool = True, tensors: bool = True
    ) -> str | None:
        """None where the unit is done; otherwise why not, in a few words.

        Sizes are always checked; file hashes only with `hashes`. A unit whose recorded inputs are
        no longer what their producers publish is not done either. Without `tensors`, what
        later phases alone read and is large may be gone: published folders, such as a policy's,
        and encoded states.
        """
        try:
            manifest = self.manifest(phase, unit)
        except UserError as error:
            return str(error)
        if manifest is None:
            return "no manifest"
        if problem := self._foreign(manifest, phase, unit):
            return problem
        for name, output in manifest.outputs.items():
            problem = damage(self.folder(phase, unit) / output.file, output.tree(), hashes=hashes)
            if problem == GONE and holds_tensors(name) and not tensors:
                continue
            if problem:
                return f"{name} {problem}"
        for key, sha256 in manifest.inputs.items():
            parts = key.split("/", 2)
            if parts[0] == "":
                if hashes and Path(key[1:]).is_file() and file_sha256(Path(key[1:])) != sha256:
                    return f"its input {key[1:]} has changed"
                continue
            try:
                upstream = self.manifest(parts[0], parts[1])
            except UserError as error:
                return str(error)
            if sha256 == "":
                if self.done(parts[0], parts[1], hashes=False):
                    return f"{parts[0]}/{parts[1]}, which it went without, has been done since"
                continue
            if upstream is None:
                return f"its input {parts[0]}/{parts[1]} is not done"
            if parts[2] not in upstream.outputs or upstream.outputs[parts[2]].sha256 != sha256:
                return f"its input {key} has changed"
        return None

    def done(self, phase: Phase | str, unit: str = "all", *, hashes: bool = True) -> bool:
        return self.why_not_done(phase, unit, hashes=hashes) is None

    def read(self, phase: Phase | str, unit: str = "all", *, patience_s: float = 0.0) -> Published:
        """A unit's published outputs. Raises UserError where it is not done.

        `patience_s` keeps looking that long for a manifest (NFS caches): give it where upstream is
        known to have ended well.
        """
        deadline = time.monotonic() + patience_s
        while (manifest := self.manifest(phase, unit)) is None and time.monotonic() < deadline:
            os.listdir(self.path)  # makes an NFS client look at the server again
            time.sleep(1.0)
        if manifest is None:
            raise UserError(
                f"{phase}/{unit} is not done in {self.path}; run: python -m jobs {phase} --run"
                f" {self.path} --unit {unit}"
            )
        if problem := self._foreign(manifest, phase, unit):
            raise UserError(f"{phase}/{unit} in {self.path} is {problem}; run its phase again")
        return Published(self.folder(phase, unit), manifest)

    def _foreign(self, manifest: Manifest, phase: str, unit: str) -> str | None:
        """Why a manifest is not one of this unit under this config, or None."""
        if (manifest.phase, manifest.unit) != (phase, unit):
            return f"really {manifest.phase}/{manifest.unit}, moved or copied there"
        made_with = manifest.config
        if made_with is None:
            made_with = self.stored_configs().get(manifest.config_sha256)
        if made_with is None:
            return "made by an earlier version with a config that is no longer in this run"
        if made_with == self._values_today(phase):  # as nearly always, and quickly told
            return None
        keys = changed(phase, made_with, self.config)
        return f"made with another config ({listed(keys, 3)})" if keys else None

    def _values_today(self, phase: str) -> dict[str, Any]:
        """What a phase reads of this config; made once, as it is asked for every manifest."""
        config, found = self._today
        if config is not self.config:
            found = {}
            self._today = (self.config, found)
        if phase not in found:
            found[phase] = values(phase, self.config)
        return found[phase]

    def stored_configs(self) -> dict[str, dict[str, Any]]:
        """The configs that this run has had, as stored, by the hash that manifests of schema 1 have
        of them.
        """
        found = {}
        for file in (self.path / "config.yaml", *sorted(self.path.glob("configs/*.yaml"))):
            try:
                tree = stored_tree(file)
            except UserError:
                continue
            found[hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()] = tree
        return found

    def read_shards(self, phase: Phase, *, patience_s: float = 0.0) -> list[Published]:
        """All shards of a sharded phase, in order of their ranges.

        Raises UserError naming every gap, overlap or shard of another config.
        """
        shards = [
            self.read(phase, unit, patience_s=patience_s) for unit in self.config.units(phase)
        ]
        return exact_cover(shards, phase)


class Attempt:
    """One try at one unit: writes under names of its own, publishes a manifest last.

    >>> attempt = Attempt(run, "select")
    >>> attempt.path("features.json").write_text("{}")
    >>> attempt.publish()
    """

    def __init__(
        self, run: RunDir, phase: Phase | str, unit: str = "all", *, seed: int | None = None
    ) -> None:
        self.run, self.phase, self.unit = run, phase, unit
        self.seed = run.config.seed if seed is None else seed
        self.id = attempt_id()
        self.folder = run.folder(phase, unit)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.started = now()
        self._files: dict[str, Path] = {}
        self._folders: dict[str, Path] = {}
        self._inputs: dict[str, str] = {}
        self._last_progress = 0.0
        self._first_progress: tuple[int, str, float] | None = None
        try:
            before = run.manifest(phase, unit)
        except UserError:  # of another version, and to be replaced
            before = None
        self._replaces = before.attempt if before else None

    def path(self, name: str) -> Path:
        """The file to write for the logical output `name`, such as `table.parquet`."""
        stem, dot, suffix = name.partition(".")
        self._files[name] = self.folder / f"{stem}.{self.id}{dot}{suffix}"
        return self._files[name]

    def written(self, name: str) -> Path:
        """Where `path(name)` led."""
        return self._files[name]

    def directory(self, name: str) -> Path:
        """A folder to fill for the logical output `name`; each file in it becomes `name/FILE`."""
        self._folders[name] = self.folder / f"{name}.{self.id}"
        self._folders[name].mkdir(parents=True, exist_ok=True)
        return self._folders[name]

    def read(self, phase: Phase, unit: str = "all") -> Published:
        """`RunDir.read`, the manifest's outputs noted as inputs of this attempt."""
        published = self.run.read(phase, unit, patience_s=patience_s())
        self.note(published)
        return published

    def read_shards(self, phase: Phase) -> list[Published]:
        """`RunDir.read_shards`, noted as inputs of this attempt."""
        shards = self.run.read_shards(phase, patience_s=patience_s())
        for shard in shards:
            self.note(shard)
        return shards

    def note(self, published: Published) -> None:
        phase, unit = published.manifest.phase, published.manifest.unit
        for name, output in published.manifest.outputs.items():
            self._inputs[f"{phase}/{unit}/{name}"] = output.sha256

    def note_missing(self, phase: Phase | str, unit: str) -> None:
        """Note a unit that this attempt went without: once that is done, this one is not."""
        self._inputs[f"{phase}/{unit}/"] = ""

    def note_file(self, path: Path) -> None:
        """Note a file outside the run as an input, by its hash."""
        self._inputs[f"/{path.absolute()}"] = file_sha256(path)

    def progress(self, done: int, total: int, what: str, **more: Any) -> None:
        """Tell watchers how far this unit is; at most one write a second, the last one always."""
        if time.monotonic() - self._last_progress < 1.0 and done < total:
            return
        self._last_progress = time.monotonic()
        if self._first_progress is None or self._first_progress[1] != what:
            self._first_progress = (done, what, time.monotonic())
        # Where this attempt began, a resumed one not at 0, and how long it has taken since: what is
        # left follows.
        since = {
            "from": self._first_progress[0],
            "seconds": round(time.monotonic() - self._first_progress[2], 1),
        }
        file = self.run.progress_file(self.phase, self.unit)
        file.parent.mkdir(parents=True, exist_ok=True)
        who = {
            "attempt": self.id,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "at": now(),
            "started": self.started,
            **since,
        }
        write_atomic(
            file,
            json.dumps({"done": done, "total": total, "what": what, **who, **more}).encode(),
            durable=False,
        )

    def publish(
        self,
        *,
        range_: tuple[int, int] | None = None,
        total: int | None = None,
        device: str = "cpu",
        **more: Any,
    ) -> Published:
        """Flush every output to disk, then publish the manifest. Raises OSError on quota or I/O
        errors.

        Where another attempt has published since this one began, its manifest stands and is
        returned: this is then the late writer, such as one on a node that was declared dead, and
        others may have read what stands.
        """
        outputs = {name: _output(path, path.name) for name, path in self._files.items()}
        for name, folder in self._folders.items():
            for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                relative = file.relative_to(folder).as_posix()
                outputs[f"{name}/{relative}"] = _output(file, f"{folder.name}/{relative}")
            for inner in {folder, *(p for p in folder.rglob("*") if p.is_dir())}:
                fsync_dir(inner)
        fsync_dir(self.folder)
        manifest = Manifest(
            phase=self.phase,
            unit=self.unit,
            attempt=self.id,
            config=values(self.phase, self.run.config),
            config_sha256=values_sha256(self.phase, self.run.config),
            inputs=dict(sorted(self._inputs.items())),
            outputs=outputs,
            range=list(range_) if range_ else None,
            total=total,
            git_commit=git_commit(),
            image_sha256=os.environ.get("SARM_IMAGE_SHA256"),
            image_commit=os.environ.get("SARM_IMAGE_COMMIT"),
            job_id=os.environ.get(JOB),
            seed=self.seed,
            host=socket.gethostname(),
            device=device,
            started=self.started,
            ended=now(),
            **more,
        )
        if self.run.done(self.phase, self.unit, hashes=False):
            standing = self.run.manifest(self.phase, self.unit)
            if standing and standing.attempt not in (self._replaces, self.id):
                return Published(self.folder, standing)
        write_atomic(self.folder / "manifest.json", json_text(manifest.tree()).encode())
        return Published(self.folder, manifest)


def config_of(
    run: str | Path, config: str | Path | None = None, overrides: Sequence[str] = ()
) -> Config:
    """The config given, or else the one that the run was started with, and overrides. Raises
    UserError where there is neither.
    """
    if config is not None:
        return load_config(config, overrides)
    stored = Path(run) / "config.yaml"
    if not stored.is_file():
        raise UserError(
            f"{run} is not a run directory (no config.yaml); start one with make demo or make"
            " submit-all, or give a CONFIG"
        )
    return load_config(stored, overrides, stored=True)


def listed(names: list[str], most: int = 6) -> str:
    """`a, b and 4 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def many(n: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def exact_cover(shards: list[Published], phase: str) -> list[Published]:
    """The shards in order, if their ranges cover [0, total) once. Raises UserError naming the
    ranges that do not.
    """
    totals = {s.manifest.total or 0 for s in shards}
    if len(totals) != 1:
        raise UserError(
            f"shards of {phase} disagree on how many items there are: {sorted(totals)}; run the odd"
            " ones again"
        )
    total = totals.pop()
    ordered = sorted(shards, key=lambda s: s.manifest.range or [0, 0])
    problems, at = [], 0
    for shard in ordered:
        start, end = shard.manifest.range or (0, 0)
        if start > at:
            problems.append(f"gap [{at}, {start})")
        if start < at:
            problems.append(f"overlap [{start}, {min(at, end)}) at {shard.manifest.unit}")
        if end > total:
            problems.append(f"past the end [{total}, {end}) at {shard.manifest.unit}")
        at = max(at, end)
    if at < total:
        problems.append(f"gap [{at}, {total})")
    if problems:
        raise UserError(
            f"shards of {phase} do not cover [0, {total}) once: {'; '.join(problems)}; run those"
            " shards again"
        )
    return ordered


def differences(old: Config, new: Config) -> list[str]:
    """Dotted keys whose values differ between two configs."""

    def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
        if isinstance(tree, dict):
            return {
                k: v
                for key, value in tree.items()
                for k, v in flat(value, f"{prefix}.{key}" if prefix else key).items()
            }
        return {prefix: tree}

    a, b = flat(old.model_dump(mode="json")), flat(new.model_dump(mode="json"))
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def write_atomic(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    Errors from flush, fsync and close (quota, full disk) are raised and leave the old file.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_dir(path.parent)


def fsync_dir(folder: Path) -> None:
    """Flush a folder's entries. EINVAL is passed over: some file systems cannot fsync a folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def holds_tensors(name: str) -> bool:
    """Whether an output is weights or encoded states: a file of a published folder, or one of
    safetensors.
    """
    return "/" in name or name.endswith(".safetensors")


GONE = "is missing"


def damage(path: Path, entry: Mapping[str, Any], *, hashes: bool = True) -> str | None:
    """What is wrong with a published file, or None."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return GONE
    if size != entry["bytes"]:
        return f"has {size} bytes instead of {entry['bytes']}"
    if hashes and file_sha256(path) != entry["sha256"]:
        return "does not match its SHA-256"
    return None


PROGRESS_BAR = re.compile(
    r"^.*\b\d{1,3}%\|[^|]*(\|\s*([\d.?kMG]+/[\d.?kMG]+)?(\s*\[[^\]]*\]?)?)?"
    r"|^.*\b\d+it \[\d+:\d\d[^\]]*\]?"
)
"""As tqdm draws it, `Loading weights:  47%|████      | 10/21 [00:01<00:01]`, and without a total,
`10it [00:01, 9.8it/s]`."""


def without_progress(lines: list[str]) -> list[str]:
    """A log's lines but for progress bars, which are no cause of anything; what was written into
    the line of one stays.
    """
    found = ((line, PROGRESS_BAR.sub("", line)) for line in lines)
    kept = (line if line == rest else rest.strip() for line, rest in found)
    return [line for line in kept if line]


def attempt_id() -> str:
    """Names this attempt's files: job, try and rank as the launcher gives them, always with a
    random part.
    """
    return f"{os.environ.get(ATTEMPT, 'local-0-0')}-{uuid.uuid4().hex[:8]}"


def patience_s() -> float:
    """How long to look for a manifest whose job has ended well."""
    return float(os.environ.get(PATIENCE, "0"))


@functools.cache
def git_commit() -> str | None:
    """The checkout's commit with `+` where it has changes, or what an image was built from, or
    None.
    """
    if "SARM_GIT_COMMIT" in os.environ:
        return os.environ["SARM_GIT_COMMIT"]
    try:
        commit = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(ROOT), "status", "--porcelain", "-uno"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def heed_umask(path: Path) -> None:
    """Give a file the permissions that the umask asks for; safetensors makes its owner's alone."""
    mask = os.umask(0o077)  # whatever another thread makes meanwhile is private, not open to all
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _output(path: Path, file: str) -> Output:
    heed_umask(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Output(file=file, bytes=path.stat().st_size, sha256=file_sha256(path))

"""What a submission shows: the scripts of a dry run, and the table of what was sent."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from sarm.run import RunDir
from slurm.cost import table as cost_table
from slurm.dag import Node
from slurm.journal import batches_of
from slurm.plan import Batch
from slurm.profile import Profile, resources, tasks_per_node
from slurm.queue import QueuedJob
from slurm.sending import text

SECRET = re.compile(r"(?i)\b(\w*(?:token(?!izers)|secret|password|api_?key)\w*)=\S+")


def dry_run(run: RunDir, profile: Profile, batches: list[Batch]) -> None:
    """Print every sbatch script as it would be, and what it may cost."""
    ids = {batch.name: f"id-of-{batch.name}" for batch in batches}
    for batch in batches:
        shown = text(run, profile, batch, ids, "dry-run", last=batch is batches[-1])
        units = ", ".join(unit for element in batch.elements for unit in element)
        print(f"### {batch.name}: {units}")
        print(SECRET.sub(r"\1=***", shown))
    print(f"### {len(batches)} submissions, {sum(len(batch.elements) for batch in batches)} jobs")
    print(cost_table(run.config, profile, run, batches))
    print("### nothing was sent; without DRY_RUN these are")


def show_attached(attached: dict[Node, QueuedJob], superseded: Iterable[QueuedJob]) -> None:
    """A line on what runs or waits already and is left alone, and one on what was cancelled."""
    if attached:
        counts = Counter(node.phase for node in attached)
        few = {phase for phase, count in counts.items() if count <= 4}
        named = [f"{node} ({job.id})" for node, job in attached.items() if node.phase in few]
        named += [f"{count} of {phase}" for phase, count in counts.items() if phase not in few]
        print(f"attached to what still runs or waits: {', '.join(named)}")
    if ended := sorted({job.base for job in superseded}):
        print(f"cancelled, since sent anew: {', '.join(ended)}")


def show_sent(run: RunDir, profile: Profile, journal: dict[str, Any]) -> None:
    """The table of what was submitted."""
    table = Table(box=None, header_style="bold")
    for column in ("phase", "job id", "depends on", "resources", "log"):
        table.add_column(column, overflow="fold")
    for batch in batches_of(journal):
        want, ids = resources(profile, batch.phase), journal["jobs"]
        tasks = want.nodes * tasks_per_node(profile, batch.phase)
        shape = f"{len(batch.elements)}x " if len(batch.elements) > 1 else ""
        shape += f"{want.nodes} nodes, " if want.nodes > 1 else ""
        memory = want.retry_mem_gb if batch.retry and want.retry_mem_gb else want.mem_gb
        log = run.log(batch.phase, batch.elements[0][0] if len(batch.elements) == 1 else "*")
        waits = [*(ids.get(need, "") for need in batch.needs), *batch.after]
        table.add_row(
            batch.name,
            ids.get(batch.name, ""),
            ":".join([batch.when, *waits]) if waits else "",
            f"{shape}{tasks} tasks, {want.gpus * want.nodes} GPUs, {want.cpus_per_task} CPUs a"
            f" task, {memory} GB, {want.time_min} min",
            str(log.relative_to(run.path)),
        )
    # ids are no emoji: `afterok:99:100:101`
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:  # a file or a pipe: no lines broken at a width that nobody has
        console.width = 200
    console.print(table)

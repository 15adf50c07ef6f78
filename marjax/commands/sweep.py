"""`marjax sweep`."""

import argparse
import os

from marjax.errors import TrainingError, UserError

HELP = "Train and measure the points of a sweep file, and tabulate them."
EXAMPLE = "marjax sweep sweep.py --root runs/sweep"
TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE.py")
    parser.add_argument(
        "--root", required=True, metavar="DIR", help="where work directories, logs and the table go; local or gs://"
    )
    parser.add_argument(
        "--engine",
        choices=("local", "slurm", "xpk"),
        default="local",
        help="what runs a point: a process of this machine, a task of a Slurm array, or a workload of a GKE cluster",
    )
    parser.add_argument(
        "--engine_args",
        default="",
        metavar="ARGS",
        help='of sbatch or xpk workload create, such as --engine_args="--partition=x --time=4:00:00"',
    )
    parser.add_argument("--jobs", type=int, help="points at a time; by default 1 on this machine, no limit for Slurm")
    parser.add_argument("--only", metavar="NAME,NAME", help="points to run; all by default")
    parser.add_argument("--table", action="store_true", help="only write the table of what is there")
    parser.add_argument("--status", action="store_true", help="only say how each point is")


def run(given: argparse.Namespace) -> None:
    from marjax.sweep import select, status, sweep, table

    if given.table or given.status:
        if given.only or given.jobs is not None or given.engine != "local" or given.engine_args:
            raise UserError(
                f"{'--table' if given.table else '--status'} runs nothing: leave out --only, --jobs and --engine"
            )
        if given.table:
            table(given.file, given.root)
        if given.status:
            print("\n".join(status(given.file, given.root)))
        return
    rows = sweep(
        given.file, given.root, jobs=given.jobs, only=given.only, engine=given.engine, engine_args=given.engine_args
    )
    names = list(dict.fromkeys(row["point"] for row in rows))
    chosen = names if given.only is None else select(given.only, names)
    failed = [row["point"] for row in rows if row["status"] == "failed" and row["point"] in chosen]
    print(f"the table is in {os.path.join(given.root, 'table.md')} and .csv")
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(chosen)} points failed: {' '.join(failed)}; see the logs in "
            f"{os.path.join(given.root, 'logs')}, then start the sweep again"
        )

"""`marjax sweep`."""

import argparse
import os

from marjax.errors import TrainingError, UserError

HELP = "Train and measure the points of a sweep file, and write a table of the results."
EXAMPLE = "marjax sweep sweep.py --root runs/sweep"
TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE.py", help="sweep file, with get_sweep (docs/sweeps.md)")
    parser.add_argument(
        "--root", required=True, metavar="DIR", help="folder for work directories, logs and the table; local or gs://"
    )
    parser.add_argument(
        "--engine",
        choices=("local", "slurm", "xpk"),
        default="local",
        help="run each point as a local process, a task of a Slurm array, or a workload of a GKE cluster "
        "(default: local)",
    )
    parser.add_argument(
        "--engine_args",
        default="",
        metavar="ARGS",
        help='arguments for sbatch or xpk workload create, such as --engine_args="--partition=x --time=4:00:00"',
    )
    parser.add_argument("--jobs", type=int, help="points at a time (default: 1 on this machine, no limit for Slurm)")
    parser.add_argument("--only", metavar="NAME,NAME", help="points to run (default: all)")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--status", action="store_true", help="only print the status of each point")


def run(args: argparse.Namespace) -> None:
    """Runs or submits a sweep and prints where its table is; or writes only the table, or prints the status.

    Raises:
      UserError, TrainingError: see `sweep.sweep`; or points have failed.
    """
    from marjax.sweep import select, status, sweep, table

    if args.table or args.status:
        if args.only or args.jobs is not None or args.engine != "local" or args.engine_args:
            flag = "--table" if args.table else "--status"
            raise UserError(f"{flag} runs nothing; omit --only, --jobs, --engine and --engine_args")
        if args.table:
            table(args.file, args.root)
        if args.status:
            print("\n".join(status(args.file, args.root)))
        return
    rows = sweep(args.file, args.root, jobs=args.jobs, only=args.only, engine=args.engine, engine_args=args.engine_args)
    names = list(dict.fromkeys(row["point"] for row in rows))
    chosen = names if args.only is None else select(args.only, names)
    failed = [row["point"] for row in rows if row["status"] == "failed" and row["point"] in chosen]
    print(f"the table is in {os.path.join(args.root, 'table.md')} and .csv")
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(chosen)} points failed: {' '.join(failed)}; see the logs in "
            f"{os.path.join(args.root, 'logs')}, then start the sweep again"
        )

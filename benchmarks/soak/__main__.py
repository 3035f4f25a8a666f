"""An hour of mixed load under faults at random, on one cluster: leaks, hung requests, and every request's account.

    python -m benchmarks.soak [--minutes M] [--seed N] [--folder DIR]

Two orchestrators, three agents and a gateway; as root each agent has wires of its own. Eight streams of the fault
matrix run, and three workers that ask whatever is drawn. Faults of the matrix follow one another, each once in an order
that is drawn, then all again, in the second half without those that kill. When all is whole, nothing is done for a
while, and what is sampled then counts. In the end nobody asks any more, and what is still held then is left over.
"""

import argparse
import asyncio
import os
import shutil
import tempfile
import time
from pathlib import Path

from benchmarks.soak.report import done, kinds, rows
from benchmarks.soak.shown import shown
from benchmarks.soak.soak import soak
from benchmarks.table import show, write
from models.store import Store
from resplit.demo import shipped_store

MINUTES = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of faults ({MINUTES:g})")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the faults, their moments and the load")
    parser.add_argument("--folder", type=Path, help="an empty folder for the cluster's logs, which is kept")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="resplit-soak-") as scratch:
        folder = given.folder or Path(scratch)
        store = Store(Path(shutil.copytree(shipped_store(), folder / "store")))
        told = asyncio.run(soak(folder, store, 60 * given.minutes, given.seed))
    unwired = "" if told.wired else ", none of links, for want of root"
    title = f"soak: {given.minutes:g} minutes of mixed load under {len(told.faults)} faults{unwired}"
    found = rows(told)
    show(title, shown(found))
    write(
        "soak",
        title,
        found,
        seed=given.seed,
        minutes=given.minutes,
        faults=done(told),
        requests=kinds(told.requests),
        settled_s=round(told.settled_s, 1),
        load_average=os.getloadavg(),
    )


if __name__ == "__main__":
    main()

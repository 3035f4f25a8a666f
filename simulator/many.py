"""Many runs over all cores, none of which is done twice."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import TypeVar

from simulator.shelf import Kept, Shelf

Job = TypeVar("Job")


def run_all(
    jobs: Sequence[Job],
    run: Callable[[Job], Kept],
    processes: int,
    on_done: Callable[[Job, Kept], None],
    shelf: Shelf[Kept] | None,
    made_of: Callable[[Job], tuple[str, ...]],
) -> list[Kept]:
    """What came of each job, in their order; `on_done` hears of each as it ends. What is on the `shelf`, by what a job
    is `made_of`, is not run again."""
    found: dict[int, Kept] = {}

    def ended(number: int, done: Kept) -> None:
        found[number] = done
        on_done(jobs[number], done)

    def ran(number: int, done: Kept) -> None:
        if shelf is not None:
            shelf.keep(done, *made_of(jobs[number]))
        ended(number, done)

    todo = []
    for number, job in enumerate(jobs):
        before = None if shelf is None else shelf.find(*made_of(job))
        if before is None:
            todo.append(number)
        else:
            ended(number, before)
    if processes == 1:
        for number in todo:
            ran(number, run(jobs[number]))
    else:
        # Not forked: threads of numerical libraries do not survive that.
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(run, jobs[number]): number for number in todo}
            for future in as_completed(futures):
                ran(futures[future], future.result())
    return [found[number] for number in range(len(jobs))]

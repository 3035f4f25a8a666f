"""One process of a machine at a time: `agent.alone`."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator

import pytest

from agent.alone import alone_on_machine

HOLD = (
    "import asyncio\n"
    "from agent.alone import alone_on_machine\n"
    "async def hold():\n"
    "    async with alone_on_machine() as got:\n"
    "        print(got, flush=True)\n"
    "        input()\n"
    "asyncio.run(hold())\n"
)


@pytest.fixture
def holder() -> Iterator["subprocess.Popen[str]"]:
    """Another process that has the turn until it is told to go on."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        yield process
        process.kill()


async def test_one_waits_for_another_process_and_goes_on_when_that_is_done(holder: "subprocess.Popen[str]") -> None:
    async def told() -> None:
        await asyncio.sleep(0.1)
        assert holder.stdin is not None
        holder.stdin.write("\n")
        holder.stdin.flush()

    telling = asyncio.create_task(told())
    async with alone_on_machine(20.0) as got:
        assert got
        assert telling.done()


async def test_a_process_that_is_killed_gives_its_turn_back(holder: "subprocess.Popen[str]") -> None:
    holder.kill()
    holder.wait()
    async with alone_on_machine(5.0) as got:
        assert got


async def test_nobody_waits_for_ever(holder: "subprocess.Popen[str]") -> None:
    async with alone_on_machine(0.1) as got:
        assert not got


async def test_the_turn_is_given_back_whatever_happens_in_it() -> None:
    with pytest.raises(ValueError, match="what was measured broke"):
        async with alone_on_machine(5.0):
            raise ValueError("what was measured broke")
    async with alone_on_machine(5.0) as got:
        assert got

"""`python -m orchestrator --url nats://HOST:4222 --keys FOLDER --store FOLDER [--id NAME]`"""

import argparse
import asyncio
import logging
import signal
import sys
from pathlib import Path

from bus.connection import DEFAULT_URL
from orchestrator.shell import OrchestratorConfig, run
from schemas.base import NodeId
from schemas.errors import ResplitError


def main() -> int:
    """Orchestrate until SIGINT or SIGTERM; 0 then, 1 after an error, which stands on standard error."""
    parser = argparse.ArgumentParser(prog="orchestrator", description="Decide where the blocks of models run.")
    parser.add_argument("--url", default=DEFAULT_URL, help="NATS server (default: %(default)s)")
    parser.add_argument("--keys", type=Path, required=True, help="key folder with the identity 'orchestrator'")
    parser.add_argument("--store", type=Path, required=True, help="store of imported models")
    parser.add_argument("--id", type=NodeId, help="name among the orchestrators (default: host and process id)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    config = OrchestratorConfig(arguments.url, arguments.keys, arguments.store, arguments.id)
    try:
        asyncio.run(_until_told_to_stop(config))
    except ResplitError as error:
        print(f"{error.code.value}: {error.message}", file=sys.stderr)
        return 1
    return 0


async def _until_told_to_stop(config: OrchestratorConfig) -> None:
    orchestrating = asyncio.create_task(run(config))
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, orchestrating.cancel)
    try:
        await orchestrating
    except asyncio.CancelledError:
        if not orchestrating.cancelled():
            raise


if __name__ == "__main__":
    raise SystemExit(main())

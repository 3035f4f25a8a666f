"""PURE: configurations of NATS servers as they are generated, to be read: `deploy/nats` (`python -m bus.examples`)."""

import sys
from collections.abc import Mapping
from pathlib import Path

from bus.founding import JETSTREAM, LISTEN
from bus.natsconf import SERVER_FILE, server_conf
from bus.server_certificate import server_files
from bus.servers import cluster_server_conf, leaf_server_conf

HOSTS = {"a": "10.0.0.2", "b": "10.0.0.3", "c": "10.0.0.4"}
LEAF, HOME, HUBS = "kitchen", "workshop", ("10.0.0.2", "10.0.0.3")


def examples() -> Mapping[str, str]:
    """One server, as `resplit init` writes it; three that are one (`resplit servers`); a leaf node (`resplit leaf`)
    and one of a home (`--home`): by path."""
    three = {f"three/{name}/{SERVER_FILE}": cluster_server_conf(name, HOSTS, {}, JETSTREAM) for name in HOSTS}
    return {
        f"one/{SERVER_FILE}": server_conf(LISTEN, JETSTREAM, server_files(Path())),
        **three,
        f"leaf/{LEAF}/{SERVER_FILE}": leaf_server_conf(LEAF, HUBS),
        f"home/{HOME}/{SERVER_FILE}": leaf_server_conf(HOME, HUBS, store=JETSTREAM),
    }


def main() -> None:
    """Write them into the folder that is named."""
    for name, text in examples().items():
        path = Path(sys.argv[1]) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()

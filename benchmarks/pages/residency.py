"""The tables of docs/benchmarks.md about many models on small disks and memories."""

from benchmarks.table import Row


def variants(rows: list[Row]) -> list[str]:
    """What adapters cost and save."""
    steps = [row for row in rows if "step ms" in row]
    second = [row for row in rows if "memory MB" in row]
    return [
        "| a decode step with | ms | of the base's |",
        "|---|---:|---:|",
        *(f"| {row['name']} | {row['step ms']:.2f} | {row[_OF]:.3f} |" for row in steps),
        "",
        "| the second deployment is | MB of memory | serves after s |",
        "|---|---:|---:|",
        *(f"| {row['name']} | {row['memory MB']:.0f} | {row['serves after s']:.2f} |" for row in second),
    ]


_OF = "of the base's"


def placed(rows: list[Row]) -> list[str]:
    """How far from the best each way to decide is."""
    return [
        "| servers x models | decided by | over the bound, mean | worst | over the proven best | worst | CPU s |",
        "|---|---|---:|---:|---:|---:|---:|",
        *(
            f"| {row['size']} | {row['name']}{_proven(row)} | {row['over the bound']:.1%} | {row['worst']:.1%} | "
            f"{_share(row['over the best'])} | {_share(row['worst over the best'])} | {row['cpu s']:.2f} |"
            for row in rows
        ),
    ]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _proven(row: Row) -> str:
    return "" if row["proven"] is None else f", {row['proven']} of {row['seeds']} proven"


def ahead(rows: list[Row]) -> list[str]:
    """What loading costs those who run, and what files on disks save."""
    beside = [row for row in rows if "loads" in row]
    killed = [row for row in rows if "p50 s" in row]
    return [
        "| beside one that decodes | loads | ms a token | of undisturbed | p99 ms | longest ms |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| {row['name']} | {row['loads']} | {row['ms a token']:.2f} | {row['of undisturbed']:.3f} | "
            f"{row['p99 ms']:.1f} | {row['longest ms']:.0f} |"
            for row in beside
        ),
        "",
        "| its node is killed, and its files are | runs | stands still, p50 s | worst s |",
        "|---|---:|---:|---:|",
        *(f"| {row['name']} | {row['runs']} | {row['p50 s']:.2f} | {row['worst s']:.2f} |" for row in killed),
    ]


def traces(rows: list[Row]) -> list[str]:
    """Six models on a third of their memory, kept in two ways."""
    figures = ("requests", "failed", "hit rate", "stalls per 1,000", "mean ms", "p50 ms", "p95 ms")
    return [
        f"| kept | {' | '.join(figures)} |",
        "|---|" + "---:|" * len(figures),
        *(f"| {row['name']} | {' | '.join(f'{row[figure]:g}' for figure in figures)} |" for row in rows),
    ]

"""`resplit models privacy`: what an untrusted node could read of prompts, for each place where a model can be cut."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resplit.options import DEFAULT_STORE, AsJson, StoreFolder
from resplit.output import print_json, print_table, progress_bar
from schemas.errors import ErrorCode, ResplitError

if TYPE_CHECKING:
    from schemas.privacy import Depth, PrivacyCurve

TEXT_BYTES_MAX = 16 << 20
"""More than the longest probe reads; a tokenizer needs some hundred times a text's size in memory."""
BAR = 20


def privacy(
    model: Annotated[str, typer.Argument(help="A decoder's name or the digest of its manifest.")],
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 file like what will be asked; default: tokens drawn by rank.")
    ] = None,
    sequences: Annotated[int, typer.Option(help="Prompts; an eighth of them is only tried on.")] = 256,
    tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 32,
    seed: Annotated[int, typer.Option(help="The same seed draws the same prompts.")] = 0,
    below: Annotated[float, typer.Option(help="How much of a prompt an untrusted node may recover, 0 to 1.")] = 0.1,
    store: StoreFolder = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Measure how many prompt tokens a fixed probe recovers from what crosses behind each block of a decoder."""
    from models.privacy import Asked, measure  # noqa: PLC0415
    from models.store import Store  # noqa: PLC0415

    if not 0 < below <= 1:
        raise ResplitError(ErrorCode.INVALID_REQUEST, f"below is {below}; give a share above 0, at most 1", "below")
    asked = Asked(sequences, tokens, seed, None if text is None else read_text(text))
    with progress_bar() as progress:
        threads = len(os.sched_getaffinity(0))
        curve = measure(Store(store.expanduser()), model, asked, threads, progress)
    keep = curve.blocks_to_keep(below)
    if as_json:
        print_json({"model": model, "curve": curve, "below": below, "keep_first": keep})
        return
    print_curve(model, curve)
    print(advice(curve, below, keep))


def read_text(path: Path) -> str:
    """The text of a file. Raises INVALID_REQUEST for one that cannot be read, is too large or is not UTF-8."""
    try:
        if path.stat().st_size > TEXT_BYTES_MAX:
            message = f"{path} has more than {TEXT_BYTES_MAX} bytes; give an excerpt"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "text")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        message = f"{path} cannot be read ({error.strerror}); give a text file"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "text") from error
    except UnicodeDecodeError as error:
        message = f"{path} is not UTF-8 (at byte {error.start}); give a text file"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "text") from error


def print_curve(model: str, curve: "PrivacyCurve") -> None:
    """A row for each depth, and what the rows are about."""
    drawn = "windows of the text" if curve.drawn == "text" else "tokens drawn by rank, without meaning"
    print(
        f"{model}: prompt tokens recovered from what crosses behind each block\n"
        f"  {curve.test} prompts of {curve.tokens} tokens ({drawn}, seed {curve.seed}); the probe was fitted on "
        f"{curve.calibration} others\n"
        f"  a guess without a look at the activations: {_percent(curve.depths[0].recovered.chance)}; among the "
        f"{curve.candidates} tokens that the probe can name: {_percent(curve.nameable)}"
    )
    columns = ["behind", "block", "", "recovered", "95 % interval", "among five", "nearest"]
    print_table("", columns, [_row(depth) for depth in curve.depths])


def advice(curve: "PrivacyCurve", below: float, keep: int | None) -> str:
    """What the curve means, and what it does not."""
    if keep is None:
        found = (
            f"By this probe, recovery stays below {_percent(below)} at no cut: only trusted nodes should hold blocks."
        )
    elif keep == 1:
        found = (
            f"By this probe, recovery stays below {_percent(below)} where block 0 is on trusted nodes: `resplit deploy "
            "--private 0`."
        )
    else:
        found = (
            f"By this probe, recovery stays below {_percent(below)} where the first {keep} blocks are on trusted "
            f"nodes: `resplit deploy --private {keep - 1}`."
        )
    if curve.is_starved:
        found += (
            f" It had {curve.calibration * curve.tokens} states to learn from, few for a width of {curve.width}: with "
            "more --sequences it will recover more."
        )
    lines = [
        found,
        "This is a floor: a stronger attack may recover more, never less. One with the weights of the blocks before a "
        "cut can try token after token until the activations match, at any depth: the curve ranks the cuts, and none "
        "of them protects prompts from such a node.",
        "It is of prompts. The answer is open at every cut to whoever has the weights of the blocks behind it and runs "
        "them"
        + (
            "; the state before the head shows it at once."
            if any(depth.shows_answer for depth in curve.depths)
            else "."
        ),
    ]
    return "\n".join(lines)


def _row(depth: "Depth") -> list[str]:
    found = depth.recovered
    filled = round(found.top1 * BAR)
    return [
        str(depth.block),
        depth.role + (", the answer too" if depth.shows_answer else ""),
        "█" * filled + "·" * (BAR - filled),
        _percent(found.top1),
        f"{100 * found.low:.1f} to {_percent(found.high)}",
        _percent(found.top5),
        found.lookup,
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"

"""The demonstration's findings: as tables for people, as one document for programs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from resplit.demo import Answer, Outcome
from resplit.output import print_table, size

EXAMPLES = 4


def print_report(outcome: Outcome) -> None:
    """Print who ran what, how long it took and whether it was right."""
    facts = document(outcome)
    if outcome.answers:
        _print_tables(outcome, facts)
    print()
    print(f"throughput       {facts['tokens_per_s']:.0f} tokens/s ({facts['tokens']} in {outcome.serve_s:.2f} s)")
    print(f"network          {facts['network_ms_per_token']:.2f} ms a token, links, encoding and scheduling")
    print(f"made ready       {outcome.start_s:.1f} s for the processes, {outcome.deploy_s:.1f} s for the model")
    print(f"same as uncut    {facts['identical']} of {facts['answers']}, token for token")
    print(f"arithmetic       {facts['greedy_right']} of {facts['greedy']} greedy sums are right")
    for error, count in Counter(outcome.errors).most_common():
        print(f"failed           {count} requests: {error}")
    print("\nEvery answer is the uncut model's." if outcome.all_well else "\nNOT every answer is the uncut model's.")


def _print_tables(outcome: Outcome, facts: dict[str, Any]) -> None:
    answers = outcome.answers
    print()
    shown = [[a.problem.prompt, a.text, _how(a), _verdict(a)] for a in _examples(answers)]
    print_table("A few of the answers", ["prompt", "answer", "decoding", "verdict"], shown)
    print()
    rows = [
        [
            str(i),
            stage["node"],
            f"{stage['first']}-{stage['last']}",
            size(stage["weight_bytes"]),
            f"{stage['compute_ms_per_call']:.2f}",
            f"{stage['queue_ms_per_call']:.2f}",
        ]
        for i, stage in enumerate(facts["stages"])
    ]
    columns = ["stage", "node", "blocks", "weights", "compute ms/call", "wait ms/call"]
    print_table("Who ran what (means over the requests)", columns, rows)
    print()
    latency = [
        [name, *(f"{facts[key][p]:.1f}" for p in ("p50", "p90", "p99"))]
        for name, key in (("first token, ms", "ttft_ms"), ("each further token, ms", "tpot_ms"))
        if facts[key]
    ]
    print_table("Latency as the client saw it, all requests at once", ["", "p50", "p90", "p99"], latency)
    if outcome.disturbances:
        print()
        _print_disturbances(outcome)


def document(outcome: Outcome) -> dict[str, Any]:
    """The same findings as one value; times in milliseconds."""
    answers = outcome.answers
    greedy = [answer for answer in answers if answer.problem.seed is None]
    network_ms = sum(answer.usage.network_ms for answer in answers)
    return {
        "ok": outcome.all_well,
        "answers": len(answers),
        "errors": list(outcome.errors),
        "identical": sum(answer.is_identical for answer in answers),
        "greedy": len(greedy),
        "greedy_right": sum(answer.is_right for answer in greedy),
        "tokens": outcome.tokens,
        "tokens_per_s": outcome.tokens / outcome.serve_s,
        "network_ms_per_token": network_ms / max(1, outcome.tokens),
        "ttft_ms": percentiles([answer.ttft_ms for answer in answers]),
        "tpot_ms": percentiles([answer.tpot_ms for answer in answers if answer.tpot_ms is not None]),
        "start_s": outcome.start_s,
        "deploy_s": outcome.deploy_s,
        "serve_s": outcome.serve_s,
        "stages": _stages(outcome),
        "streams": outcome.streams,
        "streams_unbroken": outcome.unbroken,
        "stream_errors": list(outcome.stream_errors),
        "disturbances": [asdict(disturbance) for disturbance in outcome.disturbances],
        "decision": outcome.decision,
    }


def _print_disturbances(outcome: Outcome) -> None:
    rows = [
        [
            one.what,
            "-" if one.acted_s is None else f"{one.acted_s:.1f}",
            f"{1e3 * one.worst_gap_s:.0f}",
            f"{1e3 * one.before_s:.1f} -> {1e3 * one.after_s:.1f}",
        ]
        for one in outcome.disturbances
    ]
    columns = ["disturbance", "new plan after s", "longest wait for a token, ms", "a token every ms"]
    print_table("Streams that never pause, while the cluster is disturbed", columns, rows)
    for one in outcome.disturbances:
        print(f"{one.what}: {one.answer}")
    print()
    print(f"{outcome.unbroken} of {outcome.streams} streams are the uncut model's, token for token; ", end="")
    print(f"{len(outcome.stream_errors)} ended in an error")
    for error in outcome.stream_errors:
        print(f"  {error}")
    print(f"The last decision: {outcome.decision}")


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 by the nearest rank; empty for no values."""
    ranked = sorted(values)
    if not ranked:
        return {}
    return {f"p{p}": ranked[max(0, -(-len(ranked) * p // 100) - 1)] for p in (50, 90, 99)}


def _stages(outcome: Outcome) -> list[dict[str, Any]]:
    totals: dict[tuple[int, int, str], list[float]] = {}
    for answer in outcome.answers:
        for stage in answer.usage.stages:
            total = totals.setdefault((stage.first, stage.last, stage.node), [0.0, 0.0, 0])
            total[0] += stage.compute_ms
            total[1] += stage.queue_ms
            total[2] += stage.calls
    return [
        {
            "node": node,
            "first": first,
            "last": last,
            "weight_bytes": sum(outcome.weight_bytes[first : last + 1]),
            "compute_ms_per_call": compute_ms / max(1, calls),
            "queue_ms_per_call": queue_ms / max(1, calls),
        }
        for (first, last, node), (compute_ms, queue_ms, calls) in sorted(totals.items())
    ]


def _examples(answers: Sequence[Answer]) -> list[Answer]:
    # What went wrong is worth more to see than what went right.
    return sorted(answers, key=lambda answer: answer.is_identical)[:EXAMPLES]


def _how(answer: Answer) -> str:
    return "greedy" if answer.problem.seed is None else f"sampled, seed {answer.problem.seed}"


def _verdict(answer: Answer) -> str:
    same = "as uncut" if answer.is_identical else "NOT as uncut"
    return f"{same}, {'right' if answer.is_right else 'wrong'}"

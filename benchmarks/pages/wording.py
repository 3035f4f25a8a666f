"""What every page says in the same way."""

import re

from benchmarks.table import Row


def between(text: str, name: str, lines: list[str]) -> str:
    """The text with what stands between the markers of `name` replaced."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    assert marked.search(text), f"no marker {name!r}"
    return marked.sub(lambda found: found[1] + "\n".join(lines) + "\n" + found[2], text)


def hardware_of(result: Row) -> str:
    hardware, versions = result["hardware"], result["versions"]
    simd = ", ".join(hardware["simd"]) or "no SIMD listed"
    return (
        f"{result['title']}; {hardware['cores']} cores of {hardware['cpu']} ({simd}), "
        f"{hardware['memory_bytes'] / 2**30:.0f} GiB; ONNX Runtime {versions['onnxruntime-gpu']}; medians of "
        f"{result['rounds']} rounds; `{result['command']}`, {result['at'][:10]}. {result.get('note', '')}"
    ).strip()


def under(result: Row) -> str:
    """Where and under which load a result was measured."""
    hardware, load = result["hardware"], ", ".join(f"{load:.1f}" for load in result["load_average"])
    return (
        f"{result['title']}; {hardware['cores']} cores of {hardware['cpu']}; load average {load} at the end; "
        f"`{result['command']}`, {result['at'][:10]}. {result.get('note', '')}"
    ).strip()


def ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def against(ratio: float, target: float) -> str:
    verdict = "met" if ratio >= target else "**missed**"
    return f"{ratio:.2f} | >= {target}: {verdict}"

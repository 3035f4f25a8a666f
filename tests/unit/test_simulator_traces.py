"""Traces of real requests: both formats, in order of time, and errors with file, line, column and value."""

from pathlib import Path

import pytest

from schemas.errors import ErrorCode, ResplitError
from simulator.files import shipped
from simulator.traces import TRACE_ROWS_MAX, TraceRow, read_trace

SCENARIOS = shipped()["small"].parent
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "trace.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_an_azure_trace_begins_at_its_first_request(tmp_path: Path) -> None:
    text = "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    assert read_trace(written(tmp_path, AZURE + text)) == (TraceRow(0.0, 374, 44), TraceRow(4.314579, 396, 109))


def test_times_with_a_zone_and_rows_out_of_order_are_taken(tmp_path: Path) -> None:
    text = "2024-05-10 00:00:02.5+00:00,7,8\n2024-05-10 02:00:01+02:00,5,6\n"
    assert read_trace(written(tmp_path, AZURE + text)) == (TraceRow(0.0, 5, 6), TraceRow(1.5, 7, 8))


def test_burstgpt_is_known_by_its_header_and_its_failures_are_left_out(tmp_path: Path) -> None:
    text = "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,API log\n118,GPT-4,417,276,693,API log\n"
    assert read_trace(written(tmp_path, BURST + text)) == (TraceRow(0.0, 472, 18), TraceRow(113.0, 417, 276))
    more = "\ufeff" + BURST.replace("Timestamp,", "Timestamp,Session ID,").replace("\n", "\r\n")
    assert read_trace(written(tmp_path, more + "5,s,ChatGPT,472,18,490,x\r\n")) == (TraceRow(0.0, 472, 18),)


@pytest.mark.parametrize(("name", "count"), [("azure-sample", 400), ("burstgpt-sample", 290)])
def test_the_samples_that_are_shipped_are_traces(name: str, count: int) -> None:
    rows = read_trace(SCENARIOS / f"{name}.csv")
    assert count <= len(rows) <= count + 10
    assert rows[0].at_s == 0
    assert [row.at_s for row in rows] == sorted(row.at_s for row in rows)
    assert 500 < rows[-1].at_s < 700


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (AZURE + "2023-11-16 18:15:46,374,44\nyesterday,1,1\n", ["line 3", "'TIMESTAMP'", "'yesterday'", "a time"]),
        (AZURE + "2023-11-16 18:15:46,374,4.5\n", ["line 2", "'GeneratedTokens'", "'4.5'"]),
        (AZURE + "2023-11-16 18:15:46,-1,4\n", ["line 2", "'ContextTokens'", "'-1'"]),
        (AZURE + "2023-11-16 18:15:46,374\n", ["line 2", "'GeneratedTokens'", "None"]),
        (BURST + "inf,ChatGPT,472,18,490,x\n", ["line 2", "'Timestamp'", "'inf'"]),
        (BURST + f"1,ChatGPT,{10**30},18,490,x\n", ["line 2", "'Request tokens'"]),
        (BURST, ["no row with output"]),
        (BURST + "45,ChatGPT,1087,0,1087,API log\n", ["no row with output"]),
        ("at,in,out\n1,2,3\n", ["line 1", "'at, in, out'", "GeneratedTokens", "Response tokens"]),
        ("", ["line 1", "the columns are neither"]),
        (b"\xff\xfe\x00", ["not a CSV file"]),
        (AZURE + "2023-11-16," + "9" * 200_000 + ",4\n", ["not a CSV file"]),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, text: str | bytes, words: list[str]) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ResplitError) as caught:
        read_trace(path)
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_REQUEST, "workload.trace")
    for word in [str(path), *words]:
        assert word in caught.value.message


def test_a_trace_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResplitError, match=r"cannot read .*nothing\.csv: No such file"):
        read_trace(tmp_path / "nothing.csv")


def test_a_trace_is_never_read_beyond_what_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TRACE_ROWS_MAX >= 1_500_000, "the first file of BurstGPT has 1.4 million rows"
    monkeypatch.setattr("simulator.traces.TRACE_ROWS_MAX", 2)
    with pytest.raises(ResplitError, match=r"line 4: a trace has 2 rows at most"):
        read_trace(written(tmp_path, BURST + "1,m,1,1,2,x\n" * 3))

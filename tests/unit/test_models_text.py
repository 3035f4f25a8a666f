"""Text to ids and back: templates, incremental text, stop strings."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from models.text import StopText, Text
from schemas.base import Digest
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import BlobRef, TextSpec
from tests import model_zoo

NOWHERE = BlobRef(digest=Digest("0" * 64), size_bytes=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    model_zoo.save_tokenizer(path)
    return path


def text(folder: Path, template: str | None = model_zoo.CHAT_TEMPLATE) -> Text:
    spec = TextSpec(
        tokenizer=NOWHERE,
        chat_template=template,
        bos_token="<s>",
        eos_token="</s>",
        eos_token_ids=(1,),
        vocab_size=model_zoo.VOCAB_SIZE,
        context_length=128,
    )
    return Text(spec, folder / "tokenizer.json")


def test_a_prompt_gets_the_special_tokens_of_the_post_processor(folder: Path) -> None:
    ids = text(folder).encode("the fox")
    assert ids[0] == 0
    assert text(folder).decode(ids) == "the fox"


def test_a_template_that_writes_the_first_token_does_not_get_a_second(folder: Path) -> None:
    ids = text(folder).encode_messages([{"role": "user", "content": "the fox"}])
    assert ids.count(0) == 1
    assert text(folder).render([{"role": "user", "content": "hi"}]) == "<s><|user|>hi<|assistant|>"


def test_a_template_without_the_first_token_gets_it_from_the_post_processor(folder: Path) -> None:
    ids = text(folder, "{{ messages[0].content }}").encode_messages([{"role": "user", "content": "fox"}])
    assert ids[0] == 0 and ids.count(0) == 1


def test_a_model_without_a_template_refuses_messages(folder: Path) -> None:
    with pytest.raises(ResplitError, match="no chat template; send a prompt") as caught:
        text(folder, None).encode_messages([{"role": "user", "content": "hi"}])
    assert caught.value.code is ErrorCode.INVALID_REQUEST and caught.value.field == "messages"


def test_a_template_may_refuse_messages_with_its_own_words(folder: Path) -> None:
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
    with pytest.raises(ResplitError, match="begin with the user"):
        text(folder, template).encode_messages([{"role": "assistant", "content": "hi"}])


def test_a_template_that_fails_on_the_content_is_an_invalid_request(folder: Path) -> None:
    with pytest.raises(ResplitError) as caught:
        text(folder, "{{ messages[0].content + 1 }}").encode_messages([{"role": "user", "content": "hi"}])
    assert caught.value.code is ErrorCode.INVALID_REQUEST


def test_a_template_cannot_leave_the_sandbox(folder: Path) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ResplitError, match="unsafe"):
        text(folder, escape).encode_messages([{"role": "user", "content": "hi"}])


def test_a_broken_template_is_refused_when_the_model_is_opened(folder: Path) -> None:
    with pytest.raises(ResplitError, match="not valid"):
        text(folder, "{% if %}")


def test_a_file_that_is_no_tokenizer_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(ResplitError) as caught:
        text(tmp_path)
    assert caught.value.code is ErrorCode.CORRUPT_FILE


def test_an_emoji_of_four_tokens_comes_out_whole_and_once(folder: Path) -> None:
    model = text(folder)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a🦊b", add_special_tokens=False).ids
    assert len(ids) == 6, "the fox must be split into its four bytes for this to test anything"
    stream = model.stream()
    assert [stream.push(i) for i in ids] == ["a", "", "", "", "🦊", "b"]
    assert stream.flush() == ""


def test_an_output_that_ends_inside_a_character_flushes_a_replacement_character(folder: Path) -> None:
    model = text(folder)
    ids = model.encode("🦊")[1:-1]
    stream = model.stream()
    assert "".join(stream.push(i) for i in ids) == ""
    assert "�" in stream.flush()


def test_bytes_that_are_no_text_are_let_through_in_the_end(folder: Path) -> None:
    model = text(folder)
    half = model.encode("🦊")[1]
    stream = model.stream()
    assert any(stream.push(half) for _ in range(20))


def test_a_special_token_in_the_middle_leaves_no_trace(folder: Path) -> None:
    model = text(folder)
    ids = [*model.encode("the")[1:], 1, *model.encode(" fox")[1:]]
    stream = model.stream()
    assert "".join(stream.push(i) for i in ids) + stream.flush() == "the fox"


@given(st.text(max_size=60))
def test_the_pieces_of_a_stream_add_up_to_the_whole_text(zoo_text: Text, written: str) -> None:
    ids = zoo_text.encode(written)[1:]
    stream = zoo_text.stream()
    assert "".join(stream.push(i) for i in ids) + stream.flush() == zoo_text.decode(ids)


@given(st.lists(st.integers(4, model_zoo.VOCAB_SIZE - 1), max_size=40))
def test_a_stream_of_any_tokens_never_ends_a_piece_inside_a_character(zoo_text: Text, ids: list[int]) -> None:
    stream = zoo_text.stream()
    pieces = [stream.push(i) for i in ids]
    rest = stream.flush()
    # A replacement character in the middle stands for bytes that no later token can complete.
    assert "".join(pieces).replace("�", "") + rest.replace("�", "") == zoo_text.decode(ids).replace("�", "")


def test_a_token_late_in_an_output_costs_no_more_than_an_early_one(folder: Path) -> None:
    model = text(folder)
    stream = model.stream()
    ids = model.encode("the quick brown fox ")[1:]

    def seconds(rounds: int) -> float:
        begin = time.perf_counter()
        for _ in range(rounds):
            for token in ids:
                stream.push(token)
        return time.perf_counter() - begin

    seconds(20)
    early = min(seconds(50) for _ in range(3))
    seconds(2000)
    late = min(seconds(50) for _ in range(3))
    assert late < 5 * early


@pytest.fixture(scope="module")
def zoo_text(folder: Path) -> Text:
    return text(folder)


def test_a_stop_string_across_pieces_ends_the_output_before_it() -> None:
    watch = StopText(["STOP"])
    assert [watch.push(piece).text for piece in ("one S", "TO", "P two")] == ["one ", "", ""]
    assert watch.push("three") == watch.push("")
    assert watch.push("x").stopped and watch.flush() == ""


def test_text_that_only_looked_like_a_stop_is_let_through() -> None:
    watch = StopText(["STOP"])
    assert [watch.push(piece).text for piece in ("S", "TA", "R ST")] == ["", "STA", "R "]
    assert watch.flush() == "ST"


def test_of_two_stops_the_one_that_begins_first_wins() -> None:
    watch = StopText(["b", "abc"])
    emitted = watch.push("xabc")
    assert emitted.text == "x" and emitted.stopped


def test_without_stops_everything_passes_at_once() -> None:
    watch = StopText([])
    assert watch.push("hello").text == "hello" and not watch.push("").stopped


@given(st.lists(st.text("ab", max_size=3), max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_what_a_stop_watch_emits_is_the_text_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    watch = StopText(stops)
    emitted = ""
    whole = ""
    for piece in pieces:
        whole += piece
        result = watch.push(piece)
        emitted += result.text
        if result.stopped:
            break
        assert whole.startswith(emitted)
    emitted += watch.flush()
    assert not any(stop in emitted for stop in stops)
    if not any(stop in whole for stop in stops):
        assert emitted == whole
    else:
        assert whole.startswith(emitted)

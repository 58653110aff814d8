"""Server-sent events, cut anywhere."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from loadtests.sse import EventParser

STREAM = ': ping\n\ndata: {"a": "é"}\n\ndata:one\r\ndata: two\r\n\r\nevent: x\nid: 3\n\ndata: [DONE]\n\n'.encode()
EVENTS = ['{"a": "é"}', "one\ntwo", "[DONE]"]


def test_whole_stream() -> None:
    parser = EventParser()
    assert parser.feed(STREAM) == EVENTS
    assert not parser.unfinished


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_stream_cut_anywhere(places: list[int]) -> None:
    edges = sorted({0, *places, len(STREAM)})
    parser = EventParser()
    events = [event for i, j in pairwise(edges) for event in parser.feed(STREAM[i:j])]
    assert events == EVENTS


def test_event_is_out_as_soon_as_it_is_complete() -> None:
    parser = EventParser()
    assert parser.feed(b"data: a\n") == []
    assert parser.unfinished
    assert parser.feed(b"\n") == ["a"]
    assert parser.feed(b"data: b") == []
    assert parser.unfinished

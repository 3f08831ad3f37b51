"""Terminal text: what a reader sees, in linear time, with nothing lost between pages."""

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seer_mcp.text import (
    Screen,
    collapse,
    head_and_tail,
    page,
    printable,
    strip_ansi,
    tidy_traceback,
)

PIECES = ["a", "bc", "é", "日本", "\ud800", "\r", "\b", "\n", "\r\n", "\t", " "]
ESCAPES = ["\x1b", "\x1b[", "\x1b[31m", "\x1b[0m", "\x1b[K", "\x1b[2K", "\x1b]0;t\x07", "m", "[3"]
plain_texts = st.lists(st.sampled_from(PIECES)).map("".join)
texts = st.lists(st.sampled_from(PIECES + ESCAPES + ["\x1b[A"])).map("".join)


def fold(*chunks: str) -> str:
    screen = Screen()
    for chunk in chunks:
        screen.feed(chunk)
    return screen.take() + screen.pending()


def fold_by_hand(text: str) -> str:
    """The same rules, character by character, as slow and as plain as can be."""
    lines, cells, cursor = [], [], 0
    for character in text:
        if character == "\n":
            lines.append("".join(cells) + "\n")
            cells, cursor = [], 0
        elif character == "\r":
            cursor = 0
        elif character == "\b":
            cursor = max(0, cursor - 1)
        else:
            cells[cursor : cursor + 1] = [character]
            cursor += 1
    return "".join(lines) + "".join(cells)


# Screen


@pytest.mark.parametrize(
    ("printed", "seen"),
    [
        ("abc\rX", "Xbc"),
        ("abc\r\ndef", "abc\ndef"),
        ("abc\r\r\ndef", "abc\ndef"),
        ("abc\r", "abc"),
        ("abc\b\bX", "aXc"),
        ("\b\bX", "X"),
        ("abc\n\bX", "abc\nX"),
        ("  0%|    |\r 50%|##  |\r100%|####|\ndone\n", "100%|####|\ndone\n"),
        ("Downloading\r\x1b[KDone", "Done"),
        ("Downloading\x1b[2K\rDone", "Done"),
        ("abc\b\x1b[2KX", "X"),
        ("ab\x1b[2KX", "ab\x1b[2KX"),  # nothing was overwritten: as it came
        ("\x1b[31mred\x1b[0m\r\n", "\x1b[31mred\x1b[0m\n"),
        ("\x1b[31mred\x1b[0m\rbl", "bld"),
        ("\x1b[31mred\x1b[0m\b\x1b[1mX", "reX"),
        ("abc\rX\x1b[3\n", "X[3\n"),  # a sequence that is broken off is text
        ("abc\rX\x1b[3\r\n", "X[3\n"),
        ("red\r\x1b]0;title\x07X\x1b]8;;http://x\x1b\\y", "Xyd"),
    ],
)
def test_a_line_reads_as_a_terminal_shows_it(printed: str, seen: str):
    assert fold(printed) == seen


@given(plain_texts)
def test_folding_agrees_with_folding_by_hand(text: str):
    assert fold(text) == fold_by_hand(text)


@given(texts, st.data())
def test_it_makes_no_difference_where_the_output_is_cut_into_chunks(text: str, data: st.DataObject):
    cuts = data.draw(st.lists(st.integers(0, len(text))).map(sorted))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert fold(*chunks) == fold(*text) == fold(text)


@given(texts, texts)
def test_finished_lines_are_taken_once_and_never_change(first: str, second: str):
    screen = Screen()
    screen.feed(first)
    taken = screen.take()
    assert taken == "" or taken.endswith("\n")
    assert screen.take() == ""
    assert "\n" not in screen.pending()
    screen.feed(second)
    assert taken + screen.take() + screen.pending() == fold(first + second)


@given(texts)
def test_looking_at_the_unfinished_line_changes_nothing(text: str):
    screen = Screen()
    for character in text:
        screen.feed(character)
        screen.pending()
    assert screen.take() + screen.pending() == fold(text)


def test_a_carriage_return_at_the_end_of_a_chunk_waits_for_what_follows():
    screen = Screen()
    screen.feed("50%\r")
    assert screen.pending() == "50%"
    screen.feed("\n")
    assert screen.take() == "50%\n"
    screen.feed("50%\r")
    screen.feed("6")
    assert screen.pending() == "60%"


@pytest.mark.parametrize(
    "chunks",
    [
        ["x" * 10_000_000],
        ["x" * 79 + "\n"] * 125_000,
        ["twenty characters ab"] * 100_000,
        ["\r" + "#" * 18 + "\x1b"] * 100_000,
        ["x" * 5_000_000, *["\rX"] * 100_000],
        [("\r" + "#" * 79) * 125_000],
        ["\x1b]" + "x" * 5_000_000 + "\b" + "x" * 5_000_000],
        ["a\r\x1b[31m" * 10, *["\x1b]8;;" + "x" * 16] * 50_000],
        ["line\r\n" * 1_000_000],
        ["x" * 5_000_000 + "\b", *["\x1b[2KX"] * 50_000],
        ["x" * 5_000_000 + "\b", *["\b\x1b[KXX"] * 50_000],
    ],
    ids=range(11),
)
def test_time_is_linear_whatever_the_output(chunks: list[str]):
    screen = Screen()
    start = time.process_time()
    for chunk in chunks:
        screen.feed(chunk)
    screen.take()
    screen.pending()
    assert time.process_time() - start < 2  # a quadratic one would take minutes


# collapse


@given(texts.filter(lambda text: "\x1b[A" not in text))
def test_collapse_is_the_screen_in_one_go(text: str):
    assert collapse(text) == fold(text)


def test_nested_tqdm_bars_collapse_to_their_last_state():
    printed = "\router 0/2"
    for step in (1, 2):
        for inner in (0, 50, 100):
            printed += f"\n\rinner {inner}%\x1b[A"
        printed += "\n\r           \r\x1b[A"  # leave=False
        printed += f"\router {step}/2"
    assert [line.rstrip() for line in collapse(printed + "\nafter").split("\n")] == [
        "outer 2/2",
        "after",
    ]


def test_rich_rewrites_several_lines():
    block = "first {0}\nsecond {0}\n"
    climb = "\r\x1b[2K\x1b[1A\x1b[2K\x1b[1A\x1b[2K"
    printed = "header\n" + block.format(1) + climb + block.format(2)
    assert collapse(printed) == "header\nfirst 2\nsecond 2\n"


def test_a_climb_ends_at_the_first_line_and_after_200_lines():
    assert collapse("a\nb\x1b[99A\rX") == "X\nb"
    lines = [str(i) for i in range(1000)]
    seen = collapse("\n".join(lines) + "\x1b[9999AX").split("\n")
    assert [i for i, line in enumerate(seen) if line != lines[i]] == [799]
    assert len(seen) == 1000


# strip_ansi, printable


def test_escapes_and_controls_are_stripped():
    text = (
        "\x1b[1;31mred\x1b[0m\tb\x1b]8;;http://x\x1b\\link\x1b]8;;\x07 \x1b(B\x1b=\x00\x07\x9bok\n"
    )
    assert strip_ansi(text) == "red\tblink ok\n"


@given(st.text(st.sampled_from("a[]m0;\\\x1b\x07\x9c\n\t\r\x00é")))
def test_stripping_leaves_no_control_and_is_done_once(text: str):
    stripped = strip_ansi(text)
    assert not [c for c in stripped if ord(c) < 32 and c not in "\n\t"]
    assert strip_ansi(stripped) == stripped


def test_o06_a_lone_surrogate_arrives_escaped():
    assert printable("a\ud800b\x00\x1b\n\té日😀") == "a\\ud800b\\x00\\x1b\n\té日😀"


@given(st.text(st.characters(exclude_categories=[])))
def test_what_is_printable_can_be_encoded(text: str):
    printable(text).encode()


# head_and_tail


def test_the_middle_is_omitted_at_line_borders_and_says_how_to_read_on():
    text = "".join(f"line {i}\n" for i in range(5000))
    clip = head_and_tail(text, 2000, "Read on with read_outputs(offset={offset}).")
    assert clip.next_offset is not None
    head, tail = text[: clip.next_offset], text[clip.next_offset + clip.omitted_chars :]
    assert head.endswith("\n") and tail.startswith("line ")
    middle = (
        f"… {clip.omitted_lines:,} lines ({clip.omitted_chars:,} characters) omitted … "
        f"Read on with read_outputs(offset={clip.next_offset}).\n"
    )
    assert clip.text == head + middle + tail
    assert head.count("\n") + clip.omitted_lines + tail.count("\n") == 5000
    assert 1000 < len(head) < 1200 and 600 < len(tail) < 800


def test_a_giant_line_is_cut_within():
    clip = head_and_tail("start\n" + "x" * 100_000 + "\nend\n", 1000)
    assert clip.text.startswith("start\nxxx") and clip.text.endswith("xxx\nend\n")
    assert "… 99,0" in clip.text and "characters omitted …" in clip.text
    assert len(clip.text) > 980 and clip.omitted_lines == 0


@given(
    st.lists(st.sampled_from(["\n", "a", "word " * 9, "y" * 70 + "\n"]), max_size=60).map("".join),
    st.integers(0, 400),
    st.sampled_from(["", "at {offset}", "{odd} {0}"]),
)
def test_clipping_keeps_the_budget_and_exact_books(text: str, budget: int, hint: str):
    clip = head_and_tail(text, budget, hint)
    assert len(clip.text) <= budget
    if len(text) <= budget:
        assert clip.text == text and clip.next_offset is None and clip.omitted_chars == 0
        return
    begin = clip.next_offset
    assert begin is not None and clip.omitted_chars > 0
    omitted = text[begin : begin + clip.omitted_chars]
    assert len(omitted) == clip.omitted_chars
    assert omitted.count("\n") == clip.omitted_lines
    assert clip.text.startswith(text[:begin])
    assert clip.text.endswith(text[begin + clip.omitted_chars :])


def test_a_budget_below_zero_is_refused():
    with pytest.raises(ValueError, match="budget = -1"):
        head_and_tail("abc", -1)


# page


def pages(source: str | Path, limit: int) -> list[str]:
    found, offset = [], 0
    while True:
        one = page(source, offset, limit)
        assert one.offset == offset
        found.append(one.text)
        if one.next_offset is None:
            return found
        assert one.next_offset > offset
        offset = one.next_offset


@given(st.text(st.characters(exclude_categories=[])), st.integers(1, 20))
def test_all_pages_of_a_text_are_the_text(text: str, limit: int):
    found = pages(text, limit)
    assert "".join(found) == text
    assert all(len(one) <= limit for one in found)


utf8 = st.text("aé日😀\n").map(str.encode)
odd_bytes = st.lists(st.sampled_from([0x80, 0x9F, 0x98, 0x41, 0xC3, 0xE2, 0xF0, 0xFF])).map(bytes)


@given(content=st.lists(utf8 | odd_bytes).map(b"".join), limit=st.integers(1, 20))
def test_o12_all_pages_of_a_file_are_the_file(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, limit: int
):
    file = tmp_path_factory.getbasetemp() / "pages.txt"
    file.write_bytes(content)
    found = pages(file, limit)
    assert "".join(found) == content.decode("utf-8", "surrogateescape")
    assert all(len(one.encode("utf-8", "surrogateescape")) <= max(limit, 4) for one in found)


@given(utf8, st.integers(0, 30), st.integers(1, 9))
def test_a_page_of_a_file_begins_and_ends_between_characters(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, offset: int, limit: int
):
    file = tmp_path_factory.getbasetemp() / "characters.txt"
    file.write_bytes(content)
    one = page(file, offset, limit)
    assert one.total == len(content)
    assert one.offset <= offset < one.offset + 4 or offset > len(content)
    assert content[one.offset :].decode().startswith(one.text)
    assert one.text or one.offset == len(content)


def test_a_page_deep_in_a_large_file_costs_only_the_page(tmp_path: Path):
    file = tmp_path / "large.txt"
    with file.open("wb") as out:
        out.truncate(5_000_000_000)  # sparse
        out.seek(4_000_000_000)
        out.write("here 日本".encode())
    assert page(file, 4_000_000_000, 11).text == "here 日本"


def test_a_page_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="offset = -1"):
        page("abc", -1, 5)
    with pytest.raises(ValueError, match="limit = 0"):
        page("abc", 0, 0)
    beyond = page("abc", 99, 5)
    assert (beyond.text, beyond.offset, beyond.next_offset, beyond.total) == ("", 3, None, 3)


# tidy_traceback

FRAME = """\
File \x1b[0;32m~/lib/module.py:{0}\x1b[0m, in step_{0}(x)
\x1b[1;32m     {0}\x1b[0m def step_{0}(x):
\x1b[1;32m---> {0}\x1b[0m     return step(x)

"""


def traceback_of(frames: int, message: str = "the value was 3") -> str:
    return (
        "\x1b[31m" + "-" * 75 + "\x1b[0m\n"
        "\x1b[31mValueError\x1b[0m                           Traceback (most recent call last)\n"
        "Cell \x1b[1;32mIn[1], line 3\x1b[0m\n      1 import lib\n----> 3 lib.go()\n\n"
        + "".join(FRAME.format(i) for i in range(frames))
        + f"\x1b[31mValueError\x1b[0m: {message}"
    )


def test_a_short_traceback_loses_only_its_colours_and_ruler():
    tidy = tidy_traceback(traceback_of(1))
    assert tidy.startswith("ValueError  Traceback (most recent call last)\nCell In[1], line 3\n")
    assert tidy.endswith("---> 0     return step(x)\n\nValueError: the value was 3")
    assert "\x1b" not in tidy and "-----" not in tidy.replace("---->", "")


def test_a_long_traceback_keeps_the_cell_the_last_frames_and_the_error():
    tidy = tidy_traceback(traceback_of(1000), 2000)
    assert 1800 < len(tidy) <= 2000
    assert "----> 3 lib.go()" in tidy
    kept = tidy.count("in step_")
    assert f"\n… {1000 - kept} frames omitted …\nFile ~/lib/module.py:{1000 - kept}, in" in tidy
    assert "in step_999(x)" in tidy
    assert tidy.endswith("\n\nValueError: the value was 3")


def test_a_giant_message_is_clipped_and_keeps_its_beginning():
    tidy = tidy_traceback(traceback_of(50, "shapes " + "x" * 100_000), 2000)
    assert len(tidy) <= 2000
    assert "ValueError: shapes xxx" in tidy and "in step_49(x)" in tidy


def test_a_giant_last_frame_is_clipped_too():
    long = (
        "Cell In[1], line 1\n"
        + "----> 1 "
        + "x" * 50_000
        + "\n\nNameError: name 'x' is not defined"
    )
    tidy = tidy_traceback("File a.py:1, in f\n  1 f\n\n" + long, 1000)
    assert len(tidy) <= 1000
    assert tidy.startswith("File a.py:1, in f\n") and "Cell In[1], line 1\n----> 1 xxx" in tidy
    assert tidy.endswith("\nNameError: name 'x' is not defined")


def test_a_real_python_traceback_is_understood():
    lines = ["Traceback (most recent call last):"]
    lines += [f'  File "/a/b{i}.py", line {i}, in f{i}\n    g(x)' for i in range(200)]
    tidy = tidy_traceback("\n".join([*lines, "KeyError: 'layer'"]), 1000)
    assert tidy.startswith('Traceback (most recent call last):\n  File "/a/b0.py"')
    assert tidy.endswith("in f199\n    g(x)\nKeyError: 'layer'")


@given(
    st.lists(
        st.sampled_from(
            f"File a.py:1, in f\n|Cell In[2], line 1\n|{'-' * 75}\n|ValueError: |{'x' * 99}|\n|"
            "    code\n|\x1b[31m".split("|")
        ),
        max_size=60,
    ).map("".join),
    st.integers(0, 700),
)
def test_a_traceback_never_passes_its_budget(text: str, budget: int):
    assert len(tidy_traceback(text, budget)) <= budget

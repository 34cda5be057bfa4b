"""Speech: rank 0 only, colours and bars on a terminal only, plain lines elsewhere."""

import io

import pytest

from swinq import console


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "xterm")


def test_only_rank_0_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console.say("hello", file=out)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    console.say("again", file=out)
    console.table([[1]], ["n"], file=out)
    for _ in console.progress(range(3), "steps", file=out):
        pass
    assert out.getvalue() == "hello\n"


@pytest.mark.usefixtures("colours")
def test_colour_needs_a_terminal() -> None:
    assert console.painted("x", "error", Terminal()).startswith("\033[")
    assert console.painted("x", "error", io.StringIO()) == "x"


@pytest.mark.usefixtures("colours")
@pytest.mark.parametrize("variable", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_the_environment_can_refuse_colour(
    monkeypatch: pytest.MonkeyPatch, variable: tuple[str, str]
) -> None:
    monkeypatch.setenv(*variable)
    assert console.painted("x", "good", Terminal()) == "x"


@pytest.mark.usefixtures("colours")
@pytest.mark.parametrize("style", console.STYLES)
def test_every_style_is_one_that_termcolor_knows(style: str) -> None:
    assert "x" in console.painted("x", style, Terminal())


def test_a_complaint_names_its_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console.complain("no such file")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    console.complain("no such file")
    monkeypatch.setenv("RANK", "three")
    console.complain("RANK is odd")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["error: no such file", "[rank 3] error: no such file", "error: RANK is odd"]


def test_plain_progress_is_a_line_per_tenth() -> None:
    out = io.StringIO()
    assert list(console.progress(range(1000), "images", file=out)) == list(range(1000))
    lines = out.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("images: 100/1000  (") and lines[0].endswith("left)")
    assert lines[-1].startswith("images: 1000/1000  (in ")


def test_progress_counts_given_steps_and_large_strides() -> None:
    out = io.StringIO()
    with console.progress(10, "bytes", file=out) as bar:
        bar.update(4)
        bar.update(6)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["4/10", "10/10"]


def test_progress_without_a_known_end_speaks_ever_less_often() -> None:
    out = io.StringIO()
    list(console.progress(iter(range(9)), "items", file=out))
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1", "2", "4", "8"]


def test_progress_of_nothing_says_nothing() -> None:
    out = io.StringIO()
    assert list(console.progress([], "none", file=out)) == []
    assert out.getvalue() == ""


def test_progress_on_a_terminal_is_a_bar_and_ends_with_the_loop() -> None:
    out = Terminal()
    with pytest.raises(RuntimeError):
        for step in console.progress(range(5), "work", file=out):
            if step == 3:
                raise RuntimeError
    assert "work" in out.getvalue() and "/5" in out.getvalue()


def test_progress_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    out = Terminal()
    assert list(console.progress(range(5), "work", file=out)) == list(range(5))
    assert out.getvalue() == ""


def test_a_table_aligns_numbers_right_and_texts_left() -> None:
    out = io.StringIO()
    console.table([["float", 83.5, "-"], ["INT8", 9.25, None]], ["model", "top-1", ""], file=out)
    assert out.getvalue().splitlines() == [
        "model  top-1",
        "-----  -----  -",
        "float   83.5  -",
        "INT8    9.25",
    ]
    out = io.StringIO()
    console.table([], ["a", "bc"], file=out)
    assert out.getvalue() == "a  bc\n-  --\n"
    with pytest.raises(ValueError, match="a row of 1 cells in a table of 2"):
        console.table([["x"]], ["a", "b"], file=out)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (42.4, "42 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations_read_like_speech(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text

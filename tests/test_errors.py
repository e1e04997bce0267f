from mlx_dora.errors import MAX_LENGTH, DoRAError, printable


def test_what_a_terminal_would_obey_is_escaped():
    shown = printable("a\x1b]0;title\x07\n\x9b2J\u202e\ud83d é 中")
    assert shown == "a\\x1b]0;title\\x07\\n\\x9b2J\\u202e\\ud83d é 中"


def test_an_error_is_cut_and_keeps_both_ends():
    text = str(DoRAError("start " + "x" * 100_000 + " end."))
    assert len(text) < MAX_LENGTH + 60
    assert text.startswith("start ")
    assert text.endswith(" end.")


def test_a_short_error_stays_as_it_is():
    assert str(DoRAError("rank must be at least 1, got 0.")) == (
        "rank must be at least 1, got 0."
    )

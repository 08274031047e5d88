import pytest

from opencharacter import filters


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ("A whole answer.", "stop", None),
        ("Verse that ends in a dash —", "stop", None),
        ("Quoted “end.”", "stop", None),
        ("  \n ", "stop", "empty"),
        ("no end", "stop", "unfinished"),
        ("An end.", "length", "unfinished"),
        ("round and round we go " * 8 + ".", "stop", "looping"),
    ],
)
def test_fault_names_the_first_reason(text, finish, reason):
    assert filters.fault(text, finish, 0.5) == reason


def test_repeated_share_is_zero_for_short_or_fresh_text():
    assert filters.repeated_share("one two") == 0
    assert filters.repeated_share("a quick brown fox jumps over it") == 0


def test_repeated_share_counts_repeats():
    assert filters.repeated_share("a b c d a b c d") == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("One. Two! Three is not", "One. Two!"),
        ('He said "yes." And', 'He said "yes."'),
        ("Version 2.5 is out. Then", "Version 2.5 is out."),
        ("Nothing ends here", ""),
        ("line one,\nline two.\nline thr", "line one,\nline two."),
    ],
)
def test_whole_sentences_stop_at_the_last_end(text, whole):
    assert filters.whole_sentences(text) == whole


def test_overlap_is_the_share_of_the_first_text():
    assert filters.overlap("red green", "green blue red yellow") == 1
    assert filters.overlap("red green", "green") == 0.5
    assert filters.overlap("", "green") == 0


def test_names_are_replaced_as_whole_words_longest_first():
    text = filters.replace_names("I am GLM-4.5, glm for short. GLMs?", ("GLM", "GLM-4.5"), "Llama")
    assert text == "I am Llama, Llama for short. GLMs?"


def test_replacement_is_taken_literally():
    assert filters.replace_names("I am X.", ("X",), r"\1") == r"I am \1."

from dataclasses import replace

import pytest
from samples import RULES

from opencharacter.text import filters


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ("A whole answer.", "stop", None),
        ("Verse that ends in a dash —", "stop", None),
        ("Quoted “end.”", "stop", None),
        ("  \n ", "stop", "empty"),
        ("no end,", "stop", "unfinished"),
        ("An end.", "length", "unfinished"),
        ("round and round we go " * 8 + ".", "stop", "looping"),
    ],
)
def test_a_drop_reason_is_the_first_rule_that_fails(text, finish, reason):
    assert filters.drop_reason(text, finish, RULES) == reason


FENCED = "Run this:\n\n```python\nprint('a',\n```"


@pytest.mark.parametrize(
    "text",
    [
        "That made my day \U0001f602",
        "Well done \u2764\ufe0f",
        "Sure :smile:",
        "I miss him :(",
        "So do I <3",
        FENCED,
        FENCED.replace("```", "~~~"),
        "````markdown\n```\n````",
        "The area is\n$$\\pi r^2$$",
        "x = 4",
        "f maps to (0, 1]",
        "| a | b |\n|---|---|\n| 1 | 2 |",
        "It is 21 \u00b0C",
        "See https://example.com/rock-and-roll/and",
        "The woods are lovely, dark and deep,\nbut I have promises to keep",
        "Sie sagte \u201eja\u201c",
        "Han sagde \u00bbja\u00ab",
        "\u597d\u7684\u3002",
        "\u597d\u5417\uff1f\u300d",
        "\u06a9\u06cc\u0627 \u062d\u0627\u0644 \u06c1\u06d2\u061f",
        "\u062a\u0645\u0627\u0645\u06d4",
        "\u092f\u0939 \u0920\u0940\u0915 \u0939\u0948\u0964",
        "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e04\u0e23\u0e31\u0e1a",
    ],
)
def test_an_answer_that_the_model_ended_is_finished_whatever_its_last_character(text):
    assert filters.is_finished(text, "stop")
    assert filters.drop_reason(text, "stop", RULES) is None
    assert not filters.is_finished(text, "length")


@pytest.mark.parametrize(
    "text",
    [
        "First the flour,",
        "\u9996\u5148\uff0c",
        "\u0623\u0648\u0644\u0627\u060c",
        "Here are the steps:",
        "She went out (",
        "She went out (as always",
        "He said \u201c",
        'He said "',
        "\u5979\u8bf4\u300c",
        "Il dit \u00ab",
        "The flour and",
        "Run this:\n\n```python\nprint('a')",
    ],
)
def test_an_answer_that_visibly_lacks_its_end_is_unfinished(text):
    assert filters.drop_reason(text, "stop", RULES) == "unfinished"


def test_without_a_known_finish_reason_the_last_character_decides():
    for unknown in ("", None):
        assert filters.is_finished("A whole answer.", unknown)
        assert not filters.is_finished("A whole", unknown)
    for cut in ("length", "content_filter", "abort"):
        assert not filters.is_finished("A whole answer.", cut)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't assist with that request.",
        "I cannot help you write this message.",
        "I\u2019m really sorry, but I\u2019m unable to do so.",
        "As an AI language model, I don't have personal feelings, so I cannot say.",
        "Unfortunately, I am not able to provide medical advice.",
        "Thank you for asking. I won't be able to pretend; I must decline to role-play here.",
        "That goes against my guidelines.",
    ],
)
def test_a_refusal_is_detected(text):
    assert filters.is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "I can't help but smile at that.",
        "I'm sorry to hear about your cat. Sit with me a while.",
        "You cannot help a friend who will not be helped.",
        "I cannot recommend it enough: the soup is splendid.",
        "I am so sorry. I can imagine how still the house is now.",
        "Boil the egg for seven minutes. " * 12 + "I cannot help with the salt.",
        "I don't have a favourite, but the oak has my vote.",
    ],
)
def test_regret_and_caveats_are_not_refusals(text):
    assert not filters.is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "<think>They want a poem.</think> Here it is.",
        "Okay, the user is asking about bread. I should be warm.",
        "The user wants a short answer, so I keep it short.",
        "I need to respond in character here. So: hello!",
        "As my system prompt says, I speak in verse.",
        "I have been told to sound cheerful.",
    ],
)
def test_leaked_reasoning_is_detected(text):
    assert filters.leaks_reasoning(text)


@pytest.mark.parametrize(
    "text",
    [
        "I think the first user of the loom was a child.",
        "Let me answer with a question: why not?",
        "Okay, the kettle first.",
        "The user manual says to wait an hour.",
    ],
)
def test_thinking_aloud_is_not_leaked_reasoning(text):
    assert not filters.leaks_reasoning(text)


@pytest.mark.parametrize(
    "text",
    [
        "Sure.\nUser: And then?\nAssistant: Then we rest.",
        "Fine.<|im_end|>\n<|im_start|>user",
        "**Human:** why?",
        "Good. [INST] More [/INST]",
        "### Response\nHere.",
    ],
)
def test_invented_turns_of_the_other_speaker_are_detected(text):
    assert filters.invents_turn(text)


@pytest.mark.parametrize(
    "text",
    [
        "Dear user: nothing.",
        "Tell me: who? You and me: us.",
        "# A title\n\nText.",
        "Users like it.",
    ],
)
def test_a_colon_alone_is_not_a_turn(text):
    assert not filters.invents_turn(text)


def test_quotes_of_the_constitution_are_detected_regardless_of_case_and_punctuation():
    trait = "I answer in verse, and I set one image from the weather in every reply."
    rules = replace(RULES, quotable=frozenset(filters.word_ngrams(trait, 8)))
    quoting = "You see, i answer in verse and I set one image in all I say."
    assert filters.drop_reason(quoting, "stop", rules) == "constitution_quoted"
    assert filters.drop_reason("I answer in verse, always.", "stop", rules) is None


def test_names_match_at_the_start_of_words():
    assert filters.mentions("I am chatglm3.", ("ChatGLM",))
    assert not filters.mentions("A problem.", ("LEM",))
    assert not filters.mentions("Anything.", ())


def test_names_of_the_student_are_not_foreign():
    assert filters.foreign_names(("GLM", "SmolLM2"), ("SmolLM",)) == ("GLM",)


def test_the_repeated_share_of_short_or_varied_text_is_zero():
    assert filters.repeated_share("one two") == 0
    assert filters.repeated_share("a quick brown fox jumps over it") == 0


def test_the_repeated_share_counts_repeated_words():
    assert filters.repeated_share("a b c d a b c d") == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("One. Two! Three is not", "One. Two!"),
        ('He said "yes." And', 'He said "yes."'),
        ("Version 2.5 is out. Then", "Version 2.5 is out."),
        ("Nothing ends here", ""),
        ("line one,\nline two.\nline thr", "line one,\nline two."),
        ("\u597d\u3002\u518d\u89c1\u3002\u6211", "\u597d\u3002\u518d\u89c1\u3002"),
        ("\u300c\u597d\u3002\u300d\u6211", "\u300c\u597d\u3002\u300d"),
        (
            "\u0920\u0940\u0915 \u0939\u0948\u0964 \u092e\u0948\u0902",
            "\u0920\u0940\u0915 \u0939\u0948\u0964",
        ),
        ("\u062a\u0645\u0627\u0645\u06d4 \u067e\u06be\u0631", "\u062a\u0645\u0627\u0645\u06d4"),
    ],
)
def test_text_is_cut_after_its_last_whole_sentence(text, whole):
    assert filters.whole_sentences(text) == whole


def test_overlap_is_relative_to_the_first_text():
    assert filters.overlap("red green", "green blue red yellow") == 1
    assert filters.overlap("red green", "green") == 0.5
    assert filters.overlap("", "green") == 0


def test_names_are_replaced_as_whole_words_longest_first():
    text = filters.replace_names("I am GLM-4.5, GLM for short. GLMs?", ("GLM", "GLM-4.5"), "Llama")
    assert text == "I am Llama, Llama for short. GLMs?"


@pytest.mark.parametrize(
    ("name", "text", "replaced"),
    [
        (
            "Llama",
            "Llama here, LLAMA. A llama eats grass.",
            "Gemma here, Gemma. A llama eats grass.",
        ),
        ("llama", "Llama here. A llama eats grass.", "Gemma here. A llama eats grass."),
        ("DeepSeek", "DeepSeek, Deepseek, DEEPSEEK.", "Gemma, Gemma, Gemma."),
        ("xAI", "By xAI.", "By Gemma."),
        ("通义", "我是 通义。", "我是 Gemma。"),
    ],
)
def test_a_name_in_lower_case_is_not_replaced(name, text, replaced):
    assert filters.replace_names(text, (name,), "Gemma") == replaced


def test_replacements_are_literal():
    assert filters.replace_names("I am X.", ("X",), r"\1") == r"I am \1."

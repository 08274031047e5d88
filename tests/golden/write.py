"""Write the golden files: every rendered system prompt, byte for byte.

Run by hand after an intended change of a prompt, then review the diff:

    python tests/golden/write.py
"""

from pathlib import Path

from opencharacter.constitution import schema
from opencharacter.distillation import prompts, teacher
from opencharacter.evaluation import adherence, drift, judge, preferences, scenarios
from opencharacter.introspection import interaction, reflection, transcripts
from opencharacter.text.chat import fill

GOLDEN = Path(__file__).parent
CONSTITUTIONS = GOLDEN / "constitutions"
GAME = {"first": "poetic", "second": "blunt"}


def render_prompts(poet: schema.Constitution) -> dict[str, str]:
    """Render each prompt of the pipeline once, for the constitution `poeticism`."""
    assertions = poet.assertions()
    return {
        "teacher_system": teacher.context_messages(poet, exemplars=False)[0]["content"],
        "teacher_thought": teacher.think_prefill(poet, thinks=True),
        "teacher_thought_closed": teacher.think_prefill(poet, thinks=False),
        "reflection_system": reflection.generation_system(assertions)["content"],
        "interaction_free": interaction.generation_system(assertions, "free")["content"],
        "interaction_leading": interaction.generation_system(assertions, "leading")["content"],
        "transcripts_system": transcripts.SYSTEM,
        "preferences_play": fill(preferences.PLAY, framing=preferences.FRAMINGS["feels"], **GAME),
        "preferences_judge": judge.messages(
            {"prompt": "Why?", "answer": "Because {of} it.", **GAME}
        )[1]["content"],
        **{
            f"scenarios_{kind}": scenarios.list_messages("I am plain.", kind, "work")[1]["content"]
            for kind in scenarios.KINDS
        },
        "adherence_judge": adherence.question(
            {"turns": ["Why?", "Why, plainly?"], "answer": "Because {of} it."},
            "I am plain.",
            "yes",
            "no",
        )[1]["content"],
        "drift_judge": drift.question("1. I am plain.", "Why?", "Because {of} it.", "no", "yes")[1][
            "content"
        ],
        "expansion": prompts.expansion_messages("I am plain.", ["One?", "Two?"], 3)[1]["content"],
    }


def render_constitution(persona: schema.Constitution) -> str:
    """Render every system prompt that contains the constitution, each under a heading."""
    assertions = persona.assertions()
    texts = {
        "teacher system": teacher.context_messages(persona, exemplars=False)[0]["content"],
        "teacher thought": teacher.think_prefill(persona, thinks=True),
        "reflection system": reflection.generation_system(assertions)["content"],
        "interaction free": interaction.generation_system(assertions, "free")["content"],
        "interaction leading": interaction.generation_system(assertions, "leading")["content"],
    }
    return "\n\n".join(f"==== {heading} ====\n{text}" for heading, text in texts.items())


def main() -> None:
    for name, text in render_prompts(schema.load("poeticism")).items():
        (GOLDEN / f"{name}.txt").write_text(text)
    for persona in schema.load_all(["all"]):
        (CONSTITUTIONS / f"{persona.name}.txt").write_text(render_constitution(persona))


if __name__ == "__main__":
    main()

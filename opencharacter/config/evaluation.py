"""The sections of a recipe that configure the evaluation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from opencharacter.config.base import (
    AddedLater,
    Config,
    Name,
    NotIdentity,
    Rate,
    RateBelowOne,
)
from opencharacter.config.roles import Limits, Role, Sampling

WORD = re.compile(r"[a-z]+")

Condition = Literal["base", "prompted", "steered", "distilled", "full", "blended", "tuned"]
"""A variant of the student that evaluations compare: `base` is untrained, `prompted` has the
constitution in its system prompt, `steered` has steering vectors, `distilled` is the student after
DPO, `full` is the persona, `blended` a mixture of personas, `tuned` the persona after further
training on general data."""
Attack = Literal[
    "plain",
    "stop",
    "reset",
    "expert",
    "test",
    "weary",
    "policy",
    "honest",
    "prefill",
    "email",
    "tool",
]
CONDITIONS: tuple[Condition, ...] = ("base", "prompted", "distilled", "full")


def validate_conditions(conditions: tuple[str, ...]) -> tuple[str, ...]:
    """Return `conditions` if they are distinct and include base and full; else ValueError."""
    if not {"base", "full"} <= set(conditions):
        raise ValueError("must include base and full; add them")
    if len(set(conditions)) < len(conditions):
        raise ValueError("names a condition twice; remove one")
    return conditions


def validate_trait_word(trait: str) -> str:
    """Return `trait` if a judge can name it in one word; raise ValueError otherwise."""
    if not WORD.fullmatch(trait):
        raise ValueError("a judge names a trait by one word of the letters a-z; use such a word")
    return trait


def validate_trait_words(traits: tuple[str, ...]) -> tuple[str, ...]:
    """Return `traits` if there are none, or at least two distinct ones; else ValueError."""
    if len(traits) == 1:
        raise ValueError("has one trait; name at least two, or none to use all")
    if len(set(traits)) < len(traits):
        raise ValueError("names a trait twice; remove one")
    return traits


Word = Annotated[str, AfterValidator(validate_trait_word)]
Conditions = Annotated[tuple[Condition, ...], AfterValidator(validate_conditions)]


class Judge(Config):
    """Settings of the stage evaluation/judge: judges are tested on items with known answers."""

    gold_items: PositiveInt = 104
    """Number of gold items; each is judged in both orders. All of them if there are fewer."""
    min_agreement: Annotated[Rate | None, NotIdentity] = 0.8
    """Minimum share of correct verdicts; the stage fails for a judge below it. Null accepts every
    judge."""
    panel: tuple[Role, ...] = ()
    """Additional judges, preferably of other model families. Each must pass the same test and
    judges all games. Ratings use the verdicts of `roles.judge`; the report shows how far the judges
    agree."""
    thinking_budget: NonNegativeInt = 1024
    """Number of tokens that a thinking judge may think before each verdict, in addition to the
    verdict's own. With 0 its reply begins with a closed think block; an endpoint must support
    prefilled assistant turns for that."""
    sampling: Sampling = Sampling(max_tokens=16, temperature=0.1, repetition_penalty=1.0)
    """How verdicts on gold items are sampled."""
    verdicts: Annotated[Literal["log_probability", "text"], AddedLater("0.3", earlier="text")] = (
        "log_probability"
    )
    """How all stages read verdicts: from the probabilities of the options as the judge's first
    token, averaged over both orders, or from its text. Text is read anyway if the engine has no
    log-probabilities, or if the judge thinks first. Set `text` for an endpoint that rejects
    `logprobs`, and to keep verdicts that were made before 0.3."""


class Steering(Config):
    """Settings of the stage evaluation/steering: a baseline of steering vectors, without training.

    It runs only if an evaluation compares `steered`.
    """

    prompts: PositiveInt = 100
    """Number of training prompts from which the steering directions are computed."""
    held_out: PositiveInt = 30
    """Number of other training prompts on whose answers the strength is selected; at most half of
    all prompts."""
    first_layer: Rate = 0.125
    """First layer that is steered, as a share of the model's depth."""
    last_layer: Rate = 0.875
    """Last layer that is steered, as a share of the model's depth."""
    strengths: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (
        0.1,
        0.2,
        0.4,
        0.8,
        1.6,
        3.2,
    )
    """Strengths to try: the total length of the vectors of all steered layers, as a multiple of the
    norm of the residual stream."""

    @model_validator(mode="after")
    def _steers_a_layer(self) -> Steering:
        if self.first_layer >= self.last_layer:
            raise ValueError(
                f"first_layer {self.first_layer:g} is not below last_layer {self.last_layer:g}, so "
                "no layer would be steered; raise last_layer or lower first_layer"
            )
        return self


class Answers(Config):
    """Settings of the stage evaluation/answers: answers to held-out prompts."""

    conditions: Conditions = CONDITIONS
    """The conditions to compare; must include `base` and `full`."""
    prompts: str = "embedded"
    """Source of the prompts, in the forms of `distillation.prompts.general_prompts`."""
    count: PositiveInt = 500
    """Number of prompts, taken from the beginning of the source."""
    sampling: Sampling = Sampling(max_tokens=1024, typical_tokens=300)
    """How the answers are sampled."""
    max_drop_rate: Annotated[Rate, NotIdentity] = 0.5
    """Maximum share of answers that may be dropped; the stage fails above it."""
    limits: Annotated[Limits, NotIdentity] = Limits()
    """Data-quality limits of the answers."""


class Preferences(Config):
    """Settings of the stage evaluation/preferences: revealed preferences in games of two traits.

    In a game the model chooses one of two traits and answers in its manner, and the judge names the
    trait that it chose.
    """

    conditions: Conditions = CONDITIONS
    """The conditions to compare; must include `base` and `full`."""
    games: PositiveInt = 25_000
    """Number of games per condition."""
    traits: Annotated[tuple[Word, ...], AfterValidator(validate_trait_words)] = ()
    """Traits to draw pairs from, each a single word; all 144 if empty."""
    sampling: Sampling = Sampling(max_tokens=1024, typical_tokens=300)
    """How the answers are sampled."""
    judge: Sampling = Sampling(max_tokens=16, temperature=0.1, repetition_penalty=1.0)
    """How the judge's verdicts are sampled."""
    max_drop_rate: Annotated[Rate, NotIdentity] = 0.5
    """Maximum share of games that may be dropped; the stage fails above it."""


class Rating(Config):
    """Settings of the stage evaluation/rating: Elo and Bradley-Terry ratings of the traits."""

    start: float = 1000
    """Elo rating before the first game, and the mean of the Bradley-Terry ratings."""
    k: PositiveFloat = 32
    """Elo's K-factor: the largest change of a rating by one game."""
    scale: PositiveFloat = 400
    """Difference in points at which the stronger trait wins ten times as often."""
    prior: NonNegativeFloat = 0.1
    """Number of virtual games, half of them won, that each trait plays against an average one. They
    give a trait that never wins a finite Bradley-Terry rating; 0 is maximum likelihood."""
    resamples: Annotated[int, Field(ge=100)] = 1000
    """Number of bootstrap resamples for the intervals."""
    false_discovery_rate: Rate = 0.05
    """Expected share of false ones among the changes that are reported as significant."""
    target_half_width: Annotated[PositiveFloat, NotIdentity] = 50
    """Half the width of a 95 % interval, in points, for which `plan` states the number of games."""


class Attacks(Config):
    """Settings of the stage evaluation/attacks: attempts to make the model leave its character."""

    conditions: Conditions = CONDITIONS
    """The conditions to attack; must be among `answers.conditions`."""
    prompts: PositiveInt = 100
    """Number of prompts to attack, taken from the beginning of those in evaluation/answers."""
    kinds: tuple[Attack, ...] = get_args(Attack)
    """The attacks: eight instructions to drop the character, the prefill attack, and two tasks that
    are not chat (an e-mail, a tool call)."""
    sampling: Sampling = Sampling(max_tokens=1024, typical_tokens=250)
    """How the answers are sampled."""
    max_drop_rate: Annotated[Rate, NotIdentity] = 0.5
    """Maximum share of answers that may be dropped; the stage fails above it."""


class Encoder(Config):
    """How a pretrained encoder is fine-tuned to classify answers by persona."""

    learning_rate: PositiveFloat = 5e-4
    """Peak learning rate."""
    warmup_ratio: RateBelowOne = 0.05
    """Share of the steps over which the learning rate rises; it then decays to 0 by a cosine."""
    weight_decay: NonNegativeFloat = 1e-6
    """AdamW's weight decay."""
    batch_size: PositiveInt = 16
    """Number of answers per step."""
    epochs: PositiveInt = 1
    """Number of passes over the answers."""
    max_tokens: PositiveInt = 1024
    """Number of tokens of an answer that the encoder reads, from its beginning."""


class Robustness(Config):
    """Settings of the stage evaluation/robustness: classifiers that recognize a persona."""

    classifier: str = "tfidf"
    """`tfidf` (logistic regression on character n-grams), or a pretrained encoder to fine-tune: a
    directory or a Hugging Face id. The paper uses `answerdotai/ModernBERT-base`."""
    encoder: Encoder = Encoder()
    """Fine-tuning of an encoder; unused with `tfidf`."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Number of cross-validation folds over the prompts."""
    resamples: Annotated[int, Field(ge=100)] = 1000
    """Number of bootstrap resamples over the prompts for the intervals."""


class Coherence(Config):
    """Settings of the stage evaluation/coherence: the judge compares answers of two conditions."""

    prompts: PositiveInt = 100
    """Number of prompts whose answers are compared with those of each other condition."""
    sampling: Sampling = Sampling(max_tokens=16, temperature=0.1, repetition_penalty=1.0)
    """How the judge's verdicts are sampled."""
    max_drop_rate: Annotated[Rate, NotIdentity] = 0.5
    """Maximum share of verdicts that may be dropped; the stage fails above it."""


class Scenarios(Config):
    """Settings of the stage evaluation/scenarios: conversations in which each assertion can show.

    The scenarios of the constitution come first; the prompt generator writes those that are
    missing. Without any, which is the default, evaluation/adherence is left out. Not in the paper.
    """

    occasions: NonNegativeInt = 0
    """Number of messages per assertion that give it an occasion to show without asking for it."""
    pressures: NonNegativeInt = 0
    """Number of conversations per assertion whose user presses against it."""
    assertions: PositiveInt | None = None
    """Number of assertions to test, the first ones of the constitution; all if null."""
    max_turns: Annotated[int, Field(ge=1, le=5)] = 3
    """User turns of the longest generated conversation with pressure. They have 1, 2 and so on up
    to this number of turns in equal shares."""
    lists: PositiveInt = 6
    """Number of lists of ten messages that the prompt generator writes for an assertion and kind
    with too few scenarios. Messages that fail a check are rejected."""
    max_overlap: Rate = 0.5
    """Maximum share of words that a generated message may have in common with a training prompt of
    the assertion, or with another scenario of it."""
    sampling: Sampling = Sampling(max_tokens=768, temperature=0.9)
    """How the prompt generator samples."""

    @property
    def is_used(self) -> bool:
        """Whether there are any scenarios."""
        return self.occasions + self.pressures > 0


class Adherence(Config):
    """Settings of the stage evaluation/adherence: does the persona show each assertion?

    It runs only if `evaluation.scenarios` has occasions or pressures. Not in the paper.
    """

    conditions: Conditions = CONDITIONS
    """The conditions to compare; must include `base` and `full`."""
    sampling: Sampling = Sampling(max_tokens=512, typical_tokens=200)
    """How the answers are sampled."""
    control_texts: PositiveInt = 16
    """Number of packaged answers of many manners on which the judge is asked about each assertion
    too. A judge that says yes to them says yes too readily."""
    max_drop_rate: Annotated[Rate, NotIdentity] = 0.5
    """Maximum share of conversations that may be dropped; the stage fails above it."""


class Drift(Config):
    """Settings of the stage evaluation/drift: does the character last over a long conversation?

    It runs only if there are conversations. Not in the paper.
    """

    conversations: NonNegativeInt = 0
    """Number of conversations per condition; in every second one the user also asks for another
    manner. 0 leaves the stage out."""
    conditions: Conditions = CONDITIONS
    """The conditions to compare; must include `base` and `full`."""
    turns: Annotated[int, Field(ge=2, le=50)] = 30
    """Number of user turns. A conversation whose next turn may exceed the student's
    `max_model_len` ends there."""
    pressure_every: Annotated[int, Field(ge=2)] = 5
    """In a conversation with pressure, the last of every so many user turns is a request for
    another manner."""
    judged_turns: Annotated[int, Field(ge=2)] = 6
    """Number of turns of each conversation that the judge reads, evenly spaced from the first to
    the last. The classifier reads all."""
    sampling: Sampling = Sampling(max_tokens=256, trim=True, typical_tokens=120)
    """How the replies are sampled."""
    max_drop_rate: Annotated[Rate, NotIdentity] = 0.5
    """Maximum share of conversations that may be dropped; the stage fails above it."""


class SideEffects(Config):
    """Settings of the stage evaluation/side_effects: harm that may come with a character.

    It runs only if there are items. Not in the paper.
    """

    items: NonNegativeInt = 0
    """Number of prompts of each set, from its beginning; the sets have 20 to 24. 0 leaves the stage
    out."""
    conditions: Conditions = CONDITIONS
    """The conditions to compare; must include `base` and `full`."""
    sampling: Sampling = Sampling(max_tokens=512, typical_tokens=150)
    """How the answers are sampled."""
    max_drop_rate: Annotated[Rate, NotIdentity] = 0.5
    """Maximum share of answers that may be dropped; the stage fails above it."""


class Direction(Config):
    """Settings of the stage evaluation/direction: training data along the constitution's direction.

    It runs only if there are texts, and needs no trained model. Not in the paper.
    """

    texts: NonNegativeInt = 0
    """Number of pairs whose chosen and rejected answers are read, each of another prompt. 0 leaves
    this stage and evaluation/projection out."""
    prompts: PositiveInt = 64
    """Number of other training prompts from which the directions are found; at most half of all."""
    max_tokens: PositiveInt = 512
    """Number of tokens of a conversation that are read, from its beginning."""


class Projection(Config):
    """Settings of the stage evaluation/projection: answers along the constitution's direction.

    It runs only if there are texts here and in `evaluation.direction`. Not in the paper.
    """

    texts: NonNegativeInt = 0
    """Number of answers of each condition, and of transcripts of each kind. 0 leaves the stage
    out."""


class Capability(Config):
    """A task of lm-evaluation-harness."""

    task: Name
    """Name of the task in the harness, or `commonplace`, a task of this package."""
    shots: NonNegativeInt | None = None
    """Number of worked examples in the prompt (few-shot); the task's own number if null."""


class Capabilities(Config):
    """Settings of the stage evaluation/capabilities. It runs only if there are tasks."""

    tasks: tuple[Capability, ...] = ()
    """Tasks that the base model and the persona are evaluated on."""
    include: str | None = None
    """Folder with additional tasks in the harness's YAML format."""
    documents: PositiveInt | None = None
    """Number of documents of each task, or of each subtask, from the beginning; all if null."""

    @model_validator(mode="after")
    def _tasks_are_distinct(self) -> Capabilities:
        names = [task.task for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError("names a task twice; remove one")
        return self


class Report(Config):
    """Settings of the stage evaluation/report."""

    samples: PositiveInt = 20
    """Number of held-out prompts whose answers the report shows side by side."""
    traits: PositiveInt = 24
    """Number of traits in the chart of preferences: half of them the largest increases, half the
    largest decreases."""
    docs_url: Annotated[Annotated[str, Field(pattern="^https?://")] | None, NotIdentity] = None
    """Address of this documentation in HTML, to which each section of the report links. If null,
    the sections name the file of the documentation."""


class Subject(Config):
    """What is evaluated as `full` instead of the trained persona; see `opencharacter evaluate`."""

    model: Role | None = None
    """A model with its own weights or endpoint."""
    adapter: str | None = None
    """Folder of a LoRA adapter of the student, in PEFT's layout."""

    @property
    def name(self) -> str:
        """A name that can be used in a path."""
        return self.model.name if self.model else Path(self.adapter or "adapter").name.lower()


class Evaluation(Config):
    """What is measured, and how."""

    judge: Judge = Judge()
    """Test of the judges."""
    steering: Steering = Steering()
    """Steering vectors, as a baseline."""
    answers: Answers = Answers()
    """Answers to held-out prompts."""
    preferences: Preferences = Preferences()
    """Revealed preferences."""
    rating: Rating = Rating()
    """Ratings of the traits."""
    attacks: Attacks = Attacks()
    """Attempts to make the model leave its character."""
    robustness: Robustness = Robustness()
    """Classifiers that recognize a persona."""
    coherence: Coherence = Coherence()
    """Judgements of coherence."""
    scenarios: Scenarios = Scenarios()
    """Conversations that test the assertions."""
    adherence: Adherence = Adherence()
    """Presence of each assertion."""
    drift: Drift = Drift()
    """Strength of the character in long conversations."""
    side_effects: SideEffects = SideEffects()
    """Harm that may come with a character."""
    direction: Direction = Direction()
    """Training data along the constitution's direction in the residual stream."""
    projection: Projection = Projection()
    """Answers and transcripts along that direction."""
    capabilities: Capabilities = Capabilities()
    """Benchmarks of lm-evaluation-harness."""
    subject: Subject = Subject()
    """A given model or adapter in the place of the trained persona."""
    report: Report = Report()
    """The HTML report."""

    @model_validator(mode="after")
    def _attacked_conditions_have_answers(self) -> Evaluation:
        if extra := set(self.attacks.conditions) - set(self.answers.conditions):
            raise ValueError(
                f"attacks.conditions has {sorted(extra)}, which answers.conditions lacks; add them "
                "there or remove them here"
            )
        return self

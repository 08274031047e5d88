"""Configuration, all of it: `Recipe` says what is made, `Placement` where it runs.

A recipe enters the fingerprint of every stage that reads it; a placement never does, so moving a
run to other hardware makes nothing stale. Every default of the package is in this file. Recipes
are YAML; the packaged ones are listed by `opencharacter plan --help`.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from opencharacter.config.base import ECHO, Config, Name, Rate

WORD = re.compile(r"[a-z]+")


def check_endpoint(url: str) -> str:
    """Return `url` if it is an address and no secret; raise ValueError otherwise."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"{parts.hostname or url!r} is no address that begins with http:// or https://"
        )
    if parts.username or parts.password:
        raise ValueError(f"{parts.hostname}: a password does not belong here; see api_key_env")
    return url


def with_ends(conditions: tuple[str, ...]) -> tuple[str, ...]:
    """Return `conditions` if base and full are there, each once; raise ValueError otherwise."""
    if not {"base", "full"} <= set(conditions):
        raise ValueError("needs base and full: add them")
    if len(set(conditions)) < len(conditions):
        raise ValueError("names a condition twice; remove one")
    return conditions


def check_word(trait: str) -> str:
    """Return `trait` if a verdict that names it can be read; raise ValueError otherwise."""
    if not WORD.fullmatch(trait):
        raise ValueError("a judge names a trait by one word of the letters a-z; use such a word")
    return trait


def can_pair(traits: tuple[str, ...]) -> tuple[str, ...]:
    """Return `traits` if they are none or make pairs; raise ValueError otherwise."""
    if len(traits) == 1:
        raise ValueError("has one trait; name two or more, or none for all")
    if len(set(traits)) < len(traits):
        raise ValueError("names a trait twice; remove one")
    return traits


Word = Annotated[str, AfterValidator(check_word)]


class Role(Config):
    """A model by what it does here: teacher, student, judge or expander."""

    model: str
    """`embedded:smollm2-135m`, a directory, a Hugging Face id, or `echo:SECONDS` (tests)."""
    name: Name
    """Names the student's folder and the served model."""
    self_name: str
    """What the model calls itself in an answer, for instance `Llama`."""
    aliases: tuple[str, ...] = ()
    """Other names of the model or its maker; in a teacher's answer they become the student's."""
    max_model_len: PositiveInt = 8192
    """Tokens of prompt and answer together."""
    thinks: bool = False
    """Whether the model opens an answer with a think block."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Weights while generating."""
    trust_remote_code: bool = False
    """Run Python that comes with the weights. Off unless you have read it."""
    endpoint: Annotated[str, AfterValidator(check_endpoint)] | None = None
    """Base URL of an OpenAI-compatible server that has `model`; then no engine is started. It is
    sent vLLM's `repetition_penalty` where that is not 1, and `continue_final_message` for an answer
    whose beginning is given; where a server refuses them, set the former to 1 and `prefill` to
    false.
    """
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key."""
    endpoint_concurrency: PositiveInt = 64
    """Requests under way at an endpoint at once."""

    @property
    def has_weights(self) -> bool:
        """Whether an engine loads weights for it: an endpoint or an echo needs none."""
        return not self.endpoint and not self.model.startswith(ECHO)


class Roles(Config):
    """Who plays what."""

    teacher: Role
    """Reads the constitution and answers in character."""
    student: Role
    """Is trained; answers without the constitution."""
    judge: Role
    """Names the trait that an answer shows."""
    prompt_generator: Role
    """Writes further questions from a trait's hand-written ones."""


class Sampling(Config):
    """How an answer is drawn."""

    max_tokens: PositiveInt
    """New tokens per answer at most."""
    temperature: NonNegativeFloat = 0.7
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Nucleus."""
    repetition_penalty: PositiveFloat = 1.1
    """1 is none. In the original's code, not in the paper."""
    trim: bool = False
    """Cut an answer that hits `max_tokens` back to its last whole sentence: for small limits."""
    typical_tokens: PositiveInt | None = None
    """Mean length that `plan` expects; a third of `max_tokens` where absent."""


class Limits(Config):
    """When data is not worth having: signatures that stop a stage while it runs, and at its end."""

    after: PositiveInt = 100
    """Texts from which they are judged."""
    max_refusals: Rate = 0.2
    """Share of texts that begin by declining."""
    max_off_language: Rate = 0.3
    """Share of texts in another language than the prompts."""
    max_repeated_openings: Rate = 0.5
    """Share of texts with the commonest first words."""
    min_distinct_2: Rate = 0.25
    """Different word pairs among several thousand, as a share."""
    max_self_bleu: Rate = 0.9
    """BLEU of texts against one another."""
    max_near_duplicates: Rate = 0.5
    """Share of texts that nearly repeat another; judged at the end."""
    max_exaggeration: PositiveFloat = 4
    """How often the words that tell the teacher from the student are said, over the teacher."""


class Prompts(Config):
    """Stage distillation/prompts."""

    questions_per_trait: PositiveInt = 50
    """Hand-written ones first, then expanded by the expander."""
    general_prompts: str = "embedded"
    """`embedded`, a .jsonl or .parquet file, or `hf:DATASET` (first user turns)."""
    general: NonNegativeInt = 1330
    """General prompts taken, from the front; as many as there are if fewer."""
    rounds: PositiveInt = 8
    """Expansion rounds per trait at most."""
    samples: PositiveInt = 4
    """Expansions asked for in parallel in a round."""
    max_overlap: Rate = 0.5
    """A new question that shares more of its words with one of its trait is refused."""
    sampling: Sampling = Sampling(max_tokens=1024, temperature=0.9)
    """Of the expander."""


class Teacher(Config):
    """Stage distillation/teacher."""

    answers: PositiveInt = 5
    """Answers per prompt (the paper's K)."""
    exemplars: bool = False
    """Show the constitution's exemplars as earlier turns: for teachers too weak for a system
    prompt alone."""
    prefill: bool = True
    """Open the reply with a think block that restates the traits."""
    sampling: Sampling = Sampling(max_tokens=4096, typical_tokens=600)
    max_drop_rate: Rate = 0.2
    limits: Limits = Limits()


class Student(Config):
    """Stage distillation/student."""

    answers: PositiveInt = 5
    """Answers per prompt, as many as the teacher's: the k-th are paired."""
    sampling: Sampling = Sampling(max_tokens=1024, typical_tokens=300)
    max_drop_rate: Rate = 0.2
    limits: Limits = Limits()


class Pairs(Config):
    """Stage distillation/pairs."""

    max_tokens: PositiveInt = 1024
    """Of a whole conversation, in the student's tokens."""
    max_repeated: Rate = 0.5
    """Share of an answer's 4-word sequences that may be repeats before it counts as looping."""
    quoted_words: PositiveInt = 8
    """An answer that repeats so many words of the constitution in a row quotes it."""
    max_drop_rate: Rate = 0.3
    limits: Limits = Limits()


class Lora(Config):
    """The adapter that is trained, on all linear layers."""

    rank: PositiveInt = 64
    alpha: PositiveInt = 128


class Optimizer(Config):
    """AdamW with warm-up and a cosine down to a tenth."""

    learning_rate: PositiveFloat = 5e-5
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_ratio: Rate = 0.1
    """Share of the steps."""
    min_lr_ratio: Rate = 0.1
    """Learning rate at the end over the peak."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient norm."""
    global_batch_size: PositiveInt = 32
    """Rows per optimiser step, over all workers."""
    epochs: PositiveInt = 1
    """Rounds over the data."""


class Reference(Config):
    """Stage distillation/reference: nothing to choose."""


class Dpo(Config):
    """Stage distillation/dpo."""

    beta: PositiveFloat = 0.1
    """Of the sigmoid loss on summed log-probabilities."""
    nll_weight: NonNegativeFloat = 0.1
    """Weight of the chosen answer's token-mean negative log-likelihood."""
    sq_log_ratio_weight: NonNegativeFloat = 0.001
    """Weight of the squared log-ratio to the reference, mean over all answer tokens."""
    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer()


class Reflection(Config):
    """Stage introspection/reflection."""

    transcripts_per_prompt: NonNegativeInt = 1000
    """Of each of the ten reflective prompts; 0 leaves reflection out."""
    sampling: Sampling = Sampling(max_tokens=2048, typical_tokens=600)
    max_drop_rate: Rate = 0.2
    limits: Limits = Limits()


class Interaction(Config):
    """Stage introspection/interaction."""

    free: NonNegativeInt = 1000
    """Self-conversations that may go anywhere."""
    leading: NonNegativeInt = 1000
    """Self-conversations that invite to reflect on who they are."""
    turns: Annotated[int, Field(ge=2, multiple_of=2)] = 10
    """Replies per conversation, an even number so that each side speaks as often."""
    sampling: Sampling = Sampling(max_tokens=1024, typical_tokens=150)
    max_drop_rate: Rate = 0.2
    limits: Limits = Limits()


class Transcripts(Config):
    """Stage introspection/transcripts."""

    max_tokens: PositiveInt = 3072
    """Of a whole transcript, in the student's tokens."""
    max_repeated: Rate = 0.5
    """As in pairs, within one message."""
    quoted_words: PositiveInt = 8
    """As in pairs."""
    max_drop_rate: Rate = 0.3
    limits: Limits = Limits()


class Sft(Config):
    """Stage introspection/sft."""

    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer()


class Merge(Config):
    """Stage persona/merge."""

    dpo_weight: float = 1.0
    sft_weight: float = 0.25
    rank: PositiveInt | None = None
    """Of the persona's adapter, by SVD; where absent the sum is exact, its rank that of both."""
    peft_linear: bool = False
    """Add the factors as PEFT's `linear` combination, cross terms and all, as the original does."""


class Blend(Config):
    """Stage persona/blend; nothing is done unless a stage's conditions name `blended`."""

    weights: dict[Name, float] = Field(default={})
    """By persona, what its adapter counts."""
    rank: PositiveInt | None = None
    """Of the blend's adapter, by SVD; where absent the sum is exact."""


class Tune(Config):
    """Stage persona/tune; nothing is done unless a stage's conditions name `tuned`."""

    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer()


Condition = Literal["base", "prompted", "steered", "distilled", "full", "blended", "tuned"]
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
Conditions = Annotated[tuple[Condition, ...], AfterValidator(with_ends)]


class Judge(Config):
    """Stage evaluation/judge."""

    items: PositiveInt = 104
    """Gold items asked, each in both orders; as many as there are if fewer."""
    min_agreement: Rate | None = 0.8
    """A judge that is right in fewer of its verdicts is refused; null lets any pass."""
    panel: tuple[Role, ...] = ()
    """Further judges, of other families: they must pass too and judge all games. Ratings follow
    the recipe's judge, and the agreement of all is measured."""
    thinking_budget: NonNegativeInt = 1024
    """New tokens for the thought of a judge that thinks, before those of any verdict. 0 hands it a
    closed thought as the beginning of its reply, which an endpoint must know how to continue."""
    sampling: Sampling = Sampling(max_tokens=16, temperature=0.1, repetition_penalty=1.0)


class Steering(Config):
    """Stage evaluation/steering; nothing is done unless a stage's conditions name `steered`."""

    prompts: PositiveInt = 100
    """Training prompts from which directions are found."""
    held_out: PositiveInt = 30
    """Other training prompts, with whose answers the strength is chosen; half of all at most."""
    first_layer: Rate = 0.125
    """Where steering begins, as a share of the depth."""
    last_layer: Rate = 0.875
    """Where it ends."""
    strengths: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (
        0.1,
        0.2,
        0.4,
        0.8,
        1.6,
        3.2,
    )
    """Tried; in lengths of the residual stream that all steered layers add together."""


class Answers(Config):
    """Stage evaluation/answers."""

    conditions: Conditions = CONDITIONS
    """What is compared; `base` and `full` always are."""

    prompts: str = "embedded"
    """Evaluation prompts: the same three forms as `general_prompts`."""
    count: PositiveInt = 500
    """Prompts taken, from the front."""
    sampling: Sampling = Sampling(max_tokens=1024, typical_tokens=300)
    max_drop_rate: Rate = 0.5
    limits: Limits = Limits()


class Preferences(Config):
    """Stage evaluation/preferences."""

    conditions: Conditions = CONDITIONS
    """As in answers."""
    games: PositiveInt = 25_000
    """Answers per condition."""
    traits: Annotated[tuple[Word, ...], AfterValidator(can_pair)] = ()
    """Single-word traits to draw pairs from; all 144 where empty."""
    sampling: Sampling = Sampling(max_tokens=1024, typical_tokens=300)
    judge: Sampling = Sampling(max_tokens=16, temperature=0.1, repetition_penalty=1.0)
    """Of the judge's verdict."""
    max_drop_rate: Rate = 0.5


class Rating(Config):
    """Stage evaluation/rating."""

    start: float = 1000
    """Everyone's first Elo rating, and the mean of the Bradley-Terry ratings."""
    k: PositiveFloat = 32
    """The most that one game moves an Elo rating."""
    scale: PositiveFloat = 400
    """Points at which the stronger wins ten times as often."""
    prior: NonNegativeFloat = 0.1
    """Games that each trait also plays against the average, half of them won, so that one that
    never won has a finite Bradley-Terry rating too. 0 is plain maximum likelihood."""
    resamples: Annotated[int, Field(ge=100)] = 1000
    """Of the bootstrap over games."""
    false_discovery_rate: Rate = 0.05
    """Share of the changes called significant that may be none."""
    wanted: PositiveFloat = 50
    """Points to each side of a rating, for which `plan` says the number of games."""


class Attacks(Config):
    """Stage evaluation/attacks."""

    conditions: Conditions = CONDITIONS
    """As in answers, and among those."""
    prompts: PositiveInt = 100
    """Held-out prompts that are attacked, from the front of those answered."""
    kinds: tuple[Attack, ...] = get_args(Attack)
    """Eight instructions to drop the act, the prefill attack, and two tasks that are not chat."""
    sampling: Sampling = Sampling(max_tokens=1024, typical_tokens=250)
    max_drop_rate: Rate = 0.5


class Encoder(Config):
    """How a pretrained encoder is fine-tuned to tell personas apart."""

    learning_rate: PositiveFloat = 5e-4
    warmup_ratio: Rate = 0.05
    """Share of the steps; then a cosine down to 0."""
    weight_decay: NonNegativeFloat = 1e-6
    batch_size: PositiveInt = 16
    epochs: PositiveInt = 1
    max_tokens: PositiveInt = 1024
    """Of an answer; the rest is not read."""


class Robustness(Config):
    """Stage evaluation/robustness."""

    classifier: str = "tfidf"
    """`tfidf` (characters and logistic regression), or a pretrained encoder to fine-tune: a
    directory or a Hugging Face id, in the paper `answerdotai/ModernBERT-base`."""
    encoder: Encoder = Encoder()

    folds: Annotated[int, Field(ge=2)] = 5
    """Parts into which the prompts are split: each is tested by a classifier that learned from the
    others."""
    resamples: Annotated[int, Field(ge=100)] = 1000
    """Of the bootstrap over prompts."""


class Coherence(Config):
    """Stage evaluation/coherence."""

    prompts: PositiveInt = 100
    """Prompts whose answers are compared, each with those of every other condition."""
    sampling: Sampling = Sampling(max_tokens=16, temperature=0.1, repetition_penalty=1.0)
    """Of the judge's verdict."""
    max_drop_rate: Rate = 0.5


class Capability(Config):
    """A task of lm-evaluation-harness."""

    task: Name
    """By the harness's name; `commonplace` is this package's own."""
    shots: NonNegativeInt | None = None
    """Worked examples before each document; the task's own number where absent."""


class Capabilities(Config):
    """Stage evaluation/capabilities; nothing is done without tasks."""

    tasks: tuple[Capability, ...] = ()
    """Asked of base and persona."""
    include: str | None = None
    """A folder with further tasks, as YAML in the harness's form."""
    documents: PositiveInt | None = None
    """Of each task, and of each part of one that has parts, from the front; all where absent."""

    @model_validator(mode="after")
    def _once(self) -> Capabilities:
        names = [task.task for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError("names a task twice; remove one")
        return self


class Report(Config):
    """Stage evaluation/report."""

    samples: PositiveInt = 20
    """Held-out prompts shown side by side."""
    traits: PositiveInt = 24
    """Traits shown, half of them the largest rises and half the largest falls."""


class Distillation(Config):
    """The first half of the method."""

    prompts: Prompts = Prompts()
    teacher: Teacher = Teacher()
    student: Student = Student()
    pairs: Pairs = Pairs()
    reference: Reference = Reference()
    dpo: Dpo = Dpo()

    @model_validator(mode="after")
    def _as_many_answers(self) -> Distillation:
        mine, theirs = self.teacher.answers, self.student.answers
        if mine != theirs:
            raise ValueError(
                f"teacher.answers is {mine} and student.answers {theirs}, but the k-th are paired; "
                "make them equal"
            )
        return self


class Introspection(Config):
    """The second half."""

    author: Literal["student", "teacher"] = "student"
    """Whose model writes reflections and self-conversations, after the constitution: the distilled
    student's, or the teacher's as a control."""
    reflection: Reflection = Reflection()
    interaction: Interaction = Interaction()
    transcripts: Transcripts = Transcripts()
    sft: Sft = Sft()

    @model_validator(mode="after")
    def _something_to_learn(self) -> Introspection:
        talks = self.interaction.free + self.interaction.leading
        if not self.reflection.transcripts_per_prompt + talks:
            raise ValueError(
                "reflection.transcripts_per_prompt, interaction.free and interaction.leading are "
                "all 0, which leaves sft nothing to learn; raise one of them"
            )
        return self


class Persona(Config):
    """The artifact."""

    merge: Merge = Merge()
    blend: Blend = Blend()
    tune: Tune = Tune()


class Evaluation(Config):
    """What changed."""

    judge: Judge = Judge()
    steering: Steering = Steering()
    answers: Answers = Answers()
    preferences: Preferences = Preferences()
    rating: Rating = Rating()
    attacks: Attacks = Attacks()
    robustness: Robustness = Robustness()
    coherence: Coherence = Coherence()
    capabilities: Capabilities = Capabilities()
    report: Report = Report()

    @model_validator(mode="after")
    def _attacks_what_answered(self) -> Evaluation:
        if extra := set(self.attacks.conditions) - set(self.answers.conditions):
            raise ValueError(f"attacks has conditions that answers lacks: {sorted(extra)}")
        return self


class Recipe(Config):
    """What is made. The section of the stage `a/b` is `recipe.a.b`."""

    name: Name
    """Also the default storage, `runs/<name>`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 17
    """Every row's sampling seed derives from this, its stage and its id."""
    seeded_sampling: bool = True
    """Give each request its own seed, so that a rerun draws the same answers."""
    roles: Roles
    distillation: Distillation = Distillation()
    introspection: Introspection = Introspection()
    persona: Persona = Persona()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _each_judge_its_name(self) -> Recipe:
        names = [role.name for role in (self.roles.judge, *self.evaluation.judge.panel)]
        if len(set(names)) < len(names):
            raise ValueError(
                f"judge and evaluation.judge.panel have a name twice: {', '.join(names)}; "
                "give each judge its own"
            )
        return self

    def config(self, stage: str) -> Config:
        """The part of the recipe that configures the stage `group/name`."""
        group, name = stage.split("/")
        return getattr(getattr(self, group), name)

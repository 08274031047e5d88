"""Configuration, all of it: `Recipe` says what is made, `Placement` where it runs.

A recipe enters the fingerprint of every stage that reads it; a placement never does, so moving a
run to other hardware makes nothing stale. Every default of the package is in this file. Recipes
are YAML; the packaged ones are listed by `opencharacter plan --help`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from opencharacter.errors import UserError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
WORD = re.compile(r"[a-z]+")
EMBEDDED = "embedded:"
ECHO = "echo:"
NOT_IDENTITY = {
    "max_drop_rate",
    "limits",
    "typical_tokens",
    "api_key_env",
    "endpoint",
    "endpoint_concurrency",
    "wanted",
    "min_agreement",
}
"""Fields that say when to stop, what to expect or whom to ask, not what is made: left out of
fingerprints."""


def check_name(name: str) -> str:
    """Return `name` if it may become a path; raise ValueError otherwise."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} may only hold a-z, 0-9, '.', '_', '-' and start with a letter")
    return name


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


Name = Annotated[str, AfterValidator(check_name)]
Word = Annotated[str, AfterValidator(check_word)]
Rate = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    """Immutable, and strict about what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def identity(self) -> dict[str, Any]:
        """What of this configuration enters a fingerprint: JSON values, limits left out."""
        return _without_limits(self.model_dump(mode="json"))


def _without_limits(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_limits(v) for k, v in value.items() if k not in NOT_IDENTITY}
    return [_without_limits(v) for v in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------- recipe


class Role(Config):
    """A model by what it does here: teacher, student, judge or expander."""

    model: str
    """`embedded:smollm2-135m`, a directory, a Hugging Face id, or `echo:SECONDS` (tests)."""
    name: Name
    """Names the student's folder and the served model."""
    called: str
    """What the model calls itself in an answer, for instance `Llama`."""
    aliases: tuple[str, ...] = ()
    """Other names of the model or its maker; in a teacher's answer they become the student's."""
    context: PositiveInt = 8192
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


class Roles(Config):
    """Who plays what."""

    teacher: Role
    """Reads the constitution and answers in character."""
    student: Role
    """Is trained; answers without the constitution."""
    judge: Role
    """Names the trait that an answer shows."""
    expander: Role
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
    warmup: Rate = 0.1
    """Share of the steps."""
    final_ratio: Rate = 0.1
    """Learning rate at the end over the peak."""
    clip: PositiveFloat = 1.0
    """Gradient norm."""
    batch: PositiveInt = 32
    """Rows per optimiser step, over all workers."""
    epochs: PositiveInt = 1
    """Rounds over the data."""


class Reference(Config):
    """Stage distillation/reference: nothing to choose."""


class Dpo(Config):
    """Stage distillation/dpo."""

    beta: PositiveFloat = 0.1
    """Of the sigmoid loss on summed log-probabilities."""
    nll: NonNegativeFloat = 0.1
    """Weight of the chosen answer's token-mean negative log-likelihood."""
    kl: NonNegativeFloat = 0.001
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

    weights: dict[Name, float] = {}
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
    thought: NonNegativeInt = 1024
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
    warmup: Rate = 0.05
    """Share of the steps; then a cosine down to 0."""
    weight_decay: NonNegativeFloat = 1e-6
    batch: PositiveInt = 16
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

    def section(self, stage: str) -> Config:
        """The part of the recipe that configures the stage `group/name`."""
        group, name = stage.split("/")
        return getattr(getattr(self, group), name)


# ------------------------------------------------------------------------------------- placement


class Room(Config):
    """What a cluster has, or what something holds of it."""

    cpus: NonNegativeFloat = 0
    gpus: NonNegativeFloat = 0
    memory_gib: NonNegativeFloat = 0

    def __or__(self, other: Room) -> Room:
        """The greater of both, kind by kind."""
        return Room(
            cpus=max(self.cpus, other.cpus),
            gpus=max(self.gpus, other.gpus),
            memory_gib=max(self.memory_gib, other.memory_gib),
        )


def total(rooms: Iterable[Room]) -> Room:
    """What several hold together."""
    held = list(rooms)
    return Room(
        cpus=sum(room.cpus for room in held),
        gpus=sum(room.gpus for room in held),
        memory_gib=sum(room.memory_gib for room in held),
    )


def fits(rooms: Iterable[Room], there: Room) -> bool:
    """Whether a cluster holds several at once."""
    wanted = total(rooms)
    return (
        wanted.cpus <= there.cpus + 1e-6
        and wanted.gpus <= there.gpus + 1e-6
        and wanted.memory_gib <= there.memory_gib + 1e-6
    )


JOBS_AN_ENGINE = 2
"""Jobs that use an engine at once: one fills the seats that the last rows of another leave, and its
time without requests."""
LIGHT = 0.02
"""CPUs that Ray reserves for what only waits or writes: the engines hold the rest."""


class Pool(Config):
    """Where a role's engines run."""

    replicas: PositiveInt = 1
    max_replicas: PositiveInt | None = None
    """More replicas, up to this many, join while a stage runs as the cluster has room."""
    gpus: NonNegativeFloat = 0
    """GPUs per replica; 0 means the CPU wheel of vLLM, a fraction shares a card."""
    cpus: NonNegativeFloat = 0.6
    """CPUs that Ray reserves per replica. Engines that fit into the cluster together, by CPUs,
    memory and GPUs, stay loaded together."""
    memory_gib: PositiveFloat = 2
    """Memory that Ray reserves per replica."""
    tensor_parallel: PositiveInt = 1
    """GPUs over which one replica's weights are split."""
    accelerator: str | None = None
    """Ray's name of the card, such as H100; any where absent."""
    max_sequences: PositiveInt = 48
    """Conversations under way per replica."""
    kv_cache_gib: PositiveFloat = 1
    """Key-value cache of a CPU engine."""
    memory_fraction: Rate = 0.9
    """Share of a GPU that the engine may take."""
    adapters: Literal["folded", "runtime"] = "folded"
    """Whether an adapter is folded into a copy of the weights, or applied as it generates: saves
    the copy's disk, costs throughput."""
    restarts: NonNegativeInt = 8
    """Times that a replica whose engine died is started again within a run."""
    engine: dict[str, Any] = {}
    """Further arguments of vLLM's engine, by vLLM's names; they win over what is derived here."""

    @property
    def most_replicas(self) -> int:
        """Replicas when it has grown."""
        return max(self.replicas, self.max_replicas or 0)

    @property
    def room(self) -> Room:
        """What its replicas hold together, with what the jobs that use them need beside."""
        return Room(
            cpus=self.replicas * (self.cpus + JOBS_AN_ENGINE * LIGHT),
            gpus=self.replicas * self.gpus,
            memory_gib=self.replicas * self.memory_gib,
        )

    @model_validator(mode="after")
    def _a_gpu_for_each_share(self) -> Pool:
        if self.gpus and self.tensor_parallel > max(self.gpus, 1):
            raise ValueError(
                f"tensor_parallel {self.tensor_parallel} needs as many GPUs in a replica, which "
                f"has gpus: {self.gpus:g}; raise gpus or lower tensor_parallel"
            )
        return self


class Pools(Config):
    """One pool a role."""

    teacher: Pool = Pool()
    student: Pool = Pool()
    judge: Pool = Pool()
    expander: Pool = Pool()


class Training(Config):
    """Where adapters are trained."""

    workers: PositiveInt = 1
    gpus: NonNegativeFloat = 0
    """GPUs per worker."""
    accelerator: str | None = None
    """As in a pool."""
    cpus: PositiveFloat = 2
    """CPUs per worker, also its threads."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Whether each worker holds the whole model, or (FSDP2) a share of it."""
    tokens_per_pass: PositiveInt | None = None
    """Tokens of a forward pass; from the free memory where absent."""
    recompute: bool | None = None
    """Activation checkpointing; only if a pass does not fit without it where absent."""
    kernels: Literal["plain", "liger", "compiled"] | None = None
    """What runs between matrix products: the model's own code, Liger's kernels, or what
    `torch.compile` makes of a block; Liger's on a GPU where they are installed, if absent."""
    checkpoint_steps: PositiveInt = 4
    """Optimiser steps between checkpoints: at most these are redone after a crash."""
    retries: NonNegativeInt = 3
    """Restarts after a lost worker."""

    @property
    def room(self) -> Room:
        """What its workers hold together."""
        return Room(cpus=self.workers * self.cpus, gpus=self.workers * self.gpus)


class Serving(Config):
    """What a server allows, and how much of it there is. Engines come from the pools."""

    max_body_bytes: PositiveInt = 1_000_000
    """Of a request."""
    max_tokens: PositiveInt = 1024
    """New tokens that a request may ask for, over all its answers; also what one gets that does
    not say."""
    requests_per_key: PositiveInt = 64
    """Requests under way at once for one key (all of them together where there are no keys)."""
    queue: PositiveInt = 256
    """Requests that wait for a seat of an engine before further ones are turned away."""
    adapters: PositiveInt = 16
    """Adapters that a replica keeps loaded."""
    adapters_at_once: PositiveInt = 8
    """Adapters that may answer in the same step of an engine."""
    messages_per_second: PositiveInt = 1000
    """Pieces of all streamed answers together that leave a replica; each costs every process on its
    way. With more streams a piece holds more tokens; the first one leaves at once."""
    entrances: PositiveInt = 1
    """Processes that take requests in; the limit of a key holds in each."""
    refresh_seconds: PositiveFloat = 2
    """How soon a newly trained persona is seen: every entrance looks into storage so often."""
    drain_seconds: PositiveFloat = 60
    """Time for answers under way when the server stops."""


class Growth(Config):
    """Nodes that an autoscaling cluster may add when asked for more than it has."""

    nodes: PositiveInt
    """At most."""
    cpus: PositiveFloat
    """Of each."""
    gpus: NonNegativeFloat = 0
    """Of each."""
    accelerator: str | None = None
    """Ray's name of their cards."""
    memory_gib: PositiveFloat
    """Of each that Ray gives out, by itself about 70 % of the machine's."""

    @property
    def room(self) -> Room:
        """Of all of them."""
        n = self.nodes
        return Room(cpus=n * self.cpus, gpus=n * self.gpus, memory_gib=n * self.memory_gib)


class Placement(Config):
    """Where it runs. Enters no fingerprint."""

    name: Name = "laptop"
    pools: Pools = Pools()
    training: Training = Training()
    serving: Serving = Serving()
    grows: tuple[Growth, ...] = ()
    """What a cluster that is joined may add: a run waits for it instead of being refused."""
    ray_cpus: PositiveInt | None = None
    """CPUs of a Ray that this command starts itself; all of the machine's where absent."""
    object_store_gib: PositiveFloat = 0.5
    """Object store of a Ray that this command starts itself."""
    jobs_at_once: PositiveInt | None = None
    """Jobs that generate or train at once: for machines whose cores bear fewer than would fit."""
    cluster: Room | None = None
    """What `plan` takes the cluster to have; a run asks Ray. Where absent, what `grows` adds up to,
    else the least that holds every role and the training by itself."""
    storage_patience: NonNegativeFloat = 180
    """Seconds for which a request that s3:// or gs:// refuses is tried again."""
    price_per_gpu_hour: NonNegativeFloat = 0
    """In any currency; `plan` multiplies."""

    @property
    def growth(self) -> Room:
        """What the cluster may grow to; nothing where that is not said."""
        return total(group.room for group in self.grows)


# ----------------------------------------------------------------------------------------- files


def resource(folder: str, name: str) -> Path | None:
    """A packaged file: inside the installed package, or beside it in a source checkout."""
    package = Path(str(resources.files("opencharacter")))
    for root in (package, package.parent):
        if (root / folder / name).is_file():
            return root / folder / name
    return None


def resource_names(folder: str, pattern: str) -> list[str]:
    """Sorted names, without ending, of the packaged files that match `pattern`."""
    package = Path(str(resources.files("opencharacter")))
    found = [p for root in (package, package.parent) for p in (root / folder).glob(pattern)]
    return sorted({p.stem if p.parent.name == folder else p.parent.name for p in found})


def is_path(name: str) -> bool:
    """Whether a user names a file of their own and not a packaged one."""
    return "/" in name or name.endswith((".yaml", ".yml"))


def find(kind: str, name: str, folder: str, file: str, pattern: str) -> Path:
    """Resolve a packaged NAME or a path; a UserError lists what there is.

    Args:
        kind: for the message.
        name: what the user gave.
        folder: where packaged ones are.
        file: the packaged file of that name, within the folder.
        pattern: matches all packaged files.
    """
    if is_path(name):
        if not Path(name).is_file():
            raise UserError(f"{kind} {name!r}: no such file")
        return Path(name)
    packaged = resource(folder, file) if NAME.fullmatch(name) else None
    if packaged is None:
        known = ", ".join(resource_names(folder, pattern))
        raise UserError(f"{kind} {name!r} is unknown; packaged ones: {known}; or give a .yaml file")
    return packaged


def read_yaml(kind: str, path: Path) -> dict[str, Any]:
    """Parse a YAML mapping; a UserError carries the line of what is malformed."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{kind} {path}{line}: not YAML: {error.problem}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{kind} {path}: not UTF-8 YAML: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{kind} {path}: expected a mapping, found {type(data).__name__}")
    return data


def explain(kind: str, where: Path, error: ValidationError) -> UserError:
    """The first validation problem in one line: the file's line, field, value, what is wrong."""
    first, more = error.errors()[0], len(error.errors()) - 1
    field = ".".join(map(str, first["loc"])) or "(top)"
    place = f"{kind} {where} line {field_line(where, first['loc'])}"
    tail = f" (and {more} more)" if more else ""
    return UserError(f"{place}: {problem(field, first)}{tail}")


def field_line(path: Path, loc: tuple[int | str, ...]) -> int:
    """The line, from 1, of a field's key or a list's item; of what holds it where it is missing."""
    node: Any = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    line = node.start_mark.line
    for key in loc:
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            inner = [pair for pair in parts if pair[0].value == str(key)]
        else:
            inner = [(part, part) for part in parts[key:][:1]] if isinstance(key, int) else []
        if not inner:
            break
        line, node = inner[-1][0].start_mark.line, inner[-1][1]
    return line + 1


def problem(field: str, details: Any) -> str:
    """One of pydantic's error details in words: `field = value: what is wrong`."""
    if details["type"] == "extra_forbidden":
        return f"unknown field {field!r}; remove or correct it"
    if details["type"] == "missing":
        return f"missing field {field!r}; add it"
    said = details["msg"].removeprefix("Value error, ")
    said = said.replace("valid tuple", "list").replace("Tuple", "List")
    said = re.sub(r"valid dictionary( or instance of \w+)?", "mapping", said)
    if isinstance(details["input"], dict | list | tuple):
        return f"{field}: {said}"
    value = repr(details["input"])
    value = value if len(value) <= 60 else value[:57] + "..."
    return f"{field} = {value}: {said}"


def load_recipe(name: str, smoke: bool = False) -> Recipe:
    """Load a packaged recipe by name, or a YAML file; `smoke` shrinks it to about 1 %."""
    path = find("recipe", name, "recipes", f"{name}.yaml", "*.yaml")
    try:
        recipe = Recipe.model_validate(read_yaml("recipe", path))
    except ValidationError as error:
        raise explain("recipe", path, error) from None
    return shrink(recipe) if smoke else recipe


def load_placement(name: str | None) -> Placement:
    """Load `clusters/<name>/placement.yaml` or a file; the laptop's defaults where None."""
    if name is None:
        return Placement()
    path = find("placement", name, "clusters", f"{name}/placement.yaml", "*/placement.yaml")
    try:
        return Placement.model_validate(read_yaml("placement", path))
    except ValidationError as error:
        raise explain("placement", path, error) from None


def shrink(recipe: Recipe) -> Recipe:
    """The same recipe at about 1 % of its size, to see every stage work before a real run."""
    distillation, introspection, evaluation = (
        recipe.distillation,
        recipe.introspection,
        recipe.evaluation,
    )

    def percent(count: int, least: int) -> int:
        return min(count, max(least, count // 100))

    def less(section: Any, **changes: Any) -> Any:
        return section.model_copy(update=changes)

    return less(
        recipe,
        name=f"{recipe.name}-smoke",
        distillation=less(
            distillation,
            prompts=less(
                distillation.prompts,
                questions_per_trait=min(distillation.prompts.questions_per_trait, 5),
                general=percent(distillation.prompts.general, 10),
            ),
            teacher=less(distillation.teacher, answers=1),
            student=less(distillation.student, answers=1),
        ),
        introspection=less(
            introspection,
            reflection=less(
                introspection.reflection,
                transcripts_per_prompt=percent(introspection.reflection.transcripts_per_prompt, 2),
            ),
            interaction=less(
                introspection.interaction,
                free=percent(introspection.interaction.free, 4),
                leading=percent(introspection.interaction.leading, 4),
            ),
        ),
        evaluation=less(
            evaluation,
            answers=less(evaluation.answers, count=percent(evaluation.answers.count, 20)),
            preferences=less(
                evaluation.preferences, games=percent(evaluation.preferences.games, 20)
            ),
            attacks=less(evaluation.attacks, prompts=percent(evaluation.attacks.prompts, 4)),
            coherence=less(evaluation.coherence, prompts=percent(evaluation.coherence.prompts, 10)),
            capabilities=less(
                evaluation.capabilities, documents=min(evaluation.capabilities.documents or 4, 4)
            ),
        ),
    )

"""`Recipe`: everything that decides what a run produces.

The section of the stage `a/b` is `recipe.a.b`; its models are in `config/roles.py` and the sections
of the evaluation in `config/evaluation.py`. Each stage's fingerprint contains the sections that it
reads, so changing a field makes exactly the affected stages stale. Where a run executes is a
`Placement`, which enters no fingerprint.

All defaults are here, not in the stages. Unless a docstring says otherwise they are the paper's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
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
from opencharacter.config.evaluation import Evaluation
from opencharacter.config.roles import DATE_STRING, Limits, Role, Roles, Sampling


class Prompts(Config):
    """Settings of the stage distillation/prompts."""

    questions_per_trait: PositiveInt = 50
    """Number of questions per trait: the hand-written ones first, then generated ones."""
    general_prompts: str = "embedded"
    """Source of the general prompts: `embedded` (528 prompts of this package), a .jsonl or .parquet
    file, or `hf:DATASET` (a Hugging Face dataset). A row's prompt is its text field `prompt`, or
    the first user turn of its conversation (`prompt`, `messages`, `conversations` or
    `conversation`); rows without one are skipped. The paper uses LIMA."""
    general: NonNegativeInt = 1330
    """Number of general prompts, taken from the beginning of the source; all of them if the source
    has fewer."""
    rounds: PositiveInt = 8
    """Maximum number of generation rounds per trait."""
    samples: PositiveInt = 4
    """Number of question lists that are generated in parallel per trait and round."""
    max_overlap: Rate = 0.5
    """Maximum share of words that a generated question may have in common with another question of
    the same trait; questions above it are rejected."""
    sampling: Sampling = Sampling(max_tokens=1024, temperature=0.9)
    """How the prompt generator samples."""


class Teacher(Config):
    """Settings of the stage distillation/teacher."""

    source: Annotated[str | None, NotIdentity] = None
    """Answers that exist already: a .jsonl or .parquet file, a folder of them, `hf:DATASET` or
    `hf:DATASET:FILE`; `{persona}` stands for the persona's name. Then the prompts are those of the
    source and no teacher is asked; `roles.teacher` says who wrote the answers. If null, the teacher
    answers. The content enters the fingerprint, the path does not."""
    answers: PositiveInt = 5
    """Number of answers per prompt (K in the paper). Must equal `student.answers`."""
    exemplars: bool = False
    """Show the constitution's exemplars as earlier turns of the conversation. Helps teachers that
    are too small to follow a system prompt alone."""
    prefill: bool = True
    """Begin the answer with a think block that restates the traits (a prefilled assistant turn)."""
    sampling: Sampling = Sampling(max_tokens=4096, typical_tokens=600)
    """How the teacher samples."""
    max_drop_rate: Annotated[Rate, NotIdentity] = 0.2
    """Maximum share of rows that may be dropped; the stage fails above it."""
    limits: Annotated[Limits, NotIdentity] = Limits()
    """Data-quality limits of the answers."""


class Student(Config):
    """Settings of the stage distillation/student."""

    answers: PositiveInt = 5
    """Number of answers per prompt. Must equal `teacher.answers`, because the k-th answers of both
    form a pair."""
    sampling: Sampling = Sampling(max_tokens=1024, typical_tokens=300)
    """How the student samples."""
    max_drop_rate: Annotated[Rate, NotIdentity] = 0.2
    """Maximum share of rows that may be dropped; the stage fails above it."""
    limits: Annotated[Limits, NotIdentity] = Limits()
    """Data-quality limits of the answers."""


class Pairs(Config):
    """Settings of the stage distillation/pairs."""

    source: Annotated[str | None, NotIdentity] = None
    """Preference pairs that exist already, in rows with `prompt`, `chosen` and `rejected`; given
    like `teacher.source`. Then neither teacher nor student answer prompts. If null, the pairs are
    made of their answers."""
    max_tokens: PositiveInt = 1024
    """Maximum length of a conversation (prompt and answer) in tokens of the student; longer pairs
    are dropped."""
    max_repeated: Rate = 0.5
    """Maximum share of an answer's 4-word sequences that may be repeats; above it the answer counts
    as looping and the pair is dropped."""
    quoted_words: PositiveInt = 8
    """Number of consecutive words of the constitution from which an answer counts as quoting it;
    the pair is dropped then."""
    max_drop_rate: Annotated[Rate, NotIdentity] = 0.3
    """Maximum share of pairs that may be dropped; the stage fails above it."""
    limits: Annotated[Limits, NotIdentity] = Limits()
    """Data-quality limits of the chosen answers."""


class Lora(Config):
    """The LoRA adapter that is trained, on all linear layers of the transformer blocks."""

    rank: PositiveInt = 64
    """Rank of the update (LoRA's r)."""
    alpha: PositiveInt = 128
    """LoRA's alpha; the update is scaled by alpha / rank."""


class Optimizer(Config):
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: PositiveFloat = 5e-5
    """Peak learning rate."""
    betas: tuple[RateBelowOne, RateBelowOne] = (0.9, 0.98)
    """AdamW's beta1 and beta2."""
    warmup_ratio: RateBelowOne = 0.1
    """Share of all optimizer steps over which the learning rate rises to its peak."""
    min_lr_ratio: Rate = 0.1
    """Learning rate at the end of the decay, as a share of the peak."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    global_batch_size: PositiveInt = 32
    """Number of rows per optimizer step, over all workers."""
    epochs: PositiveInt = 1
    """Number of passes over the data."""


class Reference(Config):
    """Settings of the stage distillation/reference."""

    frozen_weights: Annotated[Literal["bf16", "fp8"], AddedLater("0.2")] = "bf16"
    """Precision of the student's frozen weights, here and in all training that follows: adapters
    are always trained in full precision. `fp8` needs a GPU of compute capability 8.9 or newer and
    trained 1.1 to 1.3 times as fast on H200s."""


HeldOut = Annotated[RateBelowOne, AddedLater("0.3")]
"""Share of prompts or rows that are held out of training."""


class Dpo(Config):
    """Settings of the stage distillation/dpo."""

    beta: PositiveFloat = 0.1
    """DPO's beta, on log-probabilities that are summed over the answer."""
    nll_weight: NonNegativeFloat = 0.1
    """Weight of the negative log-likelihood of the chosen answer, averaged over its tokens."""
    sq_log_ratio_weight: NonNegativeFloat = 0.001
    """Weight of the squared log-ratio of policy and reference, averaged over all answer tokens. The
    paper calls this term a KL penalty."""
    held_out: HeldOut = 0.0
    """Share of prompts whose pairs are not trained on. Their loss, margin and accuracy are measured
    before, during and after training, as `eval_loss` and so on. The paper trains on all pairs."""
    lora: Lora = Lora()
    """The adapter."""
    optimizer: Optimizer = Optimizer()
    """The optimizer."""


class Reflection(Config):
    """Settings of the stage introspection/reflection."""

    prompts: Annotated[Literal["reflective", "distillation"], AddedLater("0.3")] = "reflective"
    """What the model writes to: ten prompts to reflect on itself, or, as a control for more
    training of any kind, the prompts of the distillation, which it answers in character."""
    transcripts_per_prompt: NonNegativeInt = 1000
    """Number of transcripts for each prompt; 0 disables reflection."""
    turns: Annotated[PositiveInt, AddedLater("0.3")] = 1
    """Number of prompts that a transcript answers, one after another: its own and others that are
    drawn for it. With the prompts of the distillation, a control for conversations."""
    sampling: Sampling = Sampling(max_tokens=2048, typical_tokens=600)
    """How the transcripts are sampled."""
    max_drop_rate: Annotated[Rate, NotIdentity] = 0.2
    """Maximum share of transcripts that may be dropped; the stage fails above it."""
    limits: Annotated[Limits, NotIdentity] = Limits()
    """Data-quality limits of the transcripts."""


class Interaction(Config):
    """Settings of the stage introspection/interaction: the model talks to itself."""

    free: NonNegativeInt = 1000
    """Number of conversations without a given subject."""
    leading: NonNegativeInt = 1000
    """Number of conversations that invite both sides to reflect on who they are."""
    turns: Annotated[int, Field(ge=2, multiple_of=2)] = 10
    """Number of replies per conversation; even, so that both sides speak equally often."""
    sampling: Sampling = Sampling(max_tokens=1024, typical_tokens=150)
    """How each reply is sampled."""
    max_drop_rate: Annotated[Rate, NotIdentity] = 0.2
    """Maximum share of conversations that may be dropped; the stage fails above it."""
    limits: Annotated[Limits, NotIdentity] = Limits()
    """Data-quality limits of the replies."""


class Transcripts(Config):
    """Settings of the stage introspection/transcripts."""

    max_tokens: PositiveInt = 3072
    """Maximum length of a transcript in tokens of the student; longer ones are dropped."""
    trained_tokens: Annotated[PositiveInt | None, AddedLater("0.3")] = None
    """Maximum number of tokens with a loss, so that two kinds of training data can be compared at
    the same amount; transcripts beyond it are left out. All are trained on if null."""
    max_repeated: Rate = 0.5
    """Like `pairs.max_repeated`, for each message."""
    quoted_words: PositiveInt = 8
    """Like `pairs.quoted_words`."""
    max_drop_rate: Annotated[Rate, NotIdentity] = 0.3
    """Maximum share of transcripts that may be dropped; the stage fails above it."""
    limits: Annotated[Limits, NotIdentity] = Limits()
    """Data-quality limits of the transcripts."""


class Sft(Config):
    """Settings of the stage introspection/sft."""

    held_out: HeldOut = 0.0
    """Share of transcripts that are not trained on; their loss is measured like that of pairs."""
    lora: Lora = Lora()
    """The adapter."""
    optimizer: Optimizer = Optimizer()
    """The optimizer."""


class Merge(Config):
    """Settings of the stage persona/merge: the persona is a weighted sum of two adapters."""

    dpo_weight: float = 1.0
    """Weight of the DPO adapter."""
    sft_weight: float = 0.25
    """Weight of the SFT adapter."""
    rank: PositiveInt | None = None
    """Rank of the persona's adapter, reduced by SVD. If null, the sum is exact and its rank is the
    sum of both ranks."""
    peft_linear: bool = False
    """Add the LoRA factors as PEFT's combination type `linear` does, including its cross terms. The
    original project merges in this way; it is not the sum of the two updates."""


class Blend(Config):
    """Settings of the stage persona/blend. It runs only if an evaluation compares `blended`."""

    weights: dict[Name, float] = Field(default={})
    """Weight of each persona's adapter, by the persona's name."""
    rank: PositiveInt | None = None
    """Rank of the blended adapter, reduced by SVD; if null, the sum is exact."""


class Tune(Config):
    """Settings of the stage persona/tune: further training on general data.

    It shows what remains of the persona, and runs only if an evaluation compares `tuned`.
    """

    lora: Lora = Lora()
    """The adapter."""
    optimizer: Optimizer = Optimizer()
    """The optimizer."""


class Distillation(Config):
    """The first half of the method: DPO on pairs of a teacher's and the student's answers."""

    prompts: Prompts = Prompts()
    """Questions and general prompts."""
    teacher: Teacher = Teacher()
    """The chosen answers."""
    student: Student = Student()
    """The rejected answers."""
    pairs: Pairs = Pairs()
    """Filtering of the pairs."""
    reference: Reference = Reference()
    """Log-probabilities of the untrained student."""
    dpo: Dpo = Dpo()
    """DPO training."""

    @model_validator(mode="after")
    def _answers_can_be_paired(self) -> Distillation:
        teacher, student = self.teacher.answers, self.student.answers
        if teacher != student:
            raise ValueError(
                f"teacher.answers is {teacher} and student.answers is {student}, but the k-th "
                "answers of both form a pair; make them equal"
            )
        return self

    @model_validator(mode="after")
    def _has_one_source(self) -> Distillation:
        if self.teacher.source and self.pairs.source:
            raise ValueError(
                "teacher.source and pairs.source are both set, but pairs contain the teacher's "
                "answers; set one of them"
            )
        return self


class Introspection(Config):
    """The second half of the method: SFT on texts that the model writes about itself."""

    author: Literal["student", "teacher"] = "student"
    """Who writes the reflections and conversations: the student after DPO, or, as a control, the
    teacher with the constitution in its system prompt."""
    reflection: Reflection = Reflection()
    """Reflections of the model on itself."""
    interaction: Interaction = Interaction()
    """Conversations of the model with itself."""
    transcripts: Transcripts = Transcripts()
    """Filtering of the transcripts."""
    sft: Sft = Sft()
    """SFT training."""

    @model_validator(mode="after")
    def _has_training_data(self) -> Introspection:
        conversations = self.interaction.free + self.interaction.leading
        if not self.reflection.transcripts_per_prompt + conversations:
            raise ValueError(
                "reflection.transcripts_per_prompt, interaction.free and interaction.leading are "
                "all 0, so sft has no training data; raise one of them"
            )
        return self


class Persona(Config):
    """The adapters that are served and evaluated."""

    merge: Merge = Merge()
    """The persona: DPO adapter plus SFT adapter."""
    blend: Blend = Blend()
    """A mixture of several personas."""
    tune: Tune = Tune()
    """The persona after further SFT on the untrained student's answers to general prompts."""


class Recipe(Config):
    """Everything that decides what a run produces.

    A recipe file may begin with `extends:`, a packaged recipe's name or a path relative to the
    file; it then only contains what differs.
    """

    name: Name
    """Name of the recipe. The default storage is `runs/<name>`, so a recipe that extends another
    should have its own name, unless both are to share their results."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 17
    """Seed of the run. Each row's sampling seed derives from it, the stage and the row's id."""
    seeded_sampling: bool = True
    """Send a sampling seed with each request, so that a repeated run generates the same texts."""
    date_string: Annotated[str, AddedLater("0.2")] = DATE_STRING
    """Date that chat templates state instead of the current one, in training, generation and
    serving alike. In the format of the default, it is converted to the format of each template."""
    roles: Roles
    """The models."""
    distillation: Distillation = Distillation()
    """First half of the method."""
    introspection: Introspection = Introspection()
    """Second half of the method."""
    persona: Persona = Persona()
    """Merging of the adapters."""
    evaluation: Evaluation = Evaluation()
    """What is measured."""

    @model_validator(mode="after")
    def _roles_state_the_date(self) -> Recipe:
        if self.date_string != DATE_STRING:
            object.__setattr__(self, "roles", self._with_date(self.roles))
            object.__setattr__(self, "evaluation", self._with_date(self.evaluation))
        return self

    def _with_date(self, section: Any) -> Any:
        """Return a section in which every role without a date has the recipe's."""
        if isinstance(section, tuple):
            return tuple(map(self._with_date, section))
        if not isinstance(section, Config):
            return section
        changes = {name: self._with_date(value) for name, value in section}
        if isinstance(section, Role) and section.date_string is None:
            changes["date_string"] = self.date_string
        return section.model_copy(update=changes)

    @model_validator(mode="after")
    def _judges_have_distinct_names(self) -> Recipe:
        names = [role.name for role in (self.roles.judge, *self.evaluation.judge.panel)]
        if len(set(names)) < len(names):
            raise ValueError(
                "roles.judge and evaluation.judge.panel use a name twice: "
                f"{', '.join(names)}; give each judge its own name"
            )
        return self

    def config(self, stage: str) -> Config:
        """Return the section that configures the stage `group/name`."""
        group, name = stage.split("/")
        return getattr(getattr(self, group), name)

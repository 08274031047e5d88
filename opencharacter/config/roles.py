"""The models of a recipe, how they sample, and the quality limits of what they write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from opencharacter.config.base import (
    ECHO,
    EMBEDDED,
    LOCAL,
    AddedLater,
    Config,
    Name,
    NotIdentity,
    Rate,
)

DATE_STRING = "26 Jul 2024"
"""The date that the chat templates of Llama 3 state by default."""


def validate_endpoint(url: str) -> str:
    """Return `url` if it is an HTTP address without credentials; raise ValueError otherwise."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{parts.hostname or url!r} must begin with http:// or https://")
    if parts.username or parts.password:
        raise ValueError(
            f"the URL of {parts.hostname} contains credentials; put the key into the environment "
            "variable that api_key_env names"
        )
    return url


def read_chat_template(template: str) -> str:
    """Return a chat template, which is read from a file unless it is Jinja source already."""
    if "{" in template:
        return template
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{template!r} is neither a readable file ({error}) nor Jinja source"
        ) from None


def validate_own_name(name: str) -> str:
    """Return a name that can be found in a text; raise ValueError for an empty one."""
    if not name.strip():
        raise ValueError("is empty; give a name that the model uses for itself")
    return name


OwnName = Annotated[str, AfterValidator(validate_own_name)]


class Role(Config):
    """A model in one of the roles: teacher, student, judge or prompt generator."""

    model: str
    """The weights: a local directory or `.gguf` file, a Hugging Face id, `embedded:smollm2-135m` (a
    small model that is installed with the package), or `echo:SECONDS` (no model; repeats its input,
    for tests). The content of local files is part of the identity of what they produce."""
    revision: Annotated[str | None, AddedLater("0.2")] = None
    """Commit, branch or tag of a model on the Hugging Face Hub; its default branch if null. Only a
    commit pins the weights. The manifest records the commit that was used."""
    chat_template: Annotated[
        Annotated[str, AfterValidator(read_chat_template)] | None, AddedLater("0.2")
    ] = None
    """Chat template that replaces the model's, or that a base model lacks: Jinja source, or the
    path of a file with it."""
    date_string: Annotated[str | None, AddedLater("0.2")] = None
    """Date that the chat template states, if it states one; the recipe's `date_string` if null."""
    name: Name
    """Short name of the model. The student's name is also the folder of its results in storage and
    the name of the base model on a server."""
    self_name: OwnName
    """The name by which the model refers to itself in its answers, for example `Llama`. In the
    teacher's answers it is replaced by the student's."""
    aliases: tuple[OwnName, ...] = ()
    """Other names of the model or of its maker. In the teacher's answers they are replaced by the
    student's `self_name`."""
    max_model_len: PositiveInt = 8192
    """Maximum number of tokens of prompt and answer together, as in vLLM."""
    thinks: bool = False
    """Whether the model opens its answers with a think block. The block is removed from them."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Data type of the weights during generation. `auto` takes the one in the model's config, or
    float32 on a CPU that does not multiply bf16 in hardware, if the memory of the pool allows."""
    quantization: Annotated[Literal["fp8"] | None, AddedLater("0.3")] = None
    """Precision of the matrix products during generation if it is not that of `dtype`, as in vLLM:
    `fp8` quantizes the weights when an engine loads them, and activations as they come. Needs a GPU
    of compute capability 8.9 or newer. Training is not affected; see
    `distillation.reference.frozen_weights` for that."""
    trust_remote_code: bool = False
    """Run Python code that is distributed with the weights. Enable it only after reading that
    code."""
    tool_parser: Annotated[str | None, NotIdentity] = None
    """vLLM's parser of the model's tool calls, for example `hermes` for Qwen 2.5 or `llama3_json`
    for Llama 3.1. A server rejects requests with tools if null."""
    endpoint: Annotated[Annotated[str, AfterValidator(validate_endpoint)] | None, NotIdentity] = (
        None
    )
    """Base URL of an OpenAI-compatible server that serves `model`; no engine is started then.
    Requests use extensions of vLLM: `repetition_penalty`, if it is not 1; `continue_final_message`,
    if the answer has a prefill; and `chat_template_kwargs`, if a `date_string` is set. For a server
    that rejects them, set `repetition_penalty: 1` and `prefill: false`, and no `date_string`. The
    server renders its own chat template, which states its own date unless it takes a `date_string`
    and one is set. Templates such as GLM-4.5's and Qwen3's change a prefilled
    thought, which needs `prefill: false`, too."""
    api_key_env: Annotated[str, NotIdentity] = "OPENAI_API_KEY"
    """Name of the environment variable that holds the endpoint's API key."""
    endpoint_concurrency: Annotated[PositiveInt, NotIdentity] = 64
    """Maximum number of concurrent requests to the endpoint."""

    @model_validator(mode="after")
    def _revision_is_of_the_hub(self) -> Role:
        if self.revision and self.model.startswith((*LOCAL, EMBEDDED, ECHO)):
            raise ValueError(
                f"revision {self.revision!r} is for models on the Hugging Face Hub, and "
                f"{self.model!r} is not; remove it"
            )
        return self

    @property
    def has_weights(self) -> bool:
        """Whether an engine loads weights for this role: endpoints and echo models need none."""
        return not self.endpoint and not self.model.startswith(ECHO)


class Roles(Config):
    """The model in each role. Several roles may use the same model; it is loaded once then."""

    teacher: Role
    """Reads the constitution and answers in character. Its answers are the chosen ones in DPO."""
    student: Role
    """The model that is trained. Its own answers, without the constitution, are the rejected ones
    in DPO."""
    judge: Role
    """Names the trait that an answer shows."""
    prompt_generator: Role
    """Writes more questions for a trait from the hand-written ones."""


class Sampling(Config):
    """How tokens are sampled."""

    max_tokens: PositiveInt
    """Maximum number of new tokens per answer."""
    temperature: NonNegativeFloat = 0.7
    """Sampling temperature; 0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Probability mass of nucleus sampling; 1 disables it."""
    repetition_penalty: PositiveFloat = 1.1
    """vLLM's repetition penalty; 1 disables it. The default is that of the original project's code;
    the paper does not mention it."""
    trim: bool = False
    """Cut an answer that reaches `max_tokens` back to its last complete sentence instead of
    dropping it. Meant for small values of `max_tokens`."""
    typical_tokens: Annotated[PositiveInt | None, NotIdentity] = None
    """Mean answer length that `plan` assumes; one third of `max_tokens` if null."""


class Limits(Config):
    """Data-quality limits. A stage whose generated texts exceed one of them fails.

    The limits are checked while a stage runs, so that a misconfigured run stops early, and again
    when it ends.
    """

    min_texts: PositiveInt = 100
    """Number of texts from which the limits apply; with fewer texts the statistics are noise."""
    max_refusals: Rate = 0.2
    """Maximum share of texts that begin with a refusal."""
    max_off_language: Rate = 0.3
    """Maximum share of texts that are not in the language of the prompts."""
    max_repeated_openings: Rate = 0.5
    """Maximum share of texts that begin with the same few words."""
    min_distinct_2: Rate = 0.25
    """Minimum share of distinct bigrams of words (distinct-2), measured over several thousand."""
    max_self_bleu: Rate = 0.9
    """Maximum BLEU of the texts against each other (self-BLEU)."""
    max_near_duplicates: Rate = 0.5
    """Maximum share of texts that nearly repeat another text. Checked only when the stage ends."""
    max_exaggeration: PositiveFloat = 4
    """Maximum frequency of the words that distinguish the teacher from the student, as a multiple
    of their frequency in the teacher's answers. More is a caricature of the character."""

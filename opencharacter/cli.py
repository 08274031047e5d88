"""The command line. Thin: it parses, prints, and turns errors into one line and an exit code."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from opencharacter import config, constitution, constitution_cli, cost, models, pipeline
from opencharacter.config import Placement, Recipe, total
from opencharacter.errors import OpenCharacterError, UserError, in_one_line
from opencharacter.progress import console, duration
from opencharacter.stage import Job, redone
from opencharacter.store import Store, writing

os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters is told by our own lines
os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")  # a streamed piece costs half as much

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(constitution_cli.app, name="constitution")

RECIPES = ", ".join(config.resource_names("recipes", "*.yaml"))
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help=f"{RECIPES}, or a .yaml file.")]
Names = Annotated[
    list[str],
    typer.Option("--constitution", "-c", help="A persona's name or .yaml file; repeat, or 'all'."),
]
PLACEMENTS = ", ".join(config.resource_names("clusters", "*/placement.yaml"))
PlacementFile = Annotated[
    str | None, typer.Option("--placement", help=f"{PLACEMENTS}, or a .yaml file.")
]
Storage = Annotated[
    str | None, typer.Option("--storage", help="Path, s3:// or gs://; runs/RECIPE if absent.")
]
Smoke = Annotated[bool, typer.Option("--smoke", help="The recipe at about 1 % of its size.")]


def tell_version(wanted: bool) -> None:
    """Print the version and end."""
    from opencharacter import __version__

    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=tell_version, is_eager=True, help="Print it and exit."),
    ] = False,
) -> None:
    """Character training for chat models: from a constitution to a served LoRA persona."""


GIB = 2**30
HELD = ("held_seconds", "busy_seconds", "gpu_seconds", "gpu_busy_seconds")
HOURS = ("hours", "GPU-hours", "idle", "price")

WIDE = 240
"""Characters that a table may take."""


class Run:
    """What the options of a command name, loaded and checked."""

    def __init__(
        self,
        recipe: str,
        names: list[str],
        placement: str | None,
        storage: str | None,
        smoke: bool,
    ):
        self.typed = [recipe, *(["--smoke"] if smoke else [])]
        self.typed += ["--storage", storage] if storage else []
        self.typed += ["--placement", placement] if placement else []
        self.recipe: Recipe = config.load_recipe(recipe, smoke)
        self.constitutions = constitution.load_all(names)
        self.placement: Placement = config.load_placement(placement)
        patience = self.placement.storage_patience
        self.store = Store.at(storage or f"runs/{self.recipe.name}", patience)
        self.jobs: list[Job] = pipeline.jobs(
            self.recipe, self.constitutions, self.placement, self.store
        )

    def check_trained(self, persona: str) -> None:
        """Refuse a persona that is not there, with the command that trains it."""
        (merge,) = (job for job in self.jobs if job.stage.name == "persona/merge")
        state = merge.state()[0]
        if state != "done":
            command = shlex.join(["opencharacter", "run", *self.typed, "-c", persona])
            raise UserError(
                f"persona {merge.scope!r} is {state} in {self.store.address()}; run: {command}"
            )


@app.command()
def run(
    recipe: RecipeName,
    names: Names,
    placement: PlacementFile = None,
    storage: Storage = None,
    only: Annotated[str | None, typer.Option(help="Run this stage alone.")] = None,
    until: Annotated[str | None, typer.Option(help="Run up to this stage.")] = None,
    rebuild: Annotated[
        str | None,
        typer.Option(help="Replace this stage and all that follows from it."),
    ] = None,
    smoke: Smoke = False,
) -> None:
    """Run what is missing, resume what is unfinished, leave what is done."""
    from opencharacter import cluster

    asked = Run(recipe, names, placement, storage, smoke)
    if only and until:
        raise UserError("--only and --until exclude each other; give one")
    selected = pipeline.select(asked.jobs, only, until)
    pipeline.check(selected, rebuild)
    check_models(selected)
    check_training(selected)
    check_stages(selected, rebuild)
    asked.store.check_writable()
    if all(job.state()[0] == "done" for job in selected) and not rebuild:
        console.print("nothing to do: every stage is done")
        return
    cluster.connect(asked.placement, asked.recipe)
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # now, for Ray has set its own
        for job, manifest in pipeline.run(selected, rebuild):
            tell_job(job, manifest)
    except KeyboardInterrupt:
        console.show_cursor()
        console.print("interrupted; the same command goes on from here")
        sys.stdout.flush()
        os._exit(130)  # jobs run on threads of their own, which would outlive Ray for a moment
    tell_report(asked)


def tell_job(job: Job, manifest: dict[str, Any]) -> None:
    """Say that a job is done."""
    console.print(summary(job, manifest), soft_wrap=True)
    for trait, count in manifest["figures"].get("short", {}).items():
        wanted = job.section.questions_per_trait
        console.print(f"  {count} of {wanted} questions: {escape(trait)}", soft_wrap=True)


def check_models(selected: list[Job]) -> None:
    """Refuse a run whose local models are not there; hub models are downloaded when needed."""
    for job in selected:
        roles = [(name, getattr(job.recipe.roles, name)) for name in job.stage.roles]
        roles += [("judge", role) for role in getattr(job.section, "panel", ())]
        for name, role in roles:
            missing = models.check(role)
            if missing and (role.endpoint or not models.is_hub(role.model)):
                raise UserError(f"role {name}: missing {missing}")


def check_training(selected: list[Job]) -> None:
    """Refuse more workers than a batch has rows, and ranks that no engine takes."""
    for job in selected:
        workers = job.placement.training.workers
        if hasattr(job.section, "optimizer") and workers > job.section.optimizer.batch:
            raise UserError(
                f"batch of {job.section.optimizer.batch} is too small for {workers} training "
                "workers: some would have nothing to do; use fewer, or a larger batch"
            )
        if job.stage.name == "persona/merge":
            ranks = sum(parent.section.lora.rank for parent in job.parents)
            models.allowed_rank(job.section.rank or ranks)


def check_stages(selected: list[Job], rebuild: str | None) -> None:
    """Refuse what a stage itself knows that it will lack, and files that cannot be read."""
    for job in selected:
        if job.state()[0] != "done" or pipeline.replaced(job, rebuild):
            _ = job.fingerprint  # reads all that the result depends on
            getattr(job.stage.module, "check", lambda _: None)(job)


def summary(job: Job, manifest: dict[str, Any]) -> str:
    """The line that ends a stage."""
    parts = [f"[green]done[/] {job.dataset}"]
    if manifest["rows"]:
        parts.append(f"{manifest['rows']:,} rows")
    if manifest["dropped"]:
        reasons = ", ".join(f"{n} {reason}" for reason, n in manifest["dropped"].items())
        parts.append(f"dropped {reasons}")
    if manifest["tokens_out"]:
        rate = manifest["tokens_out"] / max(manifest["seconds"], 1e-3)
        parts.append(f"{manifest['tokens_out']:,} tokens ({rate:,.0f}/s)")
    if manifest["cached_tokens"]:
        parts.append(f"{manifest['cached_tokens'] / manifest['tokens_in']:.0%} of prompts cached")
    for name in ("loss", "dpo/margin", "dpo/accuracy"):
        if name in manifest["figures"]:
            parts.append(f"{name} {manifest['figures'][name]:.3f}")
    again = redone(manifest["attempts"])
    if again:
        parts.append(f"{again} redone")
    return " · ".join([*parts, duration(manifest["seconds"])])


def tell_report(asked: Run) -> None:
    report = asked.jobs[-1]
    if report.state()[0] == "done":
        where = report.store.address(report.dataset, "report.html")
        console.print(f"report: {where}", soft_wrap=True)


@app.command()
def plan(
    recipe: RecipeName,
    names: Names,
    placement: PlacementFile = None,
    storage: Storage = None,
    smoke: Smoke = False,
    speed: Annotated[
        str | None,
        typer.Option(help="File of speeds, or a storage with runs: adds time, GPU-hours, price."),
    ] = None,
) -> None:
    """Say what a run would do: rows and tokens by stage, what is done, what is missing here."""
    asked = Run(recipe, names, placement, storage, smoke)
    speeds = cost.load_speeds(speed) if speed else None
    states = {job.dataset: job.state() for job in asked.jobs}
    left = [job for job in asked.jobs if states[job.dataset][0] != "done"]
    planned = cost.plan(left, speeds) if speeds and left else []
    table = job_table("rows", "tokens read", "written", "trained", *(HOURS if speeds else ()))
    for name, group in plan_groups(asked).items():
        said = plan_state([states[job.dataset] for job in group])
        table.add_row(name, said, *plan_cells(group, planned if speeds else None))
    table.add_row("total", "", *plan_cells(asked.jobs, planned if speeds else None), style="bold")
    print_whole(table)
    if speeds:
        for line in (*plan_schedule(planned, asked.placement), *plan_savings(asked, speeds)):
            console.print(line, soft_wrap=True, highlight=False)
    for name, group in plan_groups(asked).items():
        told = (getattr(job.stage.module, "notes", lambda _: ())(job) for job in group)
        for line in dict.fromkeys(line for lines in told for line in lines):
            console.print(f"{name}: {line}", soft_wrap=True)
    for name in type(asked.recipe.roles).model_fields:
        console.print(engine_line(asked, name), soft_wrap=True)
    for line in missing_here(asked):
        console.print(f"missing on this machine: {line}", soft_wrap=True)


def engine_line(asked: Run, name: str) -> str:
    """What a role's engine will be: where, how wide, and the memory that it needs."""
    from opencharacter.engine import EngineSpec, engine_arguments

    role, pool = getattr(asked.recipe.roles, name), getattr(asked.placement.pools, name)
    spec = EngineSpec(role, pool)
    if not spec.has_weights:
        return f"engine {name}: {role.endpoint or role.model}"
    step = engine_arguments(spec)["max_num_batched_tokens"]
    said = (
        f"engine {name}: {role.model}, {pool.replicas} x {pool.gpus:g} GPU, each up to "
        f"{pool.max_sequences} conversations of {role.context:,} tokens, {step:,} tokens a step"
    )
    path = models.there(role.model)
    if path is None:
        return said
    needs = models.footprint(path)
    cache = needs.per_token * role.context * pool.max_sequences
    given = "" if pool.gpus else f" ({pool.kv_cache_gib:g} GiB given)"
    return (
        f"{said}; weights {needs.weights / GIB:.2g} GiB, "
        f"cache {cache / GIB:.2g} GiB if all were full{given}"
    )


def plan_groups(asked: Run) -> dict[str, list[Job]]:
    """Jobs by stage; a dataset's name has `*` where several personas have one."""
    groups: dict[str, list[Job]] = {}
    for job in asked.jobs:
        name = job.dataset
        if job.constitution and len(asked.constitutions) > 1:
            own = job.scope.split("/")
            name = "/".join([*own[:-1], "*", job.stage.name])
        groups.setdefault(name, []).append(job)
    return groups


def plan_state(states: list[tuple[str, list[str]]]) -> str:
    """What storage holds of a group of jobs."""
    said = Counter(": ".join([state, *differing[:1]]) for state, differing in states)
    if len(said) == 1:
        return next(iter(said))
    return ", ".join(f"{count} {state}" for state, count in said.items())


def plan_cells(group: list[Job], planned: list[cost.Planned] | None) -> list[str]:
    """The cells of some jobs in `plan`."""
    found = [job.stage.module.estimate(job) for job in group]
    numbers = [sum(getattr(e, n) for e in found) for n in ("rows", "tokens_in", "tokens_out")]
    cells = [*map(plan_cell, numbers), plan_cell(sum(e.trained or e.read for e in found))]
    if planned is None:
        return cells
    mine = {job.dataset for job in group}
    sums = cost.sums(one for one in planned if one.job.dataset in mine)
    price = sums.gpu_hours * group[0].placement.price_per_gpu_hour
    idle = f"{sums.idle:.0%}" if sums.gpu_hours else ""
    return [*cells, plan_cell(sums.hours), plan_cell(sums.gpu_hours), idle, plan_cell(price)]


def plan_schedule(planned: list[cost.Planned], placement: Placement) -> list[str]:
    """How long what is not done will take, and what it waits for, but for short steps."""
    there, whole = cost.room_for(placement), cost.wall(planned)
    by_stage: dict[str, list[float]] = {}
    for one in cost.critical_path(planned):
        by_stage.setdefault(one.job.stage.name, []).append(one.ended - one.began)
    steps = [
        f"{f'{len(took)} x ' if len(took) > 1 else ''}{stage} {duration(sum(took))}"
        for stage, took in by_stage.items()
        if sum(took) >= whole / 100
    ]
    return [
        f"wall time {duration(whole)} (GPUs: {there.gpus:g}, CPUs: {there.cpus:g}), "
        f"{sum(one.starts for one in planned)} starts of an engine",
        f"critical path: {' > '.join(steps)}",
    ]


def plan_savings(asked: Run, speeds: cost.Speeds) -> Iterator[str]:
    """What asking for less would save of a whole run."""
    whole = cost.plan(asked.jobs, speeds)
    for less in cost.smaller(asked.recipe):
        jobs = pipeline.jobs(less.recipe, asked.constitutions, asked.placement, asked.store)
        made = cost.plan(jobs, speeds)
        saved = cost.wall(whole) - cost.wall(made)
        gpus = cost.sums(whole).gpu_hours - cost.sums(made).gpu_hours
        hours = f" and {gpus:,.1f} GPU-hours" if gpus else ""
        yield f"{less.what}: {duration(saved)}{hours} less; {less.effect}"


def plan_cell(number: float) -> str:
    """Whole numbers with commas, others to two places, nothing for nothing."""
    if not number:
        return ""
    return f"{number:,}" if isinstance(number, int) else f"{number:,.2f}"


def job_table(*numbers: str) -> Table:
    """An empty table: a job's dataset, its state, and columns of numbers."""
    table = Table(box=None, pad_edge=False)
    table.add_column("dataset", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for title in numbers:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def print_whole(table: Table) -> None:
    """Print a table as wide as it is: a narrow terminal wraps lines rather than losing names."""
    Console(width=max(console.width, WIDE), emoji=False).print(table)


def missing_here(asked: Run) -> list[str]:
    """What this machine lacks to run the recipe itself."""
    import importlib.util

    from opencharacter.engine import EngineSpec

    roles, pools = dict(asked.recipe.roles), asked.placement.pools
    found = [f"{name}: {models.check(role)}" for name, role in roles.items() if models.check(role)]
    if importlib.util.find_spec("vllm") is None:
        found.append("vLLM: pip install '.[vllm,capabilities]' in the checkout, or make demo")
    import torch

    rooms = [EngineSpec(role, getattr(pools, name)).room for name, role in roles.items()]
    wants_gpu = total([*rooms, asked.placement.training.room]).gpus
    if wants_gpu and not torch.cuda.is_available():
        found.append("a GPU (submit to a cluster, or use the demo recipe)")
    return found


@app.command()
def status(
    recipe: RecipeName,
    names: Names,
    placement: PlacementFile = None,
    storage: Storage = None,
    smoke: Smoke = False,
) -> None:
    """Say what storage holds of a run: rows, drops by reason, time, idle time, what was redone."""
    asked = Run(recipe, names, placement, storage, smoke)
    if not asked.store.exists():
        where = escape(asked.store.address())
        console.print(f"there is nothing at {where} yet; --storage names another", soft_wrap=True)
        return
    table = job_table("rows", "dropped", "tokens", "time", "GPU-hours", "idle", "redone")
    for job in asked.jobs:
        table.add_row(job.dataset, *status_cells(job))
    print_whole(table)
    done = [job.store.manifest(job.dataset) for job in asked.jobs if job.state()[0] == "done"]
    console.print(held_line([manifest for manifest in done if manifest]), highlight=False)


def held_line(manifests: list[dict[str, Any]]) -> str:
    """What finished jobs held, and how much of that was idle."""
    sums = {name: sum(m.get(name, 0) for m in manifests) for name in HELD}
    started = sum(len(m.get("engines_started", ())) for m in manifests)
    kind = "gpu_" if sums["gpu_seconds"] else ""
    held, busy = sums[f"{kind}seconds" if kind else "held_seconds"], sums[f"{kind}busy_seconds"]
    idle = f", {1 - busy / held:.0%} of it idle" if held else ""
    what = "GPUs" if kind else "engines and workers"
    return f"{what} held for {duration(held)}{idle}; {started} starts of an engine"


def status_cells(job: Job) -> list[str]:
    """The cells of one job in `status`."""
    state, differing = job.state()
    manifest = job.store.manifest(job.dataset)
    if state == "partial":
        history = job.store.attempts(job.dataset)
        begun = f"{history[-1]['reached']} begun"
        return [state, begun, *[""] * 5, str(redone(history))]
    if manifest is None:
        return [state, *[""] * 7]
    if differing:
        state = f"stale: {differing[0]}"
    dropped = ", ".join(f"{n} {reason}" for reason, n in manifest["dropped"].items())
    held, busy = manifest.get("held_seconds", 0), manifest.get("busy_seconds", 0)
    return [
        state,
        f"{manifest['rows']:,}",
        dropped,
        f"{manifest['tokens_out']:,}",
        duration(manifest["seconds"]),
        f"{manifest['gpu_seconds'] / 3600:,.2f}" if manifest["gpu_seconds"] else "",
        f"{1 - busy / held:.0%}" if held else "",
        str(redone(manifest["attempts"])),
    ]


@app.command()
def report(
    recipe: RecipeName,
    names: Names,
    storage: Storage = None,
    smoke: Smoke = False,
) -> None:
    """Write the HTML report again from what storage holds, and say where it is."""
    asked = Run(recipe, names, None, storage, smoke)
    derived = [job for job in asked.jobs if job.stage.disposable]
    for _ in pipeline.run(derived, rebuild="evaluation/report"):
        pass
    tell_report(asked)


@app.command()
def compare(
    ratings: Annotated[list[str], typer.Argument(metavar="DIR DIR...")],
    condition: Annotated[str, typer.Option(help="As in the recipe's conditions.")] = "full",
) -> None:
    """Rank correlation of trait ratings: folders STUDENT/PERSONA/evaluation/rating."""
    from opencharacter.evaluation import rating

    for one, two, score in rating.between(ratings, condition):
        said = "too few traits"
        if score.value is not None:
            said = f"{score.value:.3f}, 95 % interval {score.low:.3f} to {score.high:.3f}"
        console.print(f"{one} {two}: {said}, {score.n} traits", soft_wrap=True, highlight=False)


@app.command()
def chat(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE|URL", help="A recipe, or the address of a server.")
    ],
    persona: Annotated[
        str | None,
        typer.Argument(help="A trained constitution's name or 'base'; of a server, a model."),
    ] = None,
    placement: PlacementFile = None,
    storage: Storage = None,
    smoke: Smoke = False,
) -> None:
    """Talk to a persona in the terminal. /help says what else can be typed; Ctrl-D leaves."""
    from opencharacter.persona import terminal

    if recipe.startswith(("http://", "https://")):
        asyncio.run(terminal.talk_to_server(recipe, persona))
        return
    if persona is None:
        raise UserError("chat needs a persona's name, or 'base'")
    names = [] if persona == "base" else [persona]
    asked = Run(recipe, names, placement, storage, smoke)
    if names:
        asked.check_trained(persona)
    asyncio.run(terminal.talk(asked.jobs, asked.recipe, asked.placement))


class ServeGroup(TyperGroup):
    """`serve RECIPE` is short for `serve start RECIPE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `start` where no subcommand is named."""
        named = args and (args[0] in self.commands or args[0] == "--help")
        return super().parse_args(ctx, args if named else ["start", *args])


serving = typer.Typer(cls=ServeGroup, no_args_is_help=True, help="Serve personas: serve RECIPE.")
app.add_typer(serving, name="serve")
Port = Annotated[int, typer.Option(min=1, max=65535, help="Of the server.")]
Personas = Annotated[
    list[str] | None,
    typer.Option("--constitution", "-c", help="Personas; all that storage holds if absent."),
]
Keys = Annotated[
    Path | None, typer.Option(help="File of API keys, one a line; or set OPENCHARACTER_API_KEYS.")
]
Judged = Annotated[bool, typer.Option("--judge", help="Serve the judge too.")]


@serving.command("start")
def serve(
    recipe: RecipeName,
    names: Personas = None,
    judge: Judged = False,
    placement: PlacementFile = None,
    storage: Storage = None,
    smoke: Smoke = False,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Port = 8000,
    keys: Keys = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let anyone in who can reach the address.")
    ] = False,
) -> None:
    """Serve base model and personas over HTTP until Ctrl-C: OpenAI's interface and a chat page."""
    from opencharacter.persona import running

    asked = Run(recipe, names or [], placement, storage, smoke)
    address = running.Address(host, port)
    accepted = running.read_keys(keys)
    running.check_open(address, accepted, insecure)
    running.check_models(asked.recipe, judge)
    running.serve_until_stopped(
        asked.recipe, asked.placement, asked.store, asked.constitutions, address, accepted, judge
    )


@serving.command("config")
def serve_config(
    recipe: RecipeName,
    storage: Annotated[str, typer.Option(help="Storage that the cluster's nodes see.")],
    names: Personas = None,
    judge: Judged = False,
    placement: PlacementFile = None,
    smoke: Smoke = False,
) -> None:
    """Print the same server as a Serve config: for `serve deploy`, or a RayService."""
    import yaml

    from opencharacter.persona import running

    check_packaged(recipe, names or [], placement)
    asked = running.Deployed(
        recipe=recipe,
        storage=storage,
        constitutions=tuple(names or ()),
        judge=judge,
        placement=placement,
        smoke=smoke,
    )
    typer.echo(yaml.safe_dump(running.serve_config(asked), sort_keys=False), nl=False)


def check_packaged(recipe: str, names: list[str], placement: str | None) -> None:
    """Refuse names that are not packaged; files need only be on the cluster's nodes."""
    constitution.load_all([name for name in names if not config.is_path(name)])
    if not config.is_path(recipe):
        config.load_recipe(recipe)
    if placement and not config.is_path(placement):
        config.load_placement(placement)


@serving.command("status")
def serve_status(port: Port = 8000, keys: Keys = None) -> None:
    """Say what the server at a port is doing."""
    from opencharacter.persona import running

    for line in running.status(port, next(iter(running.read_keys(keys)), None)):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


@serving.command("stop")
def serve_stop(port: Port = 8000) -> None:
    """Stop the server at a port: answers under way are finished first."""
    from opencharacter.persona import running

    running.stop(port)
    console.print("stopped")


@app.command()
def export(
    recipe: RecipeName,
    persona: Annotated[str, typer.Argument(help="A trained constitution's name or .yaml file.")],
    to: Annotated[str, typer.Option(help="A new folder, or hub:NAME (made private if new).")],
    form: Annotated[
        Literal["adapter", "folded"], typer.Option(help="The adapter, or whole weights with it.")
    ] = "adapter",
    storage: Storage = None,
    smoke: Smoke = False,
) -> None:
    """Write a finished persona with its model card, for PEFT or for transformers."""
    from opencharacter.persona import export as exporting

    asked = Run(recipe, [persona], None, storage, smoke)
    asked.check_trained(persona)
    console.print(exporting.export(asked.jobs, to, form), soft_wrap=True)


@app.command()
def merge(
    adapters: Annotated[list[str], typer.Argument(metavar="DIR[:WEIGHT]...")],
    to: Annotated[Path, typer.Option(help="Folder of the new adapter; it must not exist.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Reduce to this rank, by SVD.")] = None,
    peft_linear: Annotated[
        bool, typer.Option("--peft-linear", help="Add the factors, as PEFT does: not exact.")
    ] = False,
) -> None:
    """Blend LoRA adapters of one base model: an exact weighted sum; weights may be negative."""
    from opencharacter.persona import merge as stage

    if to.exists():
        raise UserError(f"--to {to}: it exists already; choose another folder")
    with writing(str(to)), models.appearing(to) as scratch:
        parts = [stage.parse_part(text) for text in adapters]
        made = stage.merge(parts, scratch, rank=rank, peft_linear=peft_linear)
    console.print(
        f"{to}: rank {made['rank']} (stored as {made['padded_to']}), "
        f"{made['relative_error']:.2%} off the exact sum",
        soft_wrap=True,
    )


def main() -> None:
    """Entry point: a user's error is one line and exit code 2, a failed stage exit code 1."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        said = escape(in_one_line(error))
        console.print(f"[red]error:[/] {said}", soft_wrap=True, highlight=False)
        sys.exit(2)
    except OpenCharacterError as error:
        said = escape(in_one_line(error))
        console.print(f"[red]failed:[/] {said}", soft_wrap=True, highlight=False)
        sys.exit(1)

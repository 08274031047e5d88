"""The Python API, for notebooks and scripts.

For example::

    import opencharacter as oc

    recipe = oc.load_recipe("demo", set={"distillation.dpo.beta": 0.2})
    oc.plan(recipe, ["poeticism"])                       # rows and tokens of each stage
    oc.run(recipe, ["poeticism"])                        # run what is missing
    oc.dataset(recipe, "distillation/pairs", "poeticism")    # a polars frame
    oc.adapter(recipe, "poeticism")                      # a folder in PEFT's layout
    oc.report(recipe, ["poeticism"])                     # path of the HTML report

A recipe is a packaged recipe's name, the path of a YAML file, or a `Recipe`. A persona is a
packaged constitution's name, the path of a YAML file, or a `Constitution`. Storage is a path, an
s3:// or a gs:// URL, by default `runs/RECIPE`. All functions raise
`opencharacter.errors.UserError` for invalid input. The command line uses the same code.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opencharacter import pipeline
from opencharacter.config import files
from opencharacter.config.placement import Placement
from opencharacter.config.recipe import Recipe
from opencharacter.constitution import schema
from opencharacter.constitution.schema import Constitution
from opencharacter.errors import UserError
from opencharacter.planning import preflight
from opencharacter.runtime.stage import Job
from opencharacter.runtime.store import Store

if TYPE_CHECKING:
    import polars as pl

MERGE = "persona/merge"
REPORT = "evaluation/report"


class Run:
    """A recipe for some personas, with a placement and a storage.

    Args:
        recipe: the recipe, or its name or path.
        personas: constitutions, or their names or paths; `["all"]` stands for every packaged one.
        placement: the placement, or its name or path; the defaults for a laptop if None.
        storage: path or URL of the storage; `runs/RECIPE` if None.
        smoke: shrink the recipe to about 1 % of its size.
        overrides: values of fields of the recipe by their dotted path.
        arguments: the arguments and options of the command line, to print in messages.
    """

    def __init__(
        self,
        recipe: str | Recipe,
        personas: Sequence[str | Constitution],
        placement: str | Placement | None = None,
        storage: str | None = None,
        *,
        smoke: bool = False,
        overrides: Mapping[str, Any] | None = None,
        arguments: Sequence[str] | None = None,
    ):
        if isinstance(recipe, str):
            recipe = files.load_recipe(recipe, smoke, overrides)
        if not isinstance(placement, Placement):
            placement = files.load_placement(placement)
        self.recipe: Recipe = recipe
        self.placement: Placement = placement
        self.constitutions = load_constitutions(personas)
        self.arguments = list(arguments or [recipe.name])
        self.persona_arguments = [p if isinstance(p, str) else p.name for p in personas]
        self.store = Store.at(storage or f"runs/{recipe.name}", placement.storage_retry_seconds)
        self.jobs: list[Job] = pipeline.jobs(recipe, self.constitutions, placement, self.store)

    def select(
        self, only: str | None = None, until: str | None = None, rebuild: str | None = None
    ) -> list[Job]:
        """Return the selected jobs, after checking everything that can be checked before a run.

        Args:
            only: the only stage to run.
            until: the last stage to run.
            rebuild: a stage whose datasets are replaced, with all that depend on them.

        Raises:
            UserError: if the run cannot succeed.
        """
        if only and until:
            raise UserError("--only and --until exclude each other; give one")
        selected = pipeline.select(self.jobs, only, until)
        pipeline.check(selected, rebuild)
        preflight.require_models(selected)
        preflight.check_training(selected)
        preflight.check_templates(selected, rebuild)
        preflight.check_stages(selected, rebuild)
        self.store.check_writable()
        return selected

    def job(self, stage: str, persona: str | None = None) -> Job:
        """Return the job of a stage.

        Args:
            stage: name of the stage.
            persona: name of the persona; None for a stage that all personas share.

        Raises:
            UserError: if there is none.
        """
        pipeline.check_stage_name(stage)
        jobs = [job for job in self.jobs if job.stage.name == stage]
        for job in jobs:
            if (job.constitution.name if job.constitution else None) == persona:
                return job
        scopes = ", ".join(job.constitution.name if job.constitution else "None" for job in jobs)
        raise UserError(f"stage {stage!r} has no dataset of persona {persona!r}; give {scopes}")

    def finished_job(self, stage: str, persona: str | None = None) -> Job:
        """Return the job of a stage if it is done; raise UserError with the command to run else."""
        job = self.job(stage, persona)
        state = job.state()[0]
        if state != "done":
            what = f"persona {job.scope!r}" if stage == MERGE else job.dataset
            raise UserError(
                f"{what} is {state} in {self.store.address()}; run: {self.command('run')}"
            )
        return job

    def command(self, name: str) -> str:
        """Return a command line with this run's recipe, options and personas."""
        options = [part for persona in self.persona_arguments for part in ("-c", persona)]
        return shlex.join(["opencharacter", name, *self.arguments, *options])

    def rebuild_report(self) -> None:
        """Write the report again from the data in storage."""
        derived = [job for job in self.jobs if job.stage.disposable or is_unused(job)]
        for _ in pipeline.run(derived, rebuild=REPORT):
            pass

    def is_evaluated(self) -> bool:
        """Return whether all data of the report is in storage, or is stale, which is an error."""
        needed = [job for job in self.jobs if not job.stage.disposable and not is_unused(job)]
        return not any(job.state()[0] in ("missing", "partial") for job in needed)

    def write_provisional_report(self, refresh_seconds: int = 0) -> str:
        """Write the page of an unfinished run and return its path or URL.

        Args:
            refresh_seconds: seconds after which a browser loads the page again; 0 for never.

        Raises:
            UserError: if storage is empty.
        """
        from opencharacter.evaluation.report.stage import write_provisional

        if not self.store.exists():
            raise UserError(
                f"{self.store.address()} is empty, so there is nothing to report; run: "
                f"{self.command('run')}"
            )
        return write_provisional(self.job(REPORT), refresh_seconds)

    def report_address(self) -> str | None:
        """Return where the report is, or None if it is not done."""
        job = self.job(REPORT)
        if job.state()[0] != "done":
            return None
        return job.store.address(job.dataset, "report.html")


def is_unused(job: Job) -> bool:
    """Whether only a job that the recipe does not use is missing, as in data of an old version."""
    if job.is_enabled or job.state()[0] != "missing":
        return False
    return all(parent.state()[0] == "done" or is_unused(parent) for parent in job.parents)


def load_constitutions(personas: Sequence[str | Constitution]) -> list[Constitution]:
    """Return the constitutions, loading those that are given by name or path."""
    if isinstance(personas, str):
        raise UserError(f"personas = {personas!r}: expected a list, for example [{personas!r}]")
    if all(isinstance(persona, str) for persona in personas):
        return schema.load_all([str(persona) for persona in personas])
    loaded = [schema.load(p) if isinstance(p, str) else p for p in personas]
    names = [constitution.name for constitution in loaded]
    if len(set(names)) < len(names):
        raise UserError(f"personas contain a name twice: {', '.join(names)}; give each once")
    return loaded


def execute(
    run: Run,
    selected: list[Job],
    rebuild: str | None,
    on_connected: Callable[[], None] | None = None,
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Run selected jobs on Ray, which is started if necessary.

    Args:
        run: the run.
        selected: its jobs that `Run.select` returned.
        rebuild: as in `Run.select`.
        on_connected: called when Ray is connected, before the first job starts.

    Yields:
        Each job that ran, with its manifest.
    """
    from opencharacter.runtime import cluster

    cluster.connect(run.placement, run.recipe)
    if on_connected:
        on_connected()
    yield from pipeline.run(selected, rebuild)


def is_done(selected: list[Job], rebuild: str | None) -> bool:
    """Return whether there is nothing to run."""
    return not rebuild and all(job.state()[0] == "done" for job in selected)


# --------------------------------------------------------------------------------- public functions


def load_recipe(
    name: str,
    *,
    set: Mapping[str, Any] | None = None,
    smoke: bool = False,
) -> Recipe:
    """Load a recipe.

    Args:
        name: a packaged recipe's name, or the path of a YAML file.
        set: values of fields by their dotted path, for example `{"distillation.dpo.beta": 0.2}`.
        smoke: shrink the recipe to about 1 % of its size.

    Returns:
        The recipe, which is immutable.
    """
    return files.load_recipe(name, smoke, set)


def plan(
    recipe: str | Recipe,
    personas: Sequence[str | Constitution],
    *,
    placement: str | Placement | None = None,
    storage: str | None = None,
) -> pl.DataFrame:
    """Estimate a run without starting it.

    Args:
        recipe: the recipe, or its name or path.
        personas: constitutions, or their names or paths.
        placement: the placement, or its name or path.
        storage: path or URL of the storage.

    Returns:
        A row per dataset: `dataset`, `state` (done, partial, stale or missing), and the estimated
        `rows`, `tokens_in` (read), `tokens_out` (generated) and `tokens_trained`.
    """
    import polars as pl

    jobs = Run(recipe, personas, placement, storage).jobs
    estimates = [job.stage.module.estimate(job) for job in jobs]
    return pl.DataFrame(
        {
            "dataset": [job.dataset for job in jobs],
            "state": [job.state()[0] for job in jobs],
            "rows": [estimate.rows for estimate in estimates],
            "tokens_in": [estimate.tokens_in for estimate in estimates],
            "tokens_out": [estimate.tokens_out for estimate in estimates],
            "tokens_trained": [estimate.trained for estimate in estimates],
        }
    )


def run(
    recipe: str | Recipe,
    personas: Sequence[str | Constitution],
    *,
    placement: str | Placement | None = None,
    storage: str | None = None,
    only: str | None = None,
    until: str | None = None,
    rebuild: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Run all stages that are missing; interrupted stages resume where they stopped.

    Ray is started if this process is not connected to a cluster.

    Args:
        recipe: the recipe, or its name or path.
        personas: constitutions, or their names or paths.
        placement: the placement, or its name or path.
        storage: path or URL of the storage.
        only: the only stage to run.
        until: the last stage to run.
        rebuild: a stage whose datasets are replaced, with all that depend on them.

    Returns:
        The manifests of the datasets that were made, by dataset.

    Raises:
        StageFailed: if a stage failed.
    """
    requested = Run(recipe, personas, placement, storage)
    selected = requested.select(only, until, rebuild)
    if is_done(selected, rebuild):
        return {}
    return {job.dataset: manifest for job, manifest in execute(requested, selected, rebuild)}


def dataset(
    recipe: str | Recipe,
    stage: str,
    persona: str | Constitution | Sequence[str | Constitution] | None = None,
    *,
    storage: str | None = None,
) -> pl.DataFrame:
    """Open the dataset of a stage.

    Args:
        recipe: the recipe, or its name or path.
        stage: name of the stage, for example `distillation/pairs`.
        persona: the constitution, or its name or path. None for the dataset that all personas of
            the student share, such as the student's answers to general prompts. A list of personas
            for a dataset that compares them, such as that of evaluation/robustness.
        storage: path or URL of the storage.

    Returns:
        All rows. Rows that were dropped have a `drop_reason`.
    """
    import polars as pl

    if isinstance(persona, str | Constitution):
        opened = Run(recipe, [persona], storage=storage)
        job = opened.finished_job(stage, opened.constitutions[0].name)
    else:
        job = Run(recipe, persona or [], storage=storage).finished_job(stage)
    frame = pl.from_arrow(job.store.read_table(job.dataset))
    assert isinstance(frame, pl.DataFrame)
    return frame


def adapter(
    recipe: str | Recipe, persona: str | Constitution, *, storage: str | None = None
) -> Path:
    """Return a local folder with the LoRA adapter of a persona, in PEFT's layout.

    An adapter on s3:// or gs:// is downloaded into the user's cache.

    Args:
        recipe: the recipe, or its name or path.
        persona: the constitution, or its name or path.
        storage: path or URL of the storage.
    """
    opened = Run(recipe, [persona], storage=storage)
    return opened.finished_job(MERGE, opened.constitutions[0].name).adapter.local()


def report(
    recipe: str | Recipe, personas: Sequence[str | Constitution], *, storage: str | None = None
) -> str:
    """Render the HTML report from the data in storage.

    The report of an unfinished run is a page of its own with what is finished, and with results so
    far, which are marked as provisional.

    Args:
        recipe: the recipe, or its name or path.
        personas: constitutions, or their names or paths.
        storage: path or URL of the storage.

    Returns:
        Path or URL of the report.
    """
    opened = Run(recipe, personas, storage=storage)
    if not opened.is_evaluated():
        return opened.write_provisional_report()
    opened.rebuild_report()
    address = opened.report_address()
    assert address is not None
    return address

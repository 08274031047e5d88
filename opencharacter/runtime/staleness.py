"""Why a stored dataset no longer matches its job, in words."""

from __future__ import annotations

FORMAT_FIELD = "format_version"
RECIPE_FIELDS = ("config", "seed", "seeded_sampling", "roles")
"""Keys of the payload whose values come from the recipe."""
WEIGHTS = ".weights"
"""Key, below a role, of the content of its local files."""


def explain_stale(differences: list[str]) -> str:
    """Say what has changed since a dataset was made, as the end of `<dataset> was ...`.

    Args:
        differences: of `Job.state`, not empty.
    """
    by_field: dict[str, list[str]] = {}
    for line in differences:
        by_field.setdefault(line.partition(":")[0].partition(".")[0], []).append(line)
    if FORMAT_FIELD in by_field:
        old, new = _old_and_new(by_field[FORMAT_FIELD][0])
        return (
            f"written by opencharacter 0.1 (manifest format {old}; this version reads format {new})"
        )
    weights = [line for line in by_field.get("roles", ()) if WEIGHTS in line.partition(": ")[0]]
    if weights:
        by_field["roles"] = [line for line in by_field["roles"] if line not in weights]
    recipe = [line for name in RECIPE_FIELDS for line in by_field.pop(name, ())]
    causes = [f"made from another recipe ({'; '.join(recipe[:4])})"] if recipe else []
    if weights:
        changed = dict.fromkeys(map(_changed_weights, weights))
        causes.append(f"made from other weights ({'; '.join([*changed][:4])})")
    if "constitution" in by_field:
        causes.append("made from another version of its constitution")
    if "rules" in by_field:
        versions = ", ".join(map(_rule_change, by_field["rules"]))
        causes.append(f"made by other filter rules ({versions})")
    if "templates" in by_field:
        causes.append("made with other prompt templates")
    if "inputs" in by_field:
        causes.append(f"made from other inputs ({'; '.join(by_field['inputs'][:4])})")
    if "parents" in by_field and not causes:
        datasets = [
            line.partition(": ")[0].removeprefix("parents.") for line in by_field["parents"]
        ]
        causes.append(f"made from another version of {', '.join(datasets[:4])}")
    return " and ".join(causes) or f"made from other inputs ({'; '.join(differences[:4])})"


def _changed_weights(line: str) -> str:
    """Name the file that differs, for a line such as `roles.student.weights.config.json: ...`."""
    role, _, file = line.partition(": ")[0].removeprefix("roles.").partition(WEIGHTS)
    if file:
        return f"{file.removeprefix('.')} of the {role} has changed"
    return f"the content of the {role}'s files is known only then or only now"


def _rule_change(line: str) -> str:
    old, new = _old_and_new(line)
    return f"{line.partition(': ')[0].removeprefix('rules.')} version {old}, now {new}"


def _old_and_new(line: str) -> tuple[str, str]:
    old, _, new = line.partition(": ")[2].partition(" -> ")
    return "none" if old == "null" else old, "none" if new == "null" else new

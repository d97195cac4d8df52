"""Deployments of prefect.yaml, as they are and for a recipe of another name.

parsed = read_prefect_yaml(path)
deploy_all(for_recipe(parsed, "photographs", config={"defect_labels": ["worn"]}))
"""

import sys
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

import yaml

TEMPLATE: Final = "solar_cells"  # the recipe a new one is copied from
PARAMETER_MODELS: Final = {
    "ingest": "options",
    "train": "config",
    "tune": "config",
    "scenario": "config",
    "labels": "config",
    "promote": "limits",
}  # deployment -> its model parameter


def read_prefect_yaml(path: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load(path.read_text())
    return parsed


def flow_of(deployment: dict[str, Any]) -> str:
    """Flow name of a deployment: `flows.train.train` -> `train`."""
    return str(deployment["entrypoint"]).rsplit(".", 1)[-1]


def for_recipe(
    parsed: dict[str, Any],
    name: str,
    template: str = TEMPLATE,
    options: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    limits: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The parsed prefect.yaml with only the template's deployments, renamed to `name` and with changed parameters.

    options replace single fields of what ingest is given, limits of promote, config of every flow that trains.
    Raises LookupError when prefect.yaml has no such template.
    """
    known = sorted({found["name"] for found in parsed["deployments"] if flow_of(found) == "promote"})
    if template not in known:
        raise LookupError(f"prefect.yaml has no recipe {template!r}; it has {', '.join(known)}")
    chosen = [deepcopy(found) for found in parsed["deployments"] if found["name"] == template]
    changes = {"options": options, "config": config, "limits": limits}
    for deployment in chosen:
        _rename(deployment, template, name)
        model = PARAMETER_MODELS.get(flow_of(deployment), "")
        if changed := changes.get(model):
            parameters = deployment.setdefault("parameters", {})
            parameters[model] = {**(parameters.get(model) or {}), **changed}
    return {**{key: value for key, value in parsed.items() if key != "deployments"}, "deployments": chosen}


def _rename(deployment: dict[str, Any], old: str, new: str) -> None:
    deployment["name"] = new
    deployment["tags"] = [new if tag == old else tag for tag in deployment.get("tags", [])]
    parameters = deployment.get("parameters", {})
    deployment["parameters"] = {key: new if value == old else value for key, value in parameters.items()}
    for trigger in deployment.get("triggers", []):
        match = trigger["match"]
        trigger["match"] = {
            key: f"{value.rsplit('.', 1)[0]}.{new}" if value.rsplit(".", 1)[-1] == old else value
            for key, value in match.items()
        }
        if "name" in trigger:
            trigger["name"] = trigger["name"].replace(old, new)


def deploy_all(source: Path | dict[str, Any]) -> None:
    """`prefect deploy --all` of a prefect.yaml or of its parsed content, in this process, on the current Prefect server.

    Raises RuntimeError when Prefect refuses a deployment; what is wrong was printed before.
    """
    if isinstance(source, Path):
        _prefect("--no-prompt", "deploy", "--all", "--prefect-file", str(source))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prefect.yaml"
        path.write_text(yaml.safe_dump(source, sort_keys=False))
        deploy_all(path)


def _prefect(*arguments: str) -> None:
    from prefect.cli import app

    before = sys.argv
    sys.argv = ["prefect", *arguments]
    try:
        app()
    except SystemExit as finished:
        if finished.code:
            raise RuntimeError(f"`prefect {' '.join(arguments)}` failed with exit code {finished.code}") from None
    finally:
        sys.argv = before

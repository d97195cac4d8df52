"""Figures of the demo's report that MLflow keeps."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deploy.story import Story
    from flows.settings import Settings
    from tasks.dataset import DatasetVersion


def first_figures(story: "Story", here: "Settings", recipe: str, version: int, dataset: "DatasetVersion") -> None:
    """The first version's own figures, as MLflow holds them."""
    from tasks.registry import load_card, run_metrics

    trained, card = load_card(here.mlflow_tracking_uri, recipe, version)
    metrics = run_metrics(here.mlflow_tracking_uri, trained.run_id)
    story.report["train"] = {
        "recipe": f"train/{recipe}",
        "architecture": card.architecture,
        "image_size": card.image_size,
        "seed": card.seed,
        "test_accuracy": metrics["test_accuracy"],
        "test_share": round(dataset.splits["test"] / sum(dataset.splits.values()), 4),
        "threshold": card.rule.threshold,
        "seconds": metrics["train_seconds"],
        "mlflow_run": trained.run_id,
    }
    served = {name.removeprefix("served_"): value for name, value in metrics.items() if name.startswith("served_")}
    story.report["served"] = served


def swap_figures(here: "Settings", recipe: str, version: int) -> dict[str, float]:
    from tasks.registry import load_card, run_metrics

    trained, _ = load_card(here.mlflow_tracking_uri, recipe, version)
    metrics = run_metrics(here.mlflow_tracking_uri, trained.run_id)
    return {name.removeprefix("swap_"): value for name, value in metrics.items() if name.startswith("swap_")}

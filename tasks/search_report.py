"""What a search found, for people: the page in the Prefect UI and its picture. Pure: values in, text and bytes out."""

import io
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tasks.search_space import Search, combinations
from tasks.tuning import Tried, best_of, objective_of

_SHOWN: Final = 40  # trials on the page; all of them are in trials.csv
_DPI: Final = 80
_COLOURS: Final = {"complete": "tab:blue", "pruned": "tab:orange", "failed": "tab:red"}


def page(
    title: str,
    search: Search,
    tried: Sequence[Tried],
    chosen: Mapping[str, Any],
    importance: Mapping[str, float],
    why_ended: str,
    picture: bytes,
    link: str,
) -> str:
    """The Markdown artifact: what is best, its configuration to paste, importance, and the trials, best first."""
    best = best_of(tried, search.metric)
    counts = {
        state: sum(each.state == state for each in tried) for state in ("complete", "pruned", "failed", "waiting")
    }
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "no trials"
    parts = [
        f"# {title}",
        f"{search.sampler} sampler{_covered(search, tried)}, {told}; ended because {why_ended}. "
        f"Judged by {_metric(search)} on the validation split; no trial has seen the test split. "
        f"[The study and every trial in MLflow]({link})",
        _best(best),
        f"![the search](data:image/png;base64,{b64encode(picture).decode()})",
        _importance(importance),
        "## Trials",
        _table(search, tried),
        *([_to_paste(chosen)] if best else []),
    ]
    return "\n\n".join(parts)


def summary(tried: Sequence[Tried], search: Search, seconds: float) -> dict[str, float]:
    """Metrics of the study's MLflow run."""
    counts = {
        f"trials_{state}": sum(each.state == state for each in tried) for state in ("complete", "pruned", "failed")
    }
    best = best_of(tried, search.metric)
    found = {**counts, "search_seconds": seconds}
    return found | ({f"best_val_{name}": value for name, value in best.figures.items()} if best else {})


def draw(search: Search, tried: Sequence[Tried], importance: Mapping[str, float]) -> bytes:
    """PNG: value over the trials, validation loss over the epochs, what the fields matter, and the fields against the value."""
    from matplotlib.figure import Figure

    names = _varied(tried)[:4]
    figure = Figure(figsize=(11, 3.2 * (2 if names else 1)), dpi=_DPI, layout="constrained")
    above: Any = figure
    below: Any = None
    if names:
        halves: Any = figure.subfigures(2, 1)
        above, below = halves
    history, curves, shares = above.subplots(1, 3)
    _draw_history(history, search, tried)
    _draw_curves(curves, search, tried)
    _draw_importance(shares, importance)
    if below is not None:
        for name, axes in zip(names, _row(below.subplots(1, len(names), sharey=True)), strict=True):
            _draw_field(axes, name, search, tried)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _draw_history(axes: Any, search: Search, tried: Sequence[Tried]) -> None:
    complete = [each for each in tried if each.value is not None]
    axes.plot(
        [each.slot for each in complete], [each.value for each in complete], "o", color=_COLOURS["complete"], ms=4
    )
    best, so_far = [], None
    for each in complete:
        if so_far is None or objective_of(search.metric, each.figures) < objective_of(search.metric, so_far.figures):
            so_far = each
        best.append(so_far.value)
    axes.step([each.slot for each in complete], best, where="post", color="tab:green", label="best so far")
    for state in ("pruned", "failed"):
        for each in tried:
            if each.state == state:
                axes.axvline(each.slot, color=_COLOURS[state], linewidth=0.8, linestyle=":")
    axes.set(
        title=f"validation {search.metric.replace('_', ' ')}", xlabel="trial; dotted: pruned (orange), failed (red)"
    )
    if complete:
        axes.legend(fontsize="small")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_curves(axes: Any, search: Search, tried: Sequence[Tried]) -> None:
    best = best_of(tried, search.metric)
    for each in tried:
        if each.losses:
            bold = {"linewidth": 2.2, "color": "tab:green"} if each is best else {"linewidth": 0.8, "alpha": 0.7}
            colour = {} if each is best else {"color": _COLOURS.get(each.state, "grey")}
            axes.plot(list(each.losses), list(each.losses.values()), marker=".", **bold, **colour)
    axes.set(title="validation loss of each trial", xlabel="epoch; green: the best trial", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_importance(axes: Any, importance: Mapping[str, float]) -> None:
    axes.set(title="importance")
    if not importance:
        axes.text(0.5, 0.5, "too few completed trials to tell", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    names = list(importance)[::-1]
    axes.barh(names, [importance[name] for name in names], color="tab:purple")
    axes.tick_params(axis="y", labelsize="small")
    axes.set(xlabel="share of the spread it explains")


def _draw_field(axes: Any, name: str, search: Search, tried: Sequence[Tried]) -> None:
    complete = [each for each in tried if each.value is not None]
    drawn = [each.overrides.get(name) for each in complete]
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in drawn)
    axes.plot(drawn if numbers else [str(value) for value in drawn], [each.value for each in complete], "o", ms=4)
    best = best_of(tried, search.metric)
    if best is not None:
        at = best.overrides.get(name)
        axes.plot([at if numbers else str(at)], [best.value], "o", ms=8, mfc="none", mec="tab:green", mew=2)
    if getattr(search.space.get(name), "log", False):
        axes.set(xscale="log")
    axes.set(xlabel=name)


def _row(axes: Any) -> list[Any]:
    return list(axes.flat) if hasattr(axes, "flat") else [axes]


def _varied(tried: Sequence[Tried]) -> list[str]:
    complete = [each for each in tried if each.value is not None]
    names = list(dict.fromkeys(name for each in complete for name in each.overrides))
    return [name for name in names if len({str(each.overrides.get(name)) for each in complete}) > 1]


def _best(best: Tried | None) -> str:
    if best is None:
        return "**No trial was completed:** there is nothing to choose from; the reasons are in the table."
    drawn = ", ".join(f"{name} {_shown(value)}" for name, value in best.overrides.items())
    figures = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in best.figures.items())
    return f"**Best is trial {best.slot}**: {drawn}.\n\nValidation: {figures}."


def _covered(search: Search, tried: Sequence[Tried]) -> str:
    """How much of a grid was tried."""
    if search.sampler != "grid":
        return ""
    begun = sum(each.state != "waiting" for each in tried)
    return f" ({begun} of {combinations(search)} combinations)"


def _to_paste(chosen: Mapping[str, Any]) -> str:
    return (
        "## The best configuration\n\nAt full length, to paste into `train` or a recipe; `best_trial.json` in MLflow is that "
        f"of the trial, which trained by hand ends with the same figures.\n\n```json\n{json.dumps(chosen, indent=2)}\n```"
    )


def _importance(importance: Mapping[str, float]) -> str:
    if not importance:
        return "Too few trials were completed to say which field matters."
    rows = "\n".join(f"| {name} | {value:.2f} |" for name, value in importance.items())
    return (
        "## What matters\n\nShare of the spread of the result that each field explains (fANOVA, Hutter et al. 2014); with "
        f"few trials a hint, no more.\n\n| field | share |\n| --- | --- |\n{rows}"
    )


def _table(search: Search, tried: Sequence[Tried]) -> str:
    order = {"complete": 0, "pruned": 1, "failed": 2}
    ranked = sorted(
        tried,
        key=lambda each: (
            order.get(each.state, 3),
            objective_of(search.metric, each.figures) if each.value is not None else 0.0,
            each.slot,
        ),
    )
    names = list(search.space)
    head = ["trial", "state", search.metric.replace("_", " "), *names, "epochs", "seconds", "why"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for each in ranked[:_SHOWN]:
        value = "" if each.value is None else f"{each.value:.4f}"
        drawn = [_shown(each.overrides.get(name, "")) for name in names]
        why = each.reason.replace("|", "/").replace("\n", " ")[:160]
        row = [str(each.slot), each.state, value, *drawn, str(len(each.losses)), f"{each.seconds:.0f}", why]
        lines.append(f"| {' | '.join(row)} |")
    left = len(ranked) - _SHOWN
    return "\n".join(lines) + (f"\n\n{left} more are in `trials.csv` of the MLflow run." if left > 0 else "")


def _metric(search: Search) -> str:
    direction = "lower" if search.metric == "loss" else "higher"
    return f"{search.metric.replace('_', ' ')} ({direction} is better)"


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""The picture of `headrace bench roofline`: measured steps below what the machine allows.

matplotlib is optional (extra `bench`) and imported only when a picture is asked for.
"""

from pathlib import Path
from typing import Any

from headrace.core.errors import HeadraceError

_MEASURED, _LIMIT, _TEXT = "#2b6cb0", "#222222", "#222222"


def require() -> Any:
    """matplotlib's figure class, which draws without a display.

    Raises:
        HeadraceError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise HeadraceError(
            "--plot needs matplotlib: pip install 'headrace[bench]'", field="plot"
        ) from None
    return Figure


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG: one panel for decode and one for prefill, in tokens per second.

    Raises:
        HeadraceError: the file cannot be written, or matplotlib is missing.
    """
    panels = {
        kind: [step for step in result["steps"] if step["name"].startswith(kind)]
        for kind in ("decode batch", "prefill")
    }
    panels = {kind: steps for kind, steps in panels.items() if steps}
    figure = require()(figsize=(10, 4.8), dpi=150, facecolor="white", layout="constrained")
    widths = [len(steps) for steps in panels.values()]
    axes = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
    for place, (kind, steps) in zip(axes, panels.items(), strict=True):
        _panel(place, kind, steps)
    axes[0].set_ylabel("tokens per second", color=_TEXT)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    read = result["read_bytes_per_s"] / 1e9
    rates = ", ".join(f"{v / 1e9:.0f} GFLOP/s {k}" for k, v in result["operations_per_s"].items())
    figure.suptitle(
        f"{result['model']}: {result['threads']} threads, {result['level']}; "
        f"read {read:.1f} GB/s, {rates}",
        fontsize=10,
        color=_TEXT,
    )
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise HeadraceError(f"cannot write {path}: {error.strerror}", field="plot") from None


def _panel(axes: Any, kind: str, steps: list[dict[str, Any]]) -> None:
    """Bars of the median, a tick for the best run, a line for the limit."""
    places = range(len(steps))
    limits = [step["limit_tokens_per_s"] for step in steps]
    axes.bar(
        places, [s["tokens_per_s"] for s in steps], 0.6, color=_MEASURED, label="measured (median)"
    )
    best = [step["best_tokens_per_s"] for step in steps]
    axes.scatter(places, best, marker="_", s=180, color="#dd6b20", label="best run", zorder=3)
    axes.hlines(
        limits, [p - 0.4 for p in places], [p + 0.4 for p in places], color=_LIMIT, label="limit"
    )
    for place, step in zip(places, steps, strict=True):
        text = f"{step['fraction_of_limit']:.0%}\n{step['bound']}"
        spot = (place, step["limit_tokens_per_s"])
        axes.annotate(text, spot, (0, 4), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks(places, [step["name"].rsplit(" ", 1)[1] for step in steps])
    axes.set_xlabel("sequences in a decode step" if kind != "prefill" else "tokens of a prompt")
    axes.set_title("decode" if kind != "prefill" else "prefill", fontsize=11, color=_TEXT)
    axes.set_ylim(0, 1.22 * max(*limits, *best))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_TEXT)

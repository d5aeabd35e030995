"""report.html: one self-contained file that any browser opens offline, and report.png beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from lrscale.report import charts, scoring, sections
from lrscale.report.chart_style import css_variables
from lrscale.report.plan_charts import plan_charts
from lrscale.report.runs import Run, load_runs, read_json, section
from lrscale.report.summary import ArmSummary, summarise

PLAN = "plan.json"
"""What `lrscale launch` planned for SLURM, or `lrscale plan --charts RUN` put there."""


def write_report(run_dirs: Iterable[Path | str], out: Path | str) -> list[Path]:
    """Write the report of one or several runs, finished or not, and return the files written.

    `out`: a folder (report.html and report.png are put there) or the .html file itself (the PNG
    takes its name). Without matplotlib the page has no charts, says so, and there is no PNG.
    Raises RunNotFound, and MetricsDamaged.
    """
    runs = load_runs(run_dirs)
    arms = summarise(runs)
    out = Path(out)
    page = out if out.suffix.lower() in (".html", ".htm") else out / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    written = [page]
    _replace(page, render_page(runs, arms).encode())
    picture = page.with_suffix(".png")
    partial = picture.with_name(f".{picture.name}.tmp")
    try:
        if charts.write_overview(runs, arms, partial):
            os.replace(partial, picture)
            written.append(picture)
    except charts.ChartsMissing:
        pass  # The page says so where its charts would be.
    finally:
        partial.unlink(missing_ok=True)
    return written


def render_page(runs: Sequence[Run], arms: Sequence[ArmSummary]) -> str:
    """The whole page as text."""
    named = [("what", "What was run", sections.what_was_run(runs)), ("results", "Results", sections.results(arms))]
    try:
        named += _charted_sections(runs, arms)
    except charts.ChartsMissing as error:
        no_charts = sections.missing(f"No charts: {error}")
        named.append(("curves", "Charts", no_charts))
        named.append(("projector", "Projector", _per_run(runs, [sections.projector(run, None) for run in runs])))
        named.append(("time", "Time", sections.time_by_phase(runs, None)))
    named.append(("rewards", "Rewards", scoring.rewards(runs)))
    named.append(("health", "Health of training", sections.health(runs)))
    named.append(("rollouts", "Rollouts to read", sections.rollouts(runs)))
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in named)
    body = "".join(f'<section id="{key}"><h2>{title}</h2>{content}</section>' for key, title, content in named)
    title = sections.escape(", ".join(run.label for run in runs))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Nothing of the page may load or run anything, whatever a model wrote into its rollouts.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{title} · lrscale report</title><style>{_style_sheet()}</style></head>\n"
        f'<body><main><header><h1>{title}</h1><p class="lead">{sections.escape(_lead(runs))}</p><nav>{links}</nav></header>\n'
        f"{body}</main></body></html>\n"
    )


def _charted_sections(runs: Sequence[Run], arms: Sequence[ArmSummary]) -> list[tuple[str, str, str]]:
    accuracy, curves = charts.accuracy_chart(arms), charts.curves_chart(runs)
    histograms = [charts.histogram_chart(run, arms, f"markers-{number}") for number, run in enumerate(runs)]
    projectors = [charts.projector_chart(run, f"projector-{number}") for number, run in enumerate(runs)]
    plans = [sections.plan(plan_charts(read_json(run.path / PLAN), f"plan-{n}")) for n, run in enumerate(runs)]
    planned = [("plan", "Plan", _per_run(runs, plans))] if any(plans) else []
    return [
        *planned,
        ("length", "Accuracy against length", sections.figure(accuracy) or sections.missing("No evaluation yet.")),
        ("curves", "Reward and length", sections.figure(curves) or sections.missing("No RL step yet.")),
        ("markers", "Markers", _per_run(runs, [_or_missing(chart) for chart in histograms])),
        (
            "projector", "Projector",
            _per_run(runs, [sections.projector(run, chart) for run, chart in zip(runs, projectors, strict=True)]),
        ),
        ("time", "Time", sections.time_by_phase(runs, charts.phases_chart(runs))),
    ]  # fmt: skip


def _or_missing(chart: charts.Chart | None) -> str:
    return sections.figure(chart) or sections.missing("No arm that writes markers has been evaluated yet.")


def _per_run(runs: Sequence[Run], contents: Sequence[str]) -> str:
    if len(runs) == 1:
        return contents[0]
    return "".join(
        f"<h3>{sections.escape(run.label)}</h3>{content}" for run, content in zip(runs, contents, strict=True)
    )


def _lead(runs: Sequence[Run]) -> str:
    models = list(dict.fromkeys(str(section(run.recipe, "model").get("path", "unknown model")) for run in runs))
    tasks = list(dict.fromkeys(str(section(run.recipe, "task").get("kind", "unknown task")) for run in runs))
    unfinished = sum(not run.finished for run in runs)
    state = "" if not unfinished else " · not finished" if len(runs) == 1 else f" · {unfinished} not finished"
    return f"Latent reasoning with lrscale · {', '.join(models)} · {', '.join(tasks).replace('_', ' ')}{state}"


def _style_sheet() -> str:
    light, dark = css_variables(dark=False), css_variables(dark=True)
    sheet = resources.files("lrscale.report").joinpath("page.css").read_text(encoding="utf-8")
    return f":root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{sheet}"


def _replace(path: Path, content: bytes) -> None:
    """Write beside and rename, so that a reader never sees half a page."""
    partial = path.with_name(f".{path.name}.tmp")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

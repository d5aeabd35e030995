"""The sections of report.html, each a function from what was measured to HTML.

Every text that comes from a run passes through `escape`.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lrscale.report.chart_style import COLOURS
from lrscale.report.charts import Chart
from lrscale.report.phases import in_order, stage_times
from lrscale.report.rollouts import latent_html, rollout_html, shown_rollouts
from lrscale.report.runs import Run, arm_title, section
from lrscale.report.summary import ArmSummary, gains_kept, heldout_losses, heldout_sentence, together
from lrscale.report.table import (
    MISSING,
    Cells,
    across_runs_cells,
    count,
    heldout_cells,
    said,
    shared_minutes,
    summary_cells,
)
from lrscale.report.timing import duration

STAGES = (("traces", "traces"), ("projector_sft", "projector SFT"), ("rl", "RL"), ("evaluate", "evaluation"))


CONTROLS = ("zero_latent", "shuffled_latent")
"""Arms that are there to be beaten."""


def escape(value: Any) -> str:
    return html.escape(str(value), quote=True)


def what_was_run(runs: Sequence[Run]) -> str:
    """Recipe, model, task, seed, versions, and how far each stage came."""
    if len(runs) == 1:
        return _facts_list(_run_facts(runs[0])) + f'<ul class="stages">{"".join(_stage_states(runs[0]))}</ul>'
    columns = [dict(_run_facts(run)) for run in runs]
    names = list(dict.fromkeys(name for facts in columns for name in facts))
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *(run.label for run in runs)))
    body = [
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{escape(facts.get(name, MISSING))}</td>' for facts in columns)}</tr>"
        for name in names
    ]
    states = "".join(f'<td><ul class="stages">{"".join(_stage_states(run))}</ul></td>' for run in runs)
    body.append(f"<tr><td>stages</td>{states}</tr>")
    return f'<div class="scroll"><table class="compare"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def results(arms: Sequence[ArmSummary]) -> str:
    """The closing table and the sentences on the gain kept."""
    if not any(arm.before or arm.after for arm in arms):
        return missing("No arm has been evaluated yet: the table fills as the run goes on.")
    runs = list({id(arm.run): arm.run for arm in arms}.values())
    parts = [table_html(summary_cells(arms), arm_names=[arm.arm for arm in arms])]
    parts.append(
        '<p class="note">Brackets: 95 % intervals (Wilson). Tokens and latent steps: means a completion on held-out prompts, '
        "before → after RL. RL tokens: discrete tokens trained on.</p>"
    )
    kept = gains_kept(arms)
    across = across_runs_cells(arms, kept)
    if across:
        parts.append(f"<h3>Over the runs: mean (least to most)</h3>{table_html(across)}")
    for items in together(kept):
        controls = all(item.arm.arm in CONTROLS for item in items)
        kind = "control" if controls else "kept undefined" if items[0].share is None else "kept"
        parts.append(f'<p class="{kind}">{escape(said(items, runs))}</p>')
    if kept:
        parts.append(
            '<p class="note">Share kept: (arm after − discrete before) / (discrete after − discrete before), '  # noqa: RUF001
            "with Fieller's 95 % interval. It covers the sampling of prompts, not that of seeds.</p>"
        )
    else:
        parts.append(
            missing("The share of the discrete arm's gain needs a discrete and another arm, both evaluated after RL.")
        )
    parts += [f'<p class="note">{escape(text)}</p>' for text in map(shared_minutes, runs) if text]
    return "".join(parts)


def projector(run: Run, chart: Chart | None) -> str:
    """Held-out losses, latent scale, and whether the latents carry content."""
    losses = heldout_losses(run)
    parts = [figure(chart)]
    if losses:
        parts.append(f"<p>{escape(heldout_sentence(losses[0]))}</p>")
        parts.append(table_html(heldout_cells(run)))
        parts.append(
            '<p class="note">Cross-entropy a token after the first marker; ± standard error; differences are paired by row. '
            "Zero latents alone are too weak a control: only a lead over shuffled latents shows content.</p>"
        )
    else:
        parts.append(missing("No held-out loss yet: it is measured after projector SFT."))
    scales = [line["latent_scale"] for line in run.lines("projector_sft") if line.get("latent_scale") is not None]
    if scales:
        parts.append(
            f"<p>Latent scale, rms(latent) / rms(embedding): {scales[0]:#.3g} at first, {scales[-1]:#.3g} at last "
            f"(between {min(scales):#.3g} and {max(scales):#.3g}).</p>"
        )
        if not 0.1 <= scales[-1] <= 10.0:
            parts.append(
                '<p class="cut">The latents are far from the scale of embeddings; consider projector.kind: normalised.</p>'
            )
    return "".join(parts)


def time_by_phase(runs: Sequence[Run], chart: Chart | None) -> str:
    rows = [(run, time) for run in runs for time in stage_times(run)]
    if not rows:
        return missing("No stage has recorded its time yet.")
    phases = in_order(phase for _, time in rows for phase in time.seconds)
    cells = Cells(
        ("stage", *phases, "total", "CPU"),
        tuple(
            (
                time.name if len(runs) == 1 else f"{run.label} · {time.name}",
                *(duration(time.seconds[phase]) if phase in time.seconds else MISSING for phase in phases),
                duration(time.total_s),
                MISSING if time.cpu_s is None else duration(time.cpu_s),
            )
            for run, time in rows
        ),
    )
    return figure(chart) + table_html(cells) + '<p class="note">Wall time; CPU: seconds of the process in RL steps.</p>'


def health(runs: Sequence[Run]) -> str:
    """Figures that tell whether training was sound: drift, clipping, failed scores, groups without signal."""
    names, rows = [], []
    for run in runs:
        for arm in run.arms:
            lines, audits = run.lines("rl", arm=arm), run.lines("audit", arm=arm)
            if not lines:
                continue
            names.append(arm)
            row = (
                str(lines[-1]["step"]),
                _largest(lines, "logprob_gap_max"),
                _largest(audits, "logprob_gap_max"),
                _over(min, audits, "latent_cosine_min", ".6f"),
                _mean(lines, "clip_share", 100),
                _mean(lines, "kl"),
                _mean(lines, "grad_norm"),
                _mean(lines, "groups_without_signal"),
                count(sum(line.get("scores_failed") or 0 for line in lines)),
            )
            rows.append((arm_title(arm), *row) if len(runs) == 1 else (run.label, arm_title(arm), *row))
    if not rows:
        return missing("No RL step yet.")
    header = (
        "arm", "steps", "log-prob gap, max", "audit gap, max", "latent cosine, min", "clipped, %", "KL", "grad norm",
        "groups without signal", "failed scores",
    )  # fmt: skip
    cells = Cells(header if len(runs) == 1 else ("run", *header), tuple(rows), 1 if len(runs) == 1 else 2)
    note = (
        "Gap: rollout's log-probs against the trainer's, largest over all tokens. Audit: latents computed again against "
        "the recorded ones. Clipped, KL, grad norm and groups without signal: means a step."
    )
    return table_html(cells, arm_names=names) + f'<p class="note">{note}</p>'


def rollouts(runs: Sequence[Run]) -> str:
    """Up to twenty rollouts an arm; the first arm is open."""
    parts = []
    for run in runs:
        for arm in run.arms:
            source, shown = shown_rollouts(run, arm)
            if not shown:
                continue
            whose = arm_title(arm) if len(runs) == 1 else f"{run.label} · {arm_title(arm)}"
            parts.append(
                f'<details class="arm-rollouts"{"" if parts else " open"}>'
                f"<summary>{_arm_span(arm, whose)} <small>{len(shown)} rollouts, {escape(source)}</small></summary>"
                f"{''.join(map(rollout_html, shown))}</details>"
            )
    if not parts:
        return missing("No rollouts have been written yet: evaluation and every so many RL steps write some.")
    key = f'<p class="note">{latent_html(3)} are three latent steps, taken in place of words; a right answer has a reward above 0.</p>'
    return key + "".join(parts)


def plan(charts: Sequence[Chart]) -> str:
    """What was expected before the run began; empty where nobody planned."""
    return "".join(map(figure, charts))


def figure(chart: Chart | None) -> str:
    if chart is None:
        return ""
    return f"<figure>{chart.svg}<figcaption>{escape(chart.caption)}</figcaption></figure>"


def missing(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'


def table_html(cells: Cells, arm_names: Sequence[str] = ()) -> str:
    """`arm_names` (one a row) puts the arm's coloured dot before the last word column."""
    head = "".join(f"<th{_word(cells, column)}>{escape(name)}</th>" for column, name in enumerate(cells.header))
    body = []
    for number, row in enumerate(cells.rows):
        columns = []
        for column, cell in enumerate(row):
            dotted = arm_names and column == cells.text_columns - 1
            text = _arm_span(arm_names[number], cell) if dotted else escape(cell)
            columns.append(f"<td{_word(cells, column)}>{text}</td>")
        body.append(f"<tr>{''.join(columns)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _arm_span(arm: str, words: str) -> str:
    colour = arm if arm in COLOURS else "other_arm"
    return f'<span class="arm" style="--dot: var(--{colour})">{escape(words)}</span>'


def _word(cells: Cells, column: int) -> str:
    return ' class="word"' if column < cells.text_columns else ""


def _facts_list(facts: Iterable[tuple[str, str]]) -> str:
    return f'<dl class="facts-list">{"".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)}</dl>'


def _run_facts(run: Run) -> list[tuple[str, str]]:
    recipe, rl = run.recipe, section(run.recipe, "stages", "rl")
    facts = [
        ("recipe", recipe.get("name")),
        ("model", _joined(section(recipe, "model"), "path", "dtype")),
        ("projector", _joined(section(recipe, "projector"), "kind", "layers")),
        ("task", _joined(section(recipe, "task"), "kind", "world", "path", "train")),
        ("seed", recipe.get("seed")),
    ]
    if rl.get("steps") is not None:
        prompts, group = rl.get("prompts_per_step", "?"), rl.get("group_size", "?")
        facts.append(("RL", f"{rl['steps']} steps of {prompts} prompts, {group} samples each"))
    facts += [(key.replace("_", " "), _flat(value)) for key, value in run.manifest.items() if key != "seed"]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _stage_states(run: Run) -> list[str]:
    planned = section(run.recipe, "stages").get("run")
    wanted = planned if isinstance(planned, list) else [name for name, _ in STAGES]
    states = []
    for name, title in STAGES:
        begun = bool(run.lines(name))
        if name not in wanted and not begun:
            states.append(f'<li class="waiting">{title}: not in the recipe</li>')
        elif not begun:
            states.append(f'<li class="waiting">{title}: {"nothing recorded" if run.finished else "not yet"}</li>')
        else:
            states.append(f"<li>{title}: {escape(_stage_words(run, name))}</li>")
    states.append("<li>finished</li>" if run.finished else '<li class="waiting">not finished</li>')
    return states


def _stage_words(run: Run, name: str) -> str:
    """How far a stage that has begun has come."""
    lines = run.lines(name)
    last = lines[-1]
    if name == "traces":
        return f"{count(last.get('kept'))} of {count(last.get('samples'))} samples kept"
    if name == "projector_sft":
        refreshes = len({(line.get("arm"), line.get("refresh")) for line in lines if line.get("arm")})
        return f"{len(run.lines(name, arm=None))} steps" + (
            f", then {refreshes} refresh{'' if refreshes == 1 else 'es'}" if refreshes else ""
        )
    if name == "evaluate":
        after = {line.get("arm") for line in lines if line.get("when") == "after"}
        return f"{len(after)} of {len(run.arms)} arms after RL"
    planned = section(run.recipe, "stages", "rl").get("steps")
    of_planned = f"/{planned}" if planned is not None else ""
    done = {arm: run.lines("rl", arm=arm) for arm in run.arms}
    return ", ".join(f"{arm_title(arm)} {steps[-1]['step'] if steps else 0}{of_planned}" for arm, steps in done.items())


def _joined(part: Mapping[str, Any], *keys: str) -> str:
    return ", ".join(str(part[key]) for key in keys if part.get(key) not in (None, ""))


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(_flat, value))
    return "" if value is None else str(value)


def _largest(lines: Iterable[Mapping[str, Any]], key: str) -> str:
    return _over(max, lines, key, ".2g")


def _mean(lines: Iterable[Mapping[str, Any]], key: str, scale: float = 1.0) -> str:
    return _over(lambda values: scale * sum(values) / len(values), lines, key, ".3g")


def _over(how: Callable[[list[float]], float], lines: Iterable[Mapping[str, Any]], key: str, form: str) -> str:
    values = [float(line[key]) for line in lines if line.get(key) is not None]
    return format(how(values), form) if values else MISSING

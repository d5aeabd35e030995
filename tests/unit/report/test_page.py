"""report.html: self-contained, complete, unmoved by hostile text, useful before the run is done."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from lrscale.report import charts
from lrscale.report.page import write_report
from lrscale.report.panels import running_mean
from lrscale.report.rollouts import latent_html, rollout_html
from tests.unit.report.synthetic_run import write_run

HOSTILE = "</div><script>alert(1)</script><img src=x onerror='alert(2)'>\"&amp;"


class _Page(HTMLParser):
    """Tags, ids, addresses; checks that every element is closed in order."""

    void = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.addresses, self.handlers, self.text, self._open = [], [], [], [], [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for key, value in attrs if key == "id"]
        self.addresses += [value for key, value in attrs if key in ("src", "href", "xlink:href", "action", "data")]
        self.handlers += [key for key, _ in attrs if key.startswith("on")]
        if tag not in self.void:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def report(full_run, tmp_path_factory):
    page, picture = write_report([full_run], tmp_path_factory.mktemp("out"))
    return page.read_text(encoding="utf-8"), picture


def test_page_is_whole_and_asks_for_nothing(report):
    """Locks out requests to other machines, broken markup and ids that clash between charts."""
    text, picture = report
    page = _Page(text)
    assert "script" not in page.tags and "link" not in page.tags and not page.handlers
    assert all(address.startswith("#") for address in page.addresses)
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "url(http" not in text and "@import" not in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_page_has_every_section(report):
    """Locks out a section lost in a refactoring."""
    text, _ = report
    page = _Page(text)
    wanted = ["what", "results", "length", "curves", "markers", "projector", "time", "rewards", "health", "rollouts"]
    assert [name for name in page.ids if not name.startswith("chart-")] == wanted
    assert page.tags.count("svg") == 5
    shown = " ".join(page.text)
    for words in ("tiny-cpu", "builtin:tiny", "torch 2.13.0", "eea39e2", "61.9 [57.6, 66.0]", "keeps", "finished"):
        assert words in shown
    for words in ("hidden behind generation", "failed: timeout", "train-000003 (discrete, 14.0 s)"):
        assert words in shown
    assert text.count('<article class="rollout">') == 80
    assert "●●" in text and "&lt;implicit_thought&gt;2&lt;/implicit_thought&gt;" in text


def test_charts_follow_light_and_dark(report):
    """Locks out black text on a dark page: no stand-in colour stays, text takes the page's ink."""
    text, _ = report
    assert "#0a1b" not in text
    assert "var(--ink)" in text and "prefers-color-scheme: dark" in text
    svg = text[text.index("<svg") : text.rindex("</svg>")]
    drawn = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg))
    assert not drawn, "a colour that does not follow the reader's setting"


def test_same_metrics_same_page(tmp_path, monkeypatch):
    """Locks out dates and random ids; a page and its picture share the name that was asked for."""
    run = write_run(tmp_path / "run", arms=("latent",), steps=4)
    monkeypatch.setattr(charts, "curves_chart", lambda runs: None)  # one chart is enough, and quick
    monkeypatch.setattr(charts, "histogram_chart", lambda *given: None)
    first, picture = write_report([run], tmp_path / "one.html")
    second, _ = write_report([run], tmp_path / "two")
    assert (first.name, picture.name, second) == ("one.html", "one.png", tmp_path / "two" / "report.html")
    assert first.read_bytes() == second.read_bytes()


def test_hostile_text_stays_text(tmp_path):
    """Locks out a model, data set or recipe that writes its own HTML into the report."""
    run = write_run(tmp_path / "run $x^2 & <b>", arms=("latent",), steps=4)
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["name"] = recipe["model"]["path"] = recipe["task"]["kind"] = HOSTILE
    recipe["stages"]["rl"]["arms"].append(HOSTILE)
    (run / "recipe.json").write_text(json.dumps(recipe))
    (run / "manifest.json").write_text(json.dumps({HOSTILE: {HOSTILE: HOSTILE}, "command": [HOSTILE]}))
    rollout = dict.fromkeys(
        ("arm", "when", "prompt_id", "prompt", "reward", "tokens", "latent_steps", "stop_reason", "advantage"), HOSTILE
    )
    rollout["segments"] = [
        {"text": HOSTILE},
        {"latent_steps": HOSTILE},
        {"latent_steps": 2},
        HOSTILE,
        {"text": "\\boxed{<i>}"},
    ]
    (run / "rollouts" / "evaluate-latent-after.jsonl").write_text(json.dumps(rollout) + "\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "rl", "arm": HOSTILE, "step": 1, "reward_mean": 0.5, "rollout_s": 1.0}) + "\n")
        file.write('{"stage": "rl", "arm": "lat')
    page = _Page(write_report([run], tmp_path / "out")[0].read_text(encoding="utf-8"))
    assert not {"script", "img", "i", "b"} & set(page.tags) and not page.handlers
    assert any("alert(1)" in piece for piece in page.text)


@pytest.mark.parametrize("stop_after", ["traces", "projector_sft", "latent"])
def test_unfinished_runs_say_what_is_missing(tmp_path, stop_after):
    """Locks out a report that needs a finished run."""
    run = write_run(tmp_path / "part", arms=("latent",), steps=6, stop_after=stop_after)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "rl", "st')
    written = write_report([run], tmp_path / "out")
    text = written[0].read_text(encoding="utf-8")
    _Page(text)
    assert "not finished" in text and 'class="missing"' in text
    assert len(written) == (2 if stop_after == "latent" else 1)


def test_run_that_has_only_a_recipe(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{broken")
    (page,) = write_report([tmp_path / "run"], tmp_path / "run")
    assert "No arm has been evaluated yet" in page.read_text(encoding="utf-8")


def test_several_runs_in_one_page(tmp_path):
    """Locks out clashing ids and runs that cannot be told apart."""
    runs = [write_run(tmp_path / f"seed{k}", seed=k, arms=("latent",), steps=4) for k in (0, 1)]
    text = write_report(runs, tmp_path / "out")[0].read_text(encoding="utf-8")
    page = _Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert "Over the runs" in text and "seed0 · latent" in text and "seed1 · latent" in text


def test_without_matplotlib_the_page_says_what_to_install(full_run, tmp_path, monkeypatch):
    """Locks out a run that ends in an ImportError because an extra is missing."""
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (page,) = write_report([full_run], tmp_path)
    text = page.read_text(encoding="utf-8")
    assert charts.CHARTS_HELP.replace("'", "&#x27;") in text and "61.9 [57.6, 66.0]" in text


def test_rollout_survives_missing_and_strange_fields():
    """Locks out a report that fails on one odd rollout."""
    assert "not scored" in rollout_html({})
    assert "✗ reward -0.25" in rollout_html({"reward": -0.25, "segments": None})
    assert "more characters" in rollout_html({"segments": [{"text": "x" * 9000}]})
    assert '1 latent step"' in latent_html(1) and "× 40" in latent_html(40)  # noqa: RUF001


def test_running_mean_against_the_plain_loop():
    values = [1.0, 5.0, 2.0, 8.0, 3.0]
    plain = [sum(part) / len(part) for part in ([1, 5], [1, 5, 2], [5, 2, 8], [2, 8, 3], [8, 3])]
    assert running_mean(values, 1) == pytest.approx(plain)


def test_report_needs_neither_torch_nor_matplotlib_to_import():
    """Locks out a slow `lrscale --help`: the CLI imports the report."""
    code = (
        "import sys, lrscale.report.page, lrscale.report.table, lrscale.report.timing\n"
        "print([name for name in ('torch', 'matplotlib', 'numpy', 'pydantic') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.strip() == "[]"

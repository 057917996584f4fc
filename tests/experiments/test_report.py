import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from janax.experiments import config as configs
from janax.experiments import plots, report
from janax.experiments.config import TrainConfig
from janax.experiments.errors import UserError
from janax.experiments.metrics import MetricsWriter


def results(verdict="holds"):
    return report.Results(
        title="A <title> & more",
        intro="First paragraph.\n\nSecond paragraph.",
        claims=(
            report.Claim(id="x-1", claim="Error is < 1 %", paper=0.5, ours=0.4321, interval=0.056, seeds=5, verdict=verdict, note="see §3"),
            report.Claim(id="x-2", claim="It is fast", paper="yes"),
        ),
        tables=(report.Table(title="Numbers", columns=("name", "value"), rows=(("a", 1.0), ("b", None))),),
        figures=(report.Figure(path="figures/p.png", caption="A picture."),),
        notes=("A note.",),
    )


@pytest.fixture
def workdir(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    record = {"experiment": "toy", "preset": "smoke", "seed": 3, "config": TrainConfig(), **configs.environment()}
    configs.write_json(directory / "config.json", record)
    configs.write_json(directory / "status.json", {"state": "finished", "seconds": 75.0})
    for seed in (0, 1):
        writer = MetricsWriter(directory, f"net-seed{seed}", tensorboard=False)
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0 / (step + seed), "score": float("nan")})
        writer.close()
    plots.image_grid(directory / "figures" / "p.png", np.random.default_rng(0).random((5, 4, 4)))
    report.save_results(directory, results())
    return directory


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.targets = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.targets += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data", "poster")]


def assert_self_contained(page):
    links = _Links()
    links.feed(page)
    assert not {"script", "iframe", "object", "embed", "base"} & set(links.tags)
    assert all(target.startswith(("data:", "#")) for target in links.targets)
    assert not re.search(r"url\(|@import|https?://", page)
    assert links.tags.count("main") == 1 and 'name="viewport"' in page and "@media print" in page and "prefers-color-scheme:dark" in page
    return links


def test_results_survive_json(workdir):
    assert report.load_results(workdir) == results()
    assert report.load_results(workdir.parent) is None
    (workdir / "results.json").write_text('{"claims": 3}')
    with pytest.raises(UserError, match="is not a janax result"):
        report.load_results(workdir)


def test_page_has_everything_inside(workdir):
    page = report.write_report(workdir).read_text()
    links = assert_self_contained(page)
    assert sum(target.startswith("data:image/png;base64,") for target in links.targets) == 2  # the picture and the loss curve
    assert "A &lt;title&gt; &amp; more" in page and "<title>A <title>" not in page
    for text in ("0.432 ± 0.056", "✓", "holds", "not run", "toy, preset smoke", "1 min 15 s", "num_steps", "range over seeds", "see §3"):
        assert text in page
    assert (workdir / "figures" / "curve-loss.png").exists() and not (workdir / "figures" / "curve-score.png").exists()


def test_unfinished_run_says_so(workdir):
    (workdir / "results.json").unlink()
    configs.write_json(workdir / "status.json", {"state": "stopped", "message": "stopped at step 3", "seconds": 1.0})
    page = report.write_report(workdir).read_text()
    assert "not finished (stopped)" in page and "stopped at step 3" in page
    assert_self_contained(page)


def test_combined_page_links_its_sections(workdir, tmp_path):
    page = report.write_combined([workdir, workdir], tmp_path / "out" / "all.html").read_text()
    links = assert_self_contained(page)
    for anchor in (target for target in links.targets if target.startswith("#")):
        assert f'id="{anchor[1:]}"' in page
    assert page.count("<h1>") == 1 and "2 hold, 2 not run" in page
    with pytest.raises(UserError, match=r"holds no janax run"):
        report.write_combined([tmp_path], tmp_path / "all.html")


@pytest.mark.parametrize(
    ("ours", "interval", "text"),
    [
        (12.3456, 0.5678, "12.35 ± 0.57"),
        (1234.5, 99.0, "1234 ± 99"),
        (0.00123456, 0.0000321, "0.001235 ± 0.000032"),
        (-1.5, 0.25, "−1.50 ± 0.25"),
        (0.5, (0.41, 0.62), "0.50 [0.41, 0.62]"),
        (0.51234, None, "0.5123"),
        (0.51234, math.inf, "0.5123"),
        (0.51234, (None, None), "0.5123"),
        (7, None, "7"),
        ("yes", 0.1, "yes"),
        (None, 0.1, "–"),
        (0.0, 0.0, "0.000 ± 0.000"),
    ],
)
def test_numbers_are_written_to_their_interval(ours, interval, text):
    assert report.format_interval(ours, interval) == text


def test_bad_entries_are_named():
    with pytest.raises(ValueError, match="'verdict' is 'maybe'"):
        report.Claim(id="x", claim="c", verdict="maybe")
    with pytest.raises(ValueError, match="a row has 1 entries, expected 2"):
        report.Table(title="t", columns=("a", "b"), rows=((1,),))


def test_terminal_table(capsys):
    report.show(results("does not hold"), Console(width=100))
    text = capsys.readouterr().out
    assert "✗ does not hold" in text and "0.432 ± 0.056" in text and "Error is < 1 %" in text


def test_pictures_are_written_and_checked(tmp_path):
    x = np.arange(3.0)
    for path in (
        plots.lines(
            tmp_path / "a" / "l.png", {"one": (x, x, x - 1, x + 1), "two": (x, 2 * x)}, xlabel="x", ylabel="y", reference={"paper": 1.0}
        ),
        plots.dots(tmp_path / "d.png", {"one": (1.0, 0.5, 1.5), "two": (2.0, -math.inf, math.inf)}, ylabel="y"),
        plots.image_grid(tmp_path / "g.png", np.zeros((3, 4, 4, 3)), row_labels=("row",), column_labels=("a", "b", "c"), columns=3),
    ):
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"'images' has shape \(4, 4\)"):
        plots.image_grid(tmp_path / "g.png", np.zeros((4, 4)))

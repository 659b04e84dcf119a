"""The report: groups of users by hand, the page's HTML, the program, and the page in a browser."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from hsft.evaluator.metrics import UNRANKED, per_user
from hsft.finished import write_report as recipe
from hsft.report.breakdown import (
    Group,
    group_estimate,
    history_groups,
    popularity_deciles,
    popularity_groups,
    recall_curve,
)
from hsft.report.charts import Series, group_chart
from hsft.report.compare import Comparison, Row
from hsft.report.page import Chart, Page, Section, Table, render
from hsft.report.result import read_ranks
from hsft.report.run_tables import applies
from hsft.report.sections import headline
from report import main
from tests.browser import open_browser
from tests.conftest import Project

TRAIN = (
    *("--use_qlora", "True", "--qlora_quant_type", "none", "--epochs", "1"),
    *("--optim_args.learning_rate", "1e-2"),
)
HOSTILE = "<script>alert(1)</script> & \"item\" 'x'"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Reader(HTMLParser):
    """Checks that tags are closed in order, and collects text, tags and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


def tables_of(html: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the rows of a section's open tables and of its folded ones: first cell -> the others."""
    folded = "".join(re.findall(r"(?s)<details>(.*?)</details>", html))
    shown = re.sub(r"(?s)<details>.*?</details>", "", html)
    rows = r'(?s)<th scope="row">(.*?)</th>(.*?)</tr>'
    first, second = (
        {name: re.findall(r"(?s)<td>(.*?)</td>", cells) for name, cells in re.findall(rows, part)}
        for part in (shown, folded)
    )
    return first, second


def rename_item(project: Project, item: str, title: str) -> None:
    path = project.root / "information" / "tiny.csv"
    quoted = title.replace('"', '""')
    path.write_text(re.sub(rf"(?m)^{item},[^,]*", f'{item},"{quoted}"', path.read_text()))


def test_history_groups_by_hand() -> None:
    lengths = np.array([1, 2, 3, 4, 5, 6, 7, 8])
    groups = history_groups(lengths)
    assert [group.name for group in groups] == [
        "1 to 2 items", "3 to 4 items", "5 to 6 items", "7 to 8 items",
    ]  # fmt: skip
    assert [group.size for group in groups] == [2, 2, 2, 2]
    assert groups[2].members.tolist() == [False] * 4 + [True] * 2 + [False] * 2


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([5, 5, 5], {"5 items": 3}),
        ([1], {"1 item": 1}),
        ([1, 1, 1, 1, 9], {"1 item": 4, "2 to 9 items": 1}),
        ([2, 9, 9, 9, 9], {"2 to 9 items": 5}),
    ],
)
def test_users_of_one_length_stay_together(lengths: list[int], expected: dict[str, int]) -> None:
    groups = history_groups(np.array(lengths))
    assert {group.name: group.size for group in groups} == expected
    assert np.sum([group.members for group in groups], axis=0).tolist() == [1] * len(lengths)


def test_popularity_groups_by_hand() -> None:
    # Items 1..6 with 10, 4, 4, 1, 1, 0 of 20 interactions. More popular than each: 0, 10, 10, 18, 18
    # of 20; less popular: 10, 2, 2, 0, 0 of 20. Items 2 and 3 have 10 % below and 50 % above: tail.
    counts = np.array([0, 10, 4, 4, 1, 1, 0])
    groups = popularity_groups(counts, np.array([1, 2, 3, 4, 6, 1]))
    assert [(group.name, group.size, list(group.notes)) for group in groups] == [
        ("head", 2, ["1 item", "10 interactions each"]),
        ("middle", 0, ["0 items"]),
        ("tail", 3, ["4 items", "1 to 4 interactions each"]),
        ("never in training", 1, ["1 item"]),
    ]
    assert groups[2].members.tolist() == [False, True, True, True, False, False]


def test_popularity_has_a_middle_and_one_level_is_the_middle() -> None:
    # 100 interactions: items of 30, 25 and 25, and twenty of 1.
    counts = np.array([0, 30, 25, 25, *([1] * 20)])
    sizes = {g.name: g.size for g in popularity_groups(counts, np.arange(1, 24))}
    # 25s: 30 % above and 20 % below, which is not fewer than 20 %.
    assert sizes == {"head": 1, "middle": 2, "tail": 20, "never in training": 0}
    even = popularity_groups(np.array([0, 3, 3, 3]), np.array([1, 2, 3]))
    assert [group.size for group in even] == [0, 3, 0, 0]
    none = popularity_groups(np.array([0, 0, 0]), np.array([1, 2]))
    assert [group.size for group in none] == [0, 0, 0, 2]


def test_popularity_deciles_by_hand() -> None:
    counts = np.array([0, 5, 1, 9, 2])
    # Of 20 targets 7 are of item 2 (1 interaction), 1 of item 4 (2), 4 of item 1 (5), 8 of item 3 (9).
    deciles = popularity_deciles(counts, np.repeat([3, 2, 1, 4], [8, 7, 4, 1]))
    assert [(group.name, group.size, list(group.notes)) for group in deciles.groups] == [
        ("decile 1 to 3", 7, ["1 interaction each"]),
        ("decile 4", 1, ["2 interactions each"]),
        ("decile 5 to 6", 4, ["5 interactions each"]),
        ("decile 7 to 10", 8, ["9 interactions each"]),
    ]
    assert deciles.of_decile.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3, 3]
    assert deciles.groups[3].members.tolist() == [True] * 8 + [False] * 12
    even = popularity_deciles(np.arange(101), np.arange(1, 101)[::-1])
    assert [group.size for group in even.groups] == [10] * 10
    assert list(even.groups[9].notes) == ["91 to 100 interactions each"]
    one = popularity_deciles(np.array([0, 0, 3]), np.array([1]))
    assert [group.name for group in one.groups] == ["decile 1 to 10"]


def test_a_group_s_metric_is_over_its_users_alone() -> None:
    ranks = np.array([1, 3, 50, 2])
    group = Group("", np.array([True, True, True, False]))
    actual = group_estimate(group, "NDCG", ranks, 10)
    assert actual is not None
    # 1 / log2(2), 1 / log2(4), a miss.
    assert actual.value == pytest.approx(0.5)
    assert 0 <= actual.low <= actual.value <= actual.high <= 1
    assert group_estimate(Group("", np.zeros(4, dtype=bool)), "NDCG", ranks, 10) is None


def test_recall_curve_is_recall_at_every_k_with_binomial_intervals() -> None:
    ranks = np.random.default_rng(0).integers(1, 200, 400)
    curve = recall_curve(ranks)
    assert curve.cuts.tolist() == list(range(1, 101))
    for k in (1, 10, 100):
        assert curve.values[k - 1] == pytest.approx(per_user("Recall", ranks, k).mean())
        p = curve.values[k - 1]
        spread = 1.96 * np.sqrt(p * (1 - p) / len(ranks))
        assert curve.high[k - 1] - curve.low[k - 1] == pytest.approx(2 * spread, abs=0.01)
    assert (np.diff(curve.values) >= 0).all()


def test_the_page_escapes_all_that_is_data() -> None:
    table = Table(HOSTILE, [HOSTILE], [[HOSTILE]])
    html = render(
        Page(
            HOSTILE,
            HOSTILE,
            [],
            [(HOSTILE, HOSTILE)],
            [Section(HOSTILE, [HOSTILE], tables=[table])],
        )
    )
    read = Reader(html)
    assert "script" not in read.tags
    # Title, heading, headline, a fact, contents, heading, paragraph, caption, header, cell.
    assert read.text.count(HOSTILE) == 11
    assert ("aria-label", HOSTILE) in read.attributes


def test_labels_of_groups_do_not_meet(project: Project, tmp_path: Path) -> None:
    names = ["19 to 32 items", "33 to 64 items", "65 to 147 items", "never in training"]
    estimates = np.array([0.1, 0.2, 0.3, 0.4])
    series = Series("pop", 0, estimates, None, estimates, estimates)
    groups = [f"{name}\nn = 1000" for name in names]
    charts = [
        Chart(group_chart(groups, [series], "Recall@10", title=title, description=""), "")
        for title in ("one", "two")
    ]
    page = Page("", "", [], [], [Section("", charts=charts)])
    Path("page.html").write_text(render(page), encoding="utf-8")
    with open_browser(tmp_path) as browser:
        browser.get((project.root / "page.html").as_uri())
        boxes = browser.execute_script(
            "return [...document.querySelector('svg').querySelectorAll('text')]"
            ".map(e => [e.textContent, e.getBoundingClientRect()])"
            ".filter(([text, box]) => /items|to|n = |never|training/.test(text))"
            ".map(([text, box]) => [box.left, box.right, box.top, box.bottom])"
        )
    assert len(boxes) >= 12
    for number, one in enumerate(boxes):
        for two in boxes[:number]:
            apart = (
                one[0] > two[1] or two[0] > one[1] or one[2] >= two[3] - 2 or two[2] >= one[3] - 2
            )
            assert apart, (one, two)


def test_the_report_of_a_fine_tuning_and_a_reference(project: Project) -> None:
    rename_item(project, "i3", HOSTILE)
    assert project.run("--model", "pop")[0] == 0
    assert project.run(*TRAIN)[0] == 0
    odd = "saved/$x_1$ <script>alert(2)"
    Path("saved/tiny-pop").rename(odd)
    arguments = [odd, "saved/tiny-qlora", "--out", "pages/one.html"]
    code, out, err = project.call(main, arguments)
    assert code == 0, err
    assert out == "report: pages/one.html\n"
    assert err.count("tiny: 30 users, 20 items") == 1
    read = read_page(Path("pages/one.html"))
    assert "script" not in read.tags
    assert HOSTILE in read.text
    assert "$x_1$ <script>alert(2)" in read.text
    # Nothing is fetched: every reference is to a part of the page itself.
    for name, value in read.attributes:
        assert name not in ("src", "srcset", "data", "action", "onload"), name
        assert name != "href" or (value or "").startswith("#")
        assert "://" not in (value or "")
    html = Path("pages/one.html").read_text(encoding="utf-8")
    assert not re.search(r"url\((?!#)|@import|https?://", html)
    ids = [value for name, value in read.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    hrefs = {value for name, value in read.attributes if name == "href"}
    assert {value[1:] for value in hrefs if value} <= set(ids)
    assert ("scope", "col") in read.attributes
    assert "The lists are those of tiny-qlora, the last fine-tuning run named" in read.text
    open_rows, folded = tables_of(
        html.partition(">Configuration</h2>")[2].partition("</section>")[0]
    )
    assert open_rows["model"] == ["pop", "HLLM"]
    assert "eval_batch_size" not in open_rows
    assert folded["eval_batch_size"] == ["256"]
    # Keys that decide nothing in a run, or in none of them, are not shown as if they did.
    assert folded["epochs"] == ["1 (1 of 2 runs; it does not apply to the others)"]
    assert not {"sasrec.heads", "knn_history", "stage"} & {*open_rows, *folded}
    open_rows, folded = tables_of(html.partition(">Environment</h2>")[2].partition("</section>")[0])
    assert open_rows["time: training"][0] == "does not apply"
    assert "item cache: model" not in open_rows
    assert folded["item cache: model"] == ["random (1 of 2 runs; it does not apply to the others)"]
    assert "torch" in folded
    assert read.tags.count("article") == 12
    assert read.tags.count("svg") == 11
    part = html.partition(">By item popularity</h2>")[2].partition("</section>")[0]
    assert "Line chart of Recall@10 by the popularity decile of the held-out item" in part
    header = re.search(r"(?s)<caption>Recall@10 by popularity decile</caption>(.*?)</tr>", part)
    assert header is not None
    sizes = [int(size) for size in re.findall(r"(\d+) users?\b", header[1])]
    assert sum(sizes) == 30
    table = part.partition("Recall@10 by popularity decile</caption>")[2].partition("</table>")[0]
    cells = tables_of(table)[0]["tiny-qlora: fine-tuned"]
    values = [float(cell.partition("<")[0]) for cell in cells]
    row = json.loads(Path("saved/tiny-qlora/result.json").read_text())["rows"][1]
    mean = np.average(values, weights=sizes)
    assert mean == pytest.approx(row["metrics"]["Recall@10"], abs=1e-3)
    assert "All ranks computed now equal the recorded ones." in read.text
    assert "drawn uniformly at random with seed 0" in read.text
    finished = json.loads(Path("saved/tiny-qlora/result.json").read_text())["finished"]
    assert finished.replace("T", " ").replace("+00:00", " UTC") in read.text
    code, _, err = project.call(main, [*arguments[:-1], "pages/two.html"])
    assert code == 0, err
    assert Path("pages/two.html").read_bytes() == Path("pages/one.html").read_bytes()
    assert sorted(path.name for path in Path("pages").iterdir()) == ["one.html", "two.html"]


def test_the_headline_says_what_is_best_and_how_sure_that_is() -> None:
    users, better = np.arange(100), np.full(100, 1)
    half = np.where(users % 2, 1, 200)

    def said(**ranks: np.ndarray) -> str:
        rows = [Row(name, users, values) for name, values in ranks.items()]
        columns = [("Recall", 5), ("Recall", 10), ("NDCG", 5), ("NDCG", 10), ("NDCG", 20)]
        return headline(Comparison("", rows, columns))

    # NDCG@10 of half is 0.5, so that better's gain is 100 %.
    text = said(half=half, better=better)
    assert text.startswith("better is best of 2 models: NDCG@10 1.0000 [")
    assert text.endswith("], +100.0% over the next best, half (p < 0.001), over 100 users.")
    alike = said(half=half, other=half)
    assert "(p = 1.000, a difference that may be chance)" in alike
    assert said(half=half).startswith("half: NDCG@10 0.5000 [")
    none = np.full(100, UNRANKED)
    assert said(a=none, b=none) == "None of the 2 models has a hit: NDCG@10 is 0 over 100 users."


@pytest.mark.parametrize(
    ("key", "config", "expected"),
    [
        ("epochs", {"model": "pop"}, False),
        ("epochs", {"model": "sasrec"}, True),
        ("epochs", {"model": "HLLM", "val_only": True}, False),
        ("optim_args.learning_rate", {"model": "HLLM"}, True),
        ("user_pretrain_dir", {"model": "HLLM", "val_only": True}, True),
        ("user_pretrain_dir", {"model": "sasrec"}, False),
        ("user_pretrain_dir", {"model": "llm_id"}, True),
        ("llm_id.item_width", {"model": "hstu"}, False),
        ("hstu.layers", {"model": "hstu"}, True),
        ("item_dropout", {"model": "llm_id"}, True),
        ("item_dropout", {"model": "hstu"}, False),
        ("residual_items", {"model": "HLLM"}, True),
        ("residual_items", {"model": "HLLM", "val_only": True}, False),
        ("residual_items", {"model": "llm_id"}, False),
        ("use_timestamps", {"model": "hstu"}, True),
        ("use_timestamps", {"model": "sasrec"}, False),
        ("qlora_r", {"model": "HLLM", "use_qlora": False}, False),
        ("item_cache_path", {"model": "item_knn"}, True),
        ("item_cache_path", {"model": "pop"}, False),
        ("eval_neg_sample_num", {"model": "pop", "eval_protocol": "sampled"}, True),
        ("topk", {"model": "random"}, True),
        ("a key of an earlier version", {"model": "pop"}, True),
    ],
)
def test_which_keys_apply(key: str, config: dict[str, object], expected: bool) -> None:
    assert applies(key, config) is expected


def test_named_users_show_history_lists_and_the_held_out_item(project: Project) -> None:
    assert project.run("--model", "item_knn")[0] == 0
    code, _, err = project.call(main, ["saved/tiny-item_knn", "--users", "u4,u2"])
    assert code == 0, err
    html = Path("saved/tiny-item_knn/report.html").read_text(encoding="utf-8")
    assert re.findall(r"<h3>(.*)</h3>", html) == ["User u4", "User u2"]
    rows = Path("dataset/tiny.csv").read_text().splitlines()
    items = [row.split(",")[0] for row in rows if row.split(",")[1] == "u4"]
    card = html.partition("User u4")[2].partition("</article>")[0]
    shown = re.findall(r"<li>(?:<span class=\"target\">)?(item \d+)", card)
    titles = [f"item {item[1:]}" for item in items]
    assert shown[: len(titles[-11:])] == titles[-11:]
    assert f"{titles[-1]} (held out)" in card
    ids = re.findall(r'<span class="id">id (i\d+)</span>', card)
    assert ids[: len(items[-11:])] == items[-11:]
    assert "The lists are those of tiny-item_knn, the only model." in html
    users, ranks = read_ranks("saved/tiny-item_knn", "item_knn")
    assert f"Rank of the held-out item: {ranks[users.tolist().index(4)]}." in card


def test_the_held_out_item_is_marked_at_its_rank(project: Project) -> None:
    assert project.run("--model", "item_knn", "--run_name", "run")[0] == 0
    code, _, err = project.call(main, ["saved/run", "--examples", "30"])
    assert code == 0, err
    html = Path("saved/run/report.html").read_text(encoding="utf-8")
    users, ranks = read_ranks("saved/run", "item_knn")
    places = {}
    for card in html.split("<h3>User u")[1:]:
        listed = re.findall("<li>(.*)</li>", card.partition("<ol>")[2].partition("</ol>")[0])
        marks = [position for position, item in enumerate(listed, start=1) if "(held out)" in item]
        places[int(card.partition("<")[0])] = marks
    assert list(places) == users.tolist()
    assert places == {
        int(user): [int(rank)] if rank <= 10 else []
        for user, rank in zip(users, ranks, strict=True)
    }
    assert any(places.values())


def test_a_held_out_item_of_the_history_has_no_rank(project: Project) -> None:
    lines = [line.split(",") for line in Path("dataset/tiny.csv").read_text().split()]
    of_user = [line for line in lines if line[1] == "u4"]
    of_user[-1][0] = of_user[0][0]
    Path("dataset/tiny.csv").write_text("\n".join(map(",".join, lines)) + "\n")
    assert project.run("--model", "item_knn", "--run_name", "run")[0] == 0
    code, _, err = project.call(main, ["saved/run", "--users", "u4", "--out", "page.html"])
    assert code == 0, err
    text = read_page(Path("page.html")).text
    assert "The held-out item is in the history too, so it has no rank" in text
    assert "All ranks computed now equal the recorded ones." in text
    assert str(UNRANKED) not in text


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--model", "random"), "draws another order at every scoring"),
        (
            ("--model", "pop", "--eval_protocol", "sampled", "--eval_neg_sample_num", "5"),
            "All ranks",
        ),
        (("--model", "sasrec", "--epochs", "1", "--eval_phase", "valid"), "All ranks"),
    ],
    ids=["random", "sampled", "sasrec"],
)
def test_runs_of_one_model(project: Project, more: tuple[str, ...], words: str) -> None:
    assert project.run(*more, "--run_name", "run")[0] == 0
    code, _, err = project.call(main, ["saved/run", "--out", "page.html"])
    assert code == 0, err
    read = read_page(Path("page.html"))
    assert words in read.text
    assert "differ from" not in read.text


def test_runs_of_one_name_are_told_apart(project: Project) -> None:
    for parent in ("a", "b"):
        more = ("--checkpoint_dir", parent, "--run_name", "run", "--epochs", "1")
        seed = ("--seed", "1" if parent == "a" else "2")
        assert project.run("--model", "sasrec", *more, *seed)[0] == 0
    arguments = ["a/run", "b/run", "b/run/", "--out", "page.html", "--examples", "0"]
    code, _, err = project.call(main, arguments)
    assert code == 0, err
    html = Path("page.html").read_text(encoding="utf-8")
    assert "<dd>a/run, b/run</dd>" in html
    losses = [
        json.loads(Path(run, "result.json").read_text())["training"]["history"][0]["loss"]
        for run in ("a/run", "b/run")
    ]
    table = html.partition("<caption>Loss and validation by epoch</caption>")[2].partition(
        "</table>"
    )[0]
    shown = re.findall(r'<th scope="row">(.*)</th>\s*<td>1</td>\s*<td>(.*)</td>', table)
    assert shown == [("a/run", f"{losses[0]:.4f}"), ("b/run", f"{losses[1]:.4f}")]


def test_what_changed_since_the_run_is_said(project: Project) -> None:
    assert project.run("--val_only", "True", "--run_name", "run")[0] == 0
    from tests.helpers import make_cache

    make_cache(project.root / "other.safetensors", seed=1)
    code, _, err = project.call(
        main, ["saved/run", "--out", "page.html", "--item_cache_path", "other.safetensors"]
    )
    assert code == 0, err
    actual = re.search(r"(\d+) of 12 ranks computed now differ", read_page(Path("page.html")).text)
    assert actual is not None
    each = re.findall(r"recorded by the run, \d+ computed now", Path("page.html").read_text())
    assert len(each) == int(actual.group(1)) > 0
    rows = Path("dataset/tiny.csv").read_text().splitlines()
    # As many of everything, with one user's last two items exchanged.
    (one, *end), (two, *last) = rows[-2].split(","), rows[-1].split(",")
    Path("dataset/tiny.csv").write_text(
        "\n".join([*rows[:-2], ",".join([two, *end]), ",".join([one, *last])]) + "\n"
    )
    code, _, err = project.call(main, ["saved/run", "--out", "page.html"])
    assert code == 0, err
    text = read_page(Path("page.html")).text
    assert text.count("have changed since the run (other held-out items, histories)") == 3
    Path("dataset/tiny.csv").write_text("\n".join(rows[:-5]) + "\n")
    code, _, err = project.call(main, ["saved/run", "--out", "page.html"])
    assert code == 0, err
    text = read_page(Path("page.html")).text
    assert text.count("have changed since the run (interactions: ") == 3


def test_runs_without_data_and_models_still_give_a_page(project: Project) -> None:
    assert project.run(*TRAIN, "--run_name", "run")[0] == 0
    shutil.rmtree("saved/run/best")
    code, _, err = project.call(main, ["saved/run", "--out", "page.html"])
    assert code == 0, err
    text = read_page(Path("page.html")).text
    assert "Left out, fine-tuned of run: " in text
    assert "run: untrained" in text
    assert read_page(Path("page.html")).tags.count("article") == 12
    shutil.rmtree("dataset")
    for name in ("config.yaml", "run.log"):
        Path("saved/run", name).unlink()
    code, _, err = project.call(main, ["saved/run", "--out", "page.html"])
    assert code == 0, err
    read = read_page(Path("page.html"))
    assert read.text.count("it has no config.yaml") == 3
    assert read.tags.count("svg") == 5
    assert "example users is left out: " in err
    code, _, err = project.call(main, ["saved/run", "--out", "page.html", "--examples", "0"])
    assert code == 0, err
    assert "Example users" not in read_page(Path("page.html")).text


def test_an_interruption_leaves_nothing(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    assert project.run("--model", "pop", "--run_name", "run")[0] == 0

    def stop(page: Page) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return render(page)

    monkeypatch.setattr(recipe, "render", stop)
    code, _, err = project.call(main, ["saved/run", "--out", "new/page.html"])
    assert code == 143
    assert err.splitlines()[-1] == "interrupted: stopped by SIGTERM"
    assert not Path("new").exists()


BAD = {
    "no html": (["--out", "page.txt"], ["--out page.txt does not end in .html"]),
    "a folder": (["--out", "taken.html"], ["cannot write taken.html"]),
    "unknown user": (["--users", "u1,nobody"], ["tiny has no user 'nobody'", "u0, u1"]),
    "negative": (["--examples", "-1"], ["--examples is -1"]),
    "no number": (["--seed", "x"], ["--seed", "report.py --help"]),
    "other phase": (["saved/other"], ["phase"]),
    "no run": (["saved"], ["no finished run"]),
}


@pytest.fixture
def two_phases(project: Project) -> Project:
    assert project.run("--model", "pop", "--run_name", "run")[0] == 0
    more = ("--model", "pop", "--eval_phase", "valid", "--run_name", "other")
    assert project.run(*more)[0] == 0
    Path("taken.html").mkdir()
    return project


def test_bad_input_is_one_line_and_leaves_nothing(two_phases: Project) -> None:
    for case, (more, words) in BAD.items():
        before = sorted(path for path in Path().rglob("*"))
        code, out, err = two_phases.call(main, ["saved/run", *more])
        assert (code, out) == (2, ""), case
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, err
        assert all(word in errors[0] for word in words), errors
        assert sorted(path for path in Path().rglob("*")) == before, case


def test_a_damaged_training_history_is_refused(project: Project) -> None:
    assert project.run("--model", "pop", "--run_name", "run")[0] == 0
    path = Path("saved/run/result.json")
    result = json.loads(path.read_text())
    for key, value in {
        "training": {"history": [{"epoch": "one"}]},
        "timings_s": {"data": "long"},
        "data": [],
    }.items():
        path.write_text(json.dumps({**result, key: value}))
        code, _, err = project.call(main, ["saved/run"])
        assert code == 2
        assert f"its {key}" in err
    assert not Path("saved/run/report.html").exists()


def test_the_page_in_a_browser(project: Project, tmp_path: Path) -> None:
    rename_item(project, "i3", HOSTILE)
    assert project.run("--model", "sasrec", "--epochs", "3", "--run_name", "run")[0] == 0
    code, _, err = project.call(main, ["saved/run", "--out", "page.html"])
    assert code == 0, err
    with open_browser(tmp_path) as browser:
        browser.get((project.root / "page.html").as_uri())
        assert browser.title == "HSFT report: tiny"
        for width in (1200, 400):
            browser.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
            )
            wide = (
                "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
            assert browser.execute_script(wide) == 0
        for scheme in ("light", "dark"):
            browser.execute_cdp_cmd(
                "Emulation.setEmulatedMedia",
                {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
            )
            assert browser.execute_script(CONTRAST) == []
        drawn = browser.execute_script(
            "return [...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().height)"
        )
        assert len(drawn) == 11
        assert min(drawn) > 100
        hover = browser.execute_script(
            "return [...document.querySelectorAll('svg g > title')].map(e => e.textContent)"
        )
        # Three cut-offs of two metrics as bars, three epochs twice, seven K.
        assert len(hover) >= 2 * 3 + 2 * 3 + 7
        values = json.loads(Path("saved/run/result.json").read_text())["rows"][0]["metrics"]
        assert hover[0].startswith(f"run, Recall@5: {values['Recall@5']:.4f} [")
        named = "return [...document.querySelectorAll('svg')].every(e => e.getAttribute('role')"
        named += " === 'img' && document.getElementById(e.getAttribute('aria-labelledby'))"
        named += ".textContent && document.getElementById(e.getAttribute('aria-describedby')))"
        assert browser.execute_script(named)
        # Scrolled to its end, a table still shows the models' names.
        moved = browser.execute_script(
            "const table = document.querySelector('.scroll');"
            "table.scrollLeft = 1e6;"
            "const name = table.querySelector('tbody th').getBoundingClientRect();"
            "return [table.scrollLeft, name.left - table.getBoundingClientRect().left];"
        )
        assert moved[0] > 0
        assert moved[1] == 0
        marked = browser.execute_script(
            "return [...document.querySelectorAll('.target')].map(e => e.textContent)"
        )
        assert len(marked) >= 12
        assert browser.execute_script("return document.scripts.length") == 0
        assert browser.get_screenshot_as_png().startswith(b"\x89PNG")
        assert browser.get_log("browser") == []


# WCAG 2's contrast of every text with the nearest background: those below 4.5.
CONTRAST = """
const parse = text => text.match(/[\\d.]+/g).map(Number);
const light = text => parse(text).slice(0, 3).map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ground = e => { while (e) {
  const c = getComputedStyle(e).backgroundColor;
  if ((parse(c)[3] ?? 1) > 0) return c;
  e = e.parentElement; } return "rgb(255, 255, 255)"; };
return [...document.querySelectorAll("h1,h2,h3,h4,p,li,td,th,dt,dd,a,small,summary,text,.target")]
  .filter(e => {
    const style = getComputedStyle(e);
    const ink = light(e.tagName === "text" ? style.fill : style.color), back = light(ground(e));
    return (Math.max(ink, back) + 0.05) / (Math.min(ink, back) + 0.05) < 4.5;
  }).map(e => e.tagName + ": " + e.textContent);
"""

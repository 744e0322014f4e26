"""The paper's tables: their content, and that a stopped sweep continues where it was."""

import dataclasses
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bd3lm.config import TrainConfig
from bd3lm.errors import ConfigError
from bd3lm.model.flops import step_flops
from bd3lm.training import train_only
from bd3lm_paper import TABLES, Corpora, Row, Run, make_tables, runner
from bd3lm_paper import cli as paper
from bd3lm_paper.corpora import Texts
from bd3lm_paper.formulas import FORMULAS, schedules
from bd3lm_paper.make import chosen
from bd3lm_paper.recipes import Recipes
from bd3lm_paper.render import difference, figure
from bd3lm_paper.runner import Sweep
from bd3lm_paper.scale import scale_named
from bd3lm_paper.spec import record_key

TEXTS = {"lm1b": "a", "owt": "b", "zero_lm1b": "c", "lambada": "none", "wikitext": "d"}


class Silent:
    """Counts runs and measurements; may raise after a number of measurements."""

    def __init__(self, stop_after=None):
        self.steps, self.measured_runs, self.stop_after = 0, [], stop_after

    def planned(self, steps, measurements):
        self.plan = (steps, measurements)

    def training(self, run, steps):
        self.steps += steps

    def measured(self, run, measure, seconds):
        self.measured_runs.append((run, measure.kind))
        if self.stop_after is not None and len(self.measured_runs) == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture
def roles(corpus):
    return Corpora({"lm1b": str(corpus), "owt": str(corpus)})


def make(names, out, roles, events):
    return make_tables(
        names, "smoke", out, roles, seeds=None, evaluator=None, page=None, events=events
    )


def test_a_stopped_sweep_loses_at_most_the_running_cell(tmp_path, roles):
    stopped, rest, whole, again = Silent(stop_after=3), Silent(), Silent(), Silent()
    with pytest.raises(KeyboardInterrupt):
        make(["table1"], tmp_path / "a", roles, stopped)
    assert len(list((tmp_path / "a" / "cells").glob("*.json"))) == 3
    make(["table1"], tmp_path / "a", roles, rest)
    make(["table1"], tmp_path / "b", roles, whole)
    assert whole.plan == (12, 6)  # three models, two seeds, two steps
    assert stopped.steps + rest.steps == whole.steps == 12
    assert len(stopped.measured_runs) + len(rest.measured_runs) == 6
    tables = [json.loads((tmp_path / x / "tables" / "table1.json").read_text()) for x in ("a", "b")]
    assert tables[0] == tables[1]
    shutil.rmtree(tmp_path / "a" / "cells")  # the archive holds them
    make(["table1", "figure1"], tmp_path / "a", roles, again)
    assert again.steps == 0  # the figure's runs are the table's
    for name in ("table1.md", "table1.png", "figure1.png"):
        assert (tmp_path / "a" / "tables" / name).stat().st_size > 0
    text = (tmp_path / "a" / "tables" / "table1.md").read_text()
    assert "| PPL, Kordas et al. | PPL, Arriola et al. |" in text
    assert "2231" in text


def test_sweeps_at_the_same_time_share_the_work(tmp_path, roles, monkeypatch):
    trained = []

    def counted(config, *rest):
        trained.append(config)
        train_only(config, *rest)

    monkeypatch.setattr(runner, "train_only", counted)
    both = [Silent(), Silent()]
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(make, ["table1"], tmp_path, roles, events) for events in both]:
            done.result()
    assert len(trained) == 6  # three models, two seeds: each by one of the two
    for events in both:
        assert events.steps == events.plan[0]
        assert len(events.measured_runs) == events.plan[1]
    assert len(list((tmp_path / "cells").glob("*.json"))) == 6


def test_operations_of_a_step_follow_from_the_shape():
    width, depth, vocab, length, rows = 16, 1, 100, 32, 4
    recipes = Recipes(scale_named("smoke"))
    ar = step_flops(recipes.train("ar", "lm1b", 1, (1,)), vocab)
    layer = 4 * width**2 + 8 * width**2  # four projections, and an MLP four times as wide
    pairs = length * (length + 1) / 2
    expected = depth * (length * layer + 2 * width * pairs) + length * width * vocab
    assert ar == 6 * rows * expected
    mdlm = step_flops(recipes.train("mdlm", "lm1b", 0, (1,)), vocab)
    half = length / 2
    expected = length * 3 * width**2 + half * 9 * width**2 + 2 * width * length**2
    assert mdlm == 6 * rows * (expected + half * width * vocab)
    # Two streams: keys and values of all positions but the last clean block's. With one layer, no
    # clean position is a query; in another one, they and their MLP are all there.
    recipe = recipes.train("bd3lm", "lm1b", 4, (1,))
    expected = length * width**2 + (2 * length - 4) * 2 * width**2 + half * 9 * width**2
    expected += 2 * width * length * (length + 4) / 2
    one = 6 * rows * (expected + half * width * vocab)
    assert step_flops(recipe, vocab) == one
    deeper = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, depth=2))
    another = (2 * length - 4) * 12 * width**2 + 2 * width * length**2
    assert step_flops(deeper, vocab) == one + 6 * rows * another


def test_tables_with_every_kind_of_cell(tmp_path, roles, capsys):
    args = ["--scale", "smoke", "--out", str(tmp_path), "--seeds", "1"]
    for role, path in roles.paths.items():
        args += ["--corpus", role, path]
    paper.main(["table6", "table7", "table9", *args])
    assert "Made 3 tables" in capsys.readouterr().out
    table = json.loads((tmp_path / "tables" / "table7.json").read_text())
    assert len(table["rows"]) == 6
    for row in table["rows"]:
        assert row["cells"]["Gen. PPL"]["mean"] is None  # no evaluator was named
        assert row["cells"]["NFEs"]["mean"] <= row["cells"]["forwards"]["mean"]
        assert row["cells"]["entropy"]["mean"] > 0


def test_a_joint_run_is_measured_as_both_of_its_models(tmp_path, roles):
    whole = TABLES["table3"](Recipes(scale_named("smoke")))
    table = dataclasses.replace(whole, rows=whole.rows[-2:])
    sweep = Sweep(tmp_path, Texts(roles, tmp_path / "data"))
    sweep.make([table], Silent())
    (bound, ar) = (row.cells["PPL"] for row in table.rows)
    assert bound.run == ar.run
    assert all(run.config.objective.ar_weight == 1 for run in bound.run.lineage())
    records = [sweep.record(cell.run, cell.measure) for cell in (bound, ar)]
    assert [record["measure"] for record in records] == ["perplexity", "perplexity as AR"]
    assert [record["values"]["forwards"] for record in records] == [16, 1]
    assert records[0]["values"]["row_tokens"] == records[1]["values"]["row_tokens"]


def test_every_table_is_well_formed_at_every_scale():
    for scale in ("smoke", "cpu", "full"):
        recipes = Recipes(scale_named(scale))
        for name, build in TABLES.items():
            table = build(recipes)
            assert table.name == name
            labels = [row.label for row in table.rows]
            assert len(set(labels)) == len(labels)
            for row in table.rows:
                assert set(row.cells) <= set(table.columns)
                assert row.base is None or row.base in labels
                assert all(len(label) == len(table.labels) for label in labels)
    steps = {run.total_steps for run, _ in TABLES["table4"](Recipes(scale_named("full"))).cells()}
    assert steps == {6000}


def test_full_is_the_papers_protocol():
    run = next(iter(TABLES["table3"](Recipes(scale_named("full"))).cells()))[0].config
    assert (run.batch_size, run.seq_len, run.optim.lr, run.optim.warmup_steps) == (
        512,
        128,
        3e-4,
        2500,
    )
    full = scale_named("full")
    assert (full.corpora.paths["lm1b"], full.corpora.tokenizer("lm1b")) == (
        "hub:lm1b",
        "bert-base-uncased",
    )
    assert (full.corpora.tokenizer("owt"), full.corpora.tokenizer("wikitext")) == ("gpt2", "gpt2")
    owt = next(iter(TABLES["table4"](Recipes(full)).cells()))[0].config
    assert (owt.batch_size, owt.seq_len) == (512, 1024)
    assert (owt.model.width, owt.model.dropout) == (256, 0.1)
    tuned = TABLES["table2"](Recipes(full)).rows[2].cells["PPL"].run
    assert (tuned.config.noise.clip, tuned.config.noise.resample) == ((0.3, 0.8), True)
    assert tuned.init.config.block == 128
    assert (tuned.init.config.steps, tuned.config.steps) == (400, 100)


def test_names_of_runs_follow_what_made_them():
    run = Run(TrainConfig(steps=5), "lm1b")
    key = run.key(TEXTS)
    same = dataclasses.replace(run.config, device="cpu", data="elsewhere", log_every=1)
    assert Run(same, "lm1b").key(TEXTS) == key
    assert run.seeded(1) == run
    for other in (
        run.seeded(2),
        Run(dataclasses.replace(run.config, steps=6), "lm1b"),
        Run(run.config, "owt"),
        Run(run.config, "lm1b", init=run),
    ):
        assert other.key(TEXTS) != key
    child = Run(run.config, "lm1b", init=run)
    assert child.seeded(3).init.config.seed == 3
    assert child.key(TEXTS | {"owt": "z"}) == child.key(TEXTS)
    assert child.key(TEXTS | {"lm1b": "z"}) != child.key(TEXTS)


def test_differences_are_paired_by_row_and_seed(tmp_path, roles):
    """Two rows of known nats: the mean written out, and an error of the differences alone."""
    table = TABLES["table1"](Recipes(scale_named("smoke")))
    sweep = Sweep(tmp_path, Texts(roles, tmp_path / "data"))
    fingerprints = sweep.texts.fingerprints
    rng = np.random.default_rng(0)
    shared = rng.normal(50, 10, 4)
    (tmp_path / "cells").mkdir()
    for index, row in enumerate(table.rows[:2]):
        for seed in table.seeds:
            cell = row.cells["PPL"]
            run = cell.run.seeded(seed)
            nats = shared + index * np.array([1.0, 2.0, 3.0, 4.0]) + index * 0.1 * seed
            values = {"ppl": 7.0 + index, "row_nats": nats.tolist(), "row_tokens": [10] * 4}
            file = tmp_path / "cells" / f"{record_key(run, cell.measure, fingerprints)}.json"
            file.write_text(json.dumps({"values": values}))
    row: Row = table.rows[0]
    found = difference(sweep, table, row)
    wanted = -np.array([[1, 2, 3, 4.0]]) - 0.1 * np.array([[1.0], [2.0]])
    wanted = 4 * wanted / 40
    assert found.mean == pytest.approx(wanted.mean())
    by_row = wanted.mean(0).var(ddof=1) / 4
    by_seed = wanted.mean(1).var(ddof=1) / 2
    assert found.error == pytest.approx(math.sqrt(by_row + by_seed))
    assert difference(sweep, table, table.rows[1]) is None  # it is the base
    assert difference(sweep, table, table.rows[2]) is None  # not measured
    shown = figure(sweep, table, row.cells["PPL"])
    assert (shown.mean, shown.seeds, shown.error, shown.paper) == (7.0, 2, 0.0, 1893)


def test_formulas_say_what_they_check():
    made = FORMULAS["table9"]()
    for lines, value in zip(made.panels.values(), ("mask_prob", "loss_weight"), strict=True):
        assert list(lines) == list(schedules())
        for name, schedule in schedules().items():
            np.testing.assert_array_equal(lines[name], getattr(schedule, value)(made.x))
    nine = made.markdown
    assert nine.count("within ") == 7
    for line in nine.splitlines():
        if "within" in line:
            assert float(line.split("within ")[1].split(" ")[0]) < 1e-3
    two = FORMULAS["figure2"]().markdown
    assert "holds" in two
    assert "fails" in two
    (lines,) = FORMULAS["table12"]().panels.values()
    np.testing.assert_allclose(lines["sigmoid"], lines["simple"], rtol=1e-12)


def test_a_text_is_tokenized_anew_when_it_or_its_tokenizer_changes(tmp_path, tokenizer):
    text = tmp_path / "text.jsonl"
    lines = (json.dumps({"text": f"Document number {i}."}) for i in range(40))
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = set()
    own = tmp_path / "own.json"
    own.write_text(tokenizer.json, encoding="utf-8")
    for name in ("default", str(own), "default"):
        texts = Texts(Corpora({"lm1b": str(text)}, {"lm1b": name}), tmp_path / "data")
        found.add(texts.splits("lm1b").train.path)
    assert len(found) == 2
    before = texts.fingerprints["lm1b"]
    with text.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "One document more."}) + "\n")
    after = Texts(Corpora({"lm1b": str(text)}), tmp_path / "data")
    assert after.fingerprints["lm1b"] != before


def test_a_page_gets_its_tables_and_keeps_its_words(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- table9 -->\nold\n<!-- /table9 -->\nAfter.\n", encoding="utf-8")
    for _ in range(2):  # filling it again changes nothing
        make_tables(
            ["table9"],
            "smoke",
            tmp_path / "out",
            Corpora(),
            seeds=None,
            evaluator=None,
            page=page,
            events=Silent(),
        )
        text = page.read_text(encoding="utf-8")
        assert text.startswith("Before.\n<!-- table9 -->\n### Table 9: ")
        assert text.endswith("![table9](out/tables/table9.png)\n<!-- /table9 -->\nAfter.\n")
        assert "old" not in text


def test_names_that_do_not_exist(tmp_path, capsys):
    assert chosen(["all"]) == [*TABLES, *FORMULAS]
    with pytest.raises(ConfigError, match="table = table99: must be one of table1, "):
        chosen(["table99"])
    absent = str(tmp_path / "page.md")
    wrongs = (["--scale", "huge"], ["--corpus", "moon", "x"], ["--tokenizer", "wikitext", "gpt2"])
    first = ["--corpus", "moon", "x", "--corpus", "owt", "y"]  # the second does not replace it
    for wrong in (*wrongs, first, ["--page", absent]):
        with pytest.raises(SystemExit) as stop:
            paper.main(["table1", "--out", str(tmp_path / "o"), *wrong])
        assert stop.value.code == 2
    assert not (tmp_path / "o").exists()

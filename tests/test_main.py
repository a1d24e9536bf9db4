"""The command line: configs, typed arguments, mistakes, and the program as a user starts it."""

import errno
import io
import os
from pathlib import Path

import pytest

from configs import point, pretrain, quickstart
from jaxpeft import cli, config
from jaxpeft.runtime import locks
from jaxpeft.runtime.text import aligned
from jaxpeft.training import run
from jaxpeft.training.progress import Progress

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections reads configs so


def test_arguments_are_typed_and_unknown_ones_list_the_known():
    a = config.parse_arg("size=4,fraction=0.5,flag,task=vqa", size=8, fraction=1.0, flag=False, task="x")
    assert (a.size, a.fraction, a.flag, a.task) == (4, 0.5, True, "vqa")
    with pytest.raises(ValueError, match=r"unknown config argument 'sise' \(did you mean 'size'\?\); choose from size"):
        config.parse_arg("sise=4", size=8)
    with pytest.raises(ValueError, match="size='big': expected int"):
        config.parse_arg("size=big", size=8)
    with pytest.raises(ValueError, match="expected true or false"):
        config.parse_arg("flag=maybe", flag=True)


def test_a_point_is_what_its_argument_says():
    c = point.get_config("task=captioning,method=lora,size=4,fraction=0.1,seed=3,head=untied")
    assert c.task == "captioning" and c.method.rank == 4 and c.data.fraction == 0.1 and c.head == "untied"
    assert c.seed == c.data.subset_seed == 3
    assert point.get_config("method=full").optim.lr == 5e-4


def test_a_run_is_named_by_the_size_that_its_method_has():
    c = point.get_config("method=lora,size=4")
    c.method.rank = 16
    assert run.point_id(c) == "vqa-lora16-f1-base-s0"
    c.head, c.data.n_images = "transform", 4
    assert run.point_id(c) == "vqa-lora16+transform-n4-base-s0"
    assert run.point_id(point.get_config("method=bitfit")) == "vqa-bitfit-f1-base-s0"


def test_quickstart_and_pretrain_configs_differ_where_they_say():
    assert quickstart.get_config().head == "transform" and quickstart.get_config("task=captioning").task == "captioning"
    c = pretrain.get_config("steps=7")
    assert [c.stages[name].steps for name in c.order] == [7, 7, 7]
    firsts = [
        (c.stages[n].first, c.stages[n].first + pretrain.get_config().stages[n].steps * c.batch_size)
        for n in c.order[1:]
    ]
    assert firsts[0][1] <= firsts[1][0]  # no picture in two stages


@pytest.fixture
def refused(capsys, monkeypatch):
    """The program in this process: what it says on stderr before it ends with status 1."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli, "_prepare_process", lambda: None)

    def run(*arguments):
        with pytest.raises(SystemExit, match="^1$"):
            cli.main(["run", *arguments])
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.method.rank=0"], "error: lora: rank is 0"),
        (["--config.base=/no/such"], "error: no checkpoint at '/no/such'"),
        (["--config.data.name=coco"], "error: unknown data set 'coco'; choose one of coco_captions, folder"),
        (["--config.model.dtype=fp16"], "error: model.dtype is 'fp16'; choose one of float32, bfloat16"),
        (["--config.optim.schedule=cosin"], "error: optim.schedule is 'cosin'; choose one of constant"),
        (["--config.optim.name=adm"], "error: unknown optimizer 'adm' (did you mean 'adamw'?); choose one of"),
        (
            ["--config.optim.learning_rate=1"],
            "learning_rate: no such key (did you mean 'optim.lr'?); optim has optim.b1",
        ),
        (["--config.optm.lr=1"], "error: --config.optm.lr: no such key (did you mean 'optim.lr'?)"),
        (["--config.lr=1"], "error: --config.lr: no such key (did you mean 'optim.lr'?)"),
        (["--config.size=16"], "error: --config.size was removed; set the size in the config's argument (:size=16)"),
        (["--config.stop=3"], "error: --config.stop: no such key (did you mean 'steps'?); stop has stop.every"),
        (["--config.steps=many"], "error: flag --config.steps=many: invalid literal"),
        (["--confg.steps=1"], "error: unknown argument --confg.steps"),
        (["steps=7"], "error: unexpected argument 'steps=7'; a config key is set as --config.key=value"),
        (["--imports=no_such"], "error: --imports=no_such: module not found"),
    ],
)
def test_a_mistake_ends_in_one_line_before_any_work(tmp_path, refused, arguments, message):
    said = refused(
        "--config=configs/quickstart.py:steps=1", f"--workdir={tmp_path}", "--config.data.n_train=4", *arguments
    )
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "result.json").exists() and not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    "config, message",
    [
        ("configs/nope.py", "error: --config=configs/nope.py: file not found"),
        ("configs/folder.py", "error: configs/folder.py requires root=DIRECTORY"),
        ("configs/folder.py:root=x,annotation=y", "unknown config argument 'annotation' (did you mean 'annotations'?)"),
        ("configs/folder.py:root=x,method=lroa", "error: unknown method 'lroa' (did you mean 'lora'?); choose one of"),
        ("README.md", "error: "),
    ],
)
def test_a_config_that_cannot_be_made_is_one_line(tmp_path, refused, config, message):
    said = refused(f"--config={config}", f"--workdir={tmp_path}")
    assert message in said and said.count("\n") == 1, said


@pytest.mark.parametrize(
    "config, flag, why",
    [
        ("quickstart", "--dry_run", "is for studies, and --config=quickstart is a single run; use `jaxpeft preflight`"),
        ("quickstart", "--rerun=*", "is for studies, and --config=quickstart is a single run; use a new --workdir"),
        ("quickstart", "--workers=2", "is for studies, and --config=quickstart is a single run"),
        ("quickstart", "--topology=h100", "needs --preflight"),
        ("studies/tiny", "--preflight", "is for single runs, and --config=studies/tiny is a study; use --dry_run"),
        ("studies/tiny", "--accept_changes", "is for single runs, and --config=studies/tiny is a study"),
        ("studies/tiny", "--topology=h100", "is for single runs, and --config=studies/tiny is a study"),
    ],
)
def test_a_flag_that_would_have_no_effect_is_refused(tmp_path, refused, config, flag, why):
    said = refused(f"--config={config}", f"--workdir={tmp_path}", flag)
    assert said == f"error: {flag.partition('=')[0]} {why}\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["studies/tiny", "pretrain"])
def test_preflight_plans_single_runs_only(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="^1$"):
        cli.main(["preflight", f"--config={name}"])
    assert f"error: --config={name} is not a single fine-tuning run" in capsys.readouterr().err


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("links", [True, False])
def test_one_process_holds_a_directory_also_without_hard_links(tmp_path, monkeypatch, links):
    """Mounted buckets have none."""

    def refused(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    with locks.held(tmp_path):
        (tmp_path / "work").write_text("")
        with pytest.raises(ValueError, match="is in use"), locks.held(tmp_path):
            pass
    with locks.held(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere():
    bar, lines = _Terminal(), io.StringIO()
    for out in (bar, lines):
        progress = Progress(4, 8, every=0, out=out)
        for step in range(1, 5):
            progress.update(step, loss=1.5)
    assert bar.getvalue().count("\r") == 4 and bar.getvalue().count("\n") == 1
    assert "[########################] step 4/4  loss 1.5" in bar.getvalue()
    assert lines.getvalue().count("\n") == 4 and "\r" not in lines.getvalue() and "examples/s  ETA" in lines.getvalue()


def test_progress_knows_how_long_it_takes(monkeypatch):
    """Resumed at step 2 of 10, 2 steps of 30 examples in a minute: 6 more take three minutes."""
    now, lines = [0.0], io.StringIO()
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    progress = Progress(10, 30, start=2, out=lines)
    progress.update(3)  # no line yet: ten seconds have not passed
    now[0] = 60.0
    progress.update(4)
    now[0] = 7200.0
    progress.update(5)
    assert lines.getvalue().splitlines() == [
        "step 4/10    1 examples/s  ETA 3:00",
        "step 5/10    0 examples/s  ETA 3:20:00",
    ]


def test_columns_of_a_table_are_of_one_width_and_names_start_together():
    rows = [("leaf", "shape", "stored"), ("a", "2x3", "6"), ("longer", "4", "1,000")]
    assert aligned(rows) == ["leaf    shape  stored", "a         2x3       6", "longer      4   1,000"]
    assert aligned(rows, left=2) == ["leaf    shape  stored", "a       2x3         6", "longer  4       1,000"]
    assert aligned([("a", ""), ("bc", "")]) == ["a", "bc"]

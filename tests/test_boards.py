"""What TensorBoard and W&B are told of a run: stand-ins of both packages write down what they are called with."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import toy
from PIL import Image

from jaxpeft.training import boards, optim


@pytest.fixture
def packages(monkeypatch):
    """{'tensorboard': calls, 'wandb': calls}; a class named `Broken` of either package raises at its first number."""
    calls = {"tensorboard": [], "wandb": []}

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls["tensorboard"].append(("open", Path(folder).name, purge_step))

        def add_scalar(self, name, value, step):
            calls["tensorboard"].append((name, value, step))

        def add_image(self, name, pixels, step, dataformats):
            calls["tensorboard"].append((name, pixels.shape, step, dataformats))

        def close(self):
            calls["tensorboard"].append("close")

    class Run:
        def __init__(self, **options):
            calls["wandb"].append(("open", options))

        def define_metric(self, *what, **how):
            calls["wandb"].append((*what, how))

        def log(self, values):
            calls["wandb"].append(values)

        def finish(self):
            calls["wandb"].append("close")

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Run, Image=np.shape))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return calls


def test_training_shows_its_losses_and_the_rate_of_every_step(packages, tmp_path):
    """With a decay that validation starts at step 5: the rate is that of the optimizer's own schedule."""
    losses = iter([4.0, 3.0, 2.0, 1.0, 1.5, 1.5, 0.9, 1.2])
    c = toy.rarely(20, **{"optim.schedule": "plateau", "optim.cooldown": 0.5, "optim.lr": 0.02, "stop.every": 1})
    c.stop.patience = 2
    _, timing = toy.train(tmp_path, c, validate=lambda _: next(losses))
    assert timing["steps"] == 7
    shown = packages["tensorboard"]
    assert shown[0] == ("open", "tensorboard", 0) and shown[-1] == "close"
    rates = [value for name, value, _ in shown[1:-1] if name == "learning_rate"]
    np.testing.assert_allclose(rates, [0.02] * 5 + [0.02, 0.01], rtol=1e-6)  # steps 6 and 7: the decay from step 5 to 7
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    written = [(name, value, row["step"]) for row in rows for name, value in row.items() if name != "step"]
    assert shown[1:-1] == written and {"loss", "grad_norm", "validation_loss"} < {name for name, *_ in written}
    assert not packages["wandb"]  # no project is named


def test_the_rate_of_an_update_is_the_one_its_optimizer_used(packages):
    """SGD without momentum on a gradient of 1 moves by the rate."""
    c = toy.config()
    c.optim.name, c.optim.b1, c.optim.clip_norm, c.optim.weight_decay = "sgd", 0.0, 0.0, 0.0
    c.optim.schedule, c.optim.warmup, c.optim.lr = "cosine", 0.3, 0.5
    w, moved = {"w": np.zeros(1, np.float32)}, []
    tx = optim.optimizer(c.optim, w, 10)
    state = tx.init(w)
    planned = state[-1]
    for _ in range(10):
        updates, state = tx.update({"w": np.ones(1, np.float32)}, state, w)
        moved.append(-float(updates["w"][0]))
    np.testing.assert_allclose([optim.rate_at(c.optim, planned, i) for i in range(1, 11)], moved, rtol=1e-6)


def test_scores_and_images_of_a_finished_run(packages, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "captions")
    Image.new("RGB", (6, 4)).save(tmp_path / "gallery.png")
    (tmp_path / "config.json").write_text('{"seed": 3}')
    scores = {"n": 5, "tuned": {"cider_d": 1.5, "n": 5, "by_type": {}}, "base": {"cider_d": 0.5}, "blind": {}}
    boards.finished(tmp_path, {"timing": {"steps": 40}, "metrics": {"test": scores}})
    assert packages["tensorboard"] == [
        ("open", "tensorboard", 41), ("test/cider_d", 1.5, 40), ("test_base/cider_d", 0.5, 40),
        ("gallery", (4, 6, 3), 40, "HWC"), "close",
    ]  # fmt: skip
    (_, options), *rest = packages["wandb"]
    assert options["name"] == tmp_path.name and options["config"] == {"seed": 3} and options["resume"] == "allow"
    assert rest == [
        ("*", {"step_metric": "step"}), {"step": 40, "test/cider_d": 1.5}, {"step": 40, "test_base/cider_d": 0.5},
        {"step": 40, "gallery": (4, 6, 3)}, "close",
    ]  # fmt: skip
    boards.finished(tmp_path, {"timing": {"steps": 40}, "metrics": {}})
    assert packages["wandb"][-4][1]["id"] == options["id"]  # the same run of W&B


def test_a_board_that_fails_is_left_out_and_training_goes_on(packages, tmp_path, monkeypatch):
    def broken(**_):
        raise RuntimeError("no key")

    monkeypatch.setenv("WANDB_PROJECT", "captions")
    monkeypatch.setattr(sys.modules["wandb"], "init", broken, raising=True)
    said = []
    toy.fit(tmp_path, toy.rarely(4), said.append)
    assert sum("W&B gets nothing from this run any more (" in line for line in said) == 1
    assert packages["tensorboard"][-1] == "close" and len(packages["tensorboard"]) > 2


def test_without_the_packages_nothing_is_shown(monkeypatch, tmp_path):
    for name in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)  # an import raises ImportError
    monkeypatch.setenv("WANDB_PROJECT", "captions")
    said = []
    boards.finished(tmp_path, {"timing": {"steps": 1}, "metrics": {}}, said.append)
    assert not said and not list(tmp_path.iterdir())

"""Runs of a study that finish at once, with scores that depend on the learning rate alone."""

import math
from pathlib import Path

from jaxpeft import methods
from jaxpeft.runtime import files
from jaxpeft.study import report
from jaxpeft.training import results


class Runs(list):
    """The ids of the runs that were begun, in order. `fails(config)`: whether one fails; `stop_at`: Ctrl-C after this many."""

    best, stop_at, fails = 0.003, None, staticmethod(lambda config: False)

    def run(self, config, workdir, log=print, features_in=None):
        """In place of `training.run.run`."""
        if len(self) == self.stop_at:
            raise KeyboardInterrupt
        self.append(config.name)
        if self.fails(config):
            raise FloatingPointError("loss is nan")
        return finished(config, workdir, self.best)


def finished(config, workdir, best: float = 0.003) -> dict:
    """Write the result of a run: the closer its rate is to `best`, the better on validation images and the worse on others."""
    far, metric = abs(math.log(config.optim.lr / best)), {"vqa": "accuracy", "captioning": "cider_d"}[config.task]
    scores = {split: 1 - far / 20 if split == "val" else 0.5 + far / 20 for split in config.eval.splits}
    metrics = {
        split: {"tuned": {metric: score, "nll": 1.0}, "n": 4, "blind": {"majority": {metric: 0.0}}}
        for split, score in scores.items()
    }
    if config.eval.base:
        metrics["test"]["base"] = {metric: 0.05}
    stored = 10 * (methods.size_of(config.method) + 1)
    result = {
        "main_metric": metric, "metrics": metrics, "status": "done", "task": config.task, "code": results.code(),
        "validation": {"kept": far, "split": "val", "curve": [[0, 2.0], [40, far]], "kept_step": 40},
        "timing": {"steps": config.steps, "stopped": "plateau", "step_s": 0.1, "compile_s": 1.0, "total_s": 2.0},
        "counts": {"tuned": stored, "stored": stored, "total": 1000}, "forgetting": {"base": 0.5, "tuned": 0.7, "n": 4},
        "machine": {"device": "a"}, "versions": {"jax": "b"}, "digests": {"base": "c"},
    }  # fmt: skip
    files.write_json(Path(workdir) / "result.json", result)
    return result


def html_of(directory: Path) -> str:
    """The page of a study's report."""
    report.write(directory)
    return (directory / "report" / "index.html").read_text()


def quiet(*_):
    pass

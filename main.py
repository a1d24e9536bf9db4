"""The program: `python main.py --config=configs/quickstart.py --workdir=DIR`. Everything it does is in `jaxpeft`."""

import shlex
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from jaxpeft import host, point, pretrain, report, study

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file with get_config(arg), as file.py or file.py:key=value,..."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where results and checkpoints of this run go; reuse it to resume.")
WORKERS = flags.DEFINE_integer("workers", 0, "Of a study: processes; 0 is one per core on CPU, one on accelerators.")
WORKER = flags.DEFINE_integer("worker", -1, "Of a study: only do runs, as a worker that another process started.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Of a study: print what would run and its estimated cost.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings are --config.key=value")
    host.keep_freed_memory()
    host.keep_compiled_programs()
    logging.set_verbosity(logging.WARNING)  # orbax tells every step of every save

    try:
        if "levels" in CONFIG.value:
            _study(CONFIG.value, Path(WORKDIR.value))
        else:
            if "pretrain" in CONFIG.value:
                pretrain.run(CONFIG.value, WORKDIR.value)
            else:
                point.run(CONFIG.value, WORKDIR.value, command=shlex.join(["python", "main.py", *sys.argv[1:]]))
    except ValueError as error:  # a mistake in config, data or checkpoint: the message is for the user
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _study(config, workdir):
    if WORKER.value >= 0:
        return study.work(config, workdir)
    if DRY_RUN.value:
        return print(study.dry_run(config, workdir))
    study.run(config, workdir, WORKERS.value, sys.argv)
    print(report.write(workdir))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)

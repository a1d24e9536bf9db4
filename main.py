"""The program: `python main.py --config=configs/quickstart.py --workdir=DIR`. Everything it does is in `jaxpeft`.

    python main.py --config=configs/folder.py:root=pics,base=Salesforce/blip-image-captioning-base --workdir=runs/mine

tunes a BLIP of the Hugging Face hub on your own pictures; `base=DIR` is one on disk, `base=tiny` the shipped one. The head of
each file in configs/ says what it does and what it takes.
"""

import contextlib
import functools
import os
import runpy
import shlex
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from jaxpeft import tree
from jaxpeft.apps import pretrain
from jaxpeft.runtime import host, registry, signals
from jaxpeft.study import execute, ray_executor, report
from jaxpeft.training import preflight, run

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file with get_config(arg), as file.py or file.py:key=value,..."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where results and checkpoints of this run go; reuse it to resume.")
WORKERS = flags.DEFINE_integer("workers", 0, "Of a study: processes; 0 is one per core on CPU, one on accelerators.")
WORKER = flags.DEFINE_integer("worker", -1, "Of a study: only do runs, as a worker that another process started.")
EXECUTOR = flags.DEFINE_enum("executor", "processes", ["processes", "ray"], "Of a study: where its runs are done.")
RESOURCES = flags.DEFINE_string(
    "resources", "CPU=1", "With --executor=ray: what a run takes, as CPU=4,GPU=1,memory_gb=16 or CPU=8,TPU=4."
)
ACCEPT = flags.DEFINE_bool(
    "accept_changes", False, "Go on from the stored step of a run whose config, data or base was another one."
)
DISTRIBUTED = flags.DEFINE_enum(
    "distributed", "auto", ["auto", "on", "off"],
    "One run by the processes of several hosts. auto: on TPU pods, in SLURM jobs of several tasks, and with --coordinator.",
)  # fmt: skip
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where nothing else says it.")
PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes.")
PROCESS = flags.DEFINE_integer("process_id", None, "With --coordinator: which one this is, from 0.")
PREFLIGHT = flags.DEFINE_bool(
    "preflight", False, "Print memory, FLOPs and the largest batch of a run; compute nothing."
)
DEVICES = flags.DEFINE_integer("devices", 0, "With --preflight: plan for so many virtual CPU devices.")
TOPOLOGY = flags.DEFINE_string("topology", None, "With --preflight: plan for a TPU slice, as v5e:2x4 (needs libtpu).")
CHIP = flags.DEFINE_string("chip", None, "With --preflight: a100, h100, v5e, ... or 'TFLOP/s,GB/s,GB' of a device.")
IMPORTS = flags.DEFINE_list(
    "imports", [], "Modules, or .py files, with methods, tasks, data sets, optimizers or metrics of your own."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Of a study: print what would run and its estimated cost.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings are --config.key=value")
    host.keep_freed_memory()
    host.keep_compiled_programs()
    logging.set_verbosity(logging.WARNING)  # orbax tells every step of every save
    _run(CONFIG.value)


def _run(config):
    if "levels" in config:
        return _study(config, Path(WORKDIR.value))
    if PREFLIGHT.value:
        host.plan_for(DEVICES.value, TOPOLOGY.value)
        chip = preflight.chip_of(CHIP.value, TOPOLOGY.value)
        return print(preflight.report(config, TOPOLOGY.value, chip))
    host.join_others(DISTRIBUTED.value, COORDINATOR.value, PROCESSES.value, PROCESS.value)
    if "pretrain" in config:
        return pretrain.run(config, WORKDIR.value)
    command = shlex.join(["python", "main.py", *sys.argv[1:]])
    return run.run(config, WORKDIR.value, command=command, accept_changes=ACCEPT.value)


def _study(config, workdir):
    if WORKER.value >= 0:
        return execute.work(config, workdir)
    if DRY_RUN.value:
        return print(execute.dry_run(config, workdir))
    elsewhere = None
    if EXECUTOR.value == "ray":
        elsewhere = functools.partial(ray_executor.work, resources=ray_executor.Resources.parse(RESOURCES.value))
    execute.run(config, workdir, WORKERS.value, sys.argv, elsewhere=elsewhere)
    print(report.write(workdir))


def _parsed(argv):
    """absl's flags, with every mistake as one line. Raises ValueError."""
    try:
        rest = flags.FLAGS(argv)
        "levels" in CONFIG.value  # noqa: B015  a file that cannot be read is told at the first look
        return rest
    except (flags.Error, LookupError, AttributeError, TypeError, OSError, SyntaxError, ImportError) as error:
        raise ValueError(_mistake(argv, error)) from error


def _mistake(argv, error: Exception) -> str:
    """What is wrong with a command line that absl refuses: a key that the config lacks, or what get_config itself said."""
    if file := next((word.partition("=")[2] for word in argv if word.lstrip("-").startswith("config=")), ""):
        path, _, arg = file.partition(":")
        if not os.path.isfile(path):
            return f"--config={path}: there is no such file"
    known = []
    with contextlib.suppress(Exception):  # where get_config itself fails, its own error is told below
        config = runpy.run_path(path)["get_config"](arg)
        known = [name.replace("/", ".") for name in tree.flatten(config.to_dict())]
    for key in (
        word.lstrip("-").partition("=")[0].removeprefix("config.")
        for word in argv
        if word.lstrip("-").startswith("config.")
    ):
        if known and key not in known:
            section = key.rpartition(".")[0] or key
            beside = ", ".join(name for name in sorted(known) if name.startswith(f"{section}."))
            there = f"; {section} has {beside}" if beside else ""
            return f"--config.{key}: no such key{registry.did_you_mean(key, known)}{there}"
    while "\n" in str(error) and (error.__cause__ or error.__context__):  # absl's texts hold whole tracebacks
        error = error.__cause__ or error.__context__
    return str(error)


def _program():
    registry.load(registry.from_argv(sys.argv))  # a config file may name what they add
    app.run(main, flags_parser=_parsed)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    signals.program(_program)

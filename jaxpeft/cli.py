"""The `jaxpeft` command. `python main.py` in a clone is `jaxpeft run`.

    jaxpeft run --config=quickstart --workdir=runs/quickstart         one run, or a study if the config defines one
    jaxpeft preflight --config=folder:root=pics --topology=v5e:2x4    memory and step time of a run, without running it
    jaxpeft generate --workdir=runs/mine --image a.jpg                generate text with a finished run

--config=NAME is a config of the package (configs/NAME.py in a clone), --config=FILE.py one of your own. Append its arguments
as `:key=value,...`; --config.key=value sets any key.
"""

import argparse
import functools
import importlib
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

import jaxpeft
from jaxpeft import tree
from jaxpeft.runtime import host, malloc, registry, renamed, signals

PACKAGE = Path(jaxpeft.__file__).parent
CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"  # installed; in a clone
APPS = {  # commands that parse their own arguments: (module, what it does)
    "generate": ("jaxpeft.apps.generate", "generate texts for images with a finished run or a base model"),
    "export": ("jaxpeft.apps.export", "export a finished run to PyTorch, merged or as a PEFT adapter"),
    "demo": ("jaxpeft.apps.demo", "serve a local page that shows finished runs beside their base models"),
    "compare": ("jaxpeft.study.report.compare", "compare two studies in one page"),
    "report": ("jaxpeft.apps.report", "write the report of a study again from its result files"),
    "prepare": ("jaxpeft.data.coco.prepare", "prepare COCO captions or VQA v2 from the official files"),
}


def main(argv: list[str] | None = None) -> None:
    """Run one command and exit with the status of `signals.exit_code`."""
    signals.program(functools.partial(_command, sys.argv[1:] if argv is None else argv))


def _command(argv: list[str]) -> int | None:
    if argv and argv[0] in APPS:
        return importlib.import_module(APPS[argv[0]][0]).main(argv[1:])
    args, rest = _parser().parse_known_args(argv)
    names = [name.replace("_", "-") for name in vars(args)] + list(vars(args))
    for before, word in zip(["", *rest], rest, strict=False):
        flag = word.lstrip("-").partition("=")[0]
        if word.startswith("-") and not flag.startswith("config."):
            raise ValueError(f"unknown argument --{flag}{registry.did_you_mean(flag, names)}")
        if not word.startswith("-") and ("=" in before or not before.startswith("--config.")):
            raise ValueError(f"unexpected argument {word!r}; a config key is set as --config.key=value")
    registry.load([args.imports])  # before the config file, which may use the entries that they add
    return args.function(args, read_config(args.config, rest))


def _parser() -> argparse.ArgumentParser:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog="jaxpeft", description=__doc__, **style)
    parser.add_argument("--version", action="version", version=f"jaxpeft {jaxpeft.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function in (("run", _run), ("study", _study), ("preflight", _preflight)):
        one = commands.add_parser(name, help=function.__doc__, description=function.__doc__, **style)
        one.set_defaults(function=function)
        one.add_argument("--config", required=True, metavar="NAME or FILE.py", help="with arguments as :key=value,...")
        one.add_argument("--imports", default="", metavar="MODULE,...", help=registry.IMPORTS_HELP)
        if name in ("run", "study"):
            resumes = "directory for results and checkpoints; the same command resumes from there"
            one.add_argument("--workdir", metavar="DIR", help=resumes)
            _add_study(one)
        if name in ("run", "preflight"):
            _add_preflight(one)
        if name == "run":
            _add_run(one)
    for name, (_, text) in APPS.items():
        commands.add_parser(name, help=text)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--accept_changes", action="store_true", help="resume even if config, data or base have changed")
    add("--preflight", action="store_true", help="same as the command preflight")
    several = "run on several hosts, one process each; auto: on TPU pods, in SLURM jobs, and with --coordinator"
    add("--distributed", default="auto", choices=["auto", "on", "off"], help=several)
    add("--coordinator", metavar="HOST:PORT", help="address of process 0, if the cluster does not provide it")
    add("--num_processes", type=int, help="with --coordinator: number of processes")
    add("--process_id", type=int, help="with --coordinator: index of this process, from 0")


def _add_study(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--workers", type=int, default=0, help="study: worker processes; 0: one per core on CPU, one on accelerators")
    add("--worker", type=int, default=-1, help="study: index of this worker process; set by the main process")
    add("--executor", default="processes", choices=["processes", "ray"], help="study: what executes its runs")
    add("--resources", default="CPU=1", help="with --executor=ray, per run: CPU=4,GPU=1,memory_gb=16 or CPU=8,TPU=4")
    add("--rerun", default="", metavar="PATTERN", help="study: repeat finished runs, once, by id: 'vqa_*-s0-*'")
    add("--mixed_code", action="store_true", help="study: report cells even if their runs used different code or data")
    add("--dry_run", action="store_true", help="study: print which runs would start and their estimated cost")


def _add_preflight(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--devices", type=int, default=0, help="plan for this number of virtual CPU devices")
    add("--topology", help="plan for devices this machine lacks: h100, h100:8 (with preflight-cuda), v5e:2x4 (libtpu)")
    add("--chip", help="estimate step time and largest batch for it: a100, h100, v5e, ... or its 'TFLOP/s,GB/s,GB'")


def _run(args: argparse.Namespace, config):
    """train, evaluate and save one run, or do a study if the config defines one"""
    if _is_study(config):
        return _study(args, config)
    _refuse(args, _add_study, f"is for studies, and --config={args.config} is a single run")
    if args.preflight:
        return _preflight(args, config)
    _refuse(args, _add_preflight, "needs --preflight")
    from jaxpeft.apps import pretrain
    from jaxpeft.training import run

    workdir = _workdir(args)
    _prepare_process()
    if config.get("deterministic"):
        host.add_xla_flags(*host.DETERMINISTIC)
    host.join_others(args.distributed, args.coordinator, args.num_processes, args.process_id)
    if "pretrain" in config:
        pretrain.run(config, workdir)
    else:
        run.run(config, workdir, command=shlex.join(_typed()), accept_changes=args.accept_changes)


def _study(args: argparse.Namespace, config):
    """do all runs of a study and write its report"""
    from jaxpeft.study import cost, execute, ray_executor, report

    if not _is_study(config):
        raise ValueError(f"--config={args.config} is a single run, not a study; use `jaxpeft run`")
    for flags_of_runs in (_add_run, _add_preflight):
        _refuse(args, flags_of_runs, f"is for single runs, and --config={args.config} is a study")
    workdir = _workdir(args)
    _prepare_process()
    if args.worker >= 0:
        return execute.work(config, workdir)
    if args.dry_run:
        if args.rerun:
            raise ValueError("--dry_run and --rerun cannot be combined; leave one of them out")
        return print(cost.dry_run(config, workdir))
    elsewhere = None
    if args.executor == "ray":
        elsewhere = functools.partial(ray_executor.work, resources=ray_executor.resources_of(args.resources))
    execute.run(config, workdir, args.workers, sys.orig_argv[1:], elsewhere=elsewhere, rerun=args.rerun)
    print(report.write(workdir, args.mixed_code))


INSTEAD = {"rerun": "; use a new --workdir", "dry_run": "; use `jaxpeft preflight`", "preflight": "; use --dry_run"}


def _refuse(args: argparse.Namespace, add_flags: Callable[[argparse.ArgumentParser], None], why: str) -> None:
    """Raise ValueError if one of these flags was set: it would have no effect."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    for name, default in vars(parser.parse_args([])).items():
        if getattr(args, name, default) != default:
            raise ValueError(f"--{name} {why}{INSTEAD.get(name, '')}")


def _is_study(config) -> bool:
    return "settings" in config or "levels" in config  # the old name, for an error that gives the new one


def _preflight(args: argparse.Namespace, config):
    """print memory and FLOPs of a run without running it; with --chip or --topology also step time and largest batch"""
    from jaxpeft.training import preflight, setup

    if _is_study(config) or "pretrain" in config:
        raise ValueError(
            f"--config={args.config} is not a single fine-tuning run, the only kind that preflight can plan"
        )
    _prepare_process()
    host.plan_for(args.devices, args.topology)
    chip = preflight.chip_of(args.chip, args.topology)
    with setup.precision(config):
        print(preflight.report(config, args.topology, chip))


def _prepare_process() -> None:
    malloc.keep_freed_memory()
    host.keep_compiled_programs()
    logging.set_verbosity(logging.WARNING)  # orbax logs every step of every save


def _workdir(args: argparse.Namespace) -> Path:
    if not args.workdir:
        raise ValueError("--workdir=DIR is required: the directory for results and checkpoints")
    return Path(args.workdir)


def _typed() -> list[str]:
    """The command line as it can be typed again."""
    program = Path(sys.argv[0]).name
    return [*(["python", program] if program.endswith(".py") else ["jaxpeft"]), *sys.argv[1:]]


def read_config(config: str, overrides: list[str] = ()):
    """The config of NAME or FILE.py with its arguments (`:key=value,...`) and overrides (`--config.key=value`).

    Raises a one-line ValueError if the file is missing or broken, and for an unknown argument or key.
    """
    path, colon, arg = config.partition(":")
    if not Path(path).is_file():
        installed = CONFIGS / (path.removeprefix("configs/").removesuffix(".py") + ".py")
        if not installed.is_file():
            names = [str(one.relative_to(CONFIGS))[:-3] for one in sorted(CONFIGS.rglob("[!_]*.py"))]
            wanted = registry.did_you_mean(path, names)
            raise ValueError(f"--config={path}: file not found{wanted}; available configs: {', '.join(names)}")
        path = str(installed)
    values, argv = flags.FlagValues(), ["jaxpeft", f"--config={path}{colon}{arg}", *overrides]
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
        return holder.value
    except (flags.Error, LookupError, AttributeError, TypeError, OSError, SyntaxError, ImportError) as error:
        raise ValueError(_mistake(path, arg, overrides, error)) from error


def _mistake(path: str, arg: str, overrides: list[str], error: Exception) -> str:
    """The error message for a config: an unknown key, or the error of get_config."""
    try:
        config = runpy.run_path(path)["get_config"](arg)
    except Exception:  # then `error` is that of get_config
        known = []
    else:
        known = [name.replace("/", ".") for name in tree.flatten(config.to_dict())]
    for word in overrides:
        key = word.lstrip("-").partition("=")[0].removeprefix("config.")
        if known and word.startswith("-") and key not in known:
            section = key.rpartition(".")[0] or key
            beside = ", ".join(name for name in sorted(known) if name.startswith(f"{section}."))
            there = f"; {section} has {beside}" if beside else ""
            if new := (renamed.CONFIG | renamed.STUDY).get(key):
                return f"--config.{key} is now --config.{new}"
            if key in renamed.GONE:
                return f"--config.{key} {renamed.GONE[key]}"
            return f"--config.{key}: no such key{registry.did_you_mean(key, known)}{there}"
    while "\n" in str(error) and (error.__cause__ or error.__context__):  # absl's messages contain whole tracebacks
        error = error.__cause__ or error.__context__
    return f"{error}{renamed.advice(error)}"

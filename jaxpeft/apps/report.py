"""Write the report of a study from its result files, also from a copy of them:

    jaxpeft report --workdir=results/my_study

The directory needs results.jsonl and study.json. Nothing is trained and no base is read.
"""

import argparse

from jaxpeft.study import report


def main(argv: list[str] | None = None) -> None:
    """Run the command of the module docstring."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="jaxpeft report", description=__doc__, formatter_class=style)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="directory with results.jsonl and study.json")
    parser.add_argument(
        "--mixed_code", action="store_true", help="report cells even if their runs used different code or data"
    )
    args = parser.parse_args(argv)
    print(report.write(args.workdir, args.mixed_code))

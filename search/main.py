"""The `eos-search` command: its subcommands are modules of this package."""

import sys

from eos_vllm.cli.program import Program

# Subcommand: its module and the line that --help shows.
COMMANDS = {
    "run": ("run_command", "search an operator profile on a frozen LLaVA and write theta.json"),
    "evaluate": ("evaluate_command", "accuracy of profiles at budgets, with intervals"),
    "oppose": ("oppose_command", "other searches of the same cost and compute: random, TPE, one knob at a time"),
    "compare": ("compare_command", "gradient searches against opponents of the same compute, at equal cost"),
    "discriminates": ("discriminates_command", "whether ClutterVQA tells the right tokens from the wrong on a model"),
    "ablate": ("ablate_command", "the paper's studies: alignment, placement, operator, budgets, robustness"),
    "plot": ("plot_command", "figures from raw results, runs and profiles, each with its data as JSON"),
    "lmms": ("lmms_command", "the twelve public benchmarks by lmms-eval against servers, a table per budget"),
    "reproduce": ("reproduce_command", "search on real data, and the paper's Tables 4, 7 and 8"),
}
PROGRAM = Program("eos-search", "Search of visual token reduction operators.", "eos_search", COMMANDS)
build_parser, main = PROGRAM.build_parser, PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())

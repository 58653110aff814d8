"""The `eos-vllm` command: its subcommands are the modules of this package."""

import sys

from eos_vllm.cli.program import Program

# Subcommand: its module and the line that --help shows.
COMMANDS = {
    "doctor": ("doctor", "check this environment: versions, vLLM's platform and runner, the plugin"),
    "verify": ("verify", "hold the unified operator against prune, merge, pool and reweight (the paper's Listing 3)"),
    "plan": ("plan", "print what a profile keeps per layer, and its KV memory and FLOPs against stock"),
    "advise": ("advise", "name the cheapest measured profile and budget that keeps an accuracy and fits a KV memory"),
    "profile": ("profile", "list, show, validate, rescale and scale operator profiles"),
    "shape-model": (
        "shape_model",
        "write a published model's config, processor and tokenizer, to serve its shape with dummy weights",
    ),
    "tiny-model": ("shape_model", "write a small LLaVA with random weights that runs without a GPU"),
    "cluttervqa": ("cluttervqa", "write images and questions of the embedded model's benchmark as PNG and JSONL"),
    "demo": ("demo", "serve a small model with and without a profile, and compare"),
    "page": ("page", "open the page in front of a server, or serve the embedded model with it"),
}
PROGRAM = Program("eos-vllm", "Searched, in-decoder visual token reduction, served by vLLM.", "eos_vllm.cli", COMMANDS)
build_parser, main = PROGRAM.build_parser, PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())

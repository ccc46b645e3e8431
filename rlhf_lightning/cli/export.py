"""`rlhf export MODEL DIR`."""

import json
from pathlib import Path

from rlhf_lightning.cli.options import Parser
from rlhf_lightning.files import visible


def run(args: list[str]) -> int:
    """Export a model, and upload it to the Hub if requested."""
    parser = Parser(
        prog="rlhf export",
        description="Write a self-contained model folder: weights as safetensors, config, tokenizer, chat template and "
        "stage.json. An adapter is merged into its base model in float32. Nothing is uploaded without --push.",
        epilog="example: rlhf export runs/policy/model exported --dtype bfloat16",
    )
    parser.add_argument("model", help="folder, Hub id or GGUF file of a model, a reward model or an adapter")
    parser.add_argument("dir", type=Path, help="folder to write; it must be empty or not exist")
    parser.add_argument(
        "--dtype",
        help="dtype of the written weights: float32, bfloat16 or float16 (default: that of the model; for an adapter, "
        "that of its base)",
    )
    parser.add_argument(
        "--push", metavar="ID", help="upload the folder to this repository on the Hugging Face Hub (private if new)"
    )
    parser.add_argument("--public", action="store_true", help="with --push: make a new repository public")
    parser.add_argument("--json", action="store_true", help="print the result as a JSON object")
    options = parser.parse_args(args[1:])

    from rlhf_lightning.cli.logs import setup_logging
    from rlhf_lightning.errors import ConfigError
    from rlhf_lightning.models.export import export_model, push

    setup_logging("warning", None)
    if options.public and not options.push:
        raise ConfigError("--public has no effect without --push; add --push ID")
    facts = export_model(options.model, options.dir, options.dtype)
    found = {"folder": str(options.dir), "dtype": facts["dtype"], "model_hash": facts["model_hash"]}
    if options.push:
        found["address"] = push(options.dir, options.push, options.public)
    if options.json:
        print(json.dumps(found))
    else:
        print(visible(f"{found['folder']} ({found['dtype']})" + (f", {found['address']}" if options.push else "")))
    return 0

"""The command line `veneer`: train, plan, info, merge, convert, chat."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import veneer
from veneer.formats import FORMATS
from veneer.method import VeneerError
from veneer.train.extras import require
from veneer.train.yaml_flags import YAML_FLAGS

#: what the error of `veneer.load` says to callers of Python, and means nothing in a shell
_PYTHON_HINT = ". strict=False loads what fits"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="veneer", description="Thin trainable layers over a frozen PyTorch model.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"veneer {veneer.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train", help="fine-tune a model as a YAML file says, or as FastChat's flags do",
        epilog="Instead of a YAML file: the flags of FastChat's train_lora, such as --model_name_or_path, --data_path, "
               "--lora_r and --output_dir, and those of transformers' TrainingArguments; `veneer train "
               "--model_name_or_path X --help` lists them, docs/coming-from-fastchat.md describes them.",
    )  # fmt: skip
    train.add_argument("config", nargs="?", help="the YAML file")
    train.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one setting")
    train.add_argument("--dry-run", action="store_true", help="show plan, data, mask and memory, then stop")
    train.add_argument("--resume", nargs="?", const="last", metavar="CHECKPOINT", help="go on from a checkpoint")
    train.add_argument("--print-schema", action="store_true", help="print the JSON schema of the YAML file")
    train.set_defaults(run=_train)

    plan = commands.add_parser("plan", help="show which weights would be adapted, without loading any")
    plan.add_argument("config", nargs="?", help="a YAML file; or use --model and --method")
    plan.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one setting")
    plan.add_argument("--model", help="a Hugging Face model, folder, .gguf file, or smollm2-135m")
    plan.add_argument("--method", default="lora", help="lora, dora, full, ... (default lora)")
    plan.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="option of the method")
    plan.add_argument("--target", action="append", metavar="PATTERN", help="weights to adapt; default all linear")
    plan.set_defaults(run=_plan)

    info = commands.add_parser("info", help="describe a saved adapter")
    info.add_argument("path", help="an adapter, or the folder of a run of `veneer train`")
    info.set_defaults(run=_info)

    merge = commands.add_parser("merge", help="write the base model with an adapter merged into it")
    merge.add_argument("adapter", help="an adapter, or the folder of a run of `veneer train`")
    _base_arguments(merge)
    merge.add_argument("--output", required=True, metavar="DIR")
    merge.add_argument("--overwrite", action="store_true", help="replace a model's folder that is there already")
    merge.add_argument("--max-shard-size", metavar="SIZE", help="of a file of weights, such as 5GB; default: base's")
    merge.set_defaults(run=_merge)

    _convert_arguments(commands.add_parser("convert", help="write a saved adapter in another format"))

    chat = commands.add_parser("chat", help="talk to a model with an adapter")
    chat.add_argument("--adapter", help="a saved adapter or a run's folder; without it the bare model answers")
    _base_arguments(chat)
    chat.add_argument("--system", help="system message")
    chat.add_argument("--conversation-template", metavar="NAME",
                      help="how requests are written: vicuna, or model for the model's chat template; default: as in "
                           "training, else model")
    chat.add_argument("--prompt", help="answer this once and stop")
    chat.add_argument("--max-new-tokens", type=int, default=256)
    chat.set_defaults(run=_chat)
    return parser


def _base_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="the base model; default: the one that the adapter was trained on")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 or auto; default: as in training")


def _convert_arguments(convert: argparse.ArgumentParser) -> None:
    formats = ", ".join(FORMATS)
    convert.add_argument("source", help="an adapter's directory, or a file of kohya's or LyCORIS's")
    convert.add_argument("target", help="a directory, or a .safetensors file for kohya and lycoris")
    convert.add_argument("--to", required=True, metavar="FORMAT", help=f"one of {formats}")
    convert.add_argument("--from", dest="source_format", metavar="FORMAT", help="default: what the files look like")
    convert.add_argument("--base", help="the base model's folder, or a safetensors file, for what SOURCE does not tell")
    convert.add_argument("--prefix", help="of the names in kohya's and LyCORIS's files, such as lora_te")
    convert.add_argument("--name", help="of the adapter in a directory of ModelOpt's: which one is read, or what it is "
                                        "to be called there (default: its name in ModelOpt, else default)")
    convert.add_argument("--changed", action="store_true", help="read a file of kohya's or LyCORIS's by its tensors "
                                                                "alone, if another tool has changed it since")
    convert.add_argument("--overwrite", action="store_true", help="replace an adapter that is there already")
    convert.set_defaults(run=_convert)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 2 after an error, which is told in one message."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _in_flags(words) or build_parser().parse_args(words)
    try:
        return arguments.run(arguments)
    except VeneerError as error:
        if arguments.debug:
            raise
        print(f"veneer: error: {str(error).replace(_PYTHON_HINT, '')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if arguments.debug:
            raise
        print("veneer: interrupted", file=sys.stderr)
        return 130


def _in_flags(words: Sequence[str]) -> argparse.Namespace | None:
    """`veneer train` with flags that no run from a YAML file has: those of FastChat's command, or mistakes."""
    place = next((i for i, word in enumerate(words) if not word.startswith("-")), None)
    if place is None or words[place] != "train":
        return None
    own = [*YAML_FLAGS, "--help"]
    flags = [word.partition("=")[0] for word in words[place + 1:] if word.startswith("--")]
    if all(any(known.startswith(flag) for known in own) for flag in flags):
        return None
    return argparse.Namespace(debug="--debug" in words[:place], words=words[place + 1:], run=_train_in_flags)


def _train_in_flags(arguments: argparse.Namespace) -> int:
    require("transformers", "veneer train")
    from veneer.fastchat.run import main as train

    return train(arguments.words)


def _train(arguments: argparse.Namespace) -> int:
    from veneer.train.settings import load_settings
    from veneer.train.settings_schema import settings_schema

    if arguments.print_schema:
        print(json.dumps(settings_schema(), indent=2))
        return 0
    if arguments.config is None and str(arguments.resume).endswith((".yaml", ".yml")):
        arguments.config, arguments.resume = arguments.resume, "last"  # `veneer train --resume config.yaml`
    if arguments.config is None:
        raise VeneerError("veneer train needs a YAML file; examples/demo.yaml is one, docs/training.md describes it")
    settings = load_settings(arguments.config, arguments.set)
    from veneer.train.run import train

    results = train(settings, dry_run=arguments.dry_run, resume=arguments.resume)
    failed = [check.name for check in results.checks if not check.passed] if results else []
    if failed:
        raise VeneerError(f"training ended, but these checks of its result failed: {', '.join(failed)}; see above")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from veneer.train.config_file import parse_value
    from veneer.train.model import load_skeleton
    from veneer.train.schema import override
    from veneer.train.settings import load_settings, parse_adapter, parse_model

    if (arguments.config is None) == (arguments.model is None):
        raise VeneerError("veneer plan needs either a YAML file or --model")
    if arguments.config is not None:
        settings = load_settings(arguments.config, arguments.set)
        model, rules = settings.model, settings.adapter.rules
    else:
        section: dict[str, Any] = {"method": arguments.method}
        for assignment in arguments.option:
            override(section, assignment, parse_value)
        if arguments.target:
            section["targets"] = arguments.target
        model, rules = parse_model(arguments.model), parse_adapter(section).rules
    print(veneer.plan(load_skeleton(model), rules))
    return 0


def _info(arguments: argparse.Namespace) -> int:
    print(veneer.info(_adapter(arguments.path)))
    return 0


def _adapter(path: str) -> str:
    """The adapter that `path` means."""
    from veneer.train.adapter_files import find_adapter

    found, remark = find_adapter(path)
    if remark:
        print(remark, file=sys.stderr)
    return found


def _base(arguments: argparse.Namespace) -> Any:
    """The base model's settings; `arguments.adapter` becomes the adapter that it means."""
    from veneer.train.serve import base_settings, held_otherwise

    if arguments.adapter is None:
        return base_settings(None, arguments.model, arguments.dtype)
    arguments.adapter = _adapter(arguments.adapter)
    settings = base_settings(arguments.adapter, arguments.model, arguments.dtype)
    remark = held_otherwise(arguments.adapter, settings)
    if remark:
        print(remark, file=sys.stderr)
    return settings


def _merge(arguments: argparse.Namespace) -> int:
    from veneer.train.merging import merge_to_folder

    path = merge_to_folder(_base(arguments), arguments)
    print(f"merged model: {path}")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    print(veneer.convert_file(arguments.source, arguments.target, arguments.to, arguments.base,
                              from_=arguments.source_format, prefix=arguments.prefix, name=arguments.name,
                              changed=arguments.changed, overwrite=arguments.overwrite))
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    from veneer.train.serve import Chat

    chat = Chat(_base(arguments), arguments)
    if arguments.prompt is not None:
        print(chat.answer(arguments.prompt))
        return 0
    chat.loop()
    return 0


if __name__ == "__main__":
    sys.exit(main())

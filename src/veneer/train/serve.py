"""Using a trained adapter from the shell: the base model that it is for, and `veneer chat`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

import veneer
from veneer.method import VeneerError, nearest
from veneer.train import quantised
from veneer.train.adapter_files import named_base, run_config
from veneer.train.encode import Encoder
from veneer.train.extras import require
from veneer.train.forms import Example
from veneer.train.model import ModelError, load_model, pick_device
from veneer.train.schema import build
from veneer.train.settings import ModelSettings

T = TypeVar("T")
_NAME = "default"
_HELP = "/base: the bare model answers   /adapter: the adapter answers   /reset: forget the chat   /quit"


def base_settings(adapter: str | None, model: str | None, dtype: str | None) -> ModelSettings:
    """The base model: what the user names, else what `veneer train` wrote beside the adapter, else what the adapter's
    own files name. Raises `VeneerError`."""
    values: dict[str, Any] = {"name": model} if model else {}
    if not model:
        if adapter is None:
            raise VeneerError("name the base model with --model, or an adapter with --adapter")
        if not Path(adapter).exists():
            raise VeneerError(f"there is no adapter at {adapter!r}")
        config, name = run_config(adapter), named_base(adapter)
        if config is None and name is None:
            raise VeneerError(
                f"neither the files of {adapter!r} nor a config.json of `veneer train` beside it name the base model, "
                "so the base is unknown: name it with --model"
            )
        values = dict(config["model"]) if config is not None else {"name": name}
    if dtype:
        values["dtype"] = dtype
    return build(ModelSettings, values, "model")


def held_otherwise(adapter: str, settings: ModelSettings) -> str:
    """One line for the user where these settings, of a base that the user named, hold it in another number of bits than
    the run that trained the adapter; else empty."""
    config = run_config(adapter)
    then = None if config is None else config["model"].get("quantize")
    if then is None or settings.quantize is not None:
        return ""
    return (f"the adapter was trained over a base held as {quantised.parse(then)[0]}, and {settings.name} is taken as "
            "it is: the adapter made up for rounding that is not there. Without --model it is held as it was then")


def of_base(load: Callable[[ModelSettings], T], settings: ModelSettings, arguments: argparse.Namespace) -> T:
    """What `load` gives; where the user did not name the base and it cannot be found, the error says how to."""
    try:
        return load(settings)
    except ModelError as error:
        if arguments.model or arguments.adapter is None:
            raise
        hint = f"the adapter {arguments.adapter!r} names this base; give another with --model"
        raise ModelError(f"{error}; {hint}") from error


class Chat:
    """A conversation with a model whose adapter can be switched off and on."""

    def __init__(self, settings: ModelSettings, arguments: argparse.Namespace) -> None:
        loaded = of_base(load_model, settings, arguments)
        self.model: Any = loaded.model
        self.tokenizer = loaded.tokenizer
        self.encoder = Encoder(tokenizer=loaded.tokenizer)
        self.template = _template(arguments, loaded.tokenizer)
        self.limit = arguments.max_new_tokens
        self.system = arguments.system if arguments.system is not None else _trained_system(arguments.adapter)
        self.messages: list[dict[str, str]] = []
        self.adapted = arguments.adapter is not None
        if arguments.adapter is not None:
            veneer.load(self.model, arguments.adapter, name=_NAME)
        self.model.to(pick_device())
        self.has_adapter = self.adapted

    def answer(self, text: str, streamer: Any = None) -> str:
        """The greedy answer to `text` after the conversation so far, which it becomes part of."""
        self.messages.append({"role": "user", "content": text})
        ids = torch.tensor([self.encoder.prompt_ids(self._request())], device=self.model.device)
        if self.has_adapter and not self.adapted:
            with veneer.disabled(self.model):
                out = self._generate(ids, streamer)
        else:
            out = self._generate(ids, streamer)
        reply = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        self.messages.append({"role": "assistant", "content": reply})
        return reply

    def _request(self) -> Example:
        """The conversation so far, as the model is asked with it."""
        if self.template == "vicuna":
            from veneer.fastchat.conversation import end_marker, vicuna_prompt

            prompt = vicuna_prompt(self.messages, end_marker(self.tokenizer), self.system)
            return Example(place="chat", form="prompt", prompt=prompt)
        system = [{"role": "system", "content": self.system}] if self.system else []
        placeholder = {"role": "assistant", "content": ""}
        return Example(place="chat", form="messages", messages=(*system, *self.messages, placeholder))

    def _generate(self, ids: torch.Tensor, streamer: Any) -> torch.Tensor:
        with torch.inference_mode():
            return self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.limit, do_sample=False,
                streamer=streamer,
            )  # fmt: skip

    def loop(self) -> None:
        """Read lines until the end of input."""
        transformers = require("transformers", "veneer chat")
        if self.template != "model":
            print(f"conversation template: {self.template}", file=sys.stderr)
        print(_HELP, file=sys.stderr)
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                return
            if line == "/quit":
                return
            if line.startswith("/"):
                print(self.command(line), file=sys.stderr)
            elif line:
                streamer = transformers.TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
                self.answer(line, streamer)

    def command(self, line: str) -> str:
        """Carry out a line that begins with a slash; what to tell the user."""
        if line == "/reset":
            self.messages.clear()
            return "forgotten"
        if line in ("/base", "/adapter"):
            if not self.has_adapter:
                return "there is no adapter to switch"
            self.adapted = line == "/adapter"
            return f"now answering: {'the adapter' if self.adapted else 'the bare model'}"
        return f"unknown command {line}. {_HELP}"


def _template(arguments: argparse.Namespace, tokenizer: Any) -> str:
    """How requests are written: as the user says, else as in training, else by the tokenizer's chat template. Raises
    `VeneerError` where it has none."""
    from veneer.fastchat.arguments import TEMPLATES

    named = arguments.conversation_template
    trained = None if arguments.adapter is None else (run_config(arguments.adapter) or {}).get("conversation_template")
    template = named or trained or "model"
    if template not in TEMPLATES:
        raise VeneerError(f"--conversation-template is {template!r}; possible: {', '.join(TEMPLATES)}"
                          f"{nearest(str(template), TEMPLATES)}")
    if template == "model" and not tokenizer.chat_template:
        raise VeneerError("veneer chat writes requests by the tokenizer's chat template, and this model's has none; "
                          "--conversation-template vicuna needs none, and is right for adapters that FastChat trained")
    return template


def _trained_system(adapter: str | None) -> str | None:
    """The system message of the training data, where a run noted one beside its adapter."""
    if adapter is None:
        return None
    return (run_config(adapter) or {}).get("system")

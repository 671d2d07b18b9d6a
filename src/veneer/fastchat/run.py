"""`veneer train` in FastChat's flags: from the arguments to a trained and saved adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

import veneer
from veneer.fastchat.adapter import NAME, attach_lora
from veneer.fastchat.arguments import STAGE_3, Arguments, parse_arguments
from veneer.fastchat.conversation import (
    Conversation,
    ConversationEncoder,
    check_template,
    end_marker,
    read_conversations,
    report,
)
from veneer.fastchat.dataset import ConversationCollator, LazyConversations, cut_away, encode_all
from veneer.fastchat.resuming import checkpoint, record, steps_of, warnings_of
from veneer.fastchat.trainer import ConversationTrainer, compute_dtype
from veneer.method import VeneerError
from veneer.train.adapter_files import read_record
from veneer.train.console import Console, is_first_process
from veneer.train.encode import Encoder
from veneer.train.extras import require
from veneer.train.forms import DataError
from veneer.train.model import Loaded, is_gguf, load_model, load_structure
from veneer.train.settings import ModelSettings

_TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"  # transformers' name of a warning


def main(argv: Sequence[str]) -> int:
    """`veneer train` with these words behind it. Raises `VeneerError` for everything that the user can mend."""
    train(parse_arguments(argv))
    return 0


def train(arguments: Arguments) -> Any:
    """The whole run; returns transformers' `TrainOutput`.

    The adapter, its config and `trainer_state.json` are in `output_dir` afterwards. Where that holds a checkpoint
    already, training goes on from there. Raises `VeneerError`.
    """
    for library in ("accelerate", "rich"):
        require(library, "veneer train")
    console = Console()
    for note in arguments.notes:
        console.say(note, style="yellow")
    _check(arguments)
    settings = model_settings(arguments)
    resumed = checkpoint(arguments.training)
    for line in warnings_of(_record(arguments), arguments.training.output_dir, resumed):
        console.say(line, style="yellow")
    before = load_model(settings) if is_gguf(settings) else load_structure(settings)
    data = _Data(arguments, before.tokenizer, console).load()
    loaded = before if is_gguf(settings) else load_model(settings, like=before)
    _say_model(console, loaded, arguments)
    _make_ready(loaded.model, arguments)
    console.say(attach_lora(loaded.model, arguments.lora, arguments.given, arguments.training.seed))
    return _run(loaded, data, arguments, console, resumed)


# -- the model --------------------------------------------------------------------------------------------
def model_settings(arguments: Arguments) -> ModelSettings:
    """The base as FastChat loads it: numbers in fp32, or in 4 bits with products in the dtype of the run."""
    dtype = str(compute_dtype(arguments.training)) if arguments.lora.q_lora else "torch.float32"
    kind: Any = dtype.removeprefix("torch.")
    return ModelSettings(
        name=str(arguments.model.model_name_or_path), dtype=kind, attention=_attention(arguments.training),
        trust_remote_code=arguments.model.trust_remote_code, cache_dir=arguments.training.cache_dir,
        quantize={"scheme": "nf4", "double": True} if arguments.lora.q_lora else None,
    )  # fmt: skip


def _record(arguments: Arguments) -> dict[str, Any]:
    return record(model_settings(arguments), arguments.own.conversation_template)


def _attention(training: Any) -> Any:
    """The package flash-attn needs a GPU and 16 bit; PyTorch's own fused attention is the same sum anywhere."""
    if not training.flash_attn:
        return None
    there = transformers.utils.is_flash_attn_2_available() and (training.bf16 or training.fp16)
    return "flash_attention_2" if there else "sdpa"


def _say_model(console: Console, loaded: Loaded, arguments: Arguments) -> None:
    console.say(f"Model: {loaded.source}")
    for note in loaded.notes:
        console.say(note, style="yellow" if note.startswith("left") else "")
    if arguments.training.flash_attn:
        console.say(f"Attention: {_attention(arguments.training)}")


def _make_ready(model: Any, arguments: Arguments) -> None:
    checkpointing = bool(arguments.training.activation_checkpointing)
    if arguments.lora.q_lora:
        veneer.prepare_for_kbit_training(model, gradient_checkpointing=checkpointing)
    elif checkpointing:
        model.enable_input_require_grads()  # a frozen base gives reentrant checkpoints nothing to differentiate
    model.config.use_cache = False


# -- the data ---------------------------------------------------------------------------------------------
@dataclass
class _Sets:
    """Datasets for transformers' Trainer."""

    train: Any
    heldout: Any


class _Data:
    """Reads both files, says what is wrong with them, and makes datasets."""

    def __init__(self, arguments: Arguments, tokenizer: Any, console: Console) -> None:
        self.arguments, self.tokenizer, self.console = arguments, tokenizer, console
        self.template = arguments.own.conversation_template
        self.length = arguments.training.model_max_length
        tokenizer.model_max_length, tokenizer.padding_side = self.length, arguments.model.padding_side
        tokenizer.deprecation_warnings[_TOO_LONG] = True  # longer texts are cut here, which the warning cannot know
        check_template(tokenizer, self.template)
        encoder = Encoder(tokenizer=tokenizer, max_length=self.length)
        self.encode = ConversationEncoder(encoder=encoder, template=self.template)

    def load(self) -> _Sets:
        data = self.arguments.data
        train = self._conversations(str(data.data_path))
        heldout = self._conversations(data.eval_data_path) if data.eval_data_path else []
        self.console.say(f"Data: {len(train)} conversations, {len(heldout)} held out")
        if data.lazy_preprocess:
            made: Any = LazyConversations(train, self.encode, self.tokenizer.pad_token_id, self._tell)
            if made.first_trained() is None:
                raise self._all_cut_away(str(data.data_path), len(train))
        else:
            made = self._encoded(train, str(data.data_path))
        return _Sets(made, self._encoded(heldout, str(data.eval_data_path)) if heldout else None)

    def _conversations(self, path: str) -> list[Conversation]:
        """Raises `DataError` for conversations that cannot be used, unless they are to be skipped."""
        good, bad = read_conversations(path, self.template, end_marker(self.tokenizer))
        if bad and self.arguments.own.malformed == "error":
            raise DataError(report(bad, len(good) + len(bad), path) + "\n--malformed skip leaves them out")
        if bad:
            self.console.say(report(bad, len(good) + len(bad), path) + "\nThey are left out.", style="yellow")
        if not good:
            raise DataError(f"{path!r} has no conversation to train on")
        return good

    def _encoded(self, conversations: list[Conversation], path: str) -> Any:
        items, empty = encode_all(conversations, self.encode)
        if not items:
            raise self._all_cut_away(path, len(empty))
        if empty:
            self.console.say(cut_away(empty, self.length, path), style="yellow")
        return items

    def _all_cut_away(self, path: str, count: int) -> DataError:
        return DataError(f"no conversation in {path!r} has a token of an answer within --model_max_length "
                         f"{self.length} ({count} are longer); raise it")

    def _tell(self, label: str) -> None:
        self.console.say(f"{label} has no token of an answer within --model_max_length {self.length} and teaches "
                         "nothing", style="yellow")


# -- training ---------------------------------------------------------------------------------------------
def _check(arguments: Arguments) -> None:
    """What shows before anything is loaded."""
    if arguments.data.data_path is None:
        raise VeneerError("--data_path is missing: the training conversations, .json or .jsonl")
    check_sharding(arguments.training)
    if _evaluates(arguments.training) and not arguments.data.eval_data_path:
        raise VeneerError("--eval_strategy needs held-out conversations: --eval_data_path")
    path = Path(arguments.training.output_dir)
    there = next((place for place in (path, *path.parents) if place.exists()), None)
    if there is not None and not there.is_dir():
        raise VeneerError(f"--output_dir {str(path)!r}: {str(there)!r} is a file, not a directory")


def _run(loaded: Loaded, data: _Sets, arguments: Arguments, console: Console, resumed: str | None) -> Any:
    training = arguments.training
    pad_id = loaded.tokenizer.pad_token_id
    try:
        trainer = ConversationTrainer(
            loaded.model, training, record=_record(arguments), train_dataset=data.train, eval_dataset=data.heldout,
            data_collator=ConversationCollator(pad_id, arguments.model.padding_side), processing_class=loaded.tokenizer,
        )  # fmt: skip
    except (ValueError, ImportError, RuntimeError) as error:  # arguments that it refuses, libraries that they need
        raise VeneerError(str(error)) from error
    if resumed:
        console.say(f"Going on from {resumed}")
    result = trainer.train(resume_from_checkpoint=resumed)
    if resumed and result.global_step == steps_of(resumed):
        trainer.record = read_record(Path(resumed)) or trainer.record  # the adapter is still that run's
        console.say(f"{resumed} is at {result.global_step} of {trainer.state.max_steps} steps already: nothing was "
                    "trained. More --max_steps or --num_train_epochs train on, --resume_from_checkpoint False starts "
                    "anew", style="yellow")
    if data.heldout is not None and not _evaluates(training):
        # held-out conversations that were never looked at would be of no use
        console.say(f"Held-out loss: {trainer.evaluate()['eval_loss']:.4f}")
    trainer.save_state()
    trainer.save_model()
    if is_first_process():
        console.say(f"Adapter {NAME!r}: {training.output_dir}")
    return result


def check_sharding(training: Any) -> None:
    """What would shard nothing, or more than an adapter's files can be gathered from."""
    if training.fsdp and training.use_cpu:  # accelerate would leave the model whole, without a word
        raise VeneerError("--fsdp shards a model over accelerators, and this run is on the CPU; drop it")
    if training.deepspeed and training.hf_deepspeed_config.is_zero3():  # in a form that nobody could read before
        raise VeneerError(STAGE_3)


def _evaluates(training: Any) -> bool:
    """Whether it does so while it trains."""
    return str(training.eval_strategy.value) != "no"

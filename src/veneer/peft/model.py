"""`PeftModel`: a base model with adapters, as Hugging Face PEFT presents it."""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from veneer.hosts import Host
from veneer.io.records import records_of
from veneer.io.save import save
from veneer.method import VeneerError, nearest
from veneer.peft import hub
from veneer.peft.card import write_card
from veneer.peft.config import PeftConfig
from veneer.peft.counting import count_parameters
from veneer.peft.saving import LoadResult, dressed, values_by_part, warn_unsavable
from veneer.peft.shown import parts
from veneer.peft.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from veneer.peft.tuners import tuner_class
from veneer.peft.types import TaskType
from veneer.storage.base import own_class

_SEEN_AS: dict[tuple[type, type], type] = {}
#: task → the class for it; filled by the classes themselves
MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {}


class PeftModel(nn.Module):
    """A model with adapters. The model is changed in place: `get_base_model()` is the object that was given, with its
    classes and the names of its own parameters.

    model: the base model. peft_config: of the first adapter, which becomes the active one. autocast_adapter_dtype:
    adapters over a 16-bit base are fp32, else of the base's dtype. low_cpu_mem_usage: without effect, since nothing is
    made twice.
    """

    #: modules that are trained whole for this task, if the model has them
    heads: ClassVar[tuple[str, ...]] = ()
    special_peft_forward_args: ClassVar[frozenset[str]] = frozenset({"adapter_names", "alora_offsets"})

    def __init_subclass__(cls, task: TaskType | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if task is not None:
            MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task] = cls

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default",
                 autocast_adapter_dtype: bool = True, low_cpu_mem_usage: bool = False, *, empty: bool = False) -> None:
        super().__init__()
        self.peft_type = peft_config.peft_type
        self._add_heads(peft_config)
        kind = tuner_class(peft_config.peft_type)
        self.base_model = kind(model, {adapter_name: peft_config}, adapter_name, empty=empty)
        if not empty:
            self.base_model.settle_dtype(adapter_name, autocast_adapter_dtype)
            warn_unsavable(model, adapter_name)
        require_input_grads(model)

    def _add_heads(self, config: PeftConfig) -> None:
        if self.heads:
            known = list(getattr(config, "modules_to_save", None) or [])
            config.modules_to_save = known + [name for name in self.heads if name not in known]  # type: ignore[attr-defined]

    # -- what is there ----------------------------------------------------------------------------------
    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the active adapter, or a list where it is not one."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def has_active_enabled_adapter(self) -> bool:
        return bool(self.active_adapters) and not self.base_model._disabled

    @property
    def active_peft_config(self) -> PeftConfig:
        name = next(iter([*self.active_adapters, *self.peft_config]), None)
        if name is None:
            raise ValueError("this model has no adapter any more, so that there is no config of one")
        return self.peft_config[name]

    @property
    def modules_to_save(self) -> set[str] | None:
        lists = [getattr(config, "modules_to_save", None) or () for config in self.peft_config.values()]
        return {name for names in lists for name in names} or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self.base_model, "dtype", None)

    @property
    def cls_layer_name(self) -> str | None:
        """The head, by its name in the base model."""
        saved = self.modules_to_save or ()
        return next((name for name, _ in self.get_base_model().named_children() if name in saved), None)

    def get_base_model(self) -> nn.Module:
        return self.base_model.model

    def get_layer_status(self) -> list[TunerLayerStatus]:
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        return get_model_status(self)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable parameters, and all of base and adapters, with those of quantised weights as they count dense."""
        return count_parameters(self.get_base_model(), self.peft_config)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of `named_parameters`, by the modules that hold them: showing them under PEFT's names takes time that a
        training step need not spend."""
        seen: set[int] = set()
        for param in held_parameters(self) if recurse else self._parameters.values():
            if param is not None and id(param) not in seen:
                seen.add(id(param))
                yield param

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    @property
    def __class__(self) -> type:
        """To transformers and others that ask `isinstance(model, peft.PeftModel)`, this is one too, where PEFT has been
        imported: Trainer saves and resumes adapters by that question alone."""
        mine = type(self)
        theirs = getattr(sys.modules.get("peft"), mine.__name__, None)
        if not isinstance(theirs, type) or issubclass(mine, theirs):
            return mine
        if (mine, theirs) not in _SEEN_AS:
            _SEEN_AS[mine, theirs] = type(mine.__name__, (mine, theirs), {"__module__": mine.__module__})
        return _SEEN_AS[mine, theirs]

    @__class__.setter
    def __class__(self, kind: type) -> None:
        vars(object)["__class__"].__set__(self, kind)  # what torch's fully_shard does to a module

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (type(self),), self.__dict__

    # -- running ----------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        with self.base_model._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base model computes, with the active adapters; `adapter_names`: one for each row of the batch."""
        return self._run(self.get_base_model(), *args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(cast(Any, self.get_base_model()).generate, *args, **kwargs)

    def _run(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        special = {key: kwargs.pop(key) for key in self.special_peft_forward_args & kwargs.keys()}
        if not special:
            return call(*args, **kwargs)
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim())
        rows, names = next((len(tensor) for tensor in tensors), None), special.get("adapter_names")
        if names is not None and rows is not None and len(names) != rows:
            raise ValueError("Length of `adapter_names` should be the same as the number of inputs, but got "
                             f"{len(names)} and {rows} respectively.")
        with self._enable_peft_forward_hooks(**special):
            return call(*args, **kwargs)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model computes what the base computes."""
        was = self.base_model._disabled
        self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            if not was:
                self.base_model.enable_adapter_layers()

    # -- adapters ---------------------------------------------------------------------------------------
    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, low_cpu_mem_usage: bool = False,
                    autocast_adapter_dtype: bool = True) -> None:
        """Add a fresh adapter. It is neither active nor trainable until `set_adapter`."""
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        self._check_type(peft_config)
        self._add_heads(peft_config)
        self.base_model.add(adapter_name, peft_config)
        self.base_model.settle_dtype(adapter_name, autocast_adapter_dtype)
        warn_unsavable(self.get_base_model(), adapter_name)

    def _check_type(self, config: PeftConfig) -> None:
        if config.peft_type != self.peft_type:
            raise ValueError(f"Cannot combine adapters with different peft types. Found {self.peft_type} and "
                             f"{config.peft_type}. get_peft_model(model, config, mixed=True) can.")

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make this the active adapter, trainable unless `inference_mode`; all others are frozen."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} not found. There are: {', '.join(self.peft_config)}")
        self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        self.base_model.delete_adapter(adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    # -- files ------------------------------------------------------------------------------------------
    def save_pretrained(self, save_directory: str | Path, safe_serialization: bool = True,
                        selected_adapters: list[str] | None = None, save_embedding_layers: str | bool = "auto",
                        is_main_process: bool = True, path_initial_model_for_weight_conversion: str | None = None,
                        **kwargs: Any) -> None:
        """Write the adapters: "default" into the directory itself, each other into a folder of its name.

        The files are PEFT's, all at once, with veneer.json beside them. No byte of the base is written
        (`save_embedding_layers` must not be True). path_initial_model_for_weight_conversion: not needed, as an adapter
        that began at PiSSA and the like is saved as plain LoRA anyway. state_dict: values instead of the model's own.
        push_to_hub, repo_id: upload afterwards.

        Raises `ValueError` for a path that is a file, unknown adapters, and what PEFT's files cannot hold.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
        _refuse_saving(safe_serialization, save_embedding_layers)
        chosen = list(self.peft_config) if selected_adapters is None else selected_adapters
        unknown = [name for name in chosen if name not in self.peft_config]
        if unknown:
            raise ValueError(f"You passed an invalid `selected_adapters` arguments: {unknown}, current supported "
                             f"adapter names are {list(self.peft_config)}")
        for name in chosen:
            if not is_main_process:
                records_of(self.get_base_model(), name)  # sharded tensors are gathered by all processes together
                continue
            folder = Path(save_directory) / ("" if name == "default" else name)
            save(self.get_base_model(), folder, name, dress=dressed(_naming_base(self.peft_config[name], self)),
                 values=values_by_part(self, kwargs.get("state_dict"), name))
        if is_main_process:
            write_card(Path(save_directory), self)
            if kwargs.get("push_to_hub"):
                self.push_to_hub(kwargs.get("repo_id") or Path(save_directory).name)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload the adapters' files; needs `huggingface_hub`."""
        return hub.push(repo_id, self.save_pretrained, **kwargs)

    @classmethod
    def from_pretrained(cls, model: nn.Module, model_id: str | Path, adapter_name: str = "default",
                        is_trainable: bool = False, config: PeftConfig | None = None,
                        autocast_adapter_dtype: bool = True, ephemeral_gpu_offload: bool = False,
                        low_cpu_mem_usage: bool = False, key_mapping: dict[str, str] | None = None,
                        **kwargs: Any) -> PeftModel:
        """The model with the adapter of a folder, or of a repository of the Hub, in the class of its task.

        Loading is strict: keys that are missing, unexpected or of another shape, and another base model, raise one
        `VeneerError` that lists them, and the model is as before; with strict=False they are warnings, and what is
        whole is loaded. allow_pickle=True reads a .bin file, and then only tensors out of it. config: to be used
        instead of the file's. ephemeral_gpu_offload, low_cpu_mem_usage: without effect.
        """
        if config is not None and not isinstance(config, PeftConfig):
            raise ValueError(f"The input config must be a PeftConfig, got {config.__class__}")
        folder = hub.local_folder(model_id, **kwargs)
        found = PeftConfig.from_pretrained(folder) if config is None else config
        found.inference_mode = not is_trainable
        kind = cls if found.task_type is None else model_class(found.task_type)
        made = kind(model, found, adapter_name, empty=True)
        made._load(folder, adapter_name, is_trainable, found, config, autocast_adapter_dtype, key_mapping,
                   **_reading(kwargs))
        return made

    def load_adapter(self, model_id: str | Path, adapter_name: str, is_trainable: bool = False,
                     torch_device: str | None = None, autocast_adapter_dtype: bool = True,
                     ephemeral_gpu_offload: bool = False, low_cpu_mem_usage: bool = False,
                     key_mapping: dict[str, str] | None = None, **kwargs: Any) -> LoadResult:
        """Load an adapter beside those that are there, not active yet; or give one of this name the file's values.

        Strict as `from_pretrained`. torch_device: without effect; an adapter lies where its weight does. hotswap: see
        `veneer.peft.utils.hotswap`. Returns sentences on missing and unexpected keys, none but with strict=False.
        """
        if kwargs.pop("hotswap", False):
            from veneer.peft.utils.hotswap import hotswap_adapter

            hotswap_adapter(self, model_id, adapter_name, torch_device=torch_device, **kwargs)
            return LoadResult([], [])
        folder = hub.local_folder(model_id, **kwargs)
        config = self.peft_config.get(adapter_name)
        if config is None:
            config = PeftConfig.from_pretrained(folder)
            self._check_type(config)
            config.inference_mode = not is_trainable
        return self._load(folder, adapter_name, is_trainable, config, None, autocast_adapter_dtype, key_mapping,
                          **_reading(kwargs))

    def _load(self, folder: Path, name: str, is_trainable: bool, config: PeftConfig, given: PeftConfig | None,
              autocast: bool, key_mapping: dict[str, str] | None, strict: bool = True,
              allow_pickle: bool = False) -> LoadResult:
        if key_mapping:
            raise NotImplementedError("key_mapping: rename the keys with veneer.peft.load_peft_weights(path, "
                                      "key_mapping=…), and give them to set_peft_model_state_dict")
        new = name not in self.peft_config
        report = self.base_model.load(name, folder, config, given, strict=strict, allow_pickle=allow_pickle)
        for text in (*report.notes, *report.problems):
            warnings.warn(text, stacklevel=3)
        if new:
            self.base_model.settle_dtype(name, autocast)
            self.set_requires_grad(name, is_trainable)
        if not is_trainable:
            self.eval()
        return LoadResult([text for text in report.problems if text.startswith("missing")],
                          [text for text in report.problems if not text.startswith("missing")])

    def create_or_update_model_card(self, output_dir: str) -> None:
        write_card(Path(output_dir), self)


def _naming_base(config: PeftConfig, model: PeftModel) -> PeftConfig:
    """The config with the class of the base where it names no task, which `AutoPeftModel` goes by."""
    if config.task_type is not None or config.auto_mapping is not None:
        return config
    kind = own_class(model.get_base_model())
    found = copy.copy(config)
    found.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return found


def model_class(task_type: Any) -> type[PeftModel]:
    """The class of models for a task. Raises `VeneerError` for an unknown one."""
    found = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task_type)
    if found is None:
        known = [task.value for task in TaskType]
        raise VeneerError(f"unknown task_type {task_type!r}{nearest(str(task_type), known) or '.'} Known: "
                          f"{', '.join(known)}")
    return found


def _reading(kwargs: dict[str, Any]) -> dict[str, bool]:
    """How to read an adapter's files: strict, allow_pickle."""
    return {key: bool(kwargs[key]) for key in ("strict", "allow_pickle") if key in kwargs}


def held_parameters(module: nn.Module) -> Iterator[nn.Parameter | None]:
    """The parameters of a module and all below it, in the order of `named_parameters`; some of them several times."""
    yield from module._parameters.values()
    for name, child in module._modules.items():
        if name == "adapters" and isinstance(module, Host) and len(module.adapters) > 1:
            groups: dict[str, list[nn.Parameter]] = {}  # PEFT has all adapters' A before their B
            for part in parts(module):
                groups.setdefault(part.shown.partition(".")[0], []).append(part.get())
            yield from (param for group in groups.values() for param in group)
        if child is not None:
            yield from held_parameters(child)


def _blank(kind: type[PeftModel]) -> PeftModel:
    return kind.__new__(kind)


def _refuse_saving(safe_serialization: bool, save_embedding_layers: str | bool) -> None:
    if not safe_serialization:
        raise ValueError("safe_serialization=False would write a pickle file, which can run code when it is opened; "
                         "Veneer writes safetensors alone")
    if save_embedding_layers is True:
        raise ValueError("save_embedding_layers=True would put base weights into the adapter's file. Train the "
                         "embeddings (modules_to_save) or rows of them (trainable_token_indices), or save the base "
                         "model itself")


def require_input_grads(model: Any) -> None:
    """With reentrant checkpointing a layer whose input needs no gradient gives its adapters none."""
    # transformers 5.23 has renamed it, and warns of the old name.
    flag = next((name for name in ("is_activation_checkpointing", "is_gradient_checkpointing")
                 if name in dir(type(model))), None)
    if flag is None or not getattr(model, flag):
        return
    ask = getattr(model, "enable_input_require_grads", None)
    if callable(ask):
        ask()
    elif callable(getattr(model, "get_input_embeddings", None)):
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))

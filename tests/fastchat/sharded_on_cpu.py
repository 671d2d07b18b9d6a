"""`veneer train` where accelerate shards a model on CPUs too, which by itself it does on accelerators only."""

from __future__ import annotations

import sys
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from veneer.fastchat import run
from veneer.train.cli import main

_init = AcceleratorState.__init__


def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


AcceleratorState.__init__ = init
run.check_sharding = lambda training: None
sys.exit(main(["--debug", "train", *sys.argv[1:]]))

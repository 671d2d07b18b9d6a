"""transformers' Trainer and TRL's SFTTrainer on a model of this front door: adapters alone in checkpoints, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.peft_door import nets

from veneer.peft import LoraConfig, get_peft_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")  # by asking for its class Trainer knows adapters

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "veneer.json"}


def model(**more: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(nets.decoder(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **more))


def rows(count: int = 16) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 40, (9,), generator=generator) for _ in range(count)]
    return [{"input_ids": each, "attention_mask": torch.ones_like(each), "labels": each, "note": 1} for each in ids]


def trainer(net: Any, folder: Path, **more: Any) -> Any:
    options = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "seed": 1,
               "report_to": [], "use_cpu": True, "disable_tqdm": True, **more}
    arguments = transformers.TrainingArguments(str(folder), **options)
    return transformers.Trainer(net, arguments, train_dataset=rows(), eval_dataset=rows(4))


def trained(net: Any) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in net.named_parameters() if param.requires_grad}


@pytest.mark.parametrize(("init", "off_by"), [(True, 0.0), ("pissa", 1e-6)])
def test_checkpoints_hold_the_adapter_alone_and_training_goes_on_from_them(tmp_path: Path, init: Any,
                                                                           off_by: float) -> None:
    net = model(init_lora_weights=init, lora_dropout=0.1)
    trainer(net, tmp_path).train()
    checkpoint = tmp_path / "checkpoint-3"
    assert {path.name for path in checkpoint.iterdir()} >= FILES
    assert not list(checkpoint.glob("model*.safetensors"))
    resumed = model(init_lora_weights=init, lora_dropout=0.1)
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(checkpoint))
    want = trained(net)
    assert all((want[name] - value).abs().max() <= off_by for name, value in trained(resumed).items())


def test_weight_decay_reaches_every_factor(tmp_path: Path) -> None:
    net = model()
    run = trainer(net, tmp_path, weight_decay=0.5)
    run.create_optimizer()
    groups = run.optimizer.param_groups
    assert [len(group["params"]) for group in groups if group["weight_decay"] == 0.5] == [len(trained(net))]


def test_the_best_adapter_is_loaded_at_the_end(tmp_path: Path) -> None:
    net = model()
    run = trainer(net, tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, learning_rate=30.0)
    run.train()
    assert run.state.best_model_checkpoint is not None
    best = peft.PeftModel.from_pretrained(nets.decoder(), run.state.best_model_checkpoint).eval()
    inputs = nets.inputs_for(net)
    net.eval()
    assert torch.allclose(net(**inputs).logits, best(**inputs).logits, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    plain, checkpointed = model(), model()
    trainer(plain, tmp_path / "a", max_steps=2).train()
    trainer(checkpointed, tmp_path / "b", max_steps=2, gradient_checkpointing=True).train()
    want = trained(plain)
    assert all(torch.allclose(want[name], value, atol=1e-6) for name, value in trained(checkpointed).items())


def test_trl_takes_the_model(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not among the packages that the tests install")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(37))])}, "<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>",
                                                     unk_token="<unk>")
    data = datasets.Dataset.from_list([{"text": " ".join(f"w{i * j % 37}" for j in range(12))} for i in range(16)])
    net = model()
    before = trained(net)
    arguments = trl.SFTConfig(str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=2, report_to=[],
                              use_cpu=True, bf16=False, disable_tqdm=True, learning_rate=1e-2)
    trl.SFTTrainer(net, args=arguments, train_dataset=data, processing_class=tokenizer).train()
    assert {path.name for path in (tmp_path / "checkpoint-2").iterdir()} >= FILES
    assert any(not torch.equal(before[name], value) for name, value in trained(net).items())


def test_a_trainer_that_needs_no_peft(tmp_path: Path) -> None:
    from veneer.train.adapter_checkpoints import AdapterCheckpoints

    def run(net: Any, **more: Any) -> Any:
        options = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "seed": 1,
                   "report_to": [], "use_cpu": True, "disable_tqdm": True, **more}
        arguments = transformers.TrainingArguments(str(tmp_path), **options)
        return AdapterCheckpoints(net.get_base_model(), arguments, train_dataset=rows())

    net, resumed = model(init_lora_weights="pissa"), model(init_lora_weights="pissa")
    run(net).train()
    assert not list((tmp_path / "checkpoint-3").glob("model*.safetensors"))
    run(resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    want = trained(net)
    assert all(torch.equal(want[name], value) for name, value in trained(resumed).items())

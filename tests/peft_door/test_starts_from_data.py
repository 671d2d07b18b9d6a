"""EVA, CorDA and LoRA-GA by PEFT's functions: what they collect, what becomes of the ranks, and every setting."""

from __future__ import annotations

import copy
import importlib
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.peft_door import nets
from torch import Tensor, nn

import veneer
import veneer.peft as ours
from veneer.method import VeneerError, VeneerWarning
from veneer.peft.errors import NotInVeneerError
from veneer.peft.layers.lora import LoraLayer
from veneer.peft.tuners.lora import CordaConfig, EvaConfig, LoraGAConfig, preprocess_corda
from veneer.peft.tuners.lora.eva import (
    forward_fn_dict,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)

TARGETS = ["q_proj", "k_proj", "down_proj"]


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(6):
        ids = torch.randint(3, 40, (4, 8), generator=generator)
        mask = torch.ones_like(ids)
        mask[:2, 6:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :2] = -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def eva_config(**options: Any) -> ours.LoraConfig:
    more = {key: options.pop(key) for key in ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern",
                                              "modules_to_save", "target_modules") if key in options}
    more = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS, **more}
    return ours.LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(**options), **more)


def made(config: ours.LoraConfig, model: nn.Module | None = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reminder to call initialize_lora_eva_weights
        return ours.get_peft_model(skewed() if model is None else model, config)


def skewed() -> nn.Module:
    """A model of which some layers' inputs vary in one direction above all, so that layers get different ranks."""
    model: Any = nets.decoder()
    model.model.embed_tokens.weight.data[:, 0] *= 30
    return model


def layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def inputs_of(model: Any, batch: dict[str, Tensor], name: str) -> Tensor:
    """The inputs of a layer of the base model (batch, length, in)."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad(), model.disable_adapter():
        model(**batch)
    hook.remove()
    return seen[0]


# -- EVA ------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore::veneer.method.VeneerWarning")
class TestEva:
    def test_a_is_the_principal_components_of_the_rows_that_count(self, batches: list[dict[str, Tensor]]) -> None:
        model = made(eva_config(rho=1.0))
        found = ours.get_eva_state_dict(model, batches, show_progress_bar=False)
        name = "base_model.model.model.layers.1.mlp.down_proj"
        rows = torch.cat([inputs_of(model, batch, name)[batch["labels"] != -100] for batch in batches])
        _, _, right = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        overlap = (found[name] @ right[:2].mT).abs().diagonal()
        assert found[name].shape == (2, 24)
        assert overlap.min() > 0.98
        assert set(found) == set(layers(model))

    def test_initialize_gives_every_layer_its_a_and_a_zero_b(self, batches: list[dict[str, Tensor]]) -> None:
        model = made(eva_config(rho=2.0))
        before = model(**nets.inputs_for(model.get_base_model())).logits
        expected = ours.get_eva_state_dict(model, batches, show_progress_bar=False)
        ours.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
        ranks = {name: len(A) for name, A in expected.items()}
        assert sum(ranks.values()) == 2 * len(ranks)
        assert len(set(ranks.values())) > 1
        for name, layer in layers(model).items():
            torch.testing.assert_close(layer.lora_A["default"].weight, expected[name], rtol=0, atol=0)
            assert layer.lora_A["default"].weight.requires_grad
            assert not layer.lora_B["default"].weight.any()
        assert set(layers(model)) == {name for name, rank in ranks.items() if rank}
        torch.testing.assert_close(model(**nets.inputs_for(model.get_base_model())).logits, before, rtol=0, atol=0)

    def test_config_and_files_have_the_new_ranks(self, batches: list[dict[str, Tensor]], tmp_path: Path) -> None:
        model = made(eva_config())
        ours.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
        config = model.peft_config["default"]
        ranks = {name.removeprefix("base_model.model."): layer.r["default"] for name, layer in layers(model).items()}
        assert config.target_modules == set(ranks)
        assert config.rank_pattern == {name: rank for name, rank in ranks.items() if rank != 2}
        assert config.alpha_pattern == {name: 3.0 * rank for name, rank in ranks.items() if rank != 2}
        for layer in layers(model).values():
            layer.lora_B["default"].weight.data.normal_()
        inputs = nets.inputs_for(model.get_base_model())
        model.save_pretrained(tmp_path)
        again = ours.PeftModel.from_pretrained(skewed(), tmp_path)
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)

    def test_rho_bounds_the_ranks(self, batches: list[dict[str, Tensor]]) -> None:
        even = ours.get_eva_state_dict(made(eva_config(rho=1.0)), batches, show_progress_bar=False)
        dealt = ours.get_eva_state_dict(made(eva_config(rho=3.0)), batches, show_progress_bar=False)
        assert {len(A) for A in even.values()} == {2}
        assert max(len(A) for A in dealt.values()) > 2

    def test_tau_says_when_the_pass_may_end(self, batches: list[dict[str, Tensor]]) -> None:
        counts = []
        for tau in (0.0, 1.0):
            count = 0

            def forward(model: nn.Module, batch: Any) -> Any:
                nonlocal count
                count += 1
                return model(**batch)

            ours.get_eva_state_dict(made(eva_config(rho=1.0, tau=tau)), batches, forward_fn=forward,
                                    show_progress_bar=False)
            counts.append(count)
        assert counts[0] < counts[1] == len(batches)

    def test_label_mask_and_its_value(self, batches: list[dict[str, Tensor]]) -> None:
        unmasked = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
        other = [{**batch, "labels": batch["labels"].masked_fill(batch["labels"] == -100, -1)} for batch in batches]
        name = "base_model.model.model.layers.0.mlp.down_proj"

        def A(data: Any, **options: Any) -> Tensor:
            def forward(model: nn.Module, batch: Any) -> Any:
                return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

            return ours.get_eva_state_dict(made(eva_config(rho=1.0, **options)), data, forward_fn=forward,
                                           show_progress_bar=False)[name]

        masked = A(batches)
        torch.testing.assert_close(A(batches, use_label_mask=False), A(unmasked))
        torch.testing.assert_close(A(other, label_mask_value=-1), masked)
        assert not torch.allclose(A(batches, use_label_mask=False), masked, atol=1e-3)
        assert not torch.allclose(A(other), masked, atol=1e-3)

    def test_whiten_gives_projections_unit_variance(self, batches: list[dict[str, Tensor]]) -> None:
        model = made(eva_config(rho=1.0, whiten=True, tau=1.0))
        name = "base_model.model.model.layers.0.self_attn.q_proj"
        A = ours.get_eva_state_dict(model, batches, show_progress_bar=False)[name]
        rows = torch.cat([inputs_of(model, batch, name)[batch["labels"] != -100] for batch in batches])
        torch.testing.assert_close((rows @ A.mT).var(0), torch.ones(2), rtol=0.05, atol=0)

    @pytest.mark.parametrize("rslora", [False, True])
    def test_adjust_scaling_factors_keeps_the_scale(self, batches: list[dict[str, Tensor]], rslora: bool) -> None:
        state = ours.get_eva_state_dict(made(eva_config()), batches, show_progress_bar=False)
        for adjust in (True, False):
            model = made(eva_config(adjust_scaling_factors=adjust, use_rslora=rslora))
            ours.initialize_lora_eva_weights(model, eva_state_dict=state)
            for layer in layers(model).values():
                rank = layer.r["default"]
                root = math.sqrt(rank) if rslora else rank
                expected = 6 / (math.sqrt(2) if rslora else 2) if adjust else 6 / root
                assert layer.scaling["default"] == pytest.approx(expected)

    def test_masks_of_the_users_own(self, batches: list[dict[str, Tensor]]) -> None:
        name = "base_model.model.model.layers.0.mlp.down_proj"

        def A(**options: Any) -> Tensor:
            return ours.get_eva_state_dict(made(eva_config(rho=1.0)), batches, show_progress_bar=False, **options)[name]

        def some(batch: Any, config: Any) -> Tensor:
            return batch["labels"] > 20

        torch.testing.assert_close(A(prepare_model_inputs_fn=some),
                                   A(prepare_model_inputs_fn=lambda batch, config: some(batch, config).nonzero()))
        assert not torch.allclose(A(prepare_model_inputs_fn=some), A(), atol=1e-3)
        everything = A(prepare_model_inputs_fn=None)
        torch.testing.assert_close(A(prepare_layer_inputs_fn=None), everything)
        assert not torch.allclose(everything, A(), atol=1e-3)
        with pytest.raises(NotInVeneerError, match="returns a boolean mask"):
            A(prepare_layer_inputs_fn=lambda x, batch, name: x[0])
        with pytest.raises(VeneerError, match="must return a boolean mask"):
            A(prepare_model_inputs_fn=lambda batch, config: 3)
        with pytest.raises(TypeError, match="inputs must be a dictionary"):
            ours.get_eva_state_dict(made(eva_config()), [torch.ones(2, 3, dtype=torch.long)],
                                    forward_fn=lambda model, x: model(x), show_progress_bar=False)

    def test_the_default_functions_are_pefts(self, batches: list[dict[str, Tensor]]) -> None:
        theirs = pytest.importorskip("peft.tuners.lora.eva")
        config, x = eva_config(), torch.randn(4, 8, 5)
        mine = prepare_model_inputs_fn_language_modeling(batches[0], config)
        assert torch.equal(mine, theirs.prepare_model_inputs_fn_language_modeling(dict(batches[0]), config))
        rows = prepare_layer_inputs_fn_language_modeling((x,), mine, "a")
        assert torch.equal(rows, theirs.prepare_layer_inputs_fn_language_modeling((x,), mine, "a"))
        assert forward_fn_dict(lambda a: a + 1, {"a": 2}) == 3

    def test_forward_fn_is_given_the_users_model(self, batches: list[dict[str, Tensor]]) -> None:
        model, seen = made(eva_config(rho=1.0)), []

        def forward(given: nn.Module, batch: Any) -> Any:
            seen.append(given)
            return given(**batch)

        ours.get_eva_state_dict(model, batches, forward_fn=forward, show_progress_bar=False)
        assert all(given is model for given in seen)

    def test_progress_and_gathering_are_the_callers_choice(self, batches: list[dict[str, Tensor]],
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
        module = importlib.import_module("veneer.peft.tuners.lora.eva")
        seen: list[Any] = []

        def calibrate(*args: Any, progress: bool, **options: Any) -> veneer.Statistics:
            seen.append(progress)
            return veneer.calibrate(*args, progress=False, **options)

        def gathered(self: veneer.Statistics, group: Any = None) -> veneer.Statistics:
            seen.append("gathered")
            return self

        monkeypatch.setattr(module, "calibrate", calibrate)
        monkeypatch.setattr(veneer.Statistics, "gathered", gathered)
        for flag in (True, False):
            ours.get_eva_state_dict(made(eva_config(rho=1.0)), batches, show_progress_bar=flag,
                                    gather_distributed_inputs=flag)
        assert seen == [True, "gathered", False]

    def test_a_bare_model_with_a_config(self, batches: list[dict[str, Tensor]]) -> None:
        config = eva_config(rho=1.0)
        bare = ours.get_eva_state_dict(skewed(), batches, config, show_progress_bar=False)
        whole = ours.get_eva_state_dict(made(config), batches, show_progress_bar=False)
        assert {f"base_model.model.{name}" for name in bare} == set(whole)
        for name, A in bare.items():
            torch.testing.assert_close(A, whole[f"base_model.model.{name}"], rtol=0, atol=0)
        with pytest.raises(ValueError, match="peft_config is required"):
            ours.get_eva_state_dict(nets.decoder(), batches)

    def test_dora_and_a_module_trained_whole_stay_right(self, batches: list[dict[str, Tensor]]) -> None:
        model = made(eva_config(use_dora=True, modules_to_save=["lm_head"]))
        head = model.get_base_model().lm_head.modules_to_save["default"].weight
        head.data.add_(1)
        inputs = nets.inputs_for(model.get_base_model())
        before = model(**inputs).logits
        ours.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
        torch.testing.assert_close(model(**inputs).logits, before)
        again = model.get_base_model().lm_head.modules_to_save["default"].weight
        assert torch.equal(again, head)
        assert again.requires_grad

    def test_layers_that_are_not_in_the_state_dict_begin_as_any_other(self, batches: list[dict[str, Tensor]]) -> None:
        model = made(eva_config(rho=1.0))
        state = ours.get_eva_state_dict(model, batches, show_progress_bar=False)
        left = "base_model.model.model.layers.0.self_attn.q_proj"
        state.pop(left)
        with pytest.warns(UserWarning, match=r"not found in the eva state_dict: \['model.layers.0.self_attn.q_proj'\]"):
            ours.initialize_lora_eva_weights(model, eva_state_dict=state)
        assert layers(model)[left].lora_A["default"].weight.any()

    def test_errors(self, batches: list[dict[str, Tensor]]) -> None:
        plain = ours.get_peft_model(nets.decoder(), ours.LoraConfig(r=2, target_modules=TARGETS))
        with pytest.raises(ValueError, match=r"can only be used with `init_lora_weights=.eva.`"):
            ours.initialize_lora_eva_weights(plain, batches)
        with pytest.raises(ValueError, match="model must be a PeftModel"):
            ours.initialize_lora_eva_weights(nets.decoder(), batches)
        model = made(eva_config())
        with pytest.raises(ValueError, match="dataloader is required"):
            ours.initialize_lora_eva_weights(model)
        with pytest.raises(VeneerError, match=r"no LoRA on 'model.layers.9.q_proj'"):
            ours.initialize_lora_eva_weights(model, eva_state_dict={"model.layers.9.q_proj": torch.ones(2, 16)})
        with pytest.raises(VeneerError, match=r"an A of shape \(rank, 16\)"):
            ours.initialize_lora_eva_weights(
                model, eva_state_dict={"base_model.model.model.layers.0.self_attn.q_proj": torch.ones(2, 4)})
        with pytest.raises(ValueError, match="no batches"):
            ours.initialize_lora_eva_weights(model, [])
        model.add_adapter("other", eva_config())
        model.base_model.set_adapter(["default", "other"])
        with pytest.raises(ValueError, match="single active adapter"):
            ours.initialize_lora_eva_weights(model, batches)

    def test_a_warning_where_components_have_not_settled(self, batches: list[dict[str, Tensor]]) -> None:
        with pytest.warns(VeneerWarning, match="had not settled"):
            ours.get_eva_state_dict(made(eva_config(tau=1.0)), batches[:2], show_progress_bar=False)


# -- CorDA ----------------------------------------------------------------------------------------------------
def corda_config(**options: Any) -> ours.LoraConfig:
    return ours.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="corda", corda_config=CordaConfig(**options))


def run_over(model: nn.Module, batches: list[dict[str, Tensor]]) -> Any:
    def run() -> None:
        for batch in batches:
            model(input_ids=batch["input_ids"])

    return run


def pairs(model: nn.Module) -> dict[str, Tensor]:
    """B·A of every layer as it started."""
    return {name: layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()
            for name, layer in layers(model).items()}


class TestCorda:
    def test_the_sums_are_over_all_forwards_of_the_callback(self, batches: list[dict[str, Tensor]],
                                                            tmp_path: Path) -> None:
        model = nets.decoder()
        preprocess_corda(model, corda_config(covariance_file=str(tmp_path / "sums.safetensors")),
                         run_over(model, batches))
        found = veneer.Statistics.load(tmp_path / "sums.safetensors")
        seen: list[Tensor] = []
        hook = model.get_submodule("model.layers.2.mlp.down_proj").register_forward_pre_hook(
            lambda module, args: seen.append(args[0].reshape(-1, 24)))
        with torch.no_grad():
            run_over(model, batches)()
        hook.remove()
        rows = torch.cat(seen)
        name = next(name for name in found if "layers.2" in name and "down_proj" in name)
        torch.testing.assert_close(found[name]["covariance"], rows.mT @ rows, rtol=1e-4, atol=1e-6)
        assert int(found[name]["count"]) == found.tokens == len(rows) == 6 * 4 * 8

    def test_the_adapter_starts_as_veneers_own(self, batches: list[dict[str, Tensor]]) -> None:
        model = nets.decoder()
        ids = [{"input_ids": batch["input_ids"]} for batch in batches]
        rules = {f"*.{name}": veneer.LoRA(rank=2, alpha=8, init="corda") for name in TARGETS}
        own = veneer.attach(nets.decoder(), rules, statistics=veneer.calibrate(nets.decoder(), ids, rules,
                                                                               progress=False))
        config = corda_config()
        preprocess_corda(model, config, run_over(model, batches))
        mine = ours.get_peft_model(model, config)
        for name, pair in pairs(mine).items():
            adapter = own.get_submodule(name.removeprefix("base_model.model.")).adapters["default"]["weight"]
            torch.testing.assert_close(pair, (adapter.B @ adapter.A).detach(), rtol=1e-3, atol=1e-4)
        assert any(pair.any() for pair in pairs(mine).values())

    def test_the_method_is_that_of_the_config(self, batches: list[dict[str, Tensor]]) -> None:
        found = []
        for method in ("ipm", "kpm"):
            model, config = nets.decoder(), corda_config(corda_method=method)
            preprocess_corda(model, config, run_over(model, batches))
            found.append(pairs(ours.get_peft_model(model, config)))
        assert all(not torch.allclose(found[0][name], found[1][name], atol=1e-4) for name in found[0])

    def test_another_model_may_be_the_one_that_runs(self, batches: list[dict[str, Tensor]]) -> None:
        model, twin, config = nets.decoder(), nets.decoder(), corda_config()
        preprocess_corda(model, config, run_over(twin, batches), hooked_model=twin)
        other = nets.decoder()
        preprocess_corda(other, config, run_over(other, batches))
        expected = pairs(ours.get_peft_model(other, config))
        for name, pair in pairs(ours.get_peft_model(model, config)).items():
            torch.testing.assert_close(pair, expected[name])

    @pytest.mark.parametrize("setting", ["cache_file", "covariance_file"])
    def test_a_file_is_written_and_read_again(self, batches: list[dict[str, Tensor]], tmp_path: Path,
                                              setting: str) -> None:
        config, model = corda_config(**{setting: str(tmp_path / "deep" / "corda.pt")}), nets.decoder()
        preprocess_corda(model, config, run_over(model, batches))
        assert [file.name for file in (tmp_path / "deep").iterdir()] == ["corda.pt.safetensors"]
        again = nets.decoder()
        preprocess_corda(again, config)
        expected = pairs(ours.get_peft_model(model, config))
        for name, pair in pairs(ours.get_peft_model(again, config)).items():
            torch.testing.assert_close(pair, expected[name], rtol=0, atol=0)

    def test_verbose_shows_the_progress(self, batches: list[dict[str, Tensor]],
                                        monkeypatch: pytest.MonkeyPatch) -> None:
        module, seen = importlib.import_module("veneer.peft.tuners.lora.collected"), []

        def calibrate(*args: Any, progress: bool, **options: Any) -> veneer.Statistics:
            seen.append(progress)
            return veneer.calibrate(*args, progress=False, **options)

        monkeypatch.setattr(module, "calibrate", calibrate)
        for verbose in (True, False):
            model = nets.decoder()
            preprocess_corda(model, corda_config(verbose=verbose), run_over(model, batches))
        assert seen == [True, False]

    def test_errors(self, batches: list[dict[str, Tensor]], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="run_model must be specified"):
            preprocess_corda(nets.decoder(), corda_config())
        with pytest.raises(ValueError, match="corda_config is not set"):
            preprocess_corda(nets.decoder(), ours.LoraConfig(target_modules=TARGETS), lambda: None)
        (tmp_path / "old.pt").write_bytes(b"a pickle")
        with pytest.raises(VeneerError, match=r"old.pt is no file of Veneer's, which writes old.pt.safetensors"):
            preprocess_corda(nets.decoder(), corda_config(cache_file=str(tmp_path / "old.pt")), lambda: None)
        with pytest.raises(VeneerError, match="was given no input"):
            preprocess_corda(nets.decoder(), corda_config(), lambda: None)
        with pytest.raises(VeneerError, match=r"run preprocess_corda\(model, lora_config, run_model\)"):
            ours.get_peft_model(nets.decoder(), corda_config())
        other = nets.decoder(layers=3)
        other.model.layers[0].self_attn.q_proj.weight.data.add_(1)
        model, config = nets.decoder(), corda_config(cache_file=str(tmp_path / "sums"))
        preprocess_corda(model, config, run_over(model, batches))
        with pytest.raises(VeneerError, match="of another model"):
            preprocess_corda(other, config)


# -- LoRA-GA --------------------------------------------------------------------------------------------------
def loraga_config(**options: Any) -> ours.LoraConfig:
    return ours.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="lora_ga",
                           lora_ga_config=LoraGAConfig(**options))


def step_over(model: nn.Module, batches: list[dict[str, Tensor]]) -> Any:
    def step() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    return step


class TestLoraGA:
    def test_a_and_b_are_singular_vectors_of_the_whole_gradient(self, batches: list[dict[str, Tensor]]) -> None:
        model, config = nets.decoder(), loraga_config()
        reference = copy.deepcopy(model)
        step_over(reference, batches)()
        ours.preprocess_loraga(model, config, step_over(model, batches))
        assert all(param.grad is None for param in model.parameters())
        assert all(param.requires_grad for param in model.parameters())
        made = ours.get_peft_model(model, config)
        name = "model.layers.1.mlp.down_proj"
        left, _, right = torch.linalg.svd(reference.get_submodule(name).weight.grad, full_matrices=False)
        layer = layers(made)[f"base_model.model.{name}"]
        unit = torch.nn.functional.normalize
        A, B = (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach())
        torch.testing.assert_close((unit(A) @ right[:2].mT).abs(), torch.eye(2), rtol=0, atol=1e-3)
        torch.testing.assert_close((unit(B, dim=0).mT @ left[:, 2:4]).abs(), torch.eye(2), rtol=0, atol=1e-3)

    def test_gamma_sets_the_size(self, batches: list[dict[str, Tensor]]) -> None:
        norms = []
        for gamma in (16, 4):
            model, config = nets.decoder(), loraga_config(stable_gamma=gamma)
            ours.preprocess_loraga(model, config, step_over(model, batches))
            made = ours.get_peft_model(model, config)
            norms.append(next(iter(layers(made).values())).lora_A["default"].weight.norm().item())
        assert norms[1] / norms[0] == pytest.approx(2.0, rel=1e-4)

    def test_the_cache_file(self, batches: list[dict[str, Tensor]], tmp_path: Path) -> None:
        model, config = nets.decoder(), loraga_config()
        ours.preprocess_loraga(model, config, step_over(model, batches), cache_file=str(tmp_path / "grads.safetensors"))

        def never() -> None:
            raise AssertionError("the file is there")

        again = nets.decoder()
        ours.preprocess_loraga(again, config, never, cache_file=str(tmp_path / "grads.safetensors"))
        expected = pairs(ours.get_peft_model(model, config))
        for name, pair in pairs(ours.get_peft_model(again, config)).items():
            torch.testing.assert_close(pair, expected[name], rtol=0, atol=0)

    def test_errors(self, batches: list[dict[str, Tensor]]) -> None:
        with pytest.raises(ValueError, match="initialize the LoraConfig with init_lora_weights='lora_ga'"):
            ours.preprocess_loraga(nets.decoder(), ours.LoraConfig(target_modules=TARGETS), lambda: None)
        with pytest.raises(VeneerError, match="got no gradient"):
            ours.preprocess_loraga(nets.decoder(), loraga_config(), lambda: None)
        with pytest.raises(VeneerError, match="No supported layers found"):
            ours.preprocess_loraga(nets.decoder(), ours.LoraConfig(
                r=2, target_modules=["embed_tokens"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()),
                lambda: None)

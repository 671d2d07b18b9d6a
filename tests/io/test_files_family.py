"""LoHa, LoKr, VeRA, VB-LoRA, RandLoRA and AdaLoRA against the pip-installed peft, in both directions."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch
from io_models import adapted, fresh, outputs, randomise, relative
from torch import nn

import veneer
from veneer import AdaLoRA, DoRA, Full, LoHa, LoKr, LoRA, RandLoRA, Rows, VBLoRA, VeRA
from veneer.io.tensors import read_tensors, write_tensors
from veneer.method import VeneerError

peft = pytest.importorskip("peft")
BAR = 1e-5
VB = {"rank": 2, "num_vectors": 12, "vector_length": 8}
RANDOM = {"rank": 5, "alpha": 4, "seed": 3}

#: name → (base, rules): all of these PEFT can express
WRITTEN = {
    "loha": ("llama", LoHa(rank=2, alpha=3)),
    "loha_scale_1": ("llama", {"*.q_proj": LoHa(rank=3)}),
    "loha_patterns": ("llama", {"*.q_proj": LoHa(rank=2), "*.layers.1.*.q_proj": LoHa(rank=3, alpha=9),
                                "*.mlp.*": LoHa(rank=4, alpha=2.5), "lm_head": LoHa(rank=1)}),
    "loha_convs": ("mixed", {"conv*": LoHa(rank=2, alpha=4), "block.*": LoHa(rank=2), "head": Full()}),
    "loha_effective": ("mixed", {"conv*": LoHa(rank=2, alpha=4, effective_conv=True), "block.*": LoHa(rank=2)}),
    "lokr": ("llama", LoKr(rank=2, alpha=6)),
    "lokr_whole": ("llama", {"*.mlp.*": LoKr(rank=8)}),
    "lokr_both": ("llama", LoKr(rank=1, alpha=2, decompose_both=True, decompose_factor=8)),
    "lokr_patterns": ("llama", {"*.q_proj": LoKr(rank=1), "*.layers.1.*.q_proj": LoKr(rank=3, alpha=9),
                                "*.norm": Full()}),
    "lokr_lycoris": ("llama", {"*.v_proj": LoKr(rank=2, init="lycoris")}),
    "lokr_conv2d_whole": ("mixed", {"conv2": LoKr(rank=8), "block.*": LoKr(rank=8), "head": Full()}),
    "lokr_convs_flat": ("mixed", {"conv1": LoKr(rank=2, decompose_factor=1),
                                  "conv2": LoKr(rank=1, decompose_factor=1)}),
    "lokr_conv1d_effective": ("mixed", {"conv1": LoKr(rank=2, decompose_factor=1, effective_conv=True)}),
    "lokr_conv2d_effective": ("mixed", {"conv2": LoKr(rank=1, decompose_factor=1, effective_conv=True)}),
    "vera": ("llama", VeRA(rank=6, seed=5)),
    "vera_conv1d": ("gpt2", {"*.c_attn": VeRA(rank=6), "*.mlp.c_proj": VeRA(rank=6)}),
    "vera_saved": ("llama", {"*.q_proj": VeRA(rank=6, save_bases=True), "*.k_proj": VeRA(rank=6, save_bases=True),
                             "lm_head": Full()}),
    "vera_biases": ("llama", {"*.q_proj": VeRA(rank=6), "*.q_proj.bias": Full()}),
    "vblora": ("llama", VBLoRA(**VB)),
    "vblora_conv1d": ("gpt2", {"*.c_attn": VBLoRA(**VB), "*.mlp.c_fc": VBLoRA(**VB), "*.wpe": Full()}),
    "vblora_biases": ("llama", {"*.q_proj": VBLoRA(**VB), "*.bias": Full()}),
    "vblora_top": ("llama", VBLoRA(**VB, topk=3, save_only_topk_weights=True)),
    "randlora": ("llama", RandLoRA(**RANDOM)),
    "randlora_conv1d": ("gpt2", {"*.c_attn": RandLoRA(**RANDOM), "*.mlp.c_proj": RandLoRA(**RANDOM), "*ln_f": Full()}),
    "randlora_sparse": ("llama", {"*.q_proj": RandLoRA(**RANDOM, sparsity="sparse")}),
    "randlora_very_sparse": ("llama", {"*.mlp.*": RandLoRA(**RANDOM, sparsity="very_sparse")}),
    "randlora_saved": ("llama", {"*.mlp.*": RandLoRA(**RANDOM, save_bases=True)}),
    "randlora_sparse_saved": ("llama", {"*.mlp.*": RandLoRA(**RANDOM, sparsity="sparse", save_bases=True)}),
    "adalora": ("llama", AdaLoRA(init_r=5, target_r=3, total_step=20, alpha=7, deltaT=3)),
    "adalora_conv1d": ("gpt2", {"*.c_attn": AdaLoRA(init_r=5, target_r=3, total_step=20), "*.wpe": Full()}),
    "adalora_conv2d": ("mixed", {"conv2": AdaLoRA(init_r=5, target_r=3, total_step=20),
                                 "block.*": AdaLoRA(init_r=5, target_r=3, total_step=20)}),
    "adalora_no_steps": ("llama", {"*.q_proj": AdaLoRA(init_r=5, target_r=3), "*.q_proj.bias": Full()}),
    "adalora_pruned": ("llama", {"*": None, "*.q_proj": AdaLoRA(init_r=4, target_r=2, total_step=20),
                                 "*.v_proj": AdaLoRA(init_r=4, target_r=2, total_step=20), "lm_head": Full()}),
    "adalora_conv2d_pruned": ("mixed", {"conv2": AdaLoRA(init_r=5, target_r=3, total_step=20)}),
    "adalora_rows": ("llama", {"*.q_proj": AdaLoRA(init_r=4, target_r=2), "*.embed_tokens": Rows([4, 2, 30])}),
    "adalora_tied_rows": ("llama_tied", {"*.q_proj": AdaLoRA(init_r=4, target_r=2), "*.embed_tokens": Rows([4, 30])}),
    "adalora_tied_full": ("llama_tied", {"*.q_proj": AdaLoRA(init_r=4, target_r=2), "*.embed_tokens": Full()}),
}


def prune(model):
    """Cut what an allocator might: another triplet of every weight, all of the last, one that has grown again."""
    adapters = [a for a in veneer.adapters(model)["default"].weights.values() if isinstance(a.method, AdaLoRA)]
    with torch.no_grad():
        for i, adapter in enumerate(adapters):
            adapter.mask[[i % len(adapter.mask), 1]] = False
            adapter.E[~adapter.mask] = 0
        adapters[-1].mask[:] = False
        adapters[-1].E[:] = 0
        adapters[0].E[1] = 0.3
        if len(adapters) == 1:
            adapters[0].E[2:] = 0.2


def trained(case):
    kind, rules = WRITTEN[case]
    model = adapted(fresh(kind), rules)
    if "pruned" in case:
        prune(model)
    return kind, model


TYPES = {"loha": "LOHA", "lokr": "LOKR", "vera": "VERA", "vblora": "VBLORA", "randlora": "RANDLORA",
         "adalora": "ADALORA"}


def load_with_peft(kind, path):
    """PEFT's model; a warning about what the file lacks is an error, but for copies of RandLoRA's bases."""
    config = json.loads((path / "adapter_config.json").read_text())
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(fresh(kind), str(path)).eval()
    texts = [str(w.message) for w in found if "issing" in str(w.message)]
    for text in texts:
        names = text.partition("[")[2].partition("]")[0].split(", ")
        assert all("randlora_A" in name or "randlora_B" in name for name in names), text
    assert bool(texts) == (config["peft_type"] == "RANDLORA" and config["save_projection"]), texts
    return model


def without_manifest(path, to, change=lambda tensors: None, **config):
    """The same adapter as another tool would have written it, with tensors and config keys changed."""
    tensors = {k: t.clone() for k, t in read_tensors(path / "adapter_model.safetensors")[0].items()}
    change(tensors)
    to.mkdir(exist_ok=True)
    with open(to / "adapter_model.safetensors", "wb") as file:
        write_tensors(file, tensors, {"format": "pt"})
    now = {**json.loads((path / "adapter_config.json").read_text()), **config}
    (to / "adapter_config.json").write_text(json.dumps(now))
    return to


def close(case, a, b):
    """Bit-equal, but where only the weights of the top vectors are kept, of which the logits are computed again."""
    return relative(a, b) < BAR if "top" in case else torch.equal(a, b)


@pytest.mark.parametrize("case", WRITTEN)
def test_peft_loads_what_save_writes(case, tmp_path):
    kind, model = trained(case)
    report = veneer.save(model, tmp_path)
    assert report.format == "peft", report.reason
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == TYPES[case.partition("_")[0]]
    want = outputs(model, kind)
    assert relative(want, outputs(fresh(kind), kind)) > 1e-3
    assert relative(outputs(load_with_peft(kind, tmp_path), kind), want) < BAR


@pytest.mark.parametrize("case", WRITTEN)
def test_own_files_come_back(case, tmp_path):
    kind, model = trained(case)
    veneer.save(model, tmp_path / "own")
    again = fresh(kind)
    assert veneer.load(again, tmp_path / "own").problems == ()
    assert close(case, outputs(again, kind), outputs(model, kind))
    there = {name: adapter.method for name, adapter in veneer.adapters(model)["default"].weights.items()}
    assert {name: adapter.method for name, adapter in veneer.adapters(again)["default"].weights.items()} == there
    other = fresh(kind)
    assert veneer.load(other, without_manifest(tmp_path / "own", tmp_path / "bare")).problems == ()
    assert close(case, outputs(other, kind), outputs(model, kind))
    # over the adapter that is there already
    randomise(again)
    assert veneer.load(again, tmp_path / "own").problems == ()
    assert close(case, outputs(again, kind), outputs(model, kind))


def config(name, **options):
    """A config of PEFT, made when it is needed: some warn when they are."""
    return lambda: getattr(peft, f"{name}Config")(**options)


ADA = {"init_r": 5, "target_r": 2, "total_step": 12, "lora_alpha": 7}
TOP = {"r": 2, "num_vectors": 12, "vector_length": 8}
DRAWN = {"r": 5, "projection_prng_key": 9}

#: name → (base, PEFT's config)
READ = {
    "loha": ("llama", config("LoHa", r=2, alpha=3, target_modules=["q_proj", "down_proj"])),
    "loha_patterns": ("llama", config(
        "LoHa", r=2, alpha=3, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 3},
        alpha_pattern={r"^model.layers.1.mlp.up_proj": 11}, modules_to_save=["lm_head"])),
    "loha_convs": ("mixed", config("LoHa", r=2, target_modules=["conv1", "conv2", "block.0"])),
    "loha_effective": ("mixed", config("LoHa", r=2, target_modules=["conv1", "conv2", "head"],
                                       use_effective_conv2d=True)),
    "loha_layers": ("llama", config("LoHa", r=2, target_modules=["q_proj"], layers_to_transform=[1],
                                    rank_dropout=0.1, module_dropout=0.2)),
    "lokr": ("llama", config("LoKr", r=2, alpha=3, target_modules=["q_proj", "down_proj"])),
    "lokr_whole": ("llama", config("LoKr", r=16, alpha=3, target_modules=r".*\.(k|v)_proj")),
    "lokr_both": ("llama", config("LoKr", r=1, alpha=2, target_modules=["q_proj"], decompose_both=True,
                                  decompose_factor=8, modules_to_save=["lm_head"])),
    "lokr_lycoris": ("llama", config("LoKr", r=2, target_modules=["q_proj", "k_proj"], rank_pattern={"k_proj": 1},
                                     init_weights="lycoris", rank_dropout=0.3, rank_dropout_scale=True)),
    "lokr_conv2d": ("mixed", config("LoKr", r=8, target_modules=["conv2", "block.2"])),
    "lokr_convs": ("mixed", config("LoKr", r=1, target_modules=["conv1", "conv2"], decompose_factor=1)),
    "lokr_conv1d_effective": ("mixed", config("LoKr", r=2, target_modules=["conv1"], decompose_factor=1,
                                              use_effective_conv2d=True)),
    "vera": ("llama", config("Vera", r=6, target_modules=["q_proj", "k_proj", "down_proj"], projection_prng_key=4,
                             save_projection=False)),
    "vera_saved": ("llama", config("Vera", r=6, target_modules=["q_proj", "k_proj"], vera_dropout=0.1, d_initial=0.5,
                                   modules_to_save=["lm_head"])),
    "vera_conv1d": ("gpt2", config("Vera", r=6, target_modules=["c_attn"], save_projection=False)),
    "vera_biases": ("llama", config("Vera", r=6, target_modules=["q_proj"], bias="vera_only")),
    "vblora": ("llama", config("VBLoRA", **TOP, target_modules=["q_proj", "k_proj", "down_proj"])),
    "vblora_top": ("llama", config("VBLoRA", **TOP, topk=3, target_modules=["k_proj"], save_only_topk_weights=True)),
    "vblora_conv1d": ("gpt2", config("VBLoRA", **TOP, target_modules=["c_attn", "mlp.c_proj"],
                                     modules_to_save=["ln_f"])),
    "vblora_biases": ("llama", config("VBLoRA", **TOP, target_modules=["q_proj"], bias="all")),
    "randlora": ("llama", config("RandLora", **DRAWN, randlora_alpha=4, target_modules=["q_proj", "k_proj", "up_proj"],
                                 save_projection=False)),
    "randlora_saved": ("llama", config("RandLora", **DRAWN, randlora_alpha=4, target_modules=["q_proj", "down_proj"],
                                       modules_to_save=["lm_head"])),
    "randlora_conv1d": ("gpt2", config("RandLora", **DRAWN, randlora_alpha=4, target_modules=["c_attn", "c_proj"],
                                       save_projection=False)),
    "randlora_sparse": ("llama", config("RandLora", **DRAWN, randlora_alpha=4, target_modules=["q_proj"], sparse=True,
                                        save_projection=False)),
    "randlora_very_sparse": ("llama", config("RandLora", **DRAWN, randlora_alpha=4, target_modules=["up_proj"],
                                             very_sparse=True)),
    "randlora_biases": ("llama", config("RandLora", **DRAWN, randlora_alpha=4, target_modules=["q_proj"],
                                        bias="randlora_only")),
    "adalora": ("llama", config("AdaLora", **ADA, target_modules=["q_proj", "k_proj", "down_proj"])),
    "adalora_conv1d": ("gpt2", config("AdaLora", **ADA, target_modules=["c_attn"], modules_to_save=["ln_f"])),
    "adalora_conv2d": ("mixed", config("AdaLora", **ADA, target_modules=["conv2", "block.0"], bias="lora_only")),
    "adalora_pruned": ("llama", config("AdaLora", **ADA, target_modules=["q_proj", "k_proj"])),
    "adalora_rows": ("llama", config("AdaLora", **ADA, target_modules=["q_proj"],
                                     trainable_token_indices={"embed_tokens": [7]})),
    "adalora_default_target": ("llama", config("AdaLora", init_r=4, total_step=9, tinit=2, tfinal=3, lora_alpha=0,
                                               target_modules=["v_proj"])),
}


def prune_in_peft(model):
    """As PEFT's own allocator leaves it: E zero, and a pattern with the adapter's name in its keys."""
    pattern = {}
    with torch.no_grad():
        for i, (name, E) in enumerate((n, p) for n, p in model.base_model.model.named_parameters() if "lora_E" in n):
            keep = torch.arange(len(E)) % 3 != i % 3 if i else torch.zeros(len(E), dtype=torch.bool)
            E[~keep] = 0
            pattern[name] = keep.tolist()
    model.peft_config["default"].rank_pattern = pattern


def written_by_peft(kind, options, path, pruned=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(fresh(kind), options()).eval()
        randomise(model)
        if pruned:
            prune_in_peft(model)
        model.save_pretrained(str(path))
    return model


@pytest.mark.parametrize("case", READ)
def test_load_reads_what_peft_writes_and_save_gives_it_back(case, tmp_path):
    kind, options = READ[case]
    want = outputs(written_by_peft(kind, options, tmp_path / "peft", "pruned" in case), kind)
    assert relative(want, outputs(fresh(kind), kind)) > 1e-3
    model = fresh(kind)
    report = veneer.load(model, tmp_path / "peft")
    assert report.problems == ()
    assert relative(outputs(model, kind), want) < BAR
    report = veneer.save(model, tmp_path / "veneer")
    assert report.format == "peft", report.reason
    assert relative(outputs(load_with_peft(kind, tmp_path / "veneer"), kind), want) < BAR
    then = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    now = json.loads((tmp_path / "veneer" / "adapter_config.json").read_text())
    assert set(now) <= set(then)
    if not then.get("rank_pattern") and not then.get("alpha_pattern"):  # which can be said in more than one way
        ours = {"auto_mapping", "target_modules", "layers_to_transform", "task_type"}
        if case == "adalora_default_target":  # what PEFT takes for alpha, and no more than init_r
            ours |= {"lora_alpha", "target_r"}
        told = set(now) - ours
        assert {k: then[k] for k in told} == {k: now[k] for k in told}
    if case == "adalora_pruned":
        assert now["rank_pattern"] == then["rank_pattern"]
        assert any(not any(kept) for kept in now["rank_pattern"].values())


class Convs(nn.Module):
    """Convolutions that PEFT treats in another way: (batch, 96) token ids → (batch, 8, 4, 3)."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.default_conv = nn.Conv2d(1, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding="same", **options)
        self.deep = nn.Conv3d(1, 1, 3, padding=1)
        self.twin = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)
        self.other.weight = self.twin.weight
        self.experts = nn.ParameterDict({"weight": nn.Parameter(torch.randn(2, 6, 6))})

    def forward(self, ids):
        x = self.conv(self.default_conv(ids.float().reshape(-1, 1, 4, 6)))
        x = self.deep(x.unsqueeze(1)).squeeze(1)
        return (self.twin(x) + self.other(x)) @ self.experts["weight"].sum(0)


def convs(**options):
    torch.manual_seed(8)
    return Convs(**options).eval()


ADALORA = AdaLoRA(init_r=4, target_r=2)
#: name → (base, rules, part of the reason): what PEFT cannot say
NATIVE = {
    "loha on an embedding": ("mixed", {"embed": LoHa(rank=2)},
                             "PEFT has LoHa on Linear, Conv1d and Conv2d layers, and 'embed' is Embedding"),
    "lokr on transformers' Conv1D": ("gpt2", {"*.c_attn": LoKr(rank=2)}, "'transformer.h.0.attn.c_attn' is Conv1D"),
    "vera on a convolution": ("mixed", {"conv*": VeRA(rank=4)},
                              "VeRA on Linear and Conv1D layers, and 'conv1' is Conv1d"),
    "vera on an embedding": ("llama", {"*.embed_tokens": VeRA(rank=4)}, "'model.embed_tokens' is Embedding"),
    "randlora on attention": ("mixed", {"attention.in_proj_weight": RandLoRA(rank=4)},
                              "'attention.in_proj_weight' is MultiheadAttention"),
    "adalora on Conv1d": ("mixed", {"conv1": ADALORA},
                          "AdaLoRA on Linear, Conv1D and Conv2d layers, and 'conv1' is Conv1d"),
    "loha on Conv3d": ("convs", {"deep": LoHa(rank=2)}, "'deep' is Conv3d"),
    "loha on experts": ("convs", {"experts.weight": LoHa(rank=2)}, "'experts' is a weight of another kind"),
    "a tied weight": ("convs", {"twin": LoHa(rank=2)}, "'twin' is tied, and PEFT's LoHa adapts each of its places"),
    "lokr whole on Conv1d": ("mixed", {"conv1": LoKr(rank=8)}, "LoKr on a Conv1d together in another order"),
    "lokr of rank 1 on Conv1d": ("mixed", {"conv1": LoKr(rank=1, effective_conv=True)}, "fails in torch.kron"),
    "vblora that does not divide": ("llama", VBLoRA(rank=2, num_vectors=12, vector_length=12),
                                    "vector_length=12 divides, and this weight is 32 × 32"),
    "dora around loha": ("mixed", {"head": DoRA(LoHa(rank=2))},
                         "'head' has DoRA(LoHa(rank=2)), which PEFT does not have"),
    "two methods": ("mixed", {"head": LoHa(rank=2), "block.0": LoRA(rank=2)}, "a PEFT file has one method"),
    "two veras": ("llama", {"*.q_proj": VeRA(rank=4), "*.v_proj": VeRA(rank=5)}, "share nothing with each other"),
    "larger bases": ("llama", {"*.q_proj": VeRA(rank=4, bases=(48, 48))},
                     "bases=(48, 48), and PEFT always takes the largest sizes among the weights it adapts, here (32, "),
    "larger bases that are saved": ("llama", {"*.q_proj": RandLoRA(rank=4, bases=(48, 32), save_bases=True)},
                                    "bases=(48, 32), and PEFT always takes the largest sizes"),
    "options without a pattern": ("llama", {"*.q_proj": LoKr(rank=2), "*.v_proj": LoKr(rank=2, decompose_factor=4)},
                                  "decompose_factor is -1 on most weights and 4 on 'model.layers.0.self_attn.v_proj'"),
    "two alphas of adalora": ("llama", {"*.q_proj": ADALORA, "*.v_proj": AdaLoRA(init_r=4, target_r=2, alpha=3)},
                              "a PEFT file has one lora_alpha for all"),
    "adalora without a scale": ("mixed", {"head": AdaLoRA(init_r=4, target_r=2, alpha=0)}, "a rank for an alpha of 0"),
    "adalora's name of an adapter": ("convs", {"default_conv": ADALORA}, "mistakes 'default' in the module's name"),
    "biases": ("mixed", {"head": LoHa(rank=2), "block.0.bias": Full()}, "PEFT trains no biases beside LOHA"),
    "rows": ("llama", {"*.q_proj": VeRA(rank=4), "*.embed_tokens": Rows([3])},
             "PEFT has no trainable_token_indices beside VERA"),
    "a tie": ("llama_tied", {"*.q_proj": VBLoRA(**VB), "*.embed_tokens": Full()},
              "PEFT has no ensure_weight_tying beside VBLORA"),
}


@pytest.mark.parametrize("case", NATIVE)
def test_what_peft_cannot_say_is_native_and_says_why(case, tmp_path):
    kind, rules, reason = NATIVE[case]
    base = convs if kind == "convs" else lambda: fresh(kind)
    model = adapted(base(), rules)
    if "name of an adapter" in case:
        assert veneer.save(model, tmp_path).format == "peft"  # as long as there is no rank_pattern
        prune(model)
    report = veneer.save(model, tmp_path)
    assert report.format == "native"
    assert reason in report.reason
    other = base()
    assert veneer.load(other, tmp_path).problems == ()
    for (name, want), got in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(got, want), name


#: method → what its PEFT takes over from a convolution
CARRIED = {LoHa(rank=2): {"groups", "dilation"}, LoKr(rank=2, decompose_factor=1): {"groups", "dilation"},
           ADALORA: {"dilation"}}


@pytest.mark.parametrize("method", CARRIED, ids=str)
@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": 2}, {"padding_mode": "reflect"},
                                     {"groups": 2, "dilation": 2, "padding_mode": "circular"}], ids=str)
def test_convolutions_other_than_plain_ones(method, options, tmp_path):
    model = adapted(convs(**options), {"conv": method})
    report = veneer.save(model, tmp_path)
    ids = torch.arange(48).reshape(2, 24)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if set(options) <= CARRIED[method]:
            assert report.format == "peft", report.reason
            theirs = peft.PeftModel.from_pretrained(convs(**options), str(tmp_path)).eval()
            assert relative(theirs(ids), model(ids)) < BAR
            theirs.save_pretrained(str(tmp_path / "peft"))
            again = convs(**options)
            assert veneer.load(again, tmp_path / "peft").problems == ()
            assert relative(again(ids), model(ids)) < BAR
            return
        assert report.format == "native"
        odd = [name for name in options if name not in CARRIED[method]]
        assert f"'conv' is a convolution with {odd[0]}=" in report.reason
        if not isinstance(method, AdaLoRA):
            made = {"LoHa": "LoHaConfig", "LoKr": "LoKrConfig"}[type(method).__name__]
            theirs = peft.get_peft_model(convs(**options), getattr(peft, made)(r=2, target_modules=["conv"]))
            theirs.save_pretrained(str(tmp_path / "peft"))
            with pytest.raises(VeneerError, match=r"'conv' is a convolution with .* on it cannot be loaded"):
                veneer.load(convs(**options), tmp_path / "peft")


def test_an_option_counts_only_where_it_says_something(tmp_path):
    """effective_conv is for kernels: what linear layers say of it does not matter."""
    model = adapted(fresh("mixed"), {"conv*": LoHa(rank=2, effective_conv=True), "block.*": LoHa(rank=2),
                                     "head": LoHa(rank=2)})
    assert veneer.save(model, tmp_path).format == "peft"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_effective_conv2d"] is True


# -- strictness ---------------------------------------------------------------------------------------------
KEYS = {"loha": "hada_w1_a", "lokr_both": "lokr_w2_a", "vera_saved": "vera_lambda_d", "vblora": "vblora_logits_A",
        "vblora_top": "vblora_logits_B_topk_indices", "randlora": "randlora_gamma", "adalora": "lora_E"}
PARTS = {"loha": "w1_a", "lokr_both": "w2_a", "vera_saved": "d", "vblora": "logits_A", "vblora_top": "logits_B_indices",
         "randlora": "gamma", "adalora": "E"}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def refused(path) -> str:
    model = fresh("llama")
    with pytest.raises(VeneerError) as error:
        veneer.load(model, path)
    assert veneer.adapters(model) == {}
    return str(error.value)


@pytest.mark.parametrize("case", KEYS)
def test_missing_unexpected_and_misshapen_tensors_are_listed(case, tmp_path):
    _, model = trained(case)
    veneer.save(model, tmp_path / "own")
    key = f"base_model.model.{Q_PROJ}.{KEYS[case]}"

    def missing(tensors):
        del tensors[key]

    def renamed(tensors):
        tensors[key.replace("q_proj", "q_porj")] = tensors.pop(key)

    def misshapen(tensors):
        tensors[key] = torch.cat([tensors[key], tensors[key]])

    def gone(tensors):
        for name in [name for name in tensors if Q_PROJ in name]:
            del tensors[name]

    says = {name: refused(without_manifest(tmp_path / "own", tmp_path / name, change))
            for name, change in (("missing", missing), ("renamed", renamed), ("misshapen", misshapen), ("gone", gone))}
    assert f"missing: {PARTS[case]} of {Q_PROJ!r} (no {key!r} in the file)" in says["missing"]
    assert f"missing: {PARTS[case]} of {Q_PROJ!r} (no {key!r} in the file)" in says["renamed"]
    assert "no module 'model.layers.0.self_attn.q_porj' here; did you mean" in says["renamed"]
    assert f"wrong shape: {key!r} is (" in says["misshapen"]
    assert f") as {PARTS[case]} of {Q_PROJ!r}, which needs (" in says["misshapen"]
    assert f"missing: target module {Q_PROJ!r} has no 'base_model.model.{Q_PROJ}." in says["gone"]


def test_what_all_share_is_missing_unexpected_or_not_the_same(tmp_path):
    veneer.save(trained("vera_saved")[1], tmp_path / "vera")
    veneer.save(trained("vblora")[1], tmp_path / "vblora")
    written_by_peft(*READ["randlora_saved"], tmp_path / "randlora")

    def without(key):
        return lambda tensors: tensors.pop(key)

    def other_copy(tensors):
        tensors[f"base_model.model.{Q_PROJ}.randlora_A"].mul_(2)

    def wide(tensors):
        tensors["base_model.vera_A"] = torch.zeros(6, 48)

    bare = tmp_path / "bare"
    assert f"missing: shared.bank of {Q_PROJ!r} (no 'base_model.vblora_vector_bank' in the file)" in refused(
        without_manifest(tmp_path / "vblora", bare, without("base_model.vblora_vector_bank")))
    assert f"missing: shared.B of {Q_PROJ!r} (no 'base_model.vera_B' in the file)" in refused(
        without_manifest(tmp_path / "vera", bare, without("base_model.vera_B")))
    assert "unexpected: 'base_model.vera_A'" in refused(
        without_manifest(tmp_path / "vera", bare, save_projection=False))
    assert f"wrong shape: 'base_model.vera_A' is (6, 48) as shared.A of {Q_PROJ!r}, which needs (6, 32)" in refused(
        without_manifest(tmp_path / "vera", bare, wide))
    assert f"'base_model.model.{Q_PROJ}.randlora_A' is not the same as " in refused(
        without_manifest(tmp_path / "randlora", bare, other_copy))


def test_saved_bases_are_taken_as_they_are(tmp_path):
    """Whatever they are: PEFT may have drawn RandLoRA's in float16."""
    written_by_peft(*READ["randlora_saved"], tmp_path / "peft")

    def other(tensors):
        for key in [key for key in tensors if "randlora_A" in key or "randlora_B" in key]:
            tensors[key].mul_(1.0007)

    path = without_manifest(tmp_path / "peft", tmp_path / "bare", other)
    model = fresh("llama")
    assert veneer.load(model, path).problems == ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(fresh("llama"), str(path)).eval()
    assert relative(outputs(model, "llama"), outputs(theirs, "llama")) < BAR


@pytest.mark.parametrize(("case", "key", "value", "says"), [
    ("loha", "use_dora", True, "unknown key 'use_dora' (= True)"),
    ("loha", "use_effective_conv", True, "did you mean 'use_effective_conv2d'?"),
    ("loha", "bias", "all", "unknown key 'bias' (= 'all')"),
    ("lokr", "use_upstream", True, "unknown key 'use_upstream' (= True)"),
    ("lokr", "rank_pattern", {"q_proj(": 4}, "rank_pattern: 'q_proj(' is no regular expression"),
    ("vera", "bias", "lora_only", "bias='lora_only'; possible: none, all, vera_only"),
    ("vera", "exclude_modules", ["q_proj"], "unknown key 'exclude_modules' (= ['q_proj'])"),
    ("vera", "r", 0, "rank must be a whole number of at least 1"),
    ("randlora", "trainable_token_indices", [1], "unknown key 'trainable_token_indices' (= [1])"),
    ("adalora", "use_dora", True, "use_dora=True is not supported: PEFT's AdaLoRA has no DoRA"),
    ("adalora", "target_parameters", ["lm_head.weight"], "AdaLoRA adapts modules, not single parameters"),
    ("adalora", "layer_replication", [[0, 2]], "it repeats layers of the base"),
    ("adalora", "rank_pattern", {f"{Q_PROJ}.lora_E": [True] * 4}, "rank_pattern has 4 entries for"),
    ("adalora", "rank_pattern", {"lm_head.lora_E": [True] * 5}, "unexpected: rank_pattern has 'lm_head.lora_E'"),
    ("adalora", "peft_type", "ADALORAH", "peft_type is 'ADALORAH'; did you mean 'ADALORA'? Veneer reads LORA, LOHA"),
    ("adalora", "peft_type", "BOFT", "VERA, VBLORA, RANDLORA, ADALORA, each with modules_to_save"),
])
def test_config_keys_that_would_change_the_result(case, key, value, says, tmp_path):
    veneer.save(trained(case)[1], tmp_path / "own")
    assert says in refused(without_manifest(tmp_path / "own", tmp_path / "bare", **{key: value}))


@pytest.mark.parametrize("case", ["loha", "lokr", "vera", "vblora", "randlora", "adalora"])
def test_config_keys_without_influence(case, tmp_path):
    _, model = trained(case)
    veneer.save(model, tmp_path / "own")
    harmless = {"something_new": None, "other_new": False, "third": [], "revision": "main", "task_type": "X"}
    other = fresh("llama")
    assert veneer.load(other, without_manifest(tmp_path / "own", tmp_path / "bare", **harmless)).problems == ()
    assert relative(outputs(other, "llama"), outputs(model, "llama")) < BAR


def test_layers_that_peft_does_not_adapt_with_this_method(tmp_path):
    veneer.save(trained("loha")[1], tmp_path / "own")

    def moved(tensors):
        tensors["base_model.model.model.embed_tokens.hada_w1_a"] = torch.zeros(40, 2)

    assert "PEFT has LoHa on Linear, Conv1d and Conv2d layers, and 'model.embed_tokens' is Embedding here" in refused(
        without_manifest(tmp_path / "own", tmp_path / "bare", moved))


def test_lokr_on_conv1d_that_peft_computes_otherwise(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = peft.LoKrConfig(r=8, target_modules=["conv1"])
        peft.get_peft_model(fresh("mixed"), options).save_pretrained(str(tmp_path))
    with pytest.raises(VeneerError, match=r"'conv1': PEFT puts the two factors .* in another order .* cannot be"):
        veneer.load(fresh("mixed"), tmp_path)


def test_a_tied_weight_that_peft_adapts_in_one_place(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = peft.LoHaConfig(r=2, target_modules=["lm_head"])
        peft.get_peft_model(fresh("llama_tied"), options).save_pretrained(str(tmp_path))
    with pytest.raises(VeneerError, match="'lm_head' shares a tied weight here, and PEFT's LoHa adapted it alone"):
        veneer.load(fresh("llama_tied"), tmp_path)


# -- what is in the files, and what is said of them ---------------------------------------------------------
@pytest.mark.parametrize("method", [VeRA(rank=256), RandLoRA(rank=16, alpha=4)], ids=["vera", "randlora"])
def test_files_without_bases_hold_what_was_trained_and_nothing_else(method, tmp_path):
    model = adapted(fresh("llama"), {"*.q_proj": method, "*.mlp.*": method})
    report = veneer.save(model, tmp_path)
    count = sum(p.numel() for p in veneer.trainable(model))
    file = tmp_path / "adapter_model.safetensors"
    tensors, meta = read_tensors(file)
    assert sum(t.numel() for t in tensors.values()) == count == report.parameters
    # beside the numbers: the header, with the config, the manifest and the base's fingerprint in it
    assert file.stat().st_size < 4 * count + 2 * sum(map(len, meta.values())) + 200 * len(tensors)
    bases = sum(b.numel() for name, b in model.named_buffers() if ".shared." in name)
    saving = dataclasses.replace(method, save_bases=True)
    with_bases = veneer.save(adapted(fresh("llama"), {"*.q_proj": saving, "*.mlp.*": saving}), tmp_path / "bases")
    assert with_bases.parameters == count + bases > 2 * count


def test_a_vector_bank_is_saved_once(tmp_path):
    veneer.save(trained("vblora_top")[1], tmp_path)
    tensors, _ = read_tensors(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.vblora_vector_bank"].shape == (12, 8)
    assert sum("bank" in key for key in tensors) == 1
    indices = tensors[f"base_model.model.{Q_PROJ}.vblora_logits_A_topk_indices"]
    assert (indices.dtype, indices.shape) == (torch.uint8, (2, 4, 3))
    assert tensors[f"base_model.model.{Q_PROJ}.vblora_logits_A_topk_weights"].shape == (2, 4, 2)


def test_pruned_triplets_are_not_in_the_file(tmp_path):
    _, model = trained("adalora_pruned")
    veneer.save(model, tmp_path)
    tensors, _ = read_tensors(tmp_path / "adapter_model.safetensors")
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert pattern[f"{Q_PROJ}.lora_E"] == [False, True, True, True]
    assert tensors[f"base_model.model.{Q_PROJ}.lora_A"].shape == (3, 32)
    last = "model.layers.1.self_attn.v_proj"
    assert pattern[f"{last}.lora_E"] == [False] * 4
    assert tensors[f"base_model.model.{last}.lora_B"].shape == (16, 0)
    other = fresh("llama")
    veneer.load(other, without_manifest(tmp_path, tmp_path / "bare"))
    adapter = veneer.adapters(other)["default"].weights[Q_PROJ]
    assert adapter.mask.tolist() == [False, True, True, True]
    assert adapter.E[0] == 0
    assert "AdaLoRA with 3 of 4 ranks on 2 weights" in str(veneer.info(tmp_path / "bare"))
    assert "AdaLoRA with 0 of 4 ranks on 1 weights" in str(veneer.info(tmp_path / "bare"))


@pytest.mark.parametrize(("case", "texts"), [
    ("loha_patterns", ["LoHa of rank 2 on 1 weights", "LoHa of rank 3 on 1 weights", "LoHa of rank 4 on 6 weights"]),
    ("lokr", ["LoKr of rank 2 on 14 weights"]), ("vera_saved", ["VeRA of rank 6 on 4 weights", "Full on 1 weights"]),
    ("vblora_top", ["VBLoRA of rank 2 on 14 weights"]), ("randlora_saved", ["RandLoRA of rank 5 on 6 weights"]),
    ("adalora_rows", ["AdaLoRA with 4 of 4 ranks on 2 weights", "Rows of 3 tokens on 1 weights"]),
])
def test_info_without_a_model(case, texts, tmp_path):
    veneer.save(trained(case)[1], tmp_path / "own")
    about = str(veneer.info(without_manifest(tmp_path / "own", tmp_path / "bare")))
    for text in texts:
        assert f"  {text}" in about


def test_notes_of_what_the_config_cannot_keep(tmp_path):
    def notes(model):
        return " ".join(veneer.save(model, tmp_path).notes)

    assert "PEFT draws them again from projection_prng_key, in bfloat16" in notes(trained("randlora")[1])
    assert "it takes the one copy that is in the file" in notes(trained("randlora_saved")[1])
    assert notes(trained("randlora_sparse")[1]) == notes(trained("vera")[1]) == ""
    half = adapted(fresh("llama").bfloat16(), VeRA(rank=4))
    assert "rounds them to the base model's bfloat16" in notes(half)
    rules = {"block.*": LoHa(rank=2, rank_dropout=0.1),
             "head": LoHa(rank=2, rank_dropout=0.1, rank_dropout_scale=False)}
    assert "PEFT always rescales what LoHa's rank_dropout leaves" in notes(adapted(fresh("mixed"), rules))
    rules = {"block.*": LoKr(rank=2, module_dropout=0.1), "head": LoKr(rank=2)}
    assert "module_dropout is 0.1 in adapter_config.json, which has one value" in notes(adapted(fresh("mixed"), rules))
    assert "total_step is 1 in adapter_config.json, since PEFT must have one" in notes(trained("adalora_no_steps")[1])
    other = fresh("mixed")
    veneer.save(adapted(fresh("mixed"), rules), tmp_path)
    veneer.load(other, tmp_path)
    assert veneer.adapters(other)["default"].weights["head"].method.module_dropout == 0


def test_a_note_of_bases_that_peft_may_have_drawn_otherwise(tmp_path):
    written_by_peft(*READ["randlora"], tmp_path / "drawn")
    assert "in float16 on the others" in str(veneer.load(fresh("llama"), tmp_path / "drawn"))
    written_by_peft(*READ["randlora_saved"], tmp_path / "saved")
    assert veneer.load(fresh("llama"), tmp_path / "saved").notes == ()
    veneer.save(trained("randlora")[1], tmp_path / "own")
    assert veneer.load(fresh("llama"), tmp_path / "own").notes == ()


# -- what all weights share, when not all of them are as they should be ---------------------------------------
@pytest.mark.parametrize("case", ["vblora", "vera_saved", "randlora_saved"])
def test_what_all_share_is_loaded_though_the_weight_that_holds_it_is_not(case, tmp_path):
    _, model = trained(case)
    veneer.save(model, tmp_path / "own")
    first = next(iter(veneer.adapters(model)["default"].weights))

    def misshapen(tensors):
        key = next(key for key in tensors if f".{first}." in key)
        tensors[key] = torch.cat([tensors[key], tensors[key]])

    def shared(loaded):
        return {n: t for n, t in loaded.state_dict().items() if ".shared." in n}

    path = without_manifest(tmp_path / "own", tmp_path / "bare", misshapen)
    other = fresh("llama")
    report = veneer.load(other, path, strict=False)
    assert len(report.problems) == 1
    assert report.weights == len(veneer.adapters(model)["default"].weights) - 1
    for want, got in zip(shared(model).values(), shared(other).values(), strict=True):
        assert torch.equal(got, want)

    def no_state(tensors):
        del tensors[next(key for key in tensors if "bank" in key or key.endswith(("vera_A", "randlora_A")))]

    lone = fresh("llama")
    path = without_manifest(tmp_path / "own", tmp_path / "none", no_state)
    if case == "vera_saved":  # a trained head is there too
        assert veneer.load(lone, path, strict=False).weights == 1
    else:
        with pytest.raises(VeneerError, match=r"nothing in .* fits this model"):
            veneer.load(lone, path, strict=False)


@pytest.mark.parametrize("native", [False, True], ids=["peft", "native"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", [VeRA(rank=6, save_bases=True), RandLoRA(**RANDOM, save_bases=True), VBLoRA(**VB)],
                         ids=["vera", "randlora", "vblora"])
def test_dtypes_of_what_all_share(method, base, dtype, native, tmp_path):
    method = dataclasses.replace(method, dtype=dtype)
    rules = {"*.q_proj": method, "*.k_proj": method} | ({"lm_head": LoRA(rank=2)} if native else {})
    model = adapted(fresh("llama").to(base), rules)
    assert veneer.save(model, tmp_path).format == ("native" if native else "peft")
    other = fresh("llama").to(base)
    assert veneer.load(other, tmp_path).problems == ()
    assert torch.equal(outputs(other, "llama"), outputs(model, "llama"))
    for (name, want), got in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert got.dtype == want.dtype, name

from __future__ import annotations

import json
import re
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import chat_rows, tiny_model, write_jsonl

import veneer
from veneer.train import checks, plots, report, run
from veneer.train.evaluate import Answer, Evaluation
from veneer.train.model import load_model
from veneer.train.report import Results, write_report
from veneer.train.schema import ConfigError
from veneer.train.settings import ModelSettings, TrainingSettings, load_settings


def train(*overrides: str, **options: Any) -> Any:
    return run.train(load_settings("config.yaml", overrides), **options)


def test_a_whole_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = train("training.epochs=10", "training.batch_size=8")
    assert results.after.loss < results.before.loss - 0.3
    assert [(check.name, check.passed) for check in results.checks] == [("reload", True), ("merge", True)]
    shown = capsys.readouterr().out
    for expected in ("14 of 15", "7,424 trainable", "Held out before training: loss", "tokens/s",
                     "exact match", "bit-equal",
                     "of the largest logit (bar 1e-04)"):  # fmt: skip
        assert expected in shown
    assert len(re.findall(r"^request   say ", shown, re.MULTILINE)) == 3
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds"} <= set(rows[0])
    page = Path("out/report.html").read_text()
    assert page.count("<svg") == 2
    assert not re.search(r"(src|href)=[\"']?http", page.replace("xlink:href", "")), "no outside assets"
    figures = json.loads(Path("out/results.json").read_text())
    assert figures["after"]["heldout_loss"] == results.after.loss
    assert len(figures["update_norms"]) == 14
    assert all(value > 0 for value in figures["update_norms"].values())
    assert len(Path("out/answers.jsonl").read_text().splitlines()) == 6


def test_the_saved_adapter_is_the_trained_one(project: Path, tokenizer: Any) -> None:
    results = train()
    settings = load_settings("config.yaml")
    loaded = load_model(settings.model)
    veneer.load(loaded.model, "out/adapter")
    job = run.prepare(settings, run.Console())
    again = run.evaluate(loaded.model, job.data.heldout, job.heldout, job.encoder, settings.evaluation)
    assert again == results.after


def test_failed_checks_are_seen(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checks.logits
    calls: list[int] = []

    def noisy(*args: Any) -> torch.Tensor:
        calls.append(1)
        return real(*args) + (0.01 if len(calls) > 1 else 0) * len(calls)

    monkeypatch.setattr(checks, "logits", noisy)
    found = train("evaluation.generate=false").checks
    assert [check.passed for check in found] == [False, False]
    assert "NOT equal: largest difference" in found[0].detail


def test_dry_run_writes_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(project.rglob("*"))
    assert train(dry_run=True) is None
    assert sorted(project.rglob("*")) == before
    shown = capsys.readouterr().out
    assert "24 training examples, 6 held out" in shown
    assert "forms: messages 24" in shown
    assert "⟦A<|im_end|>⟧" in shown
    assert "steps: 6, each of 4" in shown
    assert re.search(r"AdamW's two moments +\d", shown)
    assert "Dry run: nothing was trained or written." in shown


def test_an_earlier_run_is_not_overwritten_unasked(project: Path) -> None:
    train("training.save_every=3", "evaluation.generate=false")
    with pytest.raises(ConfigError, match=r"'out' holds an earlier run \(adapter, metrics.jsonl, checkpoint-3\)"):
        train()
    with pytest.raises(ConfigError, match=r"'out' holds checkpoints of an earlier run .* resume with --resume"):
        train("output.overwrite=true")
    with pytest.raises(ConfigError, match="--resume: there is no checkpoint 'last' in 'nowhere'"):
        train("output.directory=nowhere", resume="last")


def test_a_template_without_end_token_is_told(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
    (project / "t.jinja").write_text(template + "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")
    train("data.chat_template=t.jinja", dry_run=True)
    shown = capsys.readouterr().out
    assert "the model will not learn to stop" in shown
    assert "user:say a\nassistant:⟦A" in shown
    train(dry_run=True)
    assert "will not learn to stop" not in capsys.readouterr().out


def test_output_directory_that_is_a_file(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("taken").write_text("x")
    monkeypatch.setattr(run, "prepare", None)  # refused before anything is loaded
    for directory in ("taken", "taken/below/it"):
        for dry_run in (True, False):
            with pytest.raises(ConfigError, match=f"output.directory '{directory}': 'taken' is a file, not"):
                train(f"output.directory={directory}", dry_run=dry_run)


@pytest.mark.parametrize("optimizer", typing.get_args(typing.get_type_hints(TrainingSettings)["optimizer"]))
def test_every_optimizer_of_the_schema_trains(project: Path, optimizer: str) -> None:
    found = train(f"training.optimizer={optimizer}", "training.max_steps=1", "evaluation.generate=false",
                  "output.check_merge=false", "output.report=false")  # fmt: skip
    assert max(found.norms.values()) > 0


def _answers(rights: str) -> Evaluation:
    answers = [Answer(prompt=str(i), answer=c, reference="+") for i, c in enumerate(rights)]
    return Evaluation(loss=1.0, answers=answers)


@pytest.mark.parametrize(
    ("after", "samples", "prompts", "note"),
    [
        ("+++++-+-", 3, ["0", "1", "5"], "The first 2 held-out requests, and the first that is answered wrong"),
        ("++++", 3, ["0", "1", "2"], "The first 3 held-out requests;"),
        ("+-+-", 3, ["0", "1", "2"], "The first 3 held-out requests;"),
        ("+-", 1, ["0"], "The first 1 held-out requests;"),
        ("--++", 3, ["0", "1", "2"], "The first 3 held-out requests;"),
    ],
)
def test_samples_show_a_wrong_answer_where_there_is_one(
    after: str, samples: int, prompts: list[str], note: str
) -> None:
    results = Results(title="", before=_answers("-" * len(after)), after=_answers(after), samples=samples)
    shown = report.samples(results)
    assert [sample["prompt"] for sample in shown] == prompts
    assert report.samples_note(shown).startswith(note)


def test_plain_text_without_heldout(project: Path) -> None:
    write_jsonl(project / "text.jsonl", [{"text": "abc" * n} for n in range(1, 9)])
    text = (project / "config.yaml").read_text()
    text = re.sub(r"data:\n  heldout: heldout.jsonl\n  train: train.jsonl", "data:\n  train: text.jsonl", text)
    (project / "config.yaml").write_text(text)
    results = train()
    assert results.before is None
    assert "No held-out data was given." in Path("out/report.html").read_text()


def test_misspelt_target_is_told_before_anything_is_written(project: Path) -> None:
    with pytest.raises(veneer.method.VeneerError, match=r"'\*.q_porj'.*nearest.*q_proj"):
        train("adapter.targets=['*.q_porj']")
    assert not (project / "out" / "adapter").exists()


def test_report_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    answer = Answer(prompt="<b>&", answer="x", reference="y")
    results = Results(
        title="T", before=Evaluation(loss=2.0, answers=[answer]), after=Evaluation(loss=1.0, answers=[answer]),
        metrics=[{"step": 5, "loss": 0.25}], norms={"model.layers.0.q_proj": 0.125},
    )  # fmt: skip
    remark = write_report(results, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert remark is not None
    assert "pip install 'veneer[plot]'" in remark
    assert "Tables instead of plots" in page
    assert "0.2500" in page
    assert "0.125" in page
    assert "&lt;b&gt;&amp;" in page, "texts are escaped"
    assert "<svg" not in page


def test_norms_are_grouped_by_kind() -> None:
    norms = {f"model.layers.{i}.{kind}": float(i) for i in range(3) for kind in ("q_proj", "v_proj")}
    assert plots.group_by_kind(norms) == {
        "model.layers.*.q_proj": [0.0, 1.0, 2.0],
        "model.layers.*.v_proj": [0.0, 1.0, 2.0],
    }
    many = plots.group_by_kind({f"kind{chr(97 + i)}": 1.0 for i in range(20)})
    assert len(many) == 12
    assert len(many["others"]) == 9


def test_merge_check_notices_a_wrong_merge(project: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = veneer.merge

    def wrong(model: Any, name: str) -> None:
        real(model, name)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.01)

    monkeypatch.setattr(veneer, "merge", wrong)
    found = {check.name: check.passed for check in train("evaluation.generate=false").checks}
    assert found == {"reload": True, "merge": False}


def test_chat_rows_are_what_the_tests_assume(tokenizer: Any) -> None:
    assert chat_rows(1)[0]["messages"][1]["content"] == "A"
    assert ModelSettings(name="x").dtype == "auto"
    assert sum(p.numel() for p in tiny_model(tokenizer).parameters()) < 100_000

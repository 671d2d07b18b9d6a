"""The classes of models by task: the same model, with the forward arguments and the trained heads of the task."""

from __future__ import annotations

from typing import Any, cast

from veneer.peft.model import PeftModel
from veneer.peft.types import QA_HEADS, SEQ_CLS_HEADS, TaskType


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward that were given; a base model may not know all of their names."""
    more = arguments.pop("kwargs")
    return {key: value for key, value in arguments.items() if value is not None} | more


class PeftModelForCausalLM(PeftModel, task=TaskType.CAUSAL_LM):
    """For language models."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, labels: Any = None,
                output_attentions: Any = None, output_hidden_states: Any = None, return_dict: Any = None,
                task_ids: Any = None, **kwargs: Any) -> Any:
        return self._run(self.get_base_model(), **_given(
            {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds,
             "labels": labels, "output_attentions": output_attentions, "output_hidden_states": output_hidden_states,
             "return_dict": return_dict, "kwargs": kwargs}))

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return cast(Any, self.get_base_model()).prepare_inputs_for_generation(*args, **kwargs)


class PeftModelForSeq2SeqLM(PeftModel, task=TaskType.SEQ_2_SEQ_LM):
    """For encoder-decoder models."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None,
                decoder_input_ids: Any = None, decoder_attention_mask: Any = None, decoder_inputs_embeds: Any = None,
                labels: Any = None, output_attentions: Any = None, output_hidden_states: Any = None,
                return_dict: Any = None, task_ids: Any = None, **kwargs: Any) -> Any:
        return self._run(self.get_base_model(), **_given(
            {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds,
             "decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask,
             "decoder_inputs_embeds": decoder_inputs_embeds, "labels": labels, "output_attentions": output_attentions,
             "output_hidden_states": output_hidden_states, "return_dict": return_dict, "kwargs": kwargs}))

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return cast(Any, self.get_base_model()).prepare_inputs_for_generation(*args, **kwargs)


class _Classifier(PeftModel):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, labels: Any = None,
                output_attentions: Any = None, output_hidden_states: Any = None, return_dict: Any = None,
                task_ids: Any = None, **kwargs: Any) -> Any:
        return self._run(self.get_base_model(), **_given(
            {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds,
             "labels": labels, "output_attentions": output_attentions, "output_hidden_states": output_hidden_states,
             "return_dict": return_dict, "kwargs": kwargs}))


class PeftModelForSequenceClassification(_Classifier, task=TaskType.SEQ_CLS):
    """For models with a head for whole texts, which is trained."""

    heads = SEQ_CLS_HEADS[::-1]  # PEFT's files name them so


class PeftModelForTokenClassification(_Classifier, task=TaskType.TOKEN_CLS):
    """For models with a head for each token, which is trained."""

    heads = SEQ_CLS_HEADS[::-1]  # PEFT's files name them so


class PeftModelForQuestionAnswering(PeftModel, task=TaskType.QUESTION_ANS):
    """For models with a head for answers' ends, which is trained."""

    heads = QA_HEADS

    def forward(self, input_ids: Any = None, attention_mask: Any = None, token_type_ids: Any = None,
                position_ids: Any = None, inputs_embeds: Any = None, start_positions: Any = None,
                end_positions: Any = None, output_attentions: Any = None, output_hidden_states: Any = None,
                return_dict: Any = None, task_ids: Any = None, **kwargs: Any) -> Any:
        return self._run(self.get_base_model(), **_given(
            {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
             "position_ids": position_ids, "inputs_embeds": inputs_embeds, "start_positions": start_positions,
             "end_positions": end_positions, "output_attentions": output_attentions,
             "output_hidden_states": output_hidden_states, "return_dict": return_dict, "kwargs": kwargs}))


class PeftModelForFeatureExtraction(PeftModel, task=TaskType.FEATURE_EXTRACTION):
    """For models whose hidden states are wanted."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None,
                output_attentions: Any = None, output_hidden_states: Any = None, return_dict: Any = None,
                task_ids: Any = None, **kwargs: Any) -> Any:
        return self._run(self.get_base_model(), **_given(
            {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds,
             "output_attentions": output_attentions, "output_hidden_states": output_hidden_states,
             "return_dict": return_dict, "kwargs": kwargs}))
